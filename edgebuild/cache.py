"""A content-addressed store in `$EDGEBUILD_CACHE`, else the user's cache folder: toolchains, stage results, rates.

An entry is a file or a folder, `root()/KIND/NAME`, and may go at any time: everything in it can be made again. Builds
that run at once share it. Where it cannot be written (read-only, a full disk) or locked, the work goes on: what is made
is kept aside for as long as the process lasts, a warning is printed once, and `unkept` says why.
"""

import atexit
import functools
import hashlib
import os
import platform
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

import msgspec
from filelock import FileLock, Timeout

from edgebuild.errors import UsageError

MAKING = ".making-"  # how the names of what is not complete yet begin
LOCKS = "locks"
RUNNING = "running-"  # how the names of the locks begin that processes hold for as long as they last
_ELSEWHERE = "free some space, or set EDGEBUILD_CACHE and TMPDIR"
POLL = 0.1  # seconds between two looks at a lock that another process holds
PATIENCE = 1.0  # seconds of waiting that are not worth a word

T = TypeVar("T")

_unkept: dict[Path, str] = {}
_aside: dict[Path, Path] = {}


def root() -> Path:
    """The cache folder. It may be deleted at any time; everything in it can be made again."""
    chosen = os.environ.get("EDGEBUILD_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(home) / "edgebuild"


def key(*parts: str | bytes) -> str:
    """SHA-256 over the parts, each with its length, as hex."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------- entries


def find(kind: str, name: str) -> Path | None:
    """Where an entry lies, or None. Looking for it counts as using it."""
    running(root())
    for path in _places(kind, name):
        if os.path.exists(path):  # no error where the folder may not be looked into
            with suppress(OSError):
                os.utime(path)
            return path
    return None


def read(kind: str, name: str) -> bytes | None:
    """The bytes stored under a name, or None."""
    path = find(kind, name)
    try:
        return path.read_bytes() if path else None
    except OSError:
        return None


def read_as(kind: str, name: str, of: type[T]) -> T | None:
    """The value of type `of` stored under a name as JSON, or None. A damaged file counts as none: it is made anew."""
    data = read(kind, name)
    try:
        return None if data is None else msgspec.json.decode(data, type=of)
    except msgspec.MsgspecError:
        return None


def write(kind: str, name: str, data: bytes) -> Path:
    """Store bytes under a name, and say where; a reader never sees half of them.

    Raises UsageError where neither the cache nor a temporary folder can be written.
    """
    running(root())
    try:
        path = _write(root() / kind / name, data)
        if root() in _aside:
            (_aside[root()] / kind / name).unlink(missing_ok=True)
        return path
    except OSError as error:
        not_kept(error)
    try:
        return _write(aside(kind) / name, data)
    except OSError as error:
        raise _nowhere(error) from None


def remove(kind: str, name: str) -> None:
    """Forget an entry that is a file."""
    for path in _places(kind, name):
        with suppress(OSError):
            path.unlink(missing_ok=True)


def folder(kind: str, name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, filled by `make` on first use. Others see it whole or not at all.

    Folders of a kind are neighbours, by whose relative paths they may refer to each other. Raises UsageError where
    neither the cache nor a temporary folder can be written.
    """
    if (known := find(kind, name)) is not None:
        return known
    with locked(kind, name):
        if (known := find(kind, name)) is not None:
            return known
        try:
            return _fill(root() / kind, name, make)
        except OSError as error:
            not_kept(error)
        try:
            return _fill(aside(kind), name, make)
        except OSError as error:
            raise _nowhere(error) from None


def _fill(kind: Path, name: str, make: Callable[[Path], None]) -> Path:
    kind.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kind, prefix=MAKING) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        make(made)
        try:
            made.rename(kind / name)
        except OSError:
            if not (kind / name).is_dir():  # else somebody was faster, where there are no locks
                raise
    return kind / name


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=MAKING)
    try:
        with open(handle, "wb") as file:
            file.write(data)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
    return path


# --------------------------------------------------------------------------------- a cache that cannot be written


def unkept() -> str:
    """Why not all that this process made is kept; "" where it is."""
    return _unkept.get(root(), "")


def not_kept(error: Exception) -> None:
    """Say, once, that the cache cannot be written."""
    if root() not in _unkept:
        reason = getattr(error, "strerror", None) or str(error)
        _unkept[root()] = f"the cache at {root()} cannot be written: {reason}"
        print(f"warning: {_unkept[root()]}; what is made now is kept for this process alone", file=sys.stderr)


def _nowhere(error: OSError) -> UsageError:
    return UsageError(f"neither the cache at {root()} nor a temporary folder can be written: {error}", _ELSEWHERE)


def _places(kind: str, name: str) -> Iterator[Path]:
    """Where an entry may lie, the latest first."""
    if root() in _aside:
        yield _aside[root()] / kind / name
    yield root() / kind / name


def aside(kind: str) -> Path:
    """A temporary folder in the place of a kind's, with links to what the cache has: entries refer to neighbours."""
    if root() not in _aside:
        made = tempfile.mkdtemp(prefix="edgebuild-")
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        _aside[root()] = Path(made)
    folder = _aside[root()] / kind
    if not folder.exists():
        folder.mkdir()
        with suppress(OSError):
            for path in (root() / kind).absolute().iterdir():
                (folder / path.name).symlink_to(path)
    return folder


# --------------------------------------------------------------------------------------------------------- locks


@contextmanager
def locked(kind: str, name: str) -> Iterator[None]:
    """Make an entry alone: others who would make it wait, and say for whom. A process that died holds nothing.

    Take no second entry's lock inside but one that is made on the way. Where the cache's file system has no locks, the
    work is done without.
    """
    running(root())
    lock = _lock(root(), f"{kind}-{name}")
    try:
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            print(f"waiting for {_holder(lock)}, which makes the same {kind}", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        not_kept(error)
    try:
        yield
    finally:
        lock.release()


@functools.cache
def running(where: Path) -> FileLock | None:
    """What tells others that this process uses a cache, since when: held as long as it lasts. None where it cannot."""
    mark = _lock(where, f"{RUNNING}{platform.node()}-{os.getpid()}")
    try:
        mark.acquire(timeout=0)
        return mark
    except OSError:
        return None


def _lock(where: Path, name: str) -> FileLock:
    folder = where / LOCKS
    with suppress(OSError):  # then acquiring it fails as well
        folder.mkdir(parents=True, exist_ok=True)
    # no soft locks: nobody would free those of the dead
    return FileLock(
        folder / f"{name}.lock", thread_local=False, poll_interval=POLL, fallback_to_soft=False, on_acquired=_sign
    )


def _sign(lock: int) -> None:
    program, *arguments = sys.argv or [""]
    name = Path(program).name if Path(program).name != "__main__.py" else "edgebuild"
    with suppress(OSError):  # a full disk
        os.ftruncate(lock, 0)
        text = f"process {os.getpid()} on {platform.node()} ({shlex.join([name, *arguments])})"
        os.pwrite(lock, text.encode("utf-8", "surrogateescape"), 0)


def _holder(lock: FileLock) -> str:
    with suppress(OSError):
        return Path(lock.lock_file).read_text(errors="replace")[:300] or "another process"
    return "another process"
