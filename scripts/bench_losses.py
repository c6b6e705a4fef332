#!/usr/bin/env python
"""How well the planner's objective, a sum of estimated losses, ranks real plans.

Random plans of widths, forms and precisions are built for real (pruned, factorized, quantized by PT2E), and the KL
divergence of their outputs from the original's, on inputs that the estimates have not seen, is held against the sum.
Without options it takes examples/digits. Another model: --module FILE (a Python file with `load(path) -> Module`, float
images in 0..255 as input), --weights FILE and --images ZIP (of JPEG files in .../train/... and .../test/...).
"""

import argparse
import io
import json
import sys
import time
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from compression import cifar  # noqa: E402

from edgebuild import trials  # noqa: E402
from edgebuild.backends import HOST, xnnpack  # noqa: E402
from edgebuild.base import Base, prepare  # noqa: E402
from edgebuild.compress import compress  # noqa: E402
from edgebuild.divergence import distance  # noqa: E402
from edgebuild.errors import SpecError  # noqa: E402
from edgebuild.lift import lift  # noqa: E402
from edgebuild.load import Loaded, load  # noqa: E402
from edgebuild.plan import checked  # noqa: E402
from edgebuild.spec import Candidate, Cast, Form, Plan, Profile, Technique, Width  # noqa: E402
from edgebuild.task import Task  # noqa: E402
from edgebuild.transforms import quantize  # noqa: E402

