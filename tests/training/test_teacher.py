import sqlite3

import pytest
import torch
from torch import nn

from edgebuild import cache
from edgebuild.training.compiled import Means
from edgebuild.training.teacher import FEW, Teacher


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEBUILD_CACHE", str(tmp_path))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


X = (torch.arange(8.0).view(2, 4),)


def test_outputs_are_computed_once_even_by_another_teacher_of_the_same_digest():
    first = Teacher(net(), "a")
    taught = first(X)
    assert torch.equal(first(X).outputs[0], taught.outputs[0]) and (first.computed, first.recalled) == (1, 1)
    other = Teacher(net(), "a")
    assert torch.equal(other(X).outputs[0], taught.outputs[0])
    assert (other.kept, other.computed, other.recalled) == (1, 0, 1)
    assert Teacher(net(), "b").kept == 0
    assert other.remembers(X) and not other.remembers((X[0] + 1,)) and not Teacher(net(), "b").remembers(X)


def deep(hidden: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def test_a_few_features_are_kept_with_the_outputs_and_many_are_not():
    for hidden, kept in ((FEW, 1), (FEW + 1, 0)):
        model, name = deep(hidden), f"deep {hidden}"
        taught = Teacher(model, name, ("2",))(X)
        assert torch.equal(taught.features["2"], model[:2](X[0])) and not taught.features["2"].requires_grad
        again = Teacher(model, name, ("2",))
        assert torch.equal(again(X).features["2"], taught.features["2"]) and again.recalled == kept
        assert not model[2]._forward_pre_hooks


def test_features_that_were_not_kept_are_computed_and_then_kept_too():
    model = deep(5)
    plain = Teacher(model, "deep")(X)
    hinting = Teacher(model, "deep", ("2",))
    assert not hinting.remembers(X) and hinting(X).features.keys() == {"2"} and hinting.computed == 1
    assert Teacher(model, "deep", ("2",)).remembers(X)
    again = Teacher(model, "deep")  # of no features
    assert torch.equal(again(X).outputs[0], plain.outputs[0]) and not again(X).features and again.computed == 0
    assert len(again(X).outputs) == 1


def test_other_inputs_are_other_batches():
    teacher = Teacher(net(), "a")
    teacher(X)
    for inputs in ((X[0] + 1e-6,), (X[0].view(1, 2, 4),), (X[0].double(),)):
        if inputs[0].dtype == torch.float32:
            assert torch.equal(teacher(inputs).outputs[0], net()(inputs[0]))
    assert teacher.recalled == 0


def test_without_a_digest_nothing_is_kept(tmp_path):
    teacher = Teacher(net())
    teacher(X), teacher(X)
    assert teacher.computed == 2 and not list(tmp_path.rglob("*.sqlite"))


@pytest.mark.parametrize("damage", ["garbage", "row", "folder"])
def test_a_damaged_store_costs_time_and_nothing_else(damage):
    right = Teacher(net(), "a")(X).outputs[0]
    path = cache.root() / "teacher" / "a.sqlite"
    if damage == "garbage":
        for part in path.parent.glob("a.sqlite*"):
            part.write_bytes(b"no database" * 1000)
    elif damage == "row":
        with sqlite3.connect(path) as store:
            store.execute("UPDATE outputs SET tensors = ?", (b"no tensors",))
    else:
        for part in path.parent.glob("a.sqlite*"):
            part.unlink()
        path.mkdir()
    teacher = Teacher(net(), "a")
    assert torch.equal(teacher(X).outputs[0], right) and teacher.computed == 1
    assert torch.equal(teacher(X).outputs[0], right)


def test_in_bf16_outputs_are_rounded_and_still_fp32():
    exact, rounded = Teacher(net()), Teacher(net())
    rounded.answering.means = Means(bf16=True)
    (right,), (found,) = exact(X).outputs, rounded(X).outputs
    assert found.dtype == torch.float32 and not torch.equal(found, right)
    assert torch.allclose(found, right, rtol=2e-2, atol=2e-2)
