"""What a report says, section by section, made from its JSON; how it looks: `edgebuild.report.render` and `html`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from edgebuild.report.figures import (
    NONE,
    Json,
    band,
    bound,
    change,
    compared,
    figure,
    found,
    named,
    of,
    plural,
    share,
    signed,
    subject,
)
from edgebuild.spec import LOWER_BOUNDS
from edgebuild.units import Percent, Points

HEADLINES = {
    "met": "All budgets are met",
    "broken": "A budget is broken",
    "inconclusive": "Undecided: a bound lies inside the error band of a figure that was not measured",
    "infeasible": "No plan meets every budget, so nothing was built",
}


@dataclass(frozen=True)
class Gauge:
    """A budget to draw: how far the found and the predicted figure come, as shares of the bound; `error` likewise."""

    found: float
    predicted: float | None
    error: float


@dataclass(frozen=True)
class Cell:
    """A figure in words, with the number that it is sorted by, and what is drawn beside it.

    `bars`: the number itself, or what it was before and is after, each long in proportion to its column's largest.
    """

    text: str
    value: float | None
    bars: tuple[float | None, ...] = ()
    gauge: Gauge | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Table:
    """Rows of cells under a title, and perhaps one of sums. `detail`: long, so it is folded away or left out."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    detail: bool = False
    total: tuple[str | Cell, ...] = ()

    @property
    def lines(self) -> tuple[tuple[str, ...], ...]:
        """All rows in words, the sums last."""
        return tuple(tuple(map(str, row)) for row in (*self.rows, *([self.total] if self.total else [])))


PointKind = Literal["plan", "chosen", "draft", "built", "artifact"]


@dataclass(frozen=True)
class Point:
    """A plan on a curve: what it costs (bytes or seconds), its loss in nats, and both in words."""

    cost: float
    loss: float
    kind: PointKind
    text: str


@dataclass(frozen=True)
class Curve:
    """Loss against what is budgeted, `bound` being the budget; `quantity` says in which unit the costs are."""

    title: str
    quantity: str
    bound: float | None
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Section:
    """A question and its answer: sentences first, then curves, then tables."""

    title: str
    lines: tuple[str, ...]
    tables: tuple[Table, ...]
    curves: tuple[Curve, ...] = ()


def heading(report: Json) -> tuple[str, ...]:
    """What stands above the sections: the outcome in a sentence, the artifact, the build."""
    lines = [report["summary"]] if report["summary"] else []
    if report["artifact"]:
        lines.append(f"Artifact: {report['artifact']}, {report['size']:,} bytes, sha256 {report['artifact_sha256']}")
    if report["build_id"]:
        lines.append(f"Build: {report['build_id']}")
    return tuple(lines)


def sections(report: Json) -> tuple[Section, ...]:
    """The five answers, in the order that people ask."""
    return (_fit(report), _cost(report), _done(report), _trust(report), _reachable(report))


def _fit(report: Json) -> Section:
    rows = tuple(
        (
            named(verdict["kind"]),
            verdict["target"] or "any",
            bound(verdict),
            of(verdict, verdict["predicted"]),
            found(verdict, report),
            Cell(signed(verdict["margin"]), verdict["margin"], gauge=_gauge(verdict, report)),
            verdict["status"],
            verdict["note"],
        )
        for verdict in report["verdicts"]
    )
    columns = ("Budget", "Target", "Bound", "Predicted", "Found", "Margin", "Status", "Note")
    lines = (
        f"{HEADLINES[report['outcome']]}.",
        *(binding(report["reachable"]) if report["outcome"] == "infeasible" else ()),
    )
    return Section("Does it fit?", lines, (Table("", columns, rows),))


def _gauge(verdict: Json, report: Json) -> Gauge | None:
    bound, value, predicted = verdict["bound"], verdict["value"], verdict["predicted"]
    if not bound or value is None:
        return None
    return Gauge(value / bound, None if predicted is None else predicted / bound, band(verdict, report) * value / bound)


