"""ExecuTorch `.pte` for a Cortex-M with an Ethos-U NPU: Arm's quantizer, TOSA, and commands that Vela compiles."""

import contextlib
from collections.abc import Iterator, Sequence
from math import inf
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from torch import Tensor, fx, nn

from edgebuild import vela
from edgebuild.backends import layout, memory, xnnpack
from edgebuild.errors import BackendError, first_line
from edgebuild.lift import export
from edgebuild.spec import Artifact, Npu, Scheme

NAME = "ethos_u"

# What people put in the place of an operator that the NPU does not take, or in the place of what it came from.
REPLACEMENTS = {
    "sort": "the application's own code behind the model",
    "topk": "the application's own code behind the model: it reads the scores",
    "argmax": "the application's own code behind the model",
    "embedding": "a lookup by the application in front of the model",
    "interpolate": "bilinear or nearest interpolation",
    "upsample_bicubic2d": "bilinear or nearest interpolation",
    "flip": "the same by the application, or weights that are flipped",
    "grid_sampler_2d": "a transposed convolution, or nearest interpolation",
    "avg_pool3d": "two-dimensional pools, or batch norm for a response norm",
    "local_response_norm": "batch norm, which is folded into the layer before it",
    "group_norm": "batch norm, which is folded into the layer before it",
    "lstm": "convolutions over time",
    "gru": "convolutions over time",
}


def quantizer(keep_fp32: tuple[str, ...], scheme: Scheme, npu: Npu) -> Any:
    """Arm's int8 quantizer for an NPU, weights per channel. Raises BackendError for another scheme."""
    from executorch.backends.arm.quantizer import EthosUQuantizer, get_symmetric_quantization_config

    refuse(keep_fp32, scheme, "an Ethos-U")
    made = EthosUQuantizer(_compile_spec(npu))
    made.set_global(get_symmetric_quantization_config(is_per_channel=True))
    return made


def refuse(keep_fp32: Sequence[str], scheme: Scheme, who: str) -> None:
    """Raise BackendError for what a microcontroller does not compute."""
    if scheme != "static":
        raise BackendError(f"{who} computes int8 with ranges found beforehand, not {scheme}", "set scheme to static")
    if keep_fp32:
        raise BackendError(f"{who} computes in int8 alone: {', '.join(keep_fp32)} cannot stay fp32", "leave it int8")


def lower(model: nn.Module, inputs: tuple[Tensor, ...], npu: Npu, sram: float = inf) -> Artifact:
    """Lower a model that `quantizer` quantized. Raises BackendError with the lowering's or Vela's reason.

    Vela compiles for speed; where the program then takes more than `sram` bytes, within those (`vela.held_to`). The CPU
    converts the inputs to int8 and the outputs back: that is said, and no operator that was left out.
    """
    made = _lower(model, inputs, npu, ())
    if sram == inf:
        return made
    room = sram - made.planned_memory
    if 0 < room < max((vela.estimate(graph, npu).sram for graph in made.graphs), default=0):
        return _lower(model, inputs, npu, (vela.held_to(int(room)),))
    return made


