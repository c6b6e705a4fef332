"""The latency estimate, on layers whose answer can be worked out by hand."""

from dataclasses import replace

import pytest

from edgebuild.devices import roofline
from edgebuild.spec import Cache, Clock, Cluster, Identity, LayerFacts, Memory, Rates
from edgebuild.units import Bandwidth, Bytes, Hertz, PerCycle

CLUSTER = Cluster(
    name="big",
    core="made up",
    count=4,
    count_source="",
    qemu_cpu="cortex-a72",
    clock=Clock(Hertz(1e9), ""),
    macs=Rates(PerCycle(4), PerCycle(8), ""),
    l1d=Cache(Bytes(32768), ""),
    l2=Cache(Bytes(1048576), ""),
    identity=Identity("0x41", "0xd08", "0x0", "0x3", "fp asimd", ""),
)
MEMORY = Memory(size=Bytes(2**30), one_core=Bandwidth(4e9), all_cores=Bandwidth(6e9), source="")
CONV = LayerFacts("conv", "conv2d", 64, 64, kernel=(3, 3), positions=1024, in_elements=65536, out_elements=65536)
LINEAR = LayerFacts("fc", "linear", 1024, 1024, in_elements=1024, out_elements=1024)
ADD = LayerFacts("add", "add", 64, 64, in_elements=131072, out_elements=65536)


def _seconds(layer, precision="fp32", threads=1):
    return roofline.seconds(layer, precision, CLUSTER, MEMORY, threads)


def test_a_convolution_is_bound_by_its_multiply_accumulates():
    macs = 64 * 64 * 9 * 1024
    assert _seconds(CONV) == pytest.approx(roofline.OVERHEAD + macs / (4e9 * roofline.DENSE_EFFICIENCY))
    assert _seconds(CONV, "int8") == pytest.approx(roofline.OVERHEAD + macs / (8e9 * roofline.DENSE_EFFICIENCY))


def test_a_linear_layer_of_one_row_is_bound_by_its_weights():
    assert _seconds(LINEAR) == pytest.approx(roofline.OVERHEAD + 4 * (1024 * 1024 + 2048) / 4e9)


def test_cores_multiply_and_share_the_memory():
    assert _seconds(CONV, threads=4) - roofline.OVERHEAD == pytest.approx((_seconds(CONV) - roofline.OVERHEAD) / 4)
    assert _seconds(LINEAR, threads=4) == pytest.approx(roofline.OVERHEAD + 4 * (1024 * 1024 + 2048) / 6e9)
    assert _seconds(CONV, threads=16) == _seconds(CONV, threads=4)


def test_layers_without_weights_cost_the_bytes_that_they_move():
    assert _seconds(ADD) == pytest.approx(roofline.OVERHEAD + 4 * 3 * 65536 / 4e9)
    assert _seconds(ADD, "int8") == pytest.approx(roofline.OVERHEAD + 3 * 65536 / 4e9)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_channels_come_in_whole_tiles(precision):
    tile = roofline.CHANNEL_TILE[precision]
    one, full, more = (_seconds(CONV.at(64, channels), precision) for channels in (1, tile, tile + 1))
    assert one == full
    assert more - roofline.OVERHEAD == pytest.approx(2 * (full - roofline.OVERHEAD))


def test_tiles_do_not_cross_groups_and_depthwise_channels_tile_together():
    grouped = replace(CONV, groups=16)  # 4 channels a group
    assert roofline.padded_macs(grouped, "fp32") == 2 * grouped.macs
    depthwise = replace(CONV, in_channels=60, out_channels=60, groups=60)
    assert depthwise.depthwise
    assert roofline.padded_macs(depthwise, "fp32") == 64 * 9 * 1024


def test_a_depthwise_multiply_accumulate_costs_more_than_a_dense_one():
    depthwise = replace(CONV, groups=64)
    per_mac = (_seconds(depthwise) - roofline.OVERHEAD) / depthwise.macs
    assert per_mac > (_seconds(CONV) - roofline.OVERHEAD) / CONV.macs
