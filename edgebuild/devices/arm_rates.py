"""What layers cost on a simulated machine: curves through the times of `probes`, simulated one by one.

A layer's time is that of its operators alone, without the call around them. It starts with its input and its output's
memory in the caches, and without its weights: inside of a model, the layer before has just written the one, and of the
other nothing is left since the last inference, unless the whole model fits (docs/planner.md has the figures). The
simulator has no noise, so that one run of one copy of a layer is enough.

Only the kinds of layers that are asked for are simulated, a batch of layers to a process, as many processes as there
are cores. Each layer's time is kept, so that what was interrupted goes on where it was.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Lock

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgebuild import cache as store
from edgebuild.devices import layer_model, probes, simulator, toolchain
from edgebuild.devices.layer_model import Rates
from edgebuild.devices.operators import parts
from edgebuild.devices.probes import Probe
from edgebuild.spec import CalibrationError, LayerFacts, Precision, Target

FOLDER = "arm"
BATCH = 24  # layers to a process: starting it takes as long as a few of them
AROUND = ("set-up of the delegate", "between operators", "end of the inference")
WHOLE = ("call", "input")  # what is no layer of its own, but part of an inference: simulated as a whole, caches warm
LEAST_SHARE = 0.01  # of a call, that an input must take above it to be told from it
LAYERS = Sequence[tuple[LayerFacts, Precision]]
_WRITING = Lock()  # the exporter is imported once, and not by two threads at a time


def seconds(layers: LAYERS, target: Target, threads: int) -> NDArray[np.float64]:
    """Predicted seconds of each layer."""
    known = _known(target, threads)
    known.learn(layers)
    return Rates(0.0, known.curves, ()).seconds(layers)


def call(target: Target, threads: int) -> float:
    """Predicted seconds of an inference beside its layers."""
    return _known(target, threads).call


def errors(target: Target, threads: int) -> tuple[CalibrationError, ...]:
    """How far off the curves that were asked for are, for layers that they were not fitted to."""
    return tuple(error for _, error in sorted(_known(target, threads).errors.items()))


class Known:
    """The curves of a machine, found as they are asked for."""

    def __init__(self, target: Target, threads: int):
        self.target, self.threads = target, threads
        self.machine = _machine(target, threads)
        self.curves: dict[str, layer_model.Curve] = {}
        self.errors: dict[str, CalibrationError] = {}
        self.groups = _groups()
        self._call: float | None = None

    @property
    def call(self) -> float:
        if self._call is None:
            self._call = self._simulated(["call"])[0][2]
        return self._call

    def learn(self, layers: LAYERS) -> None:
        """Simulate what is missing to predict these layers, all at once, and fit its curves."""
        missing = [key for key in _keys(layers, self.groups) if key not in self.curves]
        if not missing:
            return
        wanted = {key: members for key in missing for members in (_members(key, self.groups),)}
        call = self.call if any(key.startswith("input.") for key in missing) else 0.0
        timed = self._simulated([name for members in wanted.values() for name in members])
        by_group: dict[str, list[layer_model.Sample]] = {}
        for layer, precision, taken in timed:
            key = _group(layer, precision)
            own = taken - call if layer.op == "input" else taken
            if own > LEAST_SHARE * call:  # the smallest inputs drown in the call
                by_group.setdefault(key, []).append((layer, precision, own))
        for key, members in wanted.items():
            samples = [sample for name in members for sample in by_group[name]]
            if key in self.groups:
                self.curves[key], self.errors[key] = self._fitted(key, samples)
            else:
                self.curves[key] = layer_model.fit_others(samples)

    def _fitted(self, key: str, samples: Sequence[layer_model.Sample]) -> tuple[layer_model.Curve, CalibrationError]:
        """The curve of a kind, from the cache where it was fitted to the same times before."""
        code = Path(layer_model.__file__).read_bytes()
        name = f"curve-{key}-{store.key(code, repr(samples))[:16]}.json"
        if (known := store.read_as(FOLDER, name, tuple[layer_model.Curve, CalibrationError])) is not None:
            return known
        found = layer_model.fit_kind(samples)
        store.write(FOLDER, name, msgspec.json.encode(found))
        return found

    def _simulated(self, names: Iterable[str]) -> list[layer_model.Sample]:
        """The times of the layers of some groups, in a fixed order."""
        asked = [(name, probe) for name in dict.fromkeys(names) for probe in self.groups[name]]
        times = {name: store.read_as(FOLDER, self._file(name), dict[str, float]) or {} for name, _ in asked}
        missing = [(name, probe) for name, probe in asked if _label(probe) not in times[name]]
        batches: list[list[tuple[str, Probe]]] = []
        for whole in (False, True):
            alike = [item for item in missing if (item[1].layer.op in WHOLE) == whole]
            parts = -(-len(alike) // BATCH)
            batches += [alike[i::parts] for i in range(parts)]  # the large layers of a group in different batches
        workers = min(len(batches), len(os.sched_getaffinity(0)))
        if batches:
            count = f"{len(missing)} layer{'s' if len(missing) > 1 else ''}"
            print(f"simulating {count} on {self.target.name} for the cost model", file=sys.stderr)
            pool = ThreadPoolExecutor(workers)
            try:
                running = {
                    pool.submit(_simulate, [probe for _, probe in batch], self.target, self.threads): batch
                    for batch in batches
                }
                for done in as_completed(running):
                    for (name, probe), taken in zip(running[done], done.result(), strict=True):
                        times[name][_label(probe)] = taken
                    for name in {name for name, _ in running[done]}:
                        store.write(FOLDER, self._file(name), msgspec.json.encode(times[name]))
            finally:
                pool.shutdown(cancel_futures=True)
        return [(probe.layer, probe.precision, times[name][_label(probe)]) for name, probe in asked]

    def _file(self, name: str) -> str:
        return f"layers-{self.machine[:16]}-{name}.json"


@cache
def _known(target: Target, threads: int) -> Known:
    return Known(target, threads)


def _machine(target: Target, threads: int) -> str:
    """Stands for all that a layer's time depends on: the machine, the simulator, the runner and the kernels."""
    here = Path(__file__)
    code = [here.with_name(name).read_bytes() for name in ("arm_rates.py", "probe_program.py", "simulator.py")]
    return store.key(*simulator.machine_key(target, threads), *code)


