"""Archives: the same bytes each time, and none that is not ours is believed."""

import io
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from bundles import contents

from edgebuild import archive, bundle
from edgebuild.errors import SpecError, UsageError

FILES = {"model.pte": b"\x00\x01" * 500, "report.md": b"# fits\n" * 200, "vectors/a/0.bin": b"", "plan.json": b"{}\n"}
LISTING = "manifest.json"

Entries = list[tuple[zipfile.ZipInfo, bytes]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    bundle.write(tmp_path / "out", FILES, contents(FILES))
    return tmp_path / "out"


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    bundle.write_archive(folder, tmp_path / "out.zip")
    return tmp_path / "out.zip"


def entries(path: Path) -> Entries:
    with zipfile.ZipFile(path) as opened:
        return [(entry, opened.read(entry)) for entry in opened.infolist()]


def rezipped(path: Path, made: Entries, compression: int = zipfile.ZIP_STORED, comment: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w") as opened:
        for entry, data in made:
            opened.writestr(entry, data, compression)
        opened.comment = comment


def test_what_was_packed_is_read(folder: Path, packed: Path) -> None:
    assert bundle.load(packed) == bundle.load(folder)
    with zipfile.ZipFile(packed) as opened:
        assert opened.testzip() is None and opened.namelist() == sorted([*FILES, LISTING])


def test_the_same_bundle_gives_the_same_bytes(folder: Path, packed: Path, tmp_path: Path) -> None:
    bundle.write(tmp_path / "again", dict(reversed(FILES.items())), contents(FILES))
    bundle.write_archive(tmp_path / "again", tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_folder_that_others_zipped_is_read(folder: Path, tmp_path: Path, compression: int) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w", compression) as opened:
        for path in sorted(folder.rglob("*")):  # its folders as well, as `zip -r` does
            opened.write(path, path.relative_to(folder))
    assert bundle.load(tmp_path / "other.zip") == bundle.load(folder)


def test_an_archive_is_not_written_over_anything(folder: Path, packed: Path, tmp_path: Path) -> None:
    before = packed.read_bytes()
    for path in (packed, folder / "x.zip", tmp_path / "nowhere" / "x.zip"):
        with pytest.raises(UsageError, match="exists already|lies in the bundle|cannot write"):
            bundle.write_archive(folder, path)
    bundle.write_archive(folder, packed, force=True)
    assert packed.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.zip"]


def named(name: str) -> Callable[[Path, Entries], None]:
    """An archive with one more file, of this name."""
    return lambda path, made: rezipped(path, [*made, (zipfile.ZipInfo(name), b"x")])


def twice(path: Path, made: Entries) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        rezipped(path, [*made, made[0]])


def missing(path: Path, made: Entries) -> None:
    rezipped(path, made[1:])


def changed(path: Path, made: Entries) -> None:
    rezipped(path, [(entry, b"!" + data[1:]) for entry, data in made])


def link(path: Path, made: Entries) -> None:
    made[-1][0].external_attr = (stat.S_IFLNK | 0o777) << 16
    rezipped(path, made)


def folder_as_file(path: Path, made: Entries) -> None:
    made[-1][0].external_attr = (stat.S_IFDIR | 0o755) << 16
    rezipped(path, made)


def stray_folder(path: Path, made: Entries) -> None:
    rezipped(path, [*made, (zipfile.ZipInfo("mine/"), b"")])


def lzma(path: Path, made: Entries) -> None:
    rezipped(path, made, zipfile.ZIP_LZMA)


def commented(path: Path, made: Entries) -> None:
    rezipped(path, made, comment=b"hello")


def behind(path: Path, made: Entries) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def before(path: Path, made: Entries) -> None:
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())


def cut(path: Path, made: Entries) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def empty(path: Path, made: Entries) -> None:
    path.write_bytes(b"")


def no_archive(path: Path, made: Entries) -> None:
    path.write_bytes(b"x" * 1000)


def flag(path: Path, made: Entries, bit: int = 1) -> None:
    """Mark every file as encrypted in the directory."""
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        data[at + 8] |= bit
        at = data.find(b"PK\x01\x02", at + 4)
    path.write_bytes(data)


def bomb(path: Path, made: Entries) -> None:
    rezipped(path, [*made, (zipfile.ZipInfo("zeros.bin"), bytes(archive.FREE * 2))], zipfile.ZIP_DEFLATED)


def many(path: Path, made: Entries) -> None:
    rezipped(path, [*made, *((zipfile.ZipInfo(f"f{i}"), b"") for i in range(archive.MAX_FILES))])


def claimed_count(path: Path, made: Entries) -> None:
    data = bytearray(path.read_bytes())
    data[-14:-10] = struct.pack("<2H", 0xFFFF, 0xFFFF)
    path.write_bytes(data)


def overlapping(path: Path, made: Entries) -> None:
    """Every entry of the directory points to the one largest file, as in Fifield's bomb of 2019."""
    kernel = bytes(1_000_000)
    rezipped(path, [(zipfile.ZipInfo("kernel"), kernel)])
    data = path.read_bytes()
    at = data.find(b"PK\x01\x02")
    entry, end = data[at:-22], data[-22:]
    count = 50
    directory = b"".join(entry[:46] + f"kernel{i:02}".encode()[-6:] for i in range(count))
    fixed = struct.pack("<4s4H2LH", end[:4], 0, 0, count, count, len(directory), at, 0)
    path.write_bytes(data[:at] + directory + fixed)


def smaller_than_said(path: Path, made: Entries) -> None:
    """The directory says that a file holds more than it does."""
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<L", 1 << 30)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (named("../secret"), "'?../secret'? is not listed"),
        (named("/etc/secret"), "secret'? is not listed"),
        (named("a\\..\\secret"), "is not listed"),
        (named("notes.txt"), "notes.txt is not listed"),
        (named("Model.pte"), "Model.pte is not listed"),
        (twice, "is there twice"),
        (missing, "is missing"),
        (changed, "not edgebuild's"),
        (link, "is no plain file"),
        (folder_as_file, "is no plain file"),
        (stray_folder, "mine/ is not listed"),
        (lzma, "neither stored nor deflated"),
        (commented, "comment|no zip archive"),
        (behind, "no zip archive"),
        (before, "before or inside"),
        (cut, "no zip archive"),
        (empty, "no zip archive"),
        (no_archive, "no zip archive"),
        (flag, "is encrypted"),
        (bomb, "unpacks to more than"),
        (many, "an archive of 10,005 files"),
        (claimed_count, "an archive of 65,535 files"),
        (overlapping, "overlap"),
        (smaller_than_said, "unpacks to more than"),
    ],
)
def test_an_archive_is_not_trusted(packed: Path, spoil: Callable[[Path, Entries], None], message: str) -> None:
    spoil(packed, entries(packed))
    with pytest.raises(SpecError, match=message) as error:
        bundle.load(packed)
    assert "\n" not in str(error.value) and str(packed) in str(error.value) and len(str(error.value)) < 1000


