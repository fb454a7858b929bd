"""The memory that fine-tuning takes: what is frozen, what is trained, and what backward needs.

Each trained parameter costs 16 bytes under Adam: a 16-bit weight and gradient, and in FP32 a
master copy and two moments (or, with FP32 throughout, weight, gradient and the two moments).
A frozen one costs what its format takes, and nothing else.

For the backward pass each layer keeps what its operators read. With checkpointing a layer keeps
its input alone, and one layer at a time is run again. Attention is fused: no scores are kept.

Sources: ZeRO, arXiv 1910.02054, section 3.1 (16 bytes); LoRA, arXiv 2106.09685, section 4.1;
QLoRA, arXiv 2305.14314, section 3 (the linear layers of the blocks are quantized, the rest is
not); checkpointing, arXiv 1604.06174.

Chapter: quantized fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rooflm.roofline.config import load_model
from rooflm.roofline.formats import load_format
from rooflm.roofline.hardware import Hardware, load_hardware
from rooflm.roofline.model import Block, ForwardPass, Model
from rooflm.roofline.numeric import Number, shorten, size

TRAINED_BYTES = 16  # of a parameter in training, under Adam
KEPT_BYTES = 2  # of an activation that waits for the backward pass, and of what is not quantized


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes that one device holds in fine-tuning.

    Parameters
    ----------
    frozen : weights that are not trained, in their formats.
    trained : parameters in training with gradients and moments.
    activations : what waits for the backward pass.
    logits : scores of all positions and their gradient, in FP32.
    trainable : how many parameters are trained.
    """

    frozen: float
    trained: float
    activations: float
    logits: float
    trainable: int

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.frozen + self.trained + self.activations + self.logits

    def fits(self, device: Hardware | str) -> bool | None:
        """Whether the device's memory holds it; None where its capacity is not published."""
        capacity = load_hardware(device).memory_capacity
        return None if capacity is None else self.total <= capacity


def linear_shapes(block: Block) -> list[tuple[int, int]]:
    """(d_in, d_out) of the linear layers of a block: q, k, v, o, and two or three of the MLP."""
    mixer, mlp = block.dense("training memory")
    widths = [mixer.q_width, mixer.kv_width, mixer.kv_width]
    into = [(mixer.hidden, width) for width in widths]
    inner = [(mlp.hidden, mlp.intermediate)] * (1 + mlp.gated)
    return [*into, (mixer.q_width, mixer.hidden), *inner, (mlp.intermediate, mlp.hidden)]


def adapter_parameters(model: Model | str | dict[str, Any], rank: int) -> int:
    """Parameters of low-rank adapters on every linear layer of the blocks: rank (d_in + d_out).

    >>> adapter_parameters("meta-llama/Llama-2-7b-hf", 64)
    159907840
    """
    size("rank", rank)
    shapes = [(n, *x) for n, block in load_model(model).blocks for x in linear_shapes(block)]
    narrowest = min(min(d_in, d_out) for _, d_in, d_out in shapes)
    if rank > narrowest:
        raise ValueError(f"rank is {shorten(rank)}; allowed: 1 to {narrowest} for this model")
    return sum(n * rank * (d_in + d_out) for n, d_in, d_out in shapes)


def training_memory(
    model: Model | str | dict[str, Any],
    weights: str = "fp16",
    rank: int | None = None,
    batch: int = 1,
    tokens: int = 512,
    checkpointing: bool = True,
) -> TrainingMemory:
    """The memory of fine-tuning a model on one device.

    Parameters
    ----------
    weights : format of the frozen linear layers; of no meaning where all is trained.
    rank : of the adapters on every linear layer; None trains the whole model, without adapters.
    batch, tokens : sequences of a step, and tokens of each.
    checkpointing : whether layers are run again in the backward pass.

    Raises
    ------
    ValueError
        for an unknown model or format, or a size that is no whole number or out of range.

    >>> m = training_memory("meta-llama/Llama-2-7b-hf", "nf4-dq", rank=64)
    >>> f"{m.frozen / 1e9:.2f} GB frozen, {m.trained / 1e9:.2f} GB in training"
    '3.87 GB frozen, 2.56 GB in training'
    """
    found, form = load_model(model), load_format(weights)
    step = ForwardPass(batch, tokens)
    linear = sum(n * d_in * d_out for n, b in found.blocks for d_in, d_out in linear_shapes(b))
    kept = _kept(found, step, checkpointing)
    logits = 2 * 4 * step.tokens * found.vocab
    if rank is None:
        return TrainingMemory(0, TRAINED_BYTES * found.parameters, kept, logits, found.parameters)
    trainable = adapter_parameters(found, rank)
    frozen = linear * form.bytes + (found.parameters - linear) * KEPT_BYTES
    return TrainingMemory(frozen, TRAINED_BYTES * trainable, kept, logits, trainable)


def _kept(model: Model, step: ForwardPass, checkpointing: bool) -> Number:
    """Bytes that wait for the backward pass: what each operator reads, once where it is shared."""
    layer_input = step.tokens * model.hidden * KEPT_BYTES
    layers = [(n, step.tokens * _kept_elements(block) * KEPT_BYTES) for n, block in model.blocks]
    if checkpointing:
        return model.layers * layer_input + max(whole for _, whole in layers)
    return sum(n * whole for n, whole in layers)


def _kept_elements(block: Block) -> Number:
    """For a token: inputs of both norms and of the linear layers; q, k, v; gate and up."""
    mixer, mlp = block.dense("training memory")
    norms = len(block.norms) * mixer.hidden
    inputs = 2 * mixer.hidden + mixer.q_width + mlp.intermediate
    return norms + inputs + mixer.q_width + 2 * mixer.kv_width + (1 + mlp.gated) * mlp.intermediate
