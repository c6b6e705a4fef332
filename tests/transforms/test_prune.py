import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from edgebuild.analyse import analyse
from edgebuild.divergence import divergences
from edgebuild.errors import TransformError
from edgebuild.lift import lift
from edgebuild.sensitivity import measure, moments
from edgebuild.spec import Width
from edgebuild.transforms import prune


@pytest.fixture(scope="module")
def analysed(small_net, image, images):
    lifted = lift(small_net, image)
    facts = analyse(lifted, image)
    return lifted, facts, measure(lifted, facts, images, {}, moments(lifted, facts, images), logits=True)


def test_widths_are_tiles_and_never_below_an_eighth():
    assert prune.widths(128, 8) == tuple(sorted(prune.widths(128, 8), reverse=True))
    assert all(width % 8 == 0 and 16 <= width < 128 for width in prune.widths(128, 8))
    assert prune.widths(16, 8) == (12, 8, 4)
    assert prune.widths(4, 8) == ()


def test_candidates_lose_more_the_narrower_they_are(analysed, images):
    lifted, facts, sensitivity = analysed
    found = prune.candidates(lifted, facts, sensitivity, images, 8, logits=True)
    for group in facts.groups:
        losses = [c.loss for c in found if c.choice.group == group.name]
        assert losses == sorted(losses)
        assert all(loss >= 0 for loss in losses)


def test_the_least_important_channels_go(analysed, image):
    lifted, facts, sensitivity = analysed
    pruned = prune.apply(lifted, image, facts, sensitivity, [Width("hidden", 32, 48)])
    kept = sorted(np.argsort(sensitivity.channel_scores("hidden"), kind="stable")[16:])
    assert torch.equal(pruned.hidden.weight, lifted.hidden.weight[kept])
    readers = prune.repaired(lifted, facts, sensitivity, [Width("hidden", 32, 48)])
    assert torch.equal(pruned.classify.weight, readers["classify"][:, kept])


CUT = [Width("stem", 8, 16), Width("left", 4, 16), Width("point", 16, 32), Width("hidden", 24, 48)]


def test_the_readers_weights_alone_stand_for_the_pruned_model(analysed, image):
    """What the candidates' losses are measured on computes the same as what is built."""
    lifted, facts, sensitivity = analysed
    pruned = prune.apply(lifted, image, facts, sensitivity, CUT)
    stand_in = copy.deepcopy(lifted)
    for name, weight in prune.repaired(lifted, facts, sensitivity, CUT).items():
        stand_in.get_submodule(name).weight.data = weight
    assert torch.allclose(stand_in(*image), pruned(*image), atol=1e-5)


@pytest.mark.parametrize("width", CUT, ids=str)
def test_the_kept_channels_make_up_for_the_lost_ones(analysed, images, width):
    lifted, facts, sensitivity = analysed
    alone = replace(sensitivity, moments={})
    variants = [prune.repaired(lifted, facts, found, [width]) for found in (sensitivity, alone)]
    repaired, plain = divergences(lifted, images, variants, logits=True)
    assert 0 < repaired < plain


def test_the_moments_after_are_those_of_the_pruned_models_inputs(analysed, image, images):
    lifted, facts, sensitivity = analysed
    pruned = prune.apply(lifted, image, facts, sensitivity, CUT[-1:])
    found = moments(lift(pruned, image), analyse(pruned, image), images)
    assert torch.allclose(found["classify"], prune.moments_after(facts, sensitivity, CUT[-1:])["classify"], atol=1e-6)


def test_the_model_is_not_changed(analysed, image):
    lifted, facts, sensitivity = analysed
    before = {name: tensor.clone() for name, tensor in lifted.state_dict().items()}
    prune.apply(lifted, image, facts, sensitivity, [Width("stem", 8, 16), Width("point", 16, 32)])
    assert all(torch.equal(before[name], tensor) for name, tensor in lifted.state_dict().items())


@pytest.mark.parametrize(
    "width", [Width("stem", 8, 32), Width("nowhere", 8, 16), Width("stem", 0, 16), Width("stem", 20, 16)]
)
def test_a_width_that_does_not_fit_is_refused_by_name(analysed, image, width):
    lifted, facts, sensitivity = analysed
    with pytest.raises(TransformError, match=width.group):
        prune.apply(lifted, image, facts, sensitivity, [width])


def test_channels_are_ranked_by_what_loses_least(analysed, images):
    model, facts, found = analysed
    ranked = prune.ranked(model, facts, found, images, True)
    assert ranked.ranking.keys() == {group.name for group in facts.groups} and not found.ranking

    def lost(sensitivity, width):
        return divergences(model, images, [prune.repaired(model, facts, sensitivity, [width])], True)[0]

    halves = [Width(group.name, group.channels // 2, group.channels) for group in facts.groups]
    losses = [(lost(ranked, half), lost(found, half)) for half in halves]
    assert all(after <= before * (1 + 1e-6) for after, before in losses)
    assert any(after < 0.9 * before for after, before in losses)


def test_a_channel_that_another_makes_up_for_is_missed_little(analysed, images):
    model, facts, found = analysed
    before = prune._unexplained(model, facts, found, facts.group("hidden"))
    doubled = copy.deepcopy(model)
    c = int(before.argmax())
    with torch.no_grad():
        for tensor in (doubled.hidden.weight, doubled.hidden.bias):
            tensor[(c + 1) % 48] = tensor[c]
    found = measure(doubled, facts, images, {}, moments(doubled, facts, images), True)
    after = prune._unexplained(doubled, facts, found, facts.group("hidden"))
    assert after[c] < 0.9 * before[c]
