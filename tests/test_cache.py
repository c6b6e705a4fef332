"""The store: what was written is read, damage counts as nothing, builds share it, and it may be full or read-only."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from edgebuild import cache
from edgebuild.errors import UsageError


@dataclass(frozen=True)
class Fit:
    name: str
    values: tuple[float, ...]


def test_a_value_comes_back_as_its_type(empty_cache: Path) -> None:
    fit = Fit("gemm", (1.5, 2.0))
    assert cache.read_as("fits", "a.json", Fit) is None
    cache.write("fits", "a.json", msgspec.json.encode(fit))
    assert cache.read_as("fits", "a.json", Fit) == fit
    cache.write("fits", "b.json", msgspec.json.encode({"a": 1.0}))
    assert cache.read_as("fits", "b.json", dict[str, float]) == {"a": 1.0}
    assert cache.read_as("fits", "b.json", Fit) is None, "a value of another type"


@pytest.mark.parametrize("damaged", [b"", b'{"name": "gemm", "val', b"\xff\xfe", b"[]", b'{"name": 1, "values": []}'])
def test_a_damaged_file_counts_as_none(empty_cache: Path, damaged: bytes) -> None:
    cache.write("fits", "a.json", damaged)
    assert cache.read("fits", "a.json") == damaged
    assert cache.read_as("fits", "a.json", Fit) is None


def _left(folder: Path) -> list[str]:
    """The files below a folder, locks aside."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.parent.name != cache.LOCKS)


# --------------------------------------------------------------------------------------------------------- sharing


def test_a_folder_is_made_once_by_two_who_want_it_at_once(empty_cache: Path) -> None:
    made: list[Path] = []
    both_here = threading.Barrier(2, timeout=30)

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "part").write_text("whole")

    def want(_: int) -> Path:
        both_here.wait()
        return cache.folder("tools", "it", make)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(want, range(2))) == [empty_cache / "tools" / "it"] * 2
    assert len(made) == 1 and _left(empty_cache) == ["tools/it/part"]


def test_what_fails_half_way_is_not_there(empty_cache: Path) -> None:
    def make(folder: Path) -> None:
        (folder / "part").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.folder("tools", "it", make)
    assert _left(empty_cache) == [] and list((empty_cache / "tools").iterdir()) == []


HOLD = """
import sys, time
from edgebuild import cache
with cache.locked("tools", "it"):
    print("held", flush=True)
    time.sleep(float(sys.argv[1]))
cache.write("tools", "done", b"by the first")
"""
WANT = """
from edgebuild import cache
with cache.locked("tools", "it"):
    print("mine", flush=True)
"""


def _start(program: str, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_who_waits_says_for_whom_and_a_dead_holder_holds_nothing(empty_cache: Path) -> None:
    holder = _start(HOLD, "600")
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    waiting = _start(WANT)
    assert waiting.stderr is not None
    said = waiting.stderr.readline()
    assert f"waiting for process {holder.pid} on " in said and "-c 600), which makes the same tools" in said
    assert waiting.poll() is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert waiting.communicate(timeout=60)[0] == "mine\n" and waiting.returncode == 0


# ------------------------------------------------------------------------------------------- full, or not writable


def _mount(where: Path, *options: str) -> None:
    where.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", where], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache on a disk of 256 KiB."""
    disk = tmp_path / "disk"
    _mount(disk, "size=256k")
    monkeypatch.setenv("EDGEBUILD_CACHE", str(disk / "cache"))
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_on_a_full_disk_the_work_goes_on_and_nothing_half_written_stays(small_disk: Path, capsys) -> None:
    cache.write("built", "old", b"old" * 1000)
    assert cache.unkept() == ""
    large = bytes(512 << 10)
    path = cache.write("built", "large", large)
    assert not path.is_relative_to(small_disk) and cache.read("built", "large") == large
    assert cache.read("built", "old") == b"old" * 1000
    assert "No space left on device" in cache.unkept()
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert _left(small_disk) == ["cache/built/old"]

    cache.write("built", "large", b"now it fits")
    assert cache.read("built", "large") == b"now it fits" and _left(small_disk) == [
        "cache/built/large",
        "cache/built/old",
    ]


def test_a_folder_that_does_not_fit_is_made_aside_with_its_neighbours(small_disk: Path) -> None:
    cache.folder("tools", "library", lambda folder: (folder / "it").write_text("here") and None)
    made = cache.folder("tools", "large", lambda folder: (folder / "it").write_bytes(bytes(512 << 10)) and None)
    assert not made.is_relative_to(small_disk) and (made / "it").stat().st_size == 512 << 10
    assert (made / ".." / "library" / "it").read_text() == "here"
    assert cache.folder("tools", "large", lambda folder: pytest.fail("made twice")) == made
    assert _left(small_disk) == ["cache/tools/library/it"]


def test_a_read_only_cache_is_read_and_what_is_new_is_kept_aside(small_disk: Path, capsys) -> None:
    old = small_disk / "cache" / "built" / "old"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with cache.locked("built", "new"):
        assert cache.read("built", "old") == b"old"
        cache.write("built", "new", b"new")
    assert cache.read("built", "new") == b"new"
    cache.remove("built", "new")
    assert cache.read("built", "new") is None
    assert "Read-only file system" in cache.unkept()
    assert "kept for this process alone" in capsys.readouterr().err


def test_a_cache_that_is_no_folder_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("the user's")
    monkeypatch.setenv("EDGEBUILD_CACHE", str(tmp_path / "file" / "cache"))
    cache.write("built", "new", b"new")
    assert cache.read("built", "new") == b"new" and "Not a directory" in cache.unkept()


def test_where_nothing_can_be_written_it_says_so(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(UsageError, match="neither the cache at .* nor a temporary folder .*No space left.*TMPDIR"):
        cache.write("built", "large", bytes(512 << 10))
