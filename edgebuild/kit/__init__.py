"""The measuring kit: a folder to measure models with on a phone or a board that edgebuild itself does not reach.

It holds the runner with all that it loads, models, and two shell scripts that copy them to a device, time them there
and write `measured.toml`. The scripts need nothing of edgebuild.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from edgebuild.backends import xnnpack
from edgebuild.devices import runtime
from edgebuild.errors import UsageError
from edgebuild.lift import lift
from edgebuild.spec import Precision
from edgebuild.transforms import quantize
from edgebuild.vision import import_torchvision

SCRIPTS = ("measure_adb.sh", "measure_ssh.sh", "common.sh")
# Models of torchvision with random weights: time does not depend on what the weights are.
REFERENCES: tuple[tuple[str, Precision], ...] = (
    ("mobilenet_v2", "fp32"),
    ("mobilenet_v2", "int8"),
    ("mobilenet_v3_small", "fp32"),
)
SHAPE = (1, 3, 224, 224)
SEED = 0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def parse(models: Sequence[str]) -> dict[str, Path]:
    """Models written as "name=path.pte". Raises UsageError for what is no name, no file or there twice."""
    found: dict[str, Path] = {}
    for written in models:
        name, equals, where = written.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise UsageError(f"--model {written!r}", "write name=path.pte, with letters, digits, - and _ in the name")
        if name in found:
            raise UsageError(f"--model {name} is there twice")
        if not where.endswith(".pte") or not Path(where).is_file():
            raise UsageError(f"--model {written}: no .pte file at {where}")
        found[name] = Path(where)
    return found


def write(folder: Path, models: Mapping[str, Path], machines: Sequence[str], tell: Callable[[str], None]) -> None:
    """Write the kit: whole or not at all. Without models it holds the REFERENCES.

    Raises UsageError where something is at `folder`, MissingEnvironment where a runner cannot be built.
    """
    for machine in machines:
        if machine not in runtime.LOADERS:
            raise UsageError(f"no runner for {machine!r}", f"known: {', '.join(runtime.LOADERS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already", "name an empty or a new folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".kit-") as scratch:
            made = Path(scratch) / "kit"
            (made / "models").mkdir(parents=True)
            for machine in machines:
                tell(f"the runner for {machine}")
                shutil.copytree(runtime.folder(machine), made / machine)
            for name, path in models.items():
                shutil.copyfile(path, made / "models" / f"{name}.pte")
            for model, precision in () if models else REFERENCES:
                tell(f"{model}, {precision}")
                (made / "models" / f"{model}_{precision}.pte").write_bytes(reference(model, precision))
            for script in SCRIPTS:
                text = Path(__file__).with_name(script).read_text(encoding="utf-8")
                (made / script).write_text(text, encoding="utf-8")
                (made / script).chmod(0o755 if script.startswith("measure") else 0o644)
            (made / "runtime").write_text(f"executorch {version('executorch').partition('+')[0]}\n")
            made.rename(folder)
    except OSError as error:
        raise UsageError(f"cannot write {folder}: {error.strerror}") from None


def reference(model: str, precision: Precision) -> bytes:
    """A `.pte` of a torchvision classifier with random weights, in int8 ranged on a random input."""
    torch.manual_seed(SEED)
    inputs: tuple[Tensor, ...] = (torch.randn(SHAPE),)
    network = import_torchvision().models.get_model(model, weights=None).eval()
    lifted = lift(network, inputs)
    ready = quantize.apply(lifted, inputs, [inputs], xnnpack.quantizer()).model if precision == "int8" else lifted
    return xnnpack.lower(ready, inputs).data
