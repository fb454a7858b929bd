"""Packed linear layers against the numbers that their bits stand for, in float64."""

import pytest

torch = pytest.importorskip("torch")

from rooflm.lab import packed  # noqa: E402
from rooflm.lab.model import Config, FullCache, Transformer  # noqa: E402

KINDS = [
    pytest.param(
        kind, marks=[] if kind in packed.kinds_here() else pytest.mark.skip("no kernel here")
    )
    for kind in packed.KINDS
]
SHAPES = [(16, 128), (48, 256), (192, 384), (256, 128)]
CONFIG = Config(vocab=96, hidden=128, layers=2, heads=4, kv_heads=2, intermediate=256)


def draw(*shape, seed=0):
    noise = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return noise * torch.linspace(0.01, 3, shape[0])[:, None]  # rows of unlike sizes


def seven_bits(x):
    """One scale for all of x, 128 steps from its smallest to its largest number, 0 among them."""
    low, high = min(x.min().item(), 0.0), max(x.max().item(), 0.0)
    scale = (high - low) / 127
    zero = round(-low / scale)
    return (((x.double() / scale).round() + zero).clamp(0, 127) - zero) * scale


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_a_product_is_that_of_the_dequantized_weight(kind, shape, rows):
    weight, x = draw(*shape), draw(rows, shape[1], seed=1)
    found = packed.PackedLinear(weight, kind)(x)
    assert found.dtype == torch.float32 and found.shape == (rows, shape[0])
    exact = packed.dequantized(weight, kind).double()
    if kind == "int8-dynamic":
        expected, relative = seven_bits(x) @ exact.T, 0.0
    elif kind == "fp16":
        expected, relative = x.double() @ exact.T, 0.0
    else:
        # The input is rounded to BF16, the sums are FP32, and the result is rounded to BF16,
        # which holds 8 significant bits.
        expected, relative = x.bfloat16().double() @ exact.T, 2.0**-8
    summed = x.double().abs() @ exact.abs().T  # an FP32 sum errs by its terms' sizes
    assert ((found - expected).abs() <= relative * expected.abs() + 1e-6 * summed).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_cost_what_their_steps_say(kind):
    """Rounding to nearest errs by half a step, a step being the range over the codes."""
    weight = draw(64, 128)
    error = (packed.dequantized(weight, kind) - weight).abs()
    if kind == "fp16":
        assert (error <= weight.abs() * 2**-11 + 2**-25).all()
        return
    if kind in ("int8", "int8-dynamic"):
        step = weight.abs().amax(1, keepdim=True) / 127
    else:
        group = int(kind.split("-g")[1])
        grouped = weight.view(64, -1, group)
        span = grouped.amax(-1) - grouped.amin(-1)
        step = (span / 15).repeat_interleave(group, 1)
    # BF16 scales move the grid by up to 2^-8 of a range of 15 or 127 steps.
    slack = 1 + 2 * 2**-8 * (127 if "int8" in kind else 15)
    assert (error <= 0.5 * slack * step).all()
    assert (error.amax(1) > 0.1 * step.amax(1)).all()  # and it does err


@pytest.mark.parametrize("group", [32, 128])
def test_codes_of_4_bits_are_the_nearest_of_all_sixteen(group):
    weight = draw(16, 128)
    weight[5], weight[6] = 0.5, 0.7  # equal numbers, exact in BF16 and not
    codes, scales, offsets = packed.int4_codes(weight, group)
    assert scales.dtype == offsets.dtype == torch.bfloat16
    assert codes.min() >= 0 and codes.max() <= 15
    scale, offset = (t.float().repeat_interleave(group, 1)[..., None] for t in (scales, offsets))
    errors = ((torch.arange(16) - 8) * scale + offset - weight[..., None]).abs()
    chosen = errors.gather(-1, codes[..., None].long())[..., 0]
    torch.testing.assert_close(chosen, errors.amin(-1), rtol=1e-5, atol=1e-6)


def test_codes_of_8_bits_are_the_nearest_of_all():
    weight = draw(64, 128)
    codes, scales = packed.int8_codes(weight)
    assert scales.dtype == torch.bfloat16 and codes.dtype == torch.int8
    errors = (torch.arange(-128, 128) * scales.float()[:, None, None] - weight[..., None]).abs()
    chosen = errors.gather(-1, codes[..., None].long() + 128)[..., 0]
    torch.testing.assert_close(chosen, errors.amin(-1), rtol=1e-5, atol=1e-6)


