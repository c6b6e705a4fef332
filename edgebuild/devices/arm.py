"""A simulated Arm CPU: the artifact runs in ExecuTorch's Arm build under qemu's user mode, on the core's kernels.

Outputs and peak memory are those of the real library on the real instruction set; latency is that of a model of the
core and its memory, which follows every instruction (see `simulator`).
"""

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgebuild import cache
from edgebuild.devices import arm_rates, machine, simulator, timing, toolchain
from edgebuild.devices.device import Arrays
from edgebuild.devices.guest import Guest, start
from edgebuild.devices.operators import attributed
from edgebuild.errors import DeviceError, MissingEnvironment
from edgebuild.spec import CalibrationError, LayerFacts, Measurement, Precision, Target


def check(target: Target) -> None:
    """Make sure that artifacts can run, fetching and building what is made on first use. Raises MissingEnvironment."""
    qemu = toolchain.qemu()
    known = subprocess.run([str(qemu), "-cpu", "help"], capture_output=True, text=True).stdout.split()
    for cluster in target.cluster:
        cpu = cluster.qemu_cpu.partition(",")[0]
        if cpu not in known:
            raise MissingEnvironment(f"{qemu} does not know the CPU {cpu!r} of {target.name}", "use qemu 7.2 or newer")
    toolchain.library_prefix(toolchain.compiler())
    toolchain.runner()
    toolchain.plugin()


@contextmanager
def load(artifact: Path, target: Target, threads: int) -> Iterator[Guest]:
    """Load a `.pte` under qemu. Raises MissingEnvironment, and DeviceError where it cannot be loaded."""
    check(target)
    cluster = target.cluster[0]
    emulator = [
        *(str(toolchain.qemu()), "-cpu", cluster.qemu_cpu),
        *("-L", str(toolchain.library_prefix(toolchain.compiler()))),
    ]
    program = [str(toolchain.runner()), str(Path(artifact).absolute()), str(threads)]
    environment = {"EDGEBUILD_MACHINE": str(machine.folder(cluster))}
    what = f"{Path(artifact).name} on {target.name}"
    with start([*emulator, *program], what, environment) as guest:
        if (seen := guest.midr & ~0xF0000) != machine.midr(cluster.identity):  # without the architecture field
            raise DeviceError(f"{what}: the runner took its core for MIDR {seen:#x}, not for a {cluster.core}")
        yield guest


def measure(
    artifact: Path,
    target: Target,
    threads: int,
    inputs: Sequence[Arrays],
    layers: Sequence[tuple[LayerFacts, Precision]],
    enough: timing.Enough = timing.once,
) -> tuple[Measurement, ...]:
    """Latency and throughput, simulated; peak memory of loading and one inference on `inputs[0]`.

    `layers` name the operators of the latency. Its error is the target's own, by what is known of its real figures; a
    simulation gives the same time again, so `enough` is not asked.
    """
    with load(artifact, target, threads) as guest:
        guest.run(inputs[0])
    memory = guest.peak_memory(target.name, "simulated")
    with cache.locked("arm", f"simulation-{cache.key(Path(artifact).read_bytes(), repr(target), str(threads))[:32]}"):
        timed = simulator.simulate(artifact, target, threads)
    latency = Measurement(
        target.name,
        "latency",
        timed.seconds,
        "simulated",
        target.latency_error,
        detail=simulator.summary(timed),
        operators=attributed(timed.operators, [layer for layer, _ in layers]),
    )
    throughput = Measurement(
        target.name, "throughput", 1 / timed.seconds, "simulated", target.latency_error, detail="1 / latency"
    )
    return (latency, throughput, memory)


def layer_latency(layer: LayerFacts, precision: Precision, target: Target, threads: int) -> float:
    """Predicted seconds of one layer on the cluster that runs the model, by layers that were simulated."""
    return float(arm_rates.seconds([(layer, precision)], target, threads)[0])


def layer_latencies(
    layers: Sequence[tuple[LayerFacts, Precision]], target: Target, threads: int
) -> NDArray[np.float64]:
    """Predicted seconds of each of many layers."""
    return arm_rates.seconds(layers, target, threads)


def call_latency(target: Target, threads: int) -> float:
    """Predicted seconds of an inference beside its layers."""
    return arm_rates.call(target, threads)


def calibration_error(target: Target, threads: int) -> tuple[CalibrationError, ...]:
    """How far off the predictions are for layers that they were not fitted to, of the kinds that were asked for."""
    return arm_rates.errors(target, threads)
