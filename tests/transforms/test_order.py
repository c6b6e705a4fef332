"""The order of operators: the same answers, the least memory, and found exactly."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgebuild import backends, catalog
from edgebuild.lift import lift
from edgebuild.spec import MODEL_INPUT, LayerFacts
from edgebuild.transforms import order, quantize


class TwoBranches(nn.Module):
    """Each branch widens and narrows again; as it is written both are wide at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.wide = nn.ModuleList(nn.Conv2d(8, 32, 3, padding=1) for _ in range(2))
        self.narrow = nn.ModuleList(nn.Conv2d(32, 8, 3, stride=4, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        one, two = (torch.relu(layer(x)) for layer in self.wide)
        return self.narrow[0](one) + self.narrow[1](two)


@pytest.fixture(scope="module")
def image() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return (torch.randn(1, 3, 16, 16),)


def test_branches_run_one_after_the_other(image: tuple[Tensor, ...]) -> None:
    model = lift(TwoBranches().eval(), image)
    found = order.apply(model, image)
    assert found.after < 0.6 * found.before
    assert torch.equal(found.model(*image), model(*image))
    again = order.apply(lift(found.model, image), image)  # the order outlives an export
    assert again.before == again.after == found.after


def test_the_arena_of_the_program_falls(image: tuple[Tensor, ...]) -> None:
    model = lift(TwoBranches().eval(), image)
    target = catalog.load_target("nrf52840")
    backend = backends.Backend(target.device, target.npu, target.board)
    planned = []
    for version in (model, order.apply(model, image).model):
        rounded = quantize.apply(version, backend.layout(image), [image], backend.quantizer()).model
        planned.append(backend.lower(rounded, image).planned_memory)
    assert planned[1] < 0.7 * planned[0]


def test_a_chain_stays_as_it_is(image: tuple[Tensor, ...]) -> None:
    model = lift(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), image)
    assert order.apply(model, image).model is model


@st.composite
def graphs(draw: st.DrawFn) -> list[LayerFacts]:
    layers: list[LayerFacts] = []
    for i in range(draw(st.integers(2, 6))):
        known = [MODEL_INPUT, *(layer.name for layer in layers)]
        sources = tuple(draw(st.sets(st.sampled_from(known), min_size=1, max_size=2)))
        size = draw(st.integers(1, 50))
        layers.append(
            LayerFacts(f"l{i}", "add", 1, 1, in_elements=10, out_elements=size, sources=tuple(sorted(sources)))
        )
    return layers


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_no_other_order_takes_less(layers: list[LayerFacts]) -> None:
    found = order.best(layers)
    assert found is not None
    place = {layer.name: i for i, layer in enumerate(layers)}

    def possible(indices: tuple[int, ...]) -> bool:
        when = {layer: step for step, layer in enumerate(indices)}
        return all(when[place[s]] < when[i] for i in indices for s in layers[i].sources if s != MODEL_INPUT)

    orders = [indices for indices in permutations(range(len(layers))) if possible(indices)]
    assert tuple(found) in orders
    assert order.peak(layers, found) == min(order.peak(layers, indices) for indices in orders)
