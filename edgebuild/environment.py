"""What a build depends on beside its inputs: versions and machine."""

import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgebuild import __version__

PACKAGES = ("torch", "executorch", "torchao", "torchvision", "torch-pruning", "tensorly", "numpy")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of every package that changes what is built; "absent" where one is not installed."""
    found = {"python": platform.python_version(), "edgebuild": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


@cache
def machine() -> str:
    """The processor's name and the system."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {sys.platform} {platform.machine()}"
