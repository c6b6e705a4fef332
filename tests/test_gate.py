"""The gate as CI runs it: the action's own steps in bash, exit codes, annotations, the files that are left."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import yaml
from bundles import contents
from markdown_it import MarkdownIt

from edgebuild import bundle, github, signing

ROOT = Path(__file__).parent.parent
ACTION = yaml.safe_load((ROOT / ".github" / "actions" / "check" / "action.yml").read_text(encoding="utf-8"))
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"]}
# As the command, but for a word at the end where a framework was loaded.
COMMAND = f"""#!{sys.executable}
import atexit, sys
sys.path.insert(0, {str(ROOT)!r})
atexit.register(lambda: print("LOADED TORCH" if "torch" in sys.modules else ""))
from edgebuild.cli import main
main()
"""


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory) -> Path:
    """A workspace with two bundles, the second one with a name that a careless script would run."""
    workspace = tmp_path_factory.mktemp("workspace")
    bundle.write(workspace / "old", made.files, contents(made.files))
    smaller = made.report.size - 4096
    bundle.write(workspace / "$(touch pwned); new", made.files, contents(made.files))
    bundle.write(workspace / "smaller", less := made.changed(size=smaller), contents(less))
    command = workspace / "bin" / "edgebuild"
    command.parent.mkdir()
    command.write_text(COMMAND)
    command.chmod(0o755)
    return workspace


def run(folder: Path, step: str, **inputs: str) -> subprocess.CompletedProcess[str]:
    """A step of the action, as the runner runs `shell: bash`, its expressions filled in."""
    given = {name: value.get("default", "") for name, value in ACTION["inputs"].items()} | inputs

    def filled(text: str) -> str:
        values = {
            **{f"inputs.{name}": value for name, value in given.items()},
            "steps.paths.outputs.report": str(folder),
        }
        return re.sub(r"\$\{\{ ([a-z.-]+) }}", lambda match: values[match[1]], text)

    environment = {
        **os.environ,
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "120",
        "GITHUB_ACTIONS": "true",
        "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
        **{name: filled(value) for name, value in STEPS[step]["env"].items()},
    }
    script = folder / "script.sh"
    script.write_text(STEPS[step]["run"])
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("name", [name for name, step in STEPS.items() if "run" in step])
def test_no_text_of_an_input_becomes_part_of_a_script(name):
    assert "${{" not in STEPS[name]["run"] and STEPS[name]["shell"] == "bash"


def test_every_input_is_described_and_used():
    text = json.dumps(ACTION["runs"])
    for name, declared in ACTION["inputs"].items():
        assert declared["description"] and f"inputs.{name}" in text, name


def test_the_action_checks_a_bundle_and_leaves_its_reports(folder):
    done = run(folder, "Check the budgets", bundle="$(touch pwned); new")
    assert done.returncode == 0, done.stderr
    assert not (folder / "pwned").exists() and "LOADED TORCH" not in done.stdout
    suite = ET.parse(folder / "junit.xml").getroot().find("testsuite")
    assert suite is not None and suite.get("failures") == "0" and suite.get("tests") == "8"
    assert {case.get("name") for case in suite.iter("testcase")} >= {"latency on host", "size", "accuracy drop"}
    shown = MarkdownIt("gfm-like", {"linkify": False}).render((folder / "check.md").read_text())
    assert "<h1>Check of small for bench: met</h1>" in shown and shown.count("<table>") == 4
    assert (folder / "check.md").read_text().strip() in (folder / "summary.md").read_text()
    found = json.loads((folder / "check.json").read_text())
    assert found["outcome"] == "met" and found["schema_version"] == 1
    assert "::error" not in done.stdout and "::warning" not in done.stdout


def test_what_is_printed_is_no_command_to_the_runner(folder):
    done = run(
        folder, "Compare with the baseline", bundle="smaller", baseline="old", **{"max-regression": "size=0 B\n"}
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    word = re.fullmatch(r"::stop-commands::([0-9a-f]{32})", lines[0])
    assert word and f"::{word[1]}::" in lines
    back = run(
        folder, "Compare with the baseline", bundle="old", baseline="smaller", **{"max-regression": "size=1 KiB"}
    )
    assert back.returncode == 1
    problems = [line for line in back.stdout.splitlines() if line.startswith("::error ")]
    assert len(problems) == 1 and problems[0].startswith("::error title=edgebuild%3A size::")
    assert json.loads((folder / "diff.json").read_text())["outcome"] == "broken"


def test_a_changed_byte_is_exit_2_and_an_annotation(folder, made):
    bundle.write(folder / "damaged", made.files, contents(made.files))
    path = folder / "damaged" / "small.pte"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = run(folder, "Check the budgets", bundle="damaged")
    assert done.returncode == 2 and "small.pte was changed" in done.stderr
    assert "::error title=edgebuild::damaged: small.pte was changed" in done.stdout


def test_the_action_wants_a_signature_by_one_of_its_keys(folder):
    signing.generate(folder / "key")
    done = run(folder, "Check the budgets", bundle="smaller", keys="\nkey.pub\n")
    assert done.returncode == 2 and "smaller is not signed" in done.stderr


def test_texts_of_a_bundle_stay_in_their_annotation():
    line = github.command("error", "a,b: c%", "first\n::warning::second\r")
    assert line == "::error title=a%2Cb%3A c%25::first%0A::warning::second%0D" and "\n" not in line


def test_nothing_is_a_command_outside_of_github(monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "")
    with github.plain():
        print("text")
    github.summarize("text")
    assert capsys.readouterr().out == "text\n"


def test_a_summary_has_a_limit(monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    github.summarize("x" * (github.SUMMARY_LIMIT + 1))
    assert "too long" in (tmp_path / "summary.md").read_text()
