"""The reader of GGUF files against the package gguf, and a model against the formula of RoPE."""

import contextlib

import numpy
import pytest

torch = pytest.importorskip("torch")
gguf_package = pytest.importorskip("gguf")

from rooflm.lab import gguf  # noqa: E402
from rooflm.lab.model import FullCache  # noqa: E402

HIDDEN, HEADS, KV_HEADS, LAYERS, INTERMEDIATE = 64, 4, 2, 2, 96
HEAD_DIM = HIDDEN // HEADS
TOKENS = ["<|end|>", *(chr(c) for c in range(33, 127)), "Ġ", "an", "Ġan", "99"]
KV_WIDTH = KV_HEADS * HEAD_DIM
SHAPES = {
    "attn_norm": (HIDDEN,),
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KV_WIDTH, HIDDEN),
    "attn_v": (KV_WIDTH, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_norm": (HIDDEN,),
    "ffn_gate": (INTERMEDIATE, HIDDEN),
    "ffn_up": (INTERMEDIATE, HIDDEN),
    "ffn_down": (HIDDEN, INTERMEDIATE),
}


def random_tensors():
    noise = numpy.random.default_rng(0)

    def draw(*shape):
        return (noise.standard_normal(shape) * shape[-1] ** -0.5).astype(numpy.float32)

    tensors = {"token_embd.weight": draw(len(TOKENS), HIDDEN), "output_norm.weight": draw(HIDDEN)}
    for layer in range(LAYERS):
        tensors |= {f"blk.{layer}.{name}.weight": draw(*shape) for name, shape in SHAPES.items()}
    return tensors


