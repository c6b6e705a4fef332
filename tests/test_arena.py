"""SRAM and flash as they are predicted, against what the backends planned."""

import boards
import pytest
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.scalar_type import ScalarType

from edgebuild import arena, costs
from edgebuild.plan import Choice

LITTLE = ["resnet8", "ds_cnn 32 channels", "lenet"]


def predicted(found: boards.Lowered, quantity: str) -> float:
    return {"sram": arena.sram, "flash": arena.flash}[quantity](found.facts, found.target).of(
        Choice(found.facts, "int8")
    )


@pytest.mark.parametrize("model", LITTLE)
def test_sram_of_a_cortex_m_is_known_to_the_byte(model):
    found = boards.lowered(model, boards.M7)
    assert predicted(found, "sram") == found.artifact.planned_memory > 1_000


@pytest.mark.parametrize("model", LITTLE)
def test_sram_of_an_npu_within_5_percent(model):
    found = boards.lowered(model, boards.U55)
    assert predicted(found, "sram") == pytest.approx(found.measured()["sram"].value, rel=0.05)


@pytest.mark.parametrize("target", [boards.M7, boards.U55])
def test_flash_within_a_tenth(target):
    found = boards.lowered("ds_cnn 32 channels", target)
    assert predicted(found, "flash") == pytest.approx(len(found.artifact.data), rel=0.1)
    found = boards.lowered("resnet8", target)
    assert predicted(found, "flash") == pytest.approx(len(found.artifact.data), rel=0.1)


@pytest.mark.parametrize(
    ("model", "target"), [("resnet8", boards.M7), ("ds_cnn 32 channels", boards.M7), ("ds_cnn 32 channels", boards.M4)]
)
def test_scratch_by_layer_is_what_the_program_allocates(model, target):
    """The buffers that no operator makes as its output, in the order of the operators that take them."""
    found = boards.lowered(model, target)
    wanted = [arena.scratch(layer, found.target) for layer in found.facts.layers]
    assert [size for size in wanted if size] == allocated(found)


def allocated(found: boards.Lowered) -> list[int]:
    """Bytes of each scratch buffer of a program."""
    plan = deserialize_pte_binary(found.artifact.data).program.execution_plan[0]
    values = [value.val for value in plan.values]
    sizes = []
    made = set(plan.inputs)
    for instruction in plan.chains[0].instructions:
        args = instruction.instr_args.args
        for i in dict.fromkeys(args[:-2]):  # the last two are the output, which the operator is given and gives back
            scratch = getattr(values[i], "scalar_type", None) == ScalarType.BYTE and values[i].allocation_info
            if scratch and i not in made and values[i].sizes[0]:
                sizes.append(values[i].sizes[0])
        made |= {args[-1]}
    return sizes


def test_a_microcontrollers_limits_are_the_arenas():
    from edgebuild.spec import Budget, Profile

    found = boards.lowered("lenet", boards.M7)
    budgets = tuple(Budget(kind, 65_536) for kind in ("size", "flash", "sram", "peak_memory"))
    limits = costs.limits(Profile("p", "p", boards.M7, "pte", budgets), [found.target], found.facts, {})
    amounts = {limit.kind: limit.predicted(Choice(found.facts, "int8")) for limit in limits}
    assert amounts["sram"] == amounts["peak_memory"] == found.artifact.planned_memory
    assert amounts["flash"] == amounts["size"] == pytest.approx(len(found.artifact.data), rel=0.1)
