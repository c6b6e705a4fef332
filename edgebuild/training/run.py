"""One training, from its first step or its last checkpoint to its end."""

import copy
import math
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edgebuild.clock import Progress, Standing
from edgebuild.divergence import divergence
from edgebuild.lift import outputs_of, stacked
from edgebuild.spec import Distillation
from edgebuild.training import checkpoint, optimizer, processes
from edgebuild.training.compiled import evaluating
from edgebuild.training.freezing import Cut, Settled, cut
from edgebuild.training.mixing import mixed
from edgebuild.training.objective import Hint, Watched, feature_loss, objective
from edgebuild.training.stream import Stream
from edgebuild.training.teacher import UNTAUGHT, Taught, Teacher

REPORTS = 10  # times that a training tells how it stands
PROBED_STEPS = 4  # to see how fast it is; the first, which warms up, does not count
CHECKPOINT = 30.0  # seconds between checkpoints
LATE = 1.1  # times the time given, beyond which the rest of the schedule is shortened
EMA_SPAN = 0.02  # of the steps, over which the weights are averaged
BF16_GAIN = 1.2  # times faster than fp32, to be worth its rounding
COMPILED_GAIN = 1.1  # times faster than as it is, to be worth compiling the teacher
SHORT = 0.02  # seconds of a step that is mostly overhead: which precision is faster would be told by chance


@dataclass(frozen=True)
class Closeness:
    """How close a student is to its teacher on the held-out samples: nats, and the share with its class (or None)."""

    divergence: float
    agreement: float | None


@dataclass(frozen=True)
class Training:
    """How a training went.

    `kept`: what was closest to the teacher on the held-out samples: the "last" weights, their "average", or those of
    the "start"; `before` and `after` say how close. `recalled`: share of the teacher's batches that were kept from
    before.
    """

    steps: int
    asked: int
    first_loss: float
    last_loss: float
    seconds: float
    how: str
    kept: str = "last"
    before: Closeness | None = None
    after: Closeness | None = None
    recalled: float = 0.0

    def __str__(self) -> str:
        cut = "" if self.steps == self.asked else f" of {self.asked}: the time limit ended it"
        parts = [f"{self.steps} steps{cut}", self.how, f"loss {self.first_loss:.4g} -> {self.last_loss:.4g}"]
        if self.before and self.after and self.before.agreement is not None and self.after.agreement is not None:
            parts.append(f"agreement with the teacher {self.before.agreement:.1%} -> {self.after.agreement:.1%}")
        if self.kept != "last":
            kept = {"average": "the averaged weights", "start": "the weights from before, which were closer"}[self.kept]
            parts.append(f"kept: {kept}")
        return ", ".join(parts)


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


Batch = tuple[tuple[Tensor, ...], Tensor | None, float]


