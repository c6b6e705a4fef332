"""MNIST: a convolutional teacher and, for distillation, a feed-forward student.

The images are read from `$EDGEBUILD_MNIST`, else from `data/` beside this file, and downloaded where they are missing.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from model import Student, Teacher
from safetensors.torch import load_file
from torch import Tensor

from edgebuild.errors import TaskError
from edgebuild.task import Normalization, Task
from edgebuild.vision import import_torchvision

HERE = Path(__file__).parent
BATCH = 128


def load(train: bool) -> tuple[Tensor, Tensor]:
    """Images, float [n, 1, 28, 28] in [0, 1], and labels, int64 [n]. Raises TaskError where they cannot be had."""
    root = Path(os.environ.get("EDGEBUILD_MNIST") or HERE / "data")
    mnist = import_torchvision().datasets.MNIST
    try:
        data = mnist(root, train=train)
    except RuntimeError:  # not there yet
        try:
            data = mnist(root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            why = " ".join(str(error).split())  # a line for each mirror
            raise TaskError(
                f"MNIST is not in {root} and cannot be downloaded: {why}",
                f"put its four *-ubyte files, unpacked, into {root}/MNIST/raw, or let EDGEBUILD_MNIST name "
                "the folder that holds MNIST/raw",
            ) from None
    return data.data.unsqueeze(1) / 255, data.targets


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to 2 pixels in both directions, zeros moving in."""
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    at = torch.randint(0, 5, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + 28, x : x + 28] for image, (y, x) in zip(padded, at, strict=True)])


def batches(images: Tensor, labels: Tensor, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled and shifted batches of `epochs` passes over the data; the same seed gives the same batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            yield shifted(images[chosen], generator), labels[chosen]


def accuracy(predict: Callable[..., Tensor], images: Tensor, labels: Tensor) -> float:
    """Share of the images that `predict` gives the highest score to the right digit for."""
    pairs = zip(images.split(BATCH), labels.split(BATCH), strict=True)
    return sum(int((predict(x).argmax(1) == y).sum()) for x, y in pairs) / len(labels)


def task() -> Task:
    images, labels = load(train=True)
    test_images, test_labels = load(train=False)
    teacher, student = Teacher(), Student()
    teacher.load_state_dict(load_file(HERE / "teacher.safetensors"))
    student.load_state_dict(load_file(HERE / "student.safetensors"))  # trained alone; distillation goes on from there
    return Task(
        model=teacher.eval(),
        example_inputs=(images[:1],),
        calibration=images[:256].split(32),
        train=lambda: batches(images, labels, epochs=2, seed=1),
        labelled=True,
        student=student.eval(),
        evaluate=lambda predict: accuracy(predict, test_images, test_labels),
        input_names=("image",),
        output_names=("scores",),
        layouts={"image": "NCHW"},
        normalization={"image": Normalization(scale=1 / 255)},
        labels=tuple("0123456789"),
    )
