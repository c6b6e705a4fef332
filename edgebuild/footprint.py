"""The bytes that a layer adds to an artifact, as its serializer lays them out, and to memory, as XNNPACK packs them.

A `.pte` holds each constant (weights, bias, scales) in a segment of its own, which starts at a multiple of SEGMENT, and
describes constants, tensors and operators in two flatbuffers: the program's and the delegate's. What is said of an
operator takes so many bytes whatever its widths are. `scripts/fit_size_model.py` reads these off lowered programs and
prints them beside the ones here.

Everything is additive: `file_bytes` and the sum of `layer_bytes` over `Choice.layers()`.

In memory a loaded program keeps its weights in the micro-kernels' layout (`kept_bytes`). While loading, the file is
there as well (`loading_bytes`); while running, the pointers that convolutions read their input through
(`pointer_bytes`) and the activations. The constants are fitted to heaps counted on the simulated Cortex-A72.
"""

from functools import cache
from math import prod
from typing import Literal

from edgebuild.spec import DEPTH, GROUP, SEGMENT, LayerFacts, Precision, Scheme

ArtifactKind = Literal["pte", "torchscript"]

# What a `.pte` takes beside its layers: the program, the first of each kind of table, the delegate's header; the most
# that rounding both flatbuffers up to SEGMENT can add. With convolutions there are two transposes to channels-last and
# back, and their tables.
_PTE_FILE = 1_720 + 2 * (SEGMENT - 1)
_PTE_IMAGES = 430

# Flatbuffer bytes of an operator without weights, with its output: the node and the tensor. An int8 tensor carries its
# scale and zero point. hardsigmoid is lowered as add, two clamps and a division between two transposes, with constants
# in the program; silu as sigmoid and mul.
_UNARY, _BINARY, _QUANTIZED = 92, 96, 28
_OPERATORS: dict[str, int] = {
    "add": _BINARY + 68,  # ends in a clamp, as residual sums mostly do
    "sub": _BINARY,
    "mul": _BINARY,
    "truediv": _BINARY,
    "cat": 112,
    "silu": _UNARY + _BINARY,
    "hardsigmoid": 1_224,
    "adaptive_avg_pool2d": 244,
    "mean": 244,
    "max_pool2d": 148,
    "avg_pool2d": 148,
}
_BINARIES = frozenset({"add", "sub", "mul", "truediv"})
_CONSTANT_INPUT = 200  # a constant in the place of a binary operator's second input

# Of an operator with weights and a bias that ends in a clamp: fp32 has two constants, int8 four, since the weights and
# the bias bring their scales. In fp32 a convolution's batch norm leaves a value in the program. A convolution's padding
# is said side by side, where there is one.
_WEIGHTED: dict[str, dict[Precision, int]] = {
    "conv2d": {"fp32": 520, "int8": 800},
    "depthwise": {"fp32": 520, "int8": 824},
    "linear": {"fp32": 424, "int8": 768},
}
_NO_BIAS: dict[Precision, int] = {"fp32": 144, "int8": 312}
_PADDED_SIDE = 4

# A TorchScript archive: its code, and what each operator adds to code and constants. Its int8 weights have float64
# scales and int64 zero points, fp32 biases: 8 bytes a channel more than those of a `.pte`.
_SCRIPT_FILE = 4_000
_SCRIPT_OPERATOR = 100
_SCRIPT_WEIGHTED: dict[Precision, int] = {"fp32": 550, "int8": 1_450}


def file_bytes(images: bool, kind: ArtifactKind = "pte") -> int:
    """Bytes of an artifact without layers, the most that padding can make of them; `images` if it has convolutions."""
    return _PTE_FILE + (_PTE_IMAGES if images else 0) if kind == "pte" else _SCRIPT_FILE


