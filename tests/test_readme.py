"""The README says what is so: its profile loads, its code parses, its commands and exit codes exist."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgebuild import catalog, errors

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_profile_loads(tmp_path: Path) -> None:
    (text,) = blocks("toml")
    path = tmp_path / "door-camera.toml"
    path.write_text(text, encoding="utf-8")
    profile = catalog.load_profile(str(path))
    assert profile.name == "door-camera"
    assert {budget.kind for budget in profile.budgets} >= {
        "size",
        "latency",
        "throughput",
        "peak_memory",
        "accuracy_drop",
    }


def test_the_task_parses_and_uses_fields_that_exist() -> None:
    from edgebuild.task import Task

    (text,) = blocks("python")
    (call,) = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "Task"]
    assert {keyword.arg for keyword in call.keywords} <= set(Task.__dataclass_fields__)


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("https://") or (ROOT / link).exists(), link


@pytest.mark.parametrize("words", sorted({m[1] for m in re.finditer(r"`edgebuild ((?:[a-z-]+ ?)+)", README)}))
def test_documented_commands_exist(words: str) -> None:
    command = [sys.executable, "-m", "edgebuild", *words.split(), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_exit_codes_are_those_of_the_errors() -> None:
    documented = {int(code) for code in re.findall(r"^\| (\d) \|", README, re.MULTILINE)}
    raised = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert documented == raised | {0}
