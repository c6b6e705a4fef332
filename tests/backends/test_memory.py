"""Buffers are placed apart, in as little as was found, and never in more than ExecuTorch's own planner takes."""

from collections.abc import Sequence

import boards
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgebuild.backends import memory
from edgebuild.backends.memory import Buffer, fitted, least, placed

LIVES = st.tuples(st.integers(0, 12), st.integers(0, 6)).map(lambda life: (life[0], sum(life)))
BUFFERS = st.lists(st.builds(lambda size, life: Buffer(16 * size, *life), st.integers(1, 40), LIVES), max_size=9)


def apart(buffers: Sequence[Buffer], offsets: Sequence[int]) -> bool:
    """Whether no two buffers that are needed at the same step share a byte."""
    places = [(b.first, b.last, at, at + b.size) for b, at in zip(buffers, offsets, strict=True)]
    return not any(
        a[0] <= b[1] and b[0] <= a[1] and a[2] < b[3] and b[2] < a[3] for i, a in enumerate(places) for b in places[:i]
    )


def end_of(buffers: Sequence[Buffer], offsets: Sequence[int]) -> int:
    return max((at + b.size for b, at in zip(buffers, offsets, strict=True)), default=0)


@settings(deadline=None)
@given(BUFFERS.flatmap(lambda found: st.tuples(st.just(found), st.permutations(range(len(found))))))
def test_in_any_order_buffers_lie_apart(given_: tuple[list[Buffer], list[int]]) -> None:
    buffers, order = given_
    offsets, end = placed(buffers, order)
    assert (
        apart(buffers, offsets) and min(offsets, default=0) == 0 and end == end_of(buffers, offsets) >= least(buffers)
    )


@settings(max_examples=40, deadline=None)
@given(BUFFERS)
def test_the_fit_is_no_worse_than_by_size_and_the_same_again(buffers: list[Buffer]) -> None:
    offsets, end = fitted(buffers)
    assert apart(buffers, offsets) and end == end_of(buffers, offsets) >= least(buffers)
    assert end <= placed(buffers, sorted(range(len(buffers)), key=lambda i: -buffers[i].size))[1]
    assert fitted(buffers) == (offsets, end)


def test_what_is_needed_at_the_worst_step() -> None:
    assert least([]) == 0 and fitted([]) == ([], 0)
    assert least([Buffer(3, 0, 1), Buffer(4, 1, 2), Buffer(5, 2, 2)]) == 9


def test_a_changed_order_fits_where_neither_size_nor_life_does() -> None:
    """Found by search: both orders to start from leave a gap that a third one fills."""
    buffers = [Buffer(5, 5, 8), Buffer(8, 4, 6), Buffer(8, 0, 0), Buffer(7, 0, 2), Buffer(2, 2, 5)]
    by_size = sorted(range(len(buffers)), key=lambda i: (-buffers[i].size, buffers[i].first, i))
    by_life = sorted(range(len(buffers)), key=lambda i: (buffers[i].first - buffers[i].last, -buffers[i].size, i))
    assert min(placed(buffers, order)[1] for order in (by_size, by_life)) > least(buffers) == fitted(buffers)[1]


class Joined(nn.Module):
    """Two concatenations of parts that live for different times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 4, 1)
        self.one, self.three, self.five = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 12, 3, padding=1), nn.Conv2d(32, 4, 1)
        self.classify = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.squeeze(x)
        z = torch.cat([self.one(y), x, torch.relu(self.three(y))], 1)
        return self.classify(torch.cat([x, self.five(z)], 1).mean((2, 3)))


def test_a_program_takes_no_more_than_by_executorchs_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    from executorch.exir import ExecutorchBackendConfig

    torch.manual_seed(0)
    ours = boards.lower(Joined(), (1, 3, 24, 24), boards.M7)
    monkeypatch.setattr(memory, "config", ExecutorchBackendConfig)
    theirs = ours.backend.lower(ours.graph, ours.samples[0])
    assert 0 < ours.artifact.planned_memory < theirs.planned_memory
