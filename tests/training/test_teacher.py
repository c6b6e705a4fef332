import sqlite3

import pytest
import torch
from torch import nn

from edgebuild import cache
from edgebuild.training.teacher import Teacher


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEBUILD_CACHE", str(tmp_path))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


X = (torch.arange(8.0).view(2, 4),)


def test_outputs_are_computed_once_even_by_another_teacher_of_the_same_digest():
    first = Teacher(net(), "a")
    outputs = first(X)
    assert torch.equal(first(X)[0], outputs[0]) and (first.computed, first.recalled) == (1, 1)
    other = Teacher(net(), "a")
    assert torch.equal(other(X)[0], outputs[0]) and (other.kept, other.computed, other.recalled) == (1, 0, 1)
    assert Teacher(net(), "b").kept == 0
    assert other.remembers(X) and not other.remembers((X[0] + 1,)) and not Teacher(net(), "b").remembers(X)


def test_other_inputs_are_other_batches():
    teacher = Teacher(net(), "a")
    teacher(X)
    for inputs in ((X[0] + 1e-6,), (X[0].view(1, 2, 4),), (X[0].double(),)):
        if inputs[0].dtype == torch.float32:
            assert torch.equal(teacher(inputs)[0], net()(inputs[0]))
    assert teacher.recalled == 0


def test_without_a_digest_nothing_is_kept(tmp_path):
    teacher = Teacher(net())
    teacher(X), teacher(X)
    assert teacher.computed == 2 and not list(tmp_path.rglob("*.sqlite"))


@pytest.mark.parametrize("damage", ["garbage", "row", "folder"])
def test_a_damaged_store_costs_time_and_nothing_else(damage):
    right = Teacher(net(), "a")(X)[0]
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
    assert torch.equal(teacher(X)[0], right) and teacher.computed == 1
    assert torch.equal(teacher(X)[0], right)


def test_in_bf16_outputs_are_rounded_and_still_fp32():
    exact, rounded = Teacher(net()), Teacher(net())
    rounded.bf16 = True
    (right,), (found,) = exact(X), rounded(X)
    assert found.dtype == torch.float32 and not torch.equal(found, right)
    assert torch.allclose(found, right, rtol=2e-2, atol=2e-2)
