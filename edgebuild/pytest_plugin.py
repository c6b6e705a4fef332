"""A pytest plugin: the fixture `edge_bundle`, for budgets in a team's own suite.

    def test_budget(edge_bundle):
        edge_bundle.assert_budgets()

The bundle is that of `--edge-bundle PATH`, or of `edge_bundle` in pytest's ini file, counted from that file's folder.
Nothing of edgebuild is imported before a test asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from edgebuild.bundle import Bundle
    from edgebuild.checking import Check
    from edgebuild.manifest import Manifest


class EdgeBundle:
    """A bundle that edgebuild built, a folder or an archive; verified when it is first read."""

    def __init__(self, path: Path):
        self.path = path
        self._checks: dict[tuple[str, tuple[str, ...]], Check] = {}

    @cached_property
    def _loaded(self) -> Bundle:
        from edgebuild import bundle

        return bundle.load(self.path)

    @property
    def files(self) -> dict[str, bytes]:
        """Its files by name. Raises SpecError where it is damaged."""
        return self._loaded.files

    @property
    def manifest(self) -> Manifest:
        """What `manifest.json` says. Raises SpecError where the bundle is damaged."""
        return self._loaded.manifest

    @cached_property
    def report(self) -> dict[str, Any]:
        """The build's report, as in `report.json`."""
        from edgebuild import report

        return report.from_json(self.files["report.json"])

    def check(self, profile: str = "", devices: Sequence[str] = ()) -> Check:
        """Measure the artifact here and now, as `edgebuild check` does; the same arguments measure once.

        `profile`: a name or a path, the bundle's own without; `devices`: targets to measure on in place of its targets.
        """
        key = profile, tuple(devices)
        if key not in self._checks:
            from edgebuild import checking, settings

            chosen = settings.read(self.files, profile, devices)
            self._checks[key] = checking.check(self.files, chosen, lambda message, seconds: None, not devices)
        return self._checks[key]

    def assert_budgets(self, profile: str = "", devices: Sequence[str] = (), inconclusive: str = "fail") -> None:
        """Fail the test where a budget is broken or outputs are wrong, saying which, by how much, and on which target.

        A budget that cannot be decided fails as well, unless `inconclusive` is "warn".
        """
        __tracebackhide__ = True
        import warnings

        import msgspec

        from edgebuild import report
        from edgebuild.report import gate

        if inconclusive not in ("fail", "warn"):
            raise ValueError(f"inconclusive={inconclusive!r}: use 'fail' or 'warn'")
        made = self.check(profile, devices)
        problems = gate.check_problems(msgspec.json.decode(report.to_json(made)))
        open_ = [problem for problem in problems if problem[0] == "inconclusive" and inconclusive == "warn"]
        for _, what, why in open_:
            warnings.warn(f"{what}: {why}", stacklevel=2)
        if failed := [problem for problem in problems if problem not in open_]:
            lines = [f"  {what}: {why} ({status})" for status, what, why in failed]
            pytest.fail("\n".join([f"{self.path}: {made.summary}", *lines]), pytrace=False)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("edgebuild")
    group.addoption("--edge-bundle", metavar="PATH", help="The bundle of the fixture edge_bundle.")
    parser.addini("edge_bundle", "The bundle of the fixture edge_bundle, counted from this file's folder.")


@pytest.fixture(scope="session")
def edge_bundle(request: pytest.FixtureRequest) -> EdgeBundle:
    """The bundle of --edge-bundle, or of edge_bundle in the ini file; without either its tests are skipped."""
    config = request.config
    given, written = config.getoption("--edge-bundle"), config.getini("edge_bundle")
    if not given and not written:
        pytest.skip("no bundle: give --edge-bundle PATH, or set edge_bundle in the ini file")
    beside = config.inipath.parent if config.inipath else config.rootpath
    path = config.invocation_params.dir / given if given else beside / written
    if not path.exists():
        pytest.fail(f"no bundle at {path}: build it first, or correct --edge-bundle", pytrace=False)
    return EdgeBundle(path)
