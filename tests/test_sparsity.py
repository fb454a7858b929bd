"""What zeros save: sizes of real matrices, break-even densities, time at the roofs."""

import itertools

import numpy as np
import pytest
import sympy

import rooflm
from rooflm import ForwardPass, Precision, load_format
from rooflm.roofline.sparsity import (
    INDEXES,
    break_even_bits,
    break_even_density,
    crossing_density,
    pattern,
    read_layout,
    stored_bits,
)

LLAMA = "meta-llama/Llama-2-7b-hf"


def stored_by_hand(kept, value_bits, layout):
    """Bits of a matrix of which `kept` (rows, columns) tells the non-zeros, row pointers apart."""
    rows, columns = kept.shape
    values = int(kept.sum()) * value_bits
    if layout == "bitmap":
        return values + len(np.packbits(kept)) * 8
    if layout.startswith("csr"):
        columns_of = np.flatnonzero(kept.ravel()) % columns
        width = {"csr16": np.uint16, "csr32": np.uint32}[layout]
        assert columns_of.max() <= np.iinfo(width).max
        return values + columns_of.astype(width).nbytes * 8
    tiles = itertools.product(range(0, rows, 128), range(0, columns, 64))
    words = sum(int(kept[r : r + 128, c : c + 64].sum()) for r, c in tiles)
    return 32 * words + 32 * (rows // 128) * (columns // 64)


@pytest.mark.parametrize("sparsity", [10, 50, 62.5, 90])
@pytest.mark.parametrize(("layout", "value_bits"), [
    ("bitmap", 16), ("bitmap", 4), ("csr16", 16), ("csr16", 8), ("csr32", 16), ("tiled-csl", 16),
])  # fmt: skip
def test_bits_are_those_of_a_matrix_that_is_stored(layout, value_bits, sparsity):
    generator = np.random.default_rng(0)
    order = generator.permutation(256 * 320).reshape(256, 320)
    kept = order < (1 - sparsity / 100) * order.size
    form = load_format(f"{'fp16' if value_bits == 16 else f'int{value_bits}'}-{sparsity}%-{layout}")
    assert form.bits * kept.size == pytest.approx(
        stored_by_hand(kept, value_bits, layout), abs=value_bits + 32
    )


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8), (8, 16), (3, 5)])
def test_a_pattern_stores_a_place_for_each_value_that_it_keeps(kept, of):
    places = len(format(of - 1, "b"))  # bits of the largest place
    for form, bits in (("fp16", 16), ("int4", 4)):
        assert load_format(f"{form}-{kept}:{of}").bits * of == kept * (bits + places)


def test_break_even_densities_are_the_known_ones():
    assert break_even_density(16, INDEXES["csr16"]) == 1 / 2  # of FP16: nothing at 50 %
    assert break_even_density(16, INDEXES["csr32"]) == 1 / 3
    assert break_even_density(16, INDEXES["bitmap"]) == 15 / 16
    assert break_even_density(4, INDEXES["bitmap"]) == 3 / 4
    assert break_even_density(4, INDEXES["csr16"]) == 1 / 5
    assert break_even_density(1, INDEXES["bitmap"]) == 0  # a mask is as large as what it masks
    assert break_even_bits(2, 4, 2) == 2  # 2:4 of 2-bit weights saves nothing
    assert load_format("int2-2:4").bits == load_format("int2").bits


def test_tiled_csl_saves_nothing_at_half_as_the_literature_says():
    assert load_format("fp16-50%-tiled-csl").bits == pytest.approx(16, rel=3e-4)
    assert load_format("fp16-50%-tiled-csl").bits > 16
    assert load_format("fp16-80%-tiled-csl").bits / 16 == pytest.approx(0.4, rel=1e-3)


@pytest.mark.parametrize("dense_bits", [None, 4])
@pytest.mark.parametrize("value_bits", [16, 8, 4])
@pytest.mark.parametrize("index", INDEXES.values(), ids=list(INDEXES))
def test_a_layout_saves_below_its_break_even_density_and_not_above(index, value_bits, dense_bits):
    found = break_even_density(value_bits, index, dense_bits)
    dense = value_bits if dense_bits is None else dense_bits
    if found > 0:
        assert stored_bits(value_bits, found * 0.999, index) < dense
    assert stored_bits(value_bits, max(found, 0) * 1.001 + 1e-9, index) > dense


def test_a_bitmap_and_an_index_cross_where_their_sizes_do():
    found = crossing_density(16, INDEXES["bitmap"], INDEXES["csr16"])
    assert found == 1 / 16
    for density, smaller in ((found / 2, "csr16"), (found * 2, "bitmap")):
        sizes = {name: stored_bits(16, density, INDEXES[name]) for name in ("bitmap", "csr16")}
        assert min(sizes, key=sizes.get) == smaller