def binding(rows: Sequence[Json]) -> tuple[str, ...]:
    """Two lines for the `reachable` rows of an infeasible build: what binds, and what would be feasible."""
    if not rows:
        return ()
    alone = [row for row in rows if not row["feasible"]]
    nearest = [row for row in rows if row["nearest"] is not None]
    bound_by = alone or nearest or rows
    asked = "; ".join(
        f"{subject(row)}: {of(row, row['bound'])} asked" + ("" if row["feasible"] else f", {_least(row)}")
        for row in bound_by
    )
    together = "" if alone else " (each could be met alone, but not all of them together)"
    if not nearest:
        return (f"What binds: {asked}{together}.", "Nearest feasible: none by changing one budget alone.")
    values = " or ".join(f"{subject(row)} {of(row, row['nearest'])} ({_how(row)})" for row in nearest)
    return (f"What binds: {asked}{together}.", f"Nearest feasible: {values}, every other budget as asked.")


def _least(row: Json) -> str:
    word = "above" if row["kind"] in LOWER_BOUNDS else "below"
    return f"no plan is {word} {of(row, row['smallest'])}"


def _how(row: Json) -> str:
    return "measured on a plan that was built for it" if row["measured"] else "predicted"


def _cost(report: Json) -> Section:
    rows = []
    accuracy = report["accuracy"]
    if accuracy:
        scores = [_score(accuracy, which) for which in ("original", "artifact")]
        rows.append((accuracy["metric"], *scores, _drop(accuracy["drop"])))
    size, original = report["size"], report["original_size"]
    built = (
        (figure("size", size), compared(original, size, "smaller", "larger")) if report["artifact"] else (NONE, NONE)
    )
    rows.append(("size", figure("size", original), *built))
    rows += _measured_pairs(report)
    lines = []
    if accuracy:
        counted = f"The {accuracy['metric']} is over {plural(accuracy['samples'], 'sample')}"
        lines.append(f"{counted}, scored on the artifact itself; brackets are 95% intervals.")
        lines += [accuracy["detail"]] if accuracy["detail"] else []
    elif report["artifact"]:
        lines.append("No metric was scored, so what the artifact cost in accuracy is not known.")
    tables = (
        Table("", ("", "Original", "Artifact", "Change"), tuple(rows)),
        Table("Peak memory by kind", _MEMORY, tuple(_memory(report))),
    )
    return Section("What did it cost?", tuple(lines), tables)


# What is live at the moment when most is, where a device counts that.
_KINDS = {
    "program": "program: the file's bytes that are held",
    "weights": "weights: packed by the delegate, with its operators",
    "arena": "arena: planned inputs, outputs and activations",
    "workspace": "workspace: taken by the delegate while running",
    "runtime": "runtime: everything else",
}
_MEMORY = ("On", "Kind", "Original at its peak", "Artifact at its peak")


def _memory(report: Json) -> list[tuple[str, ...]]:
    splits = [
        {item["target"]: item["split"] for item in report[key] if item["quantity"] == "peak_memory" and item["split"]}
        for key in ("original_measurements", "measurements")
    ]
    return [
        (target, words, *(figure("peak_memory", split.get(target, {}).get(kind)) for split in splits))
        for target in dict.fromkeys([*splits[1], *splits[0]])
        for kind, words in _KINDS.items()
    ]


def _drop(drop: float | None) -> str:
    if not drop:
        return NONE if drop is None else "the same"
    return f"{Points(abs(drop))} {'lower' if drop > 0 else 'higher'}"


def _score(accuracy: Json, which: str) -> str:
    value, interval = accuracy[which], accuracy[f"{which}_interval"]
    if value is None or interval is None or None in interval:
        return figure("", value)
    return f"{value:.4g} [{interval[0]:.4g}, {interval[1]:.4g}]"


def _measured_pairs(report: Json) -> list[tuple[str, ...]]:
    """Original against artifact for each quantity that people budget, on each target."""
    before = {(item["quantity"], item["target"]): item for item in report["original_measurements"]}
    after = {(item["quantity"], item["target"]): item for item in report["measurements"]}
    words = {
        "latency": ("faster", "slower"),
        "throughput": ("slower", "faster"),  # a smaller throughput is a slower one
        "peak_memory": ("smaller", "larger"),
        "sram": ("smaller", "larger"),
        "flash": ("smaller", "larger"),
    }
    rows = []
    for key in dict.fromkeys([*after, *before]):
        quantity, target = key
        if quantity not in words:
            continue
        cells = [
            f"{figure(quantity, item['value'])} ({item['method']})" if item else NONE
            for item in (before.get(key), after.get(key))
        ]
        difference = NONE
        # a measured figure against an estimated one would compare the methods and not the models
        if key in before and key in after and before[key]["method"] == after[key]["method"]:
            values = before[key]["value"], after[key]["value"]
            difference = NONE if None in values else compared(*values, *words[quantity])
        rows.append((subject({"kind": quantity, "target": target}), *cells, difference))
    return rows


