"""What fits, against brute force over every batch and context, and closed forms."""

from dataclasses import replace

import pytest

import rooflm
from rooflm import Hardware, Precision, load_model, memory
from rooflm.roofline.capacity import (
    Paged,
    largest_batch,
    largest_context,
    offload,
    paged_bytes,
    shared_prefix_bytes,
    with_budget,
)
from rooflm.roofline.mixers import LatentAttention
from rooflm.roofline.states import Mamba2

SMALL = "HuggingFaceTB/SmolLM2-135M"  # 30 layers of 3 KV heads of 64: 23,040 B a token in 16 bits
TOKEN = 2 * 30 * 3 * 64 * 2
FORMATS = [None, Precision("int8", "fp16", "int8"), Precision("int4-g128", "fp16", "int4")]


def device(capacity, link=10e9):
    return Hardware("mine", 1e11, {"fp16": 1e12}, memory_capacity=capacity, link_bandwidth=link)


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("room", [1, 3e6, 20e6])
def test_the_largest_batch_is_that_of_a_search_through_all(precision, room):
    weights = memory(SMALL, precision).weights
    chip, context = device(weights + room), 100
    fitting = [b for b in range(1, 60) if memory(SMALL, precision, b, context).fits(chip)]
    assert max(fitting, default=0) < 59
    assert largest_batch(SMALL, chip, precision, context) == max(fitting, default=0)


@pytest.mark.parametrize("precision", FORMATS)
@pytest.mark.parametrize("room", [1, 3e6])
def test_the_largest_context_is_that_of_a_search_through_all(precision, room):
    weights = memory(SMALL, precision).weights
    chip = device(weights + room)
    fitting = [s for s in range(1, 400) if memory(SMALL, precision, 2, s).fits(chip)]
    assert max(fitting, default=0) < 399
    assert largest_context(SMALL, chip, precision, 2) == max(fitting, default=0)


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-hf", "Qwen/Qwen3-32B", SMALL])
@pytest.mark.parametrize("where", ["nvidia-t4", "nvidia-h200", "amd-mi300x"])
def test_what_fits_is_one_division(name, where):
    """Memory is a straight line in the batch and in the context: (C - N w - A) / kappa."""
    model, room = load_model(name), rooflm.load_hardware(where).memory_capacity
    one = memory(model, context=1)
    free = room - one.weights
    assert largest_context(model, where) == max(0, free - one.activations) // one.kv_cache
    at = memory(model, context=4096)
    assert largest_batch(model, where, context=4096) == max(0, free) // (
        at.kv_cache + at.activations
    )


def test_more_room_never_holds_less():
    found = [
        (largest_batch(SMALL, device(c), context=512), largest_context(SMALL, device(c)))
        for c in range(250_000_000, 700_000_000, 23_456_789)
    ]
    assert found == sorted(found) and found[0] == (0, 0) and found[-1][0] > 30
    batches = [largest_batch(SMALL, device(1e9), context=s) for s in (1, 10, 100, 1000, 10000)]
    assert batches == sorted(batches, reverse=True) and len(set(batches)) == 5


def test_the_limits_and_the_unknown():
    unpublished = Hardware("chip", 1e12, {"fp16": 1e12})
    assert largest_batch(SMALL, unpublished) is None and largest_context(SMALL, unpublished) is None
    assert largest_batch(SMALL, device(1e30)) == largest_context(SMALL, device(1e30)) == 2**40
    just = memory(SMALL, batch=3, context=100).total
    assert largest_batch(SMALL, device(just), context=100) == 3
    assert largest_batch(SMALL, device(just - 1), context=100) == 2


def test_figure_19s_batches_are_near_the_surveys_by_exact_accounting():
    """48e9 bytes and the survey's counting give 42; exact counting and 48 GiB give 45."""
    p = Precision("int8", "int8", "int8")
    assert largest_batch("meta-llama/Llama-2-13b-hf", "nvidia-a6000", p, 2048) == 45


def blocks_by_hand(contexts, block):
    """Lists of places, filled token by token, a new list of `block` places when one is full."""
    held = used = 0
    for context in contexts:
        sequence = []
        for token in range(context):
            if token % block == 0:
                sequence.append([None] * block)
            sequence[-1][token % block] = token
        held += sum(len(places) for places in sequence)
        used += sum(place is not None for places in sequence for place in places)
    return held * TOKEN, (held - used) * TOKEN


@pytest.mark.parametrize("block", [1, 7, 16, 1000])
def test_paged_bytes_are_those_of_blocks_filled_by_hand(block):
    contexts = [1, 15, 16, 17, 700, 701]
    assert paged_bytes(SMALL, None, contexts, block) == blocks_by_hand(contexts, block)
    assert paged_bytes(SMALL, None, [], block) == Paged(0, 0)


