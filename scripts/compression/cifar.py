"""CIFAR-10 as an ImageFolder in a zip, and a trained model for it, as an edgebuild task."""

import hashlib
import io
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgebuild.task import Task

BATCH = 128
CALIBRATION = 256


@dataclass(frozen=True)
class Images:
    """uint8 [n, 3, 32, 32] and int64 [n]: 50,000 for training, 10,000 for testing."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def images(archive: Path) -> Images:
    """Read `.../{train,test}/<class>/*.jpg`; what was decoded is kept in the temporary folder."""
    status = archive.stat()
    name = hashlib.sha256(f"{archive.resolve()} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()[:16]
    kept = Path(tempfile.gettempdir()) / f"edgebuild-images-{name}.safetensors"
    if not kept.is_file():
        decoded = _decode(archive)
        partial = kept.with_suffix(f".{os.getpid()}")
        save_file(decoded, partial)
        partial.replace(kept)
    return Images(**load_file(kept))


def _decode(archive: Path) -> dict[str, Tensor]:
    import numpy as np
    from PIL import Image

    found = {}
    with zipfile.ZipFile(archive) as files:
        for part in ("train", "test"):
            names = sorted(n for n in files.namelist() if f"/{part}/" in n and n.endswith(".jpg"))
            classes = sorted({n.split("/")[-2] for n in names})
            arrays = [np.asarray(Image.open(io.BytesIO(files.read(n))).convert("RGB")) for n in names]
            found[part] = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()
            found[f"{part}_labels"] = torch.tensor([classes.index(n.split("/")[-2]) for n in names])
    return found


def augmented(data: Images, seed: int, epochs: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches, each image moved by up to 4 pixels and flipped in every other epoch; floats in 0..255.

    Flips that alternate show an image less often as it was before than random ones do (Jordan 2024, arXiv:2404.00498).
    """
    generator = torch.Generator().manual_seed(seed)
    rows, first = torch.arange(32), torch.rand(len(data.train), generator=generator) < 0.5
    for epoch in range(epochs):
        for chosen in torch.randperm(len(data.train), generator=generator).split(BATCH):
            count = len(chosen)
            padded = torch.nn.functional.pad(data.train[chosen], (4, 4, 4, 4))
            y, x = torch.randint(0, 9, (2, count), generator=generator)
            columns = rows.expand(count, 32).clone()
            flipped = first[chosen] ^ (epoch % 2 == 1)
            columns[flipped] = columns[flipped].flip(1)
            at = torch.arange(count)[:, None, None]
            moved = padded.permute(0, 2, 3, 1)[at, (y[:, None] + rows)[:, :, None], (x[:, None] + columns)[:, None]]
            yield moved.permute(0, 3, 1, 2).float(), data.train_labels[chosen]


def accuracy(predict: Callable[[Tensor], Tensor], data: Images) -> float:
    """Share of the test images with the right label, in batches."""
    pairs = zip(data.test.split(250), data.test_labels.split(250), strict=True)
    return sum(int((predict(x.float()).argmax(1) == y).sum()) for x, y in pairs) / len(data.test)


def load(module: Path, weights: Path) -> nn.Module:
    """A trained model from a Python file with `load(path) -> Module`."""
    spec = spec_from_file_location("bench_model", module)
    assert spec is not None and spec.loader is not None
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    model: nn.Module = made.load(str(weights))
    return model.eval()


def task(model: nn.Module, data: Images, seed: int = 1) -> Task:
    """The model with its images, for edgebuild. Calibration images are picked from the training set."""
    picked = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))[:CALIBRATION]
    return Task(
        model=model,
        example_inputs=(data.train[:1].float(),),
        calibration=data.train[picked].float().split(32),
        train=lambda: augmented(data, seed, epochs=1000),
        labelled=True,
        evaluate=lambda predict: accuracy(predict, data),
    )
