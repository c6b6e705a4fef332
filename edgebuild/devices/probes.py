"""The layers that `host` times on this machine, to learn what every other layer costs (see `layer_model`).

They cover what compression makes of the usual networks: widths that pruning leaves behind, small ranks, the two halves
of a spatial factorization, feature maps from 1x1 to 112x112.
"""

from dataclasses import dataclass
from math import prod

from edgebuild.spec import PRECISIONS, LayerFacts, Precision

# A probe repeats its layer until a run takes about so long: a single small layer would drown in the cost of a call.
RUN = 40e-6
MOST_REPEATS = 24


@dataclass(frozen=True)
class Probe:
    """A layer in a precision, run `repeats` times over in one method of a program."""

    layer: LayerFacts
    precision: Precision
    repeats: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the input, channels last but for a model's input."""
        return self.layer.in_shape if self.layer.op == "input" else channels_last(self.layer.in_shape)

    @property
    def int8_input(self) -> bool:
        return self.precision == "int8" and self.layer.op != "quantize"


def method(position: int) -> str:
    """The name of the method that runs the probe at a position."""
    return f"probe{position}"


def channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape


def conv(
    into: int, out: int, side: int, kernel: int | tuple[int, int] = 3, groups: int = 1, stride: int = 1
) -> LayerFacts:
    """A padded convolution whose output is `side` x `side`."""
    taps = (kernel, kernel) if isinstance(kernel, int) else kernel
    wide = side * stride
    return LayerFacts(
        "conv", "conv2d", into, out, groups, taps, (stride, stride), side * side, into * wide**2, out * side**2, True,
        (1, into, wide, wide), (1, out, side, side),
    )  # fmt: skip


def depthwise(channels: int, side: int, kernel: int = 3, stride: int = 1) -> LayerFacts:
    return conv(channels, channels, side, kernel, channels, stride)


def linear(into: int, out: int, rows: int = 1) -> LayerFacts:
    return LayerFacts(
        "linear", "linear", into, out, positions=rows, in_elements=rows * into, out_elements=rows * out, bias=True,
        in_shape=(rows, into), out_shape=(rows, out),
    )  # fmt: skip