def test_blocks_of_one_token_waste_nothing_and_waste_stays_below_a_block_a_sequence():
    contexts = [3, 99, 512]
    exact = sum(memory(SMALL, context=c).kv_cache for c in contexts)
    for block in (1, 2, 5, 64):
        held, wasted = paged_bytes(SMALL, None, contexts, block)
        assert held - wasted == exact
        assert 0 <= wasted <= len(contexts) * (block - 1) * TOKEN
    quarter = paged_bytes(SMALL, Precision(kv_cache="int4"), contexts, 64)
    assert quarter.held == held / 4


def test_a_shared_prefix_is_held_once():
    for batch, prefix, own in [(1, 5, 7), (4, 100, 3), (9, 0, 20), (9, 20, 0)]:
        held = shared_prefix_bytes(SMALL, None, batch, prefix, own)
        assert held == (prefix + batch * own) * TOKEN
        apart = memory(SMALL, batch=batch, context=prefix + own).kv_cache
        assert apart - held == (batch - 1) * prefix * TOKEN


def test_a_budget_caps_the_cache_and_nothing_else():
    model = load_model(SMALL)
    small = with_budget(model, 64)
    assert small.parameters == model.parameters
    for context in (1, 63, 64, 65, 4000):
        kept = memory(small, batch=3, context=context).kv_cache
        assert kept == 3 * min(context, 64) * TOKEN
    assert largest_context(small, device(3e8)) == 2**40  # nothing grows any more
    assert paged_bytes(small, None, [1000], 48).held == 96 * TOKEN


def test_sequences_that_evict_share_nothing():
    small = with_budget(SMALL, 64)
    assert shared_prefix_bytes(small, None, 4, 100, 10) == 4 * 64 * TOKEN


def windowed(window, every=1):
    """SmolLM2 with a window in some of its layers."""
    model = load_model(SMALL)
    ((count, block),) = model.blocks
    local = replace(block, mixer=replace(block.mixer, window=window))
    locals_ = count // 2 * every
    blocks = [(locals_, local), (count - locals_, block)]
    return replace(model, blocks=tuple(pair for pair in blocks if pair[0]))


def hybrid():
    """A layer of full attention, one of latents, one with a state, and one without a mixer."""
    model = load_model(SMALL)
    ((_, block),) = model.blocks
    latent = replace(block, mixer=LatentAttention(576, 9, 0, 128, 64, 32, 64))
    state = replace(block, mixer=Mamba2(576, 18, 64, 128))
    bare = replace(block, mixer=None, norms=("mlp_norm",))
    return replace(model, blocks=((2, block), (3, latent), (5, state), (7, bare)))


def test_states_have_no_blocks_and_are_not_shared():
    model = hybrid()
    token = 2 * (2 * 3 * 64 * 2) + 3 * (128 + 32) * 2
    state = 5 * (18 * 64 * 128 * 4 + 3 * (18 * 64 + 2 * 128) * 2)  # FP32; 3 inputs in 16 bits
    assert memory(model, batch=2, context=10).kv_cache == 2 * (10 * token + state)
    assert paged_bytes(model, None, [10, 33], 16) == (64 * token + 2 * state, 21 * token)
    assert shared_prefix_bytes(model, None, 4, 10, 3) == (10 + 4 * 3) * token + 4 * state
    budgeted = with_budget(model, 5)
    full = 2 * (2 * 3 * 64 * 2)
    assert memory(budgeted, context=100).kv_cache == 5 * full + 100 * (token - full) + state
    small = Precision(kv_cache="int8", state="fp16")
    assert paged_bytes(model, small, [10], 16).held == 8 * token + state - 5 * 18 * 64 * 128 * 2


def test_states_alone_have_no_largest_context():
    model = hybrid()
    only = replace(model, blocks=model.blocks[2:])
    assert largest_context(only, "nvidia-t4") == 2**40
    assert largest_context(only, device(1e3)) == 0
    with pytest.raises(ValueError, match="no layer of full attention"):
        with_budget(only, 5)


