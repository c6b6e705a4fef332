"""A Cortex-M with an Ethos-U NPU: cycles by Vela's estimate, SRAM and flash counted, outputs by Arm's TOSA model.

Nothing here is hardware, and the NPU's time is no measurement: Vela (`edgebuild.vela`) models the NPU and its memories.
Bytes are exact: they are what the program asks its runtime for.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import ceil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgebuild import vela
from edgebuild.devices import host, timing
from edgebuild.devices.device import Arrays
from edgebuild.errors import BackendError, DeviceError, SpecError
from edgebuild.spec import Bound, CalibrationError, LayerFacts, Measurement, Npu, OperatorTime, Precision, Target
from edgebuild.units import Bytes

# Outputs (height x width, channels), input channels that the MACs take in a cycle; Vela's `architecture_features.py`.
_AT_ONCE = {32: (1, 4, 8), 64: (1, 8, 8), 128: (2, 8, 8), 256: (4, 8, 8), 512: (8, 8, 8), 1024: (8, 16, 8)}
_LARGEST = (16, 16, 8)
# What Vela says beside them: cycles to start an operator, and, on 128 MACs, for an output; by the NPU's generation.
_BESIDE = {"55": (1_100, 1.0), "65": (1_100, 1.0), "85": (420, 0.5)}
_READ = 0.7  # and for an element that is read by an operator without weights
_BUSY = 1.1  # cycles of the MACs for one that they would take without a gap
SCALES = 10  # bytes of bias and scale that Vela writes for an output channel


def check(target: Target) -> None:
    """Raise MissingEnvironment without Vela or the TOSA reference model, SpecError for a system that Vela lacks."""
    vela.check()
    vela.system(npu_of(target))
    _named(npu_of(target))
    host.check(target)


@contextmanager
def load(artifact: Path, target: Target, threads: int) -> Iterator[host.Worker]:
    """Load a `.pte`, with its TOSA graphs beside it, for running by reference (`reference`).

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
    """Latency and throughput as Vela estimates them, SRAM and flash as they are counted.

    The TOSA graphs are compiled again: DeviceError where they do not give what the program holds.
    """
    with load(artifact, target, threads) as worker:
        facts, _ = worker.ask("facts")
        _, streams = worker.ask("streams")
    estimates, fastest = _estimates(artifact, target, facts["flags"], streams)
    memory = counted(artifact, target, facts, max((estimate.sram for estimate in estimates), default=0))
    if not estimates:
        return memory
    seconds = sum(estimate.seconds for estimate in estimates)
    npu = npu_of(target)
    beside = f"; {len(facts['outside'])} operators on the CPU are not in it" if facts["outside"] else ""
    if fastest != estimates:
        most, least = (sum(estimate.cycles for estimate in each) for each in (estimates, fastest))
        beside += f"; compiled to fit the SRAM: {most / least - 1:+.1%} cycles against the fastest"
    detail = (
        f"{vela.name()}'s estimate, no measurement: {sum(e.cycles for e in estimates):,} cycles of the NPU at "
        f"{estimates[0].clock / 1e6:g} MHz, {npu.system_config}, {npu.memory_mode}{beside}"
    )
    operators = tuple(_operator(row, estimate.clock) for estimate in estimates for row in estimate.operators)
    error = target.latency_error
    latency = Measurement(target.name, "latency", seconds, "estimated", error, detail=detail, operators=operators)
    throughput = Measurement(target.name, "throughput", 1 / seconds, "estimated", error, detail="1 / latency")
    return (latency, throughput, *memory)


def counted(artifact: Path, target: Target, facts: dict, scratch: int) -> tuple[Measurement, ...]:
    """Bytes of SRAM and flash; `scratch` of the former are the NPU's alone."""
    planned, size = facts["planned"], artifact.stat().st_size
    split = {"arena": float(planned), "workspace": float(scratch)}
    said = f"{Bytes(planned)} planned for inputs, outputs and operators on the CPU"
    said += f", {Bytes(scratch)} for the NPU" if scratch else ", with the operators' scratch"
    said += "; the runtime's own structures and code are not counted"
    total = float(planned + scratch)
    return (
        Measurement(target.name, "sram", total, "counted", detail=said),
        Measurement(target.name, "peak_memory", total, "counted", detail="the SRAM", split=split),
        Measurement(target.name, "flash", float(size), "counted", detail="the program; not the runtime's code"),
    )


