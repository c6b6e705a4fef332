"""scikit-learn's 1,797 handwritten digits of 8x8 pixels. They come with the package: nothing is downloaded."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from model import DigitsNet
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import Tensor

from edgebuild.task import Task

WEIGHTS = Path(__file__).with_name("digits.safetensors")
TRAIN = 1_297  # the other 500 are the test set
BATCH = 64


def split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; images are float [n, 1, 8, 8] in [0, 16]."""
    data = load_digits()
    # RandomState's streams are frozen by numpy's compatibility policy, so that the split never changes.
    order = np.random.RandomState(0).permutation(len(data.target))
    images = torch.tensor(data.images[order], dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(data.target[order], dtype=torch.int64)
    return images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by -1, 0 or 1 pixel in both directions, zeros moving in."""
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    at = torch.randint(0, 3, (len(images), 2), generator=generator).tolist()
    return torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, at, strict=True)])


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
    train_images, train_labels, test_images, test_labels = split()
    model = DigitsNet()
    model.load_state_dict(load_file(WEIGHTS))
    return Task(
        model=model.eval(),
        example_inputs=(train_images[:1],),
        calibration=train_images[:128].split(32),
        train=lambda: batches(train_images, train_labels, epochs=20, seed=1),
        labelled=True,
        evaluate=lambda predict: accuracy(predict, test_images, test_labels),
        input_names=("image",),
        output_names=("scores",),
        layouts={"image": "NCHW"},
        labels=tuple("0123456789"),
    )
