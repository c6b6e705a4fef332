"""Two processes that train together give what one gives."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

PROGRAM = """
import sys
import torch
from safetensors.torch import save_file
from torch import nn
from edgebuild.lift import lift
from edgebuild.spec import Distillation
from edgebuild.training import learner, processes, run
from edgebuild.training.objective import Hint
from edgebuild.transforms import distil

torch.set_num_threads(1)
run.SHORT = 10.0  # seconds: both in fp32, however long two processes take to talk

def net(seed):
    torch.manual_seed(seed)
    first = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
    rest = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4, 4)
    return lift(nn.Sequential(*first, *rest), (torch.zeros(1, 1, 6, 6),)).double()

def batches():
    generator = torch.Generator().manual_seed(0)
    for rows in (8, 7, 2, 8):  # unequal parts
        x = torch.randn(rows, 1, 6, 6, generator=generator).double()
        yield (x, x.mean((1, 2, 3)).gt(0).long()) if labelled else x

for labelled in (False, True):
    if processes.rank() == 0:
        held_out = tuple((x,) for x in torch.ones(4, 1, 6, 6).double().split(1))
        hints = (Hint("6", "6", torch.arange(8 * 4)),)
        lesson = learner.Lesson(Distillation(steps=12, cutmix=0.5), labelled, True, 0, hints, held_out)
        trained, how = distil.apply(net(1), net(2), batches, lesson)
        save_file(trained.state_dict(), f"{sys.argv[1]}-{labelled}")
        print(how.how)
        processes.tell(None)
    else:
        distil.follow(batches)
"""


def test_two_processes_give_what_one_gives(tmp_path: Path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "EDGEBUILD_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    told = []
    for name, launch in (("one", []), ("two", launcher)):
        command = [sys.executable, *launch, str(program), str(tmp_path / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        told.append(done.stdout.splitlines())
    assert told[1] == [f"{how}, 2 processes" for how in told[0]] and len(told[0]) == 2
    assert all("layers frozen" in how for how in told[0])
    for labelled in (False, True):
        one, two = (load_file(tmp_path / f"{name}-{labelled}") for name in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one:
            assert torch.allclose(one[name], two[name], rtol=1e-9, atol=1e-11), name
