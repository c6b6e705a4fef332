"""The three looks of a report: Markdown, the terminal and JUnit."""

import re
from collections.abc import Sequence
from itertools import chain
from typing import Any
from xml.etree import ElementTree as ET

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from edgebuild.report import content
from edgebuild.report.figures import bound, found, one_line, signed, subject

_MARKDOWN_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$])")
_MARKDOWN_START = re.compile(r"^(\d*)([-+=#.)])")  # what makes a line a list, a heading or a rule
_ASCII = str.maketrans({"≤": "<=", "≥": ">=", "→": "->", "±": "+/-", "—": "-"})
_STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}
_OUTCOMES = {"met": "green", "broken": "bold red", "inconclusive": "yellow", "infeasible": "bold red"}


def markdown(report: dict[str, Any]) -> str:
    """The whole report in GitHub's Markdown. Long tables are folded away."""
    return markdown_page(_title(report), content.heading(report), content.sections(report))


def markdown_page(title: str, heading: Sequence[str], sections: Sequence[content.Section]) -> str:
    """A title, what matters most, and numbered sections in GitHub's Markdown."""
    lines = [f"# {escaped(title)}", ""]
    lines += [f"{_paragraph(line)}\n" for line in heading]
    for i, section in enumerate(sections, 1):
        lines += [f"## {i}. {section.title}", ""]
        lines += [*(f"- {_paragraph(line)}" for line in section.lines), ""] if section.lines else []
        for table in section.tables:
            lines += _markdown_table(table) if table.lines else []
    return "\n".join(lines).rstrip("\n") + "\n"


def terminal(report: dict[str, Any], console: Console) -> None:
    """The report without its long tables. rich honours NO_COLOR, and colours nothing but a terminal."""
    terminal_page(_title(report), report["outcome"], content.heading(report), content.sections(report), console)


def terminal_page(
    title: str, outcome: str, heading: Sequence[str], sections: Sequence[content.Section], console: Console
) -> None:
    """As `markdown_page`, for a terminal and without the long tables; the title is coloured by the outcome."""
    ascii_only = not console.encoding.lower().startswith("utf")

    def text(written: str, style: str = "") -> Text:
        # Text and not a string: a name such as "[red]" is no markup
        line = one_line(written)
        return Text(line.translate(_ASCII).encode("ascii", "replace").decode() if ascii_only else line, style)

    console.print(text(title, _OUTCOMES[outcome]))
    for line in heading:
        console.print(text(line))
    for i, section in enumerate(sections, 1):
        console.print()
        console.print(text(f"{i}. {section.title}", "bold"))
        for line in section.lines:
            console.print(text(line))
        for table in section.tables:
            if table.detail or not table.lines:
                continue
            used = [k for k in range(len(table.columns)) if any(row[k] for row in table.lines)]
            if not used:
                continue
            if table.title:
                console.print(text(table.title, "italic"))
            cells = [[text(row[k], _STYLES.get(row[k], "")) for k in used] for row in (table.columns, *table.lines)]
            grid = RichTable(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
            for column, width in zip(cells[0], _widths(cells, console.width), strict=True):
                grid.add_column(column, overflow="fold", width=width)
            for row in cells[1:]:
                grid.add_row(*row)
            console.print(grid)


def junit(report: dict[str, Any]) -> str:
    """JUnit XML: a test case for each verdict and each parity. A failed one is a failure, an undecided one is skipped.

    A build that broke down without either, such as an infeasible one, is a failed case "outcome": CI must not see an
    empty suite and be content.
    """
    suite = ET.Element("testsuite", name=one_line(f"edgebuild {report['task']} for {report['profile']}"))
    for verdict in report["verdicts"]:
        margin = signed(verdict["margin"])
        said = f"{found(verdict, report)}, bound {bound(verdict)}, margin {margin}"
        note = f"{said}; {verdict['note']}" if verdict["note"] else said
        _case(suite, report, "budgets", subject(verdict), verdict["status"], note)
    for parity in report["parity"]:
        said = (
            f"diverges first at {parity['first_divergence']}"
            if parity["first_divergence"]
            else "outputs differ too much"
        )
        name = f"{parity['target']} against {parity['reference']}"
        _case(suite, report, "parity", name, "pass" if parity["ok"] else "fail", said)
    if report["outcome"] in ("broken", "infeasible") and suite.find("testcase/failure") is None:
        _case(
            suite,
            report,
            "build",
            "outcome",
            "fail",
            "; ".join((report["outcome"], *content.sections(report)[0].lines)),
        )
    counts = {"tests": "testcase", "failures": "testcase/failure", "skipped": "testcase/skipped"}
    for element in (root := ET.Element("testsuites"), suite):
        for name, path in counts.items():
            element.set(name, str(len(suite.findall(path))))
        element.set("errors", "0")
    root.append(suite)
    ET.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _title(report: dict[str, Any]) -> str:
    return f"{report['task']} for {report['profile']}: {report['outcome']}"


def _markdown_table(table: content.Table) -> list[str]:
    rows = [f"| {' | '.join(map(escaped, cells))} |" for cells in (table.columns, *table.lines)]
    grid = [rows[0], "|" + " --- |" * len(table.columns), *rows[1:], ""]
    if table.detail:  # the blank lines around the table are what makes GitHub read it as Markdown
        return ["<details>", f"<summary>{table.title}</summary>", "", *grid, "</details>", ""]
    return [f"**{table.title}**", "", *grid] if table.title else grid


def _widths(cells: list[list[Text]], room: int) -> list[int]:
    """The width of each column, such that the table fits the room: cells are wrapped first, then words are split."""
    # worked out here: rich splits words while other columns have room, and crops where it is given minima
    columns = list(zip(*cells, strict=True))
    full = [max(cell.cell_len for cell in column) for column in columns]
    word = [max((cell_len(part) for cell in column for part in cell.plain.split()), default=0) for column in columns]
    wrapped = ([max(w, min(f, most)) for f, w in zip(full, word, strict=True)] for most in range(max(full), 0, -1))
    split = ([min(w, most) for w in word] for most in range(max(word), 0, -1))
    return next((widths for widths in chain(wrapped, split) if sum(widths) + len(widths) - 1 <= room), [1] * len(full))


def _case(suite: ET.Element, report: dict[str, Any], group: str, name: str, status: str, message: str) -> None:
    classname = f"{report['task']}.{report['profile']}.{group}"
    case = ET.SubElement(suite, "testcase", classname=one_line(classname), name=one_line(name), time="0")
    kind = {"fail": "failure", "inconclusive": "skipped"}.get(status)
    if kind:
        ET.SubElement(case, kind, message=one_line(message))


def escaped(text: str) -> str:
    """Text that Markdown shows as it is, in a table as well."""
    return _MARKDOWN_SPECIAL.sub(r"\\\1", one_line(text).strip())


def _paragraph(text: str) -> str:
    return _MARKDOWN_START.sub(r"\1\\\2", escaped(text))
