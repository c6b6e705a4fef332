"""The hand-off folder: written as a whole or not at all, and read back without trusting it.

`manifest.json` lists the SHA-256 and the size of every other file. It finds damage and stray files; it is no signature.
The one file that it does not list is a signature's envelope, which covers the manifest itself: see `edgebuild.signing`.
"""

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from edgebuild.errors import SpecError, UsageError

MANIFEST = "manifest.json"
PROVENANCE = "provenance.intoto.json"
UNLISTED = (MANIFEST, PROVENANCE)
SCHEMA_VERSION = 1
MANIFEST_LIMIT = 1 << 20  # bytes; some 8,000 files
PROVENANCE_LIMIT = 4 << 20  # bytes; names and hashes of as many, in base64
BUNDLE_LIMIT = 4 << 30  # bytes; a bundle is read into memory

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_ELSEWHERE = "choose another folder"

Arrays = tuple[NDArray, ...]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    sha256: str
    size: Annotated[int, msgspec.Meta(ge=0)]


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`kind` tells our manifest.json from those of others."""

    kind: Literal["edgebuild-bundle"]
    schema_version: int
    files: dict[str, _Entry]


# ------------------------------------------------------------------------------------------------------- writing


def check_writable(folder: Path) -> None:
    """Raise the UsageError that `write` would raise for this folder, before the long work. Leaves nothing behind."""
    with _usage_errors(folder):
        folder = folder.resolve()
        _replaceable(folder)
        above = folder.parent
        while not above.exists():
            above = above.parent
        probe = _sibling(above)
        probe.mkdir()
        probe.rmdir()


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a bundle of `files`, by name relative to the folder, and its manifest; the same files give the same bytes.

    A folder that is there already is replaced where it is empty or a bundle of ours. The files that its manifest lists
    are ours and go; where the user put others beside them, or where it is anything else, it is left as it is.
    Raises UsageError in these cases, and where the folder cannot be written; nothing half-written stays.
    """
    for name in files:
        if not _allowed(name) or any(other.startswith(f"{name}/") for other in files):
            raise UsageError(f"a bundle cannot hold a file named {name!r}", "use letters, digits, '.', '-' and '_'")
    with _usage_errors(folder):
        folder = folder.resolve()
        old = _replaceable(folder)
        made = [path for path in (folder.parent, *folder.parent.parents) if not path.exists()]
        new = _sibling(folder.parent)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
            for name, data in {**files, MANIFEST: _manifest(files)}.items():
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                _write(new / name, data)
            _swap(new, folder, old)
        except BaseException:
            _remove(new, [*files, MANIFEST])
            for path in made:
                _rmdir(path)
            raise


def attach(folder: Path, envelope: bytes) -> None:
    """Put a signature's envelope beside the manifest, at once, in the place of one that is there. Raises UsageError."""
    with _usage_errors(folder):
        folder = folder.resolve()
        new = _sibling(folder.parent)
        try:
            _write(new, envelope)
            new.replace(folder / PROVENANCE)
        except BaseException:
            new.unlink(missing_ok=True)
            raise


def _manifest(files: Mapping[str, bytes]) -> bytes:
    entries = {name: _Entry(hashlib.sha256(files[name]).hexdigest(), len(files[name])) for name in sorted(files)}
    data = msgspec.json.format(msgspec.json.encode(_Manifest("edgebuild-bundle", SCHEMA_VERSION, entries))) + b"\n"
    if len(data) > MANIFEST_LIMIT:
        raise UsageError(f"a bundle cannot hold as many as {len(files):,} files")
    return data


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())  # a full disk must show here, and not after the old bundle is gone


def _swap(new: Path, folder: Path, old: list[str] | None) -> None:
    """Put `new` in the place of `folder`; `old` lists the files of the one that is there, None where none is."""
    if old is None:
        new.rename(folder)
        return
    aside = _sibling(folder.parent)
    folder.rename(aside)
    try:
        new.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    _remove(aside, old)
    if aside.exists():
        raise UsageError(f"{folder} is written, but files that came into the old one meanwhile were kept in {aside}")


