"""The report: JSON round trip, and what a reader finds in Markdown, the terminal and JUnit."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from xml.etree import ElementTree as ET

import jsonschema
import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.console import Console

from edgebuild import report
from edgebuild.errors import SpecError
from edgebuild.spec import (
    Accuracy,
    CalibrationError,
    Dropped,
    Finding,
    Form,
    FrontierPoint,
    LayerRow,
    Measurement,
    Parity,
    Plan,
    Prediction,
    Reachable,
    Report,
    Round,
    Solve,
    Trial,
    Verdict,
    Width,
)
from edgebuild.units import Bytes, Seconds

PI = "raspberry-pi-4"
PLAN = Plan(
    widths=(Width("conv1", 12, 16),),
    forms=(Form("fc", "svd", (8,)),),
    distil=True,
    distil_steps=400,
    keep_fp32=("head",),
    why=("quantize: the original is 3.2 times too large",),
)
VERDICTS = (
    Verdict("size", "", 1 << 20, 30e3, 34 * 1024, "counted", 0.967, "pass"),
    Verdict("latency", PI, 0.010, 0.009, 0.012, "estimated", -0.2, "fail", "one | thread"),
    Verdict("throughput", "host", 100.0, None, 31234.0, "measured", 311.34, "inconclusive"),
    Verdict("min_delegated", "", 0.8, None, 1.0, "counted", 0.25, "pass"),
    Verdict("accuracy_drop", "", 0.01, 0.0, 0.0055, "measured", 0.45, "pass"),
)
SPLIT = {"program": 0.0, "weights": 40960.0, "arena": 2048.0, "workspace": 8192.0, "runtime": 1024.0}
MEMORY = Measurement(PI, "peak_memory", 52224.0, "simulated", split=SPLIT)
BUILT = Report(
    outcome="broken",
    summary="latency on raspberry-pi-4 is 20 % over its budget",
    task="digits",
    profile="raspberry-pi-4",
    targets=(PI, "host"),
    artifact="digits.pte",
    artifact_sha256="ab" * 32,
    size=34 * 1024,
    original_size=136 * 1024,
    plan=PLAN,
    verdicts=VERDICTS,
    accuracy=Accuracy("accuracy", 0.9778, 0.9723, 360, (0.957, 0.989), (0.95, 0.985), 0.0055),
    parity=(
        Parity(PI, "eager int8", 16, float("inf"), 1.0, True, 0.0, True),
        Parity("host", "eager fp32", 16, 31.26, 0.9375, False, 0.25, False, "conv2"),
    ),
    measurements=(
        Measurement("host", "latency", 0.00021, "measured", runs=100, detail="1 thread"),
        Measurement(PI, "latency", 0.012, "estimated", error=0.3),
        MEMORY,
        Measurement("", "min_delegated", 1.0, "counted"),
    ),
    original_measurements=(
        Measurement("host", "latency", 0.00084, "measured", runs=100),
        Measurement(PI, "latency", 0.04, "measured"),
    ),
    layers=(
        LayerRow("conv1", "conv2d", "16 to 12 channels", "int8", (160, 120), (7840, 5880), {PI: (2e-5, 1e-5)}, 0.002),
        LayerRow("head", "linear", "", "fp32", (650, 650), (640, 640), {PI: (2e-5, 2e-5)}, 0.0),
    ),
    rounds=(
        Round(
            number=1,
            plan=PLAN,
            draft=False,
            artifact_sha256="ab" * 32,
            size=34 * 1024,
            verdicts=VERDICTS[:2],
            predictions=(Prediction("latency", "host", 0.0002, 0.00021, "measured", -0.0476),),
            estimated_loss=0.031,
            loss=0.0042,
            score=0.9723,
            training="400 steps",
            solve=Solve("optimal", 0.31, 0.05, 0.004, 1, 93, 977, 224),
            corrections={"latency on host": 1.2345},
            met=False,
        ),
    ),
    reachable=(Reachable("latency", PI, 0.010, 0.0031, True, None), Reachable("size", "", 1 << 20, 9216, True, None)),
    frontier=(
        FrontierPoint(
            "latency on host", 0.0002, {"latency on host": 0.00019, "size": 40_000.0}, 0.0123, 0.01, chosen=True
        ),
    ),
    dropped=(Dropped("conv1", "width 12", "costs as much as 16 on every budget"),),
    trials=(Trial("prune", 3, 0.01, 0.013),),
    calibration={"host": (CalibrationError("igemm", "int8", 40, 0.009, 0.07),)},
    findings=(Finding("fallback", "relu | 3", "aten.relu_ (model.py:12)"), Finding("note", "x", "a\nb <b>*c*</b> `d`")),
    stages={"lower": 3.2, "analyse": 0.5, "distil": 75.0},
    environment={"torch": "2.13.0", "seed": "0", "edgebuild": "0.1.0"},
    build_id="cafe",
)
INFEASIBLE = replace(
    BUILT,
    outcome="infeasible",
    summary="no plan meets every budget",
    artifact="",
    artifact_sha256="",
    size=0,
    plan=None,
    verdicts=(),
    accuracy=None,
    parity=(),
    measurements=(),
    layers=(),
    rounds=(),
    reachable=(
        Reachable("latency", PI, 0.001, 0.0031, False, None),
        Reachable("throughput", "host", 9e4, 31234.0, False, None),
    ),
    frontier=(),
    findings=(),
    build_id="",
)


SCHEMA = jsonschema.Draft202012Validator(report.schema())
PUBLISHED = Path(__file__).parent.parent / "docs" / "report.schema.json"


def as_dict(value: Report) -> dict:
    return report.from_json(report.to_json(value))


def tables(markdown: str) -> list[list[list[str]]]:
    """The tables of the Markdown as a reader sees them: rows of cells of plain text. (markdown-it comes with rich.)"""
    found: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    for before, token in pairwise(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif before.type in ("th_open", "td_open"):
            found[-1][-1].append("".join(child.content for child in token.children or ()))
    return found


def table(markdown: str, *columns: str) -> list[dict[str, str]]:
    """The rows of the table that has these columns, by column."""
    found = [rows for rows in tables(markdown) if set(columns) <= set(rows[0])]
    assert len(found) == 1, [rows[0] for rows in tables(markdown)]
    head, *rows = found[0]
    assert all(len(row) == len(head) for row in rows)
    return [dict(zip(head, row, strict=True)) for row in rows]


def shown(value: Report, width: int = 200, **options: Any) -> str:
    file = io.StringIO()
    report.terminal(as_dict(value), Console(file=file, width=width, **options))
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------------- JSON


def test_json_is_the_report_as_it_stands():
    text = report.to_json(BUILT)
    data = json.loads(text)
    assert data["verdicts"][1] == msgspec.to_builtins(VERDICTS[1])
    assert data["plan"] == json.loads(msgspec.json.encode(PLAN))
    assert list(data) == [*Report.__dataclass_fields__]
    assert list(data["stages"]) == ["analyse", "distil", "lower"]
    assert text == report.to_json(replace(BUILT, stages=dict(reversed(BUILT.stages.items()))))
    assert text.startswith('{\n  "outcome": "broken",\n')


def test_json_takes_quantities_and_numpy_numbers():
    odd = replace(BUILT, size=np.int64(5), verdicts=(replace(VERDICTS[0], bound=Bytes(7), value=np.float32(0.5)),))
    assert as_dict(odd)["size"] == 5
    assert as_dict(odd)["verdicts"][0]["bound"] == 7.0
    assert as_dict(odd)["verdicts"][0]["value"] == 0.5
    assert as_dict(replace(BUILT, stages={"a": Seconds(2)}))["stages"] == {"a": 2.0}


def test_a_figure_that_is_not_finite_becomes_null_and_a_finding():
    bad = replace(BUILT, measurements=(Measurement("host", "latency", float("nan"), "measured"),))
    text = report.to_json(bad)
    assert "NaN" not in text and "Infinity" not in text
    data = report.from_json(text)
    assert data["measurements"][0]["value"] is None
    said = [item for item in data["findings"] if item["where"] == "measurements[0].value"]
    assert [item["what"] for item in said] == ["the figure is nan and was written as null"]
    report.markdown(data)


def test_the_published_schema_is_that_of_the_code():
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == report.schema(), (
        "edgebuild report --schema > docs/report.schema.json"
    )
    jsonschema.Draft202012Validator.check_schema(report.schema())


@pytest.mark.parametrize("value", [BUILT, INFEASIBLE])
def test_reports_keep_to_the_schema_with_their_null_figures(value):
    nan = float("nan")
    odd = replace(value, original_measurements=(Measurement("host", "latency", nan, "measured", error=nan),))
    data = json.loads(report.to_json(odd))
    assert data["original_measurements"][0]["value"] is None
    SCHEMA.validate(data)
    SCHEMA.validate(json.loads(report.to_json(value)))


def test_infinite_sqnr_is_no_finding():
    data = as_dict(BUILT)
    assert data["parity"][0]["sqnr_db"] is None
    assert len(data["findings"]) == len(BUILT.findings)
    assert table(report.markdown(data), "SQNR")[0]["SQNR"] == "no noise"


def test_text_that_is_no_utf8_survives():
    assert as_dict(replace(BUILT, task="a\udcffb"))["task"] == "a\\udcffb"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("schema_version"), "no schema_version"),
        (lambda data: data.update(schema_version=2), "schema_version is 2"),
        (lambda data: data.pop("verdicts"), "missing key 'verdicts'"),
        (lambda data: data.update(colour="red"), "unknown key 'colour'"),
        (lambda data: data["verdicts"][0].pop("bound"), r"missing key 'verdicts\[0\].bound'"),
        (lambda data: data["rounds"][0]["plan"].update(x=1), r"unknown key 'rounds\[0\].plan.x'"),
        (lambda data: data["verdicts"][0].update(status="good"), "status"),
        (lambda data: data.update(size="large"), "size"),
        (lambda data: data.update(size=None), "size"),
        (lambda data: data.update(verdicts=3), "verdicts"),
        (lambda data: data["layers"][0].update(parameters=[1]), "parameters"),
    ],
)
def test_a_wrong_report_is_refused(change, message):
    data = json.loads(report.to_json(BUILT))
    change(data)
    with pytest.raises(SpecError, match=message) as error:
        report.from_json(json.dumps(data))
    assert "\n" not in str(error.value)
    assert not SCHEMA.is_valid(data), "the published schema is as strict"


@pytest.mark.parametrize("text", ["", "no", "[]", "3", "[" * 100_000, '{"schema_version": 1, "x": NaN}', b"\xff"])
def test_what_is_no_report_is_refused(text):
    with pytest.raises(SpecError):
        report.from_json(text)


# ------------------------------------------------------------------------------------------------------ Markdown


def test_markdown_answers_in_order():
    text = report.markdown(as_dict(BUILT))
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# digits for raspberry-pi-4: broken",
        "## 1. Does it fit?",
        "## 2. What did it cost?",
        "## 3. What was done?",
        "## 4. Can I believe it?",
        "## 5. What else was possible?",
    ]


def test_markdown_verdicts():
    size, latency, throughput, delegated, drop = table(report.markdown(as_dict(BUILT)), "Bound", "Margin")
    assert size == {
        "Budget": "size",
        "Target": "any",
        "Bound": "≤ 1 MiB",
        "Predicted": "29.3 KiB",
        "Found": "34 KiB (counted)",
        "Margin": "+96.7 %",
        "Status": "pass",
        "Note": "",
    }
    assert latency["Found"] == "12 ms ± 30 % (estimated)"
    assert (latency["Margin"], latency["Status"], latency["Note"]) == ("-20.0 %", "fail", "one | thread")
    assert (throughput["Bound"], throughput["Predicted"]) == ("≥ 100 /s", "—")
    assert throughput["Found"] == "31,234 /s (measured)"
    assert delegated["Bound"] == "≥ 80 %"
    assert (drop["Bound"], drop["Found"]) == ("≤ 1 points", "0.55 points (measured)")


def test_markdown_cost():
    accuracy, size, host, pi, _ = table(report.markdown(as_dict(BUILT)), "Original", "Artifact")
    assert list(accuracy.values()) == ["accuracy", "0.9778 [0.957, 0.989]", "0.9723 [0.95, 0.985]", "0.55 points lower"]
    assert list(size.values()) == ["size", "136 KiB", "34 KiB", "4 times smaller"]
    assert list(host.values()) == ["latency on host", "840 us (measured)", "210 us (measured)", "4 times faster"]
    assert pi["Change"] == "—", "a measured and an estimated figure must not be compared"


def test_markdown_memory_by_kind():
    rows = table(report.markdown(as_dict(BUILT)), "Kind", "Artifact at its peak")
    assert [row["Kind"].partition(":")[0] for row in rows] == [*SPLIT]
    assert [row["Artifact at its peak"] for row in rows] == ["0 B", "40 KiB", "2 KiB", "8 KiB", "1 KiB"]
    assert {row["On"] for row in rows} == {PI} and {row["Original at its peak"] for row in rows} == {"—"}
    assert as_dict(BUILT)["measurements"][2]["split"] == SPLIT


def test_markdown_lists_every_layer_folded_away():
    text = report.markdown(as_dict(BUILT))
    changed, everything = [rows[1:] for rows in tables(text) if rows[0][0] == "Layer"]
    assert [row[0] for row in changed] == ["conv1", "all layers"]
    assert [row[0] for row in everything] == ["conv1", "head", "all layers"]
    assert everything[0][2:] == ["16 to 12 channels", "int8", "160 → 120", "7,840 → 5,880", "0.002", "20 us → 10 us"]
    assert everything[2][4:] == ["810 → 770", "8,480 → 6,520", "", "40 us → 30 us"]
    folded = text.split("<details>\n<summary>All layers</summary>\n\n")[1].split("\n</details>")[0]
    assert "head" in folded
    assert "Why: quantize: the original is 3.2 times too large" in text


def test_markdown_findings_and_parity():
    text = report.markdown(as_dict(BUILT))
    findings = table(text, "Kind", "Where", "What")
    assert [item["Where"] for item in findings] == ["relu | 3", "x"]
    assert findings[0]["What"] == "aten.relu_ (model.py:12)"
    assert findings[1]["What"] == "a b <b>*c*</b> `d`"
    host = table(text, "SQNR")[1]
    assert (host["SQNR"], host["Top-1 agreement"], host["Agrees"]) == ("31.3 dB", "93.75 %", "no")
    assert host["Diverges first at"] == "conv2"
    (predicted,) = table(text, "Prediction off by")
    assert (predicted["Round"], predicted["Budget"], predicted["Prediction off by"]) == (
        "1",
        "latency on host",
        "-4.8 %",
    )
    (fitted,) = table(text, "Timed")
    assert (fitted["Kind"], fitted["Worst error"]) == ("igemm", "7 %")
    assert table(text, "Loss found (nats)")[0]["Loss found (nats)"] == "0.013"
    assert table(text, "Value", "What")[1] == {"What": "seed", "Value": "0"}
    assert "Delegated: 100 % of the operators. Fell back: relu \\| 3." in text
    assert "Time by stage: distil 1.25 min, lower 3.2 s, analyse 500 ms." in text


def test_markdown_rounds_and_reachable():
    text = report.markdown(as_dict(BUILT))
    (row,) = table(text, "Round", "Techniques")
    assert row["Techniques"] == "quantize, prune, factorize, distil"
    assert row["Corrections"] == "latency on host x 1.23"
    assert "latency on raspberry-pi-4 12 ms fail" in row["Found"]
    assert table(text, "Feasible")[0]["Best that a plan reaches"] == "3.1 ms"
    assert row["Loss estimated, found (nats)"] == "0.031, 0.0042"
    (solve,) = table(text, "Binaries")
    assert (solve["Status"], solve["Gap"], solve["Binaries"]) == ("optimal", "0.4 %", "93")
    point, built = table(text, "Along")
    assert (point["Latency on host"], point["Size"], point["Loss estimate (nats)"]) == ("190 us", "39.06 KiB", "0.0123")
    assert (built["Latency on host"], built["Accuracy"]) == ("210 us", "0.9723")
    assert table(text, "Candidate")[0] == {
        "Where": "conv1",
        "Candidate": "width 12",
        "Why": "costs as much as 16 on every budget",
    }


def test_an_infeasible_build_says_in_two_lines_what_binds_and_what_would_do():
    text = report.markdown(as_dict(INFEASIBLE))
    assert (
        "What binds: latency on raspberry-pi-4: 1 ms asked, no plan is below 3.1 ms; "
        "throughput on host: 90,000 /s asked, no plan is above 31,234 /s." in text
    )
    assert "Nearest feasible: none by changing one budget alone." in text
    assert "Nothing: there is no plan to carry out." in text

    first, second = INFEASIBLE.reachable
    one = replace(INFEASIBLE, reachable=(replace(first, nearest=0.0032, measured=True), replace(second, feasible=True)))
    text = report.markdown(as_dict(one))
    assert "What binds: latency on raspberry-pi-4: 1 ms asked, no plan is below 3.1 ms." in text
    nearest = "latency on raspberry-pi-4 3.2 ms (measured on a plan that was built for it)"
    assert f"Nearest feasible: {nearest}, every other budget as asked." in text
    assert "every other budget as asked" in shown(one).replace("\n", " ")

    alone = tuple(replace(row, feasible=True, nearest=row.smallest) for row in INFEASIBLE.reachable)
    text = report.markdown(as_dict(replace(INFEASIBLE, reachable=alone)))
    assert "each could be met alone, but not all of them together" in text
    assert " 3.1 ms (predicted) or throughput on host 31,234 /s (predicted), every other budget as asked." in text


# ------------------------------------------------------------------------------------------------------ terminal


def test_terminal_leaves_out_what_did_not_change():
    text = shown(BUILT)
    assert "12 ms ± 30 % (estimated)" in text
    assert "Layers that changed: 1 of 2" in text
    assert "head  " not in text
    assert "one | thread" in text
    assert "relu | 3" in text


@pytest.mark.parametrize("width", [40, 80, 100, 200])
def test_terminal_loses_nothing_when_it_is_narrow(width):
    long = replace(VERDICTS[1], note="Z" * 50)
    text = shown(replace(BUILT, verdicts=(long,), rounds=()), width=width)
    assert text.count("Z") == 50
    assert max(map(len, text.splitlines())) <= width
    assert width < 100 or " inconclusive" in shown(BUILT, width=width)


def test_terminal_prints_names_as_they_are():
    text = shown(replace(BUILT, findings=(Finding("note", "[red]x[/red]", "\x1b[31mred\x07"),)))
    assert "[red]x[/red]" in text
    assert "\x1b" not in text and "\x07" not in text
    assert r"\x1b[31mred\x07" in text


def test_terminal_without_colour_and_without_unicode(monkeypatch):
    assert "\x1b[1;31m" in shown(BUILT, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in shown(BUILT, force_terminal=True, color_system="standard")

    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    report.terminal(as_dict(replace(BUILT, task="größe")), Console(file=file, width=200))
    file.flush()
    assert b"<= 1 MiB" in raw.getvalue()
    assert b"gr??e" in raw.getvalue()


# --------------------------------------------------------------------------------------------------------- JUnit


def test_junit_has_a_case_for_each_verdict_and_parity():
    suite = ET.fromstring(report.junit(as_dict(BUILT)).encode()).find("testsuite")
    assert suite is not None
    cases = suite.findall("testcase")
    assert [case.get("name") for case in cases] == [
        "size",
        "latency on raspberry-pi-4",
        "throughput on host",
        "delegated",
        "accuracy drop",
        "raspberry-pi-4 against eager int8",
        "host against eager fp32",
    ]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped"), suite.get("errors")) == (
        "7",
        "2",
        "1",
        "0",
    )
    failure, skipped, diverged = cases[1].find("failure"), cases[2].find("skipped"), cases[6].find("failure")
    assert failure is not None and skipped is not None and diverged is not None
    said = "12 ms ± 30 % (estimated), bound ≤ 10 ms, margin -20.0 %; one | thread"
    assert failure.get("message") == said
    assert "31,234 /s (measured)" in skipped.get("message", "")
    assert diverged.get("message") == "diverges first at conv2"
    assert len(cases[0]) == 0


def test_junit_of_an_infeasible_build_fails():
    root = ET.fromstring(report.junit(as_dict(INFEASIBLE)).encode())
    assert root.get("failures") == "1"
    (failure,) = root.findall("testsuite/testcase/failure")
    assert "1 ms asked, no plan is below 3.1 ms" in failure.get("message", "")


# ------------------------------------------------------------------------------------------------------- any text

TEXT = st.text(max_size=12) | st.sampled_from(
    ["a|b", "\\|", "`|`", "\x00", "\ufffe", "<!--", "]]>", "# x", "1. x", "\n\n"]
)
COUNT = st.integers(0, 2**53)
FIGURE = st.floats(allow_nan=True, allow_infinity=True)
SCALARS = {str: TEXT, int: COUNT, float: FIGURE, bool: st.booleans(), type(None): st.none()}


def anything(hint: Any) -> st.SearchStrategy:
    """Values of a type of `edgebuild.spec`, with awkward text and figures in every field."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in SCALARS:
        return SCALARS[hint]
    if origin is Literal:
        return st.sampled_from(parts)
    if origin in (Union, UnionType):
        return st.one_of(*map(anything, parts))
    if origin is Mapping:
        return st.dictionaries(anything(parts[0]), anything(parts[1]), max_size=2)
    if origin is tuple and parts[-1] is Ellipsis:
        return st.lists(anything(parts[0]), max_size=2).map(tuple)
    if origin is tuple:
        return st.tuples(*map(anything, parts))
    hints = get_type_hints(hint)
    return st.builds(hint, **{name: anything(kind) for name, kind in hints.items() if name != "schema_version"})


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(anything(Report))
def test_any_report_can_be_shown(value):
    data = as_dict(value)
    assert report.to_json(value) == report.to_json(value)
    assert msgspec.json.format(msgspec.json.encode(data), indent=2).decode() + "\n" == report.to_json(value)
    SCHEMA.validate(data)
    text = report.markdown(data)
    found = tables(text)
    assert all(len(row) == len(rows[0]) for rows in found for row in rows)
    assert sum(len(rows) - 1 for rows in found if "Margin" in rows[0]) == len(value.verdicts)
    assert sum(line.startswith("## ") for line in text.splitlines()) == 5
    assert "\x1b" not in shown(value, width=80)
    suite = ET.fromstring(report.junit(data).encode()).find("testsuite")
    assert suite is not None
    cases = len(value.verdicts) + len(value.parity)
    assert len(suite.findall("testcase")) - cases in (0, 1)
    if value.outcome in ("broken", "infeasible"):
        assert suite.find("testcase/failure") is not None


@given(st.lists(TEXT, min_size=1, max_size=4))
def test_markdown_cells_show_any_text(texts):
    data = as_dict(replace(BUILT, findings=tuple(Finding("note", text, "end") for text in texts)))
    rows = table(report.markdown(data), "Kind", "Where", "What")
    assert [row["What"] for row in rows] == ["end"] * len(texts)
    for row, text in zip(rows, texts, strict=True):
        if text.isprintable():
            assert row["Where"].split() == text.split()
