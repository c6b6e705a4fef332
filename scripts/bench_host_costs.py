"""Holds the host's cost model against whole models: predicted and measured latency, one thread.

    python scripts/bench_host_costs.py [MODEL ...] [--resnet20 FILE.py] [--kept FOLDER] [--json FILE]

A MODEL is a name of torchvision, `digits` (the network of examples/digits) or, with --resnet20, `resnet20-WIDTHS`: one
base width or, separated by commas, that of each of the three stages and, behind a colon, the inner widths of the
blocks as a share of them in percent. A model is also rated by its shape: predicted and measured time are both divided
by those of the first model of its family and of the same precision, as a build corrects its predictions by the
measured time of the uncompressed model. Programs are kept in FOLDER, since lowering takes longest.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgebuild import catalog, costs
from edgebuild.analyse import analyse
from edgebuild.backends import BACKENDS
from edgebuild.devices import host
from edgebuild.lift import lift
from edgebuild.plan import Choice
from edgebuild.spec import PRECISIONS, ModelFacts, Precision
from edgebuild.transforms import quantize
from edgebuild.vision import import_torchvision

RESNETS = ("32", "24", "20", "16", "12", "8", "32,48,64", "16,64,96", "32:50", "32:25", "24,40,104:75")
DEFAULT = ("digits", "mobilenet_v2", "mobilenet_v3_small", "resnet18", "efficientnet_b0")
PASSES, SLICES, SECONDS = 1, 6, 0.2
QUANTILE = 0.2  # as the calibration takes it: the upper runs tell of other processes


@dataclass(frozen=True)
class Row:
    """Seconds predicted and measured; `shape` is the error of the ratio to the family's first model."""

    model: str
    precision: Precision
    predicted: float
    measured: float
    shape: float | None

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = found
    spec.loader.exec_module(found)
    return found


