"""The cache's bound: what goes, in which order, and what never does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgebuild import cache, upkeep
from edgebuild.errors import UsageError

ROOT = Path(__file__).parent.parent


@pytest.fixture
def filled(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """10 KiB in five entries, each an hour older than the one before it; a half-made one; nobody uses them."""
    entries = ("built/new", "teacher/t.sqlite", "trained/mid", "built/old", "arm/tool/lib")
    for hours, name in enumerate((*entries, f"built/{cache.MAKING}left"), 1):
        path = empty_cache / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(2 << 10))
        for aged in {path, path.parent if name.startswith("arm") else path}:
            os.utime(aged, (time.time() - 3600 * hours,) * 2)
    (empty_cache / "teacher" / "t.sqlite-wal").write_bytes(b"")
    os.utime(empty_cache / "teacher" / "t.sqlite-wal", (time.time() - 7200,) * 2)
    os.utime(empty_cache / "arm" / "tool", (time.time() - 7 * 3600,) * 2)
    return empty_cache


def names() -> list[str]:
    return [f"{entry.kind}/{entry.name}" for entry in upkeep.entries()]


@pytest.mark.parametrize(
    ("most", "left"),
    [
        ("1 MiB", ["arm/tool", "built/new", "built/old", "teacher/t.sqlite", "trained/mid"]),
        ("8 KiB", ["arm/tool", "built/new", "teacher/t.sqlite", "trained/mid"]),
        ("4 KiB", ["arm/tool", "built/new"]),
        ("3 KiB", ["arm/tool"]),
        ("0 B", []),
    ],
)
def test_the_least_recently_used_goes_first_and_toolchains_last(filled, monkeypatch, most, left):
    monkeypatch.setenv("EDGEBUILD_CACHE_SIZE", most)
    gone, size = upkeep.trim()
    assert names() == left
    assert gone == 5 - len(left) and size == gone * 2048
    assert not (filled / "teacher" / "t.sqlite-wal").exists() or "teacher/t.sqlite" in left


def test_what_was_read_is_recently_used(filled, monkeypatch):
    monkeypatch.setenv("EDGEBUILD_CACHE_SIZE", "4 KiB")
    assert cache.read("built", "old") is not None
    upkeep.trim()
    assert names() == ["arm/tool", "built/old"]


USE = """
import time
from edgebuild import cache
cache.read("built", "old")
print("used", flush=True)
time.sleep(600)
"""


def test_what_a_running_process_uses_stays_until_it_ends(filled, monkeypatch):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", USE], env=environment, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "used\n"
    monkeypatch.setenv("EDGEBUILD_CACHE_SIZE", "0 B")
    upkeep.trim()
    assert names() == ["built/old"]
    gone, left = upkeep.clear()
    assert gone == [] and [entry.name for entry in left] == ["old"]
    other.send_signal(signal.SIGKILL)
    other.wait()
    os.utime(filled / "built" / "old", (time.time() - 3600,) * 2)
    upkeep.trim()
    assert names() == []
    assert not (filled / "locks" / f"{cache.RUNNING}{other.pid}").exists()


@pytest.mark.parametrize(
    ("written", "message"), [("5", "has no unit"), ("5 GiBs", "unknown unit"), ("-1 B", "negative")]
)
def test_a_bound_that_is_no_size_says_so(monkeypatch, written, message):
    monkeypatch.setenv("EDGEBUILD_CACHE_SIZE", written)
    with pytest.raises(UsageError, match=f"EDGEBUILD_CACHE_SIZE: .*{message}"):
        upkeep.bound()


def edgebuild(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "edgebuild", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    return subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def test_info_and_clear(filled):
    info = edgebuild("cache", "info").stdout
    assert f"{filled} holds 12 KiB and may hold 10 GiB (EDGEBUILD_CACHE_SIZE)." in info
    assert "outputs of original models" in info
    asked = edgebuild("cache", "clear")
    assert asked.returncode == 2 and "add --yes" in asked.stderr and len(names()) == 6
    unknown = edgebuild("cache", "clear", "build", "--yes")
    assert unknown.returncode == 2 and "perhaps you meant 'builds'" in unknown.stderr
    some = edgebuild("cache", "clear", "trained", "--yes")
    assert some.stdout == "removed 1 entries, 2 KiB\n" and "trained/mid" not in names()
    assert edgebuild("cache", "clear", "-y").stdout == "removed 5 entries, 10 KiB\n" and names() == []
