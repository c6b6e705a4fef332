"""Runs one cell: `edgebuild build` in a process of its own, so that a crash, a hang or a full memory is that cell's."""

import asyncio
import os
import platform
import signal
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import edgebuild
from edgebuild import inputs
from edgebuild.errors import BudgetBroken, Infeasible
from edgebuild.matrix import child
from edgebuild.matrix.spec import Cell
from edgebuild.units import Seconds

VERDICTS = {0, BudgetBroken.exit_code, Infeasible.exit_code}  # how a build that came to one ends
GRACE = 10.0  # seconds for a build that was interrupted to remove what it has begun


@dataclass(frozen=True)
class Ran:
    """How the process of a cell ended.

    `code` is its exit code, negative for a signal. `report` is the JSON of a build that came to a verdict, "" of one
    that did not, which `error` is about. `reused`: nothing was to be done. `started` is in seconds of the node's clock.
    """

    code: int
    report: str
    error: str
    reused: bool
    node: str
    started: float
    seconds: float


def folder(output: Path, cell: Cell) -> Path:
    """The cell's bundle."""
    return output / cell.task / cell.profile


def beside(output: Path, cell: Cell, suffix: str) -> Path:
    """A file of the cell beside its bundle: the ".log" or the ".json" of its last build."""
    return output / cell.task / f"{cell.profile}{suffix}"


async def run(cell: Cell, output: Path, threads: int, store: str) -> Ran:
    """Build a cell with so many threads and the cache at `store`; where this is cancelled, so is the build."""
    log, kept = beside(output, cell, ".log"), beside(output, cell, ".json")
    log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="edgebuild-matrix-") as scratch:
        fresh = Path(scratch) / "report.json"
        arguments = ["build", *cell.arguments, "--output", str(folder(output, cell)), "--json", str(fresh)]
        started, began = time.time(), time.monotonic()
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", child.__file__, str(os.getpid()), str(log), *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            env=_environment(output, threads, store),
            start_new_session=True,  # a signal reaches the processes that it has started, too
        )
        late = False
        try:
            await asyncio.wait_for(process.wait(), cell.limit)
        except TimeoutError:
            late = True
        finally:
            await _end(process)
        code = process.returncode
        assert code is not None
        judged = fresh.is_file() and code in VERDICTS and not late  # else it was ended before it had done all
        report = fresh.read_text(encoding="utf-8") if judged else ""
    # A build that did something has other times in its report.
    reused = bool(report) and kept.is_file() and kept.read_text(encoding="utf-8") == report
    if report and not reused:
        publish(kept, report)
    error = "" if report else _epitaph(code, late, cell.limit, log)
    return Ran(code, report, error, reused, platform.node(), started, round(time.monotonic() - began, 3))


def failed(error: str) -> Ran:
    """A cell whose process was not even started, or was lost with its node."""
    return Ran(code=1, report="", error=error, reused=False, node="", started=0.0, seconds=0.0)


def publish(path: Path, text: str) -> None:
    """Write a file such that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _environment(output: Path, threads: int, store: str) -> dict[str, str]:
    """That of this process, with the number of threads for torch, and this very edgebuild."""
    given = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "EDGEBUILD_CACHE": store}
    given[inputs.OUTPUTS] = str(output)
    root = str(Path(edgebuild.__file__).parents[1])
    if root != sysconfig.get_paths()["purelib"]:  # a checkout
        given["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return {**os.environ, **given}


async def _end(process: asyncio.subprocess.Process) -> None:
    """End a build and all that it has started: with a moment to clear up, then by force."""
    for number, patience in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        if process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), patience)


def _epitaph(code: int, late: bool, limit: float, log: Path) -> str:
    if late:
        return f"took longer than its limit of {Seconds(limit)}"
    if code < 0:
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    said = errors[-1] if errors else f"ended with exit code {code}: {lines[-1] if lines else 'without a word'}"
    return "".join(letter if letter.isprintable() else " " for letter in said)
