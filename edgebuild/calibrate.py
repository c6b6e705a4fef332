"""Fits a simulated target to latencies that were measured on the real device, and writes the fitted target's file.

The simulator splits a latency by what was waited for. Three scales, of the core, of caches and memory, and of waiting
for threads, bring the sum nearer to what was measured. They are drawn towards a common one, and that towards 1, so that
few measurements move what they can tell and no more.
"""

import datetime
import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tomlkit
from rich.console import Console
from rich.table import Table
from scipy.optimize import lsq_linear

from edgebuild import catalog
from edgebuild.devices import simulator
from edgebuild.errors import SpecError, UsageError
from edgebuild.spec import RESOURCES, SCALE_BOUNDS, Calibration, Resource, Simulation, Target, Timing, Timings

# Standard deviations, relative: of what the simulator says of a model once its scales are right, of the scales from
# each other, and of the common scale from 1. The last is wide: one measurement shall be met by the common scale.
MODEL_ERROR = 0.02
BETWEEN_SCALES = 0.3
COMMON_SCALE = 3.0

# A held-out error says something of the next model from here on.
MEASUREMENTS, MODELS = 3, 2


@dataclass(frozen=True)
class Row:
    """Seconds of a measurement: measured, simulated as the target stood, with all scales, and held out.

    `held_out` comes from scales that were fitted to the other measurements alone; None where there are none.
    """

    timing: Timing
    simulated: float
    fitted: float
    held_out: float | None

    @property
    def error(self) -> float | None:
        """How far the measured value lies from the held-out prediction, relative to that as `latency_error` is."""
        return self.timing.latency / self.held_out - 1 if self.held_out else None


@dataclass(frozen=True)
class Fit:
    """The fitted scales, and how good they are."""

    calibration: Calibration
    rows: tuple[Row, ...]

    @property
    def worst(self) -> float | None:
        """The largest held-out error; None with a single measurement."""
        errors = [abs(row.error) for row in self.rows if row.error is not None]
        return max(errors, default=None)

    @property
    def validates(self) -> bool:
        """Whether there are enough measurements for the error to hold for other models too."""
        return len(self.rows) >= MEASUREMENTS and len({row.timing.model for row in self.rows}) >= MODELS


def calibrate(target: Target, timings: Timings, models: Path, tell: Callable[[str], None]) -> Fit:
    """Simulate what was measured, from the `.pte` files in `models`, and fit the scales.

    Raises UsageError or SpecError where a file is not the one that was measured, DeviceError where it cannot run.
    """
    if target.device != "arm":
        raise UsageError(f"{target.name} is not simulated", "only simulated Arm targets are calibrated")
    paths = {timing.model: models / f"{timing.model}.pte" for timing in timings.measurement}
    _check(target, timings, paths)
    plain = replace(target, calibration=None)
    seconds = []
    for timing in timings.measurement:
        tell(f"{timing.model}, {timing.threads} threads")
        seconds.append(by_resource(simulator.simulate(paths[timing.model], plain, timing.threads)))
    measured = [float(timing.latency) for timing in timings.measurement]
    scales = fit(seconds, measured)
    rows = []
    for i, timing in enumerate(timings.measurement):
        others = [j for j in range(len(measured)) if j != i]
        held_out = None
        if others:
            held_out = total(seconds[i], fit([seconds[j] for j in others], [measured[j] for j in others]))
        rows.append(Row(timing, sum(seconds[i].values()), total(seconds[i], scales), held_out))
    unsourced = Fit(Calibration(scales["core"], scales["memory"], scales["threads"], ""), tuple(rows))
    return replace(unsourced, calibration=replace(unsourced.calibration, source=_source(unsourced, timings)))


def _check(target: Target, timings: Timings, paths: Mapping[str, Path]) -> None:
    """Refuse what was not measured with these files, this runtime and cores that the target has."""
    here = f"executorch {version('executorch').partition('+')[0]}"
    if timings.runtime != here:
        raise SpecError(
            f"measured with {timings.runtime}, and {here} is simulated", "measure with a kit of this version"
        )
    for timing in timings.measurement:
        path = paths[timing.model]
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise UsageError(
                f"{path}: {error.strerror}",
                "put the kit's folder models/ beside the measured file, or name it: --models",
            ) from None
        if digest != timing.artifact_sha256:
            raise SpecError(
                f"{path} is not what was measured: its SHA-256 is {digest}, that of the measurement "
                f"{timing.artifact_sha256}"
            )
        if timing.threads > (cores := target.cluster[0].count):
            raise SpecError(
                f"{timing.model} was measured with {timing.threads} threads, and {target.name} runs models on the "
                f"{cores} cores of its {target.cluster[0].name!r} cluster",
                "take that measurement out of the file",
            )


