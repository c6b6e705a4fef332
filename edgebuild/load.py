"""Loads what the user points at, and checks it once: a task file, a torchvision model by name, or an exported program.

A task file is the user's own program and is run. Data files are not trusted: nothing in them is ever unpickled.
"""

import importlib.util
import io
import json
import re
import sys
import traceback
import unicodedata
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edgebuild import cache, signature
from edgebuild.errors import EdgebuildError, TaskError, UsageError
from edgebuild.lift import outputs_of
from edgebuild.manifest import Input, Output
from edgebuild.task import Normalization, Task, load_weights
from edgebuild.vision import import_torchvision

CALIBRATION_SAMPLES = 128
HASHED_BATCHES = 16
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
_imported: list[str] = []


@dataclass(frozen=True)
class Loaded:
    """A checked task: its name, and its calibration inputs one sample at a time (batch size 1).

    `sources` is a digest of the code and of the first training batches: what a training depends on. `inputs` and
    `outputs` are those of a call, by name.
    """

    name: str
    task: Task
    samples: tuple[tuple[Tensor, ...], ...]
    sources: str
    inputs: tuple[Input, ...] = ()
    outputs: tuple[Output, ...] = ()


def load(where: str, weights: str | None = None, calibration: str | None = None) -> Loaded:
    """Load a task from a file or folder, `torchvision:NAME` (needs `weights`) or a `.pt2` file.

    `calibration` is an `.npz` file or a folder of images; a task file brings its own. Raises UsageError where there is
    nothing at `where`, TaskError where what is there cannot be used.
    """
    if where.startswith("torchvision:"):
        name, task = _from_torchvision(where.partition(":")[2], weights, calibration)
    elif where.endswith(".pt2"):
        name, task = _from_program(Path(where), calibration)
    else:
        if weights or calibration:
            raise UsageError(
                "--weights and --calibration are for torchvision models and .pt2 files; a task file loads its own"
            )
        name, task = _from_file(Path(where))
    return _checked(_plain(name), task, where)


def _plain(name: str) -> str:
    """A name for the artifact's file, which is handed on to other systems: no spaces, no accents."""
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._-]+", "-", letters).strip(".-") or "model"


# ----------------------------------------------------------------------------------------------------- task files


def task_file(where: str | Path) -> Path:
    """The task's Python file: the path itself, or `task.py` in a folder. Raises UsageError where there is none."""
    path = Path(where)
    file = path / "task.py" if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"no task file at {file}", "write one with: edgebuild init")
    if file.suffix != ".py":
        raise UsageError(
            f"{file} is no task", "give a Python file, a folder with task.py, a .pt2 file or torchvision:NAME"
        )
    return file


def _from_file(where: Path) -> tuple[str, Task]:
    file = task_file(where)
    module = _import(file)
    makers = [
        value
        for value in vars(module).values()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and _returns_task(value)
    ]
    named = getattr(module, "task", None)
    maker = named if callable(named) else (makers[0] if len(makers) == 1 else None)
    if maker is None:
        raise TaskError(f"{file} has no function that returns a Task", "define `def task() -> Task:`")
    task = _run(file, maker)
    if not isinstance(task, Task):
        raise TaskError(f"{file}: {maker.__name__}() returned {type(task).__name__}, not a Task")
    return file.resolve().parent.name if file.name == "task.py" else file.stem, task


def _returns_task(function: Any) -> bool:
    result = getattr(function, "__annotations__", {}).get("return")
    return result is Task or result == "Task"


