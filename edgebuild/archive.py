"""Zip archives: one made from files, the same bytes each time; one read without trusting it, and never unpacked.

The format is PKWARE's APPNOTE 6.3. What is read may be deflated, as a re-zipped folder is. Refused are: more than one
disk, zip64 and comments, which a bundle has no need of; encryption; links; names that are there twice.
"""

import io
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO

from edgebuild.errors import SpecError

MAX_FILES = 10_000
MAX_DIRECTORY = 4 << 20  # bytes of the central directory, which is read as a whole
MAX_RATIO = 100  # of what the files hold to what they take; weights and text stay below 20
FREE = 16 << 20  # bytes that the files may hold all the same

_END = struct.Struct("<4s4H2LH")  # end of central directory record, APPNOTE 4.3.16
_LOCATOR = b"PK\x06\x07"  # of zip64's record, in the 20 bytes before the end
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first day of the format
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    OverflowError,
)


def pack(files: Mapping[str, bytes]) -> bytes:
    """A zip of the files, sorted by name. Stored and not deflated: zlib's output differs between its versions."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", allowZip64=False) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system = 3  # Unix, also where it is not
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(entry, files[name])
    return data.getvalue()


class Archive:
    """An open archive. Every method raises SpecError where the archive is damaged or not one of a bundle."""

    def __init__(self, file: IO[bytes], where: str):
        self.where = where
        size = _check_end(file, where)
        with self._damage():
            self._zip = zipfile.ZipFile(file)
            self._entries = self._checked(size)

    def strays(self, listed: set[str]) -> Iterator[str]:
        """Names of what is there and neither listed nor a folder above what is."""
        folders = {f"{name[:end]}/" for name in listed for end in range(len(name)) if name[end] == "/"}
        yield from (name for name in self._entries if name not in listed and name not in folders)

    def holds(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str, limit: int) -> bytes:
        """At most `limit` + 1 bytes of a file."""
        if name not in self._entries:
            raise SpecError(f"{self.where}: {name} is missing")
        entry = self._entries[name]
        with self._damage(), self._zip.open(entry) as file:
            return file.read(min(limit, entry.file_size) + 1)

    def _checked(self, size: int) -> dict[str, zipfile.ZipInfo]:
        entries: dict[str, zipfile.ZipInfo] = {}
        for entry in self._zip.infolist():
            name = entry.orig_filename
            shown = f"{self.where}: {name[:100]!r}"
            if name in entries:
                raise SpecError(f"{shown} is there twice")
            if entry.flag_bits & 0x2041:  # APPNOTE 4.4.4: encrypted, strongly, or with a masked header
                raise SpecError(f"{shown} is encrypted")
            if entry.compress_type not in _METHODS:
                raise SpecError(f"{shown} is neither stored nor deflated")
            kind = stat.S_IFMT(entry.external_attr >> 16) if entry.create_system == 3 else 0
            if kind not in (0, stat.S_IFDIR if name.endswith("/") else stat.S_IFREG):
                raise SpecError(f"{shown} is no plain file")
            entries[name] = entry
        if sum(entry.compress_size for entry in entries.values()) > size:
            raise SpecError(f"{self.where}: its files overlap")
        if sum(entry.file_size for entry in entries.values()) > FREE + MAX_RATIO * size:
            raise SpecError(f"{self.where}: unpacks to more than {MAX_RATIO} times its size")
        return entries

    @contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except _DAMAGED as error:
            raise SpecError(f"{self.where}: a damaged archive: {' '.join(str(error).split())[:200]}") from None


def _check_end(file: IO[bytes], where: str) -> int:
    """Bound what `zipfile` reads when it opens an archive, all of the central directory; returns the file's size."""
    size = file.seek(0, os.SEEK_END)
    tail = min(size, _END.size + 20)
    file.seek(size - tail)
    end = file.read(tail)
    if size < _END.size or end[-_END.size :][:4] != b"PK\x05\x06":
        raise SpecError(f"{where}: no zip archive, or one with something behind it")
    _, _, _, here, count, directory, offset, comment = _END.unpack(end[-_END.size :])
    if comment or here != count or end[: -_END.size].startswith(_LOCATOR):
        raise SpecError(f"{where}: an archive with a comment, of several parts or in zip64")
    if count > MAX_FILES or directory > MAX_DIRECTORY:
        raise SpecError(f"{where}: an archive of {count:,} files, with a directory of {directory:,} bytes")
    if offset + directory + _END.size != size:
        raise SpecError(f"{where}: an archive with something before or inside it")
    return size
