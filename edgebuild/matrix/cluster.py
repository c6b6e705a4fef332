"""Runs the cells on a Ray cluster. Its nodes see the same files at the same paths: nothing is shipped."""

import asyncio
import logging
import socket
from collections import deque
from pathlib import Path
from typing import Any

from edgebuild import __version__, cache
from edgebuild.errors import EdgebuildError, MissingEnvironment, UsageError
from edgebuild.matrix import cell as cells
from edgebuild.matrix.cell import Ran
from edgebuild.matrix.spec import Cell, Matrix
from edgebuild.matrix.watch import Watch

CORES = 2  # of a node for each cell, or as many as it has
ATTEMPTS = 2  # for a cell whose node is lost


def run(matrix: Matrix, jobs: int | None, address: str, watch: Watch) -> None:
    """Build the cells as tasks of a cluster, `jobs` at once, or as many as it has room for.

    One whose node is lost is built once more. Raises MissingEnvironment without Ray, UsageError without a cluster.
    """
    try:
        import ray
        from ray import exceptions
    except ImportError:
        raise MissingEnvironment("--ray needs Ray, which is not installed", "pip install 'edgebuild[ray]'") from None
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        why = " ".join(str(error).split())[:300] or type(error).__name__
        raise UsageError(f"no Ray cluster at {address!r}: {why}", "start one with `ray start --head`") from None
    try:
        nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
        threads = min(CORES, max(nodes))
        if not threads:
            raise UsageError(f"the Ray cluster at {address!r} has no node with a CPU")
        jobs = min(jobs or sum(cores // threads for cores in nodes), len(matrix.cells))
        watch.start(jobs, threads, f"the {len(nodes)} nodes of the Ray cluster at {address}")
        build = ray.remote(num_cpus=threads, max_retries=0)(_on_node)  # Ray's own retries are silent
        waiting = deque((cell, 1) for cell in matrix.in_turn())
        under_way: dict[Any, tuple[Cell, int]] = {}
        while waiting or under_way:
            while waiting and len(under_way) < jobs:
                cell, attempt = waiting.popleft()
                watch.say(f"{cell}: sent to the cluster")
                task = build.remote(cell, matrix.output, threads, str(cache.root().resolve()), __version__)
                under_way[task] = cell, attempt
            (task,), _ = ray.wait(list(under_way), num_returns=1)
            cell, attempt = under_way.pop(task)
            try:
                watch.done(cell, ray.get(task), attempt)
            except exceptions.RayTaskError as error:
                watch.done(cell, cells.failed(str(error.cause)), attempt)
            except exceptions.RayError as error:
                lost = f"its node was lost: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                if attempt < ATTEMPTS:
                    watch.say(f"{cell}: {lost}; once more")
                    waiting.appendleft((cell, attempt + 1))
                else:
                    watch.done(cell, cells.failed(lost), attempt)
    finally:
        ray.shutdown()  # ends the tasks that are under way, and they their builds


def _on_node(cell: Cell, output: Path, threads: int, store: str, version: str) -> Ran:
    """Build a cell in a worker of Ray's. Raises EdgebuildError where this node is not like the others."""
    if version != __version__:
        raise EdgebuildError(f"the node has edgebuild {__version__}, and {version} started the matrix")
    task = Path(cell.arguments[0])
    if task.is_absolute() and not task.exists():
        raise EdgebuildError(f"the node sees no {task}", "tasks and output lie on a file system that all nodes share")
    return asyncio.run(cells.run(cell, output, threads, store))
