"""Calibrates the estimated losses: a few random plans are tried on the model, and each technique gets one scale.

The estimates are made one change at a time. What many changes do together is measured here, and the techniques' losses
come out in one unit, so that a plan may weigh a pruned channel against a lower rank or a precision.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import exp, log
from statistics import median

import numpy as np
from torch import Tensor, fx, nn

from edgebuild.divergence import distance, divergences
from edgebuild.sensitivity import Sensitivity
from edgebuild.spec import Candidate, Cast, Form, ModelFacts, Scheme, Technique, Trial, Width
from edgebuild.transforms import factorize, prune

TRIALS = 3
LEAST = 1e-12  # nats; below it there is nothing but rounding
MACS = 4e9  # of a sample of each trial, in all
FEWEST_SAMPLES = 8
CLEARLY_LESS = 0.5


def technique(candidate: Candidate) -> Technique:
    """The technique that a candidate belongs to."""
    kinds: dict[type, Technique] = {Width: "prune", Form: "factorize", Cast: "quantize"}
    return kinds[type(candidate.choice)]


def run(
    model: fx.GraphModule,
    facts: ModelFacts,
    sensitivity: Sensitivity,
    candidates: Sequence[Candidate],
    samples: Sequence[tuple[Tensor, ...]],
    quantized: Mapping[Scheme, Callable[[Sequence[tuple[Tensor, ...]]], nn.Module]],
    logits: bool,
    seed: int,
) -> tuple[Trial, ...]:
    """Real KL divergences (nats) of random moderate plans, for each technique with candidates; the same for a seed.

    Widths and forms are tried on many groups and layers at once. `quantized` quantizes the whole model by each scheme
    that could be taken, with the ranges of the samples that it is given.
    """
    rng = np.random.default_rng(seed)
    samples = samples[: max(FEWEST_SAMPLES, int(MACS / max(1, facts.macs)))]
    widths = [draw(candidates, "prune", rng) for _ in range(TRIALS)]
    forms = [draw(candidates, "factorize", rng) for _ in range(TRIALS)]
    plans = [plan for plan in (*widths, *forms) if plan]
    variants = [altered(model, facts, sensitivity, plan) for plan in plans]
    real = divergences(model, samples, variants, logits)
    found = [_trial(plan, kl) for plan, kl in zip(plans, real, strict=True)]
    casts = [candidate for candidate in candidates if isinstance(candidate.choice, Cast)]
    if casts:
        for scheme, make in quantized.items():
            found.append(replace(_trial(casts, distance(model, make(samples), samples, logits)), scheme=scheme))
    return tuple(found)


def draw(candidates: Sequence[Candidate], kind: Technique, rng: np.random.Generator) -> list[Candidate]:
    """A random plan of one technique: about two groups or layers of three change, each to one of its milder choices."""
    places: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if technique(candidate) == kind:
            places.setdefault(place(candidate), []).append(candidate)
    chosen = []
    for found in places.values():
        mildest = sorted(found, key=lambda candidate: candidate.loss)[: (len(found) + 1) // 2]
        changes, which = rng.random() < 2 / 3, int(rng.integers(len(mildest)))
        if changes:
            chosen.append(mildest[which])
    return chosen


def place(candidate: Candidate) -> str:
    """The group or layer that a candidate changes."""
    choice = candidate.choice
    return choice.group if isinstance(choice, Width) else choice.layer


def altered(
    model: fx.GraphModule, facts: ModelFacts, sensitivity: Sensitivity, plan: Sequence[Candidate]
) -> Mapping[str, Tensor]:
    """The weights with which the model computes what a plan of widths alone, or of forms alone, makes of it."""
    widths = [candidate.choice for candidate in plan if isinstance(candidate.choice, Width)]
    forms = [candidate.choice for candidate in plan if isinstance(candidate.choice, Form)]
    return {
        **prune.repaired(model, facts, sensitivity, widths),
        **{form.layer: factorize.lowered(model, form, sensitivity.moments) for form in forms},
    }


def _trial(plan: Sequence[Candidate], real: float) -> Trial:
    return Trial(technique(plan[0]), len(plan), sum(candidate.loss for candidate in plan), real)


# -------------------------------------------------------------------------------------------------------- scales


def scheme_of(trials: Sequence[Trial]) -> Scheme:
    """How int8 is to be computed: ranged at run time only where that loses clearly less than ranges from before."""
    real = {trial.scheme: trial.real for trial in trials if trial.technique == "quantize"}
    return "dynamic" if "dynamic" in real and real["dynamic"] < CLEARLY_LESS * real["static"] else "static"


def of_scheme(trials: Sequence[Trial], scheme: Scheme) -> tuple[Trial, ...]:
    """The trials without those of other schemes than this one."""
    return tuple(trial for trial in trials if trial.technique != "quantize" or trial.scheme == scheme)


def scales(trials: Sequence[Trial]) -> dict[Technique, float]:
    """Real loss for each estimated nat, by technique: the median over its trials, on a logarithmic scale."""
    ratios: dict[Technique, list[float]] = {}
    for trial in trials:
        if trial.estimated > LEAST and trial.real > LEAST:
            ratios.setdefault(trial.technique, []).append(log(trial.real / trial.estimated))
    return {name: exp(median(found)) for name, found in ratios.items()}


def rescaled(candidates: Sequence[Candidate], trials: Sequence[Trial]) -> tuple[Candidate, ...]:
    """The candidates with every technique's losses in real nats; a technique without trials stays as it is."""
    by = scales(trials)
    return tuple(replace(c, loss=c.loss * by.get(technique(c), 1.0)) for c in candidates)
