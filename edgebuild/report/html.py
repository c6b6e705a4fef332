"""The report as one HTML file that needs nothing else: no network, no other file, no script that it did not bring."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from edgebuild.report import content, plot
from edgebuild.report.figures import Json, figure, one_line

HERE = Path(__file__).parent
ANCHORS = ("fit", "cost", "done", "trust", "else")
_FULL = 1.5  # where a gauge ends, as a share of the bound


def html(report: Json) -> str:
    """The whole report. Readable without JavaScript, which adds sorting and tooltips; the same bytes each time.

    Every text of the report is hostile: it is escaped by the template, and a Content-Security-Policy lets nothing load
    and nothing run but the style and the script of this file, by their hashes.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        return one_line(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    return environment.get_template("report.html.jinja").render(
        report=report,
        heading=content.heading(report),
        sections=list(zip(ANCHORS, content.sections(report), strict=True)),
        columns=_columns,
        width=_width,
        largest=_largest,
        figure=figure,
        svg=lambda curve: Markup(plot.svg(curve)),
        bound_shows=plot.bound_shows,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        full=_FULL,
    )


def _hash(text: str) -> str:
    """The source expression of Content-Security-Policy level 3 for an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _columns(table: content.Table) -> list[int]:
    """The columns in which anything stands."""
    return [k for k in range(len(table.columns)) if any(row[k] for row in table.lines)]


def _largest(table: content.Table, column: int) -> float:
    """What the longest bar of a column stands for; the sums are not drawn."""
    cells = (row[column] for row in table.rows)
    return max((bar or 0.0 for cell in cells if isinstance(cell, content.Cell) for bar in cell.bars), default=0.0)


def _width(value: float | None, whole: float) -> str:
    """A length as an SVG attribute: the share of the whole in percent, from 0 to 100."""
    return f"{100 * min(max((value or 0.0) / whole, 0.0), 1.0):.4g}%" if whole > 0 else "0%"