def _group(layer: LayerFacts, precision: Precision) -> str:
    return "call" if layer.op == "call" else f"{layer_model.kind(layer)}.{precision}"


@cache
def _groups() -> dict[str, list[Probe]]:
    """What can be simulated, by the curve that it is for."""
    groups: dict[str, list[Probe]] = {}
    for probe in probes.everything():
        groups.setdefault(_group(probe.layer, probe.precision), []).append(replace(probe, repeats=1))
    return groups


def _keys(layers: LAYERS, groups: dict[str, list[Probe]]) -> list[str]:
    """The curves that predicting some layers takes."""
    keys: dict[str, None] = {}
    for layer, precision in layers:
        for part in parts(layer):
            key = _group(part, precision)
            keys[key if key in groups else layer_model.other(key)] = None
        if layer_model.reads_input(layer):
            keys[f"input.{precision}"] = None
    return list(keys)


def _members(key: str, groups: dict[str, list[Probe]]) -> list[str]:
    """The groups that a curve is fitted to: its own, or all without weights of its precision."""
    if key in groups:
        return [key]
    precision = key.rpartition(".")[2]
    return [
        name
        for name, members in groups.items()
        if name.endswith(f".{precision}") and not members[0].layer.weighted and members[0].layer.op not in WHOLE
    ]


def _label(probe: Probe) -> str:
    return store.key(repr(probe))[:16]


def _simulate(batch: Sequence[Probe], target: Target, threads: int) -> list[float]:
    """Seconds of each layer, all in one process."""
    program = _program(batch)
    whole = batch[0].layer.op in WHOLE
    found = simulator.simulate_methods(program, target, threads, "--sample" if whole else "--sample-layers")
    timed = [found[probes.method(position)] for position in range(len(batch))]
    if whole:
        return [simulation.seconds for simulation in timed]
    return [sum(o.seconds for o in simulation.operators if o.name not in AROUND) for simulation in timed]


def _program(batch: Sequence[Probe]) -> Path:
    """The layers as one ExecuTorch program, from the cache where it has been written before."""
    code = Path(probes.__file__).with_name("probe_program.py").read_bytes()
    name = f"probes-{store.key(code, toolchain.sdk().name, *map(repr, batch))[:16]}.pte"
    path = store.root() / FOLDER / name
    if path.is_file():
        return path
    with _WRITING:
        from edgebuild.devices import probe_program  # brings in torch, which known times need not wait for

        return store.write(FOLDER, name, probe_program.write(batch))
