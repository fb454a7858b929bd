"""The laboratory's own models: read and written as safetensors, checked by SHA-256.

A checkpoint is a folder of `data/checkpoints` with `config.json` (the fields of Hugging Face, so
that `rooflm.load_model` reads it), `model.safetensors` (FP16) and `log.csv`, the training's log.

Chapter: number formats.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from rooflm.lab.model import Config, Transformer
from rooflm.lab.stored import read_checked, write_checked
from rooflm.roofline.datafiles import data_path
from rooflm.roofline.numeric import unknown


def checkpoint_names() -> list[str]:
    """The names of the checkpoints in `data/checkpoints`."""
    folder = data_path("checkpoints")
    return sorted(p.parent.name for p in folder.glob("*/config.json"))


def checkpoint_folder(name: str | Path) -> Path:
    """Where a checkpoint lies; its name or its folder as of `load_checkpoint`."""
    if isinstance(name, Path) or "/" in name:
        return Path(name)
    if name not in checkpoint_names():
        raise unknown("checkpoint", name, checkpoint_names())
    return data_path("checkpoints", name)


def load_checkpoint(name: str | Path) -> Transformer:
    """A model in FP32, in evaluation mode.

    Parameters
    ----------
    name : a name of `checkpoint_names()`, or the path of a checkpoint's folder.

    Raises
    ------
    ValueError
        for an unknown name, or for a file that is missing, altered, cut short or does not fit.
    """
    folder = checkpoint_folder(name)
    try:
        fields = json.loads(read_checked(folder / "config.json"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"config.json of checkpoint {folder.name} is not JSON") from None
    if not isinstance(fields, dict):
        raise ValueError(f"config.json of checkpoint {folder.name} is not a JSON object")
    config = Config.from_dict(fields)
    content = read_checked(folder / "model.safetensors")
    with torch.device("meta"):  # shapes only: no random weights are drawn
        model = Transformer(config)
    try:
        tensors = {key: tensor.float() for key, tensor in load(content).items()}
        model.load_state_dict(tensors, assign=True)
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"the tensors of checkpoint {folder.name} don't fit: {reason}") from None
    return model.eval().requires_grad_(False)


def save_checkpoint(
    model: Transformer, folder: Path, log: str, dtype: torch.dtype = torch.float16
) -> None:
    """Write a model with its config and its log; whole files only.

    Parameters
    ----------
    folder : made where it is missing.
    log : the text of `log.csv`.
    dtype : of the stored tensors; FP32 keeps dequantized weights exactly.

    Raises
    ------
    ValueError
        where a number is not finite, or too large for the dtype; nothing is written then.
    """
    tensors = {key: t.detach().to(dtype).contiguous() for key, t in model.state_dict().items()}
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{key} holds numbers that {dtype} cannot; nothing was written")
    config = json.dumps(model.config.to_dict(), indent=2) + "\n"
    files = {
        "config.json": config.encode("utf-8"),
        "model.safetensors": save(tensors),
        "log.csv": log.encode("utf-8"),
    }
    write_checked(folder, files)
