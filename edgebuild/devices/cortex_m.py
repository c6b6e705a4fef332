"""A Cortex-M alone: SRAM and flash are counted, outputs are those of ExecuTorch's reference operators.

There is no latency: nothing here tells how many cycles CMSIS-NN takes on a core (docs/microcontrollers.md says why).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgebuild.devices import ethos_u, host, timing
from edgebuild.devices.device import Arrays
from edgebuild.errors import MissingEnvironment
from edgebuild.spec import CalibrationError, LayerFacts, Measurement, Precision, Target


def check(target: Target) -> None:
    """Raise MissingEnvironment where ExecuTorch comes without its Cortex-M part."""
    host.check(target)
    if find_spec("executorch.backends.cortex_m") is None:
        raise MissingEnvironment("this executorch has no Cortex-M backend", "pip install executorch==1.5.1")


@contextmanager
def load(artifact: Path, target: Target, threads: int) -> Iterator[host.Worker]:
    """Load a `.pte` for running by reference (`reference`).

    Raises MissingEnvironment, and DeviceError where it cannot be loaded.
    """
    check(target)
    with host.start(artifact, target, threads, reference=True) as worker:
        yield worker


def measure(
    artifact: Path,
    target: Target,
    threads: int,
    inputs: Sequence[Arrays],
    layers: Sequence[tuple[LayerFacts, Precision]],
    enough: timing.Enough = timing.once,
) -> tuple[Measurement, ...]:
    """SRAM and flash, as the program asks for them."""
    with load(artifact, target, threads) as worker:
        facts, _ = worker.ask("facts")
    return ethos_u.counted(artifact, target, facts, 0)


@cache
def scratch_bytes(layer: LayerFacts, target: Target) -> int:
    """Bytes that CMSIS-NN's operator for a layer takes while it runs, by the library's own functions."""
    from executorch.backends.cortex_m.library import cmsis_nn
    from executorch.backends.cortex_m.target_config import CortexMTargetConfig

    assert target.board is not None  # as the catalog sees to
    backend = CortexMTargetConfig.from_target_string(target.board.cpu).backend
    if layer.op == "adaptive_avg_pool2d":
        size = cmsis_nn.avgpool_buffer_size(backend, cmsis_nn.DataType.A8W8, dim_dst_width=1, ch_src=layer.in_channels)
        return int(size)
    if layer.op != "conv2d":
        return 0
    height, width = layer.in_shape[2:]
    rows, columns = layer.out_shape[2:]
    padding = [
        max(0, ceil(((o - 1) * stride + kernel - i) / 2))
        for i, o, kernel, stride in zip((height, width), (rows, columns), layer.kernel, layer.stride, strict=True)
    ]
    shapes = {
        "input_nhwc": [1, height, width, layer.in_channels],
        "filter_nhwc": [layer.out_channels, *layer.kernel, layer.in_channels // layer.groups],
        "output_nhwc": [1, rows, columns, layer.out_channels],
        "padding_hw": padding,
        "stride_hw": list(layer.stride),
        "dilation_hw": [1, 1],
    }
    if layer.in_channels == layer.groups:  # a single channel counts as depthwise
        each = layer.out_channels // layer.in_channels
        sizes = cmsis_nn.depthwise_conv_wrapper_buffer_size(backend, cmsis_nn.DataType.A8W8, ch_mult=each, **shapes)
    else:
        sizes = cmsis_nn.convolve_wrapper_buffer_size(backend, cmsis_nn.DataType.A8W8, **shapes)
    return int(sizes)


def layer_latency(layer: LayerFacts, precision: Precision, target: Target, threads: int) -> float:
    """Nothing is predicted: `spec.Target.timed` says so, and no plan is made for it."""
    return 0.0


def layer_latencies(
    layers: Sequence[tuple[LayerFacts, Precision]], target: Target, threads: int
) -> NDArray[np.float64]:
    """Nothing is predicted."""
    return np.zeros(len(layers))


def call_latency(target: Target, threads: int) -> float:
    """Nothing is predicted."""
    return 0.0


def calibration_error(target: Target, threads: int) -> tuple[CalibrationError, ...]:
    """Nothing was fitted."""
    return ()
