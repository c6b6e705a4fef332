"""A student as it learns, one batch at a time."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edgebuild.lift import outputs_of
from edgebuild.spec import Distillation
from edgebuild.training import batch_norm, optimizer, processes
from edgebuild.training.compiled import Means
from edgebuild.training.freezing import Settled, cut
from edgebuild.training.objective import Hint, Watched, feature_loss, objective
from edgebuild.training.teacher import Taught, Teacher

CLIP = 5.0  # the gradients' norm, at most


@dataclass(frozen=True)
class Lesson:
    """What a student is trained on, apart from the batches.

    `held_out`: samples of batch size 1, by which the weights to keep are chosen. `keep`: the name of the training's
    checkpoints, "" for none; `digest`: the teacher's, for keeping its outputs, "" for none.
    """

    settings: Distillation
    labelled: bool
    logits: bool
    seed: int
    hints: tuple[Hint, ...] = ()
    held_out: tuple[tuple[Tensor, ...], ...] = ()
    keep: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Batch:
    """This process's part of a batch; `weight`: what its mean loss counts in the mean over all rows."""

    inputs: tuple[Tensor, ...]
    labels: Tensor | None
    weight: float


class Learner:
    """A copy of a student in training: its weights, their moving average over `span` steps, its optimizer.

    `rate`: the peak; 0 takes the optimizer's usual one. `frozen`: how many layers are; None until any may be.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        lesson: Lesson,
        rate: float,
        means: Means,
        span: float = 1.0,
    ):
        self.teacher, self.lesson, self.means = teacher, lesson, means
        self.device = processes.device()
        self.model = copy.deepcopy(student).train()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.channels_last = any(isinstance(module, nn.Conv2d) for module in self.model.modules())
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.to(self.device)
        batch_norm.for_training(self.model)
        self.optimizer, self.name = optimizer.make(self.model, rate)
        self.rate: float = self.optimizer.param_groups[0]["lr"]
        decay = 1 - 1 / max(2.0, span)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        self.frozen: int | None = None
        self._hinted = tuple(hint.student_layer for hint in lesson.hints)
        self._watched = Watched(self.model, self._hinted)
        self._trained = processes.prepared(self.model)  # computes what `model` does, and shares the gradients

    def batch(self, inputs: tuple[Tensor, ...], labels: Tensor | None) -> Batch:
        """This process's part of a batch, where and as it is computed."""
        inputs, labels, weight = processes.part(inputs, labels)
        inputs = tuple(x.to(self.device) for x in inputs)
        if self.channels_last:
            inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
        return Batch(inputs, labels.to(self.device) if labels is not None else None, weight)

    def learn(self, batch: Batch, taught: Taught, share: float) -> float:
        """A step of the optimizer at a share of the peak rate; the loss of the whole batch before it."""
        loss = self._loss(batch, taught)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * share
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        return float(processes.mean(loss.detach()))

    def _loss(self, batch: Batch, taught: Taught) -> Tensor:
        settings = self.lesson.settings
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.means.bf16):
            results = outputs_of(self._trained(*batch.inputs))
        if self.means.bf16:
            results = tuple(y.float() for y in results)
        loss = objective(results, taught.outputs, batch.labels, settings, self.lesson.logits) * batch.weight
        if self.lesson.hints and self.teacher is not None:
            read = self._watched.read
            features = feature_loss(self.lesson.hints, read, taught.features, self.teacher.model, batch.weight)
            loss = loss + settings.hint_weight * features
        return loss

    def freeze(self, inputs: tuple[Tensor, ...]) -> None:
        """From here on train the rest alone; the first layers stay at the average of their weights."""
        parts = cut(self.model, inputs, self._hinted)
        self.frozen = parts.layers if parts else 0
        if parts:
            averages = self.average.module.state_dict()
            parts.first.load_state_dict({name: averages[name] for name in parts.first.state_dict()})
            self._trained = self.model  # lets go of what was prepared before
            self._trained = processes.prepared(Settled(parts, self.means))

    def finished(self, model: nn.Module) -> nn.Module:
        """One of its models, as the student was: on the CPU, in eval mode and PyTorch's usual memory order."""
        self._watched.close()
        batch_norm.as_before(model)
        model = model.cpu().eval()
        if self.channels_last:
            model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return model

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for `load`."""
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state. Layers that were frozen in it have to be frozen again."""
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
