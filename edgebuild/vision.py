"""Imports torchvision where it was built for CUDA and torch for the CPU, as pip pairs them on some machines."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from edgebuild.errors import MissingEnvironment

# torchvision's compiled library declares these operators. A CUDA build of it does not load beside a CPU torch, and its
# Python part then dies on "operator torchvision::nms does not exist". The names alone are enough for models,
# transforms and datasets; calling a detection operator still fails, as it must.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_kept: list[torch.library.Library] = []  # a Library takes its schemas along when it is collected


def import_torchvision() -> ModuleType:
    """The torchvision module, with `models`, `transforms` and `datasets`; detection operators may be absent.

    Raises MissingEnvironment where torchvision is not installed or does not fit the installed torch.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise MissingEnvironment("torchvision is not installed", "pip install torchvision==0.28.0")
    _declare_operators(Path(spec.origin).parent)
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:
        raise MissingEnvironment(
            f"torchvision does not fit torch {torch.__version__}: {error}", "pip install torchvision==0.28.0"
        ) from None


def _declare_operators(package: Path) -> None:
    """Declare what the library would have declared, if it cannot be loaded.

    The library goes first: it could not be loaded any more where a schema that it brings is declared already.
    """
    for library in package.glob("_C*.so"):
        try:
            torch.ops.load_library(library)
        except OSError:
            break
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            _kept.append(torch.library.Library("torchvision", "FRAGMENT"))
            _kept[-1].define(schema)
