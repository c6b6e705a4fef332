"""Time on a simulated Arm machine: the runner under qemu, with our plugin following every instruction.

`native/simulator` holds the plugin: the decoder, the model of a core, and that of the memory. `native/simulation.cpp`
is the runner's half. This module writes the machine down for the plugin, starts both, and reads what came out.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import msgspec

from edgebuild import cache
from edgebuild.devices import machine, toolchain
from edgebuild.errors import DeviceError
from edgebuild.spec import Calibration, Core, OperatorTime, SharedCache, Simulation, Target
from edgebuild.units import Bytes

LINE = 64  # bytes; native/simulator/memory.h
TIMEOUT = 900.0  # seconds


def simulate(artifact: Path, target: Target, threads: int, sampled: bool = True) -> Simulation:
    """Time one inference of a `.pte` on `threads` cores of the target's first cluster.

    With `sampled`, the middle of long loops is left out and put in by what was seen around it. A result is kept in the
    cache: the same artifact on the same machine takes the same time. Raises MissingEnvironment, and DeviceError where
    the process fails.
    """
    mode = "--sample" if sampled else "--simulate"
    key = cache.key(Path(artifact).read_bytes(), *machine_key(target, threads), mode)
    name = f"simulation-{key[:32]}.json"
    if (known := cache.read_as("arm", name, Simulation)) is not None:
        return known
    (found,) = simulate_methods(artifact, target, threads, mode).values()
    cache.write("arm", name, msgspec.json.encode(found))
    return found


def machine_key(target: Target, threads: int) -> tuple[str, ...]:
    """What a simulated time depends on beside the artifact: the machine, and the code that simulates it."""
    cluster = target.cluster[0]
    return (
        *(target.name, description(target, threads), cluster.qemu_cpu, machine.folder(cluster).name),
        *(repr(cluster.clock), repr(target.calibration)),
        *(toolchain.plugin().parent.name, toolchain.runner().parent.name, toolchain.sdk().name),
        toolchain.version_of(toolchain.qemu()),
    )


def simulate_methods(artifact: Path, target: Target, threads: int, mode: str) -> dict[str, Simulation]:
    """Time one inference of each method of a `.pte`; `mode` is an option of `native/runner.cpp`."""
    cluster = target.cluster[0]
    what = f"{Path(artifact).name} simulated on {target.name}"
    with tempfile.TemporaryDirectory(prefix="edgebuild-") as folder:
        # Short names, always the same: what the process is given on its stack must not move its addresses.
        scratch = Path(folder)
        (scratch / "model").symlink_to(Path(artifact).absolute())
        (scratch / "runner").symlink_to(toolchain.runner())
        (scratch / "machine").symlink_to(machine.folder(cluster))
        (scratch / "description").write_text(description(target, threads))
        plugin = f"{toolchain.plugin()},machine={scratch / 'description'},out={scratch / 'result'}"
        command = [
            *(str(toolchain.qemu()), "-cpu", cluster.qemu_cpu, "-plugin", plugin),
            *("-L", str(toolchain.library_prefix(toolchain.compiler()))),
            *("./runner", mode, "model", str(threads)),
        ]
        try:
            done = subprocess.run(
                command, cwd=scratch, env={"EDGEBUILD_MACHINE": "machine"}, capture_output=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired:
            raise DeviceError(f"{what}: not done within {TIMEOUT:g} s") from None
        if done.returncode or not (scratch / "result").is_file():
            lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
            ours = [line for line in lines if line.startswith("edgebuild simulator: ")]  # qemu adds lines of its own
            raise DeviceError(f"{what}: the simulator ended with exit code {done.returncode}: {[*lines, *ours][-1]}")
        results = [json.loads(line) for line in (scratch / "result").read_text().splitlines()]
    names = _operator_names(done.stdout.decode(errors="replace"))
    clock = cluster.clock.under(threads, cluster.count)
    found = {}
    for (method, operators), result in zip(names.items(), results, strict=True):
        if len(operators) != len(result["operators"]):
            raise DeviceError(
                f"{what}: {len(result['operators'])} operators were timed, and {len(operators)} have a name"
            )
        rows = (_operator(*row, clock, target.calibration) for row in zip(operators, result["operators"], strict=True))
        calibrated = target.calibration.source if target.calibration else ""
        found[method] = Simulation(target.name, threads, mode != "--simulate", tuple(rows), calibrated)
    return found


def _operator_names(printed: str) -> dict[str, list[str]]:
    """The operators of each method, as the runner names them."""
    names: dict[str, list[str]] = {}
    for line in printed.splitlines():
        if line.startswith("method "):
            names[line.removeprefix("method ")] = operators = []
        else:
            operators.append(line)
    return names


def summary(simulation: Simulation) -> str:
    """In words: what the time went to, how much was executed, how much of it stands for the rest."""
    operators = simulation.operators
    total = simulation.seconds
    shares = {bound: sum(operator.bounds[bound] for operator in operators) / total for bound in operators[0].bounds}
    where = ", ".join(f"{bound} {part:.0%}" for bound, part in shares.items() if part >= 0.005)
    instructions = sum(sum(operator.instructions.values()) for operator in operators)
    moved = Bytes(sum(operator.memory_bytes for operator in operators))
    pieces, executed = (sum(getattr(operator, name) for operator in operators) for name in ("pieces", "executed"))
    return (
        f"{instructions / 1e6:,.1f} million instructions, {moved} between caches and memory; the time went to {where}; "
        f"{executed:,} of {pieces:,} pieces of loops were executed and stand for the rest"
        + (f"; calibrated: {simulation.calibrated}" if simulation.calibrated else "")
    )


def description(target: Target, threads: int) -> str:
    """The machine as `native/simulator/description.c` reads it; times in cycles of the cluster's clock."""
    assert target.memory is not None and target.threads is not None
    cluster, memory = target.cluster[0], target.memory
    core, clock = cluster.model, cluster.clock.under(threads, cluster.count)
    pipeline = core.pipeline
    lines = [
        f"pipeline {pipeline.order} {pipeline.width} {pipeline.reorder_buffer} {pipeline.store_buffer} "
        f"{pipeline.mispredict}",
        f"misses {core.misses.line_fill_buffers} {core.misses.prefetch}",
        f"l1 {int(cluster.l1d.size)} {cluster.l1d.ways} {int(cluster.l1d.replacement == 'random')} 0 0 0 0",
        _level("l2", cluster.l2),
        *([_level("l3", target.l3)] if target.l3 is not None else []),
        f"memory {memory.latency * clock:.17g} {LINE * clock / memory.one_core:.17g} "
        f"{LINE * clock / memory.all_cores:.17g}",
        f"cores {threads} {target.threads.fork_join * clock:.17g}",
        *_classes(core),
    ]
    return "\n".join(lines) + "\n"


