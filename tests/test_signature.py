"""What a task says of its inputs and outputs: named, or refused in one line."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from edgebuild import signature
from edgebuild.errors import TaskError
from edgebuild.manifest import Input, Normalization, Output
from edgebuild.task import Task

TASK = Task(
    model=nn.Identity(),
    example_inputs=(torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, dtype=torch.int64)),
    calibration=(),
    input_names=("image", "tokens"),
    output_names=("scores",),
    layouts={"image": "NCHW", "scores": "NK"},
    normalization={"image": Normalization((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 1 / 255)},
    labels=("cat", "dog"),
)
FOUND = (torch.zeros(1, 2),)


def test_what_the_task_says_is_kept() -> None:
    image, tokens = signature.inputs("pets", TASK)
    wanted = Normalization((0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 1 / 255)
    assert image == Input(name="image", shape=(1, 3, 8, 8), dtype="float32", layout="NCHW", normalization=wanted)
    assert tokens == Input(name="tokens", shape=(1, 4), dtype="int64")
    (scores,) = signature.outputs("pets", TASK, FOUND)
    assert scores == Output(name="scores", shape=(1, 2), dtype="float32", layout="NK", labels=("cat", "dog"))


def test_without_names_they_are_counted() -> None:
    task = Task(nn.Identity(), TASK.example_inputs, ())
    assert [port.name for port in signature.inputs("pets", task)] == ["input_0", "input_1"]
    assert [port.name for port in signature.outputs("pets", task, FOUND * 2)] == ["output_0", "output_1"]


def test_one_value_stands_for_all_channels() -> None:
    task = replace(TASK, normalization={"image": Normalization(scale=1 / 255)}, layouts={})
    assert signature.inputs("pets", task)[0].normalization == Normalization((0.0,), (1.0,), 1 / 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_names": ("image",)}, "1 input_names for 2 input"),
        ({"input_names": ["image", "tokens"]}, "input_names is not a tuple"),
        ({"input_names": ("image", 3)}, "input_names is not a tuple"),
        ({"input_names": ("image", "image")}, "'image'.*its own name"),
        ({"input_names": ("image", "two words")}, "'two words'.*letters"),
        ({"output_names": ("a", "b")}, "2 output_names for 1 output"),
        ({"labels": ("cat",)}, "1 labels for 2 classes in the last dimension of scores"),
        ({"labels": "ab"}, "labels is not a tuple"),
        (
            {"layouts": {"picture": "NCHW"}, "normalization": {}},
            "layouts names 'picture'.*known: image, tokens, scores",
        ),
        ({"layouts": {"image": "NHW"}}, "'NHW' for a tensor of 4 dimensions"),
        ({"layouts": {"image": "NCHH"}}, "'NCHH'.*its own capital letter"),
        ({"layouts": {"image": 4}}, "is 4 for a tensor"),
        ({"layouts": "NCHW", "normalization": {}}, "layouts is not a dict"),
        ({"normalization": {"scores": Normalization()}}, "normalization names 'scores'"),
        ({"normalization": Normalization()}, "normalization is not a dict"),
        ({"normalization": {"image": (0.5, 0.2)}}, "no Normalization"),
        ({"normalization": {"image": Normalization((0.1, 0.2), (1.0,))}}, "2 means and 1 stds"),
        ({"normalization": {"image": Normalization((), (1.0,))}}, "0 means"),
        ({"normalization": {"image": Normalization(std=(0.0,))}}, "a std that is not above 0"),
        ({"normalization": {"image": Normalization(scale=float("nan"))}}, "not finite"),
        ({"normalization": {"tokens": Normalization((1.0, 2.0, 3.0, 4.0))}}, "give its layout"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    task = replace(TASK, **change)
    with pytest.raises(TaskError, match=f"task 'pets': .*{message}") as error:
        signature.inputs("pets", task)
        signature.outputs("pets", task, FOUND)
    assert "\n" not in str(error.value)


def test_a_dtype_that_no_app_knows_is_refused() -> None:
    task = replace(TASK, example_inputs=(torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16), TASK.example_inputs[1]))
    with pytest.raises(TaskError, match="bfloat16"):
        signature.inputs("pets", task)
