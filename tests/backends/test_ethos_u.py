"""What Vela is given and says: delegates in their order, what stays on the CPU, names that it does not know."""

from dataclasses import replace

import boards
import pytest
import torch
from torch import Tensor, nn

from edgebuild import catalog, judge, vela, verify
from edgebuild.devices import DEVICES, as_file
from edgebuild.errors import BackendError, DeviceError, SpecError

SHAPE = (1, 3, 16, 16)


class Sorting(nn.Module):
    """A sort along the image, which the NPU does not take, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.behind = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sort(torch.relu(self.before(x)), 2)[0]
        return self.behind(x)


@pytest.fixture(scope="module")
def split() -> boards.Lowered:
    torch.manual_seed(0)
    return boards.lower(Sorting(), SHAPE, boards.U55)


def test_what_the_npu_does_not_take_is_named(split):
    (found,) = [line for line in split.artifact.fallen_back if "sort" in line]
    assert found.startswith("1 x sort (") and "test_ethos_u.py" in found and "in forward" in found
    assert "BaseTOSASupportList" in found, "the partitioner's own reason"
    assert "in its place: the application's own code behind the model" in found
    elements = 8 * 16 * 16  # values in fp32 and indices in int64, of values in fp32
    assert f"on the CPU {2 * elements:,} elements are computed, with {16 * elements:,} bytes" in found
    assert split.artifact.not_delegated == 1, "conversions at the ends of a delegate are no operators that fell back"


def test_two_delegates_have_two_graphs_in_the_programs_order(split):
    first, second = split.artifact.graphs
    npu = split.target.npu
    macs = [sum(row.macs for row in vela.estimate(graph, npu).operators) for graph in (first, second)]
    assert macs == [16 * 16 * 8 * 27, 7 * 7 * 4 * 72]
    with split.session() as session:
        found = verify.run(session, split.samples)
    eager = verify.eager(split.graph, split.samples)
    assert judge.parity(found, eager, "", "eager", judge.LEAST_SQNR_DB["int8"], logits=False).ok
    swapped = replace(split, artifact=replace(split.artifact, graphs=(second, first)))
    with pytest.raises(DeviceError), swapped.session() as session:
        verify.run(session, split.samples)


def test_latency_says_whose_estimate_it_is_and_what_is_not_in_it(split):
    latency = split.measured()["latency"]
    assert latency.method == "estimated" and latency.error == split.target.latency_error
    said = latency.detail
    assert vela.name() in said and "no measurement" in said and "Shared_Sram" in said
    assert "5 operators on the CPU are not in it" in said, "two conversions at each delegate's ends, and the sort"
    assert sum(row.seconds for row in latency.operators) == pytest.approx(latency.value, rel=0.05)


def test_a_program_that_takes_too_much_sram_is_compiled_to_fit_and_says_what_that_costs():
    fastest = boards.lowered("resnet8", boards.U55)
    before = fastest.measured()
    assert "compiled to fit" not in before["latency"].detail
    bound = 0.8 * before["sram"].value
    held = replace(fastest, artifact=fastest.backend.lower(fastest.graph, fastest.samples[0], bound))
    after = held.measured()  # which compiles again, and refuses what the program does not hold
    assert after["sram"].value <= bound < before["sram"].value
    more = after["latency"].value / before["latency"].value - 1
    assert f"compiled to fit the SRAM: {more:+.1%} cycles against the fastest" in after["latency"].detail
    with held.session() as session, fastest.session() as other:
        for found, expected in zip(verify.run(session, held.samples), verify.run(other, held.samples), strict=True):
            assert all((a == b).all() for a, b in zip(found, expected, strict=True)), "the same outputs"


def test_sram_that_is_enough_changes_nothing():
    fastest = boards.lowered("resnet8", boards.U55)
    again = fastest.backend.lower(fastest.graph, fastest.samples[0], fastest.measured()["sram"].value)
    assert again.data == fastest.artifact.data


def test_images_are_not_transposed():
    estimate = vela.estimate(
        boards.lowered("resnet8", boards.U55).artifact.graphs[0], catalog.load_target(boards.U55).npu
    )
    names = [row.name for row in estimate.operators]
    assert len(names) > 9 and not any("ranspose" in name for name in names)
    turned = boards.lower(Turned(), SHAPE, boards.U55)
    found = vela.estimate(turned.artifact.graphs[0], turned.target.npu)
    assert any("ranspose" in row.name for row in found.operators), "Vela names those that there are"


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).transpose(1, 3)


@pytest.mark.parametrize(
    ("field", "name", "known"),
    [
        ("system_config", "Ethos_U55_Highest", "Ethos_U55_High_End_Embedded"),
        ("memory_mode", "Shared_Ram", "Shared_Sram"),
        ("accelerator", "ethos-u56-128", "ethos-u55-128"),
    ],
)
def test_a_name_that_vela_does_not_know_is_refused_with_those_that_it_knows(field, name, known, tmp_path):
    boards.on(boards.U55)
    text = (catalog.folder("targets") / f"{boards.U55}.toml").read_text()
    (tmp_path / "t.toml").write_text(text.replace(known, name, 1))
    target = catalog.load_target(str(tmp_path / "t.toml"))
    assert getattr(target.npu, field) == name
    with pytest.raises(SpecError, match=f"{name}.*{known}"):
        DEVICES["ethos_u"].check(target)


def test_a_failing_vela_is_an_error_that_says_so(split):
    with pytest.raises(BackendError, match="Vela"):
        vela.estimate(b"no TOSA at all", split.target.npu)
    with pytest.raises(BackendError, match="Vela"):
        vela.estimate(split.artifact.graphs[0][:200], split.target.npu)
    unknown = replace(split.target.npu, accelerator="ethos-u55-127")
    with pytest.raises(BackendError, match="Vela failed.*ethos-u55-127"):
        vela.estimate(split.artifact.graphs[0], unknown)


def test_graphs_that_are_not_the_programs_are_refused(split):
    other = boards.lowered("resnet8", boards.U55)
    device = DEVICES["ethos_u"]
    with (
        as_file(other.artifact.data, ".pte", split.artifact.graphs) as path,
        pytest.raises(DeviceError, match="does not make of its TOSA graphs what the program holds"),
    ):
        device.measure(path, other.target, 1, [], ())
