"""What is known of a model is kept: the same comes back, and another model is another entry."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgebuild import analysis, cache
from edgebuild.backends import HOST
from edgebuild.base import Base, lifted_digest, prepare
from edgebuild.lift import lift
from edgebuild.load import Loaded
from edgebuild.spec import Budget, Cast, Form, Profile, Width
from edgebuild.task import Task

ALL = Profile("p", "t", "host", "pte", (Budget("size", 1e6),))
QUICK = replace(ALL, techniques=("prune",))


def small(stride: int = 1, activation: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    convolutions = (nn.Conv2d(3, 16, 3, stride, 1), activation or nn.ReLU(), nn.Conv2d(16, 16, 3, 3 - stride, 1))
    return nn.Sequential(*convolutions, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)).eval()


def prepared(profile: Profile = QUICK, fresh: bool = False) -> Base:
    samples = tuple((x,) for x in torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(1))
    model = small()
    loaded = Loaded("small", Task(model, samples[0], list(samples)), samples, "")
    return prepare("model", lift(model, samples[0]), loaded, profile, HOST, "inputs", fresh)


def same(a: Base, b: Base) -> bool:
    for part in analysis.PARTS:
        mine, other = getattr(a.sensitivity, part), getattr(b.sensitivity, part)
        if list(mine) != list(other) or not all(np.array_equal(mine[key], other[key]) for key in mine):
            return False
    plain = ("facts", "candidates", "trials", "scheme", "digest")
    return a.sensitivity.casts == b.sensitivity.casts and all(getattr(a, key) == getattr(b, key) for key in plain)


def test_an_analysis_comes_back_as_it_was_for_every_profile_that_asks_for_the_same(empty_cache: Path) -> None:
    first = prepared(ALL)
    assert not first.reused and {type(candidate.choice) for candidate in first.candidates} == {Width, Form, Cast}
    again = prepared(replace(ALL, budgets=(Budget("latency", 1.0),), target="pixel", threads=2))
    assert again.reused and same(first, again)
    assert again.facts.layer("0") == first.facts.layer("0")
    assert not prepared().reused, "other techniques"
    assert prepared().reused
    assert not prepared(fresh=True).reused, "from scratch"
    assert not prepared(replace(QUICK, seed=1)).reused


def test_another_edgebuild_analyses_anew(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared()
    monkeypatch.setattr("edgebuild.base.versions", lambda: {"edgebuild": "0.1.0+0123456789ab"})
    assert not prepared().reused


def test_a_damaged_analysis_is_made_anew(empty_cache: Path) -> None:
    first = prepared()
    (path,) = (empty_cache / analysis.KIND).iterdir()
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], whole.replace(b"layers", b"labels"), whole[:8] + b"[" + whole[9:]):
        path.write_bytes(damaged)
        found = prepared()
        assert not found.reused and same(first, found)
    assert prepared().reused and cache.unkept() == ""


def test_models_that_differ_in_their_layers_settings_alone_have_other_digests() -> None:
    inputs = (torch.randn(1, 3, 8, 8),)
    models = [small(), small(stride=2), small(activation=nn.ReLU6())]
    assert len({lifted_digest(lift(model, inputs)) for model in models}) == 3
