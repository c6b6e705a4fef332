"""ExecuTorch `.pte` through the XNNPACK delegate."""

import base64
import contextlib
import gc
import hashlib
import io
import logging
import warnings
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgebuild.errors import BackendError, first_line
from edgebuild.lift import export
from edgebuild.spec import DEPTH, GROUP, SEGMENT, Artifact, Scheme

aten = torch.ops.aten

NAME = "xnnpack"
NAME_LENGTH = 11  # letters of a constant's name
_PRODUCTS = (aten.linear.default, aten.conv2d.default, aten.conv1d.default)


def quantizer(keep_fp32: tuple[str, ...] = (), scheme: Scheme = "static") -> Any:
    """XNNPACK's int8 quantizer, weights per channel, or torchao's config by layer for 4-bit weights.

    Layers named in `keep_fp32` stay fp32; so does, in the dynamic scheme, all that is no convolution and not linear,
    and each convolution of fewer than DEPTH channels in a group. Activations are always quantized with the weights:
    with weights alone in 8 or 4 bits the delegate drops their scales, and answers wrongly.
    """
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

    if scheme == "8da4w":
        return _grouped(keep_fp32)
    dynamic, kept = scheme == "dynamic", set(keep_fp32)
    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    made = (_dynamic() if dynamic else XNNPACKQuantizer()).set_global(config)
    # batch norm is folded before the quantizer sees the graph; looking for it takes most of its time
    made.SUPPORTED_PATTERNS = [pattern for pattern in made.SUPPORTED_PATTERNS if "_bn" not in pattern.name]
    if kept or dynamic:
        made.set_filter_function(lambda node: not kept & _module_path(node) and not (dynamic and _is_shallow(node)))
    return made


def _dynamic() -> Any:
    """XNNPACK's quantizer for ranges found at run time, with the convolutions that a ReLU follows.

    ExecuTorch's own leaves those to a pattern of both, which it has for ranges found beforehand alone. The lowering
    puts the ReLU into the convolution all the same.
    """
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer, xnnpack_quantizer_utils

    class Dynamic(xnnpack_quantizer.XNNPACKQuantizer):
        def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
            with patch.object(xnnpack_quantizer_utils, "is_relu_node", lambda node: False):
                annotated: fx.GraphModule = super().annotate(model)
            return annotated

    return Dynamic()


def _is_shallow(node: fx.Node) -> bool:
    """Whether a convolution sums over fewer channels than the int8 kernels take at once, as an image's colours."""
    if node.target not in _PRODUCTS[1:]:
        return False
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return int(weight.meta["val"].shape[1]) < DEPTH


def _grouped(keep_fp32: tuple[str, ...]) -> Any:
    from torchao.quantization import FqnToConfig, Int8DynamicActivationIntxWeightConfig, PerGroup

    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        weight_granularity=PerGroup(GROUP),
    )
    return FqnToConfig({**dict.fromkeys(keep_fp32), "_default": config})


def lower(model: nn.Module, inputs: tuple[Tensor, ...]) -> Artifact:
    """Lower an fp32 or PT2E-quantized model. Raises BackendError with the lowering's reason."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    try:
        with quiet():
            program = export(model, inputs)
            _refuse_known_wrong(program)
            program = _averaged(program, inputs)
            with _fewer_patterns(program), _short_names():
                edge = to_edge_transform_and_lower(
                    program,
                    partitioner=[XnnpackPartitioner()],
                    # the validity check repeats what lowering checks, and costs a third of the time
                    compile_config=EdgeCompileConfig(_check_ir_validity=False),
                )
            delegated, outside = delegation(edge)
            lowered = edge.to_executorch(ExecutorchBackendConfig(segment_alignment=SEGMENT))
        fallen_back = tuple(f"{operator(node)} {source_line(node)}".strip() for node in outside)
    except BackendError:
        raise
    except Exception as error:  # the lowering raises whatever it likes
        raise BackendError(f"XNNPACK cannot lower the model: {first_line(error)}") from error
    method = lowered.executorch_program.execution_plan[0]
    return Artifact(
        "pte", lowered.buffer, NAME, delegated, len(outside), fallen_back, sum(method.non_const_buffer_sizes)
    )


@contextlib.contextmanager
def _fewer_patterns(program: ExportedProgram) -> Iterator[None]:
    """Leave out a search for what the program cannot hold.

    To find a bilinear interpolation, ExecuTorch exports four: two seconds in each process. None is there without an
    upsampling, or the indexing that it is made of.
    """
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d

    if any(word in str(node.target) for node in program.graph.nodes for word in ("upsample", "index")):
        yield
        return
    with patch.object(bilinear_2d, "_get_bilinear_2d_graphs", dict):
        yield


@contextlib.contextmanager
def _short_names() -> Iterator[None]:
    """Name each constant by 66 bits of its SHA-256, in base64, where ExecuTorch writes all 256 in hexadecimal.

    A name is in the file twice, and an int8 layer has four constants. Names are compared within a program, whose
    lowering refuses two constants of one name, and by a process that shares constants between programs.
    """
    from executorch.backends.xnnpack.operators import node_visitor

    def sha256(data: bytes) -> SimpleNamespace:
        name = base64.urlsafe_b64encode(hashlib.sha256(data).digest())[:NAME_LENGTH].decode()
        return SimpleNamespace(hexdigest=lambda: name)

    with patch.object(node_visitor, "hashlib", SimpleNamespace(sha256=sha256)):
        yield


def memory_orders(data: bytes) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Of each input and output of a program of our own, the dimensions as they lie in memory, outermost first."""
    from executorch.exir import schema
    from executorch.exir._serialize._program import deserialize_pte_binary

    plan = deserialize_pte_binary(data).program.execution_plan[0]

    def orders(values: Iterable[int]) -> list[tuple[int, ...]]:
        found = [plan.values[i].val for i in values]
        return [tuple(value.dim_order) for value in found if isinstance(value, schema.Tensor)]

    return orders(plan.inputs), orders(plan.outputs)


