"""The search on made-up models: no torch, costs that can be counted by hand."""

from dataclasses import replace

import pytest

from edgebuild.plan import Choice, Limit, choice_of, reachable, search, to_plan
from edgebuild.spec import Candidate, ChannelGroup, Form, LayerFacts, ModelFacts, Slot, Width, factors


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
CANDIDATES = (
    *(Candidate(Width("a", width, 32), loss) for width, loss in ((24, 0.1), (16, 0.4), (8, 2.0))),
    *(Candidate(Width("b", width, 64), loss) for width, loss in ((48, 0.05), (32, 0.1), (16, 0.9))),
    *(Candidate(Form("b", "tucker2", ranks), loss) for ranks, loss in (((32, 16), 0.2), ((16, 8), 1.5))),
)
START = Choice(FACTS, "int8")


def weights(choice: Choice) -> float:
    return float(sum(layer.weights for layer, _ in choice.layers()))


def limit(bound: float, factor: float = 1.0) -> Limit:
    return Limit("size", "", bound, weights, factor)


def test_widths_and_forms_change_the_layers_that_they_touch():
    choice = Choice(FACTS, "int8", {"a": 16, "b": 32}, {"b": Form("b", "tucker2", (16, 8))})
    layers = {layer.name: layer for layer, _ in choice.layers()}
    assert (layers["a"].in_channels, layers["a"].out_channels) == (3, 16)
    assert [layers[f"b.{i}"].out_channels for i in range(3)] == [8, 16, 32]
    assert layers["c"].in_channels == 32


def test_nothing_is_done_where_everything_fits():
    found = search(START, CANDIDATES, [limit(weights(START))])
    assert found is not None and found[0] == START and found[1] == 0


@pytest.mark.parametrize("share", [0.9, 0.7, 0.5, 0.3, 0.2])
def test_the_limit_is_kept_and_nothing_is_given_away(share):
    bound = share * weights(START)
    found = search(START, CANDIDATES, [limit(bound)])
    assert found is not None
    choice, loss = found
    assert weights(choice) <= bound
    for layer in choice.forms:  # undoing any step breaks the limit or makes a form that does not pay
        trial = replace(choice, forms={k: v for k, v in choice.forms.items() if k != layer})
        assert weights(trial) > bound or not trial.sound()
    assert loss > 0


def test_what_measurements_said_tightens_the_plan():
    bound = 0.6 * weights(START)
    plain, corrected = search(START, CANDIDATES, [limit(bound)]), search(START, CANDIDATES, [limit(bound, 1.5)])
    assert plain is not None and corrected is not None
    assert weights(corrected[0]) <= bound / 1.5 < weights(plain[0])


def test_a_plan_is_not_given_twice():
    bound = [limit(0.6 * weights(START))]
    first = search(START, CANDIDATES, bound)
    assert first is not None
    second = search(START, CANDIDATES, bound, [first[0]])
    assert second is not None and second[0] != first[0] and weights(second[0]) <= bound[0].bound


def test_what_cannot_be_is_none_and_the_smallest_value_is_named():
    assert search(START, CANDIDATES, [limit(10)]) is None
    (row,) = reachable(START, CANDIDATES, [limit(10)])
    assert not row.feasible
    nearest = search(START, CANDIDATES, [limit(row.smallest)])
    assert nearest is not None and weights(nearest[0]) <= row.smallest


def test_a_plan_survives_the_way_to_data_and_back():
    choice = Choice(FACTS, "int8", {"a": 16}, {"b": Form("b", "tucker2", (16, 8))})
    plan = to_plan(choice)
    assert choice_of(FACTS, plan) == choice
    assert plan.widths == (Width("a", 16, 32),)
    assert plan.techniques == ("quantize", "prune", "factorize")


def test_factors_of_a_strided_convolution():
    layer = replace(conv("s", 16, 32), stride=(2, 2), positions=16, out_shape=(1, 32, 4, 4))
    first, second = factors(layer, Form("s", "spatial", (8,)))
    assert (first.kernel, first.stride, first.positions) == ((3, 1), (2, 1), 4 * 8)
    assert (second.kernel, second.stride, second.positions) == ((1, 3), (1, 2), 16)
