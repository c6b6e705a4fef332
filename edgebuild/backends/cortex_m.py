"""ExecuTorch `.pte` for a Cortex-M alone: int8 operators that CMSIS-NN computes, buffers planned to the byte."""

from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from edgebuild.backends import ethos_u, layout, memory, xnnpack
from edgebuild.errors import BackendError, first_line
from edgebuild.lift import export
from edgebuild.spec import Artifact, Board, Scheme

NAME = "cortex_m"


def quantizer(keep_fp32: tuple[str, ...], scheme: Scheme, board: Board) -> Any:
    """ExecuTorch's int8 quantizer for CMSIS-NN, convolutions per channel. Raises BackendError for another scheme."""
    from executorch.backends.cortex_m.quantizer.quantizer import CortexMQuantizer

    ethos_u.refuse(keep_fp32, scheme, f"a {board.cpu}")
    return CortexMQuantizer()


def lower(model: nn.Module, inputs: tuple[Tensor, ...], board: Board) -> Artifact:
    """Lower a model that `quantizer` quantized. Raises BackendError with the lowering's reason.

    `delegated` counts CMSIS-NN's operators, though they are no delegate: they stand in the program as they are.
    """
    from executorch.backends.cortex_m.edge_compile_config import cortex_m_edge_compile_config
    from executorch.backends.cortex_m.passes.cortex_m_pass_manager import CortexMPassManager
    from executorch.backends.cortex_m.target_config import CortexMTargetConfig
    from executorch.exir import to_edge

    try:
        with xnnpack.quiet():
            config = CortexMTargetConfig.from_target_string(board.cpu)
            edge = to_edge(
                export(layout.of_weights(model), layout.channels_last(inputs)),
                compile_config=cortex_m_edge_compile_config(),
            )
            program = _without_unused(CortexMPassManager(edge.exported_program(), target_config=config).transform())
            edge._edge_programs["forward"] = program
            lowered = edge.to_executorch(memory.config())
    except Exception as error:  # the lowering raises whatever it likes
        raise BackendError(f"ExecuTorch cannot lower the model for a {board.cpu}: {first_line(error)}") from error
    method = lowered.executorch_program.execution_plan[0]
    nodes = [node for node in program.graph_module.graph.nodes if _computes(node)]
    outside = [node for node in nodes if "cortex_m" not in str(node.target)]
    return Artifact(
        "pte",
        lowered.buffer,
        NAME,
        len(nodes) - len(outside),
        len(outside),
        tuple(f"{ethos_u.name_of(n)} {xnnpack.source_line(n)}; {ethos_u.cost([n])}" for n in outside),
        sum(method.non_const_buffer_sizes),
    )


def _without_unused(program: ExportedProgram) -> ExportedProgram:
    """The program without constants that nothing reads: the weights that its passes have written anew.

    ExecuTorch's own pass looks at parameters alone, and these are buffers by now.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    kept = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT or nodes[spec.arg.name].users:
            kept.append(spec)
            continue
        program.graph.erase_node(nodes[spec.arg.name])
        program.state_dict.pop(spec.target, None)
        program.constants.pop(spec.target, None)
    program.graph_signature.input_specs[:] = kept
    program.graph_module.recompile()
    return program


def _computes(node: fx.Node) -> bool:
    """Whether a node is an operator that runs: buffers are planned, and views are planned away."""
    passive = ("alloc", "getitem", "view", "squeeze")
    return node.op == "call_function" and not any(word in str(node.target) for word in passive)