def _done(report: Json) -> Section:
    plan, layers = report["plan"], report["layers"]
    if plan is None:
        return Section("What was done?", ("Nothing: there is no plan to carry out.",), ())
    columns: tuple[str, ...] = (
        "Layer",
        "Operator",
        "Change",
        "Precision",
        "Parameters",
        "MACs",
        "Loss estimate (nats)",
    )
    targets = sorted({target for row in layers for target in row["latency"]})
    changed = tuple(_layer(row) for row in layers if _changed(row))
    full = tuple(
        (*_layer(row), *(_pair("latency", row["latency"].get(target)) for target in targets)) for row in layers
    )
    total: tuple[str | Cell, ...] = ()
    whole: tuple[str | Cell, ...] = ()
    if layers:
        sums = (_pair("count", _sums(row[key] for row in layers)) for key in ("parameters", "macs"))
        total = ("all layers", "", "", "", *sums, "")
        latency = (_sums(row["latency"].get(target) for row in layers) for target in targets)
        whole = (*total, *(_pair("latency", pair) for pair in latency))
    tables: tuple[Table, ...] = (
        Table(f"Layers that changed: {len(changed)} of {len(layers)}", columns, changed, total=total),
        Table(
            "All layers", (*columns, *(f"Predicted on {target}" for target in targets)), full, detail=True, total=whole
        ),
    )
    lines = list(_plan_in_words(plan))
    built = next((row for row in report["rounds"] if row["artifact_sha256"] == report["artifact_sha256"]), None)
    if built and built["quantization"]:
        lines.insert(2, f"How: {built['quantization']}.")
    return Section("What was done?", tuple(lines), (*tables, *_where_the_time_goes(report)))


_TIME = ("Layer", "Operators", "Time", "Share", "Waiting for", "Million instructions", "Lines not in L2", "Memory")
_LONGEST = 8  # rows of the short table


def _where_the_time_goes(report: Json) -> tuple[Table, ...]:
    """For each simulated latency, what each layer takes of it: the longest ones, and all."""
    tables = []
    for item in report["measurements"]:
        if not item["operators"]:
            continue
        layers: dict[str, list[Json]] = {}
        for operator in item["operators"]:
            layers.setdefault(operator["layer"] or f"({operator['name'].partition(' #')[0]})", []).append(operator)
        rows = [_time(name, operators, item["value"]) for name, operators in layers.items()]
        longest = sorted(rows, key=lambda row: -row[0])[:_LONGEST]
        title = f"Where the time goes on {item['target']}"
        short = Table(f"{title}: the longest {len(longest)} of {len(rows)}", _TIME, tuple(row[1] for row in longest))
        tables += [short, Table(title, _TIME, tuple(row[1] for row in rows), detail=True)]
    return tuple(tables)


def _time(name: str, operators: Sequence[Json], whole: float | None) -> tuple[float, tuple[str | Cell, ...]]:
    """Seconds of a layer's operators, and their row."""
    seconds = sum(operator["seconds"] or 0.0 for operator in operators)
    bounds: dict[str, float] = {}
    for operator in operators:
        for bound_by, part in operator["bounds"].items():
            bounds[bound_by] = bounds.get(bound_by, 0.0) + (part or 0.0)
    waits = ", ".join(
        f"{bound_by} {part / seconds:.0%}"
        for bound_by, part in sorted(bounds.items(), key=lambda pair: -pair[1])
        if seconds and part / seconds >= 0.05
    )
    kinds = dict.fromkeys(operator["name"].partition(" #")[0] for operator in operators)
    instructions = sum(sum(operator["instructions"].values()) for operator in operators)
    misses, moved = (sum(operator[key] for operator in operators) for key in ("l2_misses", "memory_bytes"))
    row = (
        name,
        ", ".join(kinds),
        Cell(figure("latency", seconds), seconds, (seconds,)),
        Cell(share(seconds / whole), seconds / whole) if whole else NONE,
        waits,
        Cell(f"{instructions / 1e6:.3g}", instructions),
        Cell(f"{misses:,}", misses),
        Cell(figure("size", moved), moved),
    )
    return seconds, row


