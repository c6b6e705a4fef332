"""The report of a build: JSON first; HTML, Markdown, the terminal's tables and JUnit are made from that JSON alone."""

from edgebuild.report.figures import bound, figure, named, subject
from edgebuild.report.html import html
from edgebuild.report.render import escaped, junit, markdown, terminal
from edgebuild.report.schema import from_json, schema, to_json

__all__ = [
    "bound",
    "escaped",
    "figure",
    "from_json",
    "html",
    "junit",
    "markdown",
    "named",
    "schema",
    "subject",
    "terminal",
    "to_json",
]
