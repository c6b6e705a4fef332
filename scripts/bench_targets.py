"""Plans one task for several targets, each with the same share of its own latency, and says why the plans differ.

    python scripts/bench_targets.py [TASK] [--targets NAME NAME ...] [--share 0.6] [--json FILE]

The budget is the share of what the whole int8 model is predicted to take on a target, so that a faster phone has no
easier job. Only pruning is left to the planner: widths are easy to compare. Each plan is also priced on the other
targets, as a share of the whole model there.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from edgebuild import catalog, costs, pipeline
from edgebuild.backends import HOST
from edgebuild.base import Base, prepare
from edgebuild.devices import DEVICES, layer_model
from edgebuild.lift import lift
from edgebuild.load import load
from edgebuild.plan import Choice
from edgebuild.propose import Planner, propose
from edgebuild.spec import Budget, Profile, Target

ROOT = Path(__file__).parent.parent


def planned(base: Base, profile: Profile, target: Target, share: float) -> Choice | None:
    """What the planner chooses within a share of the whole int8 model's latency on the target."""
    whole = costs.latency(target, profile.threads).of(Choice(base.facts, "int8"))
    wanted = replace(profile, target=target.name, budgets=(Budget("latency", share * whole),))
    found, _ = propose(Planner(base, wanted, (target,), {}, base.candidates), ())
    return found.choice if found else None


def shares(base: Base, target: Target, threads: int) -> dict[str, float]:
    """The share of each kind of layer in the int8 model's time on a target."""
    layers = Choice(base.facts, "int8").layers()
    seconds = DEVICES[target.device].layer_latencies(layers, target, threads)
    found: dict[str, float] = {}
    for (layer, _), taken in zip(layers, seconds, strict=True):
        found[layer_model.kind(layer)] = found.get(layer_model.kind(layer), 0.0) + float(taken / seconds.sum())
    return found


def show(base: Base, plans: Mapping[str, Choice], targets: Sequence[Target], threads: int) -> None:
    heads = "".join(f" {target.name:>20}" for target in targets)
    print(f"{'share of the int8 time':44}{heads}")
    kinds = {target.name: shares(base, target, threads) for target in targets}
    for kind in sorted({kind for found in kinds.values() for kind in found}):
        print(f"{kind:44}" + "".join(f" {kinds[target.name].get(kind, 0.0):>20.1%}" for target in targets))
    print(f"\n{'planned width for':44}{heads}")
    for group in base.facts.groups:
        kept = [plans[target.name].channels(group) for target in targets]
        if set(kept) != {group.channels}:
            differs = "  <-" if len(set(kept)) > 1 else ""
            print(f"{f'{group.name} ({group.channels})':44}" + "".join(f" {width:>20}" for width in kept) + differs)
    print(f"\n{'plan for, priced on':44}{heads}")
    for name, choice in plans.items():
        cells = []
        for target in targets:
            cost = costs.latency(target, threads)
            cells.append(f" {cost.of(choice) / cost.of(Choice(base.facts, 'int8')):>20.1%}")
        print(f"{name:44}" + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default=str(ROOT / "examples" / "digits"))
    parser.add_argument("--targets", nargs="+", default=("raspberry-pi-4", "pixel-7"))
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    targets = [catalog.load_target(name) for name in chosen.targets]
    loaded = load(chosen.task)
    profile = Profile(
        "share", "a share of the latency", targets[0].name, "pte", (), threads=chosen.threads,
        techniques=("quantize", "prune"),
    )  # fmt: skip
    model = lift(loaded.task.model, loaded.task.example_inputs)
    base = prepare("model", model, loaded, profile, HOST, pipeline.inputs_digest(loaded), fresh=False)
    costs.warm_up(targets, chosen.threads, base.facts)
    plans = {}
    for target in targets:
        choice = planned(base, profile, target, chosen.share)
        if choice is None:
            raise SystemExit(f"no plan for {target.name} within {chosen.share:.0%} of the int8 model's latency")
        plans[target.name] = choice
    show(base, plans, targets, chosen.threads)
    if chosen.json:
        chosen.json.write_text(json.dumps({name: dict(choice.widths) for name, choice in plans.items()}, indent=1))


if __name__ == "__main__":
    main()
