"""Our round-to-nearest, GPTQ and AWQ beside those of other libraries, on the same layers.

    python benchmarks/quantizers.py [--model random|teacher] [--bits 4 3 2] [--group 64]

The others are torchao, optimum-quanto, HQQ and llm-compressor. None is needed and none is in
requirements.txt: what cannot be imported is named and left out. To have them, make another
environment with the same torch, and put this checkout's `lib` on its PYTHONPATH:

    pip install torch==2.13.0 numpy safetensors tokenizers
    pip install torchao optimum-quanto llmcompressor termcolor
    DISABLE_CUDA=1 pip install --no-deps --no-build-isolation hqq

Not compared: GPTQModel, which is built from source and needs torch 2.14; torchao's GPTQ, which
synchronizes with a GPU; the AWQ of llm-compressor, which takes a whole Hugging Face model.

Errors are the squared error of the layer's output over its square, the mean over layers: on
other inputs of the same kind ("held out"), and on those of the calibration. Seconds are
processor seconds of one thread over all layers. Bits count codes, scales and zero points as the
library stores them; the references are given FP32 weights and keep FP32 scales here, which are
counted as the FP16 ones that they store with FP16 weights.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rooflm.lab.quantize.awq import awq
from rooflm.lab.quantize.gptq import gptq, output_error
from rooflm.lab.quantize.grids import round_to_nearest
from rooflm.lab.quantize.sensitive import stored_bits


class Layer(NamedTuple):
    """A linear layer with inputs to calibrate on, (tokens, d_in), and a held-out Hessian."""

    weight: Tensor
    inputs: Tensor
    hessian: Tensor
    held_out: Tensor


class Method(NamedTuple):
    """A quantizer: (layer, bits, group) to the dequantized weight, and what a group costs."""

    family: str
    name: str
    quantize: Callable[[Layer, int, int], Tensor]
    zero_bits: int | None = None  # None: as wide as a code
    bits: tuple[int, ...] = (2, 3, 4, 8)


class Row(NamedTuple):
    """What came out of a method, over all layers."""

    family: str
    name: str
    stored: float
    held_out: float
    calibration: float
    seconds: float


# ---- layers


def random_layers(count: int) -> list[Layer]:
    """Layers of a small model's shapes; inputs correlated, of unequal size, with outliers."""
    layers = []
    for i in range(count):
        d_out, d_in = ((256, 256), (704, 256), (256, 704))[i % 3]
        generator = torch.Generator().manual_seed(i)

        def normal(*shape: int, g: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=g)

        # A spectrum that falls as 1/k, channel sizes that vary, and one channel in 64 far larger.
        spectrum = torch.arange(1, d_in + 1).float().rsqrt()
        basis = torch.linalg.qr(normal(d_in, d_in))[0]
        sizes = (0.5 * normal(d_in)).exp()
        sizes[torch.randperm(d_in, generator=generator)[: d_in // 64]] *= 10
        mixing = spectrum[:, None] * basis * sizes
        weight = normal(d_out, d_in) * (0.3 * normal(d_out, 1)).exp() / d_in**0.5
        layers.append(layer_of(weight, normal(4096, d_in) @ mixing, normal(4096, d_in) @ mixing))
    return layers


def trained_layers(name: str, count: int) -> list[Layer]:
    """The first `count` linear layers of a checkpoint, taken from all depths in turn.

    Calibrated on a text of the training, held out on one that the model never saw.
    """
    from rooflm.lab import text
    from rooflm.lab.calibrate import LINEARS, calibration_rows
    from rooflm.lab.checkpoints import load_checkpoint

    model = load_checkpoint(name)
    places = [(i, linear) for linear in LINEARS for i in range(len(model.layers))][:count]
    if count > len(model.layers):  # every kind of layer, each at another depth
        depths = len(model.layers)
        places = [(k % depths, LINEARS[k % len(LINEARS)]) for k in range(count)]
    found: list[list[Tensor]] = []
    for source in ("emma", text.HELD_OUT):
        tokens = text.encode(text.load_text(source))
        rows = calibration_rows(tokens, 8192 // model.config.window, model.config.window)
        found.append(inputs_of(model, rows, places))
    return [
        layer_of(getattr(model.layers[i], linear).weight.detach(), seen, other)
        for (i, linear), seen, other in zip(places, *found, strict=True)
    ]


@torch.no_grad()
def inputs_of(model: Any, rows: Tensor, places: list[tuple[int, str]]) -> list[Tensor]:
    kept: list[list[Tensor]] = [[] for _ in places]
    hooks = [
        getattr(model.layers[i], linear).register_forward_pre_hook(
            lambda _, given, k=k: kept[k].append(given[0].detach().flatten(0, -2))
        )
        for k, (i, linear) in enumerate(places)
    ]
    for part in rows.split(4):
        model(part)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in kept]


def layer_of(weight: Tensor, inputs: Tensor, held_out: Tensor) -> Layer:
    return Layer(
        weight.float(),
        inputs,
        inputs.T @ inputs / len(inputs),
        held_out.T @ held_out / len(held_out),
    )


# ---- ours


def ours() -> list[Method]:
    def rounded(**options: Any) -> Callable[[Layer, int, int], Tensor]:
        return lambda layer, bits, group: round_to_nearest(layer.weight, bits, group, **options)

    def compensated(**options: Any) -> Callable[[Layer, int, int], Tensor]:
        return lambda x, bits, group: gptq(x.weight, x.hessian, bits, group, **options).weight

    def scaled(**options: Any) -> Callable[[Layer, int, int], Tensor]:
        def quantize(x: Layer, bits: int, group: int) -> Tensor:
            mean_abs = x.inputs.abs().mean(0)
            return awq(x.weight, x.hessian, mean_abs, bits, group, **options).weight

        return quantize

    return [
        Method("rounding", "ours", rounded()),
        Method("rounding", "ours, clip=mse", rounded(clip="mse")),
        Method("GPTQ", "ours", compensated()),
        Method("GPTQ", "ours, static_groups", compensated(static_groups=True)),
        Method("GPTQ", "ours, act_order", compensated(act_order=True)),
        Method("GPTQ", "ours, clip=mse", compensated(clip="mse")),
        Method("GPTQ", "ours, act_order, clip=mse", compensated(act_order=True, clip="mse")),
        Method("AWQ", "ours", scaled()),
        Method("AWQ", "ours, clip=output", scaled(clip="output")),
    ]


# ---- references


def torchao_methods() -> list[Method]:
    api = importlib.import_module("torchao.quantization")
    core = importlib.import_module("torchao.prototype.awq.core")

    def config(bits: int, group: int) -> Any:
        return api.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=api.PerGroup(group) if group else api.PerAxis(0),
            mapping_type=api.MappingType.ASYMMETRIC,
        )

    def rounded(weight: Tensor, bits: int, group: int) -> Tensor:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight.clone())
        api.quantize_(linear, config(bits, group))
        return linear.weight.dequantize()

    def scaled(layer: Layer, bits: int, group: int) -> Tensor:
        observer = core.AWQObserver(layer.weight, None, config(bits, group))
        observer(layer.inputs, None)
        scales = observer.calculate_qparams()
        return rounded(layer.weight * scales, bits, group) / scales

    return [
        Method("rounding", "torchao", lambda x, b, g: rounded(x.weight, b, g), 8),
        Method("AWQ", "torchao", scaled, 8),
    ]