def write(path, tensors=None, kinds=("F32",), architecture="llama", pre="smollm", leave_out=()):
    """A file by the package gguf; matrices are stored in the kinds in turn."""
    writer = gguf_package.GGUFWriter(path, architecture)
    for name, value in {
        "context_length": 32,
        "embedding_length": HIDDEN,
        "block_count": LAYERS,
        "feed_forward_length": INTERMEDIATE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
    }.items():
        if name not in leave_out:
            writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.rope.freq_base", 5000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_int8("test.int8", -3)
    writer.add_uint64("test.uint64", 2**40 + 1)
    writer.add_float64("test.float64", 0.1)
    writer.add_bool("test.bool", True)
    writer.add_array("test.floats", [1.5, -2.5])
    writer.add_string("test.text", "naïve 東京")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["a n", "Ġ an", "9 9"])
    for i, (name, numbers) in enumerate((random_tensors() if tensors is None else tensors).items()):
        kind = gguf_package.GGMLQuantizationType[
            kinds[i % len(kinds)] if numbers.ndim > 1 else "F32"
        ]
        writer.add_tensor(name, gguf_package.quantize(numbers, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return bytearray(path.read_bytes())


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return write(tmp_path_factory.mktemp("gguf") / "plain.gguf")


def test_fields_and_numbers_are_those_that_the_package_reads(tmp_path):
    path = tmp_path / "all-kinds.gguf"
    ours = gguf.read_gguf(write(path, kinds=("Q4_1", "Q8_0", "F16", "F32")))
    theirs = gguf_package.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert ours.fields == fields
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    assert {stored.kind for stored in ours.tensors.values()} == {"Q4_1", "Q8_0", "F16", "F32"}
    for tensor in theirs.tensors:
        stored = ours.tensors[tensor.name]
        expected = gguf_package.dequantize(tensor.data, tensor.tensor_type)
        assert stored.kind == tensor.tensor_type.name
        assert stored.blocks.numel() == tensor.n_bytes
        numpy.testing.assert_array_equal(gguf.dequantize(stored).numpy(), expected)


def test_a_q4_1_weight_takes_five_bits(tmp_path):
    from rooflm.roofline.formats import load_format

    file = gguf.read_gguf(write(tmp_path / "q4.gguf", kinds=("Q4_1",)))
    stored = file.tensors["blk.0.ffn_up.weight"]
    assert stored.blocks.numel() == load_format("q4_1").bytes * INTERMEDIATE * HIDDEN


def half_split_logits(tensors, tokens):
    """LLaMA in float64 as Hugging Face's convention has it: pairs lie half a head apart."""
    w = {name: torch.from_numpy(numbers).double() for name, numbers in tensors.items()}

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turn(x):  # (tokens, heads, head_dim)
        half = HEAD_DIM // 2
        frequencies = 5000.0 ** (-torch.arange(half).double() / half)
        angles = torch.arange(len(x)).double()[:, None] * frequencies
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        first, second = x[..., :half], x[..., half:]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    x = w["token_embd.weight"][tokens]
    n = len(tokens)
    for layer in range(LAYERS):
        part = {name: w[f"blk.{layer}.{name}.weight"] for name in SHAPES}
        y = norm(x, part["attn_norm"])
        q = turn((y @ part["attn_q"].T).view(n, HEADS, HEAD_DIM))
        k = turn((y @ part["attn_k"].T).view(n, KV_HEADS, HEAD_DIM))
        v = (y @ part["attn_v"].T).view(n, KV_HEADS, HEAD_DIM)
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        scores = torch.einsum("ihd,jhd->hij", q, k) / HEAD_DIM**0.5
        scores = scores.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)
        attended = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(n, HIDDEN)
        x = x + attended @ part["attn_output"].T
        y = norm(x, part["ffn_norm"])
        gate = y @ part["ffn_gate"].T
        x = x + (gate * gate.sigmoid() * (y @ part["ffn_up"].T)) @ part["ffn_down"].T
    return norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T


def as_llama_cpp_stores(tensors):
    """Rows of q and k reordered as llama.cpp's converter does: pairs become neighbours."""
    found = dict(tensors)
    for name, numbers in tensors.items():
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[-2])
        if heads:
            halves = numbers.reshape(heads, 2, HEAD_DIM // 2, HIDDEN)
            found[name] = halves.swapaxes(1, 2).reshape(numbers.shape)
    return found


def test_a_model_computes_what_its_half_split_original_does(tmp_path):
    tensors = random_tensors()
    file = gguf.read_gguf(write(tmp_path / "model.gguf", as_llama_cpp_stores(tensors)))
    model = gguf.to_transformer(file)
    tokens = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    expected = half_split_logits(tensors, tokens)
    torch.testing.assert_close(model(tokens[None])[0].double(), expected, rtol=1e-4, atol=1e-5)
    cache = FullCache()
    steps = [model(tokens[None, i : i + 1], cache)[0, 0] for i in range(len(tokens))]
    torch.testing.assert_close(torch.stack(steps).double(), expected, rtol=1e-4, atol=1e-5)


def test_dimensions_come_from_the_file(content):
    model = gguf.to_transformer(gguf.read_gguf(content))
    c = model.config
    assert (c.vocab, c.hidden, c.layers, c.intermediate) == (99, HIDDEN, LAYERS, INTERMEDIATE)
    assert (c.heads, c.kv_heads, c.window) == (HEADS, KV_HEADS, 32)
    assert (c.rope_base, c.norm_eps) == (5000.0, 1e-6)  # not 9.999999974752427e-07
    assert model.to_roofline().parameters == sum(p.numel() for p in model.parameters())
    assert not any(p.requires_grad for p in model.parameters()) and not model.training


def test_the_tokenizer_merges_splits_digits_and_knows_control_tokens(content):
    tokenizer = gguf.to_tokenizer(gguf.read_gguf(content))

    def pieces(text):
        return tokenizer.encode(text).tokens

    assert pieces("an an") == ["an", "Ġan"]
    assert pieces("1999") == ["1", "9", "9", "9"]
    assert pieces("an<|end|>") == ["an", "<|end|>"]
    text = "an 1 ban,can"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_file_cut_short_is_refused_wherever_it_was_cut(content):
    for length in {*range(0, 3000, 61), *range(0, len(content), 4999), len(content) - 1}:
        with pytest.raises(ValueError, match=r"altered or cut short|begins with") as error:
            gguf.read_gguf(content[:length])
        assert "\n" not in str(error.value)


def test_a_text_cut_short_is_refused_also_at_the_end(tmp_path):
    content = write(tmp_path / "fields.gguf", tensors={}).rstrip(b"\0")
    assert gguf.read_gguf(content).fields["tokenizer.ggml.merges"][-1] == "9 9"
    with pytest.raises(ValueError, match="a text ends at byte"):
        gguf.read_gguf(content[:-1])


def test_altered_lengths_are_refused(content):
    noise = numpy.random.default_rng(0)
    for at in noise.integers(4, 2500, 300):
        altered = content.copy()
        altered[at] ^= 0x80
        with contextlib.suppress(ValueError):  # an altered number may still be one
            gguf.to_transformer(gguf.read_gguf(altered))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "qwen2"}, "architecture of the GGUF file is 'qwen2'; allowed: 'llama'"),
        ({"leave_out": ("block_count",)}, "lacks the fields llama.block_count"),
        ({"kinds": ("Q5_0",)}, "kind 6; allowed"),
        ({"tensors": random_tensors() | {"output.weight": numpy.eye(32)}}, "output.weight has no"),
        (
            {"tensors": random_tensors() | {"output_norm.weight": numpy.ones(32)}},
            "the tensors don't fit",
        ),
    ],
)
def test_what_a_lab_model_is_not_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        gguf.to_transformer(gguf.read_gguf(write(tmp_path / "other.gguf", **changes)))
    assert "\n" not in str(error.value)


def test_other_files_and_tokenizers_are_refused(content, tmp_path):
    with pytest.raises(ValueError, match="begins with b'PK"):
        gguf.read_gguf(bytearray(b"PK\x03\x04" + bytes(100)))
    altered = content.copy()
    altered[4] = 2
    with pytest.raises(ValueError, match="version is 2; allowed: 3"):
        gguf.read_gguf(altered)
    other = gguf.read_gguf(write(tmp_path / "other.gguf", pre="llama-bpe"))
    with pytest.raises(ValueError, match="llama-bpe"):
        gguf.to_tokenizer(other)
