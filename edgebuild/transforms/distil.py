"""Response-based distillation: a student learns a teacher's softened outputs (Hinton et al. 2015, arXiv:1503.02531)."""

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgebuild.errors import TaskError, TransformError
from edgebuild.lift import outputs_of
from edgebuild.spec import Distillation

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Training:
    """How a training went: steps made of those asked for, the first and last loss, seconds."""

    steps: int
    asked: int
    first_loss: float
    last_loss: float
    seconds: float

    def __str__(self) -> str:
        cut = "" if self.steps == self.asked else f" of {self.asked}: the time limit ended it"
        return f"{self.steps} steps{cut}, loss {self.first_loss:.4g} -> {self.last_loss:.4g}"


def apply(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Callable[[], Iterable[Any]],
    settings: Distillation,
    labelled: bool,
    logits: bool,
    seed: int,
    progress: Progress = lambda step, steps, loss: None,
) -> tuple[nn.Module, Training]:
    """A trained copy of the student.

    `batches()` gives inputs, or (inputs, labels) where `labelled`, anew at each call. The loss is the KL divergence
    between the softened outputs times T^2, mixed with cross-entropy where there are labels; `teacher=None`
    trains on the labels alone. For outputs that are no logits it is the mean squared error. Raises TaskError where the
    data cannot be used, TransformError where training diverges.
    """
    if teacher is None and not labelled:
        raise TaskError("training without a teacher needs labels", "let the task's train() give (inputs, labels)")
    torch.manual_seed(seed)
    model = copy.deepcopy(student).train()
    parameters = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=settings.learning_rate, total_steps=max(settings.steps, 2), pct_start=0.1
    )
    if teacher is not None:
        teacher = teacher.eval()
    losses: list[float] = []
    began = time.monotonic()
    stream = _forever(batches)
    for step in range(settings.steps):
        inputs, labels = split(next(stream), labelled)
        results = outputs_of(model(*inputs))
        with torch.no_grad():
            taught = outputs_of(teacher(*inputs)) if teacher is not None else ()
        loss = objective(results, taught, labels, settings, logits)
        if not torch.isfinite(loss):
            raise TransformError(
                f"the training diverged at step {step}: loss {loss.item()}", "lower distillation.learning_rate"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        progress(step + 1, settings.steps, losses[-1])
        if time.monotonic() - began > settings.time:
            break
    window = max(1, min(20, len(losses) // 4))
    first, last = (sum(part) / max(len(part), 1) for part in (losses[:window], losses[-window:]))
    return model.eval(), Training(len(losses), settings.steps, first, last, time.monotonic() - began)


def objective(
    results: tuple[Tensor, ...], taught: tuple[Tensor, ...], labels: Tensor | None, settings: Distillation, logits: bool
) -> Tensor:
    """The training loss of a batch, a scalar."""
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
        hard.append(F.cross_entropy(results[0], labels) if logits else F.mse_loss(results[0], labels))
    if soft and hard:
        share = settings.teacher_weight
        return share * torch.stack(soft).sum() + (1 - share) * torch.stack(hard).sum()
    return torch.stack(soft or hard).sum()


def split(batch: Any, labelled: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """The inputs of a batch as a tuple, and its labels where there are any."""
    if labelled:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise TaskError("a training batch is not (inputs, labels)", "set labelled=False, or give pairs")
        inputs, labels = batch
    else:
        inputs, labels = batch, None
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), labels


def _forever(batches: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    for _ in itertools.count():
        empty = True
        for batch in batches():
            empty = False
            yield batch
        if empty:
            raise TaskError("the task's training batches are empty", "check what train() gives")
