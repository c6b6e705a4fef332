"""What an artifact and eager PyTorch give for the task's own inputs: outputs, score, the first layer that differs."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from edgebuild import judge
from edgebuild.devices import Arrays, Session
from edgebuild.errors import EdgebuildError, TaskError
from edgebuild.lift import outputs_of, up_to
from edgebuild.load import Loaded
from edgebuild.spec import Accuracy, Artifact
from edgebuild.task import Predict

# -------------------------------------------------------------------------------------------------------- outputs


def run(session: Session, samples: Sequence[tuple[Tensor, ...]]) -> list[Arrays]:
    """The artifact's outputs for each sample."""
    return session.run_many([to_arrays(sample) for sample in samples])


def eager(model: Callable[..., Any], samples: Sequence[tuple[Tensor, ...]]) -> list[Arrays]:
    """PyTorch's outputs for each sample."""
    with torch.no_grad():
        return [to_arrays(outputs_of(model(*sample))) for sample in samples]


def to_arrays(tensors: Sequence[Tensor]) -> Arrays:
    return tuple(tensor.detach().contiguous().numpy() for tensor in tensors)


def first_divergence(
    model: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    sample: tuple[Tensor, ...],
    lower: Callable[[Any, tuple[Tensor, ...]], Artifact],
    outputs: Callable[[Artifact, tuple[Tensor, ...]], Arrays],
    least_db: float,
) -> str:
    """The first layer after which the lowered model and eager disagree, found by lowering ever shorter heads of it."""
    nodes = [node.name for node in model.graph.nodes if node.op in ("call_module", "call_function")]

    def diverges(index: int) -> bool:
        head = _head(model, nodes[index])
        with torch.no_grad():
            want = outputs_of(head(*sample))
        if not want or not want[0].is_floating_point():
            return False
        got = outputs(lower(head, inputs), sample)
        return not judge.parity([got], [to_arrays(want)], "", "", least_db, logits=False).ok

    low, high = 0, len(nodes) - 1
    try:
        while low < high:
            middle = (low + high) // 2
            if diverges(middle):
                high = middle
            else:
                low = middle + 1
    except (EdgebuildError, RuntimeError) as error:
        return f"not found: {error}"
    node = next(node for node in model.graph.nodes if node.name == nodes[low])
    return str(node.target) if node.op == "call_module" else node.name


def _head(model: fx.GraphModule, last: str) -> fx.GraphModule:
    """The model up to and including a node, whose value becomes the output."""
    head = up_to(model, next(node for node in model.graph.nodes if node.name == last))
    for module in head.modules():
        module.training = False
    return head


# ------------------------------------------------------------------------------------------------------- accuracy


def score(loaded: Loaded, predict: Predict) -> tuple[float, int]:
    """The task's metric of any callable, and the samples it was taken over. Raises TaskError where evaluate fails."""
    assert loaded.task.evaluate is not None
    count = 0

    def counting(*inputs: Tensor) -> Any:
        nonlocal count
        count += len(inputs[0])
        return predict(*inputs)

    try:
        with torch.no_grad():
            value = float(loaded.task.evaluate(counting))
    except EdgebuildError:
        raise
    except Exception as error:  # the user's function
        raise TaskError(f"task {loaded.name!r}: evaluate failed: {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise TaskError(f"task {loaded.name!r}: evaluate returned {value}")
    return value, count


def predictor(session: Session) -> Predict:
    """A callable for `evaluate` that runs each sample of a batch through the artifact."""

    def predict(*inputs: Tensor) -> Any:
        samples = [tuple(x[i : i + 1] for x in inputs) for i in range(len(inputs[0]))]
        rows = run(session, samples)
        outputs = tuple(torch.from_numpy(np.concatenate(column)) for column in zip(*rows, strict=True))
        return outputs[0] if len(outputs) == 1 else outputs

    return predict


def accuracy(metric: str, original: tuple[float, int], artifact: tuple[float, int], detail: str = "") -> Accuracy:
    """Both scores side by side; a share of samples gets Wilson's 95% interval (Wilson 1927)."""
    share = metric == "accuracy" and 0 <= original[0] <= 1 and 0 <= artifact[0] <= 1
    return Accuracy(
        metric=metric,
        original=original[0],
        artifact=artifact[0],
        samples=artifact[1],
        original_interval=wilson(*original) if share else None,
        artifact_interval=wilson(*artifact) if share else None,
        drop=original[0] - artifact[0],
        detail=detail if share else f"{detail} no interval: {metric!r} is not a share of samples".strip(),
    )


def wilson(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a share of n samples."""
    if n == 0:
        return 0.0, 1.0
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)
