"""Says what happens to the cells, and writes the overview each time that one ends."""

import time

from edgebuild.clock import Tell
from edgebuild.matrix import overview
from edgebuild.matrix.cell import Ran
from edgebuild.matrix.overview import Overview
from edgebuild.matrix.spec import Cell, Matrix
from edgebuild.report.figures import plural


class Watch:
    """A run as it goes; `made` is its overview so far."""

    def __init__(self, matrix: Matrix, ray: str | None, tell: Tell):
        self.matrix = matrix
        self.made: Overview = overview.begin(matrix, ray, 0, 0)
        self._tell = tell
        self._began = time.monotonic()

    def say(self, message: str) -> None:
        self._tell(message, time.monotonic() - self._began)

    def start(self, jobs: int, threads: int, where: str) -> None:
        """So many cells at once, with so many threads each. Raises UsageError where the output cannot be written."""
        self.made = overview.begin(self.matrix, self.made.ray, jobs, threads)
        overview.write(self.matrix.output, self.made, with_junit=True)  # all of them not run: no old verdict stays
        count = plural(len(self.matrix.cells), "cell")
        self.say(f"{count} on {where}, {jobs} at once with {plural(threads, 'thread')} each, in {self.matrix.output}")

    def done(self, cell: Cell, ran: Ran, attempts: int = 1) -> None:
        """A cell has ended."""
        elapsed = time.monotonic() - self._began
        self.made = overview.add(self.made, self.matrix.output, cell, ran, attempts, elapsed)
        overview.write(self.matrix.output, self.made, with_junit=False)
        self.say(overview.line(self.made, cell))

    def finish(self) -> None:
        """Nothing more will come."""
        overview.write(self.matrix.output, self.made, with_junit=True)
