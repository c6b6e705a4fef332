"""Writes the program of the layers that are timed: an XNNPACK graph for each probe.

Only this part needs ExecuTorch's exporter.

The graphs are put together by hand and not lowered from PyTorch modules: that would take a quarter of an hour for as
many layers, and could not repeat a layer on the same input. The nodes are those that the lowering makes.
"""

from collections.abc import Sequence
from math import ceil, prod
from typing import Any

import numpy as np
from executorch.backends.xnnpack.serialization import xnnpack_graph_schema as xnn
from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import serialize_xnnpack_binary
from executorch.exir import schema
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from executorch.exir.scalar_type import ScalarType

from edgebuild.devices.probes import Probe, channels_last, method

NO_VALUE, NAMED = (1 << 32) - 1, (1 << 64) - 1
EXTERNAL_INPUT, EXTERNAL_OUTPUT = 1, 2
KEEP_DIMS = 0x40
ALIGNED = 64
SCALE = 0.05


def write(probes: Sequence[Probe]) -> bytes:
    """A `.pte` whose method `method(i)` runs probe i."""
    plans, blobs, data = [], [], NamedDataStore()
    for position, probe in enumerate(probes):
        graph = _Graph(probe, method(position), data)
        plans.append(graph.plan(position))
        blobs.append(schema.BackendDelegateInlineData(graph.serialized()))
    program = schema.Program(0, plans, [schema.Buffer(b"")], blobs, [], schema.SubsegmentOffsets(0, []))
    return bytes(
        serialize_pte_binary(
            PTEFile(program, named_data=data.get_named_data_store_output()), extract_delegate_segments=True
        )
    )


