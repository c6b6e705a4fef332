"""The host's cost model, on times that were made up: no clock is read here."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edgebuild.devices import host_rates, layer_model, probes
from edgebuild.devices.layer_model import Tile
from edgebuild.spec import MODEL_INPUT, PRECISIONS, LayerFacts

TILE = Tile(4, 16, 8, edge=True)
# Seconds for: the operator, multiply-accumulates, those of torn tiles, tiles, reads, writes, weights, fetched again,
# positions, inputs; of a depthwise convolution: the operator, multiply-accumulates, taps, outputs, weights, inputs.
DENSE = (2e-7, 2e-11, 1e-11, 2e-9, 3e-11, 5e-11, 4e-11, 0.0, 2e-9, 1e-11)
DEPTHWISE = (3e-7, 6e-11, 6e-10, 1e-10, 4e-10, 2e-11)
PLAIN = (2e-7, 5e-11, 1e-9)


def seconds(layer: LayerFacts) -> float:
    """The time of a layer by known coefficients."""
    kind = layer_model.kind(layer)
    unit = {"gemm": DENSE, "igemm": DENSE, "depthwise": DEPTHWISE}.get(kind, PLAIN)
    terms = layer_model._terms(np.array([layer_model._dimensions(layer)]), TILE)
    return float(terms[0] @ np.array(unit))


@pytest.fixture(scope="module")
def rates() -> layer_model.Rates:
    samples = [(probe.layer, probe.precision, seconds(probe.layer)) for probe in probes.everything()[1:]]
    return layer_model.fit(samples, 5e-6)


def test_the_fit_finds_the_times_and_the_tile(rates: layer_model.Rates) -> None:
    layers = [(probe.layer, probe.precision) for probe in probes.everything()[1:]]
    found = rates.seconds(layers)
    np.testing.assert_allclose(found, [seconds(layer) for layer, _ in layers], rtol=1e-3)
    for key in ("igemm.fp32", "igemm.int8"):
        assert replace(rates.curves[key].tile, room=TILE.room) == TILE
    assert rates.call == 5e-6


def test_layers_that_were_not_timed_are_found_too(rates: layer_model.Rates) -> None:
    layers = [
        probes.conv(36, 44, 12),
        probes.conv(100, 28, 20, 1),
        probes.conv(30, 14, 16, (3, 1)),
        probes.depthwise(80, 20),
        probes.linear(300, 70),
        probes.plain("add", 40, 20),
    ]
    found = rates.seconds([(layer, "int8") for layer in layers])
    np.testing.assert_allclose(found, [seconds(layer) for layer in layers], rtol=0.02)


def test_leaving_one_out_costs_little_where_the_terms_are_right(rates: layer_model.Rates) -> None:
    assert all(error.median < 0.01 for error in rates.errors)
    kinds = {(error.kind, error.precision): error.layers for error in rates.errors}
    assert kinds["depthwise", "fp32"] == len(probes.DEPTHWISE)
    assert kinds["gemm", "int8"] + kinds["igemm", "int8"] == len(probes.DENSE)


def test_what_the_terms_miss_is_interpolated() -> None:
    """A kernel that is half as fast above some depth, which no term knows of."""
    layers = [probes.conv(channels, 64, 8) for channels in range(8, 257, 8)]
    samples = [(layer, "fp32", seconds(layer) * (1 + (layer.in_channels > 100))) for layer in layers]
    rates = layer_model.fit([(layer, "fp32", time) for layer, _, time in samples], 0.0)
    found = rates.seconds([(probes.conv(60, 64, 8), "fp32"), (probes.conv(204, 64, 8), "fp32")])
    expected = [seconds(probes.conv(60, 64, 8)), 2 * seconds(probes.conv(204, 64, 8))]
    np.testing.assert_allclose(found, expected, rtol=0.1)


def test_noise_leaves_no_cost_below_zero_and_more_work_costs_more() -> None:
    noise = np.random.default_rng(0)
    samples = [
        (probe.layer, probe.precision, seconds(probe.layer) * float(noise.uniform(0.8, 1.25)))
        for probe in probes.everything()[1:]
    ]
    rates = layer_model.fit(samples, 5e-6)
    assert all(min(curve.unit) >= 0 for curve in rates.curves.values())
    for precision in PRECISIONS:
        widths = [(probes.conv(width, width, 16), precision) for width in (1, 16, 128, 1024, 4096)]
        found = rates.seconds(widths)
        assert found[0] > 0 and (np.diff(found) > 0).all()


def test_what_reads_the_input_pays_for_it(rates: layer_model.Rates) -> None:
    layer = probes.conv(3, 16, 32)
    first = replace(layer, sources=(MODEL_INPUT,))
    inside, outside = rates.seconds([(layer, "fp32"), (first, "fp32")])
    assert outside - inside == pytest.approx(seconds(probes.plain("input", 3, 32)), rel=0.05)


def test_a_scale_for_each_channel_is_another_kind_than_a_product() -> None:
    assert layer_model.kind(probes.plain("mul", 8, 4)) == "mul"
    assert layer_model.kind(probes.plain("scale", 8, 4)) == "scale"


def test_rates_survive_the_store(
    rates: layer_model.Rates, tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEBUILD_CACHE", str(tmp_path))
    assert host_rates.read(3) is None
    host_rates.write(rates, 3)
    assert host_rates.read(3) == rates
    assert host_rates.read(2) is None


def test_rates_are_data(rates: layer_model.Rates) -> None:
    assert msgspec.json.decode(msgspec.json.encode(rates), type=layer_model.Rates) == rates
