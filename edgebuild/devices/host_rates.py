"""How fast this machine runs layers: a few coefficients, fitted once to the times of small ExecuTorch programs.

A layer's time is taken as a sum of terms (`terms`), each an amount times the seconds for one of its units:
multiply-accumulates, elements, bytes of weights, one for the operator itself. The programs are chains of layers, so
that the formula that predicts is the one that is fitted. Sums and not a roofline's maxima, since that is what the times
of single layers showed: fetching weights and writing back requantized outputs hide behind no arithmetic.
"""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgebuild import cache
from edgebuild.spec import LayerFacts, Precision

# Channels that XNNPACK's x86 kernels compute at once: f32-gemm 16 or 32 wide, qs8-qc8w-gemm 8 or 16 wide; int8 reads
# its input 8 channels at a time (the "8c8" and "16c8" kernels).
OUT_TILE = 16
IN_TILE: dict[Precision, int] = {"fp32": 1, "int8": 8}


@dataclass(frozen=True)
class Rates:
    """Seconds for one unit of each term; `cache` is the second-level cache of a core in bytes."""

    unit: Mapping[str, float]
    cache: int

    def seconds(self, layer: LayerFacts, precision: Precision) -> float:
        """Predicted seconds of one layer for a single sample."""
        return sum(self.unit[name] * amount for name, amount in terms(layer, precision, self.cache).items())

    @property
    def call(self) -> float:
        """Seconds that an inference takes beside its layers."""
        return self.unit["call"]


def terms(layer: LayerFacts, precision: Precision, cache_size: int) -> dict[str, float]:
    """Amounts of what a layer costs: operators, (padded) multiply-accumulates, elements, bytes of weights.

    Weights that fill more than half of the second-level cache are taken to come from beyond it at each inference.
    """
    elements = layer.in_elements + layer.out_elements
    if not layer.weighted:
        return {"operator": 1, f"{precision}.element": elements}
    size = 1 if precision == "int8" else 4
    weights = size * layer.weights
    where = "streamed" if weights > cache_size / 2 else "cached"
    padded = _padded(layer, precision).macs
    if layer.depthwise:
        return {"operator": 1, f"{precision}.depthwise_mac": padded, f"{where}_byte": weights}
    return {
        "operator": 1,
        f"{precision}.mac": padded,
        f"{precision}.activation": elements,
        f"{where}_byte": weights,
    }


def _padded(layer: LayerFacts, precision: Precision) -> LayerFacts:
    if layer.depthwise:
        return replace(layer, out_channels=_up(layer.out_channels, OUT_TILE))
    into, out = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    return replace(
        layer,
        in_channels=_up(into, IN_TILE[precision]) * layer.groups,
        out_channels=_up(out, OUT_TILE) * layer.groups,
    )


