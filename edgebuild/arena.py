"""What a model takes of a microcontroller: SRAM at the worst step of its schedule, and flash. In bytes.

On a Cortex-M the memory planner lays out every tensor and every operator's scratch, so that SRAM is what is alive at
the worst step. In front of an Ethos-U it plans the model's inputs and outputs alone: the NPU's own tensors, and the
weights that it fetches ahead of an operator, are Vela's to place.
"""

from math import ceil

from edgebuild.devices import cortex_m
from edgebuild.devices.ethos_u import SCALES
from edgebuild.plan import Choice, tensor_bytes
from edgebuild.space import Phase, Planned, Resource
from edgebuild.spec import LayerFacts, ModelFacts, Precision, Target

# Of a `.pte`, as lowered programs have it: the empty one, and what is said of an operator with and without weights.
_SAID = {"cortex_m": (1_800, 440, 560), "ethos_u": (2_000, 340, 150)}
_SEGMENT = 16  # constants begin at multiples of it
_BRICK = 16  # channels that the NPU's own layout of a feature map (NHCWB16) is made of
_FETCHED = 1.15  # bytes of SRAM for one of weights and scales that are fetched ahead, as they are padded
_U85_DEPTH = 64  # an Ethos-U85 reads the weights of an output in so many, the last filled up
_SPLIT, _STREAMED = 16_384, 32_768  # from so many on they come in parts, and are read where they lie


def sram(facts: ModelFacts, target: Target) -> Resource:
    """SRAM of one inference: what is planned, and what the NPU takes."""
    if target.device == "cortex_m":
        plan = Planned(lambda layer, _: scratch(layer, target), tensor_bytes, joined=False)
        return Resource(_nothing, 0.0, (Phase(_nothing, live=True, planned=plan, inputs="read"),))
    inputs = Choice(facts, "fp32").input_bytes()
    # the inputs as they come and in int8; the outputs take their place. The NPU has a copy of the latter.
    depth = _U85_DEPTH if target.npu and "u85" in target.npu.accelerator else 1
    plan = Planned(lambda layer, _: _fetched(layer, depth), _bricks, joined=True)
    return Resource(_nothing, inputs + inputs // 4, (Phase(_nothing, live=True, planned=plan, inputs="elsewhere"),))


def _nothing(layer: LayerFacts, precision: Precision) -> float:
    return 0.0


def _fetched(layer: LayerFacts, depth: int) -> float:
    """Bytes of an operator's weights that are in SRAM while it runs: those that are read more than once."""
    if not layer.weighted or layer.positions == 1:
        return 0.0
    each = layer.weights // layer.out_channels
    stored = layer.out_channels * (SCALES + (each if layer.depthwise else _padded(each, depth)))
    return 0.0 if stored > _STREAMED else _FETCHED * stored if stored <= _SPLIT else 0.75 * stored


def _bricks(layer: LayerFacts, precision: Precision) -> int:
    """Bytes of a feature map in the NPU's layout; what the CPU hands over and gets has none."""
    if precision == "fp32":
        return 0
    if len(layer.out_shape) != 4 or layer.op == "quantize":
        return layer.out_elements
    return layer.out_elements // layer.out_channels * _padded(layer.out_channels, _BRICK)


def scratch(layer: LayerFacts, target: Target) -> int:
    """Bytes that the operator of a layer takes while it runs."""
    return cortex_m.scratch_bytes(layer, target)


def flash(facts: ModelFacts, target: Target) -> Resource:
    """Bytes of the `.pte`, which is read where it lies."""
    empty, weighted, operator = _SAID[target.device]

    def stored(layer: LayerFacts, precision: Precision) -> float:
        if not layer.weighted:
            return operator
        if target.device == "ethos_u":
            channels = SCALES * layer.out_channels
        else:  # a bias, and for a convolution a multiplier and a shift
            channels = (3 if layer.op == "conv2d" else 1) * _padded(4 * layer.out_channels, _SEGMENT)
        return weighted + _padded(layer.weights, _SEGMENT) + channels

    return Resource(stored, empty)


def _padded(size: int, unit: int) -> int:
    return ceil(size / unit) * unit
