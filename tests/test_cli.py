"""The command line as a user meets it: exit codes, what is printed and what is left behind.

Where nothing hangs on the process, commands run in this one, which has imported torch already.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest
from bundles import contents
from test_report import BUILT

from edgebuild import bundle, cli, report
from edgebuild.errors import EdgebuildError
from edgebuild.spec import Plan

ROOT = Path(__file__).parent.parent
PROFILE = """
name = "p"
title = "t"
target = "host"
artifact = "pte"
[budgets]
size = "1 MiB"
"""
DROP = 'accuracy_drop = "2 points"\n'

TASK = """
import torch
from torch import nn
from edgebuild.task import Task, load_weights

def task() -> Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 48), nn.ReLU(), nn.Linear(48, 4))
    x = torch.randn(16, 1, 8, 8)
    {extra}
    return Task(model=model, example_inputs=(x[:1],), calibration={calibration})
"""


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgebuild", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """As `run`, in this process and, if not said otherwise, the test's own folder."""

    def command(*arguments: str, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys, "argv", ["edgebuild", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, stop.value.code, printed.out, printed.err)

    return command


def write(folder: Path, extra: str = "", calibration: str = "[x]", profile: str = PROFILE) -> None:
    (folder / "task.py").write_text(TASK.format(extra=extra, calibration=calibration))
    (folder / "p.toml").write_text(profile)


def errors(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


BRANCH = """
    class Branch(nn.Module):
        def forward(self, x):
            return x.mean((1, 2)) if x.sum() > 0 else -x.mean((1, 2))
    model = Branch()
"""
PICKLE = """
    import os, pickle
    class Evil:
        def __reduce__(self):
            return (os.system, ("touch owned",))
    pickle.dump({"w": Evil()}, open("w.pt", "wb"))
    load_weights(model, "w.pt")
"""
OTHER = """
    torch.save(nn.Linear(3, 3).state_dict(), "w.pt")
    load_weights(model, "w.pt")
"""


@pytest.mark.parametrize(
    ("written", "code", "message"),
    [
        ({"extra": "raise RuntimeError('no such luck')"}, 2, "RuntimeError: no such luck"),
        ({"extra": BRANCH}, 2, "the model does not export"),
        ({"extra": OTHER}, 2, "weights of another model"),
        ({"extra": PICKLE}, 2, "was not unpickled"),
        (
            {"extra": "model[0].weight.data[0] = float('nan')"},
            2,
            "the weights hold NaN or infinity, first in '0.weight'",
        ),
        ({"calibration": "[]"}, 2, "the calibration set is empty"),
        ({"calibration": "[x[:, :, :4]]"}, 2, "a calibration input is (1, 1, 4, 8)"),
        ({"profile": PROFILE.replace('"1 MiB"', "1")}, 2, "has no unit"),
        ({"profile": PROFILE.replace("size", "sise")}, 2, "perhaps you meant 'size'"),
    ],
    ids=["raises", "control-flow", "other-weights", "pickle", "nan", "empty", "shape", "bare-number", "typo"],
)
def test_bad_input_is_one_line_its_exit_code_and_nothing_written(tmp_path, written, code, message, here):
    write(tmp_path, **written)
    result = here("build", ".", "-p", "p.toml", "-o", "out")
    assert result.returncode == code, result.stderr
    (line,) = errors(result)
    assert message in line
    assert not (tmp_path / "out").exists() and not (tmp_path / "owned").exists()
    assert "Traceback" not in result.stderr


def test_a_missing_task_and_an_unknown_profile(tmp_path, here):
    missing = here("build", "nowhere.py", "-p", "mobile-cpu")
    assert missing.returncode == 2 and "no task file at nowhere.py" in errors(missing)[0]
    unknown = here("build", "nowhere.py", "-p", "mobile-cup")
    assert unknown.returncode == 2 and "perhaps you meant 'mobile-cpu'" in errors(unknown)[0]
    usage = here("build")
    assert usage.returncode == 2 and "Missing" in usage.stderr


def test_no_qemu_is_exit_4_with_the_command(tmp_path, empty_cache, here, monkeypatch):
    write(tmp_path, profile=PROFILE.replace('"host"', '"pixel"'))
    monkeypatch.setenv("EDGEBUILD_QEMU", "/nonexistent/qemu")
    result = here("build", ".", "-p", "p.toml", "-o", "out")
    assert result.returncode == 4, result.stderr
    assert "apt-get install" in errors(result)[0]
    assert not (tmp_path / "out").exists()


def test_an_impossible_budget_is_exit_3_and_the_nearest_value_that_it_names_is_feasible(tmp_path, here):
    write(tmp_path, profile=PROFILE.replace("1 MiB", "1 KiB"))
    result = here("build", ".", "-p", "p.toml", "-o", "out", "--json", "report.json")
    assert result.returncode == 3, result.stderr
    printed = " ".join(result.stdout.split())
    assert "What binds: size: 1 KiB asked, no plan is below" in printed
    assert "(measured on a plan that was built for it), every other budget as asked." in printed
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["outcome"] == "infeasible" and "size binds" in report["summary"]
    assert not (tmp_path / "out").exists()
    (row,) = report["reachable"]
    assert row["measured"] and row["smallest"] <= row["nearest"]
    again = here("build", ".", "-p", "p.toml", "-o", "out", "--json", "again.json")
    assert again.returncode == 3 and "up to date" in again.stdout and "What binds: size" in again.stdout
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "report.json").read_bytes()

    (tmp_path / "p.toml").write_text(
        PROFILE.replace("1 MiB", f"{row['nearest'] / 1024:.4g} KiB").replace(
            "[budgets]", "[distillation]\nsteps = 4\n[budgets]"
        )
    )
    proof = here("build", ".", "-p", "p.toml", "-o", "out")
    assert proof.returncode == 0, proof.stdout + proof.stderr
    (artifact,) = (tmp_path / "out").glob("*.pte")
    assert artifact.stat().st_size <= float(f"{row['nearest'] / 1024:.4g}") * 1024, "as a person reads and asks for it"


def test_a_plan_is_printed_edited_and_built(tmp_path, here):
    write(
        tmp_path,
        profile=PROFILE.replace("1 MiB", "14 KiB").replace("[budgets]", "[distillation]\nsteps = 4\n[budgets]"),
    )
    planned = here("plan", ".", "-p", "p.toml", "-o", "plan.json")
    assert planned.returncode == 0, planned.stderr
    assert "solver: optimal" in planned.stdout and "14 KiB" in planned.stdout
    assert not (tmp_path / "build").exists()

    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["widths"], plan["forms"] = [{"group": "3", "channels": 24, "of": 48}], []
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    built = here("build", ".", "-p", "p.toml", "-o", "out", "--plan", "plan.json")
    assert built.returncode in (0, 1), built.stderr
    used = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert used["widths"] == plan["widths"] and used["forms"] == []
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["rounds"]) == 1

    (tmp_path / "bad.json").write_text(json.dumps({**plan, "width": []}))
    refused = here("build", ".", "-p", "p.toml", "-o", "none", "--plan", "bad.json")
    assert refused.returncode == 2, refused.stderr
    assert "perhaps you meant 'widths'" in errors(refused)[0]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("build", ".", "-p", "p.toml", "--json", "none/report.json"), "there is no folder none"),
        (("build", ".", "-p", "p.toml", "--json", "."), "it is a folder"),
        (("plan", ".", "-p", "p.toml", "-o", "none/plan.json"), "there is no folder none"),
        (("build", ".", "-p", "n" * 300), "File name too long"),
        (("init", "n" * 300), "File name too long"),
        (("targets", "show", "n" * 300), "File name too long"),
    ],
)
def test_a_path_that_cannot_be_used_is_refused_before_the_work(tmp_path, arguments, message):
    write(tmp_path, extra="raise RuntimeError('looked at')")
    result = run(*arguments, cwd=tmp_path)
    (line,) = errors(result)
    assert result.returncode == 2 and message in line and "Traceback" not in result.stderr
    assert sorted(os.listdir(tmp_path)) == ["p.toml", "task.py"]


