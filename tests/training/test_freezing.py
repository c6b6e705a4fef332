import copy

import pytest
import torch
from torch import Tensor, fx, nn

from edgebuild.lift import lift
from edgebuild.spec import Distillation
from edgebuild.training.compiled import Means
from edgebuild.training.freezing import Settled, cut
from edgebuild.training.learner import Lesson
from edgebuild.transforms import distil

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


class Net(nn.Module):
    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(8) for _ in range(4)))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.blocks(self.stem(x)).mean((2, 3)))


def lifted(model: nn.Module) -> fx.GraphModule:
    return lift(model.eval(), (X[:1],))


def names(part: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for name, _ in part.named_parameters()}


def test_the_parts_give_what_the_model_gives_and_have_its_layers():
    model = lifted(Net())
    parts = cut(model, (X,))
    assert names(parts.first) == {"stem", "blocks.0.conv", "blocks.0.norm", "blocks.1.conv", "blocks.1.norm"}
    assert names(parts.rest) == names(model) - names(parts.first) and parts.layers == 5
    with torch.no_grad():
        assert torch.equal(parts.rest(parts.first(X)), model(X))
        assert torch.allclose(Settled(parts, Means())(X), model(X))
    assert {id(p) for part in (parts.first, parts.rest) for p in part.parameters()} == set(map(id, model.parameters()))


def test_layers_that_are_hinted_come_after_the_cut():
    model = lifted(Net())
    assert names(cut(model, (X,), ("blocks.1.conv", "last")).first) == {"stem", "blocks.0.conv", "blocks.0.norm"}
    assert cut(model, (X,), ("stem",)) is None


class Streams(nn.Module):
    """Two tensors all the way."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = x, -x
        for conv in self.convs:
            a, b = b + conv(a), torch.relu(a)
        return (a + b).mean((2, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 1), Block(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.block(self.stem(x)))).mean((2, 3))


def test_nothing_is_cut_that_cannot_be():
    assert cut(Net(), (X,)) is None  # not lifted
    assert cut(lifted(nn.Sequential(nn.Flatten(), nn.Linear(192, 4))), (X,)) is None
    assert cut(lifted(Streams()), (X,)) is None
    assert cut(lifted(Tied()), (X,)) is None  # the same weights on both sides


def trained(freeze_after: float) -> tuple[fx.GraphModule, nn.Module, str]:
    student, held_out = lifted(Net(1)), tuple((x,) for x in X.split(1))
    settings = Distillation(steps=20, freeze_after=freeze_after)
    lesson = Lesson(settings, False, True, 0, held_out=held_out)
    model, how = distil.apply(copy.deepcopy(student), lifted(Net(2)), lambda: X.split(8), lesson)
    assert how.kept in ("last", "average")
    return student, model, str(how)


@pytest.mark.parametrize("freeze_after", [0.0, 0.5, 1.0])
def test_frozen_layers_stay_and_the_others_are_trained(freeze_after):
    student, model, how = trained(freeze_after)
    first = names(cut(student, (X,)).first)
    before, after = student.state_dict(), model.state_dict()
    changed = {name.rpartition(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == (names(student) - first if freeze_after == 0 else names(student))
    assert ("the first 5 layers frozen after" in how) == (freeze_after < 1)


def test_a_frozen_layer_learns_until_then_and_no_longer():
    half, whole = trained(0.5)[1].state_dict(), trained(1.0)[1].state_dict()
    assert not torch.equal(half["stem.weight"], whole["stem.weight"])
    norms = {name: int(x) for name, x in half.items() if name.endswith("num_batches_tracked")}
    assert norms["blocks.0.norm.num_batches_tracked"] < norms["blocks.3.norm.num_batches_tracked"] == 20