def _import(file: Path) -> ModuleType:
    """Import a task file with its folder first on the path; modules of the task before it are forgotten."""
    for name in _imported:
        sys.modules.pop(name, None)
    _imported.clear()
    folder = str(file.parent.resolve())
    before = set(sys.modules)
    spec = importlib.util.spec_from_file_location(f"edgebuild_task_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, folder)
    try:
        _run(file, lambda: spec.loader.exec_module(module))
    finally:
        sys.path.remove(folder)
        _imported.extend(
            name
            for name in set(sys.modules) - before
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(folder)
        )
    return module


def _run(file: Path, function: Any) -> Any:
    """Call the user's code; what it raises becomes a TaskError with the line it came from."""
    try:
        return function()
    except EdgebuildError:
        raise
    except (Exception, SystemExit) as error:
        frames = [
            frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == file.parent
        ]
        line = frames[-1].lineno if frames else getattr(error, "lineno", "?")
        where = frames[-1].filename if frames else str(file)
        message = " ".join(str(error).split())
        raise TaskError(f"{where}:{line}: {type(error).__name__}: {message[:300]}") from error


# ------------------------------------------------------------------------------------ torchvision, exported programs


def _from_torchvision(name: str, weights: str | None, calibration: str | None) -> tuple[str, Task]:
    models = import_torchvision().models
    if name not in models.list_models():
        raise UsageError(f"torchvision has no model {name!r}", "see torchvision.models.list_models()")
    if weights is None:
        raise UsageError(f"torchvision:{name} needs its weights", "--weights FILE (.safetensors or a state dict)")
    model = load_weights(models.get_model(name, weights=None), weights)
    crop = models.get_model_weights(name).DEFAULT.transforms()
    size = getattr(crop, "crop_size", [224])[0]
    example = (torch.zeros(1, 3, size, size),)
    means, stds = tuple(getattr(crop, "mean", ())), tuple(getattr(crop, "std", ()))
    return name, Task(
        model,
        example,
        _calibration(calibration, example, crop),
        input_names=("image",),
        layouts={"image": "NCHW"},
        normalization={"image": Normalization(means, stds, 1 / 255)} if means and stds else {},
    )


def _from_program(path: Path, calibration: str | None) -> tuple[str, Task]:
    if not path.is_file():
        raise UsageError(f"no exported program at {path}")
    _refuse_pickles(path)
    try:
        program: ExportedProgram = torch.export.load(path)
    except Exception as error:  # the reader raises whatever it likes
        raise TaskError(
            f"{path} is no exported program that this PyTorch can read: {' '.join(str(error).split())[:200]}"
        ) from None
    if program.example_inputs is None or program.example_inputs[1]:
        raise TaskError(f"{path} has no positional example inputs", "export with torch.export.export(model, inputs)")
    example = tuple(program.example_inputs[0])
    return path.stem, Task(program, example, _calibration(calibration, example, None))


def _refuse_pickles(path: Path) -> None:
    """PyTorch's reader falls back to unpickling; a program that would need it is refused before it is read."""
    remedy = "export it again with this PyTorch; constants that are no tensors are not supported"
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith("archive_format") for name in names):
                raise TaskError(f"{path} is no exported program in the .pt2 archive format", remedy)
            for name in names:
                if name.endswith("_config.json"):
                    for entry in json.loads(archive.read(name)).get("config", {}).values():
                        if entry.get("use_pickle") or entry.get("tensor_meta") is None:
                            raise TaskError(
                                f"{path} holds a pickle ({entry.get('path_name')}), which is not read", remedy
                            )
                elif name.endswith(".pt"):
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except TaskError:
        raise
    except Exception as error:  # a broken archive, or a pickle that weights_only refuses
        raise TaskError(f"{path} is no exported program that can be trusted ({type(error).__name__})", remedy) from None


def _calibration(where: str | None, example: tuple[Tensor, ...], transform: Any) -> list[tuple[Tensor, ...]]:
    if where is None:
        raise UsageError("calibration inputs are needed", "--calibration FILE.npz, or a folder of images")
    path = Path(where)
    if path.is_dir():
        return _images(path, example, transform)
    if path.suffix != ".npz" or not path.is_file():
        raise UsageError(f"no calibration inputs at {path}", "give an .npz file or a folder of images")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = [torch.from_numpy(arrays[name]) for name in arrays.files]
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise TaskError(f"{path} is no .npz file of plain arrays: {error}") from None
    if len(found) != len(example):
        raise TaskError(f"{path} has {len(found)} arrays, the model takes {len(example)} inputs")
    return [tuple(found)]


def _images(folder: Path, example: tuple[Tensor, ...], transform: Any) -> list[tuple[Tensor, ...]]:
    from PIL import Image

    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES)[:CALIBRATION_SAMPLES]
    if not files:
        raise TaskError(f"{folder} has no images", f"known kinds: {', '.join(IMAGES)}")
    if len(example) != 1 or example[0].dim() != 4:
        raise TaskError("a folder of images can calibrate a model with one image input alone", "give an .npz file")
    channels, height, width = example[0].shape[1:]
    batches: list[tuple[Tensor, ...]] = []
    for file in files:
        image = Image.open(file).convert("L" if channels == 1 else "RGB")
        if transform is not None:
            batches.append((transform(image).unsqueeze(0),))
        else:  # nothing says how the model was trained: plain pixels in [0, 1]
            pixels = np.asarray(image.resize((width, height)), dtype=np.float32).reshape(height, width, channels) / 255
            batches.append((torch.from_numpy(pixels.transpose(2, 0, 1).copy()).unsqueeze(0),))
    return batches


# ---------------------------------------------------------------------------------------------------------- checks