def test_a_launcher_that_counts_in_words(tmp_path):
    result = run("build", ".", "-p", "mobile-cpu", cwd=tmp_path, WORLD_SIZE="two")
    assert result.returncode == 2 and "WORLD_SIZE='two'" in errors(result)[0]


@pytest.mark.parametrize("arguments", [("--version",), ("targets", "list")])
def test_a_reader_that_leaves_is_neither_success_nor_a_broken_budget(tmp_path, arguments):
    """Written by print and by rich, which end such a process in their own ways."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "edgebuild", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, which is always full")
@pytest.mark.parametrize("arguments", [("--version",), ("targets", "list")])
def test_output_that_finds_no_room(tmp_path, arguments):
    command = [sys.executable, "-m", "edgebuild", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: the output cannot be written: No space left on device\n"


def test_a_read_only_output_is_refused_before_the_work(tmp_path, here):
    write(tmp_path)
    (tmp_path / "out").write_text("the user's own")
    result = here("build", ".", "-p", "p.toml", "-o", "out")
    assert result.returncode == 2 and len(errors(result)) == 1
    assert (tmp_path / "out").read_text() == "the user's own"


def test_a_broken_budget_is_exit_1(tmp_path, here):
    evaluate = (
        "scores = iter([1.0, *[0.5] * 9])\n"
        "    Task = __import__('functools').partial(Task_, evaluate=lambda p: (p(x), next(scores))[1])"
    )
    text = TASK.replace("import Task, load_weights", "import Task as Task_, load_weights").replace(
        "-> Task", "-> Task_"
    )
    (tmp_path / "task.py").write_text(text.format(extra=evaluate, calibration="[x]"))
    (tmp_path / "p.toml").write_text(
        PROFILE.replace("[budgets]", "rounds = 2\n[distillation]\nsteps = 4\n[budgets]") + DROP
    )
    result = here("build", ".", "-p", "p.toml", "-o", "out")
    assert result.returncode == 1, result.stderr + result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (verdict,) = [v for v in report["verdicts"] if v["kind"] == "accuracy_drop"]
    assert verdict["status"] == "fail" and verdict["value"] == 0.5
    assert report["outcome"] == "broken" and "nothing is left to try" in report["summary"]


def test_control_c_leaves_nothing_half_written(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EDGEBUILD_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "edgebuild", "build", ".", "-p", "p.toml", "-o", "out"]
    write(tmp_path)
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "finding what layers cost" in line:  # which takes half a minute in an empty cache
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert "interrupted" in rest and "Traceback" not in rest
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".edgebuild")]


def test_build_twice_then_no_op_then_touch(tmp_path, here):
    """The same bytes and plan from scratch, here and in a new process with another hash seed; then nothing to do;
    then an input changes.

    In a folder whose name is no text, and no name for a file that other systems take.
    """
    tmp_path = tmp_path / os.fsdecode(b"my mod\xe8l")
    tmp_path.mkdir()
    write(
        tmp_path,
        profile=PROFILE.replace("1 MiB", "14 KiB").replace(
            "[budgets]", "rounds = 2\n[distillation]\nsteps = 20\n[budgets]"
        ),
    )
    bundles = []
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"  # another than this process has
    for name, command in (("out1", here), ("out2", partial(run, PYTHONHASHSEED=seed))):
        result = command("build", ".", "-p", "p.toml", "-o", name, "--rebuild", cwd=tmp_path)
        assert result.returncode in (0, 1), result.stderr
        folder = tmp_path / name
        artifact = folder / "my-modl.pte"
        bundles.append((artifact.read_bytes(), (folder / "plan.json").read_bytes()))
    assert bundles[0] == bundles[1]
    same = here("diff", "out1", "out2", "--max-regression", "size=0 B", cwd=tmp_path)
    assert same.returncode == 0 and "The artifact is the same to the byte" in same.stdout, same.stderr
    checked = here("check", "out2", "--quiet", cwd=tmp_path)
    assert checked.returncode == result.returncode, checked.stdout + checked.stderr
    plan = msgspec.json.decode(bundles[0][1], type=Plan)
    assert plan.widths or plan.forms, "14 KiB needs more than 4 bits"
    again = here("build", ".", "-p", "p.toml", "-o", "out2", cwd=tmp_path)
    assert "is up to date" in again.stdout and again.stderr == "" and again.returncode == result.returncode
    (tmp_path / "task.py").write_text((tmp_path / "task.py").read_text() + "\nraise RuntimeError('looked at')\n")
    after = here("build", ".", "-p", "p.toml", "-o", "out2", cwd=tmp_path)
    assert "up to date" not in after.stdout and "looked at" in errors(after)[0]


def test_init_writes_a_task_that_loads_and_never_overwrites(tmp_path, here):
    assert here("init", "mine").returncode == 0
    looked = here("inspect", "mine")
    assert looked.returncode == 0, looked.stderr
    assert "parameters" in looked.stdout and "channel group" in looked.stdout
    again = here("init", "mine")
    assert again.returncode == 2 and "exists already" in errors(again)[0]


def test_lists_and_shows(tmp_path):
    assert "raspberry-pi-4" in run("targets", "list", cwd=tmp_path).stdout
    assert "edge-1mb" in run("profiles", "list", cwd=tmp_path).stdout
    assert "source" in run("targets", "show", "pixel", cwd=tmp_path).stdout
    assert run("profiles", "show", "nope", cwd=tmp_path).returncode == 2


# ------------------------------------------------------------------------------------------------ edgebuild report


def report_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    """What `edgebuild report` prints, in this process."""
    cli.app(["report", *map(str, arguments)], standalone_mode=False)
    return capsys.readouterr()


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A bundle that holds a report alone."""
    files = {"report.json": report.to_json(BUILT).encode()}
    bundle.write(tmp_path / "made", files, contents(files))
    return tmp_path / "made"


