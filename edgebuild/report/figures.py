"""Figures and names of a report as people read them."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from edgebuild.spec import LOWER_BOUNDS
from edgebuild.units import Bytes, Percent, Points, Seconds

Json = dict[str, Any]

NONE = "—"
# what neither a terminal nor XML should be handed: control characters, lone surrogates, non-characters
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_FIGURES: dict[str, Callable[[float], str]] = {
    "count": lambda value: f"{value:,}",
    "size": lambda value: str(Bytes(value)),
    "peak_memory": lambda value: str(Bytes(value)),
    "sram": lambda value: str(Bytes(value)),
    "flash": lambda value: str(Bytes(value)),
    "throughput": lambda value: f"{value:,.0f} /s" if value >= 100 else f"{value:.3g} /s",
    "accuracy_drop": lambda value: str(Points(value)),
    "min_delegated": lambda value: str(Percent(value)),
}


def figure(quantity: str, value: float | None, relative: bool = False) -> str:
    """A figure in the unit that people use for it. `relative`: an accuracy drop as a share of the original's metric."""
    if value is None:
        return NONE
    if quantity == "accuracy_drop" and relative:
        return str(Percent(value))
    if quantity.startswith("latency"):
        return str(Seconds(value))
    return _FIGURES.get(quantity, lambda value: f"{value:.4g}")(value)


def bound(verdict: Json) -> str:
    """The bound of a verdict or a `reachable` row, with its direction."""
    sign = "≥" if verdict["kind"] in LOWER_BOUNDS else "≤"
    return f"{sign} {of(verdict, verdict['bound'])}"


def found(verdict: Json, report: Json) -> str:
    """What was found, with its error band, and how: "12.1 ms ± 30 % (estimated)"."""
    if verdict["value"] is None:
        return NONE
    error = band(verdict, report)
    how = f" ({verdict['method']})" if verdict["method"] else ""
    return f"{of(verdict, verdict['value'])}{f' ± {Percent(error)}' if error else ''}{how}"


def band(verdict: Json, report: Json) -> float:
    """The relative half-width of the error band of what was found; 0 where it is exact."""
    errors = (
        item["error"]
        for item in report["measurements"]
        if (item["quantity"], item["target"]) == (verdict["kind"], verdict["target"]) and item["error"]
    )
    return next(errors, 0.0)


def subject(row: Json) -> str:
    """The budget or quantity of a row and where it holds: "latency p95 on raspberry-pi-4", "size"."""
    return named(row["kind"]) + (f" on {row['target']}" if row["target"] else "")


def share(value: float | None) -> str:
    """A share as a percentage."""
    return NONE if value is None else str(Percent(value))


def signed(share: float | None) -> str:
    """A share as a signed percentage."""
    return NONE if share is None else f"{100 * share:+,.1f} %"


def of(row: Json, value: float | None) -> str:
    return figure(row["kind"], value, row.get("relative", False))


def named(kind: str) -> str:
    return {"min_delegated": "delegated", "sram": "SRAM"}.get(kind, kind.replace("_", " "))


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")


def change(quantity: str, pair: Iterable[float | None]) -> str:
    """A figure before and after: "160 → 120", or once where it stayed."""
    before, after = (figure(quantity, value) for value in pair)
    return before if before == after else f"{before} → {after}"


def compared(before: float, after: float, less: str, more: str) -> str:
    """How two figures compare: "3.2 times smaller"."""
    if before == after or not before or not after:
        return "the same" if before == after else NONE
    return f"{before / after:.3g} times {less}" if before > after else f"{after / before:.3g} times {more}"


def one_line(text: str) -> str:
    """Text without line breaks and without characters that would steer a terminal or break XML."""
    return _UNPRINTABLE.sub(lambda match: " " if match[0] in "\t\r\n\u2028\u2029" else repr(match[0])[1:-1], text)
