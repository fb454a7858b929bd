"""Shared fixtures: the survey's model and device, a small model, a deterministic hypothesis."""

import copy
import math
import re
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings

import rooflm

settings.register_profile(
    "rooflm",
    deadline=None,
    derandomize=True,
    max_examples=100,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("rooflm")


@pytest.fixture(scope="session")
def llama_7b():
    return rooflm.load_model("meta-llama/Llama-2-7b-hf")


@pytest.fixture(scope="session")
def llama_13b():
    return rooflm.load_model("meta-llama/Llama-2-13b-hf")


@pytest.fixture(scope="session")
def llama_70b():
    return rooflm.load_model("meta-llama/Llama-2-70b-hf")


@pytest.fixture(scope="session")
def a6000():
    return rooflm.load_hardware("nvidia-a6000")


@pytest.fixture(scope="session")
def sharp():
    """Makes a random model whose weights are large, so that attention is far from uniform."""
    torch = pytest.importorskip("torch")  # the theory's tests do without it
    from rooflm.lab.model import Transformer

    def make(config, seed=0):
        torch.manual_seed(seed)
        made = Transformer(config).eval().requires_grad_(False)
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
        return made

    return make


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Makes the folder of a tiny checkpoint with the laboratory's vocabulary."""
    torch = pytest.importorskip("torch")
    from rooflm.lab.checkpoints import save_checkpoint
    from rooflm.lab.model import Config, Transformer

    def make(config=None):
        config = config or Config(2048, hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64)
        path = tmp_path_factory.mktemp("models") / "tiny"
        model, generator = Transformer(config), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(1 + 0.3 * noise if parameter.dim() == 1 else 0.2 * noise)
        save_checkpoint(model, path, "none\n")
        return path

    return make


@pytest.fixture(scope="session")
def short_novels():
    """A context in which texts are their first characters, much quicker to encode.

    Yields the patch, for what else is to be small; two rows of text calibrate.
    """
    pytest.importorskip("torch")
    from rooflm.lab import bench, pairs, text

    @contextmanager
    def short(characters):
        whole = text.load_text
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text, "load_text", lambda name: whole(name)[:characters])
            patch.setattr(bench, "ROWS", 2)
            pairs.block_bytes.cache_clear()
            yield patch
        pairs.block_bytes.cache_clear()

    return short


@pytest.fixture(scope="session")
def chi_square():
    """Pearson's statistic of counts, and what one of 10,000 right samples exceeds.

    The limit is Wilson and Hilferty's (1931), within 1 % from two degrees of freedom on.
    """

    def found(counts, p):
        total, used = sum(counts), [i for i, x in enumerate(p) if x > 0]
        assert sum(counts[i] for i in used) == total, "a token came out that has no chance"
        statistic = sum((counts[i] - total * p[i]) ** 2 / (total * p[i]) for i in used)
        freedom = len(used) - 1
        spread = 2 / (9 * freedom)
        return statistic, freedom * (1 - spread + 3.719 * math.sqrt(spread)) ** 3

    return found


@pytest.fixture(scope="session")
def drafting(sharp):
    """A tiny target in float64, and a draft that is the target with some noise: half right."""
    torch = pytest.importorskip("torch")
    from rooflm.lab.model import Config

    config = Config(16, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=24)
    target = sharp(config).double()
    draft, generator = copy.deepcopy(target), torch.Generator().manual_seed(5)
    for parameter in draft.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.add_(0.25 * parameter.std(unbiased=False) * noise)
    return target, draft


@pytest.fixture(scope="session")
def greedy_texts(drafting):
    """A thousand prompts, and what the target makes of each by plain greedy decoding."""
    import torch

    from rooflm.lab.decode.speculative import decode

    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (1_000,), generator=generator).tolist()
    prompts = [torch.randint(16, (n,), generator=generator) for n in lengths]
    return [(prompt, decode(drafting[0], prompt, 10).tokens) for prompt in prompts]


@pytest.fixture(scope="session")
def changed_parts():
    """Which parts of an explorer's page another value of a control changes."""
    parts = {
        "table": r"<tbody>.*</tbody>",
        "status": r'role="status">([^<]+)<',
        "figure": r'base64,([^"]+)"',
    }

    def found(explorer, name, value):
        pages = [explorer.show(**{**explorer.start, **x}) for x in ({name: value}, {})]
        assert 'role="alert"' not in pages[0]
        new, old = (
            {k: re.search(x, page, re.DOTALL)[0] for k, x in parts.items()} for page in pages
        )
        return {part for part in parts if new[part] != old[part]}

    return found
