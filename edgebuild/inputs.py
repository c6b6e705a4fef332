"""Which files a build read, and whether they have changed since: what makes a second build a matter of milliseconds.

The files are recorded by watching what the process opens, and the folder that the task lies in. No torch here.
"""

import hashlib
import json
import os
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from edgebuild import cache

OUTPUTS = "EDGEBUILD_OUTPUTS"  # names a folder that many builds write to: what they write is no input of theirs

_opened: set[str] = set()
_watching = False


def watch() -> None:
    """Record every file that this process opens for reading from now on."""
    global _watching
    if not _watching:
        _watching = True
        sys.addaudithook(_audit)


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        mode = arguments[1]
        if mode is None or not set(str(mode)) & set("wax+"):
            _opened.add(os.fsdecode(os.fspath(arguments[0])))


def read_files(task: str) -> list[Path]:
    """The files that were read, without Python's own and installed packages', and all that lie in the task's folder."""
    ours = [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    ours += [str(Path(__file__).parent), str(cache.root()), "/proc", "/sys", "/dev", "/usr", "/etc"]
    ours += [str(Path(tempfile.gettempdir()).resolve() / "edgebuild-")]
    ours += [f"{folder}/" for folder in (os.environ.get(OUTPUTS),) if folder]
    found = {Path(name).resolve() for name in list(_opened)}
    where = Path(task)
    folder = where if where.is_dir() else where.parent
    if where.exists() and where.suffix in ("", ".py"):
        found |= {path.resolve() for path in folder.rglob("*") if "__pycache__" not in path.parts}
    kept = (path for path in found if path.is_file() and not str(path).startswith(tuple(ours)))
    return sorted(path for path in kept if os.access(path, os.R_OK))


def record(name: str, files: Iterable[Path], rest: str, outcome: dict[str, Any]) -> None:
    """Remember what a build read, a digest of everything else that it depends on, and how it ended.

    Where a file is gone by now, nothing is: the next build looks at everything anew.
    """
    try:
        entries = {str(path): _signature(path) for path in files}
    except OSError:
        return
    cache.write("builds", name, json.dumps({"files": entries, "rest": rest, "outcome": outcome}).encode())


def unchanged(name: str, rest: str) -> dict[str, Any] | None:
    """How the recorded build ended and how many "files" it read, if none of them has changed; else None."""
    data = cache.read("builds", name)
    try:
        known = json.loads(data) if data else None
        if known is None or known["rest"] != rest:
            return None
        for path, (size, modified, digest) in known["files"].items():
            status = os.stat(path)
            if status.st_size != size or (status.st_mtime_ns != modified and _sha256(Path(path)) != digest):
                return None
        outcome: dict[str, Any] = known["outcome"] | {"files": len(known["files"])}
        return outcome
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _signature(path: Path) -> tuple[int, int, str]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
