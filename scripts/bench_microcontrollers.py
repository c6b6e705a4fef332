"""What is said of microcontrollers, held against what was planned and built; tables, and JSON beside them.

    predictions  SRAM, flash and cycles of ten models: predicted, and planned
    builds       ResNet8 on CIFAR-10 and the DS-CNN on spoken digits, for every shipped profile of a microcontroller
    narrow       ResNet8 where its SRAM does not fit until the planner narrows the layers that set the peak

ResNet8's weights come from `python -m microcontrollers.training` in this folder; --images is a zip of
`.../{train,test}/<class>/*.jpg`. The spoken digits are found as examples/keywords finds them.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import nan
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
from microcontrollers.models import MODELS  # noqa: E402

from edgebuild import arena, backends, catalog, costs, pipeline  # noqa: E402
from edgebuild.analyse import analyse  # noqa: E402
from edgebuild.devices import DEVICES, as_file  # noqa: E402
from edgebuild.lift import lift  # noqa: E402
from edgebuild.plan import Choice  # noqa: E402
from edgebuild.report.figures import figure  # noqa: E402
from edgebuild.spec import Target, Verdict  # noqa: E402
from edgebuild.transforms import quantize  # noqa: E402

app = typer.Typer(add_completion=False, no_args_is_help=True)
CALIBRATION = 8


@app.callback()
def main() -> None:
    """Benchmarks of microcontrollers."""


@dataclass(frozen=True)
class Prediction:
    """A figure of a model on a target as the planner predicts it, and as the built program has it."""

    model: str
    target: str
    quantity: str
    predicted: float
    planned: float
    seconds: float

    @property
    def error(self) -> float:
        return self.predicted / self.planned - 1


@app.command()
def predictions(
    targets: Annotated[list[str] | None, typer.Option("--target")] = None,
    models: Annotated[list[str] | None, typer.Option("--model")] = None,
    to: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """SRAM, flash and latency of int8 models with random weights: predicted, and as the backend plans or estimates."""
    names = targets or [n for n in catalog.names("targets") if catalog.load_target(n).microcontroller]
    rows: list[Prediction] = []
    for name in names:
        target = catalog.load_target(name)
        for model in models or MODELS:
            rows += _predictions(model, target)
    table = Table("model", "target", "", "predicted", "planned", "error")
    for row in rows:
        unit = 1e6 if row.quantity == "latency" else 1
        table.add_row(
            row.model,
            row.target,
            row.quantity,
            f"{unit * row.predicted:,.0f}",
            f"{unit * row.planned:,.0f}",
            f"{row.error:+.1%}",
        )
    Console().print(table)
    for name in names:
        for quantity in dict.fromkeys(row.quantity for row in rows):
            errors = [abs(row.error) for row in rows if (row.target, row.quantity) == (name, quantity)]
            if errors:
                Console().print(f"{name}: {quantity}: largest error {max(errors):.1%} over {len(errors)} models")
    if to:
        to.write_text(json.dumps([asdict(row) | {"error": row.error} for row in rows], indent=1) + "\n")


def _predictions(name: str, target: Target) -> list[Prediction]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    model, samples = make().eval(), torch.randn(CALIBRATION, *shape[1:])
    inputs = (samples[:1],)
    backend = backends.Backend(target.device, target.npu, target.board)
    lifted = lift(model, inputs)
    facts = analyse(lifted, inputs)
    began = time.monotonic()
    few = [(sample[None],) for sample in samples]
    rounded = quantize.apply(lifted, backend.layout(inputs), few, backend.quantizer()).model
    artifact = backend.lower(rounded, inputs)
    seconds = time.monotonic() - began
    with as_file(artifact.data, artifact.suffix, artifact.graphs) as path:
        measured = DEVICES[target.device].measure(path, target, 1, [(samples[:1].numpy(),)], ())
    found = {one.quantity: one.value for one in measured}
    choice = Choice(facts, "int8")
    predicted = {"sram": arena.sram(facts, target).of(choice), "flash": arena.flash(facts, target).of(choice)}
    if target.timed:
        predicted["latency"] = costs.latency(target, 1).of(choice)
    return [Prediction(name, target.name, q, value, found[q], seconds) for q, value in predicted.items()]


NARROW = """
name = "ic-cortex-m7-40k"
title = "ResNet8 where a camera has left 40 KiB"
target = "stm32f746"
artifact = "pte"

