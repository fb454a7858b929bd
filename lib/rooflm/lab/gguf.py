"""A LLaMA in a GGUF file, the format of llama.cpp, as our own `Transformer` and tokenizer.

A GGUF file holds fields (dimensions, vocabulary, merges), then a list of tensors, then their
numbers. Four kinds of tensor are read: F32 and F16; Q8_0, blocks of 32 numbers d q with an FP16
scale d and codes q of 8 bits; Q4_1, blocks of 32 numbers d q + m with an FP16 scale d, an FP16
minimum m and codes q of 4 bits: 5 bits a number (`roofline.formats`, "q4_1").

It is read here and not with the package `gguf`, which takes several seconds for a vocabulary of
49152 tokens; the tests compare the two, number for number.

A file of this kind has the rows of its q and k projections in the order of rotary pairs that
are neighbours, which is the order of `Transformer`: nothing is permuted.

Sources: the GGUF specification of the ggml project, version 3; its definitions of the blocks.

Chapter: number formats.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from rooflm.lab.model import Config, Transformer
from rooflm.roofline.numeric import positive, shorten

_SCALARS = {  # value types of the specification, as struct names them
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_KINDS = {0: "F32", 1: "F16", 3: "Q4_1", 8: "Q8_0"}
_BLOCKS = {"F32": (1, 4), "F16": (1, 2), "Q4_1": (32, 20), "Q8_0": (32, 34)}  # numbers, bytes
_TOKENS = "tokenizer.ggml.tokens"
_CONTROL = 3  # the type of a token that no text may spell
# Submodules of a block by their names in a file.
_PARTS = {
    "attn_norm": "attn_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}
_DIMENSIONS = {
    "hidden": "llama.embedding_length",
    "layers": "llama.block_count",
    "heads": "llama.attention.head_count",
    "kv_heads": "llama.attention.head_count_kv",
    "intermediate": "llama.feed_forward_length",
    "window": "llama.context_length",
    "rope_base": "llama.rope.freq_base",
    "norm_eps": "llama.attention.layer_norm_rms_epsilon",
}


class StoredTensor(NamedTuple):
    """A tensor as the file holds it.

    Parameters
    ----------
    kind : "F32", "F16", "Q8_0" or "Q4_1".
    shape : (d_out, d_in), or (width,).
    blocks : (blocks, bytes of a block), uint8.
    """

    kind: str
    shape: tuple[int, ...]
    blocks: Tensor


class GGUF(NamedTuple):
    """What a file holds: fields by name, and tensors by name."""

    fields: dict[str, Any]
    tensors: dict[str, StoredTensor]


def read_gguf(content: bytearray) -> GGUF:
    """The fields and tensors of a GGUF file's bytes, which the tensors go on using.

    Raises
    ------
    ValueError
        in one line: not a GGUF file of version 3, cut short, or a kind of tensor that is not
        read here.
    """
    try:
        return _read(_Reader(content))
    except (struct.error, UnicodeDecodeError, IndexError, KeyError) as error:
        raise ValueError(
            f"the GGUF file of {len(content)} bytes is altered or cut short: {error}"
        ) from None


def dequantize(stored: StoredTensor) -> Tensor:
    """The numbers of a stored tensor, in FP32: d q + m.

    >>> one = torch.tensor([[0, 60, 0, 64, *[0x21] * 16]], dtype=torch.uint8)  # d = 1, m = 2
    >>> dequantize(StoredTensor("Q4_1", (32,), one))[[0, 16]]
    tensor([3., 4.])
    """
    blocks = stored.blocks
    if stored.kind == "Q4_1":
        d, m = blocks[:, 0:2].view(torch.float16), blocks[:, 2:4].view(torch.float16)
        # The low halves of the 16 bytes are the first 16 numbers, the high halves the others.
        q = torch.cat((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), dim=1)
        numbers = d.float() * q + m.float()
    elif stored.kind == "Q8_0":
        numbers = blocks[:, 0:2].view(torch.float16).float() * blocks[:, 2:].view(torch.int8)
    else:
        kind = torch.float32 if stored.kind == "F32" else torch.float16
        numbers = blocks.view(kind).to(torch.float32, copy=True)  # not a piece of the file
    return numbers.reshape(stored.shape)


def to_transformer(file: GGUF) -> Transformer:
    """The model of a file, dequantized to FP32, in evaluation mode.

    Raises
    ------
    ValueError
        for another architecture than LLaMA's with a tied head, or tensors that don't fit.
    """
    kind = file.fields.get("general.architecture")
    if kind != "llama":
        raise ValueError(f"the architecture of the GGUF file is {kind!r}; allowed: 'llama'")
    missing = [n for n in (*_DIMENSIONS.values(), _TOKENS) if n not in file.fields]
    if missing:
        raise ValueError(f"the GGUF file lacks the fields {', '.join(missing)}")
    fields = {name: file.fields[field] for name, field in _DIMENSIONS.items()}
    # An FP32 number in its shortest decimal form: 1e-05, not 9.999999747378752e-06.
    for name in ("rope_base", "norm_eps"):
        fields[name] = float(f"{positive(name, fields[name], 'FP32'):.7g}")
    config = Config(vocab=len(file.fields[_TOKENS]), **fields)
    tensors = {_our_name(name): dequantize(stored) for name, stored in file.tensors.items()}
    with torch.device("meta"):  # shapes only: no time is spent on random weights
        model = Transformer(config)
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"the tensors don't fit: {' '.join(str(error).split())}") from None
    return model.eval().requires_grad_(False)


def to_tokenizer(file: GGUF) -> Tokenizer:
    """The byte-level BPE of a file, which splits numbers into single digits ("smollm").

    A text that spells a control token, such as "<|im_start|>", means it. The vocabulary lacks 21
    of the 256 bytes, among them some control characters and what only rare scripts need; such
    bytes are left out.

    Raises
    ------
    ValueError
        for another kind of tokenizer.
    """
    fields = file.fields
    kind = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"the tokenizer of the GGUF file is {kind}; allowed: ('gpt2', 'smollm')")
    tokens = fields[_TOKENS]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = fields["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    return tokenizer


class _Reader:
    """A place in the bytes, and what can be read from there."""

    def __init__(self, content: bytearray) -> None:
        self.content, self.at = content, 0

    def number(self, code: str) -> Any:
        found = struct.unpack_from("<" + code, self.content, self.at)
        self.at += struct.calcsize("<" + code)
        return found[0]

    def string(self) -> str:
        length = self.number("Q")
        end = self.at + length
        if end > len(self.content):
            raise IndexError(f"a text ends at byte {end}")
        text = self.content[self.at : end].decode("utf-8")
        self.at = end
        return text

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, length = self.number("I"), self.number("Q")
            if length > len(self.content):
                raise IndexError(f"an array has {length} elements")
            return [self.value(kind) for _ in range(length)]
        return self.number(_SCALARS[kind])


def _read(reader: _Reader) -> GGUF:
    content = reader.content
    if content[:4] != b"GGUF":
        raise ValueError(f"the file begins with {bytes(content[:4])!r}; allowed: b'GGUF'")
    reader.at = 4
    version, tensor_count, field_count = reader.number("I"), reader.number("Q"), reader.number("Q")
    if version != 3:
        raise ValueError(f"the GGUF version is {version}; allowed: 3")
    fields = {}
    for _ in range(field_count):
        name = reader.string()
        fields[name] = reader.value(reader.number("I"))
    places = []
    for _ in range(tensor_count):
        name = reader.string()
        # The innermost dimension comes first in the file, last in a torch shape.
        shape = tuple(reader.number("Q") for _ in range(reader.number("I")))[::-1]
        kind, offset = reader.number("I"), reader.number("Q")
        places.append((name, shape, kind, offset))
    alignment = fields.get("general.alignment", 32)
    if alignment not in (8, 16, 32, 64, 128):
        raise ValueError(f"general.alignment is {shorten(alignment)}; allowed: 8, 16, 32, 64, 128")
    start = math.ceil(reader.at / alignment) * alignment
    tensors = {
        name: _stored(content, name, shape, kind, start + offset)
        for name, shape, kind, offset in places
    }
    return GGUF(fields, tensors)


def _stored(
    content: bytearray, name: str, shape: tuple[int, ...], kind: int, first: int
) -> StoredTensor:
    if kind not in _KINDS:
        raise ValueError(f"tensor {name} is of kind {kind}; allowed: {_KINDS}")
    numbers, width = _BLOCKS[_KINDS[kind]]
    count = math.prod(shape)
    if shape[-1] % numbers or first % 4:
        raise ValueError(f"tensor {name} has no whole blocks of {numbers} numbers, or starts askew")
    nbytes = count // numbers * width
    if first + nbytes > len(content):
        raise IndexError(f"tensor {name} ends at byte {first + nbytes}")
    flat = torch.frombuffer(content, dtype=torch.uint8, count=nbytes, offset=first)
    return StoredTensor(_KINDS[kind], shape, flat.view(-1, width))


def _our_name(name: str) -> str:
    whole = {"token_embd.weight": "embedding.weight", "output_norm.weight": "final_norm.weight"}
    if name in whole:
        return whole[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _PARTS and parts[3] == "weight":
        return f"layers.{parts[1]}.{_PARTS[parts[2]]}.weight"
    raise ValueError(f"tensor {name} has no place in a lab model (no biases, head tied)")
