"""What `edgebuild check` and `edgebuild diff` say, made from their JSON."""

from rich.console import Console

from edgebuild.report.content import MEASUREMENT, Section, Table, measurement, parity_table
from edgebuild.report.figures import NONE, Json, bound, figure, found, named, of, signed, subject
from edgebuild.report.render import markdown_page, terminal_page

_VERDICTS = ("Budget", "Target", "Bound", "At build", "Now", "Margin", "Status", "Note")
_FINDINGS = ("Kind", "Where", "What")


def check_markdown(check: Json) -> str:
    """A check in GitHub's Markdown."""
    return markdown_page(_title(check), _heading(check), _sections(check))


def check_terminal(check: Json, console: Console) -> None:
    """A check for a terminal, without its long tables."""
    terminal_page(_title(check), check["outcome"], _heading(check), _sections(check), console)


def _title(check: Json) -> str:
    return f"Check of {check['task']} for {check['profile']}: {check['outcome']}"


def _heading(check: Json) -> list[str]:
    artifact = f"Artifact: {check['artifact']}, {check['size']:,} bytes, sha256 {check['artifact_sha256']}"
    return [check["summary"], artifact, f"Build: {check['build_id']}"]


def _sections(check: Json) -> tuple[Section, ...]:
    """Does it still fit, are the outputs right, and where the figures are from."""
    reported = {(row["kind"], row["target"]): row["value"] for row in check["reported"]}
    verdicts = tuple(
        (
            named(row["kind"]),
            row["target"] or "any",
            bound(row),
            of(row, reported.get((row["kind"], row["target"]))),
            found(row, check),
            signed(row["margin"]),
            row["status"],
            row["note"],
        )
        for row in check["verdicts"]
    )
    wrong = [row["target"] for row in check["parity"] if not row["ok"]]
    outputs = f"They differ on {', '.join(wrong)}." if wrong else "They are those of the test vectors."
    findings = tuple((row["kind"], row["where"], row["what"]) for row in check["findings"])
    return (
        Section("Does it fit?", (), (Table("", _VERDICTS, verdicts),)),
        Section("Are the outputs right?", (outputs,) if check["parity"] else (), (parity_table("", check),)),
        Section(
            "Can I believe it?",
            () if findings else ("Findings: none.",),
            (
                Table("Findings", _FINDINGS, findings),
                Table("All figures", MEASUREMENT, tuple(map(measurement, check["measurements"])), detail=True),
                Table("Versions and machine", ("What", "Value"), tuple(check["environment"].items()), detail=True),
            ),
        ),
    )


def check_problems(check: Json) -> list[tuple[str, str, str]]:
    """What keeps a check from being met: the status, what it is of, and a sentence with the figures."""
    problems = [
        (
            row["status"],
            subject(row),
            f"{found(row, check)}, bound {bound(row)}" + (f"; {row['note']}" if row["note"] else ""),
        )
        for row in check["verdicts"]
        if row["status"] != "pass"
    ]
    return problems + [
        ("fail", f"outputs on {row['target']}", f"they differ from {row['reference']}: SQNR {row['sqnr_db']} dB")
        for row in check["parity"]
        if not row["ok"]
    ]


# ----------------------------------------------------------------------------------------------------------- diff

_CHANGES = ("Figure", "Target", "Old", "New", "Change", "How", "Status", "Note")


def diff_markdown(diff: Json) -> str:
    """A comparison of two bundles in GitHub's Markdown."""
    return markdown_page(_diff_title(diff), _diff_heading(diff), _diff_sections(diff))


def diff_terminal(diff: Json, console: Console) -> None:
    """The same for a terminal."""
    terminal_page(_diff_title(diff), diff["outcome"], _diff_heading(diff), _diff_sections(diff), console)


def diff_problems(diff: Json) -> list[tuple[str, str]]:
    """What is worse than allowed or could not be looked at, each with a sentence."""
    problems = [
        (_subject(row), f"{_value(row, 'old')} to {_value(row, 'new')}, which is more than {row['limit']}")
        for row in diff["figures"]
        if row["exceeded"]
    ]
    return problems + [(row["where"], row["what"]) for row in diff["findings"] if row["kind"] == "skipped"]


def _diff_title(diff: Json) -> str:
    old, new = diff["old"], diff["new"]
    names = [f"{side['task']} for {side['profile']}" for side in (old, new)]
    return f"Diff of {names[0]} to {names[1]}" if names[0] != names[1] else f"Diff of {names[0]}"


def _diff_heading(diff: Json) -> list[str]:
    sides = [
        f"{name}: build {diff[key]['build_id']}, {diff[key]['outcome']}, sha256 {diff[key]['artifact_sha256']}"
        for name, key in (("Old", "old"), ("New", "new"))
    ]
    same = ["The artifact is the same to the byte."] if diff["same_artifact"] else []
    return [diff["summary"], *sides, *same]


def _diff_sections(diff: Json) -> tuple[Section, ...]:
    figures = tuple(
        (
            _named(row["kind"]),
            row["target"] or "any",
            _value(row, "old"),
            _value(row, "new"),
            _moved(row),
            row["method"],
            "fail" if row["exceeded"] else "pass" if row["limit"] else "",
            f"not compared: {row['why']}" if row["why"] else row["limit"],
        )
        for row in diff["figures"]
    )
    findings = tuple((row["kind"], row["where"], row["what"]) for row in diff["findings"])
    rest = {
        "Budgets and verdicts": ("budgets", "What"),
        "Plan": ("plan", "Choice"),
        "Layers": ("layers", "Layer"),
        "Operators": ("operators", "Operator"),
        "Versions, machine and seed": ("versions", "What"),
    }
    tables = [
        Table(title, (head, "Old", "New"), tuple((row["where"], row["old"], row["new"]) for row in diff[key]))
        for title, (key, head) in rest.items()
    ]
    same = [table.title.lower() for table in tables if not table.rows]
    return (
        Section("What became of the figures?", (), (Table("", _CHANGES, figures),)),
        Section("What else changed?", (f"The same: {'; '.join(same)}.",) if same else (), tuple(tables)),
        Section("Can I believe it?", () if findings else ("Findings: none.",), (Table("", _FINDINGS, findings),)),
    )


def _subject(row: Json) -> str:
    return _named(row["kind"]) + (f" on {row['target']}" if row["target"] else "")


def _named(kind: str) -> str:
    return "accuracy" if kind == "accuracy_drop" else named(kind)


def _value(row: Json, which: str) -> str:
    return figure("" if row["kind"] == "accuracy_drop" else row["kind"], row[which])


def _moved(row: Json) -> str:
    """The change with the figure's own sign: up is more, whether that is better or worse."""
    if row["worse"] is None:
        return NONE
    if row["worse"] == 0:
        return "the same"
    word = "worse" if row["worse"] > 0 else "better"
    if row["kind"] in ("accuracy_drop", "min_delegated") or row["share"] is None:
        kind = row["kind"] if row["share"] is None else "accuracy_drop"
        return f"{figure(kind, abs(row['worse']))} {word}"
    return f"{signed(row['new'] / row['old'] - 1)} ({word})"
