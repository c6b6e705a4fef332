"""Distillation: a student learns a teacher's softened outputs, its features where they pair up, and the labels."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from edgebuild.clock import Progress, silent
from edgebuild.errors import TaskError, TransformError
from edgebuild.training import allocator, checkpoint, processes
from edgebuild.training.learner import Lesson
from edgebuild.training.run import Diverged, Run, Training
from edgebuild.training.teacher import Teacher
from edgebuild.transforms import norms

SLOWER, MOST_RESTARTS = 0.25, 2  # the learning rate, after a training that diverged


def apply(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Callable[[], Iterable[Any]],
    lesson: Lesson,
    progress: Progress = silent,
) -> tuple[nn.Module, Training]:
    """A trained copy of the student.

    `batches()` gives inputs, or (inputs, labels) where the lesson is labelled, anew at each call. `teacher=None` trains
    on the labels alone. Raises TaskError where the data cannot be used, TransformError where training diverges.
    """
    if teacher is None and not lesson.labelled:
        raise TaskError("training without a teacher needs labels", "let the task's train() give (inputs, labels)")
    processes.tell((student, teacher, lesson))
    return _train(student, teacher, batches, lesson, progress)


def follow(batches: Callable[[], Iterable[Any]]) -> None:
    """In every process but the first: take part in its trainings until it lets go."""
    while (work := processes.wait()) is not None:
        student, teacher, lesson = work
        _train(student, teacher, batches, lesson, silent)


def _train(
    student: nn.Module,
    teacher: nn.Module | None,
    batches: Callable[[], Iterable[Any]],
    lesson: Lesson,
    progress: Progress,
) -> tuple[nn.Module, Training]:
    layers = tuple(hint.layer for hint in lesson.hints)
    taught = Teacher(norms.folded(teacher), lesson.digest, layers) if teacher is not None else None
    rate = lesson.settings.learning_rate
    for restart in range(MOST_RESTARTS + 1):
        try:
            with allocator.kept_memory():
                run = Run(student, taught, batches, lesson, rate, progress)
                return run.finish()
        except Diverged as error:
            if lesson.keep:
                checkpoint.remove(lesson.keep)
            if restart == MOST_RESTARTS or lesson.settings.learning_rate:
                raise TransformError(
                    f"the training diverged at step {error.step}: loss {error.loss}", "lower distillation.learning_rate"
                ) from None
            rate = run.learner.rate * SLOWER
    raise AssertionError("the last restart returns or raises")
