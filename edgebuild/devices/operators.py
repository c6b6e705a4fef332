"""Which layer of the model an operator of XNNPACK computes: both lists run in the order of execution."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

from edgebuild.spec import LayerFacts, OperatorTime

WEIGHTED = ("Convolution", "Fully Connected", "Deconvolution")

# Operators of XNNPACK by how their names begin, and the layers that become them. Several may make up one layer: the
# exporter takes a hardsigmoid apart, and XNNPACK computes a silu in two steps.
UNWEIGHTED: dict[str, frozenset[str]] = {
    "Add": frozenset({"add", "hardsigmoid"}),
    "Clamp": frozenset({"relu", "relu6", "hardtanh", "clamp", "hardsigmoid"}),
    "Concatenate": frozenset({"cat"}),
    "Convert": frozenset({"quantize", "dequantize"}),
    "Divide": frozenset({"div", "truediv", "hardsigmoid"}),
    "ELU": frozenset({"elu"}),
    "GELU": frozenset({"gelu"}),
    "HardSwish": frozenset({"hardswish"}),
    "Leaky ReLU": frozenset({"leaky_relu"}),
    "Max Pooling": frozenset({"max_pool2d"}),
    "Batch Matrix Multiply": frozenset({"bmm"}),
    "Average Pooling": frozenset({"avg_pool2d"}),
    "Global Average Pooling": frozenset({"adaptive_avg_pool2d", "mean"}),
    "Mean": frozenset({"adaptive_avg_pool2d", "mean"}),
    "Multiply": frozenset({"mul", "silu"}),
    "Reciprocal Square Root": frozenset({"rsqrt"}),
    "Sigmoid": frozenset({"sigmoid", "silu"}),
    "Softmax": frozenset({"softmax"}),
    "Square": frozenset({"mul"}),
    "Subtract": frozenset({"sub"}),
    "Tanh": frozenset({"tanh"}),
}


@cache
def parts(layer: LayerFacts) -> tuple[LayerFacts, ...]:
    """The operators that a layer is lowered to, all under its name; mostly it alone.

    An attention is two products and a softmax; a LayerNorm takes its averages by linear layers of one output
    (`backends.xnnpack`).
    """
    rows = layer.out_elements // max(layer.out_channels, 1)
    if layer.op == "attention":
        depth, rows = layer.in_channels // layer.groups, rows * layer.groups
        scores = _linear(layer, "bmm", depth, layer.positions, rows)
        shares = replace(scores, op="softmax", in_channels=layer.positions, in_elements=scores.out_elements)
        return scores, shares, _linear(layer, "bmm", layer.positions, depth, rows)
    if layer.op == "layernorm":
        average = _linear(layer, "linear", layer.out_channels, 1, rows)
        by_row = replace(layer, op="mul", in_elements=layer.out_elements + rows)
        by_channel = replace(layer, op="mul", in_elements=layer.out_elements + layer.out_channels)
        root = replace(layer, op="rsqrt", in_channels=1, out_channels=1, in_elements=rows, out_elements=rows)
        centred, square = replace(by_row, op="sub"), replace(layer, op="mul")
        return average, centred, square, average, root, by_row, by_channel, replace(by_channel, op="add")
    return (layer,)


def _linear(layer: LayerFacts, op: str, into: int, out: int, rows: int) -> LayerFacts:
    return replace(
        layer, op=op, in_channels=into, out_channels=out, groups=1, positions=rows, in_elements=rows * into,
        out_elements=rows * out, bias=op == "linear", in_shape=(rows, into), out_shape=(rows, out),
    )  # fmt: skip


def attributed(operators: Sequence[OperatorTime], layers: Sequence[LayerFacts]) -> tuple[OperatorTime, ...]:
    """The operators with the layers that they compute; those that belong to none keep their own name alone.

    Convolutions and linear layers are matched one by one. Where their number or their kinds differ, nothing is matched:
    a wrong name would be worse than none.
    """
    layers = [part for layer in layers for part in parts(layer)]
    computing = [i for i, operator in enumerate(operators) if operator.name.startswith(WEIGHTED)]
    weighted = [i for i, layer in enumerate(layers) if layer.weighted]
    if len(computing) != len(weighted) or any(
        ("DWConv" in operators[i].name) > layers[k].depthwise for i, k in zip(computing, weighted, strict=True)
    ):
        return tuple(operators)
    found = list(operators)
    ends = zip([*computing, len(operators)], [*weighted, len(layers)], strict=True)
    first, first_layer = 0, 0
    for last, last_layer in ends:
        _between(found, first, last, layers[first_layer:last_layer])
        if last < len(found):
            found[last] = replace(found[last], layer=layers[last_layer].name)
        first, first_layer = last + 1, last_layer + 1
    return tuple(found)


def _between(found: list[OperatorTime], first: int, last: int, layers: Sequence[LayerFacts]) -> None:
    """Matches what lies between two layers with weights, in order; a layer may take several operators in a row."""
    at = 0
    for i in range(first, last):
        kinds = _kinds(found[i].name)
        match = next((k for k in range(at, len(layers)) if layers[k].op in kinds), None)
        if match is not None:
            found[i] = replace(found[i], layer=layers[match].name)
            at = match


def _kinds(name: str) -> frozenset[str]:
    return next((kinds for start, kinds in UNWEIGHTED.items() if name.startswith(start)), frozenset())