def by_resource(simulation: Simulation) -> dict[Resource, float]:
    """Seconds of an inference by what was waited for."""
    seconds: dict[Resource, float] = dict.fromkeys(RESOURCES.values(), 0.0)
    for operator in simulation.operators:
        for bound, waited in operator.bounds.items():
            seconds[RESOURCES[bound]] += waited
    return seconds


def total(seconds: Mapping[Resource, float], scales: Mapping[Resource, float]) -> float:
    return sum(waited * scales[resource] for resource, waited in seconds.items())


def fit(seconds: Sequence[Mapping[Resource, float]], measured: Sequence[float]) -> dict[Resource, float]:
    """The most likely scales, given relative errors and scales that are normally distributed as said above.

    A linear least-squares problem in the scales and the common one, within SCALE_BOUNDS.
    """
    names: tuple[Resource, ...] = tuple(dict.fromkeys(RESOURCES.values()))
    n = len(names)
    shares = np.array([[row[name] / time for name in names] for row, time in zip(seconds, measured, strict=True)])
    data = np.hstack([shares, np.zeros((len(shares), 1))]) / MODEL_ERROR
    apart = np.hstack([np.eye(n), -np.ones((n, 1))]) / BETWEEN_SCALES
    common = np.eye(n + 1)[n:] / COMMON_SCALE
    wanted = np.concatenate([np.full(len(shares), 1 / MODEL_ERROR), np.zeros(n), [1 / COMMON_SCALE]])
    found = lsq_linear(np.vstack([data, apart, common]), wanted, bounds=SCALE_BOUNDS, tol=1e-12).x
    return {name: float(scale) for name, scale in zip(names, found[:n], strict=True)}


def _source(fit: Fit, timings: Timings) -> str:
    names = ", ".join(dict.fromkeys(row.timing.model for row in fit.rows))
    threads = ", ".join(str(count) for count in sorted({row.timing.threads for row in fit.rows}))
    held_out = "no held-out error" if fit.worst is None else f"held-out error up to {fit.worst:.1%}"
    return (
        f"fitted to {len(fit.rows)} measurements on {timings.device} with {timings.runtime}: {names}; "
        f"threads: {threads}; calibrated {datetime.date.today().isoformat()}; {held_out}"
    )


def show(fit: Fit, console: Console) -> None:
    """Print what was measured beside what is predicted, before and after, and the scales."""
    table = Table("model", "threads", "measured", "simulated", "fitted", "held out", "error", box=None)
    for row in fit.rows:
        held_out = ("", "") if row.held_out is None else (f"{row.held_out * 1e3:.4g} ms", f"{row.error:+.1%}")
        times = (f"{seconds * 1e3:.4g} ms" for seconds in (row.timing.latency, row.simulated, row.fitted))
        table.add_row(row.timing.model, str(row.timing.threads), *times, *held_out)
    console.print(table)
    scales = ", ".join(f"{name} {getattr(fit.calibration, name):.3f}" for name in dict.fromkeys(RESOURCES.values()))
    console.print(f"\nscales: {scales}", highlight=False)
    if not fit.validates:
        console.print(
            f"{MEASUREMENTS} measurements of {MODELS} models are needed to state an error: the target's stays",
            highlight=False,
        )


def check_writable(output: Path, force: bool) -> None:
    """Raises UsageError where something is at `output` and must stay."""
    if output.suffix != ".toml":
        raise UsageError(f"--output {output}", "a target's file ends in .toml")
    if output.exists() and not force:
        raise UsageError(f"{output} exists already", "write another file with --output, or this one with --force")


def write(source: Path, output: Path, fit: Fit) -> None:
    """Write the target's file at `source` with the fit to `output`, whole or not at all; all else stays as it is."""
    document = tomlkit.parse(source.read_text(encoding="utf-8"))
    document["name"] = output.stem
    for cluster in document.get("cluster", ()):
        if cluster["model"].endswith(".toml"):  # a core's file beside the target's
            cluster["model"] = os.path.relpath(source.parent / cluster["model"], output.parent)
    if fit.validates and fit.worst is not None:
        document["status"] = "validated"
        document["latency_error"] = f"{max(1, math.ceil(100 * fit.worst))} %"
        document["latency_error_source"] = (
            f"The largest error of a measurement that was predicted from the others; {fit.calibration.source}."
        )
    document.pop("calibration", None)
    table = tomlkit.table()
    for name in dict.fromkeys(RESOURCES.values()):
        table[name] = round(getattr(fit.calibration, name), 4)
    table["source"] = fit.calibration.source
    document["calibration"] = table
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".calibrate-") as scratch:
            made = Path(scratch) / output.name
            made.write_text(tomlkit.dumps(document), encoding="utf-8")
            os.replace(made, output)
    except OSError as error:
        raise UsageError(f"cannot write {output}: {error.strerror}") from None
    catalog.load_target(f"{output.parent}/{output.name}")
