"""Code that runs a bundle's model in an app: C++ with CMake, Kotlin with Gradle, Swift with its package manager.

Made from templates for one model: its shapes and types are constants, and every name of the user's is made safe first.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2

from edgebuild.integration import names
from edgebuild.manifest import Normalization

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class TensorInfo:
    """An input or an output of the model.

    shape: sizes, the batch first. dtype: as numpy names it. order: the dimensions as they lie in memory, outermost
    first; (0, 2, 3, 1) is PyTorch's channels_last, () the plain order. layout: a letter for each dimension, such as
    "NCHW". normalization: of an input. labels: of an output's last dimension. atol: how far an output's values may be
    from those of the test vectors. All but the first three may be left out, where nobody said.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    order: tuple[int, ...] = ()
    layout: str = ""
    normalization: Normalization | None = None
    labels: tuple[str, ...] = ()
    atol: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether it lies in memory in C order, the last dimension innermost."""
        return self.order in ((), tuple(range(len(self.shape))))


@dataclass(frozen=True)
class Model:
    """What the code is made for.

    artifact: the name of its file in the bundle. runtime: the version of ExecuTorch, or of PyTorch for TorchScript.
    samples: how many test vectors the bundle holds. microcontroller: whether a Cortex-M runs it, for which there is no
    code but the list of `operators` and delegates that its firmware links.
    """

    task: str
    kind: Literal["pte", "torchscript"]
    artifact: str
    runtime: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    samples: int
    microcontroller: bool = False
    operators: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Type:
    """A dtype in each language; empty where the language's ExecuTorch has no such tensor.

    kotlin: the array's type, what makes a tensor of one, and what gives it back.
    """

    cpp: str
    safetensors: str
    kotlin: tuple[str, str, str] | tuple[()]
    swift: str


_TYPES = {
    "float32": _Type("float", "F32", ("FloatArray", "fromBlob", "dataAsFloatArray"), "Float"),
    "float64": _Type("double", "F64", ("DoubleArray", "fromBlob", "dataAsDoubleArray"), "Double"),
    "float16": _Type("executorch::aten::Half", "F16", ("ShortArray", "fromBlob", "dataAsShortArray"), ""),
    "int64": _Type("std::int64_t", "I64", ("LongArray", "fromBlob", "dataAsLongArray"), "Int64"),
    "int32": _Type("std::int32_t", "I32", ("IntArray", "fromBlob", "dataAsIntArray"), "Int32"),
    "int16": _Type("std::int16_t", "I16", (), "Int16"),
    "int8": _Type("std::int8_t", "I8", ("ByteArray", "fromBlob", "dataAsByteArray"), "Int8"),
    "uint8": _Type("std::uint8_t", "U8", ("ByteArray", "fromBlobUnsigned", "dataAsUnsignedByteArray"), "UInt8"),
    "bool": _Type("bool", "BOOL", (), "Bool"),
}


@dataclass(frozen=True)
class _Field:
    """A tensor as the templates see it; `order` is empty where it is plain."""

    tensor: TensorInfo
    name: str
    camel: str
    size: int
    order: tuple[int, ...]
    type: _Type


def files(model: Model) -> dict[str, bytes]:
    """The files of the bundle's folder `integration`, by name; the same bytes for the same model.

    A TorchScript artifact, a microcontroller's, and a model with a dtype that ExecuTorch's API for a language lacks,
    gets a README that says so in place of the code.
    """
    name = names.pascal(model.task, "Task").removesuffix("Model") + "Model"
    snake = f"{names.snake(model.task, 'task').removesuffix('_').removesuffix('_model')}_model"
    known = all(tensor.dtype in _TYPES for tensor in (*model.inputs, *model.outputs))
    code = model.kind == "pte" and known and not model.microcontroller
    inputs, outputs = (_fields(model.inputs), _fields(model.outputs)) if code else ([], [])
    fields = [*inputs, *outputs]
    wanted = {"integration/README.md": "README.md"}
    if code:
        wanted |= {
            "integration/cpp/CMakeLists.txt": "cpp/CMakeLists.txt",
            f"integration/cpp/{snake}.h": "cpp/model.h",
            f"integration/cpp/{snake}.cpp": "cpp/model.cpp",
            "integration/cpp/check.cpp": "cpp/check.cpp",
        }
    lacking = {
        "kotlin": sorted({field.tensor.dtype for field in fields if not field.type.kotlin}),
        "swift": sorted({field.tensor.dtype for field in fields if not field.type.swift}),
    }
    if code and not lacking["kotlin"]:
        wanted |= {
            "integration/android/build.gradle.kts": "android/build.gradle.kts",
            f"integration/android/src/main/kotlin/{name}.kt": "android/model.kt",
        }
    if code and not lacking["swift"]:
        wanted |= {
            "integration/ios/Package.swift": "ios/Package.swift",
            f"integration/ios/Sources/{name}Kit/{name}.swift": "ios/model.swift",
        }
    values = {
        "model": model,
        "name": name,
        "snake": snake,
        "package": f"edgebuild.{names.snake(model.task, 'task')}",
        "inputs": inputs,
        "outputs": outputs,
        "reordered": {field.order for field in fields if field.order},
        "code": code,
        "lacking": lacking,
    }
    templates = _environment()
    return {path: templates.get_template(template).render(values).encode() for path, template in wanted.items()}


def _fields(tensors: Sequence[TensorInfo]) -> list[_Field]:
    found = []
    for tensor, name in zip(tensors, names.unique((tensor.name for tensor in tensors), "tensor"), strict=True):
        order = () if tensor.is_plain else tensor.order
        found.append(_Field(tensor, name, names.camel(name), math.prod(tensor.shape), order, _TYPES[tensor.dtype]))
    return found


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "cpp": names.cpp_string,
        "kotlin": names.kotlin_string,
        "swift": names.swift_string,
        "comment": names.comment,
    }
    return environment
