"""Adapters on a quantized base: what they start from, what training leaves alone, merging."""

import itertools

import pytest
import torch

from rooflm.lab.calibrate import LINEARS
from rooflm.lab.finetune import fit, next_token_loss, text_batches
from rooflm.lab.model import Config, Transformer
from rooflm.lab.quantize.codecs import to_format
from rooflm.lab.quantize.grids import encode, fit_grid, round_to_nearest, to_groups
from rooflm.lab.quantize.lora import FrozenLinear, GridLinear, LoraLinear, initial_adapter
from rooflm.lab.quantize.peft import (
    footprint,
    loftq,
    loftq_init,
    lora,
    low_rank,
    merged,
    qa_lora,
    qa_lora_merge,
    qlora,
)
from rooflm.roofline.formats import load_format

CONFIG = Config(vocab=29, hidden=64, layers=2, heads=2, kv_heads=1, intermediate=128, window=16)
SHAPES = {  # (d_out, d_in), by hand
    "q_proj": (64, 64),
    "k_proj": (32, 64),
    "v_proj": (32, 64),
    "o_proj": (64, 64),
    "gate_proj": (128, 64),
    "up_proj": (128, 64),
    "down_proj": (64, 128),
}
WEIGHTS = 2 * sum(d_out * d_in for d_out, d_in in SHAPES.values())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def tiny_model():
    """Random weights, FP16 numbers all."""
    model, generator = Transformer(CONFIG), seeded(7)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = (noise * 0.5 * parameter.shape[1] ** -0.5).half().float()
    model.embedding.weight.data *= 4
    return model.eval().requires_grad_(False)


def tokens(rows, length, seed=0):
    return torch.randint(CONFIG.vocab, (rows, length), generator=seeded(seed))


ADAPTED = {
    "lora": lambda model: lora(model, 4, seeded()),
    "qlora": lambda model: qlora(model, 4, seeded()),
    "qlora-int3": lambda model: qlora(model, 4, seeded(), "int3-g32", scaling=2.0),
    "loftq": lambda model: loftq(model, 4, iterations=2),
    "loftq-int2": lambda model: loftq(model, 4, "int2-g32", iterations=2, scaling=0.5),
    "qa-lora": lambda model: qa_lora(model, 2, seeded(), bits=4, group=32),
    "qa-lora-2": lambda model: qa_lora(model, 4, seeded(), bits=2, group=16, scaling=2.0),
}
every_kind = pytest.mark.parametrize("kind", list(ADAPTED))


def adapters(model):
    layers = [getattr(block, name) for block in model.layers for name in LINEARS]
    return {f"{i}.{x}": getattr(layer, x) for i, layer in enumerate(layers) for x in "ab"}


def randomized(model):
    """The model with adapters that do something, as if trained."""
    generator = seeded(3)
    for parameter in adapters(model).values():
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def everything_else(model):
    """All that is stored beside the adapters, buffers included."""
    return {
        name: tensor.clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if not name.endswith((".a", ".b"))
    }


# ---- the adapter


def test_with_b_zero_the_logits_are_those_of_the_base():
    model, batch = tiny_model(), tokens(2, 9)
    assert torch.equal(lora(model, 4, seeded())(batch), model(batch))  # weights are FP16 numbers


@pytest.mark.parametrize("number_format", ["nf4-dq", "int3-g32", "int2-g64-sym", "fp8"])
def test_qlora_starts_from_the_plainly_quantized_model(number_format):
    model, batch = tiny_model(), tokens(2, 9)
    ours = qlora(model, 4, seeded(), number_format)(batch)
    for block in model.layers:
        for name in LINEARS:
            layer = getattr(block, name)
            layer.weight.data = to_format(layer.weight, number_format)
    assert torch.equal(ours, model(batch))


