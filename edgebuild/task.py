"""What the user brings: a `Task`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from edgebuild.errors import TaskError
from edgebuild.manifest import Normalization

__all__ = ["Normalization", "Predict", "Task", "load_weights"]

Predict = Callable[..., Tensor]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Task:
    """A trained model and the data that its compression needs.

    model: the trained module, or an exported program (`torch.export.ExportedProgram`).
    example_inputs: positional inputs of one call with batch size 1; their shapes and dtypes are the artifact's.
    calibration: input batches, each a tensor or a tuple of tensors with the batch in dimension 0.
    train: gives the training batches anew at each call, each `inputs`, or `(inputs, labels)` where `labelled`.
    student: a smaller module with the same inputs and outputs, trained or not, for distillation.
    evaluate: scores any callable that takes a batch of inputs and returns the outputs; larger is better.
    metric: the name of what `evaluate` returns; "accuracy" is a share of samples and gets a 95% interval.
    outputs: "logits" of classes in the last dimension, or "values" (regression, embeddings).

    The rest is for whoever builds the app, and goes into the bundle's manifest:

    input_names, output_names: in the order of the call; without, input_0, output_0 and so on.
    layouts: what the dimensions of an input or output are, by its name, a letter for each: "NCHW".
    normalization: what the app does to an input before the model sees it, by the input's name.
    labels: the classes in the last dimension of the first output.
    """

    model: nn.Module | torch.export.ExportedProgram
    example_inputs: tuple[Tensor, ...]
    calibration: Iterable[Any]
    train: Callable[[], Iterable[Any]] | None = None
    labelled: bool = False
    student: nn.Module | None = None
    evaluate: Callable[[Predict], float] | None = None
    metric: str = "accuracy"
    outputs: Literal["logits", "values"] = "logits"
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    layouts: Mapping[str, str] = field(default_factory=dict)
    normalization: Mapping[str, Normalization] = field(default_factory=dict)
    labels: tuple[str, ...] = ()


def load_weights(model: Module, path: str | Path) -> Module:
    """Load a state dict into a model: safetensors, or a torch file that holds tensors alone.

    Returns the model in eval mode. Raises TaskError where the file is missing, is a pickle with code in it, or holds
    the weights of another model.
    """
    path = Path(path)
    if not path.is_file():
        raise TaskError(f"no weights file at {path}")
    state = _read_state(path)
    wanted = model.state_dict()
    missing = sorted(set(wanted) - set(state))
    unknown = sorted(set(state) - set(wanted))
    wrong = [name for name in wanted if name in state and wanted[name].shape != state[name].shape]
    if missing or unknown or wrong:
        example = (
            f"{wrong[0]!r} is {tuple(state[wrong[0]].shape)} instead of {tuple(wanted[wrong[0]].shape)}"
            if wrong
            else f"for example {(missing or unknown)[0]!r}"
        )
        raise TaskError(
            f"{path} holds the weights of another model: {len(missing)} tensors are missing, {len(unknown)} unknown, "
            f"{len(wrong)} of another shape; {example}"
        )
    model.load_state_dict(state)
    return model.eval()


def _read_state(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise TaskError(f"{path} is no readable safetensors file: {error}") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for one cause
        raise TaskError(
            f"{path} is not a file of tensors alone and was not unpickled ({type(error).__name__})",
            "save the state dict with safetensors.torch.save_file",
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TaskError(f"{path} holds no state dict", "save model.state_dict()")
    return state
