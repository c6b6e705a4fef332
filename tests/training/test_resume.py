"""A training that is killed goes on where it was, and ends with the weights of one that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from edgebuild.training import checkpoint, learner

PROGRAM = """
import sys, time
import torch
from safetensors.torch import save_file
from torch import nn
from edgebuild.lift import lift
from edgebuild.spec import Distillation
from edgebuild.training import checkpoint, learner, run
from edgebuild.transforms import distil

run.CHECKPOINT = 0.0
output, pause = sys.argv[1], float(sys.argv[2])

def net(seed):
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Dropout(0.2), nn.Flatten()
    return lift(nn.Sequential(*layers, nn.Linear(8 * 4, 4)), (torch.zeros(1, 1, 6, 6),))

def batches():
    for _ in range(5):
        time.sleep(pause)
        yield torch.randn(8, 1, 6, 6)  # from the global generator

lesson = learner.Lesson(Distillation(steps=40), False, True, 0, keep="one")
trained, how = distil.apply(net(1), net(2), batches, lesson)
save_file(trained.state_dict(), output)
assert "layers frozen" in how.how, how.how
print(how.steps)
"""


def start(folder: Path, output: Path, pause: float) -> subprocess.Popen:
    environment = {**os.environ, "EDGEBUILD_CACHE": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(output), str(pause)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_a_killed_training_ends_with_the_same_weights(tmp_path, monkeypatch):
    killed = start(tmp_path / "b", tmp_path / "killed", 0.1)
    whole = start(tmp_path / "a", tmp_path / "whole", 0.0)
    monkeypatch.setenv("EDGEBUILD_CACHE", str(tmp_path / "b"))
    deadline = time.monotonic() + 120
    step = 0
    while step < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
        step = (checkpoint.read("one") or {"step": 0})["step"]
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 10 <= step < 40 and not (tmp_path / "killed").exists()
    again = start(tmp_path / "b", tmp_path / "killed", 0.0)
    assert again.communicate(timeout=120)[0] == whole.communicate(timeout=120)[0] == "40\n"
    first, second = load_file(tmp_path / "whole"), load_file(tmp_path / "killed")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert checkpoint.read("one") is None


@pytest.mark.parametrize("damage", [b"", b"no checkpoint", None])
def test_a_damaged_checkpoint_is_none(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("EDGEBUILD_CACHE", str(tmp_path))
    checkpoint.write("one", {"step": 3, "model": {"weight": torch.ones(2)}})
    assert checkpoint.read("one")["step"] == 3
    path = tmp_path / checkpoint.KIND / "one"
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    assert checkpoint.read("one") is None


def test_a_checkpoint_is_no_pickle(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEBUILD_CACHE", str(tmp_path))
    path = tmp_path / checkpoint.KIND / "one"
    path.parent.mkdir()
    torch.save({"step": learner.Lesson}, path)
    assert checkpoint.read("one") is None
