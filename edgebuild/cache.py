"""A content-addressed store in `$EDGEBUILD_CACHE`, else the user's cache folder: toolchains, artifacts, host rates."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import TypeVar

import msgspec

from edgebuild.errors import UsageError

T = TypeVar("T")


def root() -> Path:
    """The cache folder. It may be deleted at any time; everything in it can be made again."""
    chosen = os.environ.get("EDGEBUILD_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(home) / "edgebuild"


def key(*parts: str | bytes) -> str:
    """SHA-256 over the parts, each with its length, as hex."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def read(kind: str, name: str) -> bytes | None:
    """The bytes stored under a name, or None."""
    try:
        return (root() / kind / name).read_bytes()
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
    """Store bytes under a name; a reader never sees half of them."""
    path = root() / kind / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(data)
        os.replace(file.name, path)
    except OSError as error:
        raise UsageError(f"cannot write the cache at {path.parent}: {error}", "set EDGEBUILD_CACHE") from None
    return path
