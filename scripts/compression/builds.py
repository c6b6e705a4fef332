"""Builds for the experiments, by edgebuild itself, and what their reports say."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

from edgebuild import pipeline
from edgebuild.spec import Report, Technique

HERE = Path(__file__).parent
ONCE = 'time = "3 h"\nrounds = 2'  # of a profile: int8 alone, then a plan that is trained once


@dataclass(frozen=True)
class Row:
    """One build: how many times smaller and faster than the original's fp32 `.pte` in the same run, host, 1 thread.

    `original` and `score` are accuracies, `lost` points; `seconds` by stage.
    """

    name: str
    outcome: str
    size: int
    smaller: float
    latency: float
    faster: float
    original: float
    score: float
    lost: float
    interval: tuple[float, float] | None
    techniques: tuple[str, ...]
    training: str
    steps: int
    rounds: int
    seconds: Mapping[str, float]
    parity: tuple[tuple[str, float, float | None], ...]


def build(
    name: str,
    task: Path,
    budgets: Mapping[str, str],
    training: str = "",
    techniques: tuple[Technique, ...] = (),
    extra: str = "",
    artifact: Path | None = None,
) -> Row:
    """Build a task for a profile made of budgets; `training` is how long each training is: "15 min" or "400 steps".

    The `.pte` is kept as `artifact`, where that is given.
    """
    lines = [f'name = "{name}"', f'title = "{name}"', 'target = "host"', 'artifact = "pte"', "threads = 1", extra]
    if techniques:
        lines.append(f"techniques = {json.dumps(techniques)}")
    lines += ["[budgets]", *(f'{key} = "{value}"' for key, value in budgets.items())]
    if training:
        count, _, unit = training.partition(" ")
        length = [f"steps = {count}", 'time = "3 h"'] if unit == "steps" else [f'time = "{training}"']
        lines += ["[distillation]", *length]
    with tempfile.TemporaryDirectory(prefix="edgebuild-bench-") as folder:
        profile = Path(folder) / f"{name}.toml"
        profile.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return run(name, task, profile, artifact)


def run(name: str, task: Path, profile: Path, artifact: Path | None = None) -> Row:
    """Build a task for a profile, and keep the `.pte` as `artifact`, where that is given."""
    with tempfile.TemporaryDirectory(prefix="edgebuild-bench-") as folder:
        request = pipeline.Request(str(task), str(profile), Path(folder) / "bundle")
        began = time.monotonic()
        report = pipeline.build(request, lambda message, seconds: print(f"  {seconds:7.1f}  {message}", flush=True))
        if artifact is not None:
            (made,) = request.output.glob("*.pte")
            shutil.copyfile(made, artifact)
        return row(name, report, time.monotonic() - began)


def example(name: str) -> list[Row]:
    """An example of the repository, built for each of its profiles."""
    folder = HERE.parent.parent / "examples" / name
    return [run(profile.stem, folder, profile) for profile in sorted((folder / "profiles").glob("*.toml"))]


def row(name: str, report: Report, seconds: float) -> Row:
    """What a report says, on the host."""
    before, after = (
        next((m.value for m in found if m.quantity == "latency" and m.target == "host"), float("nan"))
        for found in (report.original_measurements, report.measurements)
    )
    accuracy, last = report.accuracy, report.rounds[-1] if report.rounds else None
    return Row(
        name=name,
        outcome=report.outcome,
        size=report.size,
        smaller=report.original_size / report.size if report.size else 0.0,
        latency=after,
        faster=before / after,
        original=accuracy.original if accuracy else float("nan"),
        score=accuracy.artifact if accuracy else float("nan"),
        lost=100 * accuracy.drop if accuracy else float("nan"),
        interval=accuracy.artifact_interval if accuracy else None,
        techniques=tuple(report.plan.techniques) if report.plan else (),
        training=next((r.training for r in report.rounds if r.plan == report.plan), last.training if last else ""),
        steps=report.plan.distil_steps if report.plan else 0,
        rounds=len(report.rounds),
        seconds={**report.stages, "all": round(seconds, 1)},
        parity=tuple((p.reference, p.sqnr_db, p.agreement) for p in report.parity if p.target == "host"),
    )


def cifar(model: Path, weights: Path, images: Path) -> Path:
    """The CIFAR-10 task, told where its files are."""
    for name, path in (("MODEL", model), ("WEIGHTS", weights), ("IMAGES", images)):
        os.environ[f"EDGEBUILD_CIFAR_{name}"] = str(path.resolve())
    return HERE / "cifar_task.py"


def table(rows: list[Row]) -> str:
    """Rows as a Markdown table."""
    lines = [
        "| build | outcome | size | smaller | latency | faster | accuracy | lost | techniques | time |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        if not r.size:  # nothing was built
            lines.append(f"| {r.name} | {r.outcome} |" + " |" * 7 + f" {r.seconds['all'] / 60:.1f} min |")
            continue
        lines.append(
            f"| {r.name} | {r.outcome} | {r.size:,} B | {r.smaller:.1f}x | {1e3 * r.latency:.3g} ms | {r.faster:.1f}x "
            f"| {r.score:.2%} | {r.lost:+.2f} | {', '.join(r.techniques)} | {r.seconds['all'] / 60:.1f} min |"
        )
    return "\n".join(lines)


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows for a JSON file, which has no word for what is not a number: null."""
    return [{k: None if isinstance(v, float) and isnan(v) else v for k, v in asdict(r).items()} for r in rows]
