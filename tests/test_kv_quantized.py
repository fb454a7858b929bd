"""Quantized KV caches: storage against loops, full precision against no cache at all."""

import itertools
from functools import partial

import pytest
import torch

from rooflm.lab.kvcache import binary_kv, distributions, kivi, kvquant, scaled, wkvquant
from rooflm.lab.kvcache.coded import CodedCache
from rooflm.lab.kvcache.packing import pack, unpack
from rooflm.lab.kvcache.quantized import QUANTIZED
from rooflm.lab.model import Config, FullCache, Transformer, attend
from rooflm.lab.quantize.float_codecs import E4M3, float_points

CONFIG = Config(vocab=97, hidden=128, layers=2, heads=4, kv_heads=2, intermediate=96, window=128)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    made = Transformer(CONFIG).eval().requires_grad_(False)
    for block in made.layers:  # noise of 0.02 attends to everything alike: sharpen it
        block.k_proj.weight.mul_(12)
        block.q_proj.weight.mul_(12)
    return made


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, 97, (2, 128), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def x():
    return torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 3 + 1


def chunks(n, seed):
    """A random division of n tokens into passes."""
    generator, left = torch.Generator().manual_seed(seed), n
    while left:
        step = min(left, int(torch.randint(1, 40, (), generator=generator)))
        yield step
        left -= step


