"""Builds the cells of a matrix, here or on a cluster."""

from edgebuild.clock import Tell
from edgebuild.errors import EdgebuildError
from edgebuild.matrix import cluster, local
from edgebuild.matrix.overview import WAITING, Overview
from edgebuild.matrix.spec import Matrix
from edgebuild.matrix.watch import Watch


class Interrupted(EdgebuildError):
    """A Ctrl-C; the builds that were under way are ended."""

    exit_code = 130


def run(matrix: Matrix, jobs: int | None, ray: str | None, tell: Tell) -> Overview:
    """Build the cells, several at once, and write the overview each time that one ends.

    A cell that fails does not stop the others. `jobs` are the builds at once, None for as many as there is room for;
    `ray` is the address of a cluster. Raises MissingEnvironment without Ray, UsageError where no cluster is at the
    address or the output cannot be written, Interrupted.
    """
    watch = Watch(matrix, ray, tell)
    try:
        if ray is None:
            local.run(matrix, jobs, watch)
        else:
            cluster.run(matrix, jobs, ray, watch)
        watch.finish()
    except KeyboardInterrupt:
        watch.finish()
        ended = sum(row.outcome != WAITING for row in watch.made.cells)
        raise Interrupted(
            f"interrupted: {ended} of {len(watch.made.cells)} cells are done, the builds under way were stopped",
            "the same command goes on from there",
        ) from None
    return watch.made
