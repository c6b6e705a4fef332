"""A bundle's artifact measured again: verdicts, confidence, wrong outputs, and what noise may not do."""

import pytest
from safetensors.numpy import load, save

from edgebuild import checking, settings
from edgebuild.errors import SpecError, UsageError


def quietly(message: str, seconds: float) -> None:
    pass


@pytest.fixture(scope="module")
def found(made):
    return checking.check(made.files, settings.read(made.files), quietly)


def test_every_budget_has_a_verdict_from_a_figure_of_now(found, made):
    assert found.outcome == "met" and found.summary == "every budget of bench is met"
    by_kind = {verdict.kind: verdict for verdict in found.verdicts}
    assert list(by_kind) == [
        *("size", "latency", "latency_p95", "throughput", "peak_memory", "accuracy_drop", "min_delegated")
    ]
    assert by_kind["size"].value == len(made.files["small.pte"])
    assert by_kind["latency"].method == "measured" and by_kind["latency"].value != 0.002
    assert all(row.ok and row.samples == 8 for row in found.parity) and len(found.parity) == 1
    assert found.build_id == made.report.build_id and found.reported == made.report.verdicts


def test_what_cannot_be_measured_again_says_so(found):
    accuracy = next(verdict for verdict in found.verdicts if verdict.kind == "accuracy_drop")
    assert accuracy.method == "reported" and accuracy.status == "pass" and accuracy.value == pytest.approx(0.01)
    assert "over 500 samples; not measured again" in accuracy.note
    delegated = next(verdict for verdict in found.verdicts if verdict.kind == "min_delegated")
    assert delegated.method == "reported" and delegated.value == 1.0


def test_a_timed_figure_lies_in_its_interval(found):
    (verdict,) = [verdict for verdict in found.verdicts if verdict.kind == "latency"]
    (interval,) = [row for row in found.intervals if row.quantity == "latency"]
    assert interval.low <= verdict.value <= interval.high and "95% interval" in verdict.note
    assert not [row for row in found.intervals if row.quantity == "peak_memory"]


def test_a_tighter_profile_and_wrong_outputs_break_it(made, tmp_path):
    profile = made.files["profile.toml"].decode().replace('size = "1 MiB"', 'size = "1 KiB"')
    profile = profile.replace("targets/host.toml", "host").replace(
        'accuracy_drop = "2 points"', 'accuracy_drop = "1 %"'
    )
    (tmp_path / "tight.toml").write_text(profile)
    vectors = {
        name: -x if name.startswith("output") else x for name, x in load(made.files["vectors.safetensors"]).items()
    }
    files = made.files | {"vectors.safetensors": save(vectors)}
    found = checking.check(files, settings.read(files, str(tmp_path / "tight.toml")), quietly)
    assert found.outcome == "broken" and found.summary == "size, accuracy drop, outputs on host failed"
    assert {verdict.kind for verdict in found.verdicts if verdict.status == "fail"} == {"size", "accuracy_drop"}
    assert not found.parity[0].ok and found.parity[0].sqnr_db < 0


def test_a_simulated_target_needs_no_interval_and_says_the_same_again(made):
    chosen = settings.read(made.files, devices=["pixel-3a"])
    first, second = (checking.check(made.files, chosen, quietly, here=False) for _ in range(2))
    assert first.targets == ("pixel-3a",) and first.intervals == () and len(first.parity) == 1
    assert first.verdicts == second.verdicts and first.measurements == second.measurements
    assert next(v for v in first.verdicts if v.kind == "latency").method == "simulated"
    assert next(v for v in first.verdicts if v.kind == "latency_p95").status == "inconclusive"


def test_an_artifact_that_does_not_run_fails_its_targets(made):
    data = made.files["small.pte"][:100]
    files = made.changed(artifact_sha256=checking.hashlib.sha256(data).hexdigest()) | {"small.pte": data}
    found = checking.check(files, settings.read(files), quietly)
    latency = next(verdict for verdict in found.verdicts if verdict.kind == "latency")
    assert found.outcome == "broken" and latency.status == "fail" and "could not be run" in latency.note
    assert [finding.kind for finding in found.findings] == ["skipped"]


def test_what_contradicts_itself_is_refused_before_anything_runs(made, tmp_path):
    chosen = settings.read(made.files)
    for files, message in (
        (made.changed(artifact_sha256="0" * 64), "is not the artifact that report.json is about"),
        (made.changed(artifact="other.pte"), "no other.pte"),
        (made.changed(plan=None), "has no plan"),
        (made.files | {"vectors.safetensors": save({})}, "no test vectors"),
        ({"report.json": made.files["report.json"]}, "no small.pte"),
    ):
        with pytest.raises(SpecError, match=message):
            checking.check(files, chosen, quietly)
    profile = made.files["profile.toml"].decode().replace("targets/host.toml", "host").replace('"pte"', '"torchscript"')
    (tmp_path / "p.toml").write_text(profile)
    with pytest.raises(UsageError, match="a profile for torchscript, and the bundle holds small.pte"):
        checking.check(made.files, settings.read(made.files, str(tmp_path / "p.toml")), quietly)
