"""Which layer an operator computes, on the lists of real models as XNNPACK names them."""

from edgebuild.devices.operators import attributed
from edgebuild.spec import LayerFacts, OperatorTime


def operator(name: str) -> OperatorTime:
    return OperatorTime(name, 1e-3, {}, {}, 0, 0, 0, 0, 0, 0, 0)


def layers_of(*names: str) -> list[str]:
    """The layers that operators of these names are given, on the model below."""
    return [found.layer for found in attributed([operator(name) for name in names], LAYERS)]


def layer(name: str, op: str, **more: int) -> LayerFacts:
    return LayerFacts(name, op, 8, 8, **more)


LAYERS = [
    layer("stem", "conv2d"),
    layer("swish", "hardswish"),
    layer("wise", "conv2d", groups=8),
    layer("pool", "adaptive_avg_pool2d"),
    layer("squeeze", "conv2d"),
    layer("gate", "hardsigmoid"),
    layer("scale", "mul"),
    layer("point", "conv2d"),
    layer("sum", "add"),
    layer("act", "silu"),
    layer("head", "linear"),
]


def test_layers_with_weights_are_matched_one_by_one_and_the_rest_between_them():
    found = layers_of(
        "set-up of the delegate",
        "Transpose (ND, X32) #1",
        "Convolution (NHWC, F32) IGEMM #1",
        "HardSwish (NC) #1",
        "Convolution (NHWC, F32) DWConv #1",
        "Mean (ND) Reduce2 #1",
        "Fully Connected (NC, F32) GEMM #1",
        "Transpose (ND, X32) #2",
        "Add (ND) #1",
        "Clamp (NC) #1",
        "Divide (ND) #1",
        "Multiply (ND) #1",
        "Fully Connected (NC, F32) GEMM #2",
        "Add (ND) #2",
        "Sigmoid (NC) #1",
        "Multiply (ND) #2",
        "Fully Connected (NC, F32) GEMM #3",
        "end of the inference",
    )
    assert found == [
        *("", "", "stem", "swish", "wise", "pool", "squeeze", "", "gate", "gate", "gate", "scale"),
        *("point", "sum", "act", "act", "head", ""),
    ]


def test_where_the_numbers_differ_nothing_is_named():
    assert layers_of("Convolution (NHWC, F32) IGEMM #1", "Add (ND) #1") == ["", ""]


def test_a_depthwise_operator_is_never_given_to_another_layer():
    names = ["Convolution (NHWC, F32) DWConv #1", *(f"Fully Connected (NC, F32) GEMM #{i}" for i in range(1, 5))]
    assert layers_of(*names) == [""] * 5