def test_qa_lora_starts_from_the_model_rounded_to_its_grid():
    model, batch = tiny_model(), tokens(2, 9)
    ours = qa_lora(model, 4, seeded(), bits=3, group=16)(batch)
    for block in model.layers:
        for name in LINEARS:
            layer = getattr(block, name)
            layer.weight.data = round_to_nearest(layer.weight, 3, 16)
    assert torch.equal(ours, model(batch))


def test_an_adapted_layer_is_base_plus_scaled_product():
    base, a, b, x = normal(6, 8), normal(3, 8, seed=1), normal(6, 3, seed=2), normal(2, 5, 8)
    layer = LoraLinear(FrozenLinear(base, 0), a, b, scaling=0.7)
    dense = (base.double() + 0.7 * b.double() @ a.double()).float()
    torch.testing.assert_close(layer(x).detach(), x @ dense.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.detach(), dense)


def test_a_pooled_adapter_adds_one_number_to_each_group_of_each_row():
    base, a, b, x = normal(6, 8), normal(3, 2, seed=1), normal(6, 3, seed=2), normal(5, 8, seed=4)
    layer = LoraLinear(FrozenLinear(base, 0), a, b, scaling=0.7, pool=4)
    dense = base.clone()
    for row, column in itertools.product(range(6), range(8)):
        dense[row, column] += 0.7 * sum(b[row, r] * a[r, column // 4] for r in range(3))
    torch.testing.assert_close(layer(x).detach(), x @ dense.T, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.detach(), dense)


def test_adapters_of_the_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"a is \(3, 8\).*allowed: \(rank, 2\) and \(6, rank\)"):
        LoraLinear(FrozenLinear(normal(6, 8), 0), normal(3, 8), normal(6, 3), pool=4)


def test_the_start_has_b_zero_and_leaves_a_products_size_alone():
    a, b = initial_adapter((20, 400), 8, seeded())
    assert (b == 0).all()
    inputs = normal(500, 400, seed=1)
    assert (inputs @ a.T).std().item() == pytest.approx(1, rel=0.1)
    pooled, _ = initial_adapter((20, 400), 8, seeded(), pool=20)
    assert pooled.shape == (8, 20)
    assert (inputs.unflatten(1, (20, 20)).sum(-1) @ pooled.T).std().item() == pytest.approx(
        1, rel=0.2
    )


# ---- LoftQ


def frobenius(matrix):
    return matrix.double().square().sum().item()


@pytest.mark.parametrize("rank", [0, 1, 3, 8])
def test_the_low_rank_step_is_the_eckart_young_optimum(rank):
    matrix = normal(8, 12)
    a, b = low_rank(matrix, rank)
    assert a.shape == (rank, 12)
    assert b.shape == (8, rank)
    tail = torch.linalg.svdvals(matrix.double())[rank:].square().sum().item()
    assert frobenius(matrix - b @ a) == pytest.approx(tail, rel=1e-4, abs=1e-9)


def test_alternating_least_squares_finds_no_better_factors():
    matrix = normal(8, 12).double()
    a, b = low_rank(matrix, 2)
    ours = frobenius(matrix - b @ a)
    for seed in range(5):
        right = normal(2, 12, seed=seed).double()
        for _ in range(300):
            left = torch.linalg.lstsq(right.T, matrix.T).solution.T
            right = torch.linalg.lstsq(left, matrix).solution
        theirs = frobenius(matrix - left @ right)
        assert ours <= theirs * (1 + 1e-9)
    assert theirs == pytest.approx(ours, rel=1e-4)


QUANTIZERS = {
    "int2": lambda w: round_to_nearest(w, 2, 8),
    "int4": lambda w: round_to_nearest(w, 4, symmetric=True),
    "binary": lambda w: to_format(w, "binary"),
}
every_quantizer = pytest.mark.parametrize("quantize", QUANTIZERS.values(), ids=list(QUANTIZERS))


@every_quantizer
def test_at_rank_0_loftq_is_plain_quantization(quantize):
    weight = normal(16, 24)
    found = loftq_init(weight, quantize, 0)
    assert torch.equal(found.quantized, quantize(weight))
    assert found.a.numel() == found.b.numel() == 0


@every_quantizer
def test_at_full_rank_nothing_is_lost(quantize):
    weight = normal(16, 24)
    found = loftq_init(weight, quantize, 16)
    torch.testing.assert_close(found.quantized + found.b @ found.a, weight, rtol=0, atol=1e-5)


@every_quantizer
def test_one_iteration_leaves_the_tail_of_the_errors_singular_values(quantize):
    weight = normal(16, 24)
    found = loftq_init(weight, quantize, 3, iterations=1)
    error = frobenius(weight - found.quantized - found.b @ found.a)
    tail = torch.linalg.svdvals((weight - quantize(weight)).double())[3:].square().sum().item()
    assert error == pytest.approx(tail, rel=1e-4)


@every_quantizer
def test_the_svd_step_never_raises_the_error(quantize):
    weight = normal(16, 24)
    correction = torch.zeros_like(weight)
    for iterations in (1, 2, 3, 4):
        found = loftq_init(weight, quantize, 4, iterations)
        # The step before the SVD: the new base beside the adapter of one iteration less.
        assert torch.equal(found.quantized, quantize(weight - correction))
        before = frobenius(weight - found.quantized - correction)
        correction = found.b @ found.a
        assert frobenius(weight - found.quantized - correction) <= before * (1 + 1e-6)


def test_iterating_lowers_the_error_of_most_weights():
    # It is a heuristic: the new grid may be worse. On random weights it seldom is.
    better = 0
    for seed in range(20):
        weight = normal(32, 48, seed=seed)
        errors = []
        for iterations in (1, 5):
            q, a, b = loftq_init(weight, QUANTIZERS["int2"], 6, iterations)
            errors.append(frobenius(weight - q - b @ a))
        better += errors[1] < errors[0]
    assert better >= 15


def test_loftq_leaves_its_argument_alone_and_takes_no_impossible_rank():
    weight = normal(16, 24)
    before = weight.clone()
    loftq_init(weight, QUANTIZERS["int2"], 3)
    assert torch.equal(weight, before)
    for rank in (-1, 17, 2.0, True):
        with pytest.raises(ValueError, match=r"rank is .*; allowed: a whole number from 0 to 16"):
            loftq_init(weight, QUANTIZERS["int2"], rank)
    with pytest.raises(ValueError, match="iterations is 0"):
        loftq_init(weight, QUANTIZERS["int2"], 3, 0)


@pytest.mark.parametrize("kind", ["loftq", "loftq-int2"])
def test_a_loftq_model_starts_nearer_to_the_original_than_qlora(kind):
    model, batch = tiny_model(), tokens(4, 12)
    number_format = "nf4-dq" if kind == "loftq" else "int2-g32"
    original = model(batch)
    ours = (ADAPTED[kind](model)(batch) - original).square().mean()
    plain = (qlora(model, 4, seeded(), number_format)(batch) - original).square().mean()
    assert ours < 0.9 * plain


@pytest.mark.parametrize("scaling", [1.0, 0.25])
def test_a_loftq_layer_is_what_loftq_init_found_whatever_its_scaling(scaling):
    model = tiny_model()
    layer = loftq(model, 4, "int2-g32", iterations=2, scaling=scaling).layers[1].down_proj
    weight = model.layers[1].down_proj.weight
    q, a, b = loftq_init(weight, lambda w: to_format(w, "int2-g32"), 4, 2)
    assert torch.equal(layer.base.weight, q)
    torch.testing.assert_close(layer.weight.detach(), q + b @ a)


# ---- QA-LoRA


def grouped_weight(bits, group, seed=0):
    weight = to_groups(normal(12, 64, seed=seed), group)
    grid = fit_grid(weight, bits)
    return encode(weight, grid), grid


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 16), (2, 8), (4, 64), (4, 1)])
def test_the_merged_layer_computes_what_base_and_adapter_did(bits, group):
    codes, grid = grouped_weight(bits, group)
    a, b, x = normal(3, 64 // group, seed=1), normal(12, 3, seed=2), normal(7, 64, seed=3)
    base = GridLinear(codes, grid.scale, grid.zero, bits, zero_bits=bits)
    layer = LoraLinear(base, a, b, scaling=0.3, pool=group)
    zero = qa_lora_merge(grid.zero, grid.scale, a, b, 0.3)
    alone = GridLinear(codes, grid.scale, zero, bits, zero_bits=16)
    torch.testing.assert_close(alone(x), layer(x).detach(), rtol=1e-4, atol=1e-4)
    assert (alone(x) - base(x)).abs().max() > 0.1  # the adapter does something


def test_merging_changes_zero_points_only_and_leaves_whole_codes():
    model = randomized(qa_lora(tiny_model(), 4, seeded(), bits=3, group=16))
    final = merged(model)
    for old, new in zip(model.layers, final.layers, strict=True):
        for name in LINEARS:
            base, layer = getattr(old, name).base, getattr(new, name)
            assert type(layer) is GridLinear
            assert torch.equal(layer.codes, base.codes)
            assert torch.equal(layer.scale, base.scale)
            assert not torch.equal(layer.zero, layer.zero.round())
            assert torch.equal(layer.zero, layer.zero.half().float())  # as it is stored
            # The weight is still 8 evenly spaced points a group, a step of the old scale apart.
            codes = to_groups(layer.weight, 16) / layer.scale + layer.zero
            assert (codes - codes.round()).abs().max() < 1e-3
            assert codes.round().min() >= 0
            assert codes.round().max() <= 7


@pytest.mark.parametrize(("bits", "group"), [(4, 32), (2, 16)])
def test_a_merged_model_keeps_its_logits_up_to_fp16_zero_points(bits, group):
    model = randomized(qa_lora(tiny_model(), 2, seeded(), bits=bits, group=group))
    batch = tokens(4, 12)
    ours, final = model(batch).detach(), merged(model)(batch)
    base = qa_lora(tiny_model(), 2, seeded(), bits=bits, group=group)(batch).detach()
    assert (ours - base).abs().max() > 0.5
    # A zero point of 16 steps in FP16 is off by at most 2^-8 of a step.
    assert (final - ours).abs().max() < 0.02
    assert not any(p.requires_grad for p in merged(model).parameters())


@pytest.mark.parametrize("kind", ["lora", "qlora", "qlora-int3", "loftq"])
def test_other_adapters_merge_into_plain_fp16_weights(kind):
    model, batch = randomized(ADAPTED[kind](tiny_model())), tokens(4, 12)
    final = merged(model)
    layer = final.layers[1].down_proj
    assert type(layer) is torch.nn.Linear
    assert torch.equal(layer.weight, layer.weight.half().float())
    assert (final(batch) - model(batch).detach()).abs().max() < 0.02
    # What was a 4-bit grid no longer is one: a row of 128 has more than 16 levels.
    assert len(layer.weight[0, :64].unique()) > 16


def test_a_model_without_adapters_is_not_merged():
    with pytest.raises(ValueError, match="the layer is a Linear; allowed: a LoraLinear"):
        merged(tiny_model())


# ---- training


@every_kind
def test_training_learns_and_never_changes_the_base(kind):
    original = tiny_model()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    model = ADAPTED[kind](original)
    base, start = (
        everything_else(model),
        {n: p.detach().clone() for n, p in adapters(model).items()},
    )
    losses = fit(model, itertools.repeat(tokens(2, 13)), next_token_loss, 15, 3e-2)
    assert losses[-1] < 0.75 * losses[0]
    after = everything_else(model)
    assert base.keys() == after.keys()
    assert all(torch.equal(base[name], after[name]) for name in base)  # bit for bit
    assert all(not torch.equal(start[name], p) for name, p in adapters(model).items())
    assert all(torch.equal(before[name], t) for name, t in original.state_dict().items())


@every_kind
def test_only_the_adapters_require_a_gradient(kind):
    model = ADAPTED[kind](tiny_model())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    expected = {f"layers.{i}.{name}.{x}" for i, name, x in itertools.product((0, 1), SHAPES, "ab")}
    assert trained == expected


@pytest.mark.parametrize("kind", ["qlora", "loftq", "qa-lora"])
def test_the_same_seeds_give_the_same_adapters(kind):
    def trained(seed):
        model = ADAPTED[kind](tiny_model())
        batches = text_batches(tokens(1, 99)[0], 2, 8, seed)
        return fit(model, batches, next_token_loss, 3, 1e-2), adapters(model)

    first, again, other = trained(1), trained(1), trained(2)
    assert first[0] == again[0]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert first[0] != other[0]


def test_another_generator_gives_another_start():
    first, other = (qlora(tiny_model(), 4, seeded(s)).layers[0].q_proj.a for s in (0, 1))
    assert not torch.equal(first, other)


# ---- what it takes


def test_trainable_parameters_and_bytes_by_hand():
    sides = 2 * sum(d_out + d_in for d_out, d_in in SHAPES.values())
    plain = footprint(tiny_model())
    assert plain == (WEIGHTS, 0, 2 * WEIGHTS, 0)
    assert plain.bits_per_weight == 16
    found = footprint(qlora(tiny_model(), 4, seeded(), "int4-g32"))
    assert found.trainable == 4 * sides
    assert found.adapter_bytes == 8 * sides
    assert found.base_bytes == WEIGHTS * (4 + 20 / 32) / 8
    assert found.training_bytes == found.base_bytes + 64 * sides
    pooled = footprint(qa_lora(tiny_model(), 2, seeded(), bits=4, group=32))
    assert pooled.trainable == 2 * 2 * sum(d_out + d_in // 32 for d_out, d_in in SHAPES.values())
    assert pooled.base_bytes == found.base_bytes


def test_double_quantized_nf4_takes_its_formats_bits_and_a_mean_a_layer():
    found = footprint(qlora(tiny_model(), 4, seeded()))
    bits = 8 * found.base_bytes / WEIGHTS
    # Each of 14 layers also stores the mean of its scales, and a scale for a last, short group.
    assert load_format("nf4-dq").bits < bits < load_format("nf4-dq").bits + 14 * 64 / WEIGHTS


def test_a_merged_qa_lora_layer_takes_the_bits_of_q4_1():
    # 4-bit codes with two FP16 numbers for 32 of them, and no adapter.
    found = footprint(merged(qa_lora(tiny_model(), 2, seeded(), bits=4, group=32)))
    assert found.bits_per_weight == load_format("q4_1").bits == 5
    assert found.adapter_bytes == found.trainable == 0
    assert footprint(merged(qlora(tiny_model(), 4, seeded()))).bits_per_weight == 16


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda m: qlora(m, 0, seeded()), "rank is 0; allowed: a whole number from 1 to"),
        (lambda m: qlora(m, 33, seeded()), r"rank is 33.* to 32 for \(32, 64\)"),
        (lambda m: qlora(m, 4, seeded(), "nf5"), "unknown number format 'nf5'"),
        (lambda m: qa_lora(m, 3, seeded(), group=32), r"rank is 3.* to 2 for \(64, 2\)"),
        (lambda m: qa_lora(m, 1, seeded(), group=48), "group is 48"),
        (lambda m: qlora(qlora(m, 1, seeded()), 1, seeded()), "LoraLinear"),
    ],
)
def test_bad_arguments_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make(tiny_model())
