"""Tells how long each stage takes, and says so as it goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgebuild.units import Seconds

Tell = Callable[[str, float], None]


@dataclass(frozen=True)
class Standing:
    """How a training stands. `agreement`: share of the held-out samples with the teacher's class, None without."""

    step: int
    steps: int
    loss: float
    agreement: float | None
    seconds_left: float


Progress = Callable[[Standing], None]


def silent(standing: Standing) -> None:
    """Tells nobody."""


class Clock:
    """Seconds by stage, in the order in which the stages first ran; a stage that runs again adds up.

    `reused` lists what was taken from an earlier build in place of being made.
    """

    def __init__(self, tell: Tell = lambda message, seconds: None):
        self.stages: dict[str, float] = {}
        self.reused: list[str] = []
        self.began = time.monotonic()
        self._tell = tell

    @contextmanager
    def stage(self, name: str, message: str) -> Iterator[None]:
        """Time a stage; `message` is told when it starts."""
        self.tell(message)
        start = time.monotonic()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.monotonic() - start

    def tell(self, message: str) -> None:
        self._tell(message, self.elapsed)

    def reuse(self, what: str) -> None:
        """Note, and tell, that something was taken from an earlier build."""
        self.reused.append(what)
        self.tell(f"  reused: {what}")

    def training(self, standing: Standing) -> None:
        """Tell how a training stands."""
        agreement = "" if standing.agreement is None else f", agreement with the teacher {standing.agreement:.1%}"
        left = f", {Seconds(round(standing.seconds_left))} left" if standing.step < standing.steps else ""
        self.tell(f"  step {standing.step} of {standing.steps}, loss {standing.loss:.4g}{agreement}{left}")

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began
