"""ResNet8, trained on CIFAR-10, as a task: where its files are, the bench says in the environment."""

import os
import sys
from dataclasses import replace
from pathlib import Path

from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent.parent))
from compression import cifar  # noqa: E402

from edgebuild.task import Task  # noqa: E402
from microcontrollers.models import resnet8  # noqa: E402

EVERY = 10  # of the test images: reference operators take their time


def task() -> Task:
    """Scored on every tenth test image."""
    model = resnet8()
    model.load_state_dict(load_file(os.environ["EDGEBUILD_RESNET8_WEIGHTS"]))
    data = cifar.images(Path(os.environ["EDGEBUILD_RESNET8_IMAGES"]))
    fewer = replace(data, test=data.test[::EVERY], test_labels=data.test_labels[::EVERY])
    made = cifar.task(model.eval(), data)
    return replace(
        made,
        evaluate=lambda predict: cifar.accuracy(predict, fewer),
        input_names=("image",),
        output_names=("scores",),
        layouts={"image": "NCHW"},
        labels=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    )
