"""Shared fixtures: the survey's model and device, a small model, a deterministic hypothesis."""

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
