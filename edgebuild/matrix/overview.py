"""What became of the cells, as data; Markdown, HTML, JUnit and the terminal's table are made from that."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args
from xml.etree import ElementTree as ET

import jinja2
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from edgebuild import report
from edgebuild.errors import BudgetBroken, Infeasible, UsageError
from edgebuild.matrix.cell import Ran, beside, folder, publish
from edgebuild.matrix.spec import Cell, Matrix
from edgebuild.report.figures import plural
from edgebuild.units import Seconds

Outcome = Literal["met", "broken", "inconclusive", "infeasible", "failed", "waiting"]
WAITING: Outcome = "waiting"
_STYLES = {"met": "green", "broken": "bold red", "infeasible": "bold red", "failed": "bold red"}
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Latency:
    """Seconds on a target, how they were found, and their error band as a share."""

    value: float | None
    method: str
    error: float


@dataclass(frozen=True)
class Score:
    """The task's metric before and after."""

    metric: str
    original: float | None
    artifact: float | None
    drop: float | None


@dataclass(frozen=True)
class Row:
    """A cell. Sizes are in bytes, times in seconds; paths are relative to the overview, "" where there is nothing.

    `exit_code` is that of its process, negative for a signal, None of a cell that is waiting. `reused`: it was up to
    date. `beside`: the most cells of this run that ran on its node at the same time. `started` is seconds of the epoch.
    """

    task: str
    profile: str
    outcome: Outcome = WAITING
    exit_code: int | None = None
    summary: str = ""
    error: str = ""
    size: int | None = None
    original_size: int | None = None
    latency: Mapping[str, Latency] = field(default_factory=dict)
    accuracy: Score | None = None
    bundle: str = ""
    report: str = ""
    log: str = ""
    reused: bool = False
    node: str = ""
    attempts: int = 0
    beside: int = 0
    started: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Overview:
    """All cells of a run, in the order of the matrix file. `jobs` ran at once, with `threads` each."""

    schema_version: int
    name: str
    exit_code: int
    ray: str
    jobs: int
    threads: int
    seconds: float
    cells: tuple[Row, ...]


def begin(matrix: Matrix, ray: str | None, jobs: int, threads: int) -> Overview:
    """No cell has ended yet."""
    rows = tuple(Row(cell.task, cell.profile) for cell in matrix.cells)
    return Overview(SCHEMA_VERSION, matrix.name, _exit_code(rows), ray or "", jobs, threads, 0.0, rows)


def add(so_far: Overview, output: Path, cell: Cell, ran: Ran, attempts: int, seconds: float) -> Overview:
    """The overview with one more cell ended, `seconds` after the start."""
    made = _row(output, cell, ran, attempts)
    rows = [made if key(row) == key(cell) else row for row in so_far.cells]
    rows = [replace(row, beside=_beside(row, rows)) for row in rows]
    return replace(so_far, cells=tuple(rows), seconds=round(seconds, 3), exit_code=_exit_code(rows))


def key(cell: Cell | Row) -> tuple[str, str]:
    """What tells a cell from the others."""
    return cell.task, cell.profile


def _row(output: Path, cell: Cell, ran: Ran, attempts: int) -> Row:
    log = beside(output, cell, ".log")
    row = Row(
        cell.task,
        cell.profile,
        "failed",
        ran.code,
        error=ran.error,
        log=str(log.relative_to(output)) if log.is_file() else "",
        reused=ran.reused,
        node=ran.node,
        attempts=attempts,
        started=ran.started,
        seconds=ran.seconds,
    )
    if not ran.report:
        return row
    found = report.from_json(ran.report)
    accuracy = found["accuracy"]
    bundle = folder(output, cell) if found["artifact"] else None
    pages = [beside(output, cell, ".json"), *(bundle / name for name in ("report.md", "report.html") if bundle)]
    return replace(
        row,
        outcome=found["outcome"],
        summary=found["summary"],
        size=found["size"] if bundle else None,
        original_size=found["original_size"],
        latency={
            item["target"]: Latency(item["value"], item["method"], item["error"] or 0.0)
            for item in found["measurements"]
            if item["quantity"] == "latency"
        },
        accuracy=Score(*(accuracy[name] for name in Score.__match_args__)) if accuracy else None,
        bundle=str(bundle.relative_to(output)) if bundle else "",
        report=str([page for page in pages if page.is_file()][-1].relative_to(output)),
    )


def _beside(row: Row, rows: Sequence[Row]) -> int:
    def during(other: Row, moment: float) -> bool:
        return other.started <= moment < other.started + other.seconds

    others = [other for other in rows if key(other) != key(row) and other.node == row.node and not other.reused]
    moments = [row.started, *(other.started for other in others if during(row, other.started))]
    return 0 if row.reused else max(sum(during(other, moment) for other in others) for moment in moments)


def _exit_code(rows: Sequence[Row]) -> int:
    """0 where every cell ended with 0, 3 where the others are infeasible and nothing else, and 1 elsewhere."""
    bad = {BudgetBroken.exit_code if row.outcome in ("failed", WAITING) else row.exit_code for row in rows} - {0}
    if not bad:
        return 0
    return Infeasible.exit_code if bad == {Infeasible.exit_code} else BudgetBroken.exit_code


# -------------------------------------------------------------------------------------------------------- looks


def write(output: Path, overview: Overview, with_junit: bool) -> None:
    """Write the overview, as JUnit too or not. Raises UsageError where the folder cannot be written."""
    try:
        for suffix, form in {"json": as_json, "md": markdown, "html": html}.items():
            publish(output / f"overview.{suffix}", form(overview))
        if with_junit:
            publish(output / "overview.xml", junit(output, overview))
    except OSError as error:
        raise UsageError(f"cannot write the overview at {output}: {error.strerror}", "choose another folder") from None