def test_formulas_take_arrays_and_symbols():
    bits = np.array([16.0, 8.0, 4.0])
    assert break_even_density(bits, INDEXES["csr16"]).tolist() == [1 / 2, 1 / 3, 1 / 5]
    b, d, n, m, s = sympy.symbols("b d n m s", positive=True)
    size = stored_bits(b, d, INDEXES["bitmap"])
    (root,) = sympy.solve(size - b, d)
    assert sympy.simplify(root - break_even_density(b, INDEXES["bitmap"])) == 0
    (width,) = sympy.solve(n * (b + s) - m * b, b)
    assert sympy.simplify(width - break_even_bits(n, m, s)) == 0


@pytest.mark.parametrize("text", ["4:2", "100%-bitmap", "50%-ell", "2:4:8", "", "50%"])
def test_what_names_no_layout_is_none(text):
    assert read_layout(text, 16) is None


def test_a_layout_knows_its_name_and_density():
    assert read_layout("2:4", 16) == pattern(2, 4)
    assert read_layout("2:4", 16).density == 0.5
    assert read_layout("90%-csr32", 16).density == pytest.approx(0.1)


# ---- on the roofline


def run(weights, step, device="nvidia-a100-80gb", **settings):
    return rooflm.analyze(LLAMA, device, step, Precision(weights), **settings)


def test_sparse_weights_change_weight_bytes_alone():
    step = ForwardPass.decode(4, 2048)
    dense, sparse = run("fp16", step), run("fp16-50%-bitmap", step)
    assert sparse.flops == dense.flops
    for x, y in zip(dense.operators, sparse.operators, strict=True):
        assert y.weight_bytes == pytest.approx(x.weight_bytes * 9 / 16)
        assert (y.activation_bytes, y.kv_bytes, y.rate) == (x.activation_bytes, x.kv_bytes, x.rate)
    assert sparse.memory.weights == pytest.approx(dense.memory.weights * 9 / 16)


def test_unstructured_half_saves_nothing_where_compute_bounds():
    step = ForwardPass.prefill(1, 4096)
    dense, sparse = run("fp16", step), run("fp16-50%-bitmap", step)
    for x, y in zip(dense.operators, sparse.operators, strict=True):
        if x.bound == "compute":
            assert y.seconds == x.seconds


def test_two_of_four_halves_a_compute_bound_product_where_the_device_has_the_rate():
    step = ForwardPass.prefill(1, 4096)
    for device, factor in (("nvidia-a100-80gb", 2), ("nvidia-v100", 1)):
        dense, sparse = run("fp16", step, device), run("fp16-2:4", step, device)
        pairs = zip(dense.operators, sparse.operators, strict=True)
        bound = [(x, y) for x, y in pairs if x.name == "gate_proj"]
        assert bound and all(x.bound == y.bound == "compute" for x, y in bound)
        assert all(x.seconds == pytest.approx(factor * y.seconds) for x, y in bound)
        assert all(x.flops == y.flops for x, y in bound)
        attention = [y for y in sparse.operators if y.name == "fused_attention"]
        assert all(y.rate == "fp16" for y in attention)  # weights alone are 2:4


def test_csr_of_half_the_weights_saves_no_time_at_any_batch():
    for batch in (1, 16, 256, 4096):
        step = ForwardPass.decode(batch, 128)
        assert run("fp16-50%-csr16", step).seconds == run("fp16", step).seconds
        assert run("fp16-50%-csr32", step).seconds >= run("fp16", step).seconds


def test_generation_takes_two_of_four_too():
    dense, sparse = (
        rooflm.generation(LLAMA, "nvidia-a100-80gb", Precision(w)) for w in ("fp16", "fp16-2:4")
    )
    assert sparse.tpot < 0.62 * dense.tpot and sparse.ttft < 0.62 * dense.ttft


def test_the_surveys_accounting_keeps_its_dense_roof(a6000):
    found = run("fp16-2:4", ForwardPass.prefill(1, 2048), a6000, accounting="survey")
    assert {row.rate for row in found.operators} == {"fp16"}
    assert a6000.peaks["fp16"] == 309.677e12 / 2


def test_a_sweep_of_batches_equals_its_single_passes():
    batches = np.array([1, 64, 4096])
    swept = run("fp16-2:4", ForwardPass.decode(batches, 512))
    for i, batch in enumerate(batches.tolist()):
        one = run("fp16-2:4", ForwardPass.decode(batch, 512))
        assert swept.seconds[i] == pytest.approx(one.seconds, rel=1e-12)
