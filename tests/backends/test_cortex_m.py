"""Programs for a Cortex-M: int8 operators of CMSIS-NN from end to end, and no constants beside those that are read."""

import boards
import pytest
from executorch.exir._serialize._program import deserialize_pte_binary


def test_images_of_one_channel_are_computed_in_int8_everywhere():
    found = boards.lowered("ds_cnn 32 channels", boards.M7)
    assert found.samples[0][0].shape[1] == 1
    assert found.artifact.fallen_back == () and found.artifact.share_delegated == 1.0
    plan = deserialize_pte_binary(found.artifact.data).program.execution_plan[0]
    assert all(op.name.startswith(("cortex_m::", "executorch_prim::")) for op in plan.operators), plan.operators


@pytest.mark.parametrize("model", ["ds_cnn 32 channels", "lenet", "resnet8"])
def test_every_constant_is_read(model):
    found = boards.lowered(model, boards.M7)
    program = deserialize_pte_binary(found.artifact.data).program
    plan = program.execution_plan[0]
    read = set(plan.outputs)
    for instruction in plan.chains[0].instructions:
        read |= set(getattr(instruction.instr_args, "args", ()))
    values = {i: value.val for i, value in enumerate(plan.values)}
    lists = [values[i] for i in read if type(values[i]).__name__ in ("TensorList", "OptionalTensorList")]
    read |= {i for tensors in lists for i in tensors.items}
    used = {getattr(values[i], "data_buffer_idx", 0) for i in read if i >= 0}
    held = {i for i, buffer in enumerate(program.constant_buffer) if buffer.storage}
    assert len(held) > 5 and held <= used | {0}
    weights = sum(layer.weights for layer in found.facts.layers if layer.weighted)
    assert sum(len(buffer.storage) for buffer in program.constant_buffer) < 1.5 * weights + 2_000


def test_weights_and_inputs_of_the_callers_model_stay_as_they_are():
    from edgebuild.backends import layout

    found = boards.lowered("lenet", boards.M7)
    before = [tensor.stride() for tensor in found.graph.parameters()]
    made = layout.of_weights(found.graph)
    assert [tensor.stride() for tensor in found.graph.parameters()] == before
    for mine, other in zip(made.parameters(), found.graph.parameters(), strict=True):
        assert mine.equal(other)
    (x,) = layout.channels_last(found.samples[0])
    assert x.stride()[1] == 1 and x.equal(found.samples[0][0]) and found.samples[0][0].stride()[1] != 1
