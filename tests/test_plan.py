"""Points of the planner's space on made-up models, and plans from and to data: no torch."""

from dataclasses import replace

import pytest

from edgebuild.errors import SpecError
from edgebuild.plan import Choice, checked, choice_of, to_plan
from edgebuild.spec import ChannelGroup, Form, LayerFacts, ModelFacts, Plan, Slot, Width, factors


def conv(name: str, n: int, m: int) -> LayerFacts:
    return LayerFacts(
        name, "conv2d", n, m, kernel=(3, 3), stride=(1, 1), positions=64, in_elements=n * 64, out_elements=m * 64,
        in_shape=(1, n, 8, 8), out_shape=(1, m, 8, 8),
    )  # fmt: skip


FACTS = ModelFacts(
    layers=(conv("a", 3, 32), conv("b", 32, 64), conv("c", 64, 10)),
    groups=(
        ChannelGroup("a", 32, {"a": Slot(0, 1)}, {"b": Slot(0, 1)}),
        ChannelGroup("b", 64, {"b": Slot(0, 1)}, {"c": Slot(0, 1)}),
    ),
)


def test_widths_and_forms_change_the_layers_that_they_touch():
    choice = Choice(FACTS, "int8", {"a": 16, "b": 32}, {"b": Form("b", "tucker2", (16, 8))})
    layers = {layer.name: layer for layer, _ in choice.layers()}
    assert (layers["a"].in_channels, layers["a"].out_channels) == (3, 16)
    assert [layers[f"b.{i}"].out_channels for i in range(3)] == [8, 16, 32]
    assert layers["c"].in_channels == 32


def test_conversions_stand_where_precisions_meet():
    swish = replace(conv("swish", 32, 32), op="hardswish", kernel=(), sources=("a",))
    layers = (replace(FACTS.layers[0], sources=("",)), swish, replace(FACTS.layers[1], sources=("swish",)))
    facts = ModelFacts(layers, ())
    names = [(layer.name, precision) for layer, precision in Choice(facts, "int8").layers()]
    assert names == [
        ("input.quantize", "int8"),
        ("a", "int8"),
        ("a.dequantize", "int8"),
        ("swish", "fp32"),
        ("swish.quantize", "int8"),
        ("b", "int8"),
        ("b.dequantize", "int8"),
    ]
    kept = [layer.name for layer, _ in Choice(facts, "int8", keep_fp32=frozenset({"a", "b"})).layers()]
    assert kept == ["a", "swish", "b"]
    assert [layer.name for layer, _ in Choice(facts, "fp32").layers()] == ["a", "swish", "b"]


def test_a_tensor_is_converted_once_for_all_its_readers():
    first = replace(FACTS.layers[0], sources=("",))
    readers = tuple(replace(conv(name, 32, 4), sources=("a",)) for name in ("b", "c"))
    facts = ModelFacts((first, *readers), ())
    names = [layer.name for layer, _ in Choice(facts, "int8", keep_fp32=frozenset({"b", "c"})).layers()]
    assert names.count("a.dequantize") == 1


def test_a_plan_survives_the_way_to_data_and_back():
    choice = Choice(FACTS, "int8", {"a": 16}, {"b": Form("b", "tucker2", (16, 8))})
    plan = to_plan(choice)
    assert choice_of(FACTS, plan) == choice
    assert plan.widths == (Width("a", 16, 32),)
    assert plan.techniques == ("quantize", "prune", "factorize")
    assert checked(FACTS, plan) == plan
    mixed = replace(choice, keep_fp32=frozenset({"c"}))
    assert choice_of(FACTS, to_plan(mixed)) == mixed


def test_factors_of_a_strided_convolution():
    layer = replace(conv("s", 16, 32), stride=(2, 2), positions=16, out_shape=(1, 32, 4, 4))
    first, second = factors(layer, Form("s", "spatial", (8,)))
    assert (first.kernel, first.stride, first.positions) == ((3, 1), (2, 1), 4 * 8)
    assert (second.kernel, second.stride, second.positions) == ((1, 3), (1, 2), 16)


TIED = ModelFacts(
    layers=(conv("stem", 3, 32), conv("inner", 32, 32), conv("outer", 32, 32), conv("last", 32, 10)),
    groups=(
        ChannelGroup(
            "stem",
            32,
            {"stem": Slot(0, 1), "outer": Slot(0, 1)},
            {"inner": Slot(0, 1), "last": Slot(0, 1)},
        ),
        ChannelGroup("inner", 32, {"inner": Slot(0, 1)}, {"outer": Slot(0, 1)}),
    ),
    unprunable={"last": "its channels are the model's output"},
)


def test_a_width_may_name_any_layer_of_its_group():
    plan = Plan(widths=(Width("outer", 16, 32), Width("stem", 16, 32), Width("inner", 32, 32)))
    assert checked(TIED, plan).widths == (Width("stem", 16, 32),)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (Plan(widths=(Width("stem", 16, 32), Width("outer", 24, 32))), "'outer'.*'stem'.*channels are the same"),
        (Plan(widths=(Width("inner", 40, 32),)), "40 of 32 channels of layer 'inner', which has 32"),
        (Plan(widths=(Width("inner", 16, 64),)), "16 of 64 channels of layer 'inner', which has 32"),
        (Plan(widths=(Width("last", 5, 10),)), "'last', whose channels are fixed: its channels are the model's output"),
        (Plan(widths=(Width("iner", 16, 32),)), "'iner', which the model does not have.*'inner'"),
        (Plan(forms=(Form("outer", "svd", (8,)),)), "'outer' by svd"),
        (
            Plan(widths=(Width("inner", 8, 32),), forms=(Form("outer", "tucker2", (16, 16)),)),
            "'outer' the ranks \\(16, 16\\) for tucker2, at most \\(32, 8\\) with 8 channels in",
        ),
        (Plan(forms=(Form("outer", "spatial", (8, 8)),)), "'outer' the ranks"),
        (Plan(forms=2 * (Form("outer", "spatial", (8,)),)), "factorizes layer 'outer' twice"),
        (Plan(keep_fp32=("nowhere",)), "'nowhere', which the model does not have"),
        (Plan(distil=True, distil_steps=-1), "distils for -1 steps"),
    ],
)  # fmt: skip
def test_an_inconsistent_plan_is_refused_with_the_layers_name(plan, said):
    with pytest.raises(SpecError, match=said):
        checked(TIED, plan)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"qat_steps": -1}, "qat_steps -1"),
        ({"qat_steps": 5, "precision": "fp32"}, "rounds nothing"),
        ({"scheme": "dynamic", "precision": "fp32"}, "rounds nothing"),
        ({"scheme": "8da4w", "qat_steps": 5}, "not supported"),
    ],
)
def test_rounding_that_no_plan_can_ask_for(fields, reason):
    with pytest.raises(SpecError, match=reason):
        checked(ModelFacts((), ()), Plan(**fields))
    assert checked(ModelFacts((), ()), Plan(scheme="dynamic", qat_steps=5)).qat_steps == 5
