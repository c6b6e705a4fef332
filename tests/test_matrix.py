"""The matrix: its file, real builds in processes that are killed, and a Ray cluster of two nodes."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import psutil
import pytest

from edgebuild import matrix
from edgebuild.errors import SpecError, UsageError

ROOT = Path(__file__).parent.parent
TASK = """
import torch
from torch import nn
from edgebuild.task import Task

def task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    x = torch.randn(4, 1, 8, 8)
    return Task(model=model, example_inputs=(x[:1],), calibration=[x])
"""
PROFILE = """
name = "{name}"
title = "t"
target = "host"
artifact = "pte"
techniques = ["quantize"]
[budgets]
size = "{size}"
"""
FILE = """
name = "m"
tasks = ["one.py", "two"]
profiles = ["roomy.toml", "tiny.toml"]
"""


def write(folder: Path, text: str = FILE) -> Path:
    """A matrix of two tasks and two profiles, the second of which no plan meets."""
    (folder / "two").mkdir()
    for path in ("one.py", "two/task.py"):
        (folder / path).write_text(TASK)
    for name, size in (("roomy", "1 MiB"), ("tiny", "1 KiB")):
        (folder / f"{name}.toml").write_text(PROFILE.format(name=name, size=size))
    (folder / "m.toml").write_text(text)
    return folder / "m.toml"


# ----------------------------------------------------------------------------------------------------------- file


def test_cells_come_in_the_order_of_the_file_and_run_the_first_of_every_task_first(tmp_path):
    spec = matrix.load(write(tmp_path, FILE + 'exclude = [{task = "one", profile = "tiny.toml"}]\ntime_limit = "9 s"'))
    assert [str(cell) for cell in spec.cells] == ["one for roomy", "two for roomy", "two for tiny"]
    assert [str(cell) for cell in spec.in_turn()] == ["one for roomy", "two for roomy", "two for tiny"]
    assert spec.output == tmp_path / "build" / "m"
    assert spec.cells[1].arguments == (str(tmp_path / "two"), "--profile", str(tmp_path / "roomy.toml"))
    assert {cell.limit for cell in spec.cells} == {9.0}
    full = matrix.load(Path(os.path.relpath(tmp_path / "m.toml")), tmp_path / "elsewhere")
    assert full.output == tmp_path / "elsewhere"


def test_a_task_takes_what_build_takes(tmp_path):
    (tmp_path / "w.safetensors").touch()
    row = '[[task]]\nname = "net"\npath = "torchvision:resnet18"\nweights = "w.safetensors"\nstudent = true\n'
    spec = matrix.load(write(tmp_path, FILE.replace('"one.py", ', "").replace('"roomy.toml", ', "") + row))
    (cell,) = [cell for cell in spec.cells if cell.task == "net"]
    options = ("--profile", str(tmp_path / "tiny.toml"), "--weights", str(tmp_path / "w.safetensors"), "--student")
    assert cell.arguments == ("torchvision:resnet18", *options)
    assert cell.limit == 2 * 1800 + 600


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("profiles", "profilez", "unknown key 'profilez' (perhaps you meant 'profiles')"),
        ('"one.py"', '"none.py"', "no task at"),
        ('"tiny.toml"', '"mobile-cup"', "perhaps you meant 'mobile-cpu'"),
        ('"two"', '"two", "two/task.py"', "two tasks are named 'two'"),
        ('"m"', '"../m"', "'../m' is to be a folder's"),
        (
            "tasks",
            'exclude = [{task = "on", profile = "tiny"}]\ntasks',
            "exclude: no task 'on' (perhaps you meant 'one')",
        ),
        ("tasks", "time_limit = 9\ntasks", "has no unit"),
        ('["one.py", "two"]', "[]", "no cell is left"),
    ],
)
def test_a_wrong_file_is_one_clear_error(tmp_path, old, new, message):
    with pytest.raises(SpecError) as error:
        matrix.load(write(tmp_path, FILE.replace(old, new, 1)))
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path / "m.toml"))


def test_no_file(tmp_path):
    with pytest.raises(UsageError, match="no matrix file at"):
        matrix.load(tmp_path / "m.toml")


# ----------------------------------------------------------------------------------------------------------- runs


@dataclass
class Run:
    """A matrix under way."""

    process: subprocess.Popen[str]

    def until(self, words: str) -> None:
        """Read the progress up to a line with these words."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if words in line:
                return
        pytest.fail(f"no {words!r} was said")

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=250)
        return self.process.returncode, out, err


def start(file: Path, *arguments: str) -> Run:
    command = [sys.executable, "-m", "edgebuild", "matrix", str(file), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    pipe = subprocess.PIPE
    return Run(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))


@contextmanager
def held(output: Path, name: str) -> Iterator[None]:
    """Keep a cell from going on, at the lock of its log."""
    (log := output / f"{name}.log").parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def builds(output: Path) -> list[int]:
    """The processes of the cells."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(str(output) in word for word in (process.info["cmdline"] or [])[3:])
    ]


def eventually(holds: Callable[[], bool]) -> bool:
    for _ in range(300):
        if holds():
            return True
        time.sleep(0.1)
    return False


def spoilt(output: Path, name: str) -> None:
    """A cell that fails at once: its bundle's folder holds something else."""
    (output / name).mkdir(parents=True)
    (output / name / "notes.txt").write_text("mine")