def read_in_chunks(model, tokens, cache, seed=0):
    parts, start = [], 0
    for step in chunks(tokens.shape[1], seed):
        parts.append(model(tokens[:, start : start + step], cache))
        start += step
    return torch.cat(parts, 1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_codes_come_back_and_take_their_bits(bits):
    codes = torch.randint(0, 2**bits, (3, 5, 24), generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.nbytes * 8 == codes.numel() * bits
    assert torch.equal(unpack(packed, bits).long(), codes)


def test_a_byte_holds_the_first_code_lowest():
    assert pack(torch.tensor([3, 0, 0, 1]), 2).item() == 0b01000011
    assert pack(torch.tensor([1, 15]), 4).item() == 0xF1


def test_packing_refuses_half_bytes_and_odd_widths():
    with pytest.raises(ValueError, match="unfilled"):
        pack(torch.zeros(5), 4)
    with pytest.raises(ValueError, match="whole number from 1 to 8"):
        pack(torch.zeros(8), 9)


@pytest.mark.parametrize(
    ("along", "bits"), [*itertools.product(["channel", "token"], [1, 2, 4, 8])]
)
def test_uniform_codec_equals_a_loop_over_groups(x, along, bits):
    codec = kivi.Uniform(bits, along, 16)
    kept = codec.decode(codec.encode(x))
    for b, g, i, j in itertools.product(range(2), range(3), range(0, 64, 21), range(0, 32, 13)):
        if along == "channel":
            group = x[b, g, i // 16 * 16 : i // 16 * 16 + 16, j]
        else:
            group = x[b, g, i, j // 16 * 16 : j // 16 * 16 + 16]
        low, high = group.min().item(), group.max().item()
        step = (high - low) / (2**bits - 1)
        points = low + step * torch.arange(2**bits)
        nearest = points[(points - x[b, g, i, j]).abs().argmin()].item()
        # The scale and the minimum are FP16: relative 2^-10 of what they reach.
        slack = 2**-10 * (abs(low) + (high - low))
        error = abs(kept[b, g, i, j].item() - x[b, g, i, j].item())
        assert error <= abs(nearest - x[b, g, i, j].item()) + slack


@pytest.mark.parametrize("along", ["channel", "token"])
def test_no_number_is_off_by_more_than_half_a_step(x, along):
    for bits, shift in itertools.product((1, 2, 3, 4, 8), (0.0, 100.0, -1000.0)):
        codec, moved = kivi.Uniform(bits, along, 32), x + shift
        stored = codec.encode(moved)
        error = kivi.to_groups((codec.decode(stored) - moved).abs(), along, 32)
        assert (error <= stored[1].float() / 2 + 1e-4 * (1 + abs(shift)) / 10).all()


def test_a_group_of_equal_numbers_is_kept(x):
    for value in (0.0, 2.5, -3.0):
        codec = kivi.Uniform(2, "channel", 32)
        kept = codec.decode(codec.encode(torch.full((1, 1, 32, 8), value)))
        assert (kept == value).all()
        group = torch.full((1, 32), value)  # KIVI's own code: 0 / 0, which packing would hide
        assert (kivi.encode(group, kivi.fit_range(group, 2), 2) == 0).all()
    odd = torch.full((1, 1, 32, 8), 1 / 3)
    kept = codec.decode(codec.encode(odd))
    assert torch.isfinite(kept).all() and (kept - odd).abs().max() < 1e-3


def test_values_beyond_fp16_saturate():
    codec = kivi.Uniform(4, "token", 8)
    kept = codec.decode(codec.encode(torch.tensor([[[[0.0, 1e6, 0, 0, 0, 0, 0, -1e6]]]])))
    assert torch.isfinite(kept).all()


@pytest.mark.parametrize("residual", [0, 32])
def test_stored_bytes_are_what_the_formula_says(x, residual):
    cache = kivi.kivi(2, 32, residual)
    cache.store(0, x, x)
    coded = 64 - residual
    assert cache.coded == coded
    bits = cache._codecs[0].bits_per_number  # 2 + 32/32
    assert cache.nbytes == 2 * 2 * 3 * 32 * (coded * bits / 8 + residual * 2)


@pytest.mark.parametrize("name", QUANTIZED)
def test_full_precision_equals_no_cache(model, tokens, name):
    """With all positions recent, in FP32, logits equal those of the uncached pass."""
    made = QUANTIZED[name](model, tokens[0])()
    for seed in range(2):
        again = CodedCache(
            *made._codecs, residual=1000, sinks=made.sinks, before_rope=made.before_rope,
            full=torch.float32,
        )  # fmt: skip
        found = read_in_chunks(model, tokens, again, seed)
        assert (found - model(tokens)).abs().max() < 1e-4
        assert again.length == 128 and again.coded == 0


@pytest.mark.parametrize("name", QUANTIZED)
def test_rounded_caches_stay_near_and_take_less(model, tokens, name):
    cache, full = QUANTIZED[name](model, tokens[0])(), FullCache()
    found = read_in_chunks(model, tokens, cache)
    model(tokens, full)
    assert torch.isfinite(found).all()
    assert cache.length == full.length == 128
    assert cache.nbytes < full.nbytes * 0.62  # FP32: an eighth to a half, and the recent part
    k, v = cache.read(0)
    assert k.shape == v.shape == (2, 2, 128, 32)


@pytest.mark.parametrize("name", QUANTIZED)
def test_any_chunking_leaves_the_same_cache(model, tokens, name):
    make = QUANTIZED[name](model, tokens[0])
    keys = torch.randn(2, 2, 128, 32, generator=torch.Generator().manual_seed(5))
    values = torch.randn(2, 2, 128, 32, generator=torch.Generator().manual_seed(6))
    at_once = make()
    at_once.store(0, keys, values)
    for seed in range(3):
        cache, start = make(), 0
        for step in chunks(128, seed):
            part = slice(start, start + step)
            cache.store(0, keys[:, :, part], values[:, :, part])
            start += step
        assert cache.nbytes == at_once.nbytes
        for ours, theirs in zip(cache.read(0), at_once.read(0), strict=True):
            assert torch.equal(ours, theirs)


def test_the_running_pass_is_read_unrounded(model, tokens):
    """Past-only quantization: a whole text read in one pass meets no rounding at all."""
    cache = kivi.kivi(1, 8, residual=0)
    assert (model(tokens, cache) - model(tokens)).abs().max() < 1e-4
    assert cache.coded == 128
    assert (
        model(tokens[:, :4], cache) - model(torch.cat([tokens, tokens[:, :4]], 1))[:, -4:]
    ).abs().max() > 1e-2


def test_sequences_of_a_batch_do_not_mix(model, tokens):
    for name in ("kivi-2", "kvquant-3", "turbo-3", "binary-10"):
        make = QUANTIZED[name](model, tokens[0])
        both = read_in_chunks(model, tokens, make())
        alone = torch.cat([read_in_chunks(model, row[None], make()) for row in tokens])
        assert (both - alone).abs().max() < 1e-3


def test_sinks_stay_exact():
    x = torch.randn(1, 2, 40, 16)
    cache = CodedCache(kivi.Uniform(1, "token", 8), kivi.Uniform(1, "token", 8), sinks=3)
    for i in range(40):
        cache.store(0, x[:, :, i : i + 1], x[:, :, i : i + 1])
    k, _ = cache.read(0)
    assert torch.equal(k[:, :, :3], x[:, :, :3].half().float())
    assert not torch.equal(k[:, :, 3:6], x[:, :, 3:6].half().float()) and cache.coded == 37


def test_levels_are_the_best_of_all_partitions():
    """Weighted k-means against every partition of a sorted list into intervals."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        values = torch.randn(9, generator=generator).double().sort().values
        weights = torch.rand(9, generator=generator).double()

        def cost(levels, values=values, weights=weights):
            return (weights * (values[:, None] - levels).square().amin(1)).sum().item()

        best = min(
            cost(torch.stack([(weights[a:b] @ values[a:b]) / weights[a:b].sum()
                              for a, b in itertools.pairwise((0, *cuts, 9))]))
            for cuts in itertools.combinations(range(1, 9), 3)
        )  # fmt: skip
        assert cost(kvquant.weighted_levels(values, weights, 2)) <= best * 1.01 + 1e-6


def test_outliers_come_back_as_they_were(x):
    x = x.half().float()
    x[0, 1, 5, 7], x[1, 2, 9, 3] = 60.0, -45.0
    codec = kvquant.fit_values(x, torch.ones_like(x), 3, 0.01)
    assert codec.apart == 1
    kept = codec.decode(codec.encode(x))
    assert kept[0, 1, 5, 7] == 60 and kept[1, 2, 9, 3] == -45
    keys = kvquant.fit_keys(x[:, :, :5], torch.ones(2, 3, 5, 32), 3, 0.01)
    kept = keys.decode(keys.encode(x))
    assert kept[0, 1, 5, 7] == 60 and kept[1, 2, 9, 3] == -45


def test_sparse_and_dense_parts_split_a_token(x):
    """Numbers apart are exact, the others on a level of their token's range."""
    codec = kvquant.fit_values(x, torch.ones_like(x), 2, 0.05)
    codes, places, kept, middle, half = codec.encode(x)
    tokens = kvquant.to_tokens(x)
    assert torch.equal(kept, tokens.gather(-1, places.long()).half())
    dense = kvquant.to_tokens(codec.decode((codes, places, kept, middle, half)))
    others = torch.ones_like(tokens, dtype=torch.bool).scatter(-1, places.long(), False)
    on_levels = ((dense - middle.float()) / half.float())[..., None] - codec.levels
    assert on_levels.abs().amin(-1)[others].max() < 1e-4


def test_a_token_of_equal_numbers_is_kept():
    flat = torch.full((1, 2, 3, 16), 0.5)
    codec = kvquant.TableCodec(torch.tensor([-1.0, 0.0, 0.25, 1.0]), 2, 1, 2)
    assert torch.equal(codec.decode(codec.encode(flat)), flat)


def test_gradients_are_those_of_finite_differences(model, tokens):
    held = distributions.capture(model, tokens[:1, :12], gradients=True)

    class Nudged(distributions.Captured):
        def attend(self, layer, queries, keys, values, rope):
            if layer == 0:
                values = values.clone()
                values[0, 1, 4, 3] += nudge
            return super().attend(layer, queries, keys, values, rope)

    def loss():
        logits = model(tokens[:1, :12], Nudged()).double().log_softmax(-1)
        return -logits[0, :-1].gather(-1, tokens[0, 1:12, None]).sum().item()

    nudge = 1e-2
    above = loss()
    nudge = -1e-2
    slope = (above - loss()) / 2e-2
    assert held.value_gradients[0][0, 1, 4, 3].item() == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_captured_keys_are_the_projections(model, tokens):
    held = distributions.capture(model, tokens)
    inputs = model.layers[0].attn_norm(model.embedding(tokens))
    keys = model.layers[0].k_proj(inputs).view(2, 128, 2, 32).transpose(1, 2)
    assert torch.allclose(held.keys[0], keys, atol=1e-5)
    assert torch.allclose(held.rotated[0], model.rope(keys, 0), atol=1e-5)


def test_smoothing_makes_channels_alike():
    x = torch.randn(1, 1, 200, 16) * torch.logspace(-1, 2, 16) + torch.linspace(-50, 50, 16)
    shift, scale = wkvquant.channel_ranges(x)
    smooth = (x - shift) / scale
    assert smooth.amax(2).allclose(torch.ones(16)) and smooth.amin(2).allclose(-torch.ones(16))
    plain, inner = kivi.Uniform(4, "token", 16), kivi.Uniform(4, "token", 16)
    codec = wkvquant.Smoothed(inner, shift, scale)

    def error(c):
        return ((c.decode(c.encode(x)) - x) / x.std(2, keepdim=True)).square().mean()

    assert error(codec) < error(plain) / 100


@pytest.mark.parametrize("centred", [False, True])
def test_partial_binarization_equals_a_loop(centred):
    x = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(4)) + 0.5
    codec = binary_kv.PartlyBinary(0.25, "token", 16, centred=centred)
    kept = codec.decode(codec.encode(x))
    for g, i in itertools.product(range(2), range(16)):
        row = x[0, g, i]
        mean = row.mean().half().float() if centred else 0.0
        order = (row - mean).abs().argsort(descending=True)
        rest = order[4:]
        alpha = (row - mean)[rest].abs().mean()
        expected = mean + torch.where(row - mean >= 0, alpha, -alpha)
        assert torch.allclose(kept[0, g, i, rest], expected[rest], atol=2e-3)
        assert torch.allclose(kept[0, g, i, order[:4]], row[order[:4]], atol=2e-2)


def test_alpha_is_the_best_scale_of_signs(x):
    codec = binary_kv.PartlyBinary(0, "token", 32)
    alpha = codec.encode(x)[1]
    grouped = kivi.to_groups(x, "token", 32)

    def error(scale):
        return (grouped - torch.where(grouped >= 0, scale, -scale)).square().sum(-1)

    for factor in (0.9, 0.98, 1.02, 1.1):
        assert (error(alpha.float()) <= error(alpha.float() * factor) + 1e-3).all()


def test_stored_bits_of_partial_binarization(x):
    for codec in (
        binary_kv.PartlyBinary(0.1, "token", 32),
        binary_kv.PartlyBinary(0.1, "channel", 32, centred=True),
        binary_kv.PartlyBinary(0, "token", 32),
    ):
        stored = codec.encode(x)
        assert sum(t.nbytes for t in stored) * 8 == x.numel() * codec.bits_per_number


def test_salient_by_magnitude_beats_random(x):
    kept = {}
    for chosen in ("magnitude", "random"):
        codec = binary_kv.PartlyBinary(0.1, "token", 32, chosen=chosen)
        kept[chosen] = (codec.decode(codec.encode(x)) - x).square().mean()
        assert (codec.encode(x)[2][..., 1:] > codec.encode(x)[2][..., :-1]).all()
    assert kept["magnitude"] < kept["random"]


def test_fp8_equals_the_nearest_point():
    x = torch.randn(1, 1, 8, 16) * 100
    kept = scaled.Float8().decode(scaled.Float8().encode(x))
    points = float_points(E4M3).float()
    assert torch.equal((kept - x).abs(), (points - x[..., None]).abs().amin(-1))
    assert (
        scaled.Float8().decode(scaled.Float8().encode(torch.full((1, 1, 1, 8), 1e4))).max() == 448
    )


def test_integers_keep_the_largest_of_each_token(x):
    codec = scaled.Integers(8)
    stored = codec.encode(x)
    error = (codec.decode(stored) - x).abs()
    assert (error <= x.abs().amax(-1, keepdim=True) / 127 * 0.502).all()
    assert sum(t.nbytes for t in stored) * 8 == x.numel() * (8 + 16 / 32)


def test_rotation_loses_nothing_and_spreads_an_outlier():
    x = torch.randn(1, 2, 50, 64)
    x[..., 5] += 40
    plain, turned = scaled.Integers(4), scaled.Rotated(scaled.Integers(4), 64)
    wide = scaled.Rotated(scaled.Integers(8), 64)
    assert (wide.decode(wide.encode(x)) - x).abs().max() < 0.2
    errors = [((c.decode(c.encode(x)) - x).square().mean()).item() for c in (plain, turned)]
    assert errors[1] < errors[0] / 5


def test_the_table_loses_what_theory_says_of_normal_numbers():
    """Lloyd and Max: 0.1175 at 2 bits, 0.03454 at 3, 0.009497 at 4 (Max, 1960, table 1)."""
    x = torch.randn(1, 4, 400, 128, generator=torch.Generator().manual_seed(0))
    for bits, expected in ((2, 0.1175), (3, 0.03454), (4, 0.009497)):
        codec = scaled.MagnitudeScaled(bits)
        error = distributions.relative_error(x, codec.decode(codec.encode(x)))
        assert error == pytest.approx(expected, rel=0.05)


def test_predicted_error_is_measured_on_fine_grids(x):
    for along, bits in itertools.product(["channel", "token"], [4, 6, 8]):
        predicted = distributions.predicted_error(x, bits, along, 32)
        measured = distributions.measured_error(x, bits, along, 32)
        # Two of 32 numbers, the ends of the range, are exact.
        assert measured == pytest.approx(predicted * 30 / 32, rel=0.05)


def test_errors_of_scores_and_outputs_are_those_of_simulated_noise():
    """Both predictions against noise of the given variance, drawn many times."""
    generator = torch.Generator().manual_seed(7)
    q = torch.randn(1, 4, 24, 16, generator=generator) * 1.5
    k, v = (torch.randn(1, 2, 24, 16, generator=generator) for _ in range(2))
    variance = torch.rand(1, 2, 24, 16, generator=generator) * 0.01
    scores, outputs = [], []
    for _ in range(300):
        noise = torch.randn(k.shape, generator=generator) * variance.sqrt()
        scores.append(distributions.score_error(q, k, k + noise) ** 2)
        outputs.append(distributions.output_error(q, k, v, (k, v + noise)))
    predicted = distributions.predicted_score_error(q, k, variance)
    assert (sum(scores) / 300) ** 0.5 == pytest.approx(predicted, rel=0.03)
    predicted = distributions.predicted_output_error(q, k, v, variance)
    assert sum(outputs) / 300 == pytest.approx(predicted, rel=0.03)


def test_attention_weights_give_the_model_s_output(model, tokens):
    held = distributions.capture(model, tokens[:, :32])
    q, k, v = held.queries[1], held.rotated[1], held.values[1]
    weights = distributions.attention_weights(q, k)
    expected = weights @ v.repeat_interleave(2, dim=1)
    assert torch.allclose(attend(q, k, v), expected, atol=1e-5)


def test_rounding_variance_is_that_of_a_step_spread_evenly(x):
    variance = distributions.rounding_variance(x, 4, "channel", 16)
    step = (x[0, 0, :16, 3].max() - x[0, 0, :16, 3].min()) / 15
    assert variance[0, 0, 5, 3].item() == pytest.approx((step**2 / 12).item(), rel=0.01)


def test_unevenness_finds_a_channel_and_a_token():
    x = torch.randn(2, 2, 100, 64, generator=torch.Generator().manual_seed(0))
    channels, tokens = distributions.unevenness(x)
    assert channels < 1.4 and tokens < 1.4
    x[..., 9] *= 10
    assert distributions.unevenness(x)[0] > 8
    x[..., 9] /= 10
    x[:, :, 11] *= 10
    assert distributions.unevenness(x)[1] > 8


def test_wrong_arguments_are_refused(x):
    for make in (
        partial(kivi.Uniform, 2, "row"),
        partial(kivi.Uniform, 9, "token"),
        partial(kivi.Uniform(2, "token", 24).encode, x),
        partial(binary_kv.PartlyBinary, 2),
        partial(binary_kv.PartlyBinary, 0.1, "token", 12),
        partial(binary_kv.PartlyBinary, 0.1, chosen="luck"),
        partial(kivi.kivi, residual=-1),
    ):
        with pytest.raises(ValueError, match="allowed"):
            make()
