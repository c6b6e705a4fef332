"""Holds the planner's prediction for simulated targets, the call and the sum over the layers, against whole models.

    python scripts/bench_layer_costs.py [--models NAME ...] [--targets NAME ...] [--threads N] [--resnet20 FILE.py]
        [--kept FOLDER] [--json FILE]
    python scripts/bench_layer_costs.py --plans [--models NAME] --targets ONE OTHER

The first form simulates each model as it was lowered; the names are those of scripts/bench_host_costs.py. The second
shows what pruning is worth on two targets: where the time of the int8 model goes, and which channel groups, at half
their width, save most of it per parameter lost.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from bench_host_costs import make, programs

from edgebuild import catalog, costs
from edgebuild.analyse import analyse
from edgebuild.devices import arm, layer_model, simulator
from edgebuild.lift import lift
from edgebuild.plan import Choice
from edgebuild.spec import PRECISIONS, ModelFacts, Precision, Target

MODELS = (
    "digits", "resnet20-16", "squeezenet1_1", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
    "shufflenet_v2_x1_0", "efficientnet_b0", "resnet18",
)  # fmt: skip
TARGETS = ("raspberry-pi-4", "pixel-7")


@dataclass(frozen=True)
class Row:
    """Seconds of an inference, by the planner and by the simulation of the whole model."""

    target: str
    model: str
    precision: Precision
    predicted: float
    simulated: float

    @property
    def error(self) -> float:
        return self.predicted / self.simulated - 1


def rows(name: str, targets: list[Target], chosen: argparse.Namespace) -> list[Row]:
    facts, _, paths = programs(name, chosen.resnet20, chosen.kept)
    found = []
    for target in targets:
        costs.warm_up([target], chosen.threads, facts)
        for precision in PRECISIONS:
            predicted = costs.latency(target, chosen.threads).of(Choice(facts, precision))
            whole = simulator.simulate(paths[precision], target, chosen.threads).seconds
            found.append(Row(target.name, name, precision, predicted, whole))
            show(found[-1])
    return found


def show(row: Row) -> None:
    times = f"{row.predicted * 1e3:8.3f} ms {row.simulated * 1e3:8.3f} ms"
    print(f"{row.target:20} {row.model:20} {row.precision:5} {times} {row.error:+7.1%}", flush=True)


def summary(found: list[Row]) -> None:
    for target in dict.fromkeys(row.target for row in found):
        errors = [abs(row.error) for row in found if row.target == target]
        near = sum(error <= 0.1 for error in errors)
        print(
            f"{target}: median error {np.median(errors):.1%}, worst {max(errors):.1%}, "
            f"{near} of {len(errors)} within 10%"
        )


def compare(name: str, targets: list[Target], chosen: argparse.Namespace) -> None:
    """Where the time of a model's int8 layers goes on each target, and what halving a channel group saves there."""
    made, x = make(name, chosen.resnet20)
    facts = analyse(lift(made, (x,)), (x,))
    costs.warm_up(targets, chosen.threads, facts)
    ranks: list[list[str]] = []
    gains: list[dict[str, float]] = []
    for target in targets:
        layers = Choice(facts, "int8").layers()
        seconds = arm.layer_latencies(layers, target, chosen.threads)
        kinds: dict[str, float] = {}
        for (layer, _), taken in zip(layers, seconds, strict=True):
            kinds[layer_model.kind(layer)] = kinds.get(layer_model.kind(layer), 0.0) + float(taken) / sum(seconds)
        parts = ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(kinds.items(), key=lambda i: -i[1])[:5])
        print(f"{target.name}: {sum(seconds) * 1e3:.2f} ms: {parts}")
        gains.append(_gains(facts, target, chosen.threads))
        ranks.append(sorted(gains[-1], key=lambda group: -gains[-1][group])[:10])
    print(f"\n{'saved at half the width, per 1000 parameters':44}" + "".join(f" {t.name:>22}" for t in targets))
    for group in dict.fromkeys(name for rank in ranks for name in rank):
        cells = [
            f"{gain[group] * 100:.3f}% ({f'#{rank.index(group) + 1}' if group in rank else '-'})"
            for gain, rank in zip(gains, ranks, strict=True)
        ]
        print(f"{group:44}" + "".join(f" {cell:>22}" for cell in cells))


def _gains(facts: ModelFacts, target: Target, threads: int) -> dict[str, float]:
    """By channel group, the share of the latency saved by half its width, for 1000 parameters taken away."""
    cost = costs.latency(target, threads)
    whole = Choice(facts, "int8")
    before, size = cost.of(whole), sum(layer.parameters for layer, _ in whole.layers())
    found = {}
    for group in facts.groups:
        halved = Choice(facts, "int8", widths={group.name: group.channels // 2})
        lost = size - sum(layer.parameters for layer, _ in halved.layers())
        found[group.name] = (1 - cost.of(halved) / before) / (lost / 1000)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plans", action="store_true", help="compare what pruning is worth on two targets")
    parser.add_argument("--resnet20", type=Path, help="a file with the class ResNet20")
    parser.add_argument("--kept", type=Path, default=Path("bench-programs"), help="where programs are kept")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.kept.mkdir(parents=True, exist_ok=True)
    targets = [catalog.load_target(name) for name in chosen.targets]
    if chosen.plans:
        for name in chosen.models or ["mobilenet_v2"]:
            compare(name, targets, chosen)
        return
    names = chosen.models or [name for name in MODELS if chosen.resnet20 or not name.startswith("resnet20")]
    found = [row for name in names for row in rows(name, targets, chosen)]
    summary(found)
    if chosen.json:
        chosen.json.write_text(json.dumps([{**asdict(row), "error": row.error} for row in found], indent=1))


if __name__ == "__main__":
    main()