_QUANTIZED = {
    "static": "Quantized to int8",
    "dynamic": "Quantized to int8, activations as they come",
    "8da4w": "Linear layers quantized to 4-bit weights in groups and 8-bit activations",
}


def _plan_in_words(plan: Json) -> tuple[str, ...]:
    bases = {
        "model": "the task's own model",
        "shortened": f"the task's own model without the residual blocks {', '.join(plan['dropped'])}",
        "student": "the student that the task brings",
    }
    lines = [f"Compressed: {bases[plan['base']]}."]
    if plan["precision"] == "int8":
        kept = f", but for {', '.join(plan['keep_fp32'])}" if plan["keep_fp32"] else ""
        lines.append(f"{_QUANTIZED[plan['scheme']]}{kept}.")
    else:
        lines.append("Kept in fp32.")
    if plan["widths"]:
        widths = (f"{width['group']} {width['channels']} of {width['of']}" for width in plan["widths"])
        lines.append(f"Pruned channel groups, by what is kept: {', '.join(widths)}.")
    if plan["forms"]:
        forms = (
            f"{form['layer']} by {form['kind']} at rank {'x'.join(map(str, form['ranks']))}" for form in plan["forms"]
        )
        lines.append(f"Factorized: {', '.join(forms)}.")
    if plan["distil"]:
        lines.append(f"Distilled from the original model for {plural(plan['distil_steps'], 'step')}.")
    if plan["qat_steps"]:
        lines.append(f"Trained with the rounding for {plural(plan['qat_steps'], 'step')}.")
    return (*lines, *(f"Why: {why}" for why in plan["why"]))


def _changed(row: Json) -> bool:
    pairs = row["parameters"], row["macs"]
    return row["change"] not in ("", "keep") or any(before != after for before, after in pairs)


def _layer(row: Json) -> tuple[str | Cell, ...]:
    return (
        row["name"],
        row["op"],
        row["change"],
        row["precision"],
        _pair("count", row["parameters"]),
        _pair("count", row["macs"]),
        Cell(figure("", row["loss"]), row["loss"]),
    )


def _pair(quantity: str, pair: Sequence[float | None] | None) -> Cell:
    """A figure before and after, sorted by what it is after."""
    return Cell(change(quantity, pair), pair[1], tuple(pair)) if pair else Cell(NONE, None)


def _sums(pairs: Iterable[Sequence[float | None] | None]) -> tuple[float, float]:
    """What the pairs add up to; what is not known adds nothing."""
    known = [pair for pair in pairs if pair]
    return sum(pair[0] or 0 for pair in known), sum(pair[1] or 0 for pair in known)


def _trust(report: Json) -> Section:
    predictions = tuple(
        (
            str(row["number"]),
            subject({"kind": item["quantity"], "target": item["target"]}),
            of({"kind": item["quantity"]}, item["predicted"]),
            f"{of({'kind': item['quantity']}, item['found'])} ({item['method']})",
            signed(item["error"]),
        )
        for row in report["rounds"]
        for item in row["predictions"]
    )
    findings = tuple((item["kind"], item["where"], item["what"]) for item in report["findings"])
    measurements = tuple(
        (row[0], which, *row[1:])
        for which, key in (("artifact", "measurements"), ("original", "original_measurements"))
        for row in map(measurement, report[key])
    )
    stages = sorted(report["stages"].items(), key=lambda item: -(item[1] or 0.0))
    lines = [f"Rounds tried: {len(report['rounds'])}.", _delegation(report)]
    if stages:
        spent = (f"{name} {figure('latency', value)}" for name, value in stages)
        lines.append(f"Time by stage: {', '.join(spent)}.")
    if not findings:
        lines.append("Findings: none.")
    tables = (
        Table("Prediction against what was found", _PREDICTIONS, predictions),
        Table(
            "The latency model's own error, each layer predicted from all others",
            _CALIBRATION,
            _calibration(report),
            detail=True,
        ),
        Table("Trials that the loss estimates were calibrated by", _TRIALS, tuple(map(_trial, report["trials"]))),
        parity_table("Outputs of the artifact against the original", report),
        Table("Findings", ("Kind", "Where", "What"), findings),
        Table("Versions, machine and seed", ("What", "Value"), tuple(report["environment"].items())),
        Table("All figures", _MEASUREMENTS, measurements, detail=True),
    )
    return Section("Can I believe it?", tuple(line for line in lines if line), tables)


