"""What a layer costs on a simulated machine, learnt from simulated layers (see `probe_layers` and `layer_model`).

The probes of a kind and a precision are simulated when the first layer of that kind is asked for. Each probe's time is
kept, so that an interrupted calibration goes on where it was.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache as once
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from edgebuild import cache
from edgebuild.devices import layer_model, probe_layers, rate_store, simulator
from edgebuild.devices.layer_model import Rates
from edgebuild.devices.probe_layers import Probe
from edgebuild.spec import MODEL_INPUT, CalibrationError, LayerFacts, Precision, Simulation, Target

CHUNK = 16  # probes that one process simulates


def seconds(layers: Sequence[tuple[LayerFacts, Precision]], target: Target, threads: int) -> NDArray[np.float64]:
    """Predicted seconds of each layer for a single sample. Raises MissingEnvironment and DeviceError."""
    return _rates(target, threads, _kinds(layers)).seconds(layers)


def call(target: Target, threads: int) -> float:
    """Predicted seconds of an inference beside its layers."""
    return _times(_CALL, target, threads)[0]


def errors(target: Target, threads: int) -> tuple[CalibrationError, ...]:
    """How far off the rates are, by the kinds that have been asked for."""
    return tuple(error for rates in _known(target, threads).values() for error in rates.errors)


def _kinds(layers: Sequence[tuple[LayerFacts, Precision]]) -> frozenset[tuple[str, Precision]]:
    kinds = {(layer_model.kind(layer), precision) for layer, precision in layers}
    inputs = {("input", precision) for layer, precision in layers if MODEL_INPUT in layer.sources}
    return frozenset(kinds | inputs)


_PROBES = tuple(Probe(probe.layer, probe.precision, 1) for probe in probe_layers.probes())  # nothing drowns in noise
_CALL = _PROBES[:1]


@once
def _known(target: Target, threads: int) -> dict[tuple[str, Precision], Rates]:
    """The rates of each kind so far; filled by `_rates`."""
    return {}


@once
def _rates(target: Target, threads: int, kinds: frozenset[tuple[str, Precision]]) -> Rates:
    known = _known(target, threads)
    for kind in sorted(kinds - known.keys()):
        probes = tuple(probe for probe in _PROBES[1:] if (layer_model.kind(probe.layer), probe.precision) == kind)
        if not probes:  # an operator that is like none that is probed costs what operators of its precision cost
            probes = tuple(probe for probe in _PROBES[1:] if probe.precision == kind[1] and _is_plain(probe.layer))
        samples = zip(probes, _times(probes, target, threads), strict=True)
        known[kind] = layer_model.fit([(p.layer, p.precision, time) for p, time in samples], call(target, threads))
    curves = {name: curve for kind in kinds for name, curve in known[kind].curves.items()}
    return Rates(call(target, threads), curves, ())


def _is_plain(layer: LayerFacts) -> bool:
    return not layer.weighted and layer.op != "input"


def _times(probes: tuple[Probe, ...], target: Target, threads: int) -> list[float]:
    """Seconds of each probe above those of an empty call, which has its own."""
    names = {probe: _name(probe, target, threads) for probe in probes}
    found: dict[Probe, float] = {}
    for probe, name in names.items():
        if (known := rate_store.read(name, float)) is not None:
            found[probe] = known
    missing = [probe for probe in probes if probe not in found]
    if missing:
        base = 0.0 if probes == _CALL else call(target, threads)
        chunks = [tuple(missing[i : i + CHUNK]) for i in range(0, len(missing), CHUNK)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for chunk, times in zip(chunks, pool.map(lambda c: _simulated(c, target, threads), chunks), strict=True):
                for probe, time in zip(chunk, times, strict=True):
                    found[probe] = max(time - base, 1e-9)
                    rate_store.write(names[probe], found[probe])
    return [found[probe] for probe in probes]


def _simulated(probes: tuple[Probe, ...], target: Target, threads: int) -> list[float]:
    program = rate_store.program(_PROBES)
    methods = [probe_layers.method(_PROBES.index(probe)) for probe in probes]
    found = simulator.simulate_methods(program, target, threads, "--sample", methods)
    return [_own(probe, found[method]) for probe, method in zip(probes, methods, strict=True)]


def _own(probe: Probe, simulation: Simulation) -> float:
    """Seconds of a probe without what only the probe needs: the factor of a `mul` by channels is computed there."""
    helper = "Mean" if probe.layer.op == "mul" else None
    return sum(o.seconds for o in simulation.operators if helper is None or not o.name.startswith(helper))


@once
def _machine(target: Target, threads: int) -> str:
    code = rate_store.code(*rate_store.PROGRAM, "arm_costs.py")
    return cache.key(*simulator.machine_key(target, threads), code, version("executorch"))


def _name(probe: Probe, target: Target, threads: int) -> str:
    return f"{target.name}-{cache.key(_machine(target, threads), repr(probe))[:24]}.json"
