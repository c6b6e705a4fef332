"""The confidence intervals of timed runs cover what they say, for runs that follow each other too."""

import numpy as np
import pytest
from scipy.special import ndtri

from edgebuild.devices import timing

TRIALS, SPREAD = 200, 0.3
ONE_LOOK = 1 - 0.05 * timing.LOOKS  # the confidence whose interval at one look covers 95%


def logarithms(rng: np.random.Generator, count: int, correlation: float) -> np.ndarray:
    """TRIALS rows of normal numbers, each correlated with the one before."""
    noise = rng.normal(size=(count, TRIALS)) * np.sqrt(1 - correlation**2)
    found = np.empty_like(noise)
    found[0] = rng.normal(size=TRIALS)
    for i in range(1, count):
        found[i] = correlation * found[i - 1] + noise[i]
    return found.T


@pytest.mark.parametrize("correlation", [0.0, 0.9])
@pytest.mark.parametrize("quantity", [*timing.SHARES, "throughput"])
def test_intervals_cover_what_they_say(quantity, correlation):
    samples = np.exp(SPREAD * logarithms(np.random.default_rng(1), 3000, correlation))
    mean = -(SPREAD**2) / 2  # of the logarithm of runs a second
    true = np.exp(mean if quantity == "throughput" else SPREAD * ndtri(timing.SHARES[quantity]))
    bands = [timing.interval((row * 1e9).astype(np.int64), quantity, ONE_LOOK) for row in samples]
    covered = np.mean([low <= true <= high for low, high in bands])
    assert covered >= 0.9, "95% less what 200 trials and ten blocks may be off"
    assert np.median([low for low, _ in bands]) > 0.8 * true, "an interval says something"


def test_independence_would_promise_too_much():
    """With correlated runs, an interval that takes them for independent misses the median far more often."""
    samples = np.exp(SPREAD * logarithms(np.random.default_rng(1), 3000, 0.9))
    half = 1.96 * np.sqrt(0.25 / samples.shape[1])
    low, high = np.quantile(samples, [0.5 - half, 0.5 + half], axis=1)
    assert np.mean((low <= 1) & (high >= 1)) < 0.6


def test_few_runs_bound_nothing():
    assert timing.interval(np.array([5], np.int64), "latency") == (0.0, np.inf)
    low, high = timing.interval(np.arange(1, 31, dtype=np.int64) * 10**6, "latency_p99")
    assert low < 0.03 and high == np.inf
    assert timing.interval(np.full(1000, 10**6), "latency") == (0.001, 0.001)


def test_a_disturbance_moves_no_limit_beyond_what_was_seen():
    """Half of one block is a thousand times slower: the median stays where it is, a percentile is open that far."""
    found = np.full(100_000, 10**6)
    found[:5_000] = 10**9
    low, high = timing.interval(found, "latency")
    assert low == 0.001 and high <= 1.0
    low, high = timing.interval(found, "latency_p95")
    assert low == 0.001 and high == 1.0