def quanto_methods() -> list[Method]:
    quanto = importlib.import_module("optimum.quanto")
    grouped = importlib.import_module("optimum.quanto.tensor.grouped")
    optimizer = quanto.MaxOptimizer()

    def quantize(layer: Layer, bits: int, group: int) -> Tensor:
        # Up to its packing, which it would compile on the spot.
        weight, width = layer.weight, group or layer.weight.shape[1]
        scale, shift = optimizer(weight, quanto.qtypes[f"qint{bits}"], 0, width)
        codes = torch.ops.quanto.quantize_affine(weight, bits, 0, width, scale, shift)
        return grouped.ungroup(scale * codes - shift, 0, weight.shape)

    return [Method("rounding", "optimum-quanto", quantize, 16, (2, 4))]


def hqq_methods() -> list[Method]:
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer

    def method(name: str, optimize: bool) -> Method:
        def quantize(layer: Layer, bits: int, group: int) -> Tensor:
            codes, meta = quantizer.quantize(
                layer.weight,
                nbits=bits,
                group_size=group or layer.weight.shape[1],
                optimize=optimize,
                axis=1,
                bitpack=False,
                compute_dtype=torch.float32,
                device="cpu",
            )
            return quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32})

        return Method("rounding", name, quantize, 16)

    return [method("hqq, not optimized", False), method("hqq", True)]