def _checked(name: str, task: Task, where: str) -> Loaded:
    example = task.example_inputs
    if not isinstance(example, tuple) or not example or not all(isinstance(x, Tensor) for x in example):
        raise TaskError(f"task {name!r}: example_inputs is not a tuple of tensors")
    if any(x.dim() == 0 or x.shape[0] != 1 for x in example):
        raise TaskError(f"task {name!r}: example_inputs do not have batch size 1: {[tuple(x.shape) for x in example]}")
    if isinstance(task.model, nn.Module):
        task = replace(task, model=task.model.eval())
        _check_finite(name, task.model.state_dict())
    elif isinstance(task.model, ExportedProgram):
        _check_finite(name, task.model.state_dict)
    else:
        raise TaskError(
            f"task {name!r}: model is a {type(task.model).__name__}, not a torch.nn.Module or an exported program"
        )
    samples = tuple(islice(_samples(name, task.calibration, example), CALIBRATION_SAMPLES))
    if not samples:
        raise TaskError(f"task {name!r}: the calibration set is empty", "give at least one batch of inputs")
    outputs = _check_forward(name, task)
    named = signature.inputs(name, task), signature.outputs(name, task, outputs)
    return Loaded(name, task, samples, _sources(name, task, Path(where)), *named)


def _sources(name: str, task: Task, where: Path) -> str:
    folder = where if where.is_dir() else where.parent
    code = (
        [path.read_bytes() for path in sorted(folder.glob("*.py"))] if where.is_dir() or where.suffix == ".py" else []
    )
    seen: list[bytes] = []
    if task.train is not None:
        try:
            for batch in islice(task.train(), HASHED_BATCHES):
                seen += [
                    x.contiguous().numpy().tobytes()
                    for x in torch.utils._pytree.tree_leaves(batch)
                    if isinstance(x, Tensor)
                ]
        except Exception as error:  # the user's function
            raise TaskError(f"task {name!r}: train() failed: {type(error).__name__}: {error}") from error
        if not seen:
            raise TaskError(f"task {name!r}: train() gives no batches", "leave train out, or give at least one batch")
    return cache.key(*code, *seen)


def _check_finite(name: str, state: Mapping[str, Tensor]) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise TaskError(
                f"task {name!r}: the weights hold NaN or infinity, first in {key!r}", "was the training stable?"
            )


def _samples(name: str, batches: Iterable[Any], example: tuple[Tensor, ...]) -> Iterable[tuple[Tensor, ...]]:
    try:
        for batch in batches:
            inputs = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            if len(inputs) != len(example) or not all(isinstance(x, Tensor) for x in inputs):
                raise TaskError(
                    f"task {name!r}: a calibration batch is not {len(example)} tensor(s)", "leave the labels out"
                )
            for i in range(len(inputs[0])):
                sample = tuple(x[i : i + 1].to(e.dtype) for x, e in zip(inputs, example, strict=True))
                for x, e in zip(sample, example, strict=True):
                    if x.shape != e.shape:
                        raise TaskError(
                            f"task {name!r}: a calibration input is {tuple(x.shape)}, the example {tuple(e.shape)}"
                        )
                    if x.is_floating_point() and not torch.isfinite(x).all():
                        raise TaskError(f"task {name!r}: a calibration input holds NaN or infinity")
                yield sample
    except EdgebuildError:
        raise
    except Exception as error:  # the user's iterable
        raise TaskError(
            f"task {name!r}: reading the calibration inputs failed: {type(error).__name__}: {error}"
        ) from error


def _check_forward(name: str, task: Task) -> list[Tensor]:
    """The outputs of the model on the example inputs."""
    module = task.model if isinstance(task.model, nn.Module) else task.model.module()
    models = {"model": module, **({"student": task.student.eval()} if task.student is not None else {})}
    found: dict[str, list[Tensor]] = {}
    for role, candidate in models.items():
        try:
            with torch.no_grad():
                outputs = outputs_of(candidate(*task.example_inputs))
        except Exception as error:  # the user's forward
            raise TaskError(
                f"task {name!r}: the {role} fails on the example inputs: {' '.join(str(error).split())[:300]}"
            ) from error
        if not outputs:
            raise TaskError(f"task {name!r}: the {role} returns no tensor")
        if not all(torch.isfinite(y).all() for y in outputs if y.is_floating_point()):
            raise TaskError(f"task {name!r}: the {role}'s outputs on the example inputs are not finite")
        found[role] = list(outputs)
    shapes = {role: [tuple(y.shape) for y in outputs] for role, outputs in found.items()}
    if task.student is not None and shapes["student"] != shapes["model"]:
        raise TaskError(f"task {name!r}: the student's outputs are {shapes['student']}, the model's {shapes['model']}")
    return found["model"]
