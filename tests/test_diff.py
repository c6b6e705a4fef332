"""What changed between two bundles, and how much of it is allowed."""

from dataclasses import replace

import pytest

from edgebuild import settings
from edgebuild.diff import diff, parse
from edgebuild.errors import UsageError
from edgebuild.report import gate, to_json
from edgebuild.spec import Finding, Measurement, OperatorTime, Plan, Width


def compare(old, new, *allowed, profile=None):
    first = settings.read(old)
    second = settings.read(new) if profile is None else replace(settings.read(new), profile=profile)
    return diff(old, new, first, second, [parse(written) for written in allowed])


def figure(found, kind, target=""):
    return next(row for row in found.figures if (row.kind, row.target) == (kind, target))


def latency(paper, host, phone=0.004):
    _, _, delegated = paper.report.measurements
    return (
        Measurement("host", "latency", host, "measured", runs=900),
        Measurement("pixel-3a", "latency", phone, "simulated", 0.2),
        delegated,
    )


def test_a_bundle_does_not_differ_from_itself(paper):
    found = compare(paper.files, paper.files, "latency=0%", "size=0 B", "accuracy_drop=0 points")
    assert found.outcome == "met" and found.same_artifact
    assert all(row.worse == 0 and not row.exceeded for row in found.figures)
    assert not (found.budgets or found.plan or found.layers or found.operators or found.versions)
    assert [finding.where for finding in found.findings] == ["host"]


@pytest.mark.parametrize(
    ("limit", "size", "host", "accuracy", "exceeded"),
    [
        ("latency=5%", 0, 0.0021, 0.97, False),
        ("latency=5%", 0, 0.00211, 0.97, True),
        ("latency=5%", 0, 0.0011, 0.97, False),
        ("latency=0.1 ms", 0, 0.0021, 0.97, False),
        ("latency=0.1ms", 0, 0.00211, 0.97, True),
        ("size=1KiB", 1024, 0.002, 0.97, False),
        ("size=1KiB", 1025, 0.002, 0.97, True),
        ("accuracy_drop=0.2 points", 0, 0.002, 0.968, False),
        ("accuracy_drop=0.2points", 0, 0.002, 0.967, True),
        ("accuracy_drop=1 %", 0, 0.002, 0.961, False),
        ("accuracy_drop=1 %", 0, 0.002, 0.96, True),
        ("accuracy_drop=0 points", 0, 0.002, 0.98, False),
    ],
)
def test_a_regression_is_held_against_what_is_allowed(paper, limit, size, host, accuracy, exceeded):
    new = paper.changed(
        size=paper.report.size + size,
        measurements=latency(paper, host),
        accuracy=replace(paper.report.accuracy, artifact=accuracy),
    )
    found = compare(paper.files, new, limit)
    assert found.outcome == ("broken" if exceeded else "met")
    assert [row.limit for row in found.figures if row.exceeded] == ([limit.replace("= ", "=")] if exceeded else [])
    assert bool(gate.diff_problems(decoded(found))) == exceeded


def test_throughput_and_delegation_are_worse_where_they_are_less(paper):
    rows = (Measurement("host", "throughput", 500.0, "measured"), Measurement("", "min_delegated", 1.0, "counted"))
    worse = (replace(rows[0], value=400.0), replace(rows[1], value=0.9))
    found = compare(paper.changed(measurements=rows), paper.changed(measurements=worse), "throughput=10%")
    assert figure(found, "throughput", "host").share == pytest.approx(0.2) and found.outcome == "broken"
    assert figure(found, "min_delegated").worse == pytest.approx(0.1) and not figure(found, "min_delegated").exceeded


