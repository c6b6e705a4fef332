"""Tells how long each stage takes, and says so as it goes."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Tell = Callable[[str, float], None]


class Clock:
    """Seconds by stage, in the order in which the stages first ran; a stage that runs again adds up."""

    def __init__(self, tell: Tell = lambda message, seconds: None):
        self.stages: dict[str, float] = {}
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

    def training(self, step: int, steps: int, loss: float) -> None:
        """Tell a training's progress, five times in all."""
        if step % max(1, steps // 5) == 0:
            self.tell(f"  step {step} of {steps}, loss {loss:.4g}")

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began
