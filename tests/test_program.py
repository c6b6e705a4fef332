"""The integer program against brute force on small random instances."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgebuild import program
from edgebuild.plan import Choice, fits
from edgebuild.space import Limit, Option, Phase, Resource, Space
from edgebuild.spec import ChannelGroup, Form, LayerFacts, ModelFacts, Precision, Slot

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
    return ModelFacts(layers, groups)


FACTS = network()


def stepped(layer: LayerFacts, precision: Precision) -> float:
    """A latency with kernel tiles of 8, and a fixed cost for each operator."""
    up = [-(-count // 8) * 8 for count in (layer.in_channels // layer.groups, layer.out_channels)]
    macs = up[0] * up[1] * layer.positions * len(layer.kernel or (1,)) if layer.weighted else layer.out_elements
    return 20.0 + macs / (2.0 if precision == "int8" else 1.0) / 100


def weight(layer: LayerFacts, precision: Precision) -> float:
    return 5.0 + layer.weights * (1 if precision == "int8" else 4)


LATENCY, SIZE = Resource(stepped, 30.0), Resource(weight, 100.0)
MEMORY = Resource(weight, 50.0, (Phase(weight, 400.0), Phase(lambda layer, _: layer.positions, live=True)))


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


def without_one_cut_behind_the_concat(space: Space, name: str) -> Space:
    """Behind a concat the program's costs are exact where one of its groups is cut, and near where both are."""
    if {"stem", "side"} <= set(space.widths):
        return replace(space, widths={other: levels for other, levels in space.widths.items() if other != name})
    return space


def check(space: Space, limits: list[Limit]) -> None:
    """The program's best, second best and least are those of the enumeration."""
    every = list(everything(space))
    feasible = [choice for choice in every if all(limit.holds(choice) for limit in limits)]
    solution = program.solve(space, limits, gap=1e-6)
    if not feasible:
        assert solution.choice is None and solution.solve.status == "infeasible"
        return
    assert solution.choice is not None, solution.solve
    assert all(limit.holds(solution.choice) for limit in limits)
    assert solution.loss == pytest.approx(min(map(space.loss, feasible)), rel=1e-4, abs=1e-5)
    other = program.solve(space, limits, [solution.choice], gap=1e-6)
    rest = [choice for choice in feasible if choice != solution.choice]
    assert (other.choice is None) == (not rest)
    if other.choice:
        assert other.choice != solution.choice
        assert other.loss == pytest.approx(min(map(space.loss, rest)), rel=1e-4, abs=1e-5)
    smallest = program.least(space, limits, limits[0], gap=1e-6)
    others = [choice for choice in every if all(limit.holds(choice) for limit in limits[1:])]
    assert smallest.choice is not None
    assert limits[0].predicted(smallest.choice) == pytest.approx(min(map(limits[0].predicted, others)), rel=1e-4)


SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SLOW
@given(spaces(), st.floats(0.3, 1.1), st.floats(0.3, 1.1), st.sampled_from(["stem", "side"]))
def test_widths_forms_and_precisions_together(space: Space, fast: float, small: float, kept: str) -> None:
    space = without_one_cut_behind_the_concat(space, kept)
    whole = space.whole
    check(
        space,
        [
            Limit("latency", "", fast * LATENCY.of(whole), LATENCY, factor=1.3),
            Limit("size", "", small * SIZE.of(whole), SIZE),
        ],
    )


@SLOW
@given(spaces(), st.floats(0.3, 1.0), st.floats(0.5, 1.0), st.sampled_from(["stem", "side"]))
def test_the_peak_of_memory_over_the_schedule(space: Space, low: float, fast: float, kept: str) -> None:
    space = replace(without_one_cut_behind_the_concat(space, kept), options={})  # exact for dense layers of a precision
    whole = space.whole
    check(
        space,
        [
            Limit("peak_memory", "", low * MEMORY.of(whole), MEMORY),
            Limit("latency", "", fast * LATENCY.of(whole), LATENCY),
        ],
    )


def test_a_solution_says_how_it_was_found() -> None:
    space = Space(FACTS, "int8", {"inner": ((24, 0.0), (8, 1.0))}, {})
    limit = Limit("size", "", 0.9 * SIZE.of(space.whole), SIZE)
    solution = program.solve(space, [limit])
    assert solution.choice == Choice(FACTS, "int8", {"inner": 8}) and solution.loss == 1.0
    assert solution.solve.status == "optimal" and solution.solve.gap == 0.0 and solution.solve.binaries == 2


def test_what_cannot_be_is_infeasible_and_the_least_is_named() -> None:
    space = Space(FACTS, "int8", {"inner": ((24, 0.0), (8, 1.0))}, {})
    limit = Limit("size", "", 10.0, SIZE)
    assert program.solve(space, [limit]).solve.status == "infeasible"
    found = program.least(space, [limit], limit)
    assert found.choice is not None and found.choice.widths == {"inner": 8}
    enough = replace(limit, bound=limit.predicted(found.choice))
    assert program.solve(space, [enough]).choice == found.choice


def test_a_time_limit_ends_the_search() -> None:
    space = Space(FACTS, "int8", {"inner": ((24, 0.0), (8, 1.0))}, {})
    limit = Limit("size", "", 0.9 * SIZE.of(space.whole), SIZE)
    found = program.solve(space, [limit], time_limit=0.0)
    assert found.solve.status in ("optimal", "time limit", "no plan in time")  # presolve alone may solve so small a one
    assert (found.choice is None) == (found.solve.status == "no plan in time")
