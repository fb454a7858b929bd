"""The teacher's pass: logits of a batch, computed once where several runs read the same batches.

Chapter: distillation.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from rooflm.lab.model import Transformer
from rooflm.lab.stored import sha256, write_whole


class Teacher:
    """A frozen model that is asked for its logits.

    Parameters
    ----------
    model : the teacher.
    folder : keeps what it found of each batch, for the next run that asks; None keeps nothing. Kept
        are the states that enter its head, in FP32: the logits are the same bits either way.
    """

    def __init__(self, model: Transformer, folder: Path | None = None) -> None:
        self.model, self.folder = model, folder
        if folder is not None:
            weights = hashlib.sha256()
            for tensor in model.state_dict().values():
                weights.update(tensor.contiguous().numpy().tobytes())
            self._digest = weights.digest()

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits of (rows, window): (rows, window, vocab), without a graph."""
        if self.folder is None:
            return self.model(tokens)
        key = sha256(self._digest + str(tuple(tokens.shape)).encode() + tokens.numpy().tobytes())
        path = self.folder / f"{key}.safetensors"
        try:
            states = load(path.read_bytes())["states"]
        except FileNotFoundError:
            states = self.model.states(tokens)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, save({"states": states.contiguous()}))
        return self.model.logits(states)
