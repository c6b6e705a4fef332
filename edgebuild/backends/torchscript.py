"""Frozen TorchScript: fp32, or int8 by FX quantization with the x86 engine."""

import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from edgebuild.errors import BackendError, first_line
from edgebuild.spec import Artifact, Scheme

NAME = "torchscript"
ENGINE = "x86"  # qnnpack answers wrongly for quantized ReLU6 on channels-last inputs


def quantizer(keep_fp32: tuple[str, ...] = (), scheme: Scheme = "static") -> Any:
    """The FX mapping for the x86 engine; layers named in `keep_fp32` stay fp32."""
    from torch.ao.quantization import get_default_qconfig_mapping

    if scheme != "static":
        raise BackendError(f"TorchScript artifacts are quantized statically, not {scheme}", 'use artifact = "pte"')
    if ENGINE not in torch.backends.quantized.supported_engines:
        raise BackendError(f"this PyTorch has no {ENGINE!r} quantization engine", 'use artifact = "pte"')
    torch.backends.quantized.engine = ENGINE
    mapping = get_default_qconfig_mapping(ENGINE)
    for name in keep_fp32:
        mapping.set_module_name(name, None)
    return mapping


def lower(model: nn.Module, inputs: tuple[Tensor, ...]) -> Artifact:
    """Trace, freeze and save. Raises BackendError with the tracer's reason."""
    buffer = io.BytesIO()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.freeze(torch.jit.trace(model.eval(), inputs, check_trace=False))
            torch.jit.save(traced, buffer)
    except Exception as error:  # the tracer raises whatever it likes
        raise BackendError(f"TorchScript cannot take the model: {first_line(error)}") from error
    operators = [
        node.kind() for node in traced.inlined_graph.nodes() if node.kind().startswith(("aten::", "quantized::"))
    ]
    return Artifact("torchscript", buffer.getvalue(), NAME, len(operators), 0, (), 0)
