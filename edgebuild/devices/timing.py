"""Timed runs: how many, and what is said of them, alike on every device that keeps time."""

from collections.abc import Callable
from math import inf, sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from edgebuild.devices.host_worker import MIN_RUNS, WARM_UP, agree
from edgebuild.spec import Measurement

Nanoseconds = NDArray[np.int64]
Enough = Callable[[Nanoseconds], bool]
NONE: Nanoseconds = np.zeros(0, np.int64)

AT_LEAST, AT_MOST = 1.0, 10.0  # seconds of timed runs
SLICE = 0.25  # seconds of a request
MOST_RUNS = 1000  # of a request
LONGEST = 30.0  # seconds of timed runs where those so far are not enough
LOOKS = 6  # AT_LEAST doubled until LONGEST
BLOCKS = 10
SHARES = {"latency": 0.5, "latency_p95": 0.95, "latency_p99": 0.99}


def settle(
    time: Callable[[int, int], Nanoseconds], at_least: float = AT_LEAST, at_most: float = AT_MOST
) -> tuple[Nanoseconds, bool]:
    """Nanoseconds of each run, until the median settles by the rules of `host_worker`, and whether it did.

    `time` takes warm-ups and runs; one warm-up at the start of each request hides the pause before it.
    """
    found = time(WARM_UP, 1)
    settled = False
    while not settled and found.sum() < at_most * 1e9:
        pace = max(float(np.median(found)), 1.0)
        found = np.concatenate([found, time(1, min(max(int(SLICE * 1e9 / pace), 1), MOST_RUNS))])
        settled = found.sum() >= at_least * 1e9 and len(found) >= MIN_RUNS and agree(found.tolist())
    return found, settled


def once(found: Nanoseconds) -> bool:
    """What has settled is enough."""
    return True


def go_on(found: Nanoseconds, enough: Enough, time: Callable[[float], Nanoseconds]) -> Nanoseconds:
    """The runs with further ones, each time as long again, until they are enough or lasted LONGEST.

    `time` takes seconds. With AT_LEAST seconds at the start these are at most LOOKS looks at the runs.
    """
    while not enough(found) and (left := LONGEST - found.sum() / 1e9) > 0:
        found = np.concatenate([found, time(min(max(found.sum() / 1e9, AT_LEAST), left))])
    return found


def interval(found: Nanoseconds, quantity: str, confidence: float = 0.95) -> tuple[float, float]:
    """A confidence interval of a quantity of `measurements` (seconds, or runs a second), good for LOOKS looks at once.

    Of the median and the percentiles by order statistics, which asks nothing of the distribution: between the sorted
    runs below and above which the share of runs differs from the percentile's by more than its error (Conover 1999,
    Practical Nonparametric Statistics, sections 3.1 and 3.2). Runs that follow each other are slow together, so the
    error is taken from how that share differs between BLOCKS blocks of runs (Heidelberger and Lewis 1984,
    doi:10.1287/opre.32.1.185), and never as less than that of independent runs. Of throughput by the means of the
    blocks. Each look gets its part of the error (Bonferroni), since a bound that is looked at until it is clear would
    be missed more often.
    """
    seconds = found / 1e9
    blocks = np.array_split(seconds, min(BLOCKS, len(seconds)))
    if len(blocks) < 2:
        return 0.0, inf
    t = float(stdtrit(len(blocks) - 1, 1 - (1 - confidence) / LOOKS / 2))
    if quantity == "throughput":
        mean, half = seconds.mean(), t * float(_error(np.array([block.mean() for block in blocks])))
        return float(1 / (mean + half)), float(1 / (mean - half)) if half < mean else inf
    share, n = SHARES[quantity], len(seconds)
    offsets = np.geomspace(1 / n, 1, 400)
    ranks = np.clip(n * (share + np.concatenate([-offsets[::-1], offsets])), 0, n - 1).astype(np.int64)
    at = np.sort(seconds)[ranks]
    ordered = [np.sort(block) for block in blocks]

    def off_by(side: Literal["left", "right"]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        below = np.array([np.searchsorted(block, at, side) / len(block) for block in ordered])
        return below.mean(0), t * np.maximum(_error(below), sqrt(share * (1 - share) / n))

    below, off = off_by("left")
    first = int(np.argmin(np.append(below + off < share, False)))  # how many are too small to be it
    below, off = off_by("right")
    last = int(np.argmin(np.append((below - off >= share)[::-1], False)))  # how many are too large
    return float(at[first - 1]) if first else 0.0, float(at[-last]) if last else inf


def _error(of_blocks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard error of the mean of what independent blocks gave, along the first axis."""
    return np.asarray(np.std(of_blocks, axis=0, ddof=1) / sqrt(len(of_blocks)))


def measurements(target: str, found: Nanoseconds, detail: str) -> tuple[Measurement, ...]:
    """Latency, its percentiles and least, and throughput, which is that of calls one after another."""
    seconds = found / 1e9
    figures = {
        "latency": np.median(seconds),
        "latency_p95": np.percentile(seconds, 95),
        "latency_p99": np.percentile(seconds, 99),
        "latency_min": seconds.min(),
        "throughput": 1 / seconds.mean(),
    }
    return tuple(
        Measurement(target, quantity, float(value), "measured", runs=len(seconds), detail=detail)
        for quantity, value in figures.items()
    )


def spread(found: Nanoseconds, settled: bool) -> str:
    """How far the runs lie apart, and a word where their median had not settled."""
    low, median, high = np.percentile(found, (25, 50, 75))
    unsettled = "" if settled else f"; the median had not settled after {AT_MOST:g} s"
    return f"the middle half of the runs lies within {(high - low) / median:.1%}{unsettled}"
