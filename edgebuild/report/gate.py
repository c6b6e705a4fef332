"""What `edgebuild check` and `edgebuild diff` say, made from their JSON."""

from rich.console import Console

from edgebuild.report.content import MEASUREMENT, Section, Table, measurement, parity_table
from edgebuild.report.figures import Json, bound, found, named, of, signed, subject
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
