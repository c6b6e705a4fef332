"""Bundles to test with: the contents of a manifest for any files, and a small one that runs."""

from collections.abc import Mapping
from functools import cache
from typing import Literal

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from edgebuild import bundle
from edgebuild.backends import BACKENDS, pte
from edgebuild.manifest import (
    Artifact,
    Budget,
    Contents,
    Input,
    Output,
    Profile,
    Provenance,
    Runtime,
    Vectors,
    Verdict,
    sha256,
)
from edgebuild.verify import eager, to_arrays

SOME = sha256(b"")


def contents(files: Mapping[str, bytes]) -> Contents:
    """Contents whose artifact and vectors are the first of the files by name, whatever is in it."""
    first = min(files)
    return Contents(
        edgebuild="0.1.0",
        task="small",
        artifact=Artifact(file=first, format="pte", sha256=sha256(files[first])),
        inputs=(Input(name="image", shape=(1, 3, 8, 8), dtype="float32", layout="NCHW"),),
        outputs=(Output(name="scores", shape=(1, 2), dtype="float32", labels=("cat", "dog"), atol=0.1),),
        runtime=Runtime(name="executorch", version="1.5.1", operators=("aten::add.out",), backends=("XnnpackBackend",)),
        profile=Profile(
            name="phone",
            targets=("host",),
            threads=1,
            outcome="met",
            budgets=(Budget(kind="size", bound=1e6, relative=False),),
            verdicts=(
                Verdict(kind="size", target="", bound=1e6, value=1000.0, method="counted", status="pass"),
                Verdict(kind="latency", target="host", bound=1.0, value=None, method=None, status="inconclusive"),
            ),
        ),
        vectors=Vectors(file=first, samples=1, expected="artifact", tolerance="", bundled_program=""),
        provenance=Provenance(
            build_id="0123",
            seed=0,
            sources=SOME,
            weights=SOME,
            calibration=SOME,
            plan=SOME,
            profile=SOME,
            versions={"python": "3.11"},
        ),
    )


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, stride=2)
        self.classify = nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(torch.relu(self.features(x)).flatten(1))


@cache
def runnable(kind: Literal["pte", "torchscript"] = "pte") -> tuple[dict[str, bytes], Contents]:
    """The files and the contents of a bundle whose artifact runs and gives what its three test vectors say."""
    torch.manual_seed(0)
    model = Scores().eval()
    samples = [(torch.randn(1, 3, 8, 8),) for _ in range(3)]
    artifact = BACKENDS["xnnpack" if kind == "pte" else kind].lower(model, samples[0])
    inputs, outputs = [to_arrays(sample) for sample in samples], eager(model, samples)
    name = f"small{artifact.suffix}"
    files = {name: artifact.data, "plan.json": b"{}\n", "vectors.safetensors": bundle.vectors(inputs, outputs)}
    if kind == "pte":
        files["small.bpte"] = pte.bundled(artifact.data, inputs, outputs)
    said = contents({name: artifact.data})
    vectors = replace(
        said.vectors,
        file="vectors.safetensors",
        samples=3,
        expected="eager",
        bundled_program="small.bpte" if kind == "pte" else "",
    )
    made = replace(said.artifact, format=kind)
    return files, replace(
        said,
        vectors=vectors,
        artifact=made,
        outputs=(replace(said.outputs[0], atol=1e-5),),
        provenance=replace(said.provenance, plan=sha256(files["plan.json"])),
    )
