"""What a program needs, and the program with test cases inside."""

import pytest
import torch
from bundles import runnable
from torch import Tensor, nn

from edgebuild.attempt import HOST
from edgebuild.backends import BACKENDS, pte
from edgebuild.bundle import read_vectors
from edgebuild.devices import as_file, host
from edgebuild.errors import DeviceError


class Sorting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x * 2, 1)


def test_requirements_are_what_selective_build_reads_itself() -> None:
    from executorch.codegen.tools.selective_build import _get_program_from_buffer, _get_program_operators

    data = BACKENDS["xnnpack"].lower(Sorting(), (torch.ones(1, 4),)).data
    operators, backends = pte.requirements(data)
    assert operators == ("aten::cumsum.out", "dim_order_ops::_to_dim_order_copy.out") and backends == (
        "XnnpackBackend",
    )
    assert sorted(_get_program_operators(_get_program_from_buffer(data))) == list(operators)


def test_the_runtime_finds_the_test_cases() -> None:
    files, _ = runnable()
    inputs, outputs = read_vectors(files["vectors.safetensors"])
    data = files["small.bpte"]
    assert files["small.pte"] in data and pte.bundled(files["small.pte"], inputs, outputs) == data
    wrong = pte.bundled(files["small.pte"], inputs, [(y + 1,) for (y,) in outputs])
    with as_file(data, ".bpte") as right, host.start(right, HOST, 1) as worker:
        worker.ask("verify", cases=3, atol=1e-5)
        with pytest.raises(DeviceError):
            worker.ask("verify", cases=4, atol=1e-5)
    with as_file(wrong, ".bpte") as file, host.start(file, HOST, 1) as worker:
        worker.ask("verify", cases=3, atol=1.1)
        with pytest.raises(DeviceError, match="verification failed with status 32"):
            worker.ask("verify", cases=3, atol=0.9)
