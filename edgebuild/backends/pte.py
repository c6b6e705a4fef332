"""What an ExecuTorch program needs of the runtime, and the same program with test cases inside."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgebuild.backends.xnnpack import memory_orders

Arrays = tuple[NDArray, ...]


def requirements(data: bytes) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The operators that run outside of a delegate, as "aten::add.out", and the backends, of a program of our own.

    Both in the form that ExecuTorch's selective build takes (`EXECUTORCH_SELECT_OPS_LIST`, `gen_oplist --root_ops`).
    """
    from executorch.exir._serialize import _deserialize_pte_binary

    plans = _deserialize_pte_binary(data).program.execution_plan
    operators = {f"{op.name}.{op.overload}" if op.overload else op.name for plan in plans for op in plan.operators}
    return tuple(sorted(operators)), tuple(sorted({delegate.id for plan in plans for delegate in plan.delegates}))


def bundled(data: bytes, inputs: Sequence[Arrays], outputs: Sequence[Arrays]) -> bytes:
    """ExecuTorch's bundled program: a `.pte` with the inputs and the expected outputs of some calls of `forward`."""
    from executorch.devtools import BundledProgram
    from executorch.devtools.bundled_program.config import MethodTestCase, MethodTestSuite
    from executorch.devtools.bundled_program.serialize import serialize_from_bundled_program_to_flatbuffer

    takes, gives = memory_orders(data)
    cases = [MethodTestCase(_tensors(x, takes), _tensors(y, gives)) for x, y in zip(inputs, outputs, strict=True)]
    with tempfile.TemporaryDirectory(prefix="edgebuild-") as folder:
        path = Path(folder) / "program.pte"
        path.write_bytes(data)
        program = BundledProgram(None, [MethodTestSuite("forward", cases)], str(path))
        return bytes(serialize_from_bundled_program_to_flatbuffer(program))


def _tensors(arrays: Arrays, orders: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Tensors that lie in memory as the program's do, each with a storage of its own, which is written as a whole."""
    return [
        torch.from_numpy(np.array(array.transpose(order), order="C")).permute(*np.argsort(order).tolist())
        for array, order in zip(arrays, orders, strict=True)
    ]
