"""What a student is trained for: the teacher's softened outputs, its labels, and the teacher's features.

Response: Hinton et al. 2015, arXiv:1503.02531. Features: Romero et al. 2015, arXiv:1412.6550 (FitNets).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgebuild.spec import Distillation
from edgebuild.training import processes

UNLABELLED = -100  # the label of a row that has none, as in PyTorch's cross-entropy


def objective(
    results: tuple[Tensor, ...], taught: tuple[Tensor, ...], labels: Tensor | None, settings: Distillation, logits: bool
) -> Tensor:
    """The training loss of a batch, a scalar.

    The KL divergence between the softened outputs times T^2, mixed with cross-entropy where there are labels, rows
    without one counting as 0; the mean squared error for outputs that are no logits.
    """
    soft, hard = [], []
    for result, target in zip(results, taught, strict=False):
        if logits:
            t = settings.temperature
            rows, wanted = (result / t).flatten(0, -2), (target / t).flatten(0, -2)
            soft.append(
                F.kl_div(rows.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True) * t * t
            )
        else:
            soft.append(F.mse_loss(result, target))
    if labels is not None:
        hard.append(_cross_entropy(results[0], labels) if logits else F.mse_loss(results[0], labels))
    if soft and hard:
        share = settings.teacher_weight
        return share * torch.stack(soft).sum() + (1 - share) * torch.stack(hard).sum()
    return torch.stack(soft or hard).sum()


def _cross_entropy(result: Tensor, labels: Tensor) -> Tensor:
    """The mean over all rows, so that the mean over several processes' rows is the same wherever the labels are."""
    rows = result.numel() / result.shape[1]
    return F.cross_entropy(result, labels, ignore_index=UNLABELLED, reduction="sum") / rows


@dataclass(frozen=True)
class Hint:
    """A feature that the student shall share with its teacher: what `layer` reads there and `student_layer` here.

    `channels`: the indices of the teacher's channels that the student kept, in its order.
    """

    layer: str
    student_layer: str
    channels: Tensor


class Watched:
    """Keeps what the named layers read at each forward pass; `close()` ends it."""

    def __init__(self, model: nn.Module, layers: tuple[str, ...]):
        self.read: dict[str, Tensor] = {}
        self._handles = [model.get_submodule(name).register_forward_pre_hook(self._keep(name)) for name in layers]

    def _keep(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.read[name] = inputs[0]

        return hook

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def feature_loss(
    hints: tuple[Hint, ...],
    student: Mapping[str, Tensor],
    taught: Mapping[str, Tensor],
    teacher: nn.Module,
    weight: float = 1.0,
) -> Tensor:
    """Mean over the hints of the squared error by the variance of what the teacher reads: 1 for a constant guess.

    Of a part of a batch, it is by the variance of the whole; `weight`: what the part counts in the mean of all parts.
    """
    losses = []
    for hint in hints:
        axis = 1 if isinstance(teacher.get_submodule(hint.layer), nn.Conv2d) else -1
        wanted = taught[hint.layer].index_select(axis, hint.channels.to(taught[hint.layer].device))
        error = (student[hint.student_layer].to(wanted.dtype) - wanted).square().mean()
        mean, square = (float(processes.mean(x.mean() * weight)) for x in (wanted, wanted.square()))
        losses.append(error / max(square - mean**2, 1e-8))
    return torch.stack(losses).mean() * weight