def _estimates(
    artifact: Path, target: Target, flags: Sequence[str], streams: Arrays
) -> tuple[list[vela.Estimate], list[vela.Estimate]]:
    """What Vela says of each delegate as the program holds it, and of the fastest that it would make."""
    found: list[vela.Estimate] = []
    fastest: list[vela.Estimate] = []
    npu = npu_of(target)
    for i, said in enumerate(flags):
        graph = artifact.with_suffix(f".{i}.tosa")
        if not graph.is_file():
            break
        try:
            data = graph.read_bytes()
            found.append(vela.estimate(data, npu, vela.arena_of(said)))
            fastest.append(vela.estimate(data, npu))
        except BackendError as error:
            raise DeviceError(f"{artifact.name} on {target.name}: {error.what}", error.remedy) from None
    held = [stream.tobytes() for stream in streams]
    made = [data for estimate in found for data in (estimate.commands or b"\0", estimate.weights or b"\0")]
    if held != made:
        raise DeviceError(
            f"{artifact.name} on {target.name}: {vela.name()} does not make of its TOSA graphs what the program holds",
            "it was built for another NPU or by another Vela: build it again",
        )
    return found, fastest


def npu_of(target: Target) -> Npu:
    assert target.npu is not None  # as the catalog sees to
    return target.npu


def _operator(row: vela.OperatorCycles, clock: float) -> OperatorTime:
    seconds = row.cycles / clock
    bound: Bound = row.waits_for  # type: ignore[assignment]
    return OperatorTime(row.name, seconds, {bound: seconds}, {}, row.macs, 0, 0, 0, 0, 1, 1)


# --------------------------------------------------------------------------------------------------- predictions


def layer_latency(layer: LayerFacts, precision: Precision, target: Target, threads: int) -> float:
    """Predicted seconds of one layer: what it computes, writes or reads, whichever takes longest.

    A rough copy of Vela's own model: a plan is corrected by what Vela says of it.
    """
    if layer.op in ("quantize", "dequantize", "cat", "view", "reshape"):  # the CPU's, or nothing to do
        return 0.0
    generation, macs = _named(npu_of(target))
    start, output = _BESIDE[generation]
    share = 128 / macs  # of the cycles that 128 MACs take
    if not layer.weighted:
        return (start + _READ * share * layer.in_elements) / clock(target)
    pixels, out, into = _AT_ONCE.get(macs, _LARGEST)
    channels = 1 if layer.depthwise else ceil(layer.in_channels / layer.groups / into)
    kernel = layer.weights // layer.out_channels // (layer.in_channels // layer.groups)
    computes = ceil(layer.positions / pixels) * ceil(layer.out_channels / out) * channels * kernel
    reads = (layer.weights + SCALES * layer.out_channels) / bytes_per_cycle(target)
    return (start + max(_BUSY * computes, output * share * layer.out_elements, reads)) / clock(target)


def layer_latencies(
    layers: Sequence[tuple[LayerFacts, Precision]], target: Target, threads: int
) -> NDArray[np.float64]:
    """Predicted seconds of each of many layers."""
    return np.array([layer_latency(layer, precision, target, threads) for layer, precision in layers])


def call_latency(target: Target, threads: int) -> float:
    """Nothing: Vela leaves out what it takes to start the NPU."""
    return 0.0


def calibration_error(target: Target, threads: int) -> tuple[CalibrationError, ...]:
    """Nothing was fitted."""
    return ()


def _named(npu: Npu) -> tuple[str, int]:
    """The generation and the MACs per cycle that "ethos-u55-128" names. Raises SpecError for another name."""
    match = re.fullmatch(r"ethos-u(55|65|85)-(\d+)", npu.accelerator)
    if match is None:
        raise SpecError(f"accelerator = {npu.accelerator!r} is no Ethos-U", 'such as "ethos-u55-128"')
    return match[1], int(match[2])


def clock(target: Target) -> float:
    """Hz of the NPU, by Vela's configuration."""
    return vela.system(npu_of(target)).clock


def bytes_per_cycle(target: Target) -> float:
    """What the memory of the weights gives in a cycle of the NPU, by Vela's configuration."""
    return vela.system(npu_of(target)).constants_per_cycle