def test_weights_that_come_from_q4_1_find_their_codes_again():
    noise = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (32, 4, 32), generator=noise)
    codes[..., 3], codes[..., 17] = 0, 15  # llama.cpp's scale spans the range that a block has
    d = (torch.rand(32, 4, 1, generator=noise) + 0.1).half().float()
    m = -d * torch.rand(32, 4, 1, generator=noise).mul(15).half().float()
    weight = (d * codes + m).view(32, 128)
    assert torch.equal(packed.int4_codes(weight, 32)[0].view_as(codes).long(), codes)
    error = (packed.dequantized(weight, "int4-g32") - weight).view_as(codes).abs()
    # A scale and an offset of at most 8 steps, each with the 8 significant bits of BF16.
    assert (error <= 2 * 8 * 2**-8 * d).all()


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_that_the_prediction_counts(kind):
    d_out, d_in = 64, 256
    held = packed.PackedLinear(draw(d_out, d_in), kind).packed_bytes
    counted = packed.precision(kind).w * d_out * d_in
    # A bare int8 neglects the scales of the rows: 2 bytes, or FBGEMM's three FP32 numbers.
    neglected = {"int8": 2 * d_out, "int8-dynamic": 12 * d_out}.get(kind, 0)
    assert held == counted + neglected


@pytest.mark.parametrize("kind", ["int8", "int4-g32"])
def test_what_is_kept_has_the_bytes_that_are_reported(kind):
    layer = packed.PackedLinear(draw(64, 256), kind)
    assert layer.packed_bytes == sum(t.untyped_storage().nbytes() for t in layer.kept)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_constants_and_outliers_stay_finite(kind):
    weight = torch.zeros(32, 128)
    weight[1] = 0.25
    weight[2] = -3.0
    weight[3, 7] = 1e4
    weight[4] = 1e-6
    found = packed.PackedLinear(weight, kind)(torch.eye(128)[:9])
    assert found.isfinite().all()
    assert (packed.dequantized(weight, kind)[0] == 0).all() and (found[:, 0] == 0).all()
    values = packed.dequantized(weight, kind)
    assert values[3, 7] == pytest.approx(1e4, rel=0.01)
    torch.testing.assert_close(values[1:3], weight[1:3], rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_model_is_a_new_one_that_shares_what_is_not_packed(kind):
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed_model = packed.pack_model(model, kind)
    after = model.state_dict()
    assert model.head is None and list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert packed_model.embedding.weight is model.embedding.weight
    layers = [m for m in packed_model.modules() if isinstance(m, packed.PackedLinear)]
    assert len(layers) == 7 * CONFIG.layers + 1
    assert not any(isinstance(m, torch.nn.Linear) for m in packed_model.modules())
    assert packed.pack_model(model, kind, head="fp32").head is None


@pytest.mark.parametrize("kind", [k for k in KINDS if k.values[0] in packed.WEIGHT_ONLY])
def test_a_packed_model_decodes_what_it_prefills(kind):
    """Rows do not know of each other: a weight-only product rounds no input by its neighbours."""
    torch.manual_seed(0)
    model = packed.pack_model(Transformer(CONFIG).eval(), kind)
    tokens = torch.arange(12).view(2, 6)
    with torch.inference_mode():
        at_once = model(tokens)
        cache = FullCache()
        steps = [model(tokens[:, i : i + 1], cache) for i in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), at_once, rtol=0.02, atol=0.004)


def test_the_weights_of_a_packed_model_are_those_of_its_dequantized_one():
    torch.manual_seed(0)
    model = Transformer(CONFIG).eval()
    tokens = torch.arange(10)[None]
    rounded = Transformer(CONFIG).eval()
    rounded.load_state_dict(model.state_dict())
    for block in rounded.layers:
        for name, child in block.named_children():
            if isinstance(child, torch.nn.Linear):
                child.weight.data = packed.dequantized(getattr(block, name).weight.data, "fp16")
    if "fp16" not in packed.kinds_here():
        pytest.skip("no kernel here")
    found = packed.pack_model(model, "fp16", head="fp32")(tokens)
    torch.testing.assert_close(found, rounded(tokens), rtol=1e-4, atol=1e-5)
    assert not torch.equal(found, model(tokens))


def test_a_lacking_kernel_is_named(monkeypatch):
    def none(*_):
        raise NotImplementedError("could not run\non this processor")

    monkeypatch.setattr(packed, "_multiply", none)
    packed._lacking.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"has no int8 kernel .* runs here: none") as error:
            packed.PackedLinear(torch.zeros(16, 128), "int8")
        assert "\n" not in str(error.value)
        assert packed.kinds_here() == []
    finally:
        monkeypatch.undo()
        packed._lacking.cache_clear()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packed.PackedLinear(torch.zeros(16, 128), "int5"), "unknown kind"),
        (lambda: packed.precision("int4"), "nearest: int4-g128"),
        (lambda: packed.PackedLinear(torch.zeros(24, 128), "int8"), "24 x 128 can't be packed"),
        (lambda: packed.PackedLinear(torch.zeros(16, 96), "int4-g64"), "multiples of 16 x 64"),
        (lambda: packed.dequantized(torch.zeros(16, 128), "int7"), "unknown kind"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
