"""A microcontroller's program runs in the memory that was planned for it, by its own instructions."""

from dataclasses import replace

import boards
import numpy as np
import pytest
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary, serialize_pte_binary

from edgebuild import judge, verify
from edgebuild.devices import DEVICES, as_file
from edgebuild.errors import DeviceError


def overlapping(data: bytes) -> bytes:
    """The program with every tensor of its arena at the start of it."""
    program = deserialize_pte_binary(data).program
    for value in program.execution_plan[0].values:
        place = getattr(value.val, "allocation_info", None)
        if place is not None:
            place.memory_offset_low = 0
    return bytes(serialize_pte_binary(PTEFile(program=program)))


def unchanged(data: bytes) -> bytes:
    return bytes(serialize_pte_binary(PTEFile(program=deserialize_pte_binary(data).program)))


def outputs(found: boards.Lowered, data: bytes) -> list:
    with replace(found, artifact=replace(found.artifact, data=data)).session() as session:
        return verify.run(session, found.samples)


def test_tensors_lie_where_the_program_puts_them():
    found = boards.lowered("resnet8", boards.M7)
    eager = verify.eager(found.graph, found.samples)
    right = outputs(found, unchanged(found.artifact.data))
    least = judge.LEAST_SQNR_DB["int8"]
    assert judge.parity(right, eager, "", "eager", least, logits=True).ok
    assert all(np.array_equal(a, b) for (a,), (b,) in zip(outputs(found, found.artifact.data), right, strict=True))
    wrong = outputs(found, overlapping(found.artifact.data))
    assert not judge.parity(wrong, eager, "", "eager", least, logits=True).ok


def test_an_arena_that_is_too_small_is_an_error():
    found = boards.lowered("lenet", boards.M7)
    program = deserialize_pte_binary(found.artifact.data).program
    program.execution_plan[0].non_const_buffer_sizes[1] //= 2
    with pytest.raises(DeviceError, match="lenet|model.pte on stm32f746"):
        outputs(found, bytes(serialize_pte_binary(PTEFile(program=program))))


def test_what_a_program_says_of_itself():
    found = boards.lowered("lenet", boards.M7)
    with found.session() as session:
        facts, _ = session.ask("facts")
    assert facts["planned"] == found.artifact.planned_memory and facts["flags"] == []
    assert facts["outside"].count("cortex_m::quantized_linear.out") == 0
    assert sum("linear" in name for name in facts["outside"]) == 2
    measured = found.measured()
    assert measured["sram"].value == found.artifact.planned_memory and measured["sram"].method == "counted"
    assert measured["flash"].value == len(found.artifact.data)
    assert set(measured) == {"sram", "peak_memory", "flash"}, "no latency is claimed"


@pytest.fixture(scope="module")
def on_npu() -> boards.Lowered:
    return boards.lowered("ds_cnn 32 channels", boards.U55)


def test_an_npu_computes_what_eager_does(on_npu):
    with on_npu.session() as session:
        found = verify.run(session, on_npu.samples)
    eager = verify.eager(on_npu.graph, on_npu.samples)
    assert judge.parity(found, eager, "", "eager", judge.LEAST_SQNR_DB["int8"], logits=True).ok


def test_a_graph_that_is_not_beside_the_program_is_missed(on_npu):
    alone = replace(on_npu, artifact=replace(on_npu.artifact, graphs=()))
    with (
        pytest.raises(DeviceError, match="TOSA graph of delegate 0 is not beside the program"),
        alone.session() as session,
    ):
        verify.run(session, on_npu.samples)
    with pytest.raises(DeviceError, match="does not make of its TOSA graphs what the program holds"):
        alone.measured()


def test_a_graph_that_is_no_tosa_is_an_error(on_npu):
    garbage = replace(on_npu, artifact=replace(on_npu.artifact, graphs=(b"no TOSA at all",)))
    with pytest.raises(DeviceError), garbage.session() as session:
        verify.run(session, on_npu.samples)
    with pytest.raises(DeviceError, match="Vela"):
        garbage.measured()


def test_the_graph_of_another_model_is_refused(on_npu):
    other = boards.lowered("resnet8", boards.U55)
    with (
        as_file(on_npu.artifact.data, ".pte", other.artifact.graphs) as path,
        pytest.raises(DeviceError, match="does not make of its TOSA graphs what the program holds.*build it again"),
    ):
        DEVICES["ethos_u"].measure(path, on_npu.target, 1, [], ())


def test_another_npu_than_the_program_was_built_for_is_noticed(on_npu):
    target, _ = boards.on(boards.U85)
    with pytest.raises(DeviceError, match="built for another NPU"):
        replace(on_npu, target=target).measured()
