"""The integer program against brute force on small random instances."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebuild import program
from edgebuild.plan import Choice, fits
from edgebuild.space import Limit, Option, Resource, Space
from edgebuild.spec import Activation, ChannelGroup, Form, LayerFacts, ModelFacts, Precision, Slot

SIDE = 4


def conv(name: str, into: int, out: int, sources: tuple[str, ...], depthwise: bool = False) -> LayerFacts:
    shape = (1, into, SIDE, SIDE), (1, out, SIDE, SIDE)
    return LayerFacts(
        name, "conv2d", into, out, into if depthwise else 1, (3, 3), (1, 1), SIDE**2, into * SIDE**2, out * SIDE**2,
        True, *shape, sources,
    )  # fmt: skip


def add(name: str, channels: int, sources: tuple[str, ...]) -> LayerFacts:
    elements, shape = channels * SIDE**2, (1, channels, SIDE, SIDE)
    return LayerFacts(
        name, "add", channels, channels, in_elements=2 * elements, out_elements=elements, in_shape=shape,
        out_shape=shape, sources=sources,
    )  # fmt: skip


def network() -> ModelFacts:
    """A stem, a residual block, a depthwise convolution, a hardswish that stays fp32, a classifier over a concat."""
    layers = (
        conv("stem", 3, 16, ("",)),
        conv("inner", 16, 24, ("stem",)),
        conv("outer", 24, 16, ("inner",)),
        add("sum", 16, ("outer", "stem")),
        replace(conv("deep", 16, 16, ("sum",), depthwise=True)),
        replace(add("swish", 16, ("deep",)), op="hardswish", in_elements=16 * SIDE**2),
        conv("side", 16, 8, ("swish",)),
        replace(add("cat", 24, ("swish", "side")), op="cat", in_elements=24 * SIDE**2),
        conv("last", 24, 10, ("cat",)),
    )
    a, b, c = Slot(0, 1), Slot(0, 1), Slot(16, 1)
    groups = (
        ChannelGroup(
            "stem", 16,
            {name: a for name in ("stem", "outer", "sum", "deep", "swish", "cat")},
            {name: a for name in ("inner", "sum", "deep", "swish", "side", "cat", "last")},
        ),
        ChannelGroup("inner", 24, {"inner": b}, {"outer": b}),
        ChannelGroup("side", 8, {"side": c, "cat": Slot(0, 1)}, {"cat": c, "last": c}),
    )  # fmt: skip
    activations = tuple(
        Activation(layer.name, layer.out_elements, i, i + 2, layer.out_channels, {})
        if layer.name in ("last", "cat")
        else Activation(
            layer.name,
            layer.out_elements,
            i,
            i + 2,
            layer.out_channels,
            {group.name: 1 for group in groups if layer.name in group.outputs},
        )
        for i, layer in enumerate(layers)
    )
    return ModelFacts(layers, groups, activations)


FACTS = network()


def stepped(layer: LayerFacts, precision: Precision) -> float:
    """A latency with kernel tiles of 8, and a fixed cost for each operator."""
    up = [-(-count // 8) * 8 for count in (layer.in_channels // layer.groups, layer.out_channels)]
    macs = up[0] * up[1] * layer.positions * len(layer.kernel or (1,)) if layer.weighted else layer.out_elements
    return 20.0 + macs / (2.0 if precision == "int8" else 1.0) / 100


def weight(layer: LayerFacts, precision: Precision) -> float:
    return 5.0 + layer.weights * (1 if precision == "int8" else 4)


RESOURCES = {
    "latency": Resource(stepped, 30.0),
    "size": Resource(weight, 100.0),
    "peak_memory": Resource(weight, 0.0, True),
}


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    losses = st.floats(0.0, 2.0, allow_subnormal=False).map(lambda x: round(x, 3))
    widths = {}
    for group in FACTS.groups:
        counts = draw(st.sets(st.sampled_from(range(4, group.channels, 4)), max_size=3))
        if counts:
            levels = sorted(draw(losses) for _ in counts)
            widths[group.name] = ((group.channels, 0.0), *zip(sorted(counts, reverse=True), levels, strict=True))
    forms = {
        "inner": [Form("inner", "spatial", (8,)), Form("inner", "tucker2", (12, 8))],
        "outer": [Form("outer", "tucker2", (8, 12))],
        "last": [Form("last", "spatial", (4,))],
    }
    options = {}
    for layer in ("stem", "inner", "outer", "side", "last"):
        chosen = draw(st.lists(st.sampled_from(forms.get(layer, [None])), max_size=2, unique=True))
        precisions: list[Precision] = ["int8", *draw(st.sampled_from([[], ["fp32"]]))]
        found = [Option(form, p, draw(losses)) for form in dict.fromkeys([None, *chosen]) for p in precisions]
        if len(found) > 1:
            options[layer] = tuple(found)
    return Space(FACTS, "int8", widths, options, draw(losses))


def everything(space: Space) -> Iterator[Choice]:
    names, layers = list(space.widths), list(space.options)
    for widths in product(*space.widths.values()):
        for options in product(*space.options.values()):
            chosen = dict(zip(layers, options, strict=True))
            choice = Choice(
                FACTS,
                "int8",
                {
                    name: width
                    for name, (width, _) in zip(names, widths, strict=True)
                    if width != FACTS.group(name).channels
                },
                {name: option.form for name, option in chosen.items() if option.form},
                frozenset(name for name, option in chosen.items() if option.precision == "fp32"),
            )
            into, out = choice._missing()
            narrow = {
                n: FACTS.layer(n).at(
                    FACTS.layer(n).in_channels - into.get(n, 0), FACTS.layer(n).out_channels - out.get(n, 0)
                )
                for n in choice.forms
            }
            if all(fits(narrow[name], form) for name, form in choice.forms.items()):
                yield choice


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(spaces(), st.lists(st.floats(0.3, 1.0), min_size=3, max_size=3), st.booleans())
def test_the_best_choice_is_found(space: Space, shares: list[float], cut_both: bool) -> None:
    if {"stem", "side"} <= set(space.widths):
        kept = {name: levels for name, levels in space.widths.items() if name != ("side" if cut_both else "stem")}
        space = replace(space, widths=kept)
    limits = [
        Limit(kind, "", share * resource.of(space.whole), resource)  # type: ignore[arg-type]
        for share, (kind, resource) in zip(shares, RESOURCES.items(), strict=True)
    ]
    feasible = [choice for choice in everything(space) if all(limit.holds(choice) for limit in limits)]
    solution = program.solve(space, limits, gap=1e-6)
    if not feasible:
        assert solution.choice is None and solution.solve.status == "infeasible"
        return
    best = min(space.loss(choice) for choice in feasible)
    assert solution.choice is not None, solution.solve
    assert all(limit.holds(solution.choice) for limit in limits)
    assert solution.loss == pytest.approx(best, rel=1e-4, abs=1e-5)
    other = program.solve(space, limits, [solution.choice], gap=1e-6)
    assert other.choice != solution.choice
    assert (other.choice is None) == (len(feasible) == 1)
    if other.choice:
        second = min(space.loss(choice) for choice in feasible if choice != solution.choice)
        assert other.loss == pytest.approx(second, rel=1e-4, abs=1e-5)
    smallest = program.least(space, limits, limits[0], gap=1e-6)
    others = [c for c in everything(space) if all(limit.holds(c) for limit in limits[1:])]
    assert smallest.choice is not None
    assert limits[0].predicted(smallest.choice) == pytest.approx(min(map(limits[0].predicted, others)), rel=1e-4)