def test_an_archive_in_an_archive_is_a_file_like_any_other(packed: Path, tmp_path: Path) -> None:
    files = {**FILES, "again.zip": packed.read_bytes()}
    bundle.write(tmp_path / "outer", files, contents(FILES))
    bundle.write_archive(tmp_path / "outer", tmp_path / "outer.zip")
    assert bundle.read(tmp_path / "outer.zip")["again.zip"] == packed.read_bytes()


def test_a_file_of_zeros_is_no_bomb(tmp_path: Path) -> None:
    files = {**FILES, "zeros.bin": bytes(archive.FREE // 2)}
    bundle.write(tmp_path / "out", files, contents(FILES))
    with zipfile.ZipFile(tmp_path / "out.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        for name in [*files, LISTING]:
            opened.write(tmp_path / "out" / name, name)
    assert bundle.read(tmp_path / "out.zip") == bundle.read(tmp_path / "out")


def test_the_zip_is_plain_to_others() -> None:
    with zipfile.ZipFile(io.BytesIO(archive.pack(FILES))) as opened:
        for entry in opened.infolist():
            assert entry.date_time == (1980, 1, 1, 0, 0, 0) and entry.compress_type == zipfile.ZIP_STORED
            assert entry.external_attr >> 16 == stat.S_IFREG | 0o644
            assert opened.read(entry) == FILES[entry.filename]
