"""The hand-off folder: written as a whole or not at all, packed as an archive, and read back without trusting it.

`manifest.json` lists the SHA-256 and the size of every other file. It finds damage and stray files; it is no signature.
The one file that it does not list is a signature's envelope, which covers the manifest itself: see `edgebuild.signing`.
"""

import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors

from edgebuild import archive, manifest
from edgebuild.errors import SpecError, UsageError
from edgebuild.manifest import Contents, File, Manifest

MANIFEST = "manifest.json"
PROVENANCE = "provenance.intoto.json"
UNLISTED = (MANIFEST, PROVENANCE)
MANIFEST_LIMIT = 1 << 20  # bytes; some 8,000 files
PROVENANCE_LIMIT = 4 << 20  # bytes; names and hashes of as many, in base64
LIMITS = {MANIFEST: MANIFEST_LIMIT, PROVENANCE: PROVENANCE_LIMIT}
BUNDLE_LIMIT = 4 << 30  # bytes; a bundle is read into memory

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*")
_ELSEWHERE = "choose another folder"

Arrays = tuple[NDArray, ...]


@dataclass(frozen=True)
class Bundle:
    """What a bundle holds: `files` by name. The manifest's bytes and a signature's envelope are `unlisted`."""

    manifest: Manifest
    files: dict[str, bytes]
    unlisted: dict[str, bytes]


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


def write(folder: Path, files: Mapping[str, bytes], contents: Contents) -> None:
    """Write a bundle of `files`, by name relative to the folder, and its manifest; the same give the same bytes.

    A folder that is there already is replaced where it is empty or a bundle of ours. The files that its manifest lists
    are ours and go; where the user put others beside them, or where it is anything else, it is left as it is.
    Raises UsageError in these cases, and where the folder cannot be written; nothing half-written stays.
    """
    if (name := _forbidden(files)) is not None:
        raise UsageError(f"a bundle cannot hold a file named {name!r}", "use letters, digits, '.', '-' and '_'")
    listing = manifest.encode(contents, files)
    if len(listing) > MANIFEST_LIMIT:
        raise UsageError(f"a bundle cannot hold as many as {len(files):,} files")
    with _usage_errors(folder):
        folder = folder.resolve()
        old = _replaceable(folder)
        made = [path for path in (folder.parent, *folder.parent.parents) if not path.exists()]
        new = _sibling(folder.parent)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
            for name, data in {**files, MANIFEST: listing}.items():
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


def write_archive(folder: Path, path: Path, force: bool = False) -> None:
    """Pack the bundle in a folder, once it is checked, into a zip archive; the same bundle gives the same bytes.

    Raises UsageError where the file is there and not `force`, where it would lie in the bundle, or where it cannot be
    written; else as `load` does. Nothing half-written stays.
    """
    with _usage_errors(path):
        if path.exists() and not (force and path.is_file()):
            raise UsageError(f"{path} exists already", "choose another name, or --force for a file")
        if path.resolve().is_relative_to(folder.resolve()):
            raise UsageError(f"{path} lies in the bundle that it is made of", "choose another name")
        loaded = load(folder)
        data = archive.pack({**loaded.files, **loaded.unlisted})
        new = _sibling(path.resolve().parent)
        try:
            _write(new, data)
            new.rename(path)
        finally:
            new.unlink(missing_ok=True)


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
        ours = {*_manifest(str(folder), _bounded(_Folder(folder), MANIFEST)).files, *UNLISTED}
    except SpecError:
        raise UsageError(f"{folder} is not empty and no bundle of edgebuild's", _ELSEWHERE) from None
    strays = sorted(_Folder(folder).strays(ours))
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


class _Members(Protocol):
    """What a bundle is read from: a folder or an archive."""

    where: str

    def strays(self, listed: set[str]) -> Iterator[str]: ...

    def holds(self, name: str) -> bool: ...

    def read(self, name: str, limit: int) -> bytes: ...


def read(path: Path) -> dict[str, bytes]:
    """The files of a bundle by name, the manifest aside; raises as `load` does."""
    return load(path).files


def load(path: Path) -> Bundle:
    """A bundle, a folder or an archive of one, after everything in it was checked against its manifest.

    Raises UsageError where there is none; SpecError for a missing, unlisted or changed file, a link or a device, a
    name that leads out of the folder, a bundle that is too large, a damaged archive, a manifest that is not ours.
    """
    with _opened(path) as members:
        return _checked(members)


def unlisted(path: Path) -> dict[str, bytes]:
    """The files that the manifest cannot list, unverified: itself, and the envelope where there is one.

    Raises UsageError where there is no bundle; SpecError where one is too large or no plain file, or the manifest is
    missing.
    """
    with _opened(path) as members:
        return _unlisted(members)


@contextmanager
def _opened(path: Path) -> Iterator[_Members]:
    try:
        if path.is_dir():
            yield _Folder(path)
            return
        if not path.exists():
            raise UsageError(f"no bundle at {path}")
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise SpecError(f"{path}: no folder and no plain file")
            yield archive.Archive(file, str(path))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error}") from None


