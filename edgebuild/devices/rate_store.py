"""Keeps what was learnt of a machine in the cache: the probes' program, their times, and the rates fitted to them."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import msgspec

from edgebuild import cache
from edgebuild.devices.probe_layers import Probe

Stored = TypeVar("Stored")
PROGRAM = ("probe_layers.py", "probe_program.py")


def program(probes: Sequence[Probe]) -> Path:
    """The probes as one ExecuTorch program, a method each, from the cache where it has been written before."""
    name = f"probes-{cache.key(code(*PROGRAM), repr(probes), version('executorch'))[:16]}.pte"
    path = cache.root() / "rates" / name
    if path.is_file():
        return path
    from edgebuild.devices import probe_program  # brings in torch, which a machine with known rates need not wait for

    return cache.write("rates", name, probe_program.write(probes))


def read(name: str, kind: type[Stored]) -> Stored | None:
    """What is stored under a name, if it is there and whole."""
    data = cache.read("rates", name)
    try:
        return msgspec.json.decode(data, type=kind) if data else None
    except msgspec.MsgspecError:
        return None  # a damaged file; it will be written anew


def write(name: str, value: object) -> None:
    """Keep a value for the next process."""
    cache.write("rates", name, msgspec.json.format(msgspec.json.encode(value), indent=1))


def host_name(threads: int) -> str:
    """What the rates of this machine are called, by all that they depend on."""
    key = cache.key(
        code(*PROGRAM, "layer_model.py", "host.py"), _cpu(), version("executorch"), version("torch"), str(threads)
    )
    return f"host-{key[:24]}.json"


def code(*names: str) -> bytes:
    """The code that something comes from: what other code made does not fit it."""
    return b"".join(Path(__file__).with_name(name).read_bytes() for name in names)


def _cpu() -> str:
    """The model of the CPU, its features and the number of its cores."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    seen = {line.partition(":")[0].strip(): line for line in lines}
    return "\n".join([*(seen[name] for name in wanted if name in seen), platform.machine(), str(os.cpu_count())])