def rows(output: Path) -> dict[str, dict]:
    return {
        f"{row['task']}/{row['profile']}": row for row in json.loads((output / "overview.json").read_text())["cells"]
    }


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("href", "src")]


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """The output of a matrix that was killed after its first cell, and went on."""
    folder = tmp_path_factory.mktemp("matrix")
    output = folder / "build" / "m"
    file = write(folder, FILE.replace(', "two"', ""))
    with held(output, "one/tiny"):
        run = start(file, "--jobs", "1")
        run.until("one for roomy: met")
        run.until("one for tiny: started")
        assert eventually(lambda: len(builds(output)) == 1)
        before = (output / "one" / "roomy" / "manifest.json").stat()
        run.process.kill()
        run.process.communicate()
        assert eventually(lambda: not builds(output)), "the build goes on without the matrix"
        assert rows(output)["one/tiny"]["outcome"] == "waiting"
    code, out, err = start(file, "--jobs", "2", "--junit", "-").end()
    assert code == 3, err
    assert "one for roomy: met" in err and "up to date" in err
    after = (output / "one" / "roomy" / "manifest.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert out == (output / "overview.xml").read_text()
    return output


def test_what_was_built_is_not_built_again_and_what_was_not_is(built):
    found = rows(built)
    assert [row["outcome"] for row in found.values()] == ["met", "infeasible"]
    assert [row["reused"] for row in found.values()] == [True, False]
    assert found["one/roomy"]["size"] == (built / "one" / "roomy" / "one.pte").stat().st_size
    assert found["one/roomy"]["latency"]["host"]["method"] == "measured"
    assert found["one/tiny"]["size"] is None and "size binds" in found["one/tiny"]["summary"]


def test_the_overview_in_its_forms(built):
    suites = ET.parse(built / "overview.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["edgebuild one for roomy", "edgebuild one for tiny"]
    assert suites.get("failures") == "1" and suites[1].find("testcase/failure") is not None
    text = (built / "overview.md").read_text()
    assert "| one | roomy | [met](one/roomy/report." in text
    links = Links()
    links.feed((built / "overview.html").read_text())
    assert len(links.found) >= 4 and all((built / link).is_file() for link in links.found)


def test_an_interrupted_matrix_says_what_is_done_and_a_failed_cell_stops_no_other(built):
    file = built.parent.parent / "more.toml"
    file.write_text(FILE.replace('"m"', '"more"'))
    output = built.parent / "more"
    for name in ("one/roomy", "one/tiny", "two/tiny"):
        spoilt(output, name)
    with held(output, "two/roomy"):
        run = start(file, "--jobs", "2")
        run.until("two for tiny: failed")
        run.process.send_signal(signal.SIGINT)
        code, out, err = run.end()
    assert code == 130, err
    assert err.splitlines()[-1].startswith("error: interrupted: 3 of 4 cells are done")
    assert "Traceback" not in err and not builds(output)
    row = rows(output)["one/tiny"]
    assert row["outcome"] == "failed" and row["exit_code"] == 2 and "no bundle of edgebuild's" in row["error"]
    assert (output / "one" / "tiny" / "notes.txt").read_text() == "mine"
    suites = ET.parse(output / "overview.xml").getroot()
    assert (suites.get("errors"), suites.get("skipped")) == ("3", "1")


def test_a_build_that_hangs_is_a_failed_cell(built):
    file = built.parent.parent / "hangs.toml"
    file.write_text(FILE.replace('"m"', '"hangs"').replace('"roomy.toml", ', "") + 'time_limit = "1 s"')
    output = built.parent / "hangs"
    spoilt(output, "two/tiny")
    with held(output, "one/tiny"):
        code, _, err = start(file).end()
    assert code == 1, err
    assert rows(output)["one/tiny"]["error"] == "took longer than its limit of 1 s"
    assert not builds(output)


# ------------------------------------------------------------------------------------------------------------ Ray


def test_no_cluster_at_the_address(built):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'edgebuild[ray]'")
    code, _, err = start(built.parent.parent / "m.toml", "--ray", "127.0.0.1:1").end()
    assert code == 2 and "error: no Ray cluster at '127.0.0.1:1'" in err.splitlines()[-1], err


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes with a core each; the second can be removed."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'edgebuild[ray]'")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster()
    try:
        try:
            cluster.add_node(**node, include_dashboard=False)
            other = cluster.add_node(**node)
        except Exception as error:  # Ray gives a node 30 s to start, and raises a plain Exception
            pytest.skip(f"Ray does not start here: {error}")
        yield cluster, other
    finally:
        cluster.shutdown()


def test_on_two_nodes_of_which_one_is_lost(built, two_nodes):
    cluster, other = two_nodes
    spoilt(built, "two/tiny")
    spoilt(built, "two/roomy")
    (file := built.parent.parent / "ray.toml").write_text(FILE)
    with held(built, "two/tiny"), held(built, "two/roomy"):
        run = start(file, "--ray", cluster.address)
        run.until("cells on the 2 nodes")
        assert eventually(lambda: len(builds(built)) == 2), "one on each node"
        cluster.remove_node(other)
        run.until("once more")
    code, _, err = run.end()
    assert code == 1, err
    found = rows(built)
    assert {name: (row["outcome"], row["reused"]) for name, row in found.items()} == {
        "one/roomy": ("met", True),
        "one/tiny": ("infeasible", True),
        "two/roomy": ("failed", False),
        "two/tiny": ("failed", False),
    }
    assert sorted(row["attempts"] for row in found.values()) == [1, 1, 1, 2]
