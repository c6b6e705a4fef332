"""Predicted size and peak memory against real artifacts: `python scripts/bench_size.py [--arm] [--host] [NAME...]`.

Models come from torchvision and `examples/`, with random weights; `--resnet20 FILE` adds a Python file that defines
`ResNet20()`. `--arm` measures peak memory on the simulated Raspberry Pi 4, `--host` on this machine.
"""

import argparse
import importlib.util
import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from edgebuild import costs
from edgebuild.analyse import analyse
from edgebuild.backends import BACKENDS
from edgebuild.catalog import load_target
from edgebuild.devices import arm, host
from edgebuild.lift import lift
from edgebuild.plan import Choice
from edgebuild.transforms import quantize
from edgebuild.vision import import_torchvision

ROOT = Path(__file__).parent.parent
VISION = ("mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "resnet18")


def load_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.parent.name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_of(name: str, resnet20: Path | None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A model whose every bias and batch-norm statistic is its own: equal constants would be stored once."""
    torch.manual_seed(0)
    if name == "digits":
        model, shape = load_file(ROOT / "examples/digits/model.py").DigitsNet(), (1, 1, 8, 8)
    elif name in ("mnist", "mnist-student"):
        module = load_file(ROOT / "examples/mnist/model.py")
        model, shape = (module.Teacher() if name == "mnist" else module.Student()), (1, 1, 28, 28)
    elif name == "resnet20":
        assert resnet20 is not None
        model, shape = load_file(resnet20).ResNet20(), (1, 3, 32, 32)
    else:
        model, shape = getattr(import_torchvision().models, name)(weights=None), (1, 3, 224, 224)
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.data.normal_(0, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval(), (torch.rand(shape),)


def bench(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    model, inputs = model_of(name, options.resnet20)
    lifted = lift(model, inputs)
    facts = analyse(lifted, inputs)
    first = next(layer.name for layer in facts.layers if layer.weighted)
    rows = []
    for label, keep in (("fp32", ()), ("int8", ()), ("mixed", (first,))):
        precision = "fp32" if label == "fp32" else "int8"
        lowered: nn.Module = lifted
        if precision == "int8":
            lowered = quantize.apply(lifted, inputs, [inputs], BACKENDS["xnnpack"].quantizer(keep)).model
        data = BACKENDS["xnnpack"].lower(lowered, inputs).data
        choice = Choice(facts, precision, keep_fp32=frozenset(keep))  # type: ignore[arg-type]
        row = {"model": name, "precision": label, "size": len(data), "predicted": costs.size(facts).of(choice)}
        row["peak predicted"] = costs.peak_memory(facts).of(choice)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.pte"
            path.write_bytes(data)
            arrays = tuple(x.numpy() for x in inputs)
            if options.arm:
                with arm.load(path, load_target("raspberry-pi-4"), 1) as guest:
                    guest.run(arrays)
                row["peak arm"] = guest.peak
            if options.host:
                with host.start(path, load_target("host"), 1) as worker:
                    row["peak host"] = worker.memory(arrays)[0]
        rows.append(row)
        print(text(row), flush=True)
    return rows


def text(row: dict[str, Any]) -> str:
    cells = [f"{row['model']:20} {row['precision']:5}"]
    pairs = (("size", "predicted"), ("peak arm", "peak predicted"), ("peak host", "peak predicted"))
    for actual, predicted in pairs:
        if actual in row:
            error = row[predicted] / row[actual] - 1
            cells.append(f"{actual} {row[actual]:>11,} predicted {row[predicted]:>11,.0f} {error:+.2%}")
    return "  ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--resnet20", type=Path, metavar="FILE")
    parser.add_argument("--arm", action="store_true")
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    extra = ("resnet20",) if options.resnet20 else ()
    names = options.names or ("digits", "mnist", "mnist-student", *extra, *VISION)
    rows = [row for name in names for row in bench(name, options)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
