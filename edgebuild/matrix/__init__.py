"""Many tasks for many profiles, from one file: each cell is `edgebuild build` in a process of its own.

There is no state but what lies on the disk: the bundles, and for each cell the log and the report of its last build.
"""

from edgebuild.matrix.overview import as_json, html, junit, markdown, terminal
from edgebuild.matrix.run import Interrupted, run
from edgebuild.matrix.spec import Cell, Matrix, load

__all__ = ["Cell", "Interrupted", "Matrix", "as_json", "html", "junit", "load", "markdown", "run", "terminal"]