def llmcompressor_methods() -> list[Method]:
    core = importlib.import_module("llmcompressor.modifiers.gptq.gptq_quantize")
    kinds = importlib.import_module("compressed_tensors.quantization")
    helpers = importlib.import_module("compressed_tensors.quantization.utils.helpers")

    def method(name: str, order: str | None) -> Method:
        def quantize(layer: Layer, bits: int, group: int) -> Tensor:
            arguments = kinds.QuantizationArgs(
                num_bits=bits,
                symmetric=False,
                strategy="group" if group else "channel",
                group_size=group or None,
                actorder=order,
            )
            parts = layer.weight.reshape(len(layer.weight), -1, group or layer.weight.shape[1])
            scale, zero = helpers.calculate_qparams(parts.amin(2), parts.amax(2), arguments)
            found, _, _ = core.quantize_weight(
                layer.weight[None].clone(),
                layer.hessian[None].clone(),
                scale[None],
                zero[None],
                None,
                arguments,
            )
            return found[0]

        return Method("GPTQ", name, quantize)

    return [
        method("llm-compressor", None),
        method("llm-compressor, act order", "weight"),
    ]


REFERENCES = {
    "torchao": torchao_methods,
    "optimum-quanto": quanto_methods,
    "hqq": hqq_methods,
    "llmcompressor": llmcompressor_methods,
}


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep the libraries' banners and progress bars out of the table."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def references() -> list[Method]:
    """The methods of the libraries that are there; says which are not."""
    methods = []
    for package, make in REFERENCES.items():
        try:
            with silence():
                found = make()
            version = importlib.metadata.version(package)
            methods += found
            print(f"{package} {version}")
        except (ImportError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:100]
            print(f"{package}: left out ({reason})")
    return methods


# ---- the comparison


def measure(method: Method, layers: list[Layer], bits: int, group: int) -> Row:
    held_out, calibration, stored, elements = 0.0, 0.0, 0, 0
    with silence():
        method.quantize(layers[0], bits, group)  # warm up
        start = time.process_time()
        found = [method.quantize(layer, bits, group) for layer in layers]
        seconds = time.process_time() - start
    for layer, quantized in zip(layers, found, strict=True):
        nothing = torch.zeros_like(layer.weight)
        for hessian in (layer.held_out, layer.hessian):
            error = output_error(layer.weight, quantized, hessian)
            share = error / output_error(layer.weight, nothing, hessian) / len(layers)
            if hessian is layer.held_out:
                held_out += share
            else:
                calibration += share
        d_out, d_in = layer.weight.shape
        zero_bits = bits if method.zero_bits is None else method.zero_bits
        groups = d_out * (d_in // (group or d_in))
        stored += stored_bits(d_out, d_in, bits, group, symmetric=True) + zero_bits * groups
        elements += layer.weight.numel()
    return Row(method.family, method.name, stored / elements, held_out, calibration, seconds)


def compare(methods: list[Method], layers: list[Layer], bits: int, group: int) -> None:
    """Print a row for each method as it comes, and how our best does beside the best other."""
    print(f"\n{bits} bits, groups of {group or 'a row'}")
    print(f"  {'':9} {'':26} {'bits':>6} {'held out':>10} {'calibration':>12} {'seconds':>8}")
    for family in ("rounding", "GPTQ", "AWQ"):
        mine: list[Row] = []
        others: list[Row] = []
        for method in methods:
            if method.family == family and bits in method.bits:
                row = measure(method, layers, bits, group)
                (mine if row.name.startswith("ours") else others).append(row)
                print(
                    f"  {row.family:9} {row.name:26} {row.stored:6.3f} {row.held_out:10.6f} "
                    f"{row.calibration:12.6f} {row.seconds:8.2f}",
                    flush=True,
                )
        if others:
            best, other = (min(rows, key=lambda r: r.held_out) for rows in (mine, others))
            ratio = best.held_out / other.held_out
            print(f"  best {family}: {best.name} / {other.name} = {ratio:.3f} in held-out error")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="random", help="random, or the name of a checkpoint")
    parser.add_argument("--layers", type=int, default=6, help="how many layers (default 6)")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2], choices=(2, 3, 4, 8))
    parser.add_argument("--group", type=int, default=64, help="0 for one scale a row (default 64)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    methods = ours() + references()
    try:
        if asked.model == "random":
            layers = random_layers(asked.layers)
        else:
            layers = trained_layers(asked.model, asked.layers)
    except ValueError as error:
        parser.error(str(error))
    shapes = ", ".join(f"{x.weight.shape[0]}x{x.weight.shape[1]}" for x in layers)
    print(f"{asked.model} layers: {shapes}; {len(layers[0].inputs)} tokens each")
    print(f"torch {torch.__version__}")
    for bits in asked.bits:
        compare(methods, layers, bits, asked.group)


if __name__ == "__main__":
    main()
