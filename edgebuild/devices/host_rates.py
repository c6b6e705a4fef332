"""Keeps what was learnt of this machine in the cache: the probes' program, and the rates fitted to their times."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import msgspec

from edgebuild import cache
from edgebuild.devices.layer_model import Rates
from edgebuild.devices.probes import Probe

PROGRAM = ("probes.py", "probe_program.py")


def program(probes: tuple[Probe, ...]) -> Path:
    """The probes as one ExecuTorch program, a method each, from the cache where it has been written before."""
    name = f"probes-{cache.key(_code(*PROGRAM), version('executorch'))[:16]}.pte"
    path = cache.root() / "host" / name
    if path.is_file():
        return path
    from edgebuild.devices import probe_program  # brings in torch, which a machine with known rates need not wait for

    return cache.write("host", name, probe_program.write(probes))


def read(threads: int) -> Rates | None:
    """The rates of this machine with so many threads, where they were measured before."""
    return cache.read_as("host", _name(threads), Rates)


def write(rates: Rates, threads: int) -> None:
    """Keep the rates for the next process."""
    cache.write("host", _name(threads), msgspec.json.format(msgspec.json.encode(rates), indent=1))


def _name(threads: int) -> str:
    key = cache.key(_code(*PROGRAM, "layer_model.py", "host.py"), _cpu(), version("executorch"), version("torch"))
    return f"rates-{key[:16]}-{threads}.json"


def _code(*names: str) -> bytes:
    """The code that something comes from: what other code made does not fit it."""
    return b"".join(Path(__file__).with_name(name).read_bytes() for name in names)


def _cpu() -> str:
    """The model of the CPU, its features and the number of its cores."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    seen = {line.partition(":")[0].strip(): line for line in lines}
    return "\n".join([*(seen[name] for name in wanted if name in seen), platform.machine(), str(os.cpu_count())])