def _replaceable(folder: Path) -> list[str] | None:
    """The files of the bundle that is there, None where nothing is in it. Raises UsageError where it must stay."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file and no folder", _ELSEWHERE)
    if Path.cwd().is_relative_to(folder):
        raise UsageError(f"{folder} is the current folder, which cannot be replaced", "name a folder below it")
    _check_access(folder)
    if not any(folder.iterdir()):
        return None  # a rename replaces an empty folder
    try:
        ours = {*_read_manifest(folder).files, *UNLISTED}
    except SpecError:
        raise UsageError(f"{folder} is not empty and no bundle of edgebuild's", _ELSEWHERE) from None
    strays = sorted(_walk(folder, ours))
    if strays:
        raise UsageError(f"{folder} holds what is not part of its bundle: {strays[0]}", f"move it away or {_ELSEWHERE}")
    for below in _folders(ours):
        _check_access(folder / below)
    return sorted(ours)


def _check_access(folder: Path) -> None:
    """An old bundle is moved aside first and removed last: find out before whether its files can be removed."""
    if folder.is_dir() and not os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise UsageError(f"{folder} is read-only", _ELSEWHERE)


def _remove(folder: Path, names: Sequence[str]) -> None:
    """Remove a folder that should hold nothing but `names`; anything else in it, and then the folder, stays."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    for below in sorted(_folders(names), key=lambda path: len(Path(path).parts), reverse=True):
        _rmdir(folder / below)


def _folders(names: Iterable[str]) -> set[str]:
    """The folders that hold the files, "." among them."""
    return {str(parent) for name in names for parent in Path(name).parents}


def _rmdir(path: Path) -> None:
    try:
        path.rmdir()
    except OSError:
        return  # not there, or something else is in it by now


def _sibling(folder: Path) -> Path:
    # not tempfile: its folders are for the user alone, and a bundle is there to be handed on
    return folder / f".edgebuild-{secrets.token_hex(6)}"


@contextmanager
def _usage_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot write the bundle at {folder}: {why}", _ELSEWHERE) from None


# ------------------------------------------------------------------------------------------------------- reading


def read(folder: Path) -> dict[str, bytes]:
    """The files of a bundle by name, the manifest aside, after everything in the folder was checked against it.

    Raises UsageError where there is no such folder; SpecError for a missing, unlisted or changed file, a link or a
    device, a name that leads out of the folder, a bundle that is too large, a manifest that is not ours.
    """
    try:
        unlisted(folder)
        manifest = _read_manifest(folder)
        if sum(entry.size for entry in manifest.files.values()) > BUNDLE_LIMIT:
            raise SpecError(f"{folder}: {MANIFEST} lists more than {BUNDLE_LIMIT:,} bytes")
        for stray in _walk(folder, {*manifest.files, *UNLISTED}):
            raise SpecError(f"{folder}: {stray} is not listed in {MANIFEST}, or is no plain file")
        return {name: _verified(folder, name, entry) for name, entry in manifest.files.items()}
    except OSError as error:
        raise SpecError(f"{folder}: cannot be read: {error}") from None


def unlisted(folder: Path) -> dict[str, bytes]:
    """The files that the manifest cannot list, unverified: itself, and the envelope where there is one.

    Raises UsageError where there is no such folder; SpecError where one is too large or no plain file, or the manifest
    is missing.
    """
    if not folder.is_dir():
        raise UsageError(f"no bundle at {folder}")
    found = {MANIFEST: _bounded(folder, MANIFEST, MANIFEST_LIMIT)}
    if os.path.lexists(folder / PROVENANCE):
        found[PROVENANCE] = _bounded(folder, PROVENANCE, PROVENANCE_LIMIT)
    return found


def _bounded(folder: Path, name: str, limit: int) -> bytes:
    data = _read(folder, name, limit)
    if len(data) > limit:
        raise SpecError(f"{folder}: {name} is larger than {limit:,} bytes")
    return data


