"""Sparse storage: what goes in comes out, and bytes are those of the roofline's formula."""

import pytest
import torch

from rooflm.lab.prune import masks, scores, storage
from rooflm.lab.prune.timing import make_products, time_products
from rooflm.lab.quantize.sensitive import stored_bits as quantized_bits
from rooflm.roofline.formats import load_format
from rooflm.roofline.sparsity import INDEXES, stored_bits

SHAPE = 24, 64
ROUND_TRIPS = {
    "bitmap": (storage.to_bitmap, storage.from_bitmap),
    "csr16": (storage.to_rows, storage.from_rows),
}


def sparse(sparsity, pattern="", shape=SHAPE, seed=0):
    """An FP16 matrix of noise with zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator).half().float()
    return weight * masks.make_mask(scores.draw(weight, seed), sparsity, pattern, "layer")


@pytest.mark.parametrize("layout", ROUND_TRIPS)
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.97])
def test_what_is_encoded_is_read_back_exactly(layout, sparsity):
    write, read = ROUND_TRIPS[layout]
    weight = sparse(sparsity)
    weight[3] = 0  # a row without a value
    assert torch.equal(read(write(weight)).float(), weight)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_a_pattern_is_read_back_exactly_also_where_more_is_zero(pattern):
    n, m = masks.read_pattern(pattern)
    weight = sparse(0.5, pattern)
    weight[2, :8] = 0
    stored = storage.to_pattern(weight, n, m)
    assert torch.equal(storage.from_pattern(stored).float(), weight)
    # n values of 16 bits and n places of log2 m bits for every m elements
    expected = weight.numel() // m * n * (16 + (m - 1).bit_length()) / 8
    assert storage.nbytes(stored) == expected


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_bytes_are_those_of_the_rooflines_formula(sparsity):
    weight = sparse(sparsity)
    for layout, (write, _) in ROUND_TRIPS.items():
        expected = stored_bits(16, 1 - sparsity, INDEXES[layout]) * weight.numel()
        rows = 32 * (SHAPE[0] + 1) if layout == "csr16" else 0  # which the formula neglects
        assert 8 * storage.nbytes(write(weight)) == expected + rows
    two_four = storage.to_pattern(sparse(0.5, "2:4"))
    assert 8 * storage.nbytes(two_four) == load_format("fp16-2:4").bits * weight.numel()


def test_columns_beyond_32767_survive():
    weight = torch.zeros(2, 2**16)
    weight[0, 65535], weight[1, 40000] = 1.5, -2.0
    assert torch.equal(storage.from_rows(storage.to_rows(weight)).float(), weight)


def test_the_bits_of_a_file_are_those_of_the_formula_but_for_row_pointers():
    found = storage.file_bits(sparse(0.5))
    assert found == {"csr16": 16 + 32 * 25 / (24 * 64), "bitmap": 9}
    assert storage.file_bits(sparse(0.5, "2:4"))["2:4"] == 9


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: storage.to_rows(torch.ones(1, 2**16 + 1)), "rows are 65537 long"),
        (lambda: storage.to_pattern(torch.ones(2, 8)), "4 of 4 neighbours"),
        (lambda: storage.to_pattern(torch.zeros(2, 6)), "rows are 6 long"),
    ],
)
def test_what_cannot_be_stored_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_the_bits_of_a_model_are_those_of_its_encoded_layers():
    weights = [sparse(0.5, shape=(16, 64), seed=1), sparse(0.5, shape=(8, 32), seed=2)]
    bits, layout = storage.linear_bits(w != 0 for w in weights)
    assert layout == "bitmap"
    assert bits == 8 * sum(storage.nbytes(storage.to_bitmap(w)) for w in weights)
    thin = [sparse(0.97, shape=(16, 640), seed=1)]
    bits, layout = storage.linear_bits(w != 0 for w in thin)
    assert layout == "csr16"
    assert bits == 8 * sum(storage.nbytes(storage.to_rows(w)) for w in thin)


def test_the_layout_that_takes_least_is_found():
    ends = {0.0: "dense", 0.05: "dense", 0.08: "bitmap", 0.9: "bitmap", 0.96: "csr16"}
    for sparsity, layout in ends.items():
        weight = sparse(sparsity, shape=(64, 1024))
        assert storage.linear_bits([weight != 0])[1] == layout


def test_of_equal_bytes_the_pattern_is_named():
    mask = sparse(0.5, "2:4") != 0
    assert storage.linear_bits([mask], "2:4") == (9 * mask.numel(), "2:4")
    # 3-bit places of 4:8 take more than a bitmap's one bit an element
    assert storage.linear_bits([sparse(0.5, "4:8") != 0], "4:8") == (9 * mask.numel(), "bitmap")


def test_half_the_weights_in_four_bits_take_three_and_the_scales():
    mask = sparse(0.5, shape=(64, 128)) != 0
    bits, layout = storage.linear_bits([mask], bits=4, group=64)
    scales = quantized_bits(64, 128, 4, 64) / mask.numel() - 4
    assert layout == "bitmap" and bits / mask.numel() == pytest.approx(3 + scales)
    every = torch.ones_like(mask)
    assert storage.linear_bits([every], bits=3, group=64)[0] == quantized_bits(64, 128, 3, 64)


def test_the_four_products_compute_what_they_stand_for():
    ways = make_products(12, 16, 3, sparsity=0.25)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(12, 16, generator=generator)
    x = torch.randn(16, 3, generator=generator)
    drawn = scores.draw(weight, 0)
    zeroed = weight * masks.unstructured(drawn, 0.25)
    torch.testing.assert_close(ways["dense"](), zeroed @ x)
    torch.testing.assert_close(ways["csr32"](), zeroed @ x)
    torch.testing.assert_close(ways["removed"](), weight[:9] @ x)
    for _ in range(2):  # the buffer is used again
        torch.testing.assert_close(ways["2:4"](), (weight * masks.n_of_m(drawn, 2, 4)) @ x)


def test_timed_products_carry_their_predictions():
    found = time_products(8, 16, 2, sparsity=0.5, runs=2)
    assert [p.name for p in found] == ["dense", "csr32", "2:4", "removed"]
    assert [p.bytes_share for p in found] == [1, 1, (16 + 1) / 32, 0.5]
    assert [p.flops_share for p in found] == [1, 0.5, 1, 0.5]
    assert all(p.timing.runs == 2 and p.timing.best_s > 0 for p in found)
