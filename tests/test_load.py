import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from edgebuild.errors import TaskError, UsageError
from edgebuild.lift import lift
from edgebuild.load import load
from edgebuild.task import load_weights
from edgebuild.vision import import_torchvision


def test_an_exported_program_with_npz_calibration(tmp_path, small_net, image):
    torch.export.save(torch.export.export(small_net, image), tmp_path / "net.pt2")
    np.savez(tmp_path / "x.npz", np.zeros((5, 3, 8, 8), np.float32))
    loaded = load(str(tmp_path / "net.pt2"), calibration=str(tmp_path / "x.npz"))
    assert loaded.name == "net" and len(loaded.samples) == 5
    assert torch.allclose(lift(loaded.task.model, image)(*image), small_net(*image), atol=1e-5)


@pytest.mark.parametrize(
    ("file", "name"),
    [("my net.v2", "my-net.v2"), ("modèle", "modele"), ("模型", "model"), ("..x", "x"), (os.fsdecode(b"a\xe9"), "a")],
)
def test_an_artifact_gets_a_name_that_other_systems_take(tmp_path, file, name):
    (tmp_path / f"{file}.py").write_text(
        "import torch\nfrom edgebuild.task import Task\n"
        "def task():\n    x = torch.ones(1, 2)\n    return Task(torch.nn.Linear(2, 2), (x,), [(x,)])\n"
    )
    assert load(str(tmp_path / f"{file}.py")).name == name


def test_a_program_with_a_pickle_in_it_is_not_read(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return x + 1

    x = (torch.zeros(1, 3),)
    torch.export.save(torch.export.export(Odd(), x), tmp_path / "odd.pt2")
    with zipfile.ZipFile(tmp_path / "odd.pt2") as old, zipfile.ZipFile(tmp_path / "evil.pt2", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("sample_inputs/model.pt"):
                content = pickle.dumps(print)
            new.writestr(name, content)
    with pytest.raises(TaskError, match="no exported program that can be trusted"):
        load(str(tmp_path / "evil.pt2"), calibration="unused.npz")


def test_a_torchvision_model_with_weights_and_images(tmp_path):
    models = import_torchvision().models
    torch.manual_seed(0)
    net = models.get_model("mobilenet_v3_small", weights=None)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.fromarray(np.full((40, 30, 3), 90 * i, np.uint8)).save(tmp_path / "images" / f"{i}.png")
    loaded = load("torchvision:mobilenet_v3_small", str(tmp_path / "w.safetensors"), str(tmp_path / "images"))
    assert [tuple(x.shape) for x in loaded.samples[0]] == [(1, 3, 224, 224)] and len(loaded.samples) == 2
    with pytest.raises(TaskError, match="weights of another model"):
        load("torchvision:resnet18", str(tmp_path / "w.safetensors"), str(tmp_path / "images"))
    with pytest.raises(UsageError, match="no model 'mobilnet'"):
        load("torchvision:mobilnet", str(tmp_path / "w.safetensors"), str(tmp_path / "images"))


def test_calibration_arrays_are_never_unpickled(tmp_path, small_net, image):
    torch.export.save(torch.export.export(small_net, image), tmp_path / "net.pt2")
    np.savez(tmp_path / "x.npz", np.array([{"a": 1}], dtype=object))
    with pytest.raises(TaskError, match="plain arrays"):
        load(str(tmp_path / "net.pt2"), calibration=str(tmp_path / "x.npz"))


def test_weights_load_from_both_kinds_of_file(tmp_path):
    net = nn.Linear(2, 2)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    torch.save(net.state_dict(), tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        assert torch.equal(load_weights(nn.Linear(2, 2), tmp_path / name).weight, net.weight)
    (tmp_path / "broken.safetensors").write_bytes(b"12")
    with pytest.raises(TaskError, match="no readable safetensors"):
        load_weights(nn.Linear(2, 2), tmp_path / "broken.safetensors")
