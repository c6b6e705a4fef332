"""Holds what was found of an artifact against budgets, and its outputs against those expected. No torch here."""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from edgebuild.devices import Arrays, timing
from edgebuild.errors import TaskError
from edgebuild.spec import TIMED, Accuracy, Budget, Measurement, Parity, Precision, Verdict

# An int8 kernel rounds differently from its fp32 simulation, a little in every layer; a wrong one is below 0 dB.
LEAST_SQNR_DB: dict[Precision, float] = {"fp32": 40.0, "int8": 15.0}

CONFIDENCE = 0.95
FAIL_AFTER = 8.0  # seconds of timed runs: a moment in which the machine was busy fails no build

Status = Literal["pass", "fail", "inconclusive"]


def parity(
    found: Sequence[Arrays],
    expected: Sequence[Arrays],
    target: str,
    reference: str,
    least_db: float,
    logits: bool,
    first_divergence: str = "",
) -> Parity:
    """Compare outputs sample by sample; `logits` says whether a top-1 can be taken in the last dimension."""
    signal = noise = largest = 0.0
    same = exact = 0
    for got, want in zip(found, expected, strict=True):
        exact += all(g.shape == w.shape and g.tobytes() == w.tobytes() for g, w in zip(got, want, strict=True))
        for g, w in zip(got, want, strict=True):
            if g.shape != w.shape:
                raise TaskError(f"{target}: an output is {g.shape}, {reference} gives {w.shape}")
            difference = np.abs(g.astype(np.float64) - w.astype(np.float64))
            signal += float((w.astype(np.float64) ** 2).sum())
            noise += float((difference**2).sum())
            largest = max(largest, float(difference.max(initial=0.0)))
        same += bool((got[0].argmax(-1) == want[0].argmax(-1)).all()) if logits else 0
    finite = all(np.isfinite(g).all() for got in found for g in got)
    sqnr = (999.0 if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)) if finite else -999.0
    return Parity(
        target=target,
        reference=reference,
        samples=len(found),
        sqnr_db=round(sqnr, 2),
        agreement=same / len(found) if logits and found else None,
        bit_exact=exact == len(found),
        max_abs=largest if math.isfinite(largest) else -1.0,
        ok=finite and sqnr >= least_db,
        first_divergence=first_divergence,
    )


# ------------------------------------------------------------------------------------------------------- budgets


def verdict(
    budget: Budget,
    target: str,
    predicted: float | None,
    found: Measurement | None,
    note: str = "",
    interval: tuple[float, float] | None = None,
) -> Verdict:
    """Pass or fail where the figure was measured; inconclusive where the bound lies inside an estimate's error band.

    `interval` is the confidence interval of a timed figure, where one was taken: the bound must lie outside it too.
    """
    if found is None:
        return Verdict(
            budget.kind, target, budget.bound, predicted, None, None, None, "inconclusive", note or "not measured"
        )
    band = interval or _band(budget, found)
    decided = status(budget, band)
    if decided == "inconclusive":
        inside = (
            "the bound lies inside the confidence interval"
            if interval
            else f"the bound lies inside the error band (+-{found.error:.0%}) of a figure that was not measured"
        )
        note = f"{inside} {note}".strip()
    return Verdict(
        budget.kind,
        target,
        budget.bound,
        predicted,
        found.value,
        found.method,
        budget.margin(found.value),
        decided,
        note,
    )


def status(budget: Budget, band: tuple[float, float]) -> Status:
    """What is known of a budget where the figure lies somewhere in `band`."""
    held = [budget.holds(edge) for edge in band]
    return "pass" if all(held) else "inconclusive" if any(held) else "fail"


class Runs:
    """The timed runs of a device, and whether they decide the budgets.

    A pass may come early. A fail takes FAIL_AFTER seconds: noise makes runs slower and never faster.
    """

    def __init__(self, budgets: Sequence[Budget]):
        self.budgets = [budget for budget in budgets if budget.kind in TIMED]
        self.found: timing.Nanoseconds = timing.NONE

    def enough(self, found: timing.Nanoseconds) -> bool:
        self.found = found
        states = {status(b, timing.interval(found, b.kind, CONFIDENCE)) for b in self.budgets}
        return states <= {"pass"} or (states <= {"pass", "fail"} and found.sum() >= FAIL_AFTER * 1e9)


def outcome(verdicts: Sequence[Verdict], parity: Sequence[Parity]) -> Literal["met", "broken", "inconclusive"]:
    """What verdicts and comparisons of outputs come to together."""
    if any(verdict.status == "fail" for verdict in verdicts) or not all(row.ok for row in parity):
        return "broken"
    return "met" if all(verdict.status == "pass" for verdict in verdicts) else "inconclusive"


def _band(budget: Budget, found: Measurement) -> tuple[float, float]:
    low, high = max(0.0, 1 - found.error), 1 + found.error
    if budget.kind == "throughput":  # the band is that of the time behind it
        return found.value / high, found.value / low if low else math.inf
    return found.value * low, found.value * high


def accuracy_verdict(budget: Budget, measured: Accuracy | None, reason: str) -> Verdict:
    """The accuracy budget, in the metric's own units; `reason` says why there is no metric."""
    if measured is None:
        return Verdict("accuracy_drop", "", budget.bound, None, None, None, None, "inconclusive", reason)
    bound = budget.bound * measured.original if budget.relative else budget.bound
    absolute = Budget("accuracy_drop", bound)
    note = f"{budget.bound:.3g} of the original's metric" if budget.relative else ""
    drop = round(measured.drop, 12)
    held: Status = "pass" if absolute.holds(drop) else "fail"
    return Verdict("accuracy_drop", "", bound, None, drop, "measured", absolute.margin(drop), held, note)
