"""The plugin in a scratch project, in a pytest of its own."""

import os
import subprocess
import sys
from pathlib import Path

from bundles import contents

from edgebuild import bundle

ROOT = Path(__file__).parent.parent
SUITE = """
import sys

def test_is_light():
    assert not {name for name in sys.modules if name.startswith("edgebuild.")} - {"edgebuild.pytest_plugin"}

def test_reads(edge_bundle):
    assert edge_bundle.report["task"] == "small"
    assert "small.pte" in edge_bundle.manifest.files

def test_budget(edge_bundle):
    edge_bundle.assert_budgets()
    assert edge_bundle.check().outcome == "met" and edge_bundle.check() is edge_bundle.check()

def test_tight(edge_bundle):
    edge_bundle.assert_budgets(profile="tight.toml")
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # -p, as pytest finds the entry point of an installed edgebuild alone, which need not be this one
    command = [sys.executable, "-m", "pytest", "-p", "edgebuild.pytest_plugin", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


def project(folder: Path, made) -> None:
    bundle.write(folder / "bundle", made.files, contents(made.files))
    profile = made.files["profile.toml"].decode().replace("targets/host.toml", "host")
    (folder / "tight.toml").write_text(profile.replace('size = "1 MiB"', 'size = "1 KiB"'))
    (folder / "test_edge.py").write_text(SUITE)
    (folder / "pytest.ini").write_text("[pytest]\nedge_bundle = bundle\n")


def test_a_teams_suite_holds_the_budgets(made, tmp_path):
    project(tmp_path, made)
    done = run(tmp_path)
    assert done.returncode == 1 and "1 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "bundle: size failed" in done.stdout and "bound ≤ 1 KiB (fail)" in done.stdout
    assert "Traceback" not in done.stdout


def test_without_a_bundle_the_tests_are_skipped_and_a_wrong_path_is_an_error(made, tmp_path):
    project(tmp_path, made)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    skipped = run(tmp_path, "-rs", "-k", "reads")
    assert (
        skipped.returncode == 0 and "1 skipped" in skipped.stdout and "no bundle: give --edge-bundle" in skipped.stdout
    )
    wrong = run(tmp_path, "-k", "reads", "--edge-bundle", "nowhere")
    assert wrong.returncode == 1 and "no bundle at" in wrong.stdout
    given = run(tmp_path, "-k", "reads", "--edge-bundle", "bundle")
    assert given.returncode == 0, given.stdout