def test_a_report_is_shown_from_a_bundle_or_a_file(made, capsys):
    shown, _ = report_command(capsys, made)
    assert "digits for raspberry-pi-4: broken" in shown and "5. What else was possible?" in shown
    assert report_command(capsys, made / "report.json") == (shown, "")


def test_a_report_is_written_in_every_form(made, tmp_path, capsys):
    text = report.to_json(BUILT)
    read = report.from_json(text)
    forms = {"html": report.html(read), "markdown": report.markdown(read), "junit": report.junit(read), "json": text}
    options = [word for form in forms for word in (f"--{form}", tmp_path / form)]
    assert report_command(capsys, made, *options) == ("", "")
    assert {form: (tmp_path / form).read_text(encoding="utf-8") for form in forms} == forms
    assert report_command(capsys, made, "--markdown", "-")[0] == forms["markdown"]


def test_the_schema_needs_no_report(capsys):
    shown, _ = report_command(capsys, "--schema")
    assert json.loads(shown) == report.schema()


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none", "no bundle at"),
        ("none.json", "No such file"),
        (".", "manifest.json"),
        ("bad.json", "not JSON"),
        ("latin.json", "not UTF-8"),
    ],
)
def test_what_is_no_report_is_one_line(path, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{", encoding="utf-8")
    Path("latin.json").write_bytes(b'"\xe4"')
    with pytest.raises(EdgebuildError, match=said) as refused:
        cli.app(["report", path, "--html", "out.html"], standalone_mode=False)
    assert refused.value.exit_code == 2
    assert not Path("out.html").exists()


def test_a_report_in_a_damaged_bundle_is_refused(made):
    path = made / "report.json"
    path.write_bytes(path.read_bytes().replace(b"broken", b"met   "))
    with pytest.raises(EdgebuildError, match="report.json"):
        cli.app(["report", str(made)], standalone_mode=False)
