"""What changed between two bundles, figure by figure and layer by layer, and whether more than is allowed. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edgebuild import report
from edgebuild.errors import SpecError, UsageError
from edgebuild.settings import Settings
from edgebuild.spec import LOWER_BOUNDS, BudgetKind, Finding, Method, Target
from edgebuild.units import Bytes, Percent, Points, Quantity, Seconds, Throughput

Json = Mapping[str, Any]

# What an amount may be written in, beside a share of the old figure. The share of delegated operators is in points of
# that share itself, as the accuracy is.
_UNITS: dict[str, type[Quantity]] = {
    "size": Bytes,
    "latency": Seconds,
    "latency_p95": Seconds,
    "latency_p99": Seconds,
    "throughput": Throughput,
    "peak_memory": Bytes,
    "sram": Bytes,
    "flash": Bytes,
    "accuracy_drop": Points,
    "min_delegated": Points,
}


@dataclass(frozen=True)
class Allowed:
    """How much worse a figure may become: an amount in its own unit, or where `relative` a share of the old figure."""

    kind: BudgetKind
    amount: float
    relative: bool
    written: str


@dataclass(frozen=True)
class Change:
    """A figure before and after; None where a bundle has none.

    `worse` is by how much it became worse, in its own unit and as a share of the old figure, negative where it became
    better; both None where the two cannot be compared, and then `why` says why. `accuracy_drop` compares the artifacts'
    own scores. `limit`: the regression that was allowed, as it was written.
    """

    kind: BudgetKind
    target: str
    old: float | None
    new: float | None
    method: Method | None
    worse: float | None
    share: float | None
    why: str = ""
    limit: str = ""
    exceeded: bool = False


@dataclass(frozen=True)
class Difference:
    """Anything else that is not the same; "" where a bundle has none of it."""

    where: str
    old: str
    new: str


@dataclass(frozen=True)
class Diff:
    """What changed. `outcome` is "broken" where a regression is not allowed, or could not be looked at."""

    outcome: str
    summary: str
    old: Mapping[str, str]
    new: Mapping[str, str]
    same_artifact: bool
    figures: tuple[Change, ...]
    budgets: tuple[Difference, ...]
    plan: tuple[Difference, ...]
    layers: tuple[Difference, ...]
    operators: tuple[Difference, ...]
    versions: tuple[Difference, ...]
    findings: tuple[Finding, ...]
    schema_version: int = 1


def parse(written: str) -> Allowed:
    """Read "latency=5%" or "size=1 KiB". Raises UsageError."""
    kind, equals, amount = (part.strip() for part in written.partition("="))
    if kind not in _UNITS or not equals:
        known = ", ".join(_UNITS)
        raise UsageError(f"--max-regression {written!r} is not KIND=AMOUNT", f"such as latency=5%; kinds: {known}")
    relative = amount.endswith("%")
    try:
        parsed = (Percent if relative else _UNITS[kind]).parse(amount)
    except SpecError as error:
        raise UsageError(f"--max-regression {written!r}: {error.what}", error.remedy) from None
    return Allowed(kind, float(parsed), relative, f"{kind}={amount}")  # type: ignore[arg-type] # a key of _UNITS


def diff(
    old: Mapping[str, bytes],
    new: Mapping[str, bytes],
    old_settings: Settings,
    new_settings: Settings,
    allowed: Sequence[Allowed] = (),
) -> Diff:
    """Compare the files of two bundles (`bundle.read`) and their settings. Raises SpecError where one is damaged."""
    reports = [_report(files) for files in (old, new)]
    sides = list(zip(reports, (old_settings, new_settings), strict=True))
    figures = [_judged(change, allowed) for change in _figures(*sides)]
    findings = [Finding("note", where, what) for where, what in _notes(*reports)]
    compared = {change.kind for change in figures if change.worse is not None}
    unseen = [limit for limit in allowed if limit.kind not in compared]
    findings += [Finding("skipped", one.kind, f"{one.written} was not looked at: nothing to compare") for one in unseen]
    exceeded = [change for change in figures if change.exceeded]
    names = [report.subject({"kind": change.kind, "target": change.target}) for change in exceeded]
    names += [report.named(limit.kind) for limit in unseen]
    identities = [_identity(one) for one in reports]
    return Diff(
        outcome="broken" if names else "met",
        summary=f"worse than allowed, or not comparable: {', '.join(names)}" if names else _met(allowed),
        old=identities[0],
        new=identities[1],
        same_artifact=reports[0]["artifact_sha256"] == reports[1]["artifact_sha256"],
        figures=tuple(figures),
        budgets=_budgets(*sides),
        plan=_tables(*(_plan(one["plan"]) for one in reports)),
        layers=_tables(*(_layers(one) for one in reports)),
        operators=_tables(*(_operators(one) for one in reports)),
        versions=_tables(*(one["environment"] for one in reports)),
        findings=tuple(findings),
    )


def _met(allowed: Sequence[Allowed]) -> str:
    return f"no regression beyond {', '.join(one.written for one in allowed)}" if allowed else "no limit was asked for"


def _report(files: Mapping[str, bytes]) -> Json:
    if "report.json" not in files:
        raise SpecError("the bundle has no report.json")
    return report.from_json(files["report.json"])


def _identity(one: Json) -> dict[str, str]:
    return {key: str(one[key]) for key in ("task", "profile", "outcome", "artifact", "artifact_sha256", "build_id")}


# -------------------------------------------------------------------------------------------------------- figures

_Side = tuple[Json, Settings]


def _figures(old: _Side, new: _Side) -> Iterator[Change]:
    yield _change("size", "", old[0]["size"], new[0]["size"], "counted", "")
    yield _accuracy(old[0], new[0])
    before, after = ({(row["quantity"], row["target"]): row for row in side[0]["measurements"]} for side in (old, new))
    for quantity in _UNITS:
        for kind, target in dict.fromkeys(key for key in [*before, *after] if key[0] == quantity):
            a, b = before.get((kind, target)), after.get((kind, target))
            why = _incomparable(a, b, target, old, new)
            values = [row["value"] if row else None for row in (a, b)]
            yield _change(kind, target, values[0], values[1], (b or a or {})["method"], why)


def _accuracy(old: Json, new: Json) -> Change:
    a, b = old["accuracy"], new["accuracy"]
    why = ""
    if a is None or b is None:
        why = "no metric was scored"
    elif (a["metric"], a["samples"]) != (b["metric"], b["samples"]):
        why = f"{a['metric']} over {a['samples']:,} samples, and {b['metric']} over {b['samples']:,}"
    values = [score["artifact"] if score else None for score in (a, b)]
    return _change("accuracy_drop", "", values[0], values[1], "measured", why)


def _change(kind: Any, target: str, old: float | None, new: float | None, method: Method, why: str) -> Change:
    if not why and (old is None or new is None):
        why = "in the old bundle alone" if new is None else "in the new bundle alone"
    if why or old is None or new is None:
        return Change(kind, target, old, new, method, None, None, why)
    worse = old - new if kind in LOWER_BOUNDS or kind == "accuracy_drop" else new - old
    return Change(kind, target, old, new, method, worse, worse / abs(old) if old else None)


def _incomparable(a: Json | None, b: Json | None, target: str, old: _Side, new: _Side) -> str:
    """Why two figures of a device say nothing of the two artifacts, "" where they do."""
    if a is None or b is None or not target:
        return ""
    if a["method"] != b["method"]:
        return f"{a['method']} and {b['method']}"
    threads = [side[1].profile.threads for side in (old, new)]
    if threads[0] != threads[1]:
        return f"{threads[0]} and {threads[1]} threads"
    machines = [side[0]["environment"].get("machine") for side in (old, new)]
    if target == "host" and machines[0] != machines[1]:
        return f"measured on two machines: {machines[0]}; {machines[1]}"
    targets = [_target(side[1], target) for side in (old, new)]
    return "" if targets[0] == targets[1] else f"{target} is described otherwise"


def _target(settings: Settings, name: str) -> Target | None:
    return next((target for target in (*settings.targets, *settings.unreached) if target.name == name), None)


def _judged(change: Change, allowed: Sequence[Allowed]) -> Change:
    if change.worse is None:
        return change
    for limit in allowed:
        if limit.kind == change.kind and not change.exceeded:
            by = change.share if limit.relative else change.worse
            too_much = by is None or by > limit.amount * (1 + 1e-9)  # None: a share of nothing
            change = replace(change, limit=limit.written, exceeded=change.worse > 0 and too_much)
    return change


# ----------------------------------------------------------------------------------------------------- all the rest


def _notes(old: Json, new: Json) -> Iterator[tuple[str, str]]:
    """What should be known of the comparison itself."""
    for key in ("task", "profile"):
        if old[key] != new[key]:
            yield key, f"{old[key]} in the old bundle, {new[key]} in the new one"
    if any(row["target"] == "host" and row["method"] == "measured" for row in new["measurements"]):
        yield "host", "its figures were each timed once, at different moments: a few percent may be the machine's"
    if old["environment"].get("edgebuild") != new["environment"].get("edgebuild"):
        yield "simulated figures", "from two versions of edgebuild, whose simulators may differ"
    if old["environment"].get("inputs") != new["environment"].get("inputs"):
        yield "accuracy", "the tasks' calibration inputs differ, and the data of the metric may"
    before, after = ({row["what"] for row in one["findings"] if row["kind"] == "fallback"} for one in (old, new))
    yield from (("delegation", f"new: {what}") for what in sorted(after - before))
    yield from (("delegation", f"no longer: {what}") for what in sorted(before - after))


def _budgets(old: _Side, new: _Side) -> tuple[Difference, ...]:
    """Bounds and verdicts that differ."""

    def said(side: _Side) -> dict[str, str]:
        rows = {report.subject(row): f"{report.bound(row)}: {row['status']}" for row in side[0]["verdicts"]}
        return rows | {"threads": str(side[1].profile.threads), "targets": ", ".join(side[1].profile.targets)}

    return _tables(said(old), said(new))


def _plan(plan: Json) -> dict[str, str]:
    """A plan's choices by name."""
    simple = ("base", "precision", "scheme", "distil", "distil_steps", "qat_steps")
    choices = {key.replace("_", " "): str(plan[key]) for key in simple}
    choices |= {f"block {name}": "dropped" for name in plan["dropped"]}
    choices |= {f"group {row['group']}": f"{row['channels']} of {row['of']} channels" for row in plan["widths"]}
    choices |= {f"layer {row['layer']}": f"{row['kind']} {'x'.join(map(str, row['ranks']))}" for row in plan["forms"]}
    return choices | {f"layer {name} precision": "fp32" for name in plan["keep_fp32"]}


def _layers(one: Json) -> dict[str, str]:
    return {
        row["name"]: f"{row['change'] or 'keep'}, {row['precision']}, {row['parameters'][1]:,} parameters, "
        f"{row['macs'][1]:,} MACs"
        for row in one["layers"]
    }


def _operators(one: Json) -> dict[str, str]:
    """Operators of each simulated inference by kind: how many there are, and their time."""
    found: dict[str, list[float]] = {}
    for item in one["measurements"]:
        for operator in item["operators"]:
            key = f"{operator['name'].partition(' #')[0]} on {item['target']}"
            found.setdefault(key, []).append(operator["seconds"] or 0.0)
    return {key: f"{len(times)}, {report.figure('latency', sum(times))}" for key, times in found.items()}


def _tables(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[Difference, ...]:
    return tuple(
        Difference(key, old.get(key, ""), new.get(key, ""))
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    )
