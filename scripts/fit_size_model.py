"""Reads the bytes that `edgebuild.footprint` charges off real programs: `python scripts/fit_size_model.py`.

Each probe is lowered with two and with ten copies of a block; an eighth of what the flatbuffers of program and delegate
grow by is the block's, whatever they are rounded up to. A block is a convolution and the operator in question, so the
convolution's bytes are taken off. Needs no data: weights are random. Takes minutes.
"""

from collections.abc import Callable

import torch
from executorch.exir._serialize._flatbuffer_program import _flatbuffer_to_program
from executorch.exir._serialize._program import _get_extended_header
from torch import Tensor, nn

from edgebuild.analyse import analyse
from edgebuild.backends import BACKENDS
from edgebuild.footprint import constants, layer_bytes
from edgebuild.lift import lift
from edgebuild.plan import Choice
from edgebuild.spec import SEGMENT
from edgebuild.transforms import quantize


class Call(nn.Module):
    """A function of what a module makes and of what it reads."""

    def __init__(self, module: nn.Module, function: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.module(x), x)


def conv(kernel: int = 3, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(8, 8, kernel, padding=kernel // 2, groups=groups)


def normed() -> nn.Sequential:
    return nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU())


def after(operator: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(), operator)


PROBES: dict[str, Callable[[], nn.Module]] = {
    "conv2d with batch norm and relu": normed,
    "conv2d 1x1": lambda: conv(1),
    "depthwise": lambda: nn.Sequential(conv(3, 8), nn.ReLU()),
    "linear": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU()),
    "linear without bias": lambda: nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU()),
    "add": lambda: Call(conv(), lambda a, b: torch.relu(a + b)),
    "mul": lambda: Call(conv(), torch.mul),
    "sub": lambda: Call(conv(), torch.sub),
    "cat": lambda: nn.Sequential(Call(conv(), lambda a, b: torch.cat([a, b], 1)), nn.Conv2d(16, 8, 1)),
    "relu6": lambda: after(nn.ReLU6()),
    "hardswish": lambda: after(nn.Hardswish()),
    "hardsigmoid": lambda: after(nn.Hardsigmoid()),
    "sigmoid": lambda: after(nn.Sigmoid()),
    "silu": lambda: after(nn.SiLU()),
    "max_pool2d": lambda: after(nn.MaxPool2d(3, 1, 1)),
    "adaptive_avg_pool2d": lambda: Call(nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(1)), torch.mul),
}


class Chain(nn.Module):
    """A stem to eight channels, then the block `count` times."""

    def __init__(self, block: Callable[[], nn.Module], count: int, flat: bool):
        super().__init__()
        self.stem = nn.Linear(3, 8) if flat else nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*(block() for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.body(self.stem(x))
        return result


def flatbuffers(data: bytes) -> int:
    """Bytes of the program's flatbuffer and of the delegates', without padding."""
    header = _get_extended_header(data)
    program = _flatbuffer_to_program(data[: header.program_size])
    total: int = header.program_size
    for delegate in program.execution_plan[0].delegates:
        start = header.segment_base_offset + program.segments[delegate.processed.index].offset
        total += int.from_bytes(data[start + 14 : start + 18], "little")  # XNNHeader's flatbuffer_size
    return total


def measured(block: Callable[[], nn.Module], count: int, precision: str, flat: bool) -> tuple[int, int]:
    """Bytes of the flatbuffers, and what the model charges for them: everything but the constants."""
    torch.manual_seed(0)
    inputs = (torch.randn(1, 3) if flat else torch.randn(1, 3, 8, 8),)
    model = Chain(block, count, flat).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    lifted = lift(model, inputs)
    layers = Choice(analyse(lifted, inputs), precision).layers()  # type: ignore[arg-type]
    lowered: nn.Module = lifted
    if precision == "int8":
        lowered = quantize.apply(lifted, inputs, [inputs], BACKENDS["xnnpack"].quantizer()).model
    charged = sum(
        layer_bytes(layer, q) - sum(-(-size // SEGMENT) * SEGMENT for size in constants(layer, q) if layer.weighted)
        for layer, q in layers
    )
    return flatbuffers(BACKENDS["xnnpack"].lower(lowered, inputs).data), charged


def main() -> None:
    print(f"{'block (with its convolution)':34} {'':4} {'found':>7} {'charged':>8}")
    for name, block in PROBES.items():
        for precision in ("fp32", "int8"):
            (few, charged_few), (many, charged_many) = (
                measured(block, count, precision, name.startswith("linear")) for count in (2, 10)
            )
            print(f"{name:34} {precision} {(many - few) / 8:7.0f} {(charged_many - charged_few) / 8:8.0f}", flush=True)


if __name__ == "__main__":
    main()
