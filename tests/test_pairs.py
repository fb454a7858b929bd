"""Paired differences of rows: from the cells alone, as from the models themselves."""

import pytest

from rooflm.lab import bench as benches
from rooflm.lab import pairs, text
from rooflm.lab.bench import WINDOW, Bench
from rooflm.lab.evaluate import compare

TOKENS = 4 * WINDOW


@pytest.fixture(scope="module")
def bench():
    whole = text.load_text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "load_text", lambda name: whole(name)[:9_000])
        patch.setattr(benches, "ROWS", 2)
        pairs.block_bytes.cache_clear()
        yield Bench.load("student", TOKENS)
    pairs.block_bytes.cache_clear()


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