def test_a_window_holds_its_last_tokens_in_whole_blocks():
    model = windowed(100)
    half = TOKEN // 2  # of each half of the layers
    for context in (1, 99, 100, 101, 5000):
        local = min(context, 100)
        held, wasted = paged_bytes(model, None, [context], 16)
        full_places, local_places = -(-context // 16) * 16, -(-local // 16) * 16
        assert held == (full_places + local_places) * half
        assert wasted == (full_places - context + local_places - local) * half


@pytest.mark.parametrize(("prefix", "own"), [(500, 20), (500, 100), (500, 300), (30, 20), (0, 7)])
def test_a_window_shares_what_it_still_sees_of_the_prefix(prefix, own):
    """Counted position by position: who of 5 sequences still holds it."""
    model, half = windowed(100), TOKEN // 2
    seen = range(max(0, prefix + own - 100), prefix + own)  # by a local layer
    local = len({(0 if at < prefix else row, at) for row in range(5) for at in seen})
    full = len({(0 if at < prefix else row, at) for row in range(5) for at in range(prefix + own)})
    assert shared_prefix_bytes(model, None, 5, prefix, own) == (local + full) * half


def test_a_budget_leaves_windows_alone_and_refuses_where_nothing_is_full():
    budgeted = with_budget(windowed(100), 10)
    assert memory(budgeted, context=1000).kv_cache == (100 + 10) * TOKEN // 2
    with pytest.raises(ValueError, match="no layer of full attention"):
        with_budget(windowed(100, every=2), 10)


def test_offloading_moves_the_share_over_the_slower_of_link_and_host():
    chip = device(2e9, link=10e9)
    step = rooflm.analyze(SMALL, chip, rooflm.ForwardPass.decode(4, 1000)).seconds
    for share in (0, 0.25, 1):
        there = offload(SMALL, chip, None, 4, 1000, share)
        crossing = share * 4 * 1000 * TOKEN
        assert there.link_bytes == crossing and there.rate == 10e9
        assert there.seconds == pytest.approx(step + crossing / 10e9)
        assert there.overlapped == pytest.approx(max(step, crossing / 10e9))
        assert there.memory.kv_cache == (1 - share) * 4 * 1000 * TOKEN
        assert there.fits is True
    slow = Hardware("host", 4e9, {"fp32": 1e12}, memory_capacity=30e9)
    assert offload(SMALL, chip, host=slow).rate == 4e9
    assert offload(SMALL, chip, host=replace(slow, bandwidth=90e9)).rate == 10e9


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("host_room", [1e6, 5e7, 1e12])
def test_the_largest_context_with_a_host_is_that_of_a_search(share, host_room):
    weights = memory(SMALL).weights
    chip = device(weights + 9e6)
    host = Hardware("host", 1e11, {"fp32": 1e12}, memory_capacity=host_room)
    found = offload(SMALL, chip, None, 2, 100, share, host).largest_context

    def fits(context):
        cache = 2 * context * TOKEN
        activations = memory(SMALL, batch=2, context=context).activations
        here = weights + (1 - share) * cache + activations <= chip.memory_capacity
        return here and share * cache <= host_room

    if found < 2**40:
        assert not fits(found + 1)
    assert found == 0 or fits(found)
    assert offload(SMALL, chip, None, 2, 10, share, host).fits == fits(10)


def test_without_a_host_a_whole_cache_away_is_limited_by_nothing():
    assert offload(SMALL, device(1e9), share=1).largest_context == 2**40
    none = offload(SMALL, device(1e9), share=0)
    assert none.largest_context == largest_context(SMALL, device(1e9))
    unpublished = replace(device(1e9), memory_capacity=None)
    assert offload(SMALL, unpublished).largest_context is None


def test_figure_18_charges_host_memory_where_the_link_is_slower():
    """The survey's ridge of 1728 FLOP/B is P over 89.6 GB/s of DDR; the A6000's link has 32."""
    a6000, host = rooflm.load_hardware("nvidia-a6000"), rooflm.load_hardware("intel-i9-13900k")
    printed = rooflm.survey_value(18, "DDR, GPU compute", "ridge point")
    assert round(a6000.peak("fp16") / host.bandwidth) == int(printed)
    there = offload("meta-llama/Llama-2-13b-hf", a6000, host=host)
    assert there.rate == a6000.link_bandwidth < host.bandwidth


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: offload(SMALL, "google-tpu-v5p"), "google-tpu-v5p has no published link"),
        (lambda: offload(SMALL, "nvidia-a6000", share=1.5), "share is 1.5; allowed"),
        (lambda: offload(SMALL, "nvidia-a6000", share=True), "share is True"),
        (lambda: largest_batch(SMALL, "nvidia-a6000", context=0), "context is 0"),
        (lambda: largest_context(SMALL, "nvidia-a6000", batch=[1, 2]), "one whole number"),
        (lambda: largest_context(SMALL, "nvidia-a600"), "nearest: nvidia-a6000"),
        (lambda: paged_bytes(SMALL, None, [4, 0], 16), "context is 0"),
        (lambda: paged_bytes(SMALL, None, [4], 0), "block_tokens is 0"),
        (lambda: shared_prefix_bytes(SMALL, None, 2, 0, 0), "at least one token"),
        (lambda: with_budget(SMALL, 0), "tokens is 0"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(call, words):
    with pytest.raises(ValueError, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)
