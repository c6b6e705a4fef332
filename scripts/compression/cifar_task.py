"""The trained CIFAR-10 model as a task: where its files are, the bench says in the environment."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from compression import cifar  # noqa: E402
from edgebuild.task import Task  # noqa: E402


def task() -> Task:
    model, weights, images = (Path(os.environ[f"EDGEBUILD_CIFAR_{name}"]) for name in ("MODEL", "WEIGHTS", "IMAGES"))
    return cifar.task(cifar.load(model, weights), cifar.images(images))
