"""Paired differences of rows: from the cells alone, as from the models themselves."""

import pytest
import torch

from rooflm.lab import pairs, text
from rooflm.lab.bench import WINDOW, Bench
from rooflm.lab.evaluate import compare
from rooflm.lab.prune import sweep

TOKENS = 4 * WINDOW


@pytest.fixture
def bench(short_novels):
    with short_novels(9_000):
        yield Bench.load("student", TOKENS)


def test_two_cells_differ_as_their_models_do(bench):
    found = [
        bench.measure(bench.change(lambda weight, inputs, share=share: weight * share))
        for share in (0.9, 0.8)
    ]
    cells = [pairs.nats_cell(x) for x in found]
    ours = pairs.contrast(*cells, text.HELD_OUT, TOKENS, WINDOW)
    expected = compare(*found)
    assert ours.verdict == expected.verdict == "better"
    for end in ("value", "low", "high"):
        one, other = (getattr(x.difference, end) for x in (ours, expected))
        assert one == pytest.approx(other, rel=1e-4)


def test_a_cell_of_other_blocks_is_refused(bench):
    cell = pairs.nats_cell(bench.full)
    with pytest.raises(ValueError, match="the row holds 4 blocks; allowed: 2"):
        pairs.from_nats(cell, text.HELD_OUT, 2 * WINDOW, WINDOW)


@pytest.mark.parametrize("name", ["teacher", "smollm2"])
def test_rows_of_a_map_differ_as_was_measured(name):
    """The map's own difference was taken from the two models, not from the cells."""
    rows = sweep.load_map(name)
    for row in rows[1:4]:
        ours = pairs.contrast_rows(row, rows[0]).difference
        for end, x in (("", ours.value), ("_low", ours.low), ("_high", ours.high)):
            assert x == pytest.approx(row[f"difference{end}"], rel=1e-4, abs=1e-6)


def test_a_part_of_the_blocks_is_a_part_of_the_difference():
    full, row = sweep.load_map("teacher")[:2]
    parts = slice(32), slice(32, 64)
    halves = [pairs.contrast_rows(row, full, x).difference.value for x in parts]
    sizes = pairs.block_bytes(text.HELD_OUT, row["tokens"], WINDOW).view(2, 32).sum(1)
    whole = pairs.contrast_rows(row, full).difference.value
    assert (torch.tensor(halves, dtype=torch.float64) * sizes).sum() / sizes.sum() == (
        pytest.approx(whole)
    )


@pytest.mark.parametrize("other", [{"model": "smollm2"}, {"tokens": 512}])
def test_rows_of_different_blocks_are_refused(other):
    row = sweep.load_map("teacher")[1]
    with pytest.raises(ValueError, match="allowed: the same blocks"):
        pairs.contrast_rows(row, row | other)
