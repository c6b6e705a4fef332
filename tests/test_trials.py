import copy
from dataclasses import replace

import pytest
import torch

from edgebuild import trials
from edgebuild.analyse import analyse
from edgebuild.divergence import divergence, divergences
from edgebuild.lift import lift
from edgebuild.sensitivity import measure, moments
from edgebuild.spec import Candidate, Cast, Form, Trial, Width
from edgebuild.transforms import factorize, prune, quantize

CANDIDATES = (
    Candidate(Width("stem", 8, 16), 0.5),
    Candidate(Form("hidden", "svd", (12,)), 0.25),
    Candidate(Cast("hidden"), 0.125),
)


@pytest.fixture(scope="module")
def model(small_net, image):
    """SmallNet with outputs as far apart as a trained model's."""
    lifted = lift(small_net, image)
    with torch.no_grad():
        lifted.classify.weight *= 20
    return lifted


@pytest.fixture(scope="module")
def estimated(model, image, images):
    facts = analyse(model, image)
    seen = moments(model, facts, images)
    sensitivity = measure(model, facts, images, factorize.probes(model, facts, seen, 8), seen, logits=True)
    candidates = (
        *prune.candidates(model, facts, sensitivity, images, 8, logits=True),
        *factorize.candidates(facts, sensitivity, 8),
        *quantize.candidates(facts, sensitivity),
    )
    return facts, sensitivity, candidates


def test_a_known_scale_is_recovered_from_trials_with_outliers():
    tried = [Trial("prune", 3, x, 2.5 * x) for x in (0.1, 0.2, 0.3)] + [Trial("prune", 3, 0.1, 900.0)]
    tried += [Trial("quantize", 9, 1e-6, 3e-6), Trial("factorize", 4, 0.2, 0.05), Trial("factorize", 4, 0.1, 0.1)]
    found = trials.scales(tried[:3] + tried[4:])
    assert found == pytest.approx({"prune": 2.5, "quantize": 3.0, "factorize": 0.5})
    assert trials.scales(tried)["prune"] == pytest.approx(2.5)


def test_ranges_at_run_time_are_taken_where_they_lose_clearly_less():
    found = [Trial("prune", 3, 0.1, 0.1), Trial("quantize", 9, 0.1, 0.2), Trial("quantize", 9, 0.1, 0.09, "dynamic")]
    found += [Trial("quantize", 9, 0.1, 0.01, "8da4w")]
    assert trials.scheme_of(found) == "dynamic" and trials.scheme_of(found[:2]) == "static"
    assert trials.scheme_of([*found[:2], Trial("quantize", 9, 0.1, 0.15, "dynamic")]) == "static"
    assert trials.scales(trials.of_scheme(found, "dynamic")) == pytest.approx({"prune": 1.0, "quantize": 0.9})


def test_what_is_lost_in_rounding_calibrates_nothing():
    assert trials.scales([Trial("prune", 1, 0.0, 1e-3), Trial("quantize", 1, 1e-3, 0.0)]) == {}


def test_a_technique_without_trials_keeps_its_losses():
    found = trials.rescaled(CANDIDATES, [Trial("prune", 1, 1.0, 4.0)])
    assert [c.loss for c in found] == [2.0, 0.25, 0.125]
    assert [c.choice for c in found] == [c.choice for c in CANDIDATES]


def test_calibrated_losses_calibrate_again_as_they_are_measured_again():
    once = trials.rescaled(CANDIDATES, [Trial("prune", 1, 1.0, 4.0)])
    assert trials.rescaled(once, [Trial("prune", 1, 4.0, 4.0)]) == once


def test_every_technique_is_tried_and_the_seed_decides(model, images, estimated):
    def run(seed):
        return trials.run(model, *estimated, images, {"static": lambda few: copy.deepcopy(model)}, True, seed)

    found = run(0)
    assert {trial.technique for trial in found} == {"prune", "factorize", "quantize"}
    assert all(trial.estimated > 0 and trial.changes > 0 for trial in found)
    assert found == run(0) != run(1)


def test_the_estimates_are_near_what_trials_find(model, images, estimated):
    found = trials.run(model, *estimated, images, {"static": lambda few: copy.deepcopy(model)}, True, 0)
    for name, scale in trials.scales(found).items():
        assert 0.2 < scale < 5, name


def test_a_stand_in_computes_what_the_factors_do(model, image):
    for form in (Form("hidden", "svd", (12,)), Form("right", "spatial", (8,)), Form("right", "tucker2", (4, 8))):
        stand_in = copy.deepcopy(model)
        stand_in.get_submodule(form.layer).weight.data = factorize.lowered(model, form, {})
        assert torch.allclose(stand_in(*image), factorize.apply(model, image, [form])(*image), atol=1e-3), form


def test_a_run_from_the_first_changed_layer_is_a_whole_run(model, images):
    """Also where the change reaches the output twice, through a residual sum, and where nothing changes."""
    batch = torch.cat([x for (x,) in images])
    variants = [{name: model.get_submodule(name).weight.detach() * 1.1} for name in ("stem", "block.conv2", "classify")]
    found = divergences(model, images, [*variants, {}], logits=True)
    for variant, value in zip(variants, found, strict=False):
        changed = copy.deepcopy(model)
        for name, weight in variant.items():
            changed.get_submodule(name).weight.data = weight
        with torch.no_grad():
            assert value == pytest.approx(divergence((model(batch),), (changed(batch),), True), rel=1e-3)
    assert found[-1] == 0.0


def test_values_diverge_by_half_their_squared_distance():
    assert divergence((torch.zeros(2, 3),), (torch.ones(2, 3),), logits=False) == pytest.approx(1.5)


def test_narrower_is_never_cheaper(estimated):
    facts, _, candidates = estimated
    for group in facts.groups:
        losses = [c.loss for c in candidates if isinstance(c.choice, Width) and c.choice.group == group.name]
        assert losses == sorted(losses)


def test_losses_do_not_hang_on_the_order_of_the_candidates(model, images, estimated):
    facts, sensitivity, candidates = estimated
    only = [replace(c) for c in candidates if isinstance(c.choice, Cast)]
    (trial,) = trials.run(
        model, facts, sensitivity, only, images, {"static": lambda few: copy.deepcopy(model)}, True, 0
    )
    assert trial.technique == "quantize" and trial.changes == len(only)
