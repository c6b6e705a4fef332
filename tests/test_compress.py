"""A deep cut in two steps ends at the model of the whole plan."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from edgebuild.backends import HOST
from edgebuild.base import Base, narrowed, prepare
from edgebuild.compress import compress, halfway, hints_of, through
from edgebuild.lift import lift
from edgebuild.load import Loaded
from edgebuild.spec import Budget, Form, Plan, Profile, Width
from edgebuild.task import Task
from edgebuild.training.objective import Hint, Watched

PROFILE = Profile("p", "t", "host", "pte", (Budget("size", 1e6),), techniques=("prune",))


def based(model: nn.Module, samples: list[tuple[Tensor, ...]]) -> tuple[Base, Loaded]:
    loaded = Loaded("small", Task(model, samples[0], samples), tuple(samples), "")
    return prepare("model", lift(model, samples[0]), loaded, PROFILE, HOST, "", False), loaded


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def quarter(base: Base, forms: tuple[Form, ...] = ()) -> Plan:
    widths = tuple(Width(g.name, max(1, g.channels // 4), g.channels) for g in base.facts.groups)
    return Plan(widths=widths, forms=forms)


def test_half_way_lies_between_by_its_ratio() -> None:
    plan = Plan(widths=(Width("a", 4, 16), Width("b", 3, 7)), forms=(Form("b", "svd", (2,)),), precision="fp32")
    first, rest = halfway(plan)
    assert first == replace(plan, widths=(Width("a", 8, 16), Width("b", 5, 7)), forms=())
    assert rest == replace(plan, widths=(Width("a", 4, 8), Width("b", 3, 5)))


@pytest.mark.parametrize("kind", ["convolutions", "attention"])
def test_two_cuts_make_the_model_of_one(kind, small_net, encoder, images, sentences, empty_cache) -> None:
    model, samples = (small_net, images) if kind == "convolutions" else (encoder, sentences)
    base, loaded = based(model, samples)
    plan = quarter(base, (Form("hidden" if kind == "convolutions" else "up", "svd", (4,)),))
    first, rest = halfway(plan)
    *_, (_, direct) = compress(base, plan, loaded)
    *_, (_, wide) = compress(base, first, loaded)
    between = narrowed(base, wide, loaded, 0)
    *_, (_, twice) = compress(between, rest, loaded)
    assert shapes(twice) == shapes(direct) != shapes(wide)
    assert {g.name: g.channels for g in between.facts.groups} == {w.group: w.channels for w in first.widths}


def test_hints_of_a_model_that_was_cut_twice_are_the_originals_channels(small_net, images, empty_cache) -> None:
    base, loaded = based(small_net, images)
    first, rest = halfway(quarter(base))
    *_, (_, wide) = compress(base, first, loaded)
    between = narrowed(base, wide, loaded, 0)
    *_, (_, twice) = compress(between, rest, loaded)
    hints = through(hints_of(base, first, "all"), hints_of(between, rest, "all"))
    assert [hint.layer for hint in hints] == [hint.layer for hint in hints_of(base, quarter(base), "all")]
    watched = Watched(twice, tuple(hint.student_layer for hint in hints))
    twice(*images[0])
    for hint in hints:
        assert watched.read[hint.student_layer].shape[1] == len(hint.channels)
        assert int(hint.channels.max()) < base.facts.layer(hint.layer).in_channels
    vectors = hints_of(base, quarter(base), "vectors")
    assert [hint.layer for hint in vectors] == ["hidden", "classify"] and not hints_of(base, first, "none")
    kept = through((Hint("a", "a", torch.tensor([1, 3, 5])),), (Hint("a", "a.0", torch.tensor([0, 2])),))
    assert kept[0].student_layer == "a.0" and kept[0].channels.tolist() == [1, 5]
