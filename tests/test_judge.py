"""Verdicts over timed runs: when there are enough of them."""

import numpy as np
import pytest
from scipy.special import ndtri

from edgebuild import judge
from edgebuild.devices import timing
from edgebuild.spec import Budget


def runs(median: float, seconds: float) -> timing.Nanoseconds:
    """Runs in random order that are spread as a logarithmic normal distribution is, about exactly that median."""
    count = int(seconds / median)
    found = median * np.exp(0.05 * ndtri((np.arange(count) + 0.5) / count))
    return (np.random.default_rng(0).permutation(found) * 1e9).astype(np.int64)


@pytest.mark.parametrize(
    ("bound", "seconds", "enough"),
    [
        (0.002, 1, True),  # a pass is clear at once
        (0.0005, 1, False),  # a fail may be a moment's noise
        (0.0005, 9, True),
        (0.001, 9, False),  # the bound is where the median is
    ],
)
def test_noise_fails_no_build(bound, seconds, enough):
    decide = judge.Runs([Budget("latency", bound), Budget("size", 1.0)])
    assert decide.enough(runs(0.001, seconds)) == enough


def test_a_straddled_bound_is_measured_until_the_limit_and_stays_undecided():
    asked = []

    def time(seconds: float) -> timing.Nanoseconds:
        asked.append(seconds)
        return runs(0.001, seconds)

    decide = judge.Runs([Budget("latency", 0.001)])
    found = timing.go_on(runs(0.001, 1), decide.enough, time)
    assert found.sum() / 1e9 >= timing.LONGEST and len(asked) + 1 <= timing.LOOKS
    low, high = timing.interval(found, "latency")
    assert low < 0.001 < high < 0.00102