class Diverged(Exception):
    """The loss is not finite any more."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"loss {loss} at step {step}")
        self.step, self.loss = step, loss


class Run:
    """A training; `finish()` carries it out. `rate` 0 takes the optimizer's usual one."""

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | None,
        batches: Callable[[], Iterable[Any]],
        lesson: Lesson,
        rate: float,
        progress: Progress,
    ):
        self.lesson, self.settings, self.teacher = lesson, lesson.settings, teacher
        self.progress = progress
        self.student = student
        self.device = processes.device()
        self.model = copy.deepcopy(student).train()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.channels_last = any(isinstance(module, nn.Conv2d) for module in self.model.modules())
        if self.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.model.to(self.device)
        if teacher is not None:
            teacher.model.to(self.device)
        processes.shared_norms(self.model)
        self.optimizer, self.name = optimizer.make(self.model, rate)
        self.rate = self.optimizer.param_groups[0]["lr"]
        self.stream = Stream(batches, lesson.labelled, lesson.seed)
        self.losses: list[float] = []
        self.step = 0
        self.mixes = False  # the last batch, by CutMix
        self.spent = 0.0  # seconds of the runs before a kill
        state = processes.agree(checkpoint.read(lesson.keep) if lesson.keep else None)
        if state is not None and state["rate"] != self.rate:
            state = None
        self.frozen: int | None = None  # layers, from when on they are
        if state:
            self._compute(state["bf16"], state["compiled"])
            self.steps = state["steps"]
        else:
            self._compute(False, False)
            self.steps = self._measured(batches)
        self.average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / max(2.0, EMA_SPAN * self.steps)), use_buffers=True
        )
        self.began = time.monotonic()
        torch.manual_seed(lesson.seed)
        if state:
            self._resume(state)
        self.trained = processes.prepared(self.model)  # computes what `model` does, and shares the gradients

    # ------------------------------------------------------------------------------------------------- the steps

    def finish(self) -> tuple[nn.Module, Training]:
        """Train to the end; the trained model and how it went. Raises Diverged."""
        before = self._close(copy.deepcopy(self.student).to(self.device))
        with closing(Watched(self.model, tuple(hint.student_layer for hint in self.lesson.hints))) as watched:
            self._steps(watched)
        kept, model, after = self._best(before)
        if self.teacher is not None:
            self.teacher.model.cpu()
        if self.lesson.keep:
            checkpoint.remove(self.lesson.keep)
        window = max(1, min(20, len(self.losses) // 4))
        first, last = (sum(part) / max(len(part), 1) for part in (self.losses[:window], self.losses[-window:]))
        seen = self.teacher.computed + self.teacher.recalled if self.teacher else 0
        training = Training(
            steps=self.step,
            asked=self.steps,
            first_loss=first,
            last_loss=last,
            seconds=self.spent + time.monotonic() - self.began,
            how=self._how(),
            kept=kept,
            before=before,
            after=after,
            recalled=self.teacher.recalled / seen if self.teacher and seen else 0.0,
        )
        return model, training

    def _how(self) -> str:
        how = f"{self.name} with a peak rate of {self.rate:g}{' in bf16' if self.bf16 else ''}"
        if self.compiled:
            how += ", the teacher compiled by oneDNN"
        if self.frozen:
            how += f", the first {self.frozen} layers frozen after {self.settings.freeze_after:.0%} of the steps"
        if self.mixes:
            how += f", {self.settings.cutmix:.0%} of each batch mixed by CutMix"
        return how + (f", {processes.count()} processes" if processes.count() > 1 else "")

    def _report(self, seconds: float) -> None:
        left = seconds / self.step * (self.steps - self.step)
        close = self._close(self.model)
        self.progress(Standing(self.step, self.steps, self.losses[-1], close.agreement if close else None, left))
        self._shorten(seconds, left)

    def _steps(self, watched: Watched) -> None:
        saved = time.monotonic()
        while self.step < self.steps:
            self._one(watched)
            seconds = self.spent + time.monotonic() - self.began
            if self.step % max(1, self.steps // REPORTS) == 0:
                self._report(seconds)
            if self.lesson.keep and processes.rank() == 0 and time.monotonic() - saved > CHECKPOINT:
                self._save(seconds)
                saved = time.monotonic()
            if self.settings.steps and processes.agree(seconds) > self.settings.time:
                break

    def _one(self, watched: Watched) -> None:
        batch = self._batch(self.stream, self.step)
        if self.frozen is None and self.step >= self.settings.freeze_after * self.steps:
            self._freeze(batch[0])
        taught = self.teacher(batch[0]) if self.teacher is not None else UNTAUGHT
        loss = self._loss(batch, taught, self.trained)
        if self.lesson.hints and self.teacher is not None:
            features = feature_loss(self.lesson.hints, watched.read, taught.features, self.teacher.model, batch[2])
            loss = loss + self.settings.hint_weight * features
        whole = float(processes.mean(loss.detach()))
        if not math.isfinite(whole):
            raise Diverged(self.step, whole)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * optimizer.share_of_rate(self.step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        self.losses.append(whole)

    def _freeze(self, inputs: tuple[Tensor, ...]) -> None:
        """From here on train the rest alone; the first layers stay at the average of their weights."""
        parts, averages = self._cut(self.model, inputs), self._cut(self.average.module, inputs)
        self.frozen = parts.layers if parts else 0
        if parts and averages:
            parts.first.load_state_dict(averages.first.state_dict())
            self.trained = self.model  # lets go of what was prepared before
            self.trained = processes.prepared(Settled(parts, self.bf16, self.compiled))

    def _cut(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> Cut | None:
        return cut(model, inputs, tuple(hint.student_layer for hint in self.lesson.hints))

    def _batch(self, stream: Stream, step: int) -> Batch:
        """This process's part of a step's batch where it is computed, and by what its loss counts in the mean of all.

        With what the teacher is asked beyond the task's samples; a step gives the same at each call.
        """
        plain, labels = next(stream)
        inputs = plain
        if self.teacher is not None and self.settings.cutmix and (self.lesson.logits or labels is None):
            inputs, labels = mixed(plain, labels, self.settings.cutmix, (self.lesson.seed << 32) + step)
        self.mixes = inputs is not plain
        inputs, labels, weight = processes.part(inputs, labels)
        inputs = tuple(x.to(self.device) for x in inputs)
        if self.channels_last:
            inputs = tuple(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in inputs)
        return inputs, labels.to(self.device) if labels is not None else None, weight

    def _loss(self, batch: Batch, taught: Taught, model: nn.Module) -> Tensor:
        inputs, labels, weight = batch
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            results = outputs_of(model(*inputs))
        if self.bf16:
            results = tuple(y.float() for y in results)
        return objective(results, taught.outputs, labels, self.settings, self.lesson.logits) * weight

    def _shorten(self, seconds: float, left: float) -> None:
        """Fit what is left of the schedule into the time that is left, where the machine got slower than it was."""
        late = not self.settings.steps and seconds + left > LATE * self.settings.time
        if processes.agree(late):
            fitting = (self.settings.time - seconds) / seconds * self.step
            self.steps = self.step + max(1, int(processes.agree(fitting)))

    # ------------------------------------------------------------------------------------------- what comes of it

    def _close(self, model: nn.Module) -> Closeness | None:
        """How close a model is to the teacher on the held-out samples; None without a teacher or samples."""
        if self.teacher is None or not self.lesson.held_out:
            return None
        (together,) = stacked(self.lesson.held_out, len(self.lesson.held_out))
        batch = tuple(x.to(self.device) for x in together)
        with evaluating(model), torch.no_grad():
            found = [y.cpu() for y in outputs_of(model(*batch))]
        wanted = [y.cpu() for y in self.teacher(batch).outputs]
        agreement = float((found[0].argmax(-1) == wanted[0].argmax(-1)).float().mean()) if self.lesson.logits else None
        return Closeness(divergence(wanted, found, self.lesson.logits), agreement)

    def _best(self, before: Closeness | None) -> tuple[str, nn.Module, Closeness | None]:
        """The weights to keep: their name, a model with them, how close it is to the teacher.

        The last ones or their average, by the divergence; those from before only if they are closer by the divergence
        and agree as often, as a student that learns from labels too may leave its teacher for good reasons.
        """
        name, model, close = "last", self.model, self._close(self.model)
        if before is not None and close is not None and self.step:
            average: nn.Module = self.average.module
            smoothed = self._close(average)
            if smoothed is not None and smoothed.divergence < close.divergence:
                name, model, close = "average", average, smoothed
            if before.divergence < close.divergence and (before.agreement or 0.0) >= (close.agreement or 0.0):
                name, model, close = "start", copy.deepcopy(self.student), before
        processes.own_norms(model)
        model = model.cpu().eval()
        if self.channels_last:
            model = model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return name, model, close

    # ------------------------------------------------------------------------------------- speed and checkpoints

    def _compute(self, bf16: bool, compiled: bool) -> None:
        """In bf16 or not; what is not trained by oneDNN's compiled kernels or not."""
        self.bf16, self.compiled = bf16, compiled
        if self.teacher is not None:
            self.teacher.answering.bf16, self.teacher.answering.compiled = bf16, compiled

    def _measured(self, batches: Callable[[], Iterable[Any]]) -> int:
        """Compute as this machine is fastest; how many steps fit into the time given."""
        settings = self.settings
        able = torch.cpu.get_capabilities()
        bf16 = compiled = False
        learning, teaching = self._seconds(batches)
        if learning > SHORT and (able.get("avx512_bf16") or able.get("amx_bf16")):
            self._compute(True, False)
            faster = self._seconds(batches)
            if bf16 := faster[0] * BF16_GAIN < learning:
                learning, teaching = faster
        if teaching > SHORT:
            self._compute(bf16, True)
            _, sooner = self._seconds(batches)
            if compiled := sooner * COMPILED_GAIN < teaching:
                teaching = sooner
        self._compute(bf16, compiled)
        if settings.steps:
            return settings.steps
        settled, _ = self._seconds(batches, settled=True)  # where nothing can be frozen, it is as long as the others
        learning = settings.freeze_after * learning + (1 - settings.freeze_after) * min(learning, settled)
        kept = self._kept(batches)
        steps = settings.time / learning
        if steps > kept:  # the teacher has to compute the batches beyond those that it kept
            steps = kept + max(0.0, settings.time - kept * learning) / (learning + teaching)
        return max(1, int(steps))

    def _kept(self, batches: Callable[[], Iterable[Any]]) -> int:
        """For how many batches the teacher need not compute: none, if it does for the first."""
        if self.teacher is None:
            return 0
        first, _, _ = self._batch(Stream(batches, self.lesson.labelled, self.lesson.seed), 0)
        return processes.agree(self.teacher.kept if self.teacher.remembers(first) else 0)

    def _seconds(self, batches: Callable[[], Iterable[Any]], settled: bool = False) -> tuple[float, float]:
        """Seconds of a step of a copy of the student, making the batch included, and of the teacher for it.

        `settled`: with its first layers frozen, where they can be.
        """
        scratch = copy.deepcopy(self.model)
        updates, _ = optimizer.make(scratch, self.rate)
        average = AveragedModel(scratch, use_buffers=True)
        stream = Stream(batches, self.lesson.labelled, self.lesson.seed)
        trained: nn.Module = scratch
        learning, teaching = [], []
        for step in range(PROBED_STEPS):
            began = time.monotonic()
            batch = self._batch(stream, step)
            made = time.monotonic()
            taught = self.teacher.computed_for(batch[0]) if self.teacher is not None else UNTAUGHT
            if settled and not step and (parts := self._cut(scratch, batch[0])):
                trained = Settled(parts, self.bf16, self.compiled)
            told = time.monotonic()
            updates.zero_grad(set_to_none=True)
            self._loss(batch, taught, trained).backward()
            updates.step()
            average.update_parameters(scratch)
            learning.append(time.monotonic() - told + made - began)
            teaching.append(told - made)
        return processes.agree(min(learning[1:])), processes.agree(min(teaching[1:]))

    def _save(self, seconds: float) -> None:
        state = {
            "step": self.step,
            "steps": self.steps,
            "rate": self.rate,
            "bf16": self.bf16,
            "compiled": self.compiled,
            "seconds": seconds,
            "losses": self.losses,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": torch.get_rng_state(),
        }
        checkpoint.write(self.lesson.keep, state)

    def _resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.spent, self.losses = state["step"], state["seconds"], state["losses"]
        self.stream.skip(self.step)
        torch.set_rng_state(state["generator"])
