"""Runs the `.pte` of a microcontroller on this machine, operator by operator, in the memory that was planned for it.

The program's own instructions are followed, and every tensor lies where the program puts it in its arena, so that a
buffer that is written over too early shows in the outputs. The kernels are reference ones: PyTorch's for ATen and for
quantizing, ExecuTorch's for `cortex_m::` (they stand for CMSIS-NN's), and Arm's TOSA reference model for what an
Ethos-U computes. Its graphs lie beside the program as `NAME.0.tosa`, `NAME.1.tosa`, ..., one for each delegate.

Only the worker process imports this file, as it needs torch.
"""

import struct
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

KERNELS = ("aten", "quantized_decomposed", "cortex_m", "dim_order_ops")  # namespaces that compute and do nothing else
_BLOCK = struct.Struct("<16sIB11s")  # of what Vela made, as ExecuTorch packs it: name, bytes, whether it is elsewhere
_ALIGNED = 16


class Reference:
    """A program whose method `forward` can be called with tensors, and `facts` about it."""

    def __init__(self, path: str):
        from executorch.exir._serialize._program import deserialize_pte_binary

        file = deserialize_pte_binary(Path(path).read_bytes())
        self.program: Any = file.program
        self.plan: Any = self.program.execution_plan[0]
        if any(op.name.startswith("cortex_m::") for op in self.plan.operators):
            import executorch.backends.cortex_m.passes  # noqa: F401 - registers them
        if any(op.name.startswith("quantized_decomposed::") for op in self.plan.operators):
            import executorch.exir.passes._quant_patterns_and_replacements  # noqa: F401
        graphs = [Path(path).with_suffix(f".{i}.tosa") for i in range(len(self.plan.delegates))]
        self.graphs = [graph.read_bytes() if graph.is_file() else b"" for graph in graphs]
        self.values = [value.val for value in self.plan.values]

    def method(self, name: str) -> Callable[[tuple[Tensor, ...]], list[Tensor]]:
        if name != "forward":
            raise RuntimeError(f"a program for a microcontroller has no method {name!r}")
        return self._run

    def facts(self) -> dict[str, Any]:
        """Bytes of the planned buffers, operators outside of delegates in order, flags that made each delegate."""
        outside = [
            self.plan.operators[call.op_index].name
            for call in (instruction.instr_args for instruction in self.plan.chains[0].instructions)
            if type(call).__name__ == "KernelCall"
        ]
        flags = [
            next((bytes(spec.value).decode() for spec in delegate.compile_specs if spec.key == "compile_flags"), "")
            for delegate in self.plan.delegates
        ]
        return {"planned": sum(self.plan.non_const_buffer_sizes), "outside": outside, "flags": flags}

    def streams(self) -> list[Tensor]:
        """For each delegate its NPU commands and its encoded weights, as bytes."""
        found = []
        for delegate in self.plan.delegates:
            blocks = _blocks(self._delegate_data(delegate))
            found += [blocks.get("cmd_data", b""), blocks.get("weight_data", b"")]
        return [torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8) for data in found]

    # -------------------------------------------------------------------------------------------------- a run

    def _run(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        run = _Run(self)
        with torch.no_grad():
            for index, given in zip(self.plan.inputs, inputs, strict=True):
                run.tensor(index).copy_(given)
            for instruction in self.plan.chains[0].instructions:
                run.step(instruction.instr_args)
            return [run.tensor(index).clone() for index in self.plan.outputs]

    def _delegate_data(self, delegate: Any) -> bytes:
        return bytes(self.program.backend_delegate_data[delegate.processed.index].data)


class _Run:
    """One inference: the arenas, and the tensors in them."""

    def __init__(self, reference: Reference):
        self.reference, self.plan = reference, reference.plan
        self.arenas = [bytearray(max(size, 1)) for size in self.plan.non_const_buffer_sizes]
        self.tensors: dict[int, Tensor] = {}

    def tensor(self, index: int) -> Tensor:
        if index not in self.tensors:
            self.tensors[index] = self._tensor(self.reference.values[index])
        return self.tensors[index]

    def _tensor(self, spec: Any) -> Tensor:
        sizes, dtype = list(spec.sizes), _dtype(spec.scalar_type)
        strides, step = [0] * len(sizes), 1
        for dimension in reversed(spec.dim_order):
            strides[dimension] = step
            step *= max(sizes[dimension], 1)
        count = prod(sizes)
        if spec.data_buffer_idx > 0:
            data = self.reference.program.constant_buffer[spec.data_buffer_idx].storage
            flat = torch.frombuffer(bytearray(data), dtype=dtype, count=count)
        elif spec.allocation_info is not None and count:
            place = spec.allocation_info
            offset = place.memory_offset_low + (place.memory_offset_high << 32)
            flat = torch.frombuffer(self.arenas[place.memory_id], dtype=dtype, count=count, offset=offset)
        else:
            flat = torch.empty(count, dtype=dtype)
        return flat.as_strided(sizes, strides)

    def value(self, index: int, kind: str) -> Any:
        """What an operator is given, as its schema's type wants it."""
        spec = self.reference.values[index]
        name = type(spec).__name__
        if name == "Tensor":
            return self.tensor(index)
        if name == "Null":
            return None
        if name in ("TensorList", "OptionalTensorList"):
            return [self.tensor(i) if i >= 0 else None for i in spec.items]
        if name == "IntList":
            return [self.reference.values[i].int_val for i in spec.items]
        if name in ("DoubleList", "BoolList"):
            return list(spec.items)
        (value,) = vars(spec).values()
        return _dtype(value) if "ScalarType" in kind and value is not None else value

    def step(self, call: Any) -> None:
        kind = type(call).__name__
        if kind == "KernelCall":
            operator = self.plan.operators[call.op_index]
            self.kernel(operator.name, operator.overload, list(call.args))
        elif kind == "DelegateCall":
            self.delegate(call.delegate_index, list(call.args))
        elif kind != "FreeCall":
            raise RuntimeError(f"the program has a {kind}, which the reference cannot follow")

    def kernel(self, name: str, overload: str, args: list[int]) -> None:
        space, _, operator = name.partition("::")
        if name == "executorch_prim::et_view":
            given, shape, out = args[:3]
            self.tensors[out] = self.tensor(given).reshape(self.value(shape, ""))
            return
        if space not in KERNELS:
            raise RuntimeError(f"there is no reference for the operator {name}")
        packet = getattr(getattr(torch.ops, space), operator)
        # `.out` is there in ATen alone; of the others the functional form computes the same
        kernel = getattr(packet, overload) if space == "aten" else packet.default
        schema = [argument for argument in kernel._schema.arguments if not argument.is_out]
        taken = {
            argument.name: self.value(index, str(argument.type))
            for argument, index in zip(schema, args[: len(schema)], strict=True)
        }
        positional = [taken.pop(argument.name) for argument in schema if not argument.kwarg_only]
        own = [
            index
            for index in dict.fromkeys(args[len(schema) :])
            if type(self.reference.values[index]).__name__ == "Tensor"
        ]
        rest = [self.tensor(index) for index in own]  # several outputs come as a list too
        if space == "aten":
            outs = [argument.name for argument in kernel._schema.arguments if argument.is_out]
            fresh = [torch.empty_like(out) for out in rest[: len(outs)]]  # ATen may read what it has written over
            kernel(*positional, **taken, **dict(zip(outs, fresh, strict=True)))
            results: Sequence[Tensor] = fresh
        else:
            result = kernel(*positional, **taken)
            results = result if isinstance(result, (tuple, list)) else (result,)
        for made, found in zip(rest[-len(results) :], results, strict=True):
            made.copy_(found.reshape(made.shape))

    def delegate(self, index: int, args: list[int]) -> None:
        graph = self.reference.graphs[index]
        if not graph:
            raise RuntimeError(f"the TOSA graph of delegate {index} is not beside the program")
        import tosa_reference_model

        blocks = _blocks(self.reference._delegate_data(self.plan.delegates[index]))
        takes = int.from_bytes(blocks["inputs"][:4], "little")
        tensors = [self.tensor(i) for i in args]
        inputs = [np.ascontiguousarray(_as_it_lies(tensor).numpy()) for tensor in tensors[:takes]]
        found, status = tosa_reference_model.run(
            graph, inputs, verbosity="NONE", initialize_variable_tensor_from_numpy=True
        )
        if status != tosa_reference_model.GraphStatus.TOSA_VALID:
            raise RuntimeError(f"the TOSA reference model refuses the graph of delegate {index}: {status}")
        for out, array in zip(tensors[takes:], found, strict=True):
            place = _as_it_lies(out)
            place.copy_(torch.from_numpy(np.ascontiguousarray(array)).reshape(place.shape))


def _as_it_lies(tensor: Tensor) -> Tensor:
    """The tensor with its dimensions in the order of memory, outermost first."""
    return tensor.permute(*tensor.dim_order()) if tensor.dim() else tensor


def _blocks(data: bytes) -> dict[str, bytes]:
    """What a delegate of Ethos-U holds, by name; empty where it is none."""
    found: dict[str, bytes] = {}
    offset = 0
    while offset + _BLOCK.size <= len(data):
        name, size, elsewhere, _ = _BLOCK.unpack_from(data, offset)
        start = offset + _BLOCK.size
        found[name.rstrip(b"\0").decode("ascii", "replace")] = data[start : start + size]
        offset = start + size + -size % _ALIGNED
        if elsewhere:
            raise RuntimeError("the program keeps parts of a delegate in another file")
    return found


def _dtype(scalar_type: int) -> torch.dtype:
    from executorch.exir.scalar_type import ScalarType

    name = ScalarType(scalar_type).name.lower()
    if name not in _DTYPES:
        raise RuntimeError(f"the program has a tensor of {name}, which the reference cannot hold")
    return _DTYPES[name]


_DTYPES = {
    "byte": torch.uint8,
    "char": torch.int8,
    "short": torch.int16,
    "int": torch.int32,
    "long": torch.int64,
    "half": torch.float16,
    "float": torch.float32,
    "double": torch.float64,
    "bool": torch.bool,
    "bfloat16": torch.bfloat16,
}