def resnet20(source: Any, widths: str) -> nn.Module:
    """A ResNet-20 of the given widths, with the blocks' inner channels at a share of them."""
    stages, _, share = widths.partition(":")
    outer = [int(width) for width in stages.split(",")]
    outer = outer if len(outer) == 3 else [outer[0], 2 * outer[0], 4 * outer[0]]
    model = source.ResNet20(outer[0])
    into, blocks = outer[0], []
    for i in range(9):
        out = outer[i // 3]
        block = source.Block(into, out, 2 if i in (3, 6) else 1)
        if share:
            inner = max(out * int(share) // 100, 1)
            first, second = block.conv1, block.conv2
            block.conv1 = nn.Conv2d(into, inner, 3, first.stride, 1, bias=False)
            block.bn1 = nn.BatchNorm2d(inner)
            block.conv2 = nn.Conv2d(inner, out, 3, second.stride, 1, bias=False)
        blocks.append(block)
        into = out
    model.blocks, model.fc = nn.Sequential(*blocks), nn.Linear(into, 10)
    return model


def make(name: str, resnet_file: Path | None) -> tuple[nn.Module, Tensor]:
    """A model by its name, and an input."""
    torch.manual_seed(0)
    if name == "digits":
        here = Path(__file__).parent.parent / "examples" / "digits" / "model.py"
        return module(here).DigitsNet().eval(), 16 * torch.rand(1, 1, 8, 8)
    if name.startswith("resnet20-"):
        if resnet_file is None:
            raise SystemExit(f"{name} needs --resnet20 FILE.py")
        return resnet20(module(resnet_file), name.removeprefix("resnet20-")).eval(), 255 * torch.rand(1, 3, 32, 32)
    return getattr(import_torchvision().models, name)(weights=None).eval(), torch.randn(1, 3, 224, 224)


def programs(name: str, resnet_file: Path | None, folder: Path) -> tuple[ModelFacts, Tensor, dict[Precision, Path]]:
    """The facts of a model and its program in each precision, lowered where it is not kept yet."""
    made, x = make(name, resnet_file)
    model = lift(made, (x,))
    paths: dict[Precision, Path] = {p: folder / f"{name}-{p}.pte" for p in PRECISIONS}
    backend = BACKENDS["xnnpack"]
    for precision, path in paths.items():
        if path.is_file():
            continue
        lowered: nn.Module = model
        if precision == "int8":
            lowered = quantize.apply(model, (x,), [(x,)], backend.quantizer()).model
        artifact = backend.lower(lowered, (x,))
        if artifact.fallen_back:
            print(f"{name}, {precision}: outside the delegate: {', '.join(artifact.fallen_back)}", file=sys.stderr)
        path.write_bytes(artifact.data)
    return analyse(model, (x,)), x, paths


def measure(runs: dict[tuple[str, Precision], tuple[Path, Tensor]]) -> dict[tuple[str, Precision], float]:
    """Seconds of a run of each program: the least of a low quantile, over slices of passes over all programs."""
    target = catalog.load_target("host")
    best: dict[tuple[str, Precision], float] = dict.fromkeys(runs, float("inf"))
    for _ in range(PASSES):
        for key, (path, x) in runs.items():
            with host.load(path, target, 1) as worker:
                for _ in range(SLICES):
                    found, _settled = worker.time((x.numpy(),), "forward", 0.0, SECONDS, cpu=True)
                    best[key] = min(best[key], float(np.quantile(found, QUANTILE)) / 1e9)
    return best


def rows(facts: dict[str, ModelFacts], measured: dict[tuple[str, Precision], float]) -> list[Row]:
    target = catalog.load_target("host")
    found: list[Row] = []
    first: dict[tuple[str, Precision], float] = {}
    for (name, precision), seconds in measured.items():
        predicted = costs.latency(target, 1).of(Choice(facts[name], precision))
        family = name.partition("-")[0], precision
        shape = None
        if family in first:
            shape = predicted / seconds / first[family] - 1
        else:
            first[family] = predicted / seconds
        found.append(Row(name, precision, predicted, seconds, shape))
    return found


def show(found: list[Row], tell: Callable[[str], None] = print) -> None:
    tell(f"{'model':28} {'':5} {'predicted':>10} {'measured':>10} {'error':>7} {'shape':>7}")
    for row in found:
        shape = "" if row.shape is None else f"{row.shape:+7.1%}"
        times = f"{row.predicted * 1e3:7.3f} ms {row.measured * 1e3:7.3f} ms"
        tell(f"{row.model:28} {row.precision:5} {times} {row.error:+7.1%} {shape}")
    errors, shapes = ([abs(r.error) for r in found], [abs(r.shape) for r in found if r.shape is not None])
    for what, values in (("error", errors), ("shape", shapes)):
        if values:
            near = sum(value <= 0.1 for value in values)
            tell(f"{what}: median {np.median(values):.1%}, worst {max(values):.1%}, {near}/{len(values)} within 10%")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--resnet20", type=Path, help="a file with the class ResNet20")
    parser.add_argument("--kept", type=Path, default=Path("bench-programs"), help="where programs are kept")
    parser.add_argument("--measured", type=Path, help="JSON of an earlier run whose measurements are taken over")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    names = chosen.models or [*DEFAULT, *(f"resnet20-{widths}" for widths in RESNETS if chosen.resnet20)]
    torch.set_num_threads(1)
    chosen.kept.mkdir(parents=True, exist_ok=True)
    made = {name: programs(name, chosen.resnet20, chosen.kept) for name in names}
    old = json.loads(chosen.measured.read_text()) if chosen.measured else []
    known: dict[tuple[str, Precision], float] = {(row["model"], row["precision"]): row["measured"] for row in old}
    runs = {(name, p): (paths[p], x) for name, (_, x, paths) in made.items() for p in PRECISIONS}
    fresh = measure({key: run for key, run in runs.items() if key not in known})
    found = rows({name: facts for name, (facts, _, _) in made.items()}, {k: (known | fresh)[k] for k in runs})
    show(found)
    if chosen.json:
        chosen.json.write_text(json.dumps([{**asdict(row), "error": row.error} for row in found], indent=1))


if __name__ == "__main__":
    main()