MEASUREMENT = ("Quantity", "Value", "How", "Error", "Runs", "Detail")


def measurement(item: Json) -> tuple[str, ...]:
    """The row of a figure under the heads of MEASUREMENT."""
    return (
        subject({"kind": item["quantity"], "target": item["target"]}),
        figure(item["quantity"], item["value"]),
        item["method"],
        f"± {Percent(item['error'])}" if item["error"] else "",
        f"{item['runs']:,}",
        item["detail"],
    )


def parity_table(title: str, report: Json) -> Table:
    """What was compared with what, and how it agrees."""
    return Table(title, _PARITY, tuple(map(_parity, report["parity"])))


_PREDICTIONS = ("Round", "Budget", "Predicted", "Found", "Prediction off by")
_TRIALS = ("Technique", "Changes", "Loss estimated (nats)", "Loss found (nats)")
_MEASUREMENTS = (MEASUREMENT[0], "Of", *MEASUREMENT[1:])
_PARITY = (
    "Target",
    "Held against",
    "Samples",
    "SQNR",
    "Top-1 agreement",
    "Bit-exact",
    "Largest difference",
    "Agrees",
    "Diverges first at",
)


def _parity(row: Json) -> tuple[str, ...]:
    unknown = "no noise" if row["max_abs"] == 0 else "not finite"
    return (
        row["target"],
        row["reference"],
        f"{row['samples']:,}",
        unknown if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB",
        share(row["agreement"]),
        "yes" if row["bit_exact"] else "no",
        "not finite" if row["max_abs"] is None else f"{row['max_abs']:.3g}",
        "yes" if row["ok"] else "no",
        row["first_divergence"],
    )


def _delegation(report: Json) -> str:
    figures = [item["value"] for item in report["measurements"] if item["quantity"] == "min_delegated"]
    figures += [item["value"] for item in report["verdicts"] if item["kind"] == "min_delegated"]
    fallen = [item["where"] for item in report["findings"] if item["kind"] == "fallback"]
    share = f"Delegated: {figure('min_delegated', figures[0])} of the operators." if figures else ""
    return f"{share} Fell back: {', '.join(fallen)}.".strip() if fallen else share


_CALIBRATION = ("Target", "Kind", "Precision", "Timed", "Median error, each from all others", "Worst error")


def _calibration(report: Json) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            target,
            row["kind"],
            row["precision"],
            str(row["layers"]),
            share(row["median"]),
            share(row["worst"]),
        )
        for target, rows in report["calibration"].items()
        for row in rows
    )


def _trial(row: Json) -> tuple[str, ...]:
    scheme = f", {row['scheme']}" if row["technique"] == "quantize" else ""
    return f"{row['technique']}{scheme}", str(row["changes"]), figure("", row["estimated"]), figure("", row["real"])


def _reachable(report: Json) -> Section:
    rows = tuple(
        (subject(row), bound(row), of(row, row["smallest"]), "yes" if row["feasible"] else "no")
        for row in report["reachable"]
    )
    columns = ("Budget", "Bound", "Best that a plan reaches", "Feasible")
    dropped = tuple((row["where"], row["candidate"], row["reason"]) for row in report["dropped"])
    tables = (
        Table("The trade-off curve, by the planner", _frontier_columns(report), tuple(_frontier(report))),
        Table("Each budget with the others left aside, as predicted", columns, rows),
        Table("Rounds", _ROUNDS, tuple(map(_round, report["rounds"]))),
        Table("The planner's programs", _SOLVES, tuple(_solve(row) for row in report["rounds"] if row["solve"])),
        Table(f"Candidates that cannot pay: {len(dropped)}", ("Where", "Candidate", "Why"), dropped, detail=True),
    )
    lines = () if rows or report["rounds"] else ("Nothing else was looked at.",)
    return Section("What else was possible?", lines, tables, tuple(_curves(report)))