def _unlisted(members: _Members) -> dict[str, bytes]:
    found = {MANIFEST: _bounded(members, MANIFEST)}
    return {**found, PROVENANCE: _bounded(members, PROVENANCE)} if members.holds(PROVENANCE) else found


def _bounded(members: _Members, name: str) -> bytes:
    data, limit = members.read(name, LIMITS[name]), LIMITS[name]
    if len(data) > limit:
        raise SpecError(f"{members.where}: {name} is larger than {limit:,} bytes")
    return data


def _checked(members: _Members) -> Bundle:
    beside = _unlisted(members)
    found = _manifest(members.where, beside[MANIFEST])
    if sum(file.size for file in found.files.values()) > BUNDLE_LIMIT:
        raise SpecError(f"{members.where}: {MANIFEST} lists more than {BUNDLE_LIMIT:,} bytes")
    for stray in members.strays({*found.files, *UNLISTED}):
        raise SpecError(f"{members.where}: {repr(stray[:200])[1:-1]} is not listed in {MANIFEST}, or is no plain file")
    return Bundle(found, {name: _verified(members, name, file) for name, file in found.files.items()}, beside)


def _manifest(where: str, listing: bytes) -> Manifest:
    try:
        found = manifest.decode(listing)
    except SpecError as error:
        raise SpecError(f"{where}: {MANIFEST} {error.what}", error.remedy) from None
    if (name := _forbidden(found.files)) is not None:
        raise SpecError(f"{where}: {MANIFEST} lists {name[:200]!r}, which a bundle cannot hold")
    return found


def _forbidden(names: Iterable[str]) -> str | None:
    """A name that a bundle cannot hold, if there is one: no name of a file below it, or taken on some file system."""
    taken = {*UNLISTED}
    for name in names:
        if not _NAME.fullmatch(name) or name.casefold() in taken:
            return name
        taken.add(name.casefold())
    folders = {str(parent) for name in taken for parent in Path(name).parents}
    return next(
        (name for name in names if name.casefold() in folders or name.split("/")[0].casefold() in UNLISTED), None
    )


def _verified(members: _Members, name: str, file: File) -> bytes:
    data = members.read(name, file.size)
    if len(data) != file.size:
        raise SpecError(
            f"{members.where}: {name} is {'longer' if len(data) > file.size else 'shorter'} than its {MANIFEST} says"
        )
    if manifest.sha256(data) != file.sha256:
        raise SpecError(f"{members.where}: {name} was changed: its SHA-256 is not that of {MANIFEST}")
    return data


class _Folder:
    def __init__(self, folder: Path):
        self.folder, self.where = folder, str(folder)

    def strays(self, listed: set[str]) -> Iterator[str]:
        """Everything in the folder that is neither a listed plain file nor a folder above one."""
        folders = _folders(listed)
        for top, below, files in os.walk(self.folder, onerror=_raise):
            here = Path(top).relative_to(self.folder)
            for name in [*below, *files]:
                path = str(here / name)
                mode = (self.folder / path).lstat().st_mode
                if not (stat.S_ISDIR(mode) and path in folders or stat.S_ISREG(mode) and path in listed):
                    yield path
            below[:] = [name for name in below if str(here / name) in folders]

    def holds(self, name: str) -> bool:
        return os.path.lexists(self.folder / name)

    def read(self, name: str, limit: int) -> bytes:
        """At most `limit` + 1 bytes of a plain file: never a link's target, never a pipe."""
        try:
            handle = os.open(self.folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(handle, "rb") as file:
                if not stat.S_ISREG(os.fstat(handle).st_mode):
                    raise SpecError(f"{self.where}: {name} is no plain file")
                return file.read(min(limit, os.fstat(handle).st_size) + 1)
        except OSError as error:
            raise SpecError(f"{self.where}: {name} is missing or no plain file: {error.strerror}") from None


def _raise(error: OSError) -> None:
    raise error  # os.walk would leave out what it cannot look into


# -------------------------------------------------------------------------------------------------- test vectors


def graph_name(artifact: str, index: int) -> str:
    """The name of the file that holds the TOSA graph of an artifact's delegate."""
    return f"{artifact.rpartition('.')[0]}.{index}.tosa"


def graphs(files: Mapping[str, bytes], artifact: str) -> tuple[bytes, ...]:
    """The TOSA graphs of an artifact, in the order of its delegates."""
    found: list[bytes] = []
    while (name := graph_name(artifact, len(found))) in files:
        found.append(files[name])
    return tuple(found)


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
        return safetensors.save(named)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UsageError(f"test vectors cannot be written: {error}") from None


def read_vectors(data: bytes) -> tuple[list[Arrays], list[Arrays]]:
    """The inputs and the outputs that `vectors` wrote. Raises SpecError."""
    try:
        named = safetensors.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise SpecError(f"test vectors: not readable as safetensors: {' '.join(str(error).split())[:300]}") from None
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
