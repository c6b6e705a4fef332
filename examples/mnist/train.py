"""Trains teacher, student and distilled student: `python examples/mnist/train.py [MODEL ...]`.

Writes a .safetensors file for each. Same seed, versions and kind of machine: the same weights.
"""

import argparse
from pathlib import Path

import torch
from model import Student, Teacher
from safetensors.torch import load_file, save_file
from task import BATCH, HERE, accuracy, batches, load
from torch import nn

from edgebuild.clock import Standing
from edgebuild.spec import Distillation
from edgebuild.training.run import Lesson
from edgebuild.transforms import distil
from edgebuild.units import Seconds

MODELS: dict[str, type[nn.Module]] = {"teacher": Teacher, "student": Student, "student-distilled": Student}
EPOCHS = {"teacher": 4, "student": 8, "student-distilled": 8}


def report(standing: Standing) -> None:
    print(f"  step {standing.step}/{standing.steps}  loss {standing.loss:.4f}", flush=True)


def train(name: str, teacher: nn.Module | None, epochs: int, seed: int) -> nn.Module:
    """A model trained on the labels, and on the teacher's outputs where there is a teacher."""
    images, labels = load(train=True)
    torch.manual_seed(seed)
    settings = Distillation(steps=epochs * -(-len(images) // BATCH), learning_rate=3e-3, time=Seconds("inf"))
    lesson = Lesson(settings, labelled=True, logits=True, seed=seed)
    model, training = distil.apply(
        MODELS[name](), teacher, lambda: batches(images, labels, epochs, seed), lesson, report
    )
    with torch.inference_mode():
        print(f"{name}: {training}, test accuracy {accuracy(model.eval(), *load(train=False)):.4f}")
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"{', '.join(MODELS)}; all if none is named")
    parser.add_argument("--epochs", type=int, help="passes over the data; 4 for the teacher, 8 for a student")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the weights, the teacher's among them")
    options = parser.parse_args()
    if unknown := set(options.models) - set(MODELS):
        parser.error(f"unknown model {', '.join(sorted(unknown))}; known: {', '.join(MODELS)}")
    torch.set_num_threads(options.threads)  # sums over another number of threads give other bits
    torch.use_deterministic_algorithms(True)
    for name in options.models or MODELS:
        teacher = None
        if name == "student-distilled":
            teacher = Teacher()
            teacher.load_state_dict(load_file(options.output / "teacher.safetensors"))
        model = train(name, teacher, options.epochs or EPOCHS[name], options.seed)
        path = options.output / f"{name}.safetensors"
        save_file(model.state_dict(), path)
        print(f"{path}: {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
