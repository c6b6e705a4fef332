"""Keeps the cache within its bound: the least recently used goes first, and never what a running build may be using."""

import os
import shutil
import stat
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from edgebuild import cache
from edgebuild.errors import SpecError, UsageError
from edgebuild.units import Bytes

VARIABLE = "EDGEBUILD_CACHE_SIZE"
MOST = Bytes(10 * 2**30)
SLACK = 2.0  # seconds by which clocks and the time stamps of a file system may be off

# What each kind of entry is. The last ones take minutes, some a network too, and go last.
KINDS = {
    "analysis": "what is known of models: layers, sensitivities, candidates",
    "built": "artifacts of plans",
    "trained": "weights of trained models",
    "training": "trainings under way",
    "teacher": "outputs of original models",
    "linked": "what programs link of the runtime",
    "builds": "what builds depended on",
    "arm": "the Arm toolchain, and simulated times",
    "host": "what layers cost on this machine",
    "native": "the runner for this machine",
    "runtime": "what goes to devices",
}
DEAR = ("arm", "host", "native", "runtime")


@dataclass(frozen=True)
class Entry:
    """An entry's files or folders, their size in bytes, when they were last used (seconds since the epoch)."""

    kind: str
    name: str
    paths: tuple[Path, ...]
    size: int
    used: float

    @property
    def half_made(self) -> bool:
        return self.name.startswith(cache.MAKING)


def bound() -> Bytes:
    """How large the cache may grow: $EDGEBUILD_CACHE_SIZE, such as "5 GiB"; 10 GiB without. Raises UsageError."""
    written = os.environ.get(VARIABLE)
    try:
        return Bytes.parse(written) if written else MOST
    except SpecError as error:
        raise UsageError(f"{VARIABLE}: {error}") from None


def entries() -> list[Entry]:
    """All that the cache holds, what is half-made included."""
    found: dict[tuple[str, str], list[Path]] = {}
    for kind in _listed(cache.root()):
        if kind.is_dir() and kind.name != cache.LOCKS:
            for path in _listed(kind):
                name = path.name.removesuffix("-wal").removesuffix("-shm")  # a database's companions
                found.setdefault((kind.name, name), []).append(path)
    return [_entry(kind, name, paths) for (kind, name), paths in sorted(found.items())]


def idle(found: Iterable[Entry]) -> list[Entry]:
    """The entries that no running process has used, least recently used first, the dear ones last."""
    since = _oldest() - SLACK
    left = [entry for entry in found if entry.used < since]
    return sorted(left, key=lambda entry: (entry.kind in DEAR, entry.used))


def trim() -> tuple[int, int]:
    """Remove what was left half-made, and entries until the rest is within the bound: how many, and their bytes."""
    most = bound()
    with cache.locked("upkeep", "trim"):
        found = entries()
        excess = sum(entry.size for entry in found) - most
        gone = []
        for entry in idle(found):
            if (entry.half_made or excess > 0) and _remove(entry):
                excess -= entry.size
                gone += [] if entry.half_made else [entry]
    return len(gone), sum(entry.size for entry in gone)


def clear(kind: str = "") -> tuple[list[Entry], list[Entry]]:
    """Remove all entries, or those of a kind, that no running process uses: which went, and which stayed."""
    found = [entry for entry in entries() if kind in ("", entry.kind)]
    gone = [entry for entry in idle(found) if _remove(entry)]
    return gone, [entry for entry in found if entry not in gone]


def _oldest() -> float:
    """When the process that has been using the cache for longest began; the marks of those that ended go."""
    own = cache.running(cache.root())
    found = [float("inf")]
    for path in _listed(cache.root() / cache.LOCKS):
        if path.name.startswith(cache.RUNNING):
            with suppress(OSError):
                began = path.stat().st_mtime
                if (own is not None and path.name == Path(own.lock_file).name) or not _ended(path):
                    found.append(began)
    return min(found)


def _ended(mark: Path) -> bool:
    lock = FileLock(mark, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    mark.unlink(missing_ok=True)
    lock.release()
    return True


def _entry(kind: str, name: str, paths: list[Path]) -> Entry:
    size, used = 0, 0.0
    for path in paths:
        with suppress(OSError):  # it has just gone
            status = path.lstat()
            used = max(used, status.st_mtime)
            size += _size(path) if stat.S_ISDIR(status.st_mode) else status.st_size
    return Entry(kind, name, tuple(paths), size, used)


def _size(folder: Path) -> int:
    total = 0
    for top, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                total += os.lstat(os.path.join(top, name)).st_size
    return total


def _remove(entry: Entry) -> bool:
    """Whether it is gone; a cache may be read-only."""
    for path in entry.paths:
        with suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                gone = path if entry.half_made else path.with_name(f"{cache.MAKING}{path.name}")
                os.replace(path, gone)  # whole or not at all, for others
                shutil.rmtree(gone, ignore_errors=True)
            else:
                path.unlink()
    return not any(os.path.lexists(path) for path in entry.paths)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