class _Graph:
    """One probe as a graph: an input, and outputs that all lie in the same memory."""

    def __init__(self, probe: Probe, name: str, data: NamedDataStore):
        self.name, self.data = name, data
        self.layer, self.int8 = probe.layer, probe.precision == "int8"
        self.values: list[Any] = []
        self.nodes: list[Any] = []
        self.factor = 0  # a tensor with a factor for each channel
        self.constants = [xnn.ConstantDataOffset(0, 0)]
        shape, out = probe.shape, channels_last(probe.layer.out_shape)
        self.in_int8, self.out_int8 = probe.int8_input, self.int8 and probe.layer.op != "dequantize"
        self.shapes, self.repeats = (shape, out), probe.repeats
        source = self.tensor(shape, self.in_int8, external=0)
        for i in range(self.repeats):
            target = self.tensor(out, self.out_int8, external=1 + i)
            # Weights of its own each time: in a model they are not those that the layer before has just fetched.
            self.node(source, target, self.operands())

    def tensor(self, shape: Sequence[int], int8: bool, external: int = -1, constant: int = 0) -> int:
        position = len(self.values)
        flags = 0 if external < 0 else EXTERNAL_OUTPUT if external else EXTERNAL_INPUT
        kind = xnn.XNNDatatype.xnn_datatype_qint8 if int8 else xnn.XNNDatatype.xnn_datatype_fp32
        outside = NO_VALUE if external < 0 else external
        value: Any = xnn.XNNTensorValue(kind, len(shape), list(shape), constant, outside, flags, position)
        if int8:
            value = xnn.XNNQuantizedTensorValue(value, xnn.PerTensorQuant(SCALE, 0))
        self.values.append(xnn.XValue(value))
        return position

    def constant(self, array: np.ndarray, axis: int = 0) -> int:
        """A weight or a bias; the integers among them carry a scale for each channel of `axis`."""
        stored = self.store(array)
        position = len(self.values)
        kinds = {"int8": "qcint8", "int32": "qcint32", "float32": "fp32"}
        kind = getattr(xnn.XNNDatatype, f"xnn_datatype_{kinds[str(array.dtype)]}")
        value: Any = xnn.XNNTensorValue(kind, array.ndim, list(array.shape), stored, NO_VALUE, 0, position)
        if array.dtype != np.float32:
            scale = 0.01 if array.dtype == np.int8 else 0.01 * SCALE
            count = array.shape[axis]
            scales = self.store(np.full(count, scale, np.float32))
            value = xnn.XNNQuantizedTensorValue(value, xnn.PerChannelQuant([], axis, scales, count))
        self.values.append(xnn.XValue(value))
        return position

    def store(self, array: np.ndarray) -> int:
        """The number of a constant's bytes."""
        key = f"{self.name}.{len(self.constants)}"
        self.data.add_named_data(key, array.tobytes(), ALIGNED)
        self.constants.append(xnn.ConstantDataOffset(NAMED, array.nbytes, key))
        return len(self.constants) - 1

    def operands(self) -> tuple[int, int]:
        """Weights and bias, or the second operand."""
        layer = self.layer
        noise = np.random.default_rng(0)
        if not layer.weighted:
            if layer.op != "mul" or layer.in_elements == 2 * layer.out_elements:
                return 0, 0
            self.factor = self.factor or self.scale(layer.in_channels)
            return self.factor, 0
        taps, each = layer.kernel, layer.in_channels // layer.groups
        size = (layer.out_channels, *taps, each) if taps else (layer.out_channels, each)
        if layer.depthwise:
            size = (1, *taps, layer.out_channels)
        weights = noise.integers(-127, 128, size)
        kinds = (np.int8, np.int32) if self.int8 else (np.float32, np.float32)
        bias = np.zeros(layer.out_channels, kinds[1])
        return self.constant(weights.astype(kinds[0]), len(size) - 1 if layer.depthwise else 0), self.constant(bias)

    def scale(self, channels: int) -> int:
        """A factor for each channel. It must be computed: XNNPACK would take a constant for a multiplier of its own."""
        small = self.tensor((1, 1, 1, channels), self.int8)
        self.nodes.append(xnn.XNode(xnn.XNNGlobalAvgPooling2d(0, small, KEEP_DIMS), 0))
        return small

    def node(self, source: int, target: int, extra: tuple[int, int]) -> None:
        layer = self.layer
        bounds = None
        if layer.op == "conv2d":
            into, out = channels_last(layer.in_shape), channels_last(layer.out_shape)
            pads = [
                max(0, (after - 1) * step + kernel - before)
                for before, after, step, kernel in zip(into[1:3], out[1:3], layer.stride, layer.kernel, strict=True)
            ]
            top, left = (ceil(pad / 2) for pad in pads)
            kind = xnn.XNNDepthwiseConv2d if layer.depthwise else xnn.XNNConv2d
            made: Any = kind(
                top, pads[1] - left, pads[0] - top, left, *layer.kernel, *layer.stride, 1, 1,
                layer.in_channels // layer.groups, layer.out_channels // layer.groups, layer.groups, 0, 0,
                source, *extra, target, 0,
            )  # fmt: skip
            bounds = xnn.OutputMinMax(0.0, "inf")
        elif layer.op == "linear":
            made = xnn.XNNFullyConnected(source, *extra, target, 0)
        elif layer.op == "add":
            made = xnn.XNNAdd(source, source, target, 0)
        elif layer.op == "mul":
            made = xnn.XNNMultiply(source, extra[0], target, 0)
        elif layer.op == "adaptive_avg_pool2d":
            made = xnn.XNNGlobalAvgPooling2d(source, target, KEEP_DIMS)
        elif layer.op == "max_pool2d":
            made = xnn.XNNMaxPooling2d(0, 0, 0, 0, 2, 2, 2, 2, 1, 1, source, target, 0)
        elif layer.op == "input":
            made = xnn.XNNStaticTranspose(4, [0, 2, 3, 1], source, target, 0)
        elif layer.op in ("quantize", "dequantize"):
            made = xnn.XNNConvert(source, target, 0)
        elif layer.op == "hardswish":
            made = xnn.XNNHardswish(source, target, 0)
        elif layer.op == "sigmoid":
            made = xnn.XNNSigmoid(source, target, 0)
        elif layer.op == "silu":
            gate = self.tensor(self.shapes[1], False)
            self.nodes.append(xnn.XNode(xnn.XNNSigmoid(source, gate, 0), 0))
            made = xnn.XNNMultiply(source, gate, target, 0)
        elif layer.op == "hardsigmoid":  # the exporter takes it apart: (x + 3), clamped to 0..6, by 6
            shifted, clamped = self.tensor(self.shapes[1], False), self.tensor(self.shapes[1], False)
            three, six = (self.constant(np.full(1, value, np.float32)) for value in (3, 6))
            self.nodes.append(xnn.XNode(xnn.XNNAdd(source, three, shifted, 0), 0))
            self.nodes.append(xnn.XNode(xnn.XNNClamp(shifted, clamped, 0), 0, xnn.OutputMinMax(0.0, 6.0)))
            made = xnn.XNNDiv(clamped, six, target, 0)
        else:
            made = xnn.XNNClamp(source, target, 0)
            bounds = xnn.OutputMinMax(0.0, 6.0)
        self.nodes.append(xnn.XNode(made, 0, bounds))

    def serialized(self) -> bytes:
        outputs = list(range(1, 1 + self.repeats))
        graph = xnn.XNNGraph("0", self.nodes, self.values, 1 + self.repeats, [0], outputs, self.constants)
        return serialize_xnnpack_binary(graph, bytearray())

    def plan(self, delegate: int) -> schema.ExecutionPlan:
        """The method: one call of the delegate, on the tensors 0 (in) and 1 (out)."""
        into, out = (
            -(-prod(shape) * (1 if int8 else 4) // ALIGNED) * ALIGNED
            for shape, int8 in zip(self.shapes, (self.in_int8, self.out_int8), strict=True)
        )
        # Inputs without a place in the program's memory are not copied, which is what a model's own input is.
        place = schema.AllocationDetails(1, out, 0) if self.layer.op == "input" else None
        values = [
            _value(self.shapes[0], self.in_int8, place),
            _value(self.shapes[1], self.out_int8, schema.AllocationDetails(1, 0, 0)),
        ]
        call = schema.Instruction(schema.DelegateCall(0, [0] + [1] * self.repeats))
        reference = schema.BackendDelegateDataReference(schema.DataLocation.INLINE, delegate)
        return schema.ExecutionPlan(
            name=self.name, container_meta_type=schema.ContainerMetadata("", ""), values=values, inputs=[0],
            outputs=[1], chains=[schema.Chain([], [], [call], None)], operators=[],
            delegates=[schema.BackendDelegate("XnnpackBackend", reference, [])],
            non_const_buffer_sizes=[0, out + into],
        )  # fmt: skip


def _value(shape: Sequence[int], int8: bool, allocation: schema.AllocationDetails | None) -> schema.EValue:
    kind = ScalarType.CHAR if int8 else ScalarType.FLOAT
    return schema.EValue(
        schema.Tensor(
            kind, 0, list(shape), list(range(len(shape))), False, 0, 0, allocation, schema.TensorShapeDynamism.STATIC
        )
    )
