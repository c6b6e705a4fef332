"""Holds an artifact against its budgets and against eager PyTorch, on the task's own inputs."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx

from edgebuild.devices import Arrays, Session
from edgebuild.errors import EdgebuildError, TaskError
from edgebuild.lift import outputs_of
from edgebuild.load import Loaded
from edgebuild.spec import Accuracy, Artifact, Budget, Measurement, Parity, Precision, Verdict
from edgebuild.task import Predict

# An int8 kernel rounds differently from its fp32 simulation, a little in every layer; a wrong one is below 0 dB.
LEAST_SQNR_DB: dict[Precision, float] = {"fp32": 40.0, "int8": 15.0}

Status = Literal["pass", "fail", "inconclusive"]

# --------------------------------------------------------------------------------------------------------- parity


def parity(
    found: Sequence[Arrays],
    expected: Sequence[Arrays],
    target: str,
    reference: str,
    least_db: float,
    logits: bool,
    first_divergence: str = "",
) -> Parity:
    """Compare outputs sample by sample; `logits` says whether a top-1 can be taken in the last dimension."""
    signal = noise = largest = 0.0
    same = exact = 0
    for got, want in zip(found, expected, strict=True):
        exact += all(g.shape == w.shape and g.tobytes() == w.tobytes() for g, w in zip(got, want, strict=True))
        for g, w in zip(got, want, strict=True):
            if g.shape != w.shape:
                raise TaskError(f"{target}: an output is {g.shape}, {reference} gives {w.shape}")
            difference = np.abs(g.astype(np.float64) - w.astype(np.float64))
            signal += float((w.astype(np.float64) ** 2).sum())
            noise += float((difference**2).sum())
            largest = max(largest, float(difference.max(initial=0.0)))
        same += bool((got[0].argmax(-1) == want[0].argmax(-1)).all()) if logits else 0
    finite = all(np.isfinite(g).all() for got in found for g in got)
    sqnr = (999.0 if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)) if finite else -999.0
    return Parity(
        target=target,
        reference=reference,
        samples=len(found),
        sqnr_db=round(sqnr, 2),
        agreement=same / len(found) if logits and found else None,
        bit_exact=exact == len(found),
        max_abs=largest if math.isfinite(largest) else -1.0,
        ok=finite and sqnr >= least_db,
        first_divergence=first_divergence,
    )


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
        return not parity([got], [to_arrays(want)], "", "", least_db, logits=False).ok

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
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in model.graph.nodes:
        if node.op == "output":
            break
        copied[node] = graph.node_copy(node, lambda n: copied[n])
        if node.name == last:
            graph.output(copied[node])
            break
    head = fx.GraphModule(model, graph)
    for placeholder in [node for node in model.graph.nodes if node.op == "placeholder" and node not in copied]:
        graph.placeholder(placeholder.name)
    head.graph.lint()
    head.recompile()
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


# ------------------------------------------------------------------------------------------------------- verdicts


def verdict(budget: Budget, target: str, predicted: float | None, found: Measurement | None, note: str = "") -> Verdict:
    """Pass or fail where the figure was measured; inconclusive where the bound lies inside an estimate's error band."""
    if found is None:
        return Verdict(
            budget.kind, target, budget.bound, predicted, None, None, None, "inconclusive", note or "not measured"
        )
    low, high = max(0.0, 1 - found.error), 1 + found.error
    band = (found.value * low, found.value * high)
    if budget.kind == "throughput":  # the band is that of the time behind it
        band = (found.value / high, found.value / low if low else math.inf)
    held = [budget.holds(edge) for edge in band]
    status: Status = "pass" if all(held) else "inconclusive" if any(held) else "fail"
    if status == "inconclusive":
        inside = f"the bound lies inside the error band (+-{found.error:.0%}) of a figure that was not measured"
        note = f"{inside} {note}".strip()
    return Verdict(
        budget.kind,
        target,
        budget.bound,
        predicted,
        found.value,
        found.method,
        budget.margin(found.value),
        status,
        note,
    )


def accuracy_verdict(budget: Budget, measured: Accuracy | None, reason: str) -> Verdict:
    """The accuracy budget, in the metric's own units; `reason` says why there is no metric."""
    if measured is None:
        return Verdict("accuracy_drop", "", budget.bound, None, None, None, None, "inconclusive", reason)
    bound = budget.bound * measured.original if budget.relative else budget.bound
    absolute = Budget("accuracy_drop", bound)
    note = f"{budget.bound:.3g} of the original's metric" if budget.relative else ""
    drop = round(measured.drop, 12)
    status: Status = "pass" if absolute.holds(drop) else "fail"
    return Verdict("accuracy_drop", "", bound, None, drop, "measured", absolute.margin(drop), status, note)
