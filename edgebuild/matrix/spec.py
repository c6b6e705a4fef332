"""What a matrix file says, and the cells that it comes to. Every path in it is relative to the file."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

from edgebuild import catalog
from edgebuild.errors import SpecError, UsageError
from edgebuild.spec import Profile
from edgebuild.units import Seconds

T = TypeVar("T")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class TaskRow:
    """A task with what `edgebuild build` takes beside it. `name` is its folder below the output, by default its own."""

    path: str
    name: str = ""
    weights: str = ""
    calibration: str = ""
    student: bool = False


@dataclass(frozen=True)
class Exclusion:
    """A cell that is left out; the task by name or as written, and so the profile."""

    task: str
    profile: str


@dataclass(frozen=True)
class MatrixFile:
    """The TOML as it is written. `tasks` are rows with nothing but a path. `time_limit` ends a cell that hangs."""

    name: str
    profiles: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    task: tuple[TaskRow, ...] = ()
    exclude: tuple[Exclusion, ...] = ()
    output: str = ""
    time_limit: Seconds | None = None


@dataclass(frozen=True)
class Cell:
    """One build. `arguments` are those of `edgebuild build` but for the output; `limit` is in seconds."""

    task: str
    profile: str
    arguments: tuple[str, ...]
    limit: float

    def __str__(self) -> str:
        return f"{self.task} for {self.profile}"


@dataclass(frozen=True)
class Matrix:
    """Cells in the order of the file, a task's beside each other; `output` is an absolute path."""

    name: str
    output: Path
    cells: tuple[Cell, ...]

    def in_turn(self) -> list[Cell]:
        """The first cell of every task, then the second ones: what a task's cells share is made early, and once."""
        seen: Counter[str] = Counter()
        turns = []
        for cell in self.cells:
            turns.append((seen[cell.task], cell))
            seen[cell.task] += 1
        return [cell for _, cell in sorted(turns, key=lambda turn: turn[0])]


def load(path: Path, output: Path | None = None) -> Matrix:
    """Read a matrix file, and check whatever can be checked without running a task.

    Raises UsageError where there is no such file, SpecError where it cannot be used: an unknown key, a task, a profile
    or a file that is not there, two cells with one folder, an exclusion of nothing, no cell at all.
    """
    if not path.is_file():
        raise UsageError(f"no matrix file at {path}", "docs/matrix.md shows one")
    file = catalog.load_as(path, MatrixFile)
    beside = path.resolve().parent
    try:
        _check_name(file.name, "matrix")
        rows = (*map(TaskRow, file.tasks), *file.task)
        tasks = _named([_task(row, beside) for row in rows], "task")
        profiles = _named([_profile(written, beside) for written in file.profiles], "profile")
        excluded = {
            (task, profile)
            for row in file.exclude
            for task in _meant(row.task, list(tasks), [written.path for written in rows], "task")
            for profile in _meant(row.profile, list(profiles), file.profiles, "profile")
        }
        cells = tuple(
            _cell(tasks[task], profiles[profile], file.time_limit)
            for task, profile in product(tasks, profiles)
            if (task, profile) not in excluded
        )
        if not cells:
            raise SpecError("no cell is left", "name tasks and profiles, and exclude fewer")
    except (SpecError, UsageError) as error:
        raise SpecError(f"{path}: {error.what}", error.remedy) from None
    folder = (output or beside / (file.output or f"build/{file.name}")).resolve()
    return Matrix(file.name, folder, cells)


def _task(row: TaskRow, beside: Path) -> tuple[str, TaskRow]:
    """The name, and the row with absolute paths. What `torchvision:` names is no path."""

    def found(what: str, written: str) -> str:
        path = beside / written
        if not path.exists():
            raise SpecError(f"no {what} at {path}", "paths are relative to the matrix file")
        return str(path.resolve())

    builtin = row.path.startswith("torchvision:")
    where = row.path if builtin else found("task", row.path)
    stem = row.path.partition(":")[2] if builtin else Path(where).stem
    name = row.name or (stem if stem != "task" else Path(where).parent.name)
    weights = found("weights", row.weights) if row.weights else ""
    calibration = found("calibration inputs", row.calibration) if row.calibration else ""
    return name, TaskRow(where, name, weights, calibration, row.student)


def _profile(written: str, beside: Path) -> tuple[str, tuple[str, Profile]]:
    """The name, what `--profile` takes for it, and the profile."""
    where = str((beside / written).resolve()) if written.endswith(".toml") or "/" in written else written
    profile = catalog.load_profile(where)
    return profile.name, (where, profile)


def _named(pairs: Sequence[tuple[str, T]], what: str) -> dict[str, T]:
    names = [name for name, _ in pairs]
    for name in names:
        _check_name(name, what)
        if names.count(name) > 1:
            remedy = "give one of them a name, in a [[task]] table" if what == "task" else "rename one"
            raise SpecError(f"two {what}s are named {name!r}, and each has a folder of its name", remedy)
    return dict(pairs)


def _check_name(name: str, what: str) -> None:
    if not _NAME.fullmatch(name):
        raise SpecError(f"the {what}'s name {name!r} is to be a folder's", "use letters, digits, '.', '-' and '_'")


def _meant(text: str, names: Sequence[str], written: Sequence[str], what: str) -> list[str]:
    """The names that an exclusion means: a name itself, or what is written in the file for it."""
    found = [name for name, path in zip(names, written, strict=True) if text in (name, path)]
    if not found:
        raise SpecError(f"exclude: no {what} {text!r}", catalog.did_you_mean(text, names))
    return found


def _cell(task: TaskRow, profile: tuple[str, Profile], limit: Seconds | None) -> Cell:
    where, read = profile
    options = {"--profile": where, "--weights": task.weights, "--calibration": task.calibration}
    arguments = [part for option, value in options.items() if value for part in (option, value)]
    # The profile's time bounds the search; lowering and measuring the last artifact may go beyond it.
    most = 2 * float(read.time) + 600 if limit is None else float(limit)
    return Cell(task.name, read.name, (task.path, *arguments, *(["--student"] if task.student else [])), most)
