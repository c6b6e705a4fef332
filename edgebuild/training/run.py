"""One training, from its first step or its last checkpoint to its end."""

import copy
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from edgebuild.clock import Progress, Standing
from edgebuild.divergence import divergence
from edgebuild.lift import outputs_of, stacked
from edgebuild.training import checkpoint, optimizer, processes
from edgebuild.training.compiled import Means, evaluating
from edgebuild.training.learner import Learner, Lesson
from edgebuild.training.mixing import mixed
from edgebuild.training.stream import Stream
from edgebuild.training.teacher import UNTAUGHT, Teacher

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
        self.student, self.teacher, self.batches, self.lesson, self.rate = student, teacher, batches, lesson, rate
        self.settings, self.progress = lesson.settings, progress
        self.losses: list[float] = []
        self.step = 0
        self.mixes = False  # the last batch, by CutMix
        self.spent = 0.0  # seconds of the runs before a kill
        if teacher is not None:
            teacher.model.to(processes.device())
        state = processes.agree(checkpoint.read(lesson.keep) if lesson.keep else None)
        if state is not None and state["rate"] != rate:
            state = None
        if state:
            self.means, self.steps, self.settles = Means(**state["means"]), state["steps"], state["settles"]
        else:
            self.means, self.steps, self.settles = self._measured()
        self._compute(self.means)
        self.learner = Learner(student, teacher, lesson, rate, self.means, EMA_SPAN * self.steps)
        self.stream = self._stream()
        self.began = time.monotonic()
        torch.manual_seed(lesson.seed)
        if state:
            self._resume(state)
        self.reported = self.spent, self.step

    # ------------------------------------------------------------------------------------------------- the steps

    def finish(self) -> tuple[nn.Module, Training]:
        """Train to the end; the trained model and how it went. Raises Diverged."""
        before = self._close(copy.deepcopy(self.student).to(self.learner.device))
        self._steps()
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
        learner, settings = self.learner, self.settings
        parts = [f"{learner.name} with a peak rate of {learner.rate:g}{' in bf16' if self.means.bf16 else ''}"]
        if self.means.compiled:
            parts.append("the teacher compiled by oneDNN")
        if learner.frozen:
            parts.append(f"the first {learner.frozen} layers frozen after {settings.freeze_after:.0%} of the steps")
        if self.mixes:
            parts.append(f"{settings.cutmix:.0%} of each batch mixed by CutMix")
        if processes.count() > 1:
            parts.append(f"{processes.count()} processes")
        return ", ".join(parts)

    def _steps(self) -> None:
        saved = time.monotonic()
        while self.step < self.steps:
            self._one()
            seconds = self.spent + time.monotonic() - self.began
            if self.step % max(1, self.steps // REPORTS) == 0:
                self._report(seconds)
            if self.lesson.keep and processes.rank() == 0 and time.monotonic() - saved > CHECKPOINT:
                self._save(seconds)
                saved = time.monotonic()
            if self.settings.steps and processes.agree(seconds) > self.settings.time:
                break

    def _one(self) -> None:
        batch = self.learner.batch(*self._drawn(self.stream, self.step))
        if self.learner.frozen is None and self.step >= self.settings.freeze_after * self.steps:
            self.learner.freeze(batch.inputs)
        taught = self.teacher(batch.inputs) if self.teacher is not None else UNTAUGHT
        loss = self.learner.learn(batch, taught, optimizer.share_of_rate(self.step, self.steps))
        if not math.isfinite(loss):
            raise Diverged(self.step, loss)
        self.step += 1
        self.losses.append(loss)

    def _stream(self) -> Stream:
        return Stream(self.batches, self.lesson.labelled, self.lesson.seed)

    def _drawn(self, stream: Stream, step: int) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """A step's inputs and labels, with what the teacher is asked beyond the task's; the same at each call."""
        plain, labels = next(stream)
        inputs = plain
        if self.teacher is not None and self.settings.cutmix and (self.lesson.logits or labels is None):
            inputs, labels = mixed(plain, labels, self.settings.cutmix, (self.lesson.seed << 32) + step)
        self.mixes = inputs is not plain
        return inputs, labels

    def _report(self, seconds: float) -> None:
        """Tell how it stands, and fit what is left into the time that is left where the machine got slower."""
        since, at = self.reported
        self.reported = seconds, self.step
        rest = self.steps - max(self.step, self.settings.freeze_after * self.steps)
        whole = self.steps - self.step - rest
        pace = (seconds - since) / (self.step - at)
        left = pace * (whole + rest * (self.settles if self.learner.frozen is None else 1))
        close = self._close(self.learner.model)
        self.progress(Standing(self.step, self.steps, self.losses[-1], close.agreement if close else None, left))
        late = not self.settings.steps and seconds + left > LATE * self.settings.time
        if self.step < self.steps and processes.agree(late):
            fitting = (self.steps - self.step) * (self.settings.time - seconds) / left
            self.steps = self.step + max(1, int(processes.agree(fitting)))

    # ------------------------------------------------------------------------------------------- what comes of it

    def _close(self, model: nn.Module) -> Closeness | None:
        """How close a model is to the teacher on the held-out samples; None without a teacher or samples."""
        if self.teacher is None or not self.lesson.held_out:
            return None
        (together,) = stacked(self.lesson.held_out, len(self.lesson.held_out))
        batch = tuple(x.to(self.learner.device) for x in together)
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
        name, model, close = "last", self.learner.model, self._close(self.learner.model)
        if before is not None and close is not None and self.step:
            average: nn.Module = self.learner.average.module
            smoothed = self._close(average)
            if smoothed is not None and smoothed.divergence < close.divergence:
                name, model, close = "average", average, smoothed
            if before.divergence < close.divergence and (before.agreement or 0.0) >= (close.agreement or 0.0):
                name, model, close = "start", copy.deepcopy(self.student), before
        return name, self.learner.finished(model), close

    # ------------------------------------------------------------------------------------- speed and checkpoints

    def _measured(self) -> tuple[Means, int, float]:
        """How this machine computes fastest, how many steps fit into the time given, and how long a step takes.

        The last by a step's time before the first layers are frozen, once they are.
        """
        settings, means = self.settings, Means()
        able = torch.cpu.get_capabilities()
        learning, teaching = self._probed(means)
        if learning > SHORT and (able.get("avx512_bf16") or able.get("amx_bf16")):
            faster = self._probed(Means(bf16=True))
            if faster[0] * BF16_GAIN < learning:
                means, (learning, teaching) = Means(bf16=True), faster
        if teaching > SHORT:
            compiled = replace(means, compiled=True)
            _, sooner = self._probed(compiled)
            if sooner * COMPILED_GAIN < teaching:
                means, teaching = compiled, sooner
        if settings.steps:
            return means, settings.steps, 1.0
        settled = min(learning, self._probed(means, frozen=True)[0])
        settles = (settled + teaching) / (learning + teaching)
        learning = settings.freeze_after * learning + (1 - settings.freeze_after) * settled
        kept = self._kept()
        steps = settings.time / learning
        if steps > kept:  # the teacher has to compute the batches beyond those that it kept
            steps = kept + max(0.0, settings.time - kept * learning) / (learning + teaching)
        return means, max(1, int(steps)), settles

    def _kept(self) -> int:
        """For how many batches the teacher need not compute: none, if it does for the first."""
        if self.teacher is None:
            return 0
        first, _, _ = processes.part(*self._drawn(self._stream(), 0))
        return processes.agree(self.teacher.kept if self.teacher.remembers(first) else 0)

    def _probed(self, means: Means, frozen: bool = False) -> tuple[float, float]:
        """Seconds of a step of a copy of the student, making the batch included, and of the teacher for it.

        `frozen`: with its first layers frozen, where they can be.
        """
        self._compute(means)
        learner = Learner(self.student, self.teacher, self.lesson, self.rate, means)
        stream = self._stream()
        learning, teaching = [], []
        for step in range(PROBED_STEPS):
            began = time.monotonic()
            batch = learner.batch(*self._drawn(stream, step))
            if frozen and not step:
                learner.freeze(batch.inputs)
            made = time.monotonic()
            taught = self.teacher.computed_for(batch.inputs) if self.teacher is not None else UNTAUGHT
            told = time.monotonic()
            learner.learn(batch, taught, 0.0)
            learning.append(time.monotonic() - told + made - began)
            teaching.append(told - made)
        return processes.agree(median(learning[1:])), processes.agree(median(teaching[1:]))

    def _compute(self, means: Means) -> None:
        if self.teacher is not None:
            self.teacher.answering.means = means

    def _save(self, seconds: float) -> None:
        state = {
            "step": self.step,
            "steps": self.steps,
            "rate": self.rate,
            "means": asdict(self.means),
            "settles": self.settles,
            "seconds": seconds,
            "losses": self.losses,
            "generator": torch.get_rng_state(),
        }
        checkpoint.write(self.lesson.keep, state | self.learner.state())

    def _resume(self, state: dict[str, Any]) -> None:
        self.learner.load(state)
        self.step, self.spent, self.losses = state["step"], state["seconds"], state["losses"]
        self.stream.skip(self.step)
        torch.set_rng_state(state["generator"])