def plain(op: str, channels: int, side: int) -> LayerFacts:
    """An operator without weights. `add` and `mul` read two tensors, `scale` is a `mul` by a factor for each channel.

    `input` is what a model's input costs: its copy, and turning it to channels last.
    """
    shape, out = (1, channels, side, side), (1, channels, side, side)
    elements = prod(shape)
    if op == "adaptive_avg_pool2d":
        out = (1, channels, 1, 1)
    elif op == "max_pool2d":
        out = (1, channels, side // 2, side // 2)
    elif op in ("add", "mul"):
        elements *= 2
    elif op == "scale":
        op, elements = "mul", elements + channels
    return LayerFacts(
        op, op, channels, channels, in_elements=elements, out_elements=prod(out), in_shape=shape, out_shape=out
    )


DENSE = (
    # pruned CIFAR networks
    *(conv(3, width, 32) for width in (8, 16, 32)),
    *(conv(width, width, 32) for width in (8, 12, 16, 24, 32)),
    *(conv(width, width, 16) for width in (16, 20, 32, 40, 48, 64)),
    *(conv(width, width, 8) for width in (8, 24, 32, 56, 64, 80, 96, 128)),
    *(conv(width, width, 4) for width in (16, 64, 128)),
    conv(16, 32, 16, stride=2), conv(48, 96, 8, stride=2), conv(64, 64, 4, stride=2), conv(1, 32, 8),
    conv(16, 64, 16), conv(64, 16, 16), conv(24, 96, 8), conv(96, 24, 8), conv(32, 8, 32), conv(8, 32, 32),
    # larger images
    conv(3, 16, 112, stride=2), conv(3, 32, 112, stride=2), conv(3, 64, 112, 7, stride=2), conv(32, 32, 56),
    conv(64, 64, 28), conv(128, 128, 14), conv(256, 256, 7), conv(512, 512, 7), conv(16, 32, 14, 5), conv(32, 32, 8, 5),
    # pointwise
    conv(8, 8, 32, 1), conv(32, 16, 112, 1), conv(16, 96, 56, 1), conv(96, 24, 56, 1), conv(24, 144, 28, 1),
    conv(144, 32, 28, 1), conv(192, 64, 14, 1), conv(64, 384, 14, 1), conv(384, 96, 14, 1), conv(576, 160, 7, 1),
    conv(160, 960, 7, 1), conv(960, 320, 7, 1), conv(12, 40, 16, 1), conv(40, 12, 16, 1), conv(16, 16, 16, 1),
    conv(64, 64, 16, 1), conv(16, 64, 8, 1), conv(64, 16, 8, 1), conv(128, 128, 8, 1), conv(64, 128, 2, 1),
    conv(32, 64, 16, 1, stride=2), conv(64, 128, 8, 1, stride=2), conv(16, 24, 16, 1, stride=2),
    conv(48, 8, 16, 1), conv(24, 8, 28, 1), conv(64, 8, 8, 1), conv(16, 24, 28, 1), conv(56, 20, 14, 1),
    conv(64, 40, 8, 1), conv(96, 56, 7, 1), conv(128, 256, 14, 1, stride=2), conv(96, 24, 1, 1), conv(24, 96, 1, 1),
    conv(480, 120, 1, 1),
    # spatial factors
    conv(32, 16, 16, (3, 1)), conv(16, 32, 16, (1, 3)), conv(64, 24, 8, (3, 1)), conv(24, 64, 8, (1, 3)),
    conv(16, 8, 32, (3, 1)), conv(8, 16, 32, (1, 3)), conv(128, 48, 8, (3, 1)), conv(48, 128, 8, (1, 3)),
    linear(32, 10), linear(128, 10), linear(64, 64), linear(512, 192), linear(256, 256), linear(512, 1000),
    linear(1024, 1000), linear(1280, 256), linear(128, 128, 16), linear(256, 512, 64),
)  # fmt: skip

DEPTHWISE = (
    *(depthwise(channels, 56) for channels in (16, 96)),
    depthwise(32, 112), depthwise(64, 56, stride=2), depthwise(144, 28), depthwise(144, 28, stride=2),
    depthwise(24, 28), depthwise(192, 14, stride=2), depthwise(384, 14), depthwise(576, 7, stride=2), depthwise(960, 7),
    depthwise(8, 16), depthwise(12, 16), depthwise(48, 16), depthwise(64, 8), depthwise(64, 2, stride=2),
    depthwise(32, 8), depthwise(128, 4), depthwise(96, 4, stride=2),
    depthwise(72, 28, 5), depthwise(96, 14, 5, 2), depthwise(240, 14, 5), depthwise(120, 7, 5), depthwise(672, 7, 5),
)  # fmt: skip

# Channels and side of operators without weights, and of a model's input.
SIZES = ((16, 4), (32, 8), (96, 7), (16, 32), (144, 14), (64, 28), (96, 56), (16, 112))
INPUTS = ((1, 8), (1, 28), (3, 32), (3, 96), (3, 224))
BOTH = ("add", "mul", "scale", "adaptive_avg_pool2d", "max_pool2d")
ONE: dict[str, Precision] = {
    "hardswish": "fp32", "hardsigmoid": "fp32", "sigmoid": "fp32", "silu": "fp32", "quantize": "int8",
    "dequantize": "int8",
}  # fmt: skip
CALL = plain("call", 8, 1)


def everything() -> tuple[Probe, ...]:
    """Everything that is timed; the first is an empty call."""
    plains = {op: tuple(plain(op, *size) for size in SIZES) for op in (*BOTH, *ONE)}
    inputs = tuple(plain("input", *size) for size in INPUTS)
    made = [(CALL, PRECISIONS[0])]
    for precision in PRECISIONS:
        made += [(layer, precision) for layer in (*DENSE, *DEPTHWISE, *inputs)]
        made += [(layer, precision) for op in BOTH for layer in plains[op]]
    made += [(layer, precision) for op, precision in ONE.items() for layer in plains[op]]
    return tuple(Probe(layer, precision, _repeats(layer)) for layer, precision in made)


def _repeats(layer: LayerFacts) -> int:
    if layer.op in ("call", "input"):
        return 1  # an input is copied once for a call
    guess = 5e-7 + 2e-11 * layer.macs + 2e-10 * (layer.in_elements + layer.out_elements)
    return max(1, min(MOST_REPEATS, round(RUN / guess)))