@pytest.mark.parametrize("reason", ["machine", "method", "threads", "target", "missing"])
def test_figures_that_cannot_be_compared_say_why(paper, reason):
    new, profile = paper.files, settings.read(paper.files).profile
    phone = "targets/pixel-3a.toml"
    if reason == "machine":
        new = paper.changed(environment={**paper.report.environment, "machine": "another"})
    elif reason == "method":
        new = paper.changed(measurements=(replace(paper.report.measurements[0], method="estimated"),))
    elif reason == "threads":
        profile = replace(profile, threads=2)
    elif reason == "target":
        text = paper.files["targets/host.toml"].replace(b'status = "measured"', b'status = "validated"')
        new = paper.files | {"targets/host.toml": text}
    else:
        new = paper.changed(measurements=())
    assert phone not in new
    found = compare(paper.files, new, "latency=5%", profile=profile)
    row = figure(found, "latency", "host")
    assert row.worse is None and not row.exceeded
    words = {
        "machine": "two machines", "method": "measured and estimated", "threads": "1 and 2 threads",
        "target": "described otherwise", "missing": "in the old bundle alone",
    }  # fmt: skip
    assert words[reason] in row.why
    if all(row.worse is None for row in found.figures if row.kind == "latency"):
        assert found.outcome == "broken" and "latency" in found.summary, "a limit that nothing was held against"
        assert [finding.what for finding in found.findings if finding.kind == "skipped"]


def test_a_limit_on_what_no_bundle_has_is_not_met(paper):
    found = compare(paper.files, paper.files, "latency_p99=5%")
    assert found.outcome == "broken" and "latency p99" in found.summary
    other = paper.changed(accuracy=replace(paper.report.accuracy, samples=100))
    found = compare(paper.files, other, "accuracy_drop=5 points")
    assert found.outcome == "broken" and "over 500 samples" in figure(found, "accuracy_drop").why


def test_all_that_changed_is_listed(paper):
    operator = OperatorTime("Add (ND) #1", 1e-6, {}, {}, 0, 0, 0, 0, 0, 1, 1)
    timed = replace(paper.report.measurements[1], operators=(operator, operator))
    (stem,) = paper.report.layers
    new = paper.changed(
        plan=Plan(precision="int8", widths=(Width("stem", 12, 16),), keep_fp32=("classify",)),
        layers=(replace(stem, change="width 16 -> 12", precision="int8", parameters=(448, 336)),),
        measurements=(timed,),
        environment={**paper.report.environment, "torch": "2.14.0", "inputs": "def"},
        findings=(Finding("fallback", "host", "not delegated: aten.cumsum"),),
        artifact_sha256="1" * 64,
        task="other",
    )
    found = compare(paper.files, new)
    assert found.outcome == "met" and found.summary == "no limit was asked for" and not found.same_artifact
    assert {row.where for row in found.plan} == {"precision", "group stem", "layer classify precision"}
    assert [(row.where, row.new) for row in found.operators] == [("Add (ND) on pixel-3a", "2, 2 us")]
    assert "336 parameters" in found.layers[0].new and {row.where for row in found.versions} == {"torch", "inputs"}
    assert {(row.where, row.what) for row in found.findings} == {
        ("task", "small in the old bundle, other in the new one"),
        ("accuracy", "the tasks' calibration inputs differ, and the data of the metric may"),
        ("delegation", "new: not delegated: aten.cumsum"),
    }
    shown = gate.diff_markdown(decoded(found))
    assert "# Diff of small for bench to other for bench" in shown and "not compared: in the old bundle alone" in shown


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("latency", "is not KIND=AMOUNT"),
        ("latencie=5%", "kinds: size, latency"),
        ("latency=5", "has no unit"),
        ("size=5 ms", "unknown unit 'ms'"),
        ("size=-5%", "is negative"),
        ("accuracy_drop=1 ms", "unknown unit"),
    ],
)
def test_a_limit_that_cannot_be_read_is_refused(written, message):
    with pytest.raises(UsageError, match=message):
        parse(written)


def decoded(found):
    import msgspec

    return msgspec.json.decode(to_json(found))
