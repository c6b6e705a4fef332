"""What a build depends on beside its inputs: versions and machine."""

import hashlib
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from edgebuild import __version__

PACKAGES = ("torch", "executorch", "torchao", "torchvision", "torch-pruning", "tensorly", "numpy")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of every package that changes what is built; "absent" where one is not installed.

    edgebuild's own names its code as well, as a local version (PEP 440).
    """
    found = {"python": platform.python_version(), "edgebuild": f"{__version__}+{code()[:12]}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


@cache
def code() -> str:
    """SHA-256 of edgebuild's own files: another edgebuild of the same version may build something else."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(path for path in package.rglob("*") if "__pycache__" not in path.parts and path.is_file()):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(data)}\n".encode() + data)
    return digest.hexdigest()


@cache
def machine() -> str:
    """The processor's name and the system."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        name = next(line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {sys.platform} {platform.machine()}"
