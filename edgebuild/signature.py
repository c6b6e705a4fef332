"""What goes in and what comes out of a task's model, by name: checked, for the manifest of the bundle."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from torch import Tensor

from edgebuild.errors import TaskError
from edgebuild.manifest import DType, Input, Normalization, Output
from edgebuild.task import Task

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")  # an identifier in C++, Kotlin and Swift alike


def inputs(name: str, task: Task) -> tuple[Input, ...]:
    """The inputs of task `name`. Raises TaskError where what the task says of them does not fit them."""
    names = _names(name, "input", task.input_names, len(task.example_inputs))
    _check_keys(name, "normalization", task.normalization, names)
    return tuple(
        Input(
            name=n,
            shape=tuple(x.shape),
            dtype=_dtype(x),
            layout=(layout := _layout(name, n, task.layouts, x)),
            normalization=_normalization(name, n, task.normalization.get(n), layout, x),
        )
        for n, x in zip(names, task.example_inputs, strict=True)
    )


def outputs(name: str, task: Task, found: Sequence[Tensor]) -> tuple[Output, ...]:
    """The outputs of task `name`, of which `found` are examples. Raises TaskError as `inputs` does."""
    names = _names(name, "output", task.output_names, len(found))
    _check_keys(
        name, "layouts", task.layouts, [*_names(name, "input", task.input_names, len(task.example_inputs)), *names]
    )
    labels = task.labels
    if not isinstance(labels, tuple) or not all(isinstance(label, str) and label for label in labels):
        raise TaskError(f"task {name!r}: labels is not a tuple of names")
    classes = found[0].shape[-1] if found[0].dim() else 0
    if labels and len(labels) != classes:
        raise TaskError(
            f"task {name!r}: {len(labels)} labels for {classes} classes in the last dimension of {names[0]}"
        )
    return tuple(
        Output(
            name=n,
            shape=tuple(y.shape),
            dtype=_dtype(y),
            layout=_layout(name, n, task.layouts, y),
            labels=labels if i == 0 else (),
        )
        for i, (n, y) in enumerate(zip(names, found, strict=True))
    )


def _names(task: str, kind: str, given: Any, count: int) -> list[str]:
    if not given:
        return [f"{kind}_{i}" for i in range(count)]
    if not isinstance(given, tuple) or not all(isinstance(name, str) for name in given):
        raise TaskError(f"task {task!r}: {kind}_names is not a tuple of names")
    if len(given) != count:
        raise TaskError(f"task {task!r}: {len(given)} {kind}_names for {count} {kind}(s)")
    for name in given:
        if not _NAME.fullmatch(name) or given.count(name) > 1:
            raise TaskError(
                f"task {task!r}: {kind}_names holds {name!r}", "give each its own name of letters, digits and _"
            )
    return list(given)


def _check_keys(task: str, what: str, given: Any, known: Sequence[str]) -> None:
    if not isinstance(given, Mapping):
        raise TaskError(f"task {task!r}: {what} is not a dict by name", f"such as {{{known[0]!r}: ...}}")
    for key in given:
        if key not in known:
            raise TaskError(f"task {task!r}: {what} names {key!r}", f"known: {', '.join(known)}")


def _layout(task: str, name: str, layouts: Any, tensor: Tensor) -> str:
    if not isinstance(layouts, Mapping) or name not in layouts:
        return ""
    layout = layouts[name]
    if not isinstance(layout, str) or not re.fullmatch("[A-Z]*", layout) or len({*layout}) != tensor.dim():
        raise TaskError(
            f"task {task!r}: layouts[{name!r}] is {layout!r} for a tensor of {tensor.dim()} dimensions",
            'give each its own capital letter, such as "NCHW"',
        )
    return layout


def _normalization(task: str, name: str, given: Any, layout: str, tensor: Tensor) -> Normalization | None:
    if given is None:
        return None
    what = f"task {task!r}: normalization[{name!r}]"
    try:
        value = msgspec.convert(msgspec.to_builtins(given), Normalization)
    except (msgspec.ValidationError, TypeError) as error:
        raise TaskError(f"{what} is no Normalization: {error}") from None
    counts = {len(value.mean), len(value.std)} - {1}
    if counts and "C" not in layout:
        raise TaskError(
            f"{what} has a value for each channel, but no dimension of channels is known", "give its layout"
        )
    if counts - {tensor.shape[layout.index("C")] if counts else 1} or 0 in counts:
        raise TaskError(f"{what} has {len(value.mean)} means and {len(value.std)} stds for {tuple(tensor.shape)}")
    if not all(map(math.isfinite, (*value.mean, *value.std, value.scale))) or not all(std > 0 for std in value.std):
        raise TaskError(f"{what} holds a number that is not finite, or a std that is not above 0")
    return value


def _dtype(tensor: Tensor) -> DType:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DType.__args__:  # type: ignore[attr-defined]
        raise TaskError(f"a tensor of {dtype} cannot be handed over", f"known: {', '.join(DType.__args__)}")  # type: ignore[attr-defined]
    return dtype  # type: ignore[return-value]