def _level(name: str, cache: SharedCache) -> str:
    return (
        f"{name} {int(cache.size)} {cache.ways} {int(cache.replacement == 'random')} {int(cache.shared)} "
        f"{cache.latency} {cache.interval} {cache.interval_all or cache.interval}"
    )


def _classes(core: Core) -> list[str]:
    bit = {port: 1 << position for position, port in enumerate(core.ports)}
    lines = []
    for group in core.execution:
        for name, execution in group.classes.items():
            slots = [f"{sum(bit[port] for port in ports)}:{cycles}" for ports, cycles in core.slots(name)]
            lines.append(
                " ".join(["class", name, f"{execution.latency} {execution.accumulate} {execution.micro_ops}", *slots])
            )
    return lines


def _operator(name: str, found: dict[str, Any], clock: float, calibration: Calibration | None) -> OperatorTime:
    scale = calibration.scale if calibration else lambda bound: 1.0
    bounds = {bound: scale(bound) * cycles / clock for bound, cycles in found["bounds"].items()}
    return OperatorTime(
        name=name,
        seconds=sum(bounds.values()),
        bounds=bounds,
        instructions={kind: round(count) for kind, count in found["instructions"].items()},
        macs=round(found["macs"]),
        l1_misses=round(found["l1_misses"]),
        l2_misses=round(found["l2_misses"]),
        l3_misses=round(found["l3_misses"]),
        memory_bytes=round(found["memory_bytes"]),
        pieces=round(found["pieces"]),
        executed=round(found["executed"]),
    )