def _up(count: int, tile: int) -> int:
    return -(-count // tile) * tile


# ----------------------------------------------------------------------------------------------------- the chains


def conv(into: int, out: int, side: int, kernel: int = 3, groups: int = 1, stride: int = 1) -> LayerFacts:
    """A convolution whose output is `side` x `side`."""
    return LayerFacts(
        "conv", "conv2d", into, out, groups, (kernel, kernel), (stride, stride), side * side,
        into * (side * stride) ** 2, out * side**2, True, (1, into, side * stride, side * stride), (1, out, side, side),
    )  # fmt: skip


def linear(into: int, out: int) -> LayerFacts:
    return LayerFacts("linear", "linear", into, out, 1, (), (), 1, into, out, True, (1, into), (1, out))


def add(channels: int, side: int) -> LayerFacts:
    shape = (1, channels, side, side)
    return LayerFacts(
        "add", "add", channels, channels, in_elements=2 * prod(shape), out_elements=prod(shape), in_shape=shape,
        out_shape=shape,
    )  # fmt: skip


# One chain for each term. They begin with a single channel, since the conversion of inputs is not what they are for;
# "dense" mixes widths as small networks do.
CHAINS: dict[str, tuple[LayerFacts, ...]] = {
    "call": (linear(32, 32),),
    "operator": (conv(16, 16, 4, 1),) * 6,
    "dense": (conv(1, 16, 32), conv(16, 16, 32), conv(16, 64, 16, stride=2), *(conv(64, 64, 16),) * 2),
    "pointwise": (conv(1, 32, 48, 1), *(conv(32, 32, 48, 1),) * 2),
    "depthwise": (conv(1, 96, 24, 1), *(conv(96, 96, 24, groups=96),) * 2),
    "add": (conv(1, 64, 32, 1), *(add(64, 32),) * 3),
    "cached": (linear(256, 256),) * 2,
    "streamed": (linear(1024, 2048),),
}
PRECISIONS: tuple[Precision, ...] = ("fp32", "int8")
METHODS: dict[str, tuple[tuple[LayerFacts, ...], Precision]] = {
    f"{name}_{precision}": (chain, precision)
    for precision in PRECISIONS
    for name, chain in CHAINS.items()
    if precision == "fp32" or name not in ("call", "operator", "cached", "streamed")  # the terms that both share
}


def example(chain: tuple[LayerFacts, ...]) -> NDArray[np.float32]:
    """An input of a chain."""
    return np.random.default_rng(0).standard_normal(chain[0].in_shape, dtype=np.float32)


def program() -> Path:
    """The chains as one ExecuTorch program, a method each, from the cache where it has been lowered before."""
    name = f"chains-{cache.key(_version(), version('executorch'), version('torch'))[:16]}.pte"
    path = cache.root() / "host" / name
    if path.is_file():
        return path
    from edgebuild.devices import host_chains  # brings in torch, which a machine with known rates need not wait for

    return cache.write("host", name, host_chains.lower(METHODS))


# -------------------------------------------------------------------------------------------------------- the fit


def fit(seconds: Mapping[str, float]) -> Rates:
    """Rates from the seconds of each of METHODS: non-negative least squares on the relative error."""
    from scipy.optimize import nnls

    size = _cache_size()
    rows = {name: _row(chain, precision, size) for name, (chain, precision) in METHODS.items()}
    names = sorted({term for row in rows.values() for term in row})
    matrix = np.array([[rows[name].get(term, 0.0) / seconds[name] for term in names] for name in METHODS])
    scale = matrix.max(axis=0)  # the units differ by ten orders of magnitude
    solution, _ = nnls(matrix / scale, np.ones(len(METHODS)))
    return Rates(dict(zip(names, (solution / scale).tolist(), strict=True)), size)


def _row(chain: tuple[LayerFacts, ...], precision: Precision, cache_size: int) -> dict[str, float]:
    row = {"call": 1.0}
    last = chain[-1]
    pool = replace(last, op="adaptive_avg_pool2d", in_elements=last.out_elements, out_elements=last.out_channels)
    for layer in (*chain, pool) if last.positions > 1 or not last.weighted else chain:
        for term, amount in terms(layer, precision, cache_size).items():
            row[term] = row.get(term, 0.0) + amount
    return row


def _cache_size() -> int:
    """Bytes of the second-level cache; 1 MiB where the system does not say."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == "2":
            return int((index / "size").read_text().strip().removesuffix("K")) << 10
    return 1 << 20


# ------------------------------------------------------------------------------------------------------ the store


def read(threads: int) -> Rates | None:
    """The rates of this machine with so many threads, where they were measured before."""
    data = cache.read("host", _name(threads))
    try:
        table = json.loads(data) if data else None
        return Rates(table["unit"], table["cache"]) if table else None
    except (ValueError, KeyError):
        return None  # a damaged file; it will be written anew


def write(rates: Rates, threads: int) -> None:
    """Keep the rates for the next process."""
    cache.write("host", _name(threads), json.dumps(asdict(rates), indent=1).encode())


def _name(threads: int) -> str:
    key = cache.key(_version(), _cpu(), version("executorch"), version("torch"))
    return f"rates-{key[:16]}-{threads}.json"


def _version() -> bytes:
    """The code that the rates and the chains come from: what other code made does not fit it."""
    here = Path(__file__)
    return here.read_bytes() + here.with_name("host_chains.py").read_bytes()


def _cpu() -> str:
    """The model of the CPU, its features and the number of its cores."""
    lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    wanted = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    seen = {line.partition(":")[0].strip(): line for line in lines}
    return "\n".join([*(seen[name] for name in wanted if name in seen), platform.machine(), str(os.cpu_count())])
