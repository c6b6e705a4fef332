"""A small run of `scripts/fuzz_bundles.py`, and that it would notice."""

import sys
import time
from pathlib import Path

import pytest
from bundles import runnable

from edgebuild import bundle
from edgebuild.errors import SpecError

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import fuzz_bundles
from fuzz_bundles import Tally, fuzz, judge


def test_no_mutant_does_harm(tmp_path: Path) -> None:
    bundle.write(tmp_path / "out", *runnable())
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    tally = fuzz(tmp_path / "out", count=120, programs=10, seed=1)
    assert tally.failures == []
    counts = {kind: sum(outcomes.values()) for kind, outcomes in tally.outcomes.items()}
    assert sum(counts.values()) == 130 and counts["program, right hashes"] == 10
    assert sum(outcomes["refused"] for outcomes in tally.outcomes.values()) > 80
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def raises(error: BaseException) -> str:
    raise error


@pytest.mark.parametrize(
    ("read", "noticed"),
    [
        (lambda: raises(ZeroDivisionError("x")), "ZeroDivisionError: x"),
        (lambda: raises(RecursionError("deep")), "RecursionError: deep"),
        (lambda: raises(SystemExit(3)), "SystemExit: 3"),
        (lambda: raises(SpecError("two\nlines")), "no line to read"),
        (lambda: raises(SpecError("x" * 2000)), "no line to read"),
        (lambda: str(time.sleep(9)), "more than 0.2 s"),
    ],
)
def test_a_defect_is_noticed(monkeypatch: pytest.MonkeyPatch, read, noticed: str) -> None:
    monkeypatch.setattr(fuzz_bundles, "TIME", 0.2)
    tally = Tally()
    judge(("reader", read), "0.1", tally)
    assert len(tally.failures) == 1 and noticed in tally.failures[0] and tally.failures[0].startswith("0.1: reader")


def test_what_is_written_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle.write(tmp_path / "out", *runnable())
    monkeypatch.setattr(fuzz_bundles, "_loaded", lambda *_: (tmp_path / "outside").write_text("x") and "identical")
    tally = fuzz(tmp_path / "out", count=1, programs=0, seed=0)
    assert len(tally.failures) == 1 and f"open {tmp_path}/outside" in tally.failures[0]
