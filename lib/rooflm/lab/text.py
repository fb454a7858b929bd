"""The texts of the laboratory and the tokenizer that all its own models share.

Six novels by Jane Austen; *Persuasion* is held out: neither the tokenizer nor any model of ours
was trained on it. Eleven novels by others of her century and the one before join the training.
*Moby-Dick* is kept apart, as the other author to whom a model is adapted. `data/corpus/README.md`
has the sources; each file is checked against its SHA-256 before it is used.

The tokenizer is a byte-level BPE, trained and run by the library `tokenizers`: every text has an
encoding, and the bytes of a token are known, so that losses are comparable per byte.

Sources: BPE, arXiv 1508.07909, section 3.2; its byte-level form, GPT-2 (Radford et al., 2019),
section 2.2.

Chapter: number formats.
"""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from rooflm.lab.stored import read_checked, write_checked
from rooflm.roofline.datafiles import data_path
from rooflm.roofline.numeric import size, unknown

AUSTEN = (
    "emma",
    "mansfield_park",
    "northanger_abbey",
    "pride_and_prejudice",
    "sense_and_sensibility",
)
OTHERS = (
    "cranford",
    "evelina",
    "jane_eyre",
    "middlemarch",
    "north_and_south",
    "the_mill_on_the_floss",
    "the_mysteries_of_udolpho",
    "the_tenant_of_wildfell_hall",
    "vanity_fair",
    "villette",
    "wuthering_heights",
)
HELD_OUT = "persuasion"
OTHER_AUTHOR = "moby_dick"
TEXTS = (*AUSTEN, *OTHERS, HELD_OUT, OTHER_AUTHOR)
END = "<|end|>"  # stands between two texts; token 0


def load_text(name: str) -> str:
    """A text by its name in `TEXTS`.

    Raises
    ------
    ValueError
        for an unknown name, or a file that is not what it was.
    """
    if name not in TEXTS:
        raise unknown("text", name, TEXTS)
    return read_checked(data_path("corpus", f"{name}.txt")).decode("utf-8")


def train_tokenizer(vocab: int) -> Tokenizer:
    """A byte-level BPE with that many tokens, trained on the training texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size("vocab", vocab),
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((load_text(name) for name in (*AUSTEN, *OTHERS)), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer) -> None:
    """Store it as `data/tokenizer/tokenizer.json`."""
    content = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, indent=0)
    write_checked(data_path("tokenizer"), {"tokenizer.json": content.encode("utf-8") + b"\n"})


@lru_cache(maxsize=1)
def load_tokenizer() -> Tokenizer:
    """The tokenizer of the laboratory's own models."""
    content = read_checked(data_path("tokenizer", "tokenizer.json"))
    tokenizer = Tokenizer.from_str(content.decode("utf-8"))
    tokenizer.encode_special_tokens = True  # a text that spells "<|end|>" is text
    return tokenizer


def encode(text: str, tokenizer: Tokenizer | None = None) -> Tensor:
    """A text's tokens, (tokens,), int64."""
    found = (tokenizer or load_tokenizer()).encode(text, add_special_tokens=False)
    return torch.tensor(found.ids, dtype=torch.int64)


def decode(tokens: Tensor, tokenizer: Tokenizer | None = None) -> str:
    """The text of (tokens,); bytes that are no UTF-8 become U+FFFD."""
    return (tokenizer or load_tokenizer()).decode(tokens.tolist(), skip_special_tokens=False)


def token_bytes(tokenizer: Tokenizer | None = None) -> Tensor:
    """How many bytes of text each token stands for, (vocab,), int64; 0 for a special token.

    A byte-level vocabulary writes each byte as one character, so a token's length is its bytes.
    """
    found = tokenizer or load_tokenizer()
    special = {token.content for token in found.get_added_tokens_decoder().values()}
    lengths = torch.zeros(found.get_vocab_size(), dtype=torch.int64)
    for token, index in found.get_vocab().items():
        lengths[index] = 0 if token in special else len(token)
    return lengths