def _refuse_known_wrong(program: ExportedProgram) -> None:
    """Raise BackendError for what lowers without an error and answers wrongly."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in _PRODUCTS and _dequantizes(node.args[1]) and not _dequantizes(node.args[0]):
            raise BackendError(
                f"{node.name} has quantized weights and fp32 activations: XNNPACK would drop the weights' scales",
                "quantize the activations as well: scheme static, dynamic or 8da4w",
            )
        if node.target is aten.layer_norm.default and node.meta["val"].dtype == torch.float16:
            raise BackendError(f"{node.name} is an fp16 LayerNorm, which XNNPACK computes wrongly", "keep it in fp32")


class _Norm(nn.Module):
    """A LayerNorm whose averages are linear layers: the delegate has neither it nor averages over these dimensions."""

    share: Tensor
    eps: Tensor

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.register_buffer("share", torch.full((1, width), 1 / width))
        self.register_buffer("eps", torch.full((1,), eps))

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        x = x - F.linear(x, self.share)
        x = x * torch.rsqrt(F.linear(x * x, self.share, self.eps))
        x = x if weight is None else x * weight
        return x if bias is None else x + bias


class _TokenMean(nn.Module):
    """The average over the second of three dimensions, as a linear layer."""

    share: Tensor

    def __init__(self, tokens: int, keep: bool):
        super().__init__()
        self.keep = keep
        self.register_buffer("share", torch.full((1, tokens), 1 / tokens))

    def forward(self, x: Tensor) -> Tensor:
        mean = F.linear(x.transpose(1, 2), self.share)
        return mean.transpose(1, 2) if self.keep else mean.flatten(1)


def _averaged(program: ExportedProgram, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    """The same program with the averages that a transformer takes in a form that the delegate takes."""
    parts = {node.name: part for node in program.graph.nodes if (part := _as_linear(node)) is not None}
    if not parts:
        return program
    model = program.module(check_guards=False)
    assert isinstance(model, fx.GraphModule)
    for node in [node for node in model.graph.nodes if node.name in parts]:
        name = f"average_{node.name}"
        model.add_submodule(name, parts[node.name])
        read = node.args[:1] if isinstance(parts[node.name], _TokenMean) else (node.args[0], *node.args[2:4])
        with model.graph.inserting_before(node):
            result = model.graph.call_module(name, read)
        result.meta = {key: value for key, value in node.meta.items() if key in ("stack_trace", "nn_module_stack")}
        node.replace_all_uses_with(result)
        model.graph.erase_node(node)
    model.recompile()
    model.training = False  # it is exported as it is; PyTorch refuses `eval` on such a module
    return export(model, inputs)


def _as_linear(node: fx.Node) -> nn.Module | None:
    """What takes the place of an fp32 norm over the last dimension or a mean of tokens; None for any other node."""
    if node.target not in (aten.layer_norm.default, aten.mean.dim) or node.meta["val"].dtype != torch.float32:
        return None
    x: Any = node.args[0]
    shape, over = x.meta["val"].shape, list(node.args[1])  # type: ignore[arg-type]
    if node.target is aten.layer_norm.default:
        return _Norm(shape[-1], node.args[4] if len(node.args) > 4 else 1e-5) if len(over) == 1 else None  # type: ignore[arg-type]
    keep = len(node.args) > 2 and bool(node.args[2])
    return _TokenMean(shape[1], keep) if len(shape) == 3 and over == [1] else None


def _dequantizes(node: Any) -> bool:
    return "dequantize" in str(getattr(node, "target", ""))


def delegation(edge: Any) -> tuple[int, list[fx.Node]]:
    """Operators inside the delegates, counted, and those outside."""
    graph = edge.exported_program().graph_module
    delegated, outside = 0, []
    for node in graph.graph.nodes:
        if node.op != "call_function" or "getitem" in str(node.target):
            continue
        if "executorch_call_delegate" in str(node.target):
            lowered = getattr(graph, node.args[0].name)
            delegated += sum(
                n.op == "call_function" and "getitem" not in str(n.target)
                for n in lowered.original_module.graph_module.graph.nodes
            )
        else:
            outside.append(node)
    return delegated, outside


def operator(node: fx.Node) -> str:
    """The name of an operator, as "add"."""
    name = getattr(node.target, "__name__", str(node.target))
    return str(getattr(getattr(node.target, "_op", None), "_name", name)).removeprefix("aten::")


def source_line(node: fx.Node) -> str:
    """The user's line in the node's stack trace, in brackets; "" where it is not known."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if 'File "' in line]
    own = [line for line in lines if "/torch/" not in line and "/executorch/" not in line]
    return f"({own[-1]})" if own else ""


def _module_path(node: Any) -> set[str]:
    stack = node.meta.get("nn_module_stack") or {}
    return {str(path).removeprefix("L['self'].") for path, _ in stack.values()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lowering prints and warns a good deal that is no news; the garbage collector doubles its time."""
    loggers = [logging.getLogger(name) for name in ("executorch", "torch.export", "root", "")]
    levels = [logger.level for logger in loggers]
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        gc.enable()
        gc.unfreeze()