def _read_manifest(folder: Path) -> _Manifest:
    data = _bounded(folder, MANIFEST, MANIFEST_LIMIT)
    try:
        manifest = msgspec.json.decode(data, type=_Manifest)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise SpecError(f"{folder}: {MANIFEST} is not edgebuild's: {error}") from None
    if manifest.schema_version != SCHEMA_VERSION:
        raise SpecError(
            f"{folder}: {MANIFEST} has schema_version {manifest.schema_version}, this edgebuild reads {SCHEMA_VERSION}"
        )
    for name in manifest.files:
        if not _allowed(name):
            raise SpecError(f"{folder}: {MANIFEST} lists {name[:200]!r}, which a bundle cannot hold")
    return manifest


def _allowed(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name.split("/")[0] not in UNLISTED


def _walk(folder: Path, listed: set[str]) -> Iterator[str]:
    """Everything in the folder that is neither a listed plain file nor a folder above one."""
    folders = _folders(listed)
    for top, below, files in os.walk(folder, onerror=_raise):
        here = Path(top).relative_to(folder)
        for name in [*below, *files]:
            path = str(here / name)
            mode = (folder / path).lstat().st_mode
            if not (stat.S_ISDIR(mode) and path in folders or stat.S_ISREG(mode) and path in listed):
                yield path
        below[:] = [name for name in below if str(here / name) in folders]


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out what it cannot look into


def _verified(folder: Path, name: str, entry: _Entry) -> bytes:
    data = _read(folder, name, entry.size)
    if len(data) != entry.size:
        raise SpecError(
            f"{folder}: {name} is {'longer' if len(data) > entry.size else 'shorter'} than its {MANIFEST} says"
        )
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise SpecError(f"{folder}: {name} was changed: its SHA-256 is not that of {MANIFEST}")
    return data


def _read(folder: Path, name: str, limit: int) -> bytes:
    """At most `limit` + 1 bytes of a plain file: never a link's target, never a pipe."""
    try:
        handle = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise SpecError(f"{folder}: {name} is no plain file")
            return file.read(min(limit, os.fstat(handle).st_size) + 1)
    except OSError as error:
        raise SpecError(f"{folder}: {name} is missing or no plain file: {error.strerror}") from None


# -------------------------------------------------------------------------------------------------- test vectors


def vectors(inputs: Sequence[Arrays], outputs: Sequence[Arrays]) -> bytes:
    """Sample inputs and the artifact's outputs as safetensors, named `input_{sample}_{i}`, `output_{sample}_{i}`.

    Raises UsageError where the counts differ, a sample has no tensor, or safetensors has no such dtype.
    """
    if len(inputs) != len(outputs) or not all(inputs) or not all(outputs):
        raise UsageError(f"test vectors need outputs for each input: {len(inputs)} inputs, {len(outputs)} outputs")
    named = {
        f"{kind}_{sample}_{i}": np.array(array, order="C", dtype=array.dtype.newbyteorder("="))
        for kind, samples in (("input", inputs), ("output", outputs))
        for sample, arrays in enumerate(samples)
        for i, array in enumerate(arrays)
    }
    try:
        return save(named)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"test vectors cannot be written: {error}") from None


def read_vectors(data: bytes) -> tuple[list[Arrays], list[Arrays]]:
    """The inputs and the outputs that `vectors` wrote. Raises SpecError."""
    try:
        named = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SpecError(f"test vectors: not readable as safetensors: {error}") from None
    found: dict[str, list[list[NDArray]]] = {"input": [], "output": []}
    for kind, samples in found.items():
        while f"{kind}_{len(samples)}_0" in named:
            arrays: list[NDArray] = []
            while (name := f"{kind}_{len(samples)}_{len(arrays)}") in named:
                arrays.append(named.pop(name))
            samples.append(arrays)
    if named or len(found["input"]) != len(found["output"]):
        raise SpecError(
            f"test vectors: {next(iter(named), 'an input or an output')} has no counterpart or is out of sequence"
        )
    return [tuple(sample) for sample in found["input"]], [tuple(sample) for sample in found["output"]]
