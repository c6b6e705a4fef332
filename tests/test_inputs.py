"""What a build read, and whether it is still so."""

import os

import pytest

from edgebuild import inputs

pytestmark = pytest.mark.usefixtures("empty_cache")


def test_a_build_is_known_until_something_changes(tmp_path):
    files = [tmp_path / "a", tmp_path / os.fsdecode(b"\xff")]
    for path in files:
        path.write_bytes(b"1")
    inputs.record("build", files, "rest", {"code": 0})
    assert inputs.unchanged("build", "rest")["code"] == 0
    assert inputs.unchanged("build", "other") is None and inputs.unchanged("another", "rest") is None
    os.utime(files[0], (1, 1))
    assert inputs.unchanged("build", "rest")["code"] == 0, "the same bytes at another time"
    files[1].write_bytes(b"2")
    assert inputs.unchanged("build", "rest") is None
    files[1].unlink()
    assert inputs.unchanged("build", "rest") is None


def test_a_file_that_is_gone_when_the_build_ends(tmp_path):
    inputs.record("build", [tmp_path / "temporary"], "rest", {"code": 0})
    assert inputs.unchanged("build", "rest") is None


def test_the_files_of_a_task(tmp_path):
    (tmp_path / "task.py").write_text("")
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "task.pyc").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "x").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to("gone")
    found = {path for path in inputs.read_files(str(tmp_path)) if path.is_relative_to(tmp_path)}
    assert found == {tmp_path / "task.py", tmp_path / "data" / "x"}
