"""The measuring kit: what it holds, and its scripts against an ssh server on this machine and a stand-in for adb."""

import hashlib
import os
import platform
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from conftest import Board
from torch import nn

from edgebuild import kit
from edgebuild.backends import xnnpack
from edgebuild.devices import toolchain
from edgebuild.errors import UsageError
from edgebuild.lift import lift
from edgebuild.units import Seconds
from edgebuild.vision import import_torchvision

HERE = platform.machine()


@pytest.fixture(scope="module")
def model(tmp_path_factory, small_net, image) -> Path:
    path = tmp_path_factory.mktemp("model") / "small.pte"
    path.write_bytes(xnnpack.lower(lift(small_net, image), image).data)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model) -> Path:
    """A kit for this machine with two models."""
    path = tmp_path_factory.mktemp("kit") / "kit"
    kit.write(path, {"small": model, "again": model}, [HERE], lambda line: None)
    return path


def measured(script: Path, *arguments: str, cwd: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"}
    return subprocess.run([script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def check(written: Path, model: Path, threads: list[int]) -> dict:
    table = tomllib.loads(written.read_text())
    assert set(table) == {"device", "runtime", "measurement"}
    assert os.uname().release in table["device"] and table["runtime"] == "executorch 1.5.1"
    rows = table["measurement"]
    assert [(row["model"], row["threads"]) for row in rows] == [(m, t) for m in ("again", "small") for t in threads]
    for row in rows:
        assert set(row) == {"model", "artifact_sha256", "threads", "latency", "runs"}
        assert row["artifact_sha256"] == hashlib.sha256(model.read_bytes()).hexdigest()
        assert row["runs"] == 7 and 0 < Seconds.parse(row["latency"]) < 1
    return table


def ssh_options(board: Board) -> list[str]:
    reach = board.target.ssh
    assert reach is not None
    return ["-p", str(reach.port), "-i", reach.identity_file, *(f"-o{option}" for option in reach.options)]


def test_the_kit_runs_where_it_is_copied_to(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted([HERE, *kit.SCRIPTS, "models", "runtime"])
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["again.pte", "small.pte"]
    for script in ("measure_adb.sh", "measure_ssh.sh"):
        assert os.access(folder / script, os.X_OK)


def test_measuring_over_ssh(folder, board, model, tmp_path):
    arguments = ["--runs", "7", "--threads", "1 2 4096", board.target.ssh.host, *ssh_options(board)]
    done = measured(folder / "measure_ssh.sh", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "measured.toml", model, [1, 2])
    assert "small: 4096 threads left out, the device has" in done.stderr
    assert board.left() == []


def test_a_model_that_fails_is_named_and_the_others_are_measured(folder, board, model, tmp_path):
    broken = tmp_path / "kit"
    shutil.copytree(folder, broken)
    (broken / "models/bad.pte").write_bytes(b"nothing")
    arguments = ["--runs", "7", "--threads", "1", "--output", "out.toml", board.target.ssh.host, *ssh_options(board)]
    done = measured(broken / "measure_ssh.sh", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "bad, 1 threads: failed: edgebuild runner:" in done.stderr and done.stderr.endswith("failed: bad\n")
    check(tmp_path / "out.toml", model, [1])
    assert board.left() == []


def test_a_device_that_is_not_there(folder, board, tmp_path):
    done = measured(folder / "measure_ssh.sh", board.target.ssh.host, "-p", "1", "-oBatchMode=yes", cwd=tmp_path)
    assert done.returncode == 1 and "refused" in done.stderr and not (tmp_path / "measured.toml").exists()


ADB = """#!/bin/sh
# A device of which /data/local/tmp is a folder here.
device=$(dirname "$0")/device
here() { printf '%s' "$1" | sed "s,/data/local/tmp,$device,g"; }
echo "$ANDROID_SERIAL $*" >>"$(dirname "$0")/log"
case $1 in
shell) exec sh -c "$(here "$2")" ;;
push) cp -r "$2" "$(here "$3")" ;;
*) exit 2 ;;
esac
"""


def fake_device(folder: Path, **commands: str) -> Path:
    """A folder of commands that stand for adb and for what is on the device."""
    (folder / "device").mkdir(parents=True)
    for name, text in {"adb": ADB, "getprop": "#!/bin/sh\nprintf 'Pixel \"Test\"\\r\\n'\n", **commands}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def test_measuring_over_adb(folder, model, tmp_path):
    fake = fake_device(tmp_path / "bin")
    arguments = ["--runs", "7", "--threads", "1 2", "SERIAL7"]
    done = measured(folder / "measure_adb.sh", *arguments, cwd=tmp_path, path=str(fake))
    assert done.returncode == 0, done.stderr
    table = check(tmp_path / "measured.toml", model, [1, 2])
    assert table["device"].endswith(" / Pixel Test")
    assert all(line.startswith("SERIAL7 ") for line in (fake / "log").read_text().splitlines())
    assert list((fake / "device").iterdir()) == []


def test_the_kit_for_arm_runs_on_its_own_c_library(model, tmp_path):
    for name, found, how in toolchain.status()[:2]:
        if not found:
            pytest.skip(f"{name} is not installed; get it with `{how}`")
    kit.write(tmp_path / "kit", {"small": model, "again": model}, ["aarch64"], lambda line: None)
    emulated = ADB.replace("sed ", "sed -e 's,./aarch64/lib/ld-linux,qemu-aarch64 &,' -e ")
    uname = "#!/bin/sh\n[ $1 != -m ] || exec echo aarch64\nexec /bin/uname $*\n"
    fake = fake_device(tmp_path / "bin", adb=emulated, uname=uname)
    done = measured(tmp_path / "kit/measure_adb.sh", "--runs", "7", "--threads", "1", cwd=tmp_path, path=str(fake))
    assert done.returncode == 0, done.stderr
    check(tmp_path / "measured.toml", model, [1])


def test_a_machine_without_a_runner(folder, tmp_path):
    for machine, said in (("armv7l", "not for armv7l"), ("aarch64", "make one with: edgebuild targets kit --arch")):
        fake = fake_device(tmp_path / machine, uname=f"#!/bin/sh\necho {machine}\n")
        done = measured(folder / "measure_adb.sh", cwd=tmp_path, path=str(fake))
        assert done.returncode == 1 and (said in done.stderr or machine == HERE)


@pytest.mark.parametrize("script", ["measure_adb.sh", "measure_ssh.sh"])
@pytest.mark.parametrize("arguments", [["--runs", "many", "x"], ["--tests"], ["--runs"]])
def test_wrong_options_get_the_usage(folder, tmp_path, script, arguments):
    done = measured(folder / script, *arguments, cwd=tmp_path)
    assert done.returncode == 1 and "usage: measure_" in done.stderr


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_the_scripts_are_posix(folder, shell):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for script in kit.SCRIPTS:
        words = [shell, "sh", "-n"] if shell == "busybox" else [shell, "-n"]
        assert subprocess.run([*words, folder / script]).returncode == 0


def tiny(**_: object) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), nn.ReLU6(), nn.Conv2d(32, 256, 3, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 100),
    )  # fmt: skip


def test_a_reference_model_is_the_same_each_time_and_int8_is_smaller(monkeypatch):
    """On a model that is quick to lower, which torchvision then knows by its name as it knows its own."""
    models = import_torchvision().models
    monkeypatch.setitem(models._api.BUILTIN_MODELS, "tiny", tiny)
    monkeypatch.setattr(kit, "SHAPE", (1, 3, 32, 32))  # of whatever size the image is
    fp32, int8 = (kit.reference("tiny", precision) for precision in ("fp32", "int8"))
    assert len(int8) < len(fp32) / 3
    assert kit.reference("tiny", "fp32") == fp32
    assert {name for name, _ in kit.REFERENCES} <= set(models.list_models())


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (["small"], "write name=path.pte"),
        (["a b={model}"], "write name=path.pte"),
        (["../x={model}"], "write name=path.pte"),
        (["x=gone.pte"], "no .pte file at gone.pte"),
        (["x={model}", "x={model}"], "--model x is there twice"),
    ],
)
def test_models_that_cannot_be_taken(model, written, said):
    with pytest.raises(UsageError, match=said):
        kit.parse([part.format(model=model) for part in written])


def test_where_something_is_nothing_is_written(tmp_path, model):
    (tmp_path / "mine").touch()
    with pytest.raises(UsageError, match="is there already"):
        kit.write(tmp_path, {"small": model}, [HERE], lambda line: None)
    with pytest.raises(UsageError, match="no runner for 'riscv64'"):
        kit.write(tmp_path / "new", {"small": model}, ["riscv64"], lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
