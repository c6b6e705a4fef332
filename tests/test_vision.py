"""torchvision imports beside the installed torch, whichever builds the two are."""

import sys

import pytest
import torch

from edgebuild.errors import MissingEnvironment
from edgebuild.vision import import_torchvision


def test_models_transforms_and_datasets_work() -> None:
    torchvision = import_torchvision()
    assert import_torchvision() is torchvision
    model = torchvision.models.squeezenet1_1(weights=None).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)
    assert torchvision.transforms.functional.resize(torch.zeros(1, 3, 8, 8), [4, 4]).shape == (1, 3, 4, 4)
    assert issubclass(torchvision.datasets.MNIST, torch.utils.data.Dataset)


def test_a_missing_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # Python's own way to say: not to be found
    with pytest.raises(MissingEnvironment, match=r"torchvision is not installed \(pip install torchvision"):
        import_torchvision()
