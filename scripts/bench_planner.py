#!/usr/bin/env python
"""The planner on real models: its programs, its predictions, and its plans against simpler ways to choose.

    scripts/bench_planner.py models [--json FILE] [NAME ...]
    scripts/bench_planner.py methods --module M --weights W --images ZIP [--steps N] [--json FILE]

`models` builds plans for the digits example, torchvision models with random weights and (given --module and --weights)
a CIFAR-10 ResNet-20: solver time, size of the program, gap, and predicted against measured size and host latency.
`methods` takes three latency budgets on the ResNet-20, 1/2, 1/4 and 1/8 of the fp32 artifact's, and builds for each
the plan, uniform pruning, quantization alone and a greedy search over the same candidates, with the same distillation.
"""

import argparse
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from hashlib import blake2b
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from edgebuild import catalog, costs, pipeline
from edgebuild.attempt import Attempt, Original, carry_out, take_original
from edgebuild.backends import HOST
from edgebuild.base import Base, prepare
from edgebuild.clock import Clock
from edgebuild.lift import lift
from edgebuild.load import Loaded, load
from edgebuild.loop import corrected, first_factors
from edgebuild.plan import Choice, to_plan
from edgebuild.propose import Planner, Proposal, proposal, propose, start
from edgebuild.space import Limit, Space
from edgebuild.spec import Budget, Distillation, Profile
from edgebuild.task import Task
from edgebuild.transforms.prune import widths
from edgebuild.vision import import_torchvision