def _curves(report: Json) -> Iterator[Curve]:
    """Loss against each axis that the planner looked along: its plans along it, and all that were built."""
    bounds = {subject(row): row["bound"] for row in (*report["reachable"], *report["verdicts"])}
    for name in dict.fromkeys(point["axis"] for point in report["frontier"]):
        quantity = name.partition(" ")[0]
        points: list[tuple[str, PointKind, float | None, float | None]] = [
            (
                "this plan" if point["chosen"] else "a plan",
                "chosen" if point["chosen"] else "plan",
                point["predicted"].get(name),
                point["loss"],
            )
            for point in report["frontier"]
            if point["axis"] == name
        ]
        for row in report["rounds"]:
            found = {subject({"kind": p["quantity"], "target": p["target"]}): p["found"] for p in row["predictions"]}
            shipped = row["artifact_sha256"] == report["artifact_sha256"] != ""
            kind: PointKind = "artifact" if shipped else "draft" if row["draft"] else "built"
            points.append((_state(row) + (": the artifact" if shipped else ""), kind, found.get(name), row["loss"]))
        yield Curve(
            f"Loss against {name}",
            quantity,
            bounds.get(name),
            tuple(
                Point(cost, loss, kind, f"{figure(quantity, cost)}, loss {figure('', loss)} nats; {what}")
                for what, kind, cost, loss in points
                if cost is not None and loss is not None
            ),
        )


def _frontier_columns(report: Json) -> tuple[str, ...]:
    names = report["frontier"][0]["predicted"] if report["frontier"] else ()
    return ("Along", *(name.capitalize() for name in names), "Loss estimate (nats)", "Accuracy", "")


def _frontier(report: Json) -> list[tuple[str, ...]]:
    """The planner's points, then the plans that were built."""
    names = report["frontier"][0]["predicted"] if report["frontier"] else ()
    rows = [
        (
            point["axis"],
            *(figure(name.partition(" ")[0], point["predicted"].get(name)) for name in names),
            figure("", point["loss"]),
            NONE,
            "this plan" if point["chosen"] else "",
        )
        for point in report["frontier"]
    ]
    for row in report["rounds"] if rows else ():
        found = {subject({"kind": p["quantity"], "target": p["target"]}): p["found"] for p in row["predictions"]}
        cells = [figure(name.partition(" ")[0], found.get(name)) for name in names]
        score = NONE if row["score"] is None else f"{row['score']:.4g}"
        rows.append(("", *cells, figure("", row["loss"]), score, _state(row)))
    return rows


def _state(row: Json) -> str:
    return f"built in round {row['number']}{', not trained' if row['draft'] else ''}"


_SOLVES = ("Round", "Status", "Solver", "Writing it down", "Gap", "Binaries", "Columns", "Rows", "Nodes")


def _solve(row: Json) -> tuple[str, ...]:
    solve = row["solve"]
    times = (figure("latency", solve[key]) for key in ("seconds", "building"))
    gap = share(solve["gap"])
    counts = (f"{solve[key]:,}" for key in ("binaries", "columns", "rows", "nodes"))
    return (str(row["number"]), solve["status"], *times, gap, *counts)


_ROUNDS = ("Round", "Techniques", "Size", "Found", "Loss estimated, found (nats)", "Training", "Corrections", "Met")


def _round(row: Json) -> tuple[str, ...]:
    plan = row["plan"]
    used = {
        "student": plan["base"] == "student",
        "shorten": plan.get("dropped", ()),
        "quantize": plan["precision"] == "int8",
        "prune": plan["widths"],
        "factorize": plan["forms"],
        "distil": plan["distil"],
    }
    verdicts = (
        f"{subject(verdict)} {of(verdict, verdict['value'])} {verdict['status']}" for verdict in row["verdicts"]
    )
    corrections = (
        f"{name} x {NONE if factor is None else f'{factor:.3g}'}" for name, factor in row["corrections"].items()
    )
    return (
        str(row["number"]),
        ", ".join(name for name, on in used.items() if on) or "none",
        figure("size", row["size"]),
        "; ".join(verdicts),
        f"{figure('', row['estimated_loss'])}, {figure('', row['loss'])}",
        "a draft, not trained" if row["draft"] else row["training"],
        "; ".join(corrections),
        "yes" if row["met"] else "no",
    )