MIXES: tuple[tuple[Technique, ...], ...] = (
    ("prune",),
    ("factorize",),
    ("quantize",),
    ("prune", "factorize"),
    ("prune", "quantize"),
    ("factorize", "quantize"),
    ("prune", "factorize", "quantize"),
    ("prune", "factorize", "quantize"),
)
HELD_OUT = 64
WORST = 0.03  # nats of one change; what no sensible plan holds would outweigh all the rest of a random one


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    loaded, held_out = images_of(options) if options.module else digits()
    profile = Profile("bench", "bench", "host", "pte", (), seed=options.seed)
    model = lift(loaded.task.model, loaded.task.example_inputs)
    began = time.process_time()
    base = prepare(loaded.name, model, loaded, profile, HOST, "", True)
    seconds = time.process_time() - began
    scales = trials.scales(base.trials)
    rng = np.random.default_rng(options.seed)
    rows = []
    for i in range(options.plans):
        plan = draw(base, MIXES[i % len(MIXES)], rng)
        after = sum(candidate.loss for candidate in plan)
        before = sum(candidate.loss / scales.get(trials.technique(candidate), 1.0) for candidate in plan)
        real = build(base, plan, loaded, held_out)
        mix = "+".join(sorted({trials.technique(candidate) for candidate in plan})) or "nothing"
        rows.append({"mix": mix, "changes": len(plan), "before": before, "after": after, "real": real})
        print(f"{mix:28} {len(plan):3} changes  estimated {before:9.3g} {after:9.3g}  real {real:9.3g}", flush=True)
    parts = {name: [row for row in rows if row["mix"] == name] for name in sorted({row["mix"] for row in rows})}
    summary = {
        "model": loaded.name,
        "plans": len(rows),
        "prepare_cpu_seconds": round(seconds, 1),
        "scales": scales,
        "trials": [vars(trial) for trial in base.trials],
        "spearman": {name: correlation(part) for name, part in {"all": rows, **parts}.items()},
        "rows": rows,
    }
    print(f"\n{loaded.name}: prepared in {seconds:.1f} s of CPU, scales", {k: round(v, 2) for k, v in scales.items()})
    print(f"{'Spearman rank correlation':28} {'plans':>5} {'before':>8} {'after':>8} calibration")
    for name, found in summary["spearman"].items():
        print(f"{name:28} {found['plans']:5} {found['before']:8.3f} {found['after']:8.3f}")
    if options.json:
        options.json.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--module", type=Path, help="a Python file with load(path) -> Module")
    parser.add_argument("--weights", type=Path, help="what its load() reads")
    parser.add_argument("--images", type=Path, help="a zip of JPEG files")
    parser.add_argument("--plans", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    if options.module and not (options.weights and options.images):
        parser.error("--module needs --weights and --images")
    return options


def digits() -> tuple[Loaded, Tensor]:
    loaded = load(str(ROOT / "examples/digits"))
    shown: list[Tensor] = []
    assert loaded.task.evaluate is not None and isinstance(loaded.task.model, torch.nn.Module)
    model = loaded.task.model
    loaded.task.evaluate(lambda x: (shown.append(x), model(x))[1])  # its test images are nowhere else to be had
    return loaded, torch.cat(shown)[:HELD_OUT]


def images_of(options: argparse.Namespace) -> tuple[Loaded, Tensor]:
    with zipfile.ZipFile(options.images) as archive:
        seen, held_out = (read(archive, part, count) for part, count in (("/train/", 128), ("/test/", HELD_OUT)))
    task = Task(cifar.load(options.module, options.weights), (seen[:1],), (seen,))
    return Loaded(options.module.stem, task, tuple((x,) for x in seen.split(1)), ""), held_out


def read(archive: zipfile.ZipFile, part: str, count: int) -> Tensor:
    """Images picked at random but always the same, float [count, 3, height, width] in 0..255."""
    from PIL import Image

    names = sorted(name for name in archive.namelist() if part in name and name.endswith(".jpg"))
    picked = np.random.RandomState(0).permutation(len(names))[:count]
    images = [Image.open(io.BytesIO(archive.read(names[i]))).convert("RGB") for i in picked]
    return torch.stack([torch.from_numpy(np.array(x, dtype=np.float32)).permute(2, 0, 1) for x in images])


def _sound(base: Base, plan: Plan) -> bool:
    """Whether every form still fits its layer at the plan's widths."""
    try:
        checked(base.facts, plan)
    except SpecError:
        return False
    return True


def draw(base: Base, mix: Sequence[Technique], rng: np.random.Generator) -> tuple[Candidate, ...]:
    """A random plan: how much of the model changes and how far it may go are drawn first, so that severities spread."""
    places: dict[tuple[Technique, str], list[Candidate]] = {}
    for candidate in base.candidates:
        if candidate.loss > WORST:
            continue
        places.setdefault((trials.technique(candidate), trials.place(candidate)), []).append(candidate)
    while True:
        share, depth = rng.uniform(0.2, 1.0), rng.uniform(0.2, 0.8)
        chosen: list[Candidate] = []
        for (technique, place), found in places.items():
            # the quantizer is asked by layer: an operator without weights is in int8 wherever the model is quantized
            always = technique == "quantize" and not base.facts.layer(place).weighted
            mildest = sorted(found, key=lambda candidate: candidate.loss)[: max(1, round(depth * len(found)))]
            changes, which = rng.random() < share, int(rng.integers(len(mildest)))
            if technique in mix and (changes or always):
                chosen.append(mildest[which])
        if chosen and _sound(base, plan_of(chosen)):
            return tuple(chosen)


def plan_of(chosen: Sequence[Candidate]) -> Plan:
    choices = [candidate.choice for candidate in chosen]
    return Plan(
        widths=tuple(choice for choice in choices if isinstance(choice, Width)),
        forms=tuple(choice for choice in choices if isinstance(choice, Form)),
    )


def build(base: Base, plan: Sequence[Candidate], loaded: Loaded, held_out: Tensor) -> float:
    """The KL divergence (nats) of the plan's model from the original."""
    inputs, forms = loaded.task.example_inputs, plan_of(plan).forms
    model = base.model
    for _, changed in compress(base, plan_of(plan), loaded):
        model = changed
    cast = {candidate.choice.layer for candidate in plan if isinstance(candidate.choice, Cast)}
    if cast:
        kept = {layer.name for layer in base.facts.layers if layer.weighted} - cast
        kept |= {f"{form.layer}.{i}" for form in forms if form.layer in kept for i in range(3)}
        model = quantize.apply(model, inputs, loaded.samples[:32], xnnpack.quantizer(tuple(sorted(kept)))).model
    return distance(base.model, model, [(x,) for x in held_out.split(1)], loaded.task.outputs == "logits")


def correlation(rows: Sequence[dict]) -> dict[str, float]:
    real = [row["real"] for row in rows]
    found = {name: float(spearmanr([row[name] for row in rows], real)[0]) for name in ("before", "after")}
    return {"plans": len(rows), **found}


if __name__ == "__main__":
    main()
