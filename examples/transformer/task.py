"""Spoken digits: a transformer for keyword spotting, on a microphone's second turned into a log-mel spectrogram."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from data import HERE, Recordings, labels, load, one_second
from features import augmented, log_mel
from model import KeywordTransformer
from torch import Tensor

from edgebuild.task import Task, load_weights

WEIGHTS = HERE / "transformer.safetensors"
BATCH = 64
SHIFTS = (-650, -350, 0, 350, 650)  # samples that a test recording is moved by: 44 and 81 ms, no whole frames
CALIBRATION = 128


def features(recordings: Recordings, shift: int = 0) -> Tensor:
    """Spectrograms [n, 49, 40] of the recordings as they are, moved by `shift` samples."""
    return log_mel(torch.from_numpy(np.stack([one_second(recording.samples, shift) for recording in recordings])))


def shifted(recordings: Recordings) -> tuple[Tensor, Tensor]:
    """Every recording at each of SHIFTS, and the labels."""
    return torch.cat([features(recordings, shift) for shift in SHIFTS]), labels(recordings).repeat(len(SHIFTS))


def batches(recordings: Recordings, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled and augmented batches of `epochs` passes over the data; the same seed gives the same batches."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for order in torch.randperm(len(recordings), generator=generator).split(BATCH):
            chosen = tuple(recordings[i] for i in order)
            yield log_mel(torch.stack([augmented(recording, generator) for recording in chosen])), labels(chosen)


def accuracy(predict: Callable[..., Tensor], inputs: Tensor, wanted: Tensor) -> float:
    """Share of the inputs that `predict` gives the highest score to the right digit for."""
    pairs = zip(inputs.split(BATCH), wanted.split(BATCH), strict=True)
    return sum(int((predict(x).argmax(1) == y).sum()) for x, y in pairs) / len(wanted)


def task() -> Task:
    train, test = load()
    calibration = features(train[:: len(train) // CALIBRATION])  # evenly over digits and speakers
    inputs, wanted = shifted(test)
    return Task(
        model=load_weights(KeywordTransformer(), WEIGHTS),
        example_inputs=(calibration[:1],),
        calibration=calibration.split(32),
        train=lambda: batches(train, epochs=20, seed=1),
        labelled=True,
        evaluate=lambda predict: accuracy(predict, inputs, wanted),
        metric="accuracy over shifts",  # five views of a recording are no five samples: no interval of "accuracy"
        input_names=("spectrogram",),
        output_names=("scores",),
        layouts={"spectrogram": "NTF"},
        labels=tuple("0123456789"),
    )
