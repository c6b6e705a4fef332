"""Runs the cells on this machine, several at once."""

import asyncio
import os

import psutil

from edgebuild import cache
from edgebuild.matrix import cell as cells
from edgebuild.matrix.spec import Cell, Matrix
from edgebuild.matrix.watch import Watch

CORES = 2  # for each job: one of them is free for a measurement, whatever the other jobs do
MEMORY = 3 << 30  # bytes for each job: torch, the model and its training


def run(matrix: Matrix, jobs: int | None, watch: Watch) -> None:
    """Build the cells, `jobs` at once, or as many as the machine has room for. A Ctrl-C ends those under way."""
    asyncio.run(_run(matrix, jobs, watch))


async def _run(matrix: Matrix, jobs: int | None, watch: Watch) -> None:
    cores = len(os.sched_getaffinity(0))
    room = max(1, min(cores // CORES, psutil.virtual_memory().available // MEMORY))
    jobs = min(jobs or room, len(matrix.cells))
    asked = os.environ.get("OMP_NUM_THREADS", "")
    threads = min(int(asked) if asked.isdigit() else cores, max(1, cores // jobs))  # more threads than cores would spin
    watch.start(jobs, threads, f"{cores} cores")
    slots = asyncio.Semaphore(jobs)

    async def build(cell: Cell) -> None:
        async with slots:
            watch.say(f"{cell}: started")
            try:
                ran = await cells.run(cell, matrix.output, threads, str(cache.root().resolve()))
            except OSError as error:  # a full disk, no more processes
                ran = cells.failed(str(error))
            watch.done(cell, ran)

    await asyncio.gather(*map(build, matrix.in_turn()))
