"""Timed runs: how many, and what is said of them, alike on every device that keeps time."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgebuild.devices.host_worker import MIN_RUNS, WARM_UP, agree
from edgebuild.spec import Measurement

Nanoseconds = NDArray[np.int64]

AT_LEAST, AT_MOST = 1.0, 10.0  # seconds of timed runs
SLICE = 0.25  # seconds of a request
MOST_RUNS = 1000  # of a request


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
