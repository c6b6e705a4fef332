from pathlib import Path

import pytest

from edgebuild import catalog
from edgebuild.devices import DEVICES
from edgebuild.errors import SpecError, UsageError
from edgebuild.units import Bytes, Seconds, parse_drop

EXAMPLES = Path(__file__).parent.parent / "examples"
GOOD = 'name = "p"\ntitle = "t"\ntarget = "host"\nartifact = "pte"\n[budgets]\nsize = "1 MiB"\n'


@pytest.mark.parametrize("name", catalog.names("targets"))
def test_every_shipped_target_loads_and_says_where_its_figures_are_from(name):
    target = catalog.load_target(name)
    assert target.name == name and target.device in DEVICES
    for cluster in target.cluster:
        assert cluster.clock.rate > 1e8 and cluster.count > 0
        for figure in (cluster.clock, cluster.l1d, cluster.l2, cluster.identity):
            assert len(figure.source) > 10
    if target.device == "arm":
        assert target.memory is not None and len(target.memory.source) > 10
        assert target.latency_error > 0 and target.latency_error_source


@pytest.mark.parametrize("name", catalog.names("profiles"))
def test_every_shipped_profile_loads(name):
    profile = catalog.load_profile(name)
    assert profile.name == name and profile.budgets


def test_what_must_be_shipped_is():
    assert set(catalog.names("targets")) >= {
        "host", "raspberry-pi-4", "raspberry-pi-3b-plus", "pixel", "pixel-2", "pixel-3a",
    }  # fmt: skip
    assert set(catalog.names("profiles")) >= {"mobile-cpu", "mobile-cpu-tight", "raspberry-pi-4", "edge-1mb"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/profiles/*.toml")), ids=lambda path: path.stem)
def test_every_profile_of_the_examples_loads(path):
    assert catalog.load_profile(str(path)).name == path.stem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("size", "sise"), r"unknown budget 'sise' \(perhaps you meant 'size'\)"),
        (('"1 MiB"', "1048576"), r"budgets.size: a bare number, 1048576, has no unit \(write .*KiB"),
        (('"1 MiB"', '"1 megabyte"'), "unknown unit 'megabyte'"),
        (('"1 MiB"', '"-1 MiB"'), "negative"),
        (("target", "tragte"), r"unknown key 'tragte' \(perhaps you meant 'target'\)"),
        (('"host"', '"hots"'), r"unknown target 'hots' \(perhaps you meant 'host'\)"),
        (('"pte"', '"onnx"'), "artifact"),
        (("title", "threads = 0.5\ntitle"), "threads"),
        (("[budgets]", "time = 20\n[budgets]"), "a bare number, 20, has no unit"),
        (("[budgets]", "[distillation]\nsteppes = 3\n[budgets]"), "distillation.steppes"),
        (('size = "1 MiB"', ""), "no budgets"),
        (('size = "1 MiB"', 'accuracy_drop = "0.03"'), "which kind of drop"),
        (("name", "name name"), "line 1"),
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_named_with_its_place_and_its_mend(tmp_path, change, message):
    path = tmp_path / "p.toml"
    path.write_text(GOOD.replace(*change, 1))
    with pytest.raises((SpecError, UsageError), match=message) as caught:
        catalog.load_profile(str(path))
    assert "p.toml" in str(caught.value) or "hots" in str(caught.value)
    assert caught.value.exit_code == 2


def test_torchscript_cannot_be_asked_of_a_phone(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(GOOD.replace("pte", "torchscript").replace("host", "pixel"))
    with pytest.raises(SpecError, match="TorchScript artifact cannot be run on target 'pixel'"):
        catalog.load_profile(str(path))


def test_an_unknown_profile_gets_a_suggestion():
    with pytest.raises(UsageError, match="unknown profile 'mobile-cup'.*perhaps you meant 'mobile-cpu'"):
        catalog.load_profile("mobile-cup")


def test_quantities_are_read_and_shown_as_people_write_them():
    assert Bytes.parse("4 MiB") == 4 * 2**20 and str(Bytes.parse("4 MiB")) == "4 MiB"
    assert Seconds.parse("20 ms") == pytest.approx(0.02) and str(Seconds(0.02)) == "20 ms"
    assert parse_drop("1.5 points") == pytest.approx(0.015)
    assert type(parse_drop("2 %")) is not type(parse_drop("2 points"))