def as_json(overview: Overview) -> str:
    """The overview as JSON, its fields as they are named here."""
    return msgspec.json.format(msgspec.json.encode(overview), indent=2).decode() + "\n"


def line(overview: Overview, cell: Cell) -> str:
    """A cell in one line."""
    row = next(row for row in overview.cells if key(row) == key(cell))
    how = "up to date" if row.reused else f"{Seconds(row.seconds)}"
    figures = [text for text in (_size(row), _latency(row), _score(row)) if text]
    return f"{row.task} for {row.profile}: {row.outcome} ({', '.join([*figures, how])}){_dash(row.error)}"


def headline(overview: Overview) -> str:
    """How many cells ended how."""
    counts = Counter(row.outcome for row in overview.cells)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in get_args(Outcome) if counts[outcome])


def notes(overview: Overview) -> list[str]:
    """What a reader has to know of the figures."""
    where = f"the Ray cluster at {overview.ray}" if overview.ray else "one machine"
    reused = sum(row.reused for row in overview.cells)
    said = [
        f"{plural(len(overview.cells), 'cell')} on {where}, {overview.jobs} at once with "
        f"{plural(overview.threads, 'thread')} each, in {Seconds(overview.seconds)}; {reused} were up to date."
    ]
    busy = [row for row in overview.cells if row.beside and any(x.method == "measured" for x in row.latency.values())]
    if busy:
        said.append(
            f"{len(busy)} measured a latency while other cells ran on the same machine: one measured at a time, but "
            "the others went on training. For figures of a quiet machine, remove the bundle and build with --jobs 1."
        )
    if again := [f"{row.task} for {row.profile}" for row in overview.cells if row.attempts > 1]:
        said.append(f"Built again after their node was lost: {', '.join(again)}.")
    return said


_COLUMNS = ("Task", "Profile", "Outcome", "Size", "Latency", "Accuracy", "Time", "What")


def _texts(row: Row) -> tuple[str, ...]:
    time = "up to date" if row.reused else str(Seconds(row.seconds)) if row.exit_code is not None else ""
    return row.task, row.profile, row.outcome, _size(row), _latency(row), _score(row), time, row.error or row.summary


def markdown(overview: Overview) -> str:
    """The table in GitHub's Markdown."""
    escaped = report.escaped
    lines = [f"# {escaped(overview.name)}: {headline(overview)}", ""]
    lines += [f"- {escaped(note)}" for note in notes(overview)]
    lines += ["", f"| {' | '.join(_COLUMNS)} |", "|" + " --- |" * len(_COLUMNS)]
    for row in overview.cells:
        cells = [escaped(text) for text in _texts(row)]
        if row.report:
            cells[2] = f"[{cells[2]}]({row.report})"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def html(overview: Overview) -> str:
    """One page without anything from elsewhere; its links lead into the bundles beside it."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return page.get_template("overview.html.jinja").render(
        overview=overview,
        headline=headline(overview),
        notes=notes(overview),
        columns=_COLUMNS,
        rows=[(row, _texts(row)) for row in overview.cells],
        tasks=list(dict.fromkeys(row.task for row in overview.cells)),
        profiles=list(dict.fromkeys(row.profile for row in overview.cells)),
        by_key={key(row): row for row in overview.cells},
    )


def junit(output: Path, overview: Overview) -> str:
    """JUnit XML with a suite for each cell: that of its report, or a single case that failed or was not run."""
    root = ET.Element("testsuites", name=f"edgebuild matrix {overview.name}")
    for row in overview.cells:
        kept = output / row.task / f"{row.profile}.json"
        if row.outcome in ("failed", WAITING):
            root.append(_suite(row))
        else:
            suites = ET.fromstring(report.junit(report.from_json(kept.read_bytes())))
            root.extend(suites.findall("testsuite"))
        root[-1].set("time", f"{row.seconds:.3f}")
    for name in ("tests", "failures", "errors", "skipped"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _suite(row: Row) -> ET.Element:
    waiting = row.outcome == WAITING
    suite = ET.Element("testsuite", name=f"edgebuild {row.task} for {row.profile}", tests="1", failures="0")
    suite.set("errors", "0" if waiting else "1")
    suite.set("skipped", "1" if waiting else "0")
    case = ET.SubElement(suite, "testcase", classname=f"{row.task}.{row.profile}.build", name="build")
    case.set("time", f"{row.seconds:.3f}")
    ET.SubElement(case, "skipped" if waiting else "error", message="not run" if waiting else row.error)
    return suite


def terminal(overview: Overview, console: Console) -> None:
    """The table. rich honours NO_COLOR, and colours nothing but a terminal."""
    console.print(Text(f"{overview.name}: {headline(overview)}", "bold"))
    rows = [_texts(row) for row in overview.cells]
    used = [k for k in range(len(_COLUMNS)) if any(row[k] for row in rows)]
    table = Table(*(_COLUMNS[k] for k in used), box=None)
    for row in rows:
        table.add_row(*(Text(row[k], _STYLES.get(row[k], "")) for k in used))
    console.print(table)
    for note in notes(overview):
        console.print(Text(note))


def _size(row: Row) -> str:
    return "" if row.size is None else report.figure("size", row.size)


def _latency(row: Row) -> str:
    return "; ".join(
        f"{report.figure('latency', found.value)} on {target} ({found.method})" for target, found in row.latency.items()
    )


def _score(row: Row) -> str:
    score = row.accuracy
    return "" if score is None else f"{report.figure('', score.artifact)} (was {report.figure('', score.original)})"


def _dash(text: str) -> str:
    return f": {text}" if text else ""
