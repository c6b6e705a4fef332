"""Measures a bundle's artifact again and holds it against a profile. No PyTorch model, no data; no torch here."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, isinf
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgebuild import bundle, judge, report
from edgebuild.clock import Clock, Tell
from edgebuild.devices import DEVICES, Arrays, as_file, timing
from edgebuild.environment import machine, versions
from edgebuild.errors import DeviceError, MissingEnvironment, SpecError, UsageError
from edgebuild.settings import Settings
from edgebuild.spec import PER_TARGET, TIMED, Accuracy, Budget, Finding, Measurement, Parity, Target, Verdict

HOST = Target(name="host", title="This machine", device="host", status="measured")
SUFFIXES = {"pte": ".pte", "torchscript": ".pt"}


@dataclass(frozen=True)
class Interval:
    """A confidence interval of a figure that was timed on a device, in the unit of its quantity.

    `high` is None where there were too few runs to bound it.
    """

    target: str
    quantity: str
    low: float
    high: float | None
    confidence: float


@dataclass(frozen=True)
class Check:
    """An artifact held against a profile here and now; fields as in `spec.Report`.

    `reported` are the verdicts of the build, for comparison. `environment` is that of this machine.
    """

    outcome: Literal["met", "broken", "inconclusive"]
    summary: str
    task: str
    profile: str
    targets: tuple[str, ...]
    artifact: str
    artifact_sha256: str
    size: int
    build_id: str
    verdicts: tuple[Verdict, ...]
    intervals: tuple[Interval, ...]
    reported: tuple[Verdict, ...]
    parity: tuple[Parity, ...]
    measurements: tuple[Measurement, ...]
    findings: tuple[Finding, ...]
    stages: Mapping[str, float]  # seconds by stage
    environment: Mapping[str, str]
    schema_version: int = 1


@dataclass(frozen=True)
class _Found:
    """What running the artifact on one target brought; `error` says why it could not be run."""

    measurements: tuple[Measurement, ...] = ()
    intervals: tuple[Interval, ...] = ()
    parity: tuple[Parity, ...] = ()
    error: str = ""


def check(files: Mapping[str, bytes], settings: Settings, tell: Tell, here: bool = True) -> Check:
    """Hold the artifact of a bundle (`bundle.read`) against `settings` on their targets; `here`: on this machine too.

    Raises SpecError where the bundle's files contradict each other, UsageError where the profile is for another kind
    of artifact, MissingEnvironment where a target cannot run anything.
    """
    clock = Clock(tell)
    built = report.from_json(_file(files, "report.json"))
    name, artifact, profile = built["artifact"], _file(files, built["artifact"]), settings.profile
    if hashlib.sha256(artifact).hexdigest() != built["artifact_sha256"]:
        raise SpecError(f"{name} is not the artifact that report.json is about", "build it again")
    if built["plan"] is None:
        raise SpecError("report.json has no plan, so nothing was built by it", "build it again")
    if not name.endswith(SUFFIXES[profile.artifact]):
        raise UsageError(f"{profile.name} is a profile for {profile.artifact}, and the bundle holds {name}")
    samples = bundle.read_vectors(_file(files, "vectors.safetensors"))
    if not samples[0]:
        raise SpecError("the bundle has no test vectors")
    hosted = any(target.device == "host" or target.microcontroller for target in settings.targets)
    extra = [HOST] if here and not hosted else []
    targets = [*settings.targets, *extra]
    with clock.stage("devices", f"making {', '.join(target.name for target in targets)} ready"):
        for target in targets:
            _ready(target)
    found = {}
    with as_file(artifact, SUFFIXES[profile.artifact], bundle.graphs(files, name)) as path:
        for target in targets:
            budgets = () if target in extra else profile.budgets
            found[target.name] = _on(target, path, profile.threads, samples, built, budgets, clock)
    findings = _findings(built, settings, found)
    verdicts = _verdicts(built, settings, found, len(artifact))
    parity = tuple(row for one in found.values() for row in one.parity)
    outcome = judge.outcome(verdicts, parity)
    return Check(
        outcome=outcome,
        summary=_summary(profile.name, verdicts, parity),
        task=built["task"],
        profile=profile.name,
        targets=profile.targets,
        artifact=name,
        artifact_sha256=built["artifact_sha256"],
        size=len(artifact),
        build_id=built["build_id"],
        verdicts=verdicts,
        intervals=tuple(row for one in found.values() for row in one.intervals),
        reported=_converted(built["verdicts"], tuple[Verdict, ...]),
        parity=parity,
        measurements=tuple(row for one in found.values() for row in one.measurements),
        findings=findings,
        stages={stage: round(seconds, 3) for stage, seconds in clock.stages.items()},
        environment={**versions(), "machine": machine(), "cores": str(os.cpu_count())},
    )


def _file(files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise SpecError(f"the bundle has no {name or 'artifact'}", "build it again")
    return files[name]


def _converted(value: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:  # a figure that was not finite is null in the JSON
        raise SpecError(f"report.json: {error}") from None


def _ready(target: Target) -> None:
    try:
        DEVICES[target.device].check(target)
    except DeviceError as error:  # an unreachable device is no broken budget
        raise MissingEnvironment(error.what, error.remedy) from None


# ------------------------------------------------------------------------------------------------------ measuring


def _on(
    target: Target,
    artifact: Path,
    threads: int,
    samples: tuple[list[Arrays], list[Arrays]],
    built: Mapping[str, Any],
    budgets: Sequence[Budget],
    clock: Clock,
) -> _Found:
    inputs, expected = samples
    device, runs = DEVICES[target.device], judge.Runs(budgets)
    try:
        with (
            clock.stage("verify", f"comparing outputs on {target.name}"),
            device.load(artifact, target, threads) as session,
        ):
            outputs = session.run_many(inputs)
        _check_alike(outputs, expected, target.name)
        with clock.stage("measure", f"measuring on {target.name}"):
            measurements = device.measure(artifact, target, threads, inputs, (), runs.enough)
    except DeviceError as error:
        return _Found(error=str(error))
    least = judge.LEAST_SQNR_DB[built["plan"]["precision"]]
    logits = any(row["agreement"] is not None for row in built["parity"])
    parity = judge.parity(outputs, expected, target.name, "the bundle's test vectors", least, logits)
    intervals = [_interval(target.name, q, runs.found) for q in TIMED if len(runs.found)]
    return _Found(measurements, tuple(intervals), (parity,))


def _interval(target: str, quantity: str, found: timing.Nanoseconds) -> Interval:
    low, high = timing.interval(found, quantity, judge.CONFIDENCE)
    return Interval(target, quantity, low, None if isinf(high) else high, judge.CONFIDENCE)


def _check_alike(outputs: Sequence[Arrays], expected: Sequence[Arrays], target: str) -> None:
    for got, want in zip(outputs, expected, strict=True):
        kinds = [[(array.shape, array.dtype) for array in arrays] for arrays in (got, want)]
        if kinds[0] != kinds[1]:
            raise SpecError(f"the test vectors are not those of the artifact: on {target} its outputs are {kinds[0]}")


# ------------------------------------------------------------------------------------------------------- verdicts


def _verdicts(
    built: Mapping[str, Any], settings: Settings, found: Mapping[str, _Found], size: int
) -> tuple[Verdict, ...]:
    figures = {(m.quantity, m.target): m for one in found.values() for m in one.measurements}
    figures["size", ""] = Measurement("", "size", size, "counted")
    if (counted := _delegated(built)) is not None:
        figures["min_delegated", ""] = Measurement("", "min_delegated", counted, "reported")
    intervals = {(i.quantity, i.target): i for one in found.values() for i in one.intervals}
    predicted = {(row["kind"], row["target"]): row["predicted"] for row in built["verdicts"]}
    unreached = {
        target.name: "the bundle's own device over ssh: name your file for it with --device"
        for target in settings.unreached
    }
    verdicts = []
    for budget in settings.profile.budgets:
        if budget.kind == "accuracy_drop":
            verdicts.append(_accuracy(budget, built))
            continue
        for name in settings.profile.targets if budget.kind in PER_TARGET else [""]:
            key = budget.kind, name
            interval = intervals.get(key)
            band = (interval.low, inf if interval.high is None else interval.high) if interval else None
            note = _said(budget, interval, figures[key]) if interval else unreached.get(name, "")
            if key == ("min_delegated", ""):
                note = "counted by the build" if key in figures else "the build did not count it"
            verdict = judge.verdict(budget, name, predicted.get(key), figures.get(key), note, band)
            if name in found and (error := found[name].error):
                verdict = replace(verdict, status="fail", note=f"the artifact could not be run: {error}")
            verdicts.append(verdict)
    return tuple(verdicts)


def _said(budget: Budget, interval: Interval, found: Measurement) -> str:
    low = report.figure(budget.kind, interval.low)
    high = "no bound" if interval.high is None else report.figure(budget.kind, interval.high)
    return f"{interval.confidence:.0%} interval {low} to {high}, {found.runs:,} runs"


def _delegated(built: Mapping[str, Any]) -> float | None:
    values = [row["value"] for row in built["measurements"] if row["quantity"] == "min_delegated"]
    values += [row["value"] for row in built["verdicts"] if row["kind"] == "min_delegated"]
    return next((value for value in values if value is not None), None)


def _accuracy(budget: Budget, built: Mapping[str, Any]) -> Verdict:
    """The build's own score: the artifact is the same to the byte, and scoring it again takes data and code."""
    scored = built["accuracy"]
    if scored is None:
        return judge.accuracy_verdict(budget, None, "the build scored no metric")
    verdict = judge.accuracy_verdict(budget, _converted(scored, Accuracy), "")
    note = f"scored by the build over {scored['samples']:,} samples; not measured again"
    return replace(verdict, method="reported", note=f"{note}; {verdict.note}" if verdict.note else note)


def _findings(built: Mapping[str, Any], settings: Settings, found: Mapping[str, _Found]) -> tuple[Finding, ...]:
    findings = [
        Finding("skipped", name, f"the artifact could not be run: {one.error}")
        for name, one in found.items()
        if one.error
    ]
    findings += [
        Finding("skipped", target.name, "over ssh, and named by the bundle alone") for target in settings.unreached
    ]
    before, now = built["environment"], {**versions(), "machine": machine()}
    findings += [
        Finding("note", what, f"{before[what]} at the build, {now[what]} here")
        for what in now
        if before.get(what, now[what]) != now[what]
    ]
    return tuple(findings)


def _summary(profile: str, verdicts: Sequence[Verdict], parity: Sequence[Parity]) -> str:
    def names(status: str) -> list[str]:
        return [report.subject({"kind": v.kind, "target": v.target}) for v in verdicts if v.status == status]

    broken = [*names("fail"), *(f"outputs on {row.target}" for row in parity if not row.ok)]
    if broken:
        return f"{', '.join(broken)} failed"
    open_ = names("inconclusive")
    return f"{', '.join(open_)} could not be decided" if open_ else f"every budget of {profile} is met"