ROOT = Path(__file__).parent.parent
TORCHVISION = ("mobilenet_v2", "mobilenet_v3_small", "resnet18", "efficientnet_b0")
SHARES = (0.7, 0.4)  # of the int8 artifact's size and latency
FRACTIONS = (2, 4, 8)  # of the fp32 artifact's latency
DRAFTS = 6
CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("models", "methods"))
    parser.add_argument("names", nargs="*", help="models: which ones")
    parser.add_argument("--module", type=Path, help="Python file with load(weights), a CIFAR-10 network")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", type=Path, help="zip with {train,test}/CLASS/*.jpg in a folder")
    parser.add_argument("--steps", type=int, default=300, help="of distillation, for each method")
    parser.add_argument("--fractions", type=int, nargs="*", default=FRACTIONS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_intermixed_args()
    rows = models(options) if options.what == "models" else methods(options)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- models


def models(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One build without training for each model and share."""
    known = ["digits", *(["resnet20"] if options.module else []), *TORCHVISION]
    rows: list[dict[str, Any]] = []
    for name in options.names or known:
        loaded = _loaded(name, options)
        for row in _model(name, loaded):
            rows.append(row)
            _print(rows)
    for which, kinds in (
        ("first plan", ("first size", "first latency")),
        ("plan built", ("size error", "latency error")),
    ):
        size, latency = ([abs(row[kind]) for row in rows] for kind in kinds)
        print(
            f"{which}: size within 2% in {sum(error <= 0.02 for error in size)} of {len(rows)}, "
            f"latency within 10% in {sum(error <= 0.10 for error in latency)} of {len(rows)}"
        )
    return rows


def _loaded(name: str, options: argparse.Namespace) -> Loaded:
    if name == "digits":
        return load(str(ROOT / "examples" / "digits"))
    generator = torch.Generator().manual_seed(0)
    if name == "resnet20":
        images = torch.rand(64, 3, 32, 32, generator=generator) * 255
        if options.images:
            images = _split(options.images, "train", 64)[0]
        task = Task(_module(options.module).load(str(options.weights)), (images[:1],), images.split(32))
    else:
        torch.manual_seed(0)
        model = import_torchvision().models.get_model(name, weights=None).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # else all biases are 0, and equal constants are stored once
                module.bias.data.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
        images = torch.randn(16, 3, 224, 224, generator=generator)
        task = Task(model, (images[:1],), [images])
    samples = tuple((image.unsqueeze(0),) for image in images)
    return Loaded(name, task, samples, name)


def _model(name: str, loaded: Loaded) -> Iterator[dict[str, Any]]:
    budgets = (Budget("size", 1.0), Budget("latency", 1.0))
    profile = Profile("bench", "", "host", "pte", budgets, techniques=("quantize", "prune", "factorize"))
    clock = Clock(_tell)
    base, original, planner, whole = _begin(name, loaded, profile, clock)
    found = {verdict.kind: verdict.value or 0.0 for verdict in whole.verdicts}
    for share in SHARES:
        asked = tuple(Budget(budget.kind, share * found[budget.kind]) for budget in budgets)
        asking = replace(planner, profile=replace(profile, budgets=asked))
        tried: list[Proposal] = []
        errors: list[dict[str, float]] = []
        while True:  # as a build goes on: until what was measured is within the budgets
            proposed, solve = propose(asking, tried)
            if proposed is None:
                print(f"{name} at {share}: {solve.status}")
                break
            tried.append(proposed)
            attempt = carry_out(asking, proposed, original, loaded, clock, draft=True)
            errors.append({v.kind: (v.predicted or 0.0) / (v.value or 1.0) - 1 for v in attempt.verdicts})
            if not attempt.failed or len(tried) == DRAFTS:
                break
            asking = corrected(asking, attempt)
        if not errors:
            continue
        first, last = errors[0], errors[-1]
        yield {
            "model": name,
            "share": share,
            **{key: value for key, value in asdict(tried[0].solve or solve).items()},
            "plans": len(tried),
            "first size": first["size"],
            "first latency": first["latency"],
            "size error": last["size"],
            "latency error": last["latency"],
            "latency": next(v.value for v in attempt.verdicts if v.kind == "latency"),
            "size": len(attempt.built.artifact.data),
            "met": not attempt.failed,
            "techniques": " ".join(attempt.proposal.plan.techniques),
        }


def _begin(name: str, loaded: Loaded, profile: Profile, clock: Clock) -> tuple[Base, Original, Planner, Attempt]:
    """Analyse, measure the original and its int8 artifact, correct the planner by both."""
    targets = catalog.targets_of(profile)[:1]
    model = lift(loaded.task.model, loaded.task.example_inputs)
    with clock.stage("analyse", f"analysing {name}"):
        base = prepare("model", model, loaded, profile, HOST, pipeline.inputs_digest(loaded), fresh=False)
    costs.warm_up(targets, profile.threads, base.facts)
    original = take_original(base, loaded, profile, targets, clock)
    planner = Planner(base, profile, targets, {}, base.candidates)
    planner = replace(planner, factors=first_factors(planner, original))
    whole = carry_out(planner, start(planner), original, loaded, clock, draft=False)
    return base, original, corrected(planner, whole), whole


# ------------------------------------------------------------------------------------------------------- methods


Choose = Callable[[Planner, Sequence[Proposal]], Choice | None]


def methods(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy of the artifacts that each method builds within the same latency."""
    train, test = _split(options.images, "train"), _split(options.images, "test")
    task = Task(
        model=_module(options.module).load(str(options.weights)),
        example_inputs=(train[0][:1],),
        calibration=train[0][:128].split(32),
        train=lambda: _batches(*train),
        labelled=True,
        evaluate=lambda predict: _accuracy(predict, *test),
    )
    loaded = Loaded("resnet20", task, tuple((image.unsqueeze(0),) for image in train[0][:128]), "resnet20")
    distillation = Distillation(steps=options.steps)
    budgets = (Budget("latency", 1.0),)
    profile = Profile("bench", "", "host", "pte", budgets, distillation=distillation)
    clock = Clock(_tell)
    _, original, planner, whole = _begin("resnet20", loaded, profile, clock)
    original = replace(original, model=Remembering(original.model))  # type: ignore[arg-type]
    fp32 = next(m.value for m in original.measurements if m.quantity == "latency")
    assert original.score is not None and whole.accuracy is not None
    size = len(original.built.artifact.data)
    rows: list[dict[str, Any]] = [
        {"method": "fp32", "budget": "", "latency": fp32, "size": size, "accuracy": original.score[0]}
    ]
    chosen: dict[str, Choose] = {"planned": planned, "uniform": uniform, "greedy": greedy}
    quantized = _row("quantize only", "", whole, fp32)
    rows.append({**quantized, "fits": [f"1/{n}" for n in FRACTIONS if quantized["latency"] <= fp32 / n]})
    for fraction in options.fractions:
        asking = replace(planner, profile=replace(profile, budgets=(Budget("latency", fp32 / fraction),)))
        for method, choose in chosen.items():
            attempt = _within(asking, choose, original, loaded, clock)
            budget = f"1/{fraction}"
            rows.append(_row(method, budget, attempt, fp32) if attempt else {"method": method, "budget": budget})
            _print(rows)
            if options.json:
                options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return rows


def _within(planner: Planner, choose: Choose, original: Original, loaded: Loaded, clock: Clock) -> Attempt | None:
    """The method's choice, drafted and corrected until its measured latency is within the budget, then trained."""
    tried: list[Proposal] = []
    for _ in range(DRAFTS):
        choice = choose(planner, tried)
        if choice is None:
            return None
        cut = bool(choice.widths or choice.forms)  # int8 alone needs no training, whoever chose it
        steps = planner.profile.distillation.steps if cut else 0
        proposed = proposal(planner, to_plan(choice, distil=cut, distil_steps=steps))
        tried.append(proposed)
        draft = carry_out(planner, proposed, original, loaded, clock, draft=True)
        if not draft.failed:
            return carry_out(planner, proposed, original, loaded, clock, draft=False)
        planner = replace(corrected(planner, draft), candidates=planner.candidates)
    return None


def planned(planner: Planner, tried: Sequence[Proposal]) -> Choice | None:
    """The integer program's."""
    proposed, _ = propose(planner, tried)
    return proposed.choice if proposed else None


def uniform(planner: Planner, tried: Sequence[Proposal]) -> Choice | None:
    """Every group cut to the same share, the largest that fits; widths as fine as the planner's."""
    whole = Choice(planner.base.facts, planner.precision)
    found = None
    for share in np.linspace(0.125, 1, 141):
        cut = {}
        for group in planner.base.facts.groups:
            allowed = [group.channels, *widths(group.channels, 8)]
            nearest = min(allowed, key=lambda width: abs(width - share * group.channels))
            if nearest < group.channels:
                cut[group.name] = nearest
        choice = replace(whole, widths=cut)
        done = any(proposed.choice == choice for proposed in tried)
        if not done and all(limit.predicted(choice) <= limit.bound for limit in planner.limits):
            found = choice
    return found


def greedy(planner: Planner, tried: Sequence[Proposal]) -> Choice | None:
    """Step by step the change that saves most for each nat, then whatever was not needed given back."""
    limits = planner.limits
    points, _ = planner.space(limits)
    choice = points.whole
    while not all(limit.holds(choice) for limit in limits) or any(proposed.choice == choice for proposed in tried):
        steps = [(_worth(choice, after, points, limits), i, after) for i, after in enumerate(_steps(choice, points))]
        best = max(steps, key=lambda step: step[:2], default=None)
        if best is None or best[0] <= 0:
            return None
        choice = best[2]
    improved = True
    while improved:
        improved = False
        for after in sorted(_back(choice, points), key=points.loss):
            fits = all(limit.holds(after) for limit in limits)
            if points.loss(after) < points.loss(choice) and fits and all(p.choice != after for p in tried):
                choice, improved = after, True
                break
    return choice


def _steps(choice: Choice, points: Space) -> Iterator[Choice]:
    for name, levels in points.widths.items():
        now = choice.widths.get(name, levels[0][0])
        narrower = [width for width, _ in levels if width < now]
        if narrower:
            yield replace(choice, widths={**choice.widths, name: max(narrower)})
    for name, options in points.options.items():
        for option in options:
            if option.form and option.precision == points.precision and option.form != choice.forms.get(name):
                after = replace(choice, forms={**choice.forms, name: option.form})
                if all(rank < 1 + bound for rank, bound in zip(option.form.ranks, _bounds(after, name), strict=True)):
                    yield after


def _bounds(choice: Choice, name: str) -> tuple[int, ...]:
    from edgebuild.plan import rank_bounds

    dense = replace(choice, forms={})
    layer = next(layer for layer, _ in dense.layers() if layer.name == name)
    return rank_bounds(layer, choice.forms[name])


def _back(choice: Choice, points: Space) -> Iterator[Choice]:
    for name in choice.forms:
        yield replace(choice, forms={k: v for k, v in choice.forms.items() if k != name})
    for name, width in choice.widths.items():
        wider = min((w for w, _ in points.widths[name] if w > width))
        whole = points.widths[name][0][0]
        kept = {k: v for k, v in choice.widths.items() if k != name}
        yield replace(choice, widths=kept if wider == whole else {**kept, name: wider})


def _worth(before: Choice, after: Choice, points: Space, limits: Sequence[Limit]) -> float:
    gain = 0.0
    for limit in limits:
        now = limit.predicted(before)
        lack = now - limit.bound
        if lack > 0:
            gain += max(-1.0, min(1.0, (now - limit.predicted(after)) / lack))
    return gain / max(points.loss(after) - points.loss(before), 1e-9)


def _row(method: str, budget: str, attempt: Attempt, fp32: float) -> dict[str, Any]:
    latency = next(m.value for m in attempt.measurements if (m.quantity, m.target) == ("latency", "host"))
    plan = attempt.proposal.plan
    return {
        "method": method,
        "budget": budget,
        "latency": latency,
        "faster": fp32 / latency,
        "size": len(attempt.built.artifact.data),
        "accuracy": attempt.accuracy.artifact if attempt.accuracy else None,
        "estimated loss": attempt.proposal.total_loss,
        "loss": attempt.built.loss,
        "training": attempt.built.training,
        "widths": {width.group: width.channels for width in plan.widths},
        "forms": [asdict(form) for form in plan.forms],
        "keep_fp32": list(plan.keep_fp32),
    }


class Remembering(torch.nn.Module):
    """The teacher, whose outputs are computed once: every method sees the same batches."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.known: dict[bytes, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = blake2b(x.numpy().tobytes()).digest()
        if key not in self.known:
            self.known[key] = self.model(x)
        return self.known[key]


# ---------------------------------------------------------------------------------------------------------- data


def _module(path: Path) -> Any:
    spec = spec_from_file_location("bench_model", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _split(archive: Path, part: str, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Images as uint8-valued float [n, 3, 32, 32] and labels, shuffled by a fixed seed."""
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if f"/{part}/" in name and name.endswith(".jpg"))
        classes = sorted({Path(name).parent.name for name in names})
        names = [names[i] for i in np.random.RandomState(0).permutation(len(names))][:most]
        pixels = [np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float()
    return images, torch.tensor([classes.index(Path(name).parent.name) for name in names])


def _batches(images: Tensor, labels: Tensor, size: int = 128) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches with random flips and shifts by up to 4 pixels."""
    generator = torch.Generator().manual_seed(1)
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    for chosen in torch.randperm(len(images), generator=generator).split(size):
        y, x = torch.randint(0, 9, (2,), generator=generator).tolist()
        batch = padded[chosen, :, y : y + 32, x : x + 32]
        flipped = torch.rand(len(chosen), generator=generator) < 0.5
        yield torch.where(flipped[:, None, None, None], batch.flip(3), batch), labels[chosen]


def _accuracy(predict: Callable[..., Tensor], images: Tensor, labels: Tensor) -> float:
    pairs = zip(images.split(500), labels.split(500), strict=True)
    return sum(int((predict(x).argmax(1) == y).sum()) for x, y in pairs) / len(labels)


# -------------------------------------------------------------------------------------------------------- output


def _tell(message: str, seconds: float) -> None:
    print(f"[{seconds:7.1f} s] {message}", flush=True)


def _print(rows: Sequence[dict[str, Any]]) -> None:
    hidden = ("widths", "forms", "training", "keep_fp32")
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key not in hidden]
    table = Table(*columns, box=None)
    for row in rows:
        cells = (row.get(key, "") for key in columns)
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
