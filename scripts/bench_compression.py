#!/usr/bin/env python
"""What compression costs in accuracy: every technique, together and alone, on trained models.

cifar       a CIFAR-10 model at several budgets and training times
techniques  each technique alone, and all without one, at one latency budget
mnist       examples/mnist: the feed-forward student with its teacher and without, over seeds
keywords    examples/keywords at its profile; transformer: examples/transformer at its profiles
tools       edgebuild and other tools on the CIFAR-10 model, with the same data and time
resume      a training killed with SIGKILL half way and started again

The data are no part of the repository: --model FILE.py (with `load(path) -> Module`), --weights FILE.safetensors and
--images ZIP (`.../{train,test}/<class>/*.jpg`) for CIFAR-10; EDGEBUILD_MNIST and EDGEBUILD_SPOKEN_DIGITS for the
examples. Latencies are those of `.pte` files on the host with one thread; the original's is taken in the same run.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from compression import builds, mnist, resume, tools  # noqa: E402

# How many times smaller and faster than fp32, points that may be lost, minutes of training. The first is int8 alone.
POINTS: dict[str, tuple[float, float, float, str]] = {
    "int8": (3.8, 2.9, 0.2, ""),
    "8x-5x-3min": (8, 5, 1.0, "3 min"),
    "14x-9x-15min": (14, 9, 0.5, "15 min"),
    "22x-10x-15min": (22, 10, 1.5, "15 min"),
    "30x-14x-15min": (30, 14, 3.0, "15 min"),
}
ALL = ("quantize", "prune", "factorize", "distil")
VARIES = 1.03  # a latency, from one measurement of a run to another, on a shared machine
ONE_BUDGET = 9.0  # times faster, for the comparison of techniques


def main() -> None:
    warnings.simplefilter("ignore")
    options = arguments()
    found = EXPERIMENTS[options.experiment](options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=list(EXPERIMENTS))
    parser.add_argument("--model", type=Path, help="a Python file with load(path) -> Module")
    parser.add_argument("--weights", type=Path, help="what its load() reads")
    parser.add_argument("--images", type=Path, help="a zip of JPEG files")
    parser.add_argument("--points", nargs="*", default=list(POINTS), choices=list(POINTS), help="for cifar")
    parser.add_argument(
        "--time", default="3 min", help='of each training, for techniques and tools; "400 steps" for techniques'
    )
    parser.add_argument("--seeds", type=int, default=5, help="for mnist")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    tools.add_options(parser)
    options = parser.parse_args()
    if options.experiment in ("cifar", "techniques", "tools", "resume"):
        for name in ("model", "weights", "images"):
            if getattr(options, name) is None:
                parser.error(f"{options.experiment} needs --model, --weights and --images")
    return options


def cifar(options: argparse.Namespace) -> dict[str, Any]:
    task = builds.cifar(options.model, options.weights, options.images)
    original = builds.build("fp32", task, {"size": "1 GB"}, techniques=("distil",))
    rows = [original]
    for name in options.points:
        smaller, faster, lost, training = POINTS[name]
        budgets = bounds(original, smaller, faster) | {"accuracy_drop": f"{lost} points"}
        techniques = ALL if training else ("quantize",)
        rows.append(builds.build(name, task, budgets, training, techniques, 'time = "40 min"\nrounds = 2'))
        print(builds.table(rows), flush=True)
    return {"rows": builds.as_json(rows)}


def bounds(original: builds.Row, smaller: float, faster: float) -> dict[str, str]:
    latency = 1e3 * original.latency / (faster * VARIES)
    return {"size": f"{int(original.size / smaller)} B", "latency": f"{latency:.4f} ms"}


def techniques(options: argparse.Namespace) -> dict[str, Any]:
    task = builds.cifar(options.model, options.weights, options.images)
    original = builds.build("fp32", task, {"size": "1 GB"}, techniques=("distil",))
    budgets = {"latency": bounds(original, 1, ONE_BUDGET)["latency"]}  # each is trained once, whatever it loses
    chosen: dict[str, tuple[str, ...]] = {"all": ALL}
    chosen |= {f"without-{left_out}": tuple(t for t in ALL if t != left_out) for left_out in ALL}
    chosen |= {f"{alone}-alone": (alone,) for alone in ALL[:3]}
    rows = [original]
    for name, used in chosen.items():
        rows.append(builds.build(name, task, budgets, options.time, used, builds.ONCE))  # type: ignore[arg-type]
        print(builds.table(rows), flush=True)
    return {"rows": builds.as_json(rows)}


def example(options: argparse.Namespace) -> dict[str, Any]:
    rows = builds.example(options.experiment)
    print(builds.table(rows))
    return {"rows": builds.as_json(rows)}


EXPERIMENTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "cifar": cifar,
    "techniques": techniques,
    "mnist": lambda options: mnist.run(options.seeds),
    "keywords": example,
    "transformer": example,
    "resume": resume.run,
    "tools": tools.run,
}

if __name__ == "__main__":
    main()