[budgets]
sram = "40 KiB"
flash = "256 KiB"
accuracy_drop = "3 points"
"""


Weights = Annotated[Path, typer.Option(help="of ResNet8")]
Images = Annotated[Path, typer.Option(help="CIFAR-10, a zip of JPEG files")]
Json = Annotated[Path | None, typer.Option("--json")]


@app.command("builds")
def all_builds(
    weights: Weights,
    images: Images,
    profiles: Annotated[list[str] | None, typer.Option("--profile")] = None,
    to: Json = None,
) -> None:
    """Both models for every profile: verdicts, sizes, accuracy, time."""
    names = profiles or [
        n for n in catalog.names("profiles") if catalog.targets_of(catalog.load_profile(n))[0].microcontroller
    ]
    tasks = {"resnet8": _resnet8(weights, images), "ds_cnn": ROOT / "examples" / "keywords"}
    _show([_build(model, task, name) for name in names for model, task in tasks.items()], to)


@app.command()
def narrow(weights: Weights, images: Images, to: Json = None) -> None:
    """A budget of SRAM that int8 alone breaks."""
    with tempfile.TemporaryDirectory(prefix="edgebuild-bench-") as folder:
        profile = Path(folder) / "ic-cortex-m7-40k.toml"
        profile.write_text(NARROW, encoding="utf-8")
        _show([_build("resnet8", _resnet8(weights, images), str(profile))], to)


def _resnet8(weights: Path, images: Path) -> Path:
    for name, path in (("WEIGHTS", weights), ("IMAGES", images)):
        os.environ[f"EDGEBUILD_RESNET8_{name}"] = str(path.resolve())
    return ROOT / "scripts" / "microcontrollers" / "resnet8_task.py"


@dataclass(frozen=True)
class Built:
    """What a report says of a build; `verdicts` in words, `before` those of int8 alone where another plan was built."""

    model: str
    profile: str
    outcome: str
    size: int
    verdicts: dict[str, str]
    before: dict[str, str]
    score: tuple[float, float]
    samples: int
    sqnr_db: float
    widths: tuple[str, ...]
    fallen_back: tuple[str, ...]
    seconds: float


def _build(model: str, task: Path, profile: str) -> Built:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="edgebuild-bench-") as folder:
        made = pipeline.build(
            pipeline.Request(str(task), profile, Path(folder) / "bundle"),
            lambda message, seconds: print(f"  {seconds:7.1f}  {message}", flush=True),
        )
    accuracy, first = made.accuracy, made.rounds[0] if made.rounds else None
    return Built(
        model=model,
        profile=made.profile,
        outcome=made.outcome,
        size=made.size,
        verdicts=_in_words(made.verdicts),
        before=_in_words(first.verdicts) if first and first.plan != made.plan else {},
        score=(accuracy.original, accuracy.artifact) if accuracy else (nan, nan),
        samples=accuracy.samples if accuracy else 0,
        sqnr_db=next((row.sqnr_db for row in made.parity if row.reference.startswith("eager")), nan),
        widths=tuple(f"{w.group} {w.of} -> {w.channels}" for w in made.plan.widths) if made.plan else (),
        fallen_back=tuple(f.what.replace(f"{ROOT}/", "") for f in made.findings if f.kind == "fallback"),
        seconds=round(time.monotonic() - began, 1),
    )


def _in_words(verdicts: Sequence[Verdict]) -> dict[str, str]:
    return {v.kind: f"{figure(v.kind, v.value)} of {figure(v.kind, v.bound)}: {v.status}" for v in verdicts}


def _show(rows: list[Built], to: Path | None) -> None:
    kinds = ("sram", "flash", "latency", "accuracy_drop")
    table = Table("profile", "model", "outcome", *kinds, "accuracy", "SQNR", "time")
    for row in rows:
        said = [row.verdicts.get(kind, "").replace(": pass", "") for kind in kinds]
        scores = f"{row.score[0]:.2%} -> {row.score[1]:.2%}"
        table.add_row(
            row.profile, row.model, row.outcome, *said, scores, f"{row.sqnr_db:.1f} dB", f"{row.seconds:.0f} s"
        )
    Console(width=200).print(table)
    for row in rows:
        if row.before:
            Console(width=200).print(f"{row.profile}: int8 alone: {row.before}; then {', '.join(row.widths)}")
    if to:
        to.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
