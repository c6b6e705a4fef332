"""Arm's Vela compiler, in a process of its own: NPU commands from a TOSA graph, and its estimate of what they cost.

Vela (package ethos-u-vela, https://gitlab.arm.com/artificial-intelligence/ethos-u/ethos-u-vela) compiles for Ethos-U55,
-U65 and -U85. Its cycles come from a model of the NPU and its memories, not from hardware: wherever they are shown it
is said that they are Vela's.
"""

import csv
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from configparser import ConfigParser
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from edgebuild.errors import BackendError, MissingEnvironment, SpecError
from edgebuild.spec import Npu

CONFIG = "Arm/vela.ini"  # that Vela ships
TIMEOUT = 600.0  # seconds
_ARENA = "--arena-cache-size="
INSTALL = "pip install 'edgebuild[ethos-u]'"
# Columns of Vela's table of operators: cycles that the NPU computes, and that each memory takes.
_CYCLES = {"NPU": "issue", "SRAM AC": "cache", "DRAM AC": "memory", "OnFlash AC": "memory", "OffFlash AC": "memory"}


@dataclass(frozen=True)
class OperatorCycles:
    """An operator as Vela schedules it. `sram` in bytes; `waits_for` is what takes most of its cycles."""

    name: str
    cycles: int
    sram: int
    macs: int
    waits_for: str


@dataclass(frozen=True)
class Estimate:
    """What Vela says of a graph: cycles of the NPU at `clock` Hz, bytes of SRAM, by operator too.

    `commands` and `weights` are what it made, so that a program can be told to hold the same.
    """

    cycles: int
    clock: float
    sram: int
    operators: tuple[OperatorCycles, ...]
    commands: bytes
    weights: bytes

    @property
    def seconds(self) -> float:
        return self.cycles / self.clock


def check() -> None:
    """Raise MissingEnvironment where Vela or the TOSA reference model is not installed."""
    for name in ("ethosu", "tosa_reference_model"):
        if find_spec(name) is None:
            raise MissingEnvironment(f"an Ethos-U target needs {name}, which is not installed", INSTALL)


@dataclass(frozen=True)
class System:
    """What Vela assumes around an NPU: its clock in Hz, and bytes of constants that it gets in a cycle."""

    clock: float
    constants_per_cycle: float


@cache
def system(npu: Npu) -> System:
    """What Vela's configuration file says of the NPU's surroundings.

    Raises MissingEnvironment without Vela, SpecError for names that the file does not have.
    """
    check()
    from ethosu import config_files

    folder = Path(next(iter(config_files.__path__)))
    known = ConfigParser()
    known.read(folder / CONFIG)
    system = _section(known, "System_Config", npu.system_config)
    mode = _section(known, "Memory_Mode", npu.memory_mode)
    memory = system[f"{mode['const_mem_area'].lower()}_port"].lower()  # as the parser keeps keys
    width = 8 if "u55" in npu.accelerator else 16  # bytes of an AXI port; Vela's architecture_features.py
    per_cycle = width * float(system[f"{memory}_clock_scale"]) * float(system.get(f"{memory}_ports_used", 1))
    return System(float(system["core_clock"]), per_cycle)


def _section(known: ConfigParser, kind: str, name: str) -> dict[str, str]:
    section = f"{kind}.{name}"
    if section not in known:
        names = ", ".join(s.partition(".")[2] for s in known.sections() if s.startswith(kind))
        raise SpecError(f"Vela knows no {kind.lower()} {name!r}", f"known: {names}")
    found = dict(known[section])
    inherited = found.pop("inherit", "")
    return {**_section(known, kind, inherited.partition(".")[2]), **found} if inherited else found


def name() -> str:
    """ "Vela 5.1.0"."""
    return f"Vela {version('ethos-u-vela')}"


def run(arguments: Sequence[str]) -> None:
    """Run Vela's command line. Raises BackendError where it fails, crashes or takes too long."""
    command = [sys.executable, "-P", "-m", "ethosu.vela", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, errors="replace")
    except subprocess.TimeoutExpired:
        raise BackendError(f"Vela did not end within {TIMEOUT:g} s") from None
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        said = next((line for line in reversed(lines) if "rror" in line), lines[-1] if lines else "")
        how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise BackendError(f"Vela {how}: {said[:300]}")


def held_to(arena: int) -> str:
    """The flag that holds Vela to so many bytes of SRAM: it gives up speed for them, and takes more where it must."""
    return f"{_ARENA}{arena}"


def arena_of(flags: str) -> int | None:
    """The bytes that `held_to` wrote among flags of Vela; None where they hold it to nothing."""
    found = re.search(rf"{_ARENA}(\d{{1,10}})\b", flags, re.ASCII)
    return int(found[1]) if found else None


def estimate(graph: bytes, npu: Npu, arena: int | None = None) -> Estimate:
    """Compile a TOSA graph (a flatbuffer) for an NPU, held to `arena` bytes. Raises BackendError as `run` does."""
    return _estimate(graph, npu, arena)


@cache  # tells a default from the same value that is given: it is not to see the difference
def _estimate(graph: bytes, npu: Npu, arena: int | None) -> Estimate:
    with tempfile.TemporaryDirectory(prefix="edgebuild-") as folder:
        path = Path(folder) / "graph.tosa"
        path.write_bytes(graph)
        run(
            [
                str(path),
                f"--accelerator-config={npu.accelerator}",
                f"--config={CONFIG}",
                f"--system-config={npu.system_config}",
                f"--memory-mode={npu.memory_mode}",
                *([held_to(arena)] if arena is not None else []),
                "--output-format=raw",
                "--verbose-performance",
                f"--output-dir={folder}",
            ]
        )
        (summary,) = _rows(Path(folder) / f"graph_summary_{npu.system_config}.csv")
        operators = tuple(map(_operator, _rows(Path(folder) / "graph_per-layer.csv")))
        with np.load(Path(folder) / "graph_vela.npz", allow_pickle=False) as made:
            commands, weights = made["cmd_data"].tobytes(), made["weight_data"].tobytes()
    return Estimate(
        cycles=round(float(summary["cycles_total"])),
        clock=float(summary["core_clock"]),
        sram=round(1024 * float(summary["sram_memory_used"])),  # Vela writes KiB
        operators=operators,
        commands=commands,
        weights=weights,
    )


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _operator(row: dict[str, str]) -> OperatorCycles:
    most = max(_CYCLES, key=lambda column: float(row[column]))
    return OperatorCycles(
        name=row["NNG Operator"],
        cycles=round(float(row["Op Cycles"])),
        sram=round(float(row["Staging Usage"])),
        macs=round(float(row["MAC Count"])),
        waits_for=_CYCLES[most],
    )