def _lower(model: nn.Module, inputs: tuple[Tensor, ...], npu: Npu, flags: tuple[str, ...]) -> Artifact:
    from executorch.backends.arm.ethosu import EthosUPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    vela.check()
    partitioner = EthosUPartitioner(_compile_spec(npu, flags))
    reasons: list[Any] = []
    try:
        with xnnpack.quiet(), _compiled() as compiled, _told(partitioner, reasons):
            edge = to_edge_transform_and_lower(
                export(layout.of_weights(model), layout.channels_last(inputs)),
                partitioner=[partitioner],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            delegated, outside = xnnpack.delegation(edge)
            lowered = edge.to_executorch(memory.config())
    except BackendError:
        raise
    except Exception as error:  # the lowering raises whatever it likes
        raise BackendError(f"ExecuTorch cannot lower the model for {npu.accelerator}: {first_line(error)}") from error
    program = edge.exported_program().graph_module
    method = lowered.executorch_program.execution_plan[0]
    return Artifact(
        "pte",
        lowered.buffer,
        NAME,
        delegated,
        sum(not converts(node) for node in outside),
        tuple(_rows(outside, reasons)),
        sum(method.non_const_buffer_sizes),
        tuple(compiled[part] for part in _parts(program)),
    )


def _compile_spec(npu: Npu, flags: Sequence[str] = ()) -> Any:
    from executorch.backends.arm.ethosu import EthosUCompileSpec

    return EthosUCompileSpec(npu.accelerator, npu.system_config, npu.memory_mode, list(flags), vela.CONFIG)


@contextlib.contextmanager
def _compiled() -> Iterator[dict[bytes, bytes]]:
    """Keep the TOSA graph of each delegate that is compiled meanwhile, by what was made of it.

    ExecuTorch calls Vela as a library: a crash of it would be the end of the build, so that it runs as a program here.
    """
    from executorch.backends.arm import arm_vela
    from executorch.backends.arm.ethosu import backend

    graphs: dict[bytes, bytes] = {}
    compile_ = backend.vela_compile

    def kept(tosa: bytes, arguments: list[str], **more: Any) -> Any:
        made = compile_(tosa, list(arguments), **more)
        graphs[bytes(made.processed_bytes)] = bytes(tosa)
        return made

    as_program = SimpleNamespace(main=vela.run)
    with patch.object(backend, "vela_compile", kept), patch.object(arm_vela, "vela", as_program):
        yield graphs


@contextlib.contextmanager
def _told(partitioner: Any, reasons: list[Any]) -> Iterator[None]:
    """Gather the reporters in which a partitioner says why it leaves an operator out."""
    tag = partitioner._tag_module

    def telling(module: Any, program: Any, reporter: Any) -> Any:
        reasons.append(reporter)
        return tag(module, program, reporter)

    with patch.object(partitioner, "_tag_module", telling):
        yield


def _parts(program: fx.GraphModule) -> Iterator[bytes]:
    """What each delegate holds, in the order of the program."""
    for node in program.graph.nodes:
        if "executorch_call_delegate" in str(node.target):
            yield bytes(getattr(program, node.args[0].name).processed_bytes)


# ------------------------------------------------------------------------------------------------ on the CPU


def _rows(outside: Sequence[fx.Node], reasons: Sequence[Any]) -> Iterator[str]:
    """A row for each of the user's lines that leave operators to the CPU, and one for conversions between both."""
    why = {node.name: reason for reporter in reasons for node, reason in reporter._rejected_nodes.items()}
    lines: dict[str, list[fx.Node]] = {}
    for node in outside:
        lines.setdefault("" if converts(node) else xnnpack.source_line(node), []).append(node)
    for line, nodes in lines.items():
        names = [name_of(node) for node in nodes]
        counted = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
        said = f"{counted} {line}".strip()
        if not converts(nodes[0]):
            reason = next((why[node.name] for node in nodes if node.name in why), "")  # by name: the graph is a copy
            said += f": {' '.join(reason.split())[:200]}" if reason else ""
            written = next(
                (str(node.meta["torch_fn"][1]).rpartition(".")[2] for node in nodes if "torch_fn" in node.meta), ""
            )
            instead = next((REPLACEMENTS[name] for name in (written, *names) if name in REPLACEMENTS), "")
            said += f"; in its place: {instead}" if instead else ""
        yield f"{said}; {cost(nodes)}"


def converts(node: fx.Node) -> bool:
    """Whether a node only takes a tensor from fp32 to int8 or back."""
    return name_of(node) in ("quantize_per_tensor", "dequantize_per_tensor")


def name_of(node: fx.Node) -> str:
    """ "sort" for aten::sort and sort.out."""
    return xnnpack.operator(node).rpartition("::")[2].partition(".")[0].removesuffix("_copy")


def cost(nodes: Sequence[fx.Node]) -> str:
    """What operators cost the CPU, as far as it is known without running there: elements, and bytes of SRAM."""
    elements, most = 0, 0
    for node in nodes:
        made = _tensors(node)
        elements += sum(tensor.numel() for tensor in made)
        held = [*made, *(tensor for source in node.all_input_nodes for tensor in _tensors(source))]
        most = max(most, sum(tensor.numel() * tensor.element_size() for tensor in held))
    return f"on the CPU {elements:,} elements are computed, with {most:,} bytes of tensors at once"


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [x for x in (value if isinstance(value, (tuple, list)) else (value,)) if isinstance(x, Tensor)]
