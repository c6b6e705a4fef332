"""What a selective build of ExecuTorch links for a program, counted in the libraries of ExecuTorch's wheels.

A device keeps ExecuTorch's core, the threads and each backend whole, and of the kernels the code of the program's
operators alone.
"""

import platform
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from edgebuild import cache
from edgebuild.devices import elf, toolchain
from edgebuild.errors import EdgebuildError
from edgebuild.manifest import Footprint, Part

KIND = "linked"
KERNELS = ("executorch_kernels_optimized", "executorch_kernels_quantized")
ALWAYS = {"runtime": "executorch", "threads": "executorch_threadpool"}
BACKENDS = {"XnnpackBackend": "executorch_backend_xnnpack"}


def footprints(operators: Sequence[str], backends: Sequence[str]) -> tuple[Footprint, ...]:
    """What each machine keeps whose libraries are here: this one, and Arm once its wheel was fetched for its own sake.

    Raises nothing: what could not be counted is said in `missing`.
    """
    found = [_footprint(platform.machine(), toolchain.native_sdk, operators, backends)]
    arm = toolchain.kept_sdk()
    if arm and platform.machine() != "aarch64":
        found.append(_footprint("aarch64", lambda: arm, operators, backends))
    return tuple(found)


def _footprint(machine: str, sdk: Callable[[], Path], operators: Sequence[str], backends: Sequence[str]) -> Footprint:
    wanted = ALWAYS | {name: BACKENDS[name] for name in backends if name in BACKENDS}
    try:
        library = {name: sdk() / f"lib/lib{name}.so" for name in (*wanted.values(), *KERNELS)}
        whole = {name: elf.Library(library[key]).loaded() for name, key in wanted.items()}
        linked = [_linked(library[key], sorted(operators)) for key in KERNELS]
    except (EdgebuildError, OSError, LookupError, ValueError, struct.error) as error:
        return Footprint(machine=machine, parts=(), missing=f"nothing could be counted: {error}"[:300])
    parts = [Part(name=name, bytes=size, counted="whole") for name, size in whole.items()]
    parts.append(Part(name="operators", bytes=sum(size for size, _ in linked), counted="reached"))
    unknown = {*operators, *backends} - {*wanted} - {name for _, known in linked for name in known}
    return Footprint(machine=machine, parts=tuple(parts), missing=", ".join(sorted(unknown)))


def _linked(path: Path, operators: Sequence[str]) -> tuple[int, tuple[str, ...]]:
    """Bytes of code of those operators that a library has kernels for, and which these are."""
    name = cache.key(path.read_bytes(), Path(elf.__file__).read_bytes(), *operators) + ".json"
    if known := cache.read_as(KIND, name, tuple[int, tuple[str, ...]]):
        return known
    library = elf.Library(path)
    kernels = {operator: at for operator, at in library.kernels().items() if operator in operators}
    counted = (library.reach(kernels.values()), tuple(kernels)) if kernels else (0, ())
    cache.write(KIND, name, msgspec.json.encode(counted))
    return counted