@cache
def layer_bytes(layer: LayerFacts, precision: Precision, kind: ArtifactKind = "pte", scheme: Scheme = "static") -> int:
    """Bytes that a layer adds to an artifact."""
    if not rounds(layer, scheme):
        precision = "fp32"
    stored = constants(layer, precision, scheme) if layer.weighted else ()
    if kind == "torchscript":
        wider = 8 * layer.out_channels if precision == "int8" else 0
        return _SCRIPT_WEIGHTED[precision] + wider + sum(stored) if layer.weighted else _SCRIPT_OPERATOR
    if not layer.weighted:
        said = _OPERATORS.get(layer.op, _UNARY)
        said += _CONSTANT_INPUT if layer.op in _BINARIES and len(layer.sources) == 1 else 0
        return said + (_QUANTIZED if precision == "int8" and layer.op != "dequantize" else 0)
    said = _WEIGHTED["depthwise" if layer.depthwise else layer.op][precision]
    said += sum(2 * _PADDED_SIDE for size in layer.kernel if size > 1) - (0 if layer.bias else _NO_BIAS[precision])
    return said + sum(_padded(size, SEGMENT) for size in stored)


def rounds(layer: LayerFacts, scheme: Scheme) -> bool:
    """Whether a scheme computes a layer in less than fp32: those that find ranges at run time leave many alone."""
    if scheme == "static" or layer.op == "linear":
        return True
    return scheme == "dynamic" and layer.op == "conv2d" and layer.in_channels // layer.groups >= DEPTH


def constants(layer: LayerFacts, precision: Precision, scheme: Scheme = "static") -> tuple[int, ...]:
    """Bytes of each constant of a layer with weights: weights and bias; in int8 a scale for each channel of both.

    4-bit weights have a bf16 scale for each group.
    """
    channels = 4 * layer.out_channels
    if precision == "fp32":
        return (4 * layer.weights, channels) if layer.bias else (4 * layer.weights,)
    if scheme == "8da4w" and layer.in_channels % GROUP == 0:
        stored = (layer.weights // 2, 2 * layer.weights // GROUP)
        return (*stored, channels) if layer.bias else stored
    return (layer.weights, channels, channels, channels) if layer.bias else (layer.weights, channels)


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit


# ------------------------------------------------------------------------------------------------------- in memory

EMPTY_PROGRAM = 5_000  # what a loaded program keeps without layers
EMPTY_LOADING = 23_000  # and what it needs beside that and the file while it is made
_LOADING = 1_000  # for each operator: the graph that the delegate builds
_KEPT_WEIGHTED, _KEPT = 5_000, 1_500  # an operator's own structures
# Channels that weights are packed in: XNNPACK's common micro-kernels for NEON.
_TILE: dict[Precision, int] = {"fp32": 8, "int8": 16}
_POINTER, _ROWS = 8, 4  # the tile's height: output positions computed at once


@cache
def kept_bytes(layer: LayerFacts, precision: Precision) -> int:
    """Bytes that a loaded program holds for a layer: packed weights, biases and scales, the operator."""
    if not layer.weighted:
        return _KEPT
    channels = _padded(layer.out_channels, _TILE[precision])
    each = layer.weights // layer.out_channels
    if precision == "fp32":
        return _KEPT_WEIGHTED + 4 * channels * (each + 1)
    inner = 1 if layer.depthwise else layer.in_channels // layer.groups  # int8 products are summed four by four
    each = each // inner * (1 if layer.depthwise else _padded(inner, 4))
    return _KEPT_WEIGHTED + channels * (each + 8)


def loading_bytes(layer: LayerFacts, precision: Precision, kind: ArtifactKind = "pte") -> int:
    """Bytes that a layer needs while the program is loaded, beside what it keeps: its share of the file, its graph."""
    return _LOADING + layer_bytes(layer, precision, kind)


def pointer_bytes(layer: LayerFacts) -> int:
    """Bytes of a convolution's indirection buffer: for each output position a pointer to every pixel that it reads.

    A 1x1 convolution without a stride is a matrix product; a depthwise one lets go of its buffer.
    """
    if layer.op != "conv2d" or layer.depthwise or prod((*layer.kernel, *layer.stride)) == 1:
        return 0
    return _POINTER * prod(layer.kernel) * _padded(layer.positions, _ROWS)
