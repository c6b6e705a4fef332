"""What is said of microcontrollers, held against what was planned and built; tables, and JSON beside them.

bench_microcontrollers.py predictions [--json FILE]     SRAM, flash and cycles of ten models, before and after
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from microcontrollers.models import MODELS  # noqa: E402

from edgebuild import arena, backends, catalog, costs  # noqa: E402
from edgebuild.analyse import analyse  # noqa: E402
from edgebuild.devices import DEVICES, as_file  # noqa: E402
from edgebuild.lift import lift  # noqa: E402
from edgebuild.plan import Choice  # noqa: E402
from edgebuild.spec import Target  # noqa: E402
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


if __name__ == "__main__":
    app()
