"""What a build hands over beside the artifact: test vectors with a tolerance, what the manifest says, code for apps."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from edgebuild import __version__, bundle, cache, integration
from edgebuild.attempt import HOST, Attempt
from edgebuild.backends import pte, xnnpack
from edgebuild.devices import Arrays, as_file, host
from edgebuild.environment import versions
from edgebuild.errors import DeviceError
from edgebuild.integration import TensorInfo
from edgebuild.load import Loaded
from edgebuild.manifest import Artifact, Budget, Contents, Output, Provenance, Runtime, Vectors, Verdict, sha256
from edgebuild.manifest import Profile as Built
from edgebuild.spec import Artifact as Lowered
from edgebuild.spec import Finding, Profile, Report
from edgebuild.verify import to_arrays

VECTORS = "vectors.safetensors"
SAMPLES = 8
SLACK = 2.0  # on the largest difference that was seen
ROUNDING = 1e-6  # of the largest value: some 8 units in the last place of fp32


@dataclass(frozen=True)
class Sampled:
    """Inputs of the task with the outputs to expect, the tolerance of each output, and ExecuTorch's form of them.

    `bundled` is empty where there is none; `findings` say why where there could be. `requirements` are those of
    `pte.requirements`.
    """

    inputs: Sequence[Arrays]
    outputs: Sequence[Arrays]
    expected: Literal["artifact", "eager"]
    atol: tuple[float, ...]
    tolerance: str
    bundled: bytes = field(default=b"", repr=False)
    findings: tuple[Finding, ...] = ()
    requirements: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())


def sample(best: Attempt, loaded: Loaded) -> Sampled:
    """Take the test vectors of what was built: the artifact's outputs on the host, eager PyTorch's without a host.

    `atol` of an output is twice the largest difference between these and all others that are known, of eager PyTorch
    and of the artifact on each target, over all samples that were compared.
    """
    known: dict[str, Sequence[Arrays]] = {"eager PyTorch, as lowered": best.built.expected, **best.outputs}
    expected: Literal["artifact", "eager"] = "artifact" if "host" in best.outputs else "eager"
    reference = known.pop("host" if expected == "artifact" else "eager PyTorch, as lowered")
    atol = tuple(_tolerance(i, reference, list(known.values())) for i in range(len(reference[0])))
    seen = f"the largest difference from {', '.join(known)} over {len(reference)} samples" if known else "rounding"
    tolerance = f"{SLACK:g} times {seen}, at least {ROUNDING:g} of the largest value"
    inputs = [to_arrays(sample) for sample in loaded.samples[:SAMPLES]]
    outputs = list(reference[:SAMPLES])
    sampled = Sampled(inputs, outputs, expected, atol, tolerance)
    if best.built.artifact.kind == "torchscript":
        return sampled
    program = best.built.artifact.data
    data, findings = _bundled(program, inputs, outputs, max(atol))
    return replace(sampled, bundled=data, findings=findings, requirements=pte.requirements(program))


def _tolerance(i: int, reference: Sequence[Arrays], others: Sequence[Sequence[Arrays]]) -> float:
    def values(samples: Sequence[Arrays]) -> NDArray[np.float64]:
        return np.stack([sample[i].astype(np.float64) for sample in samples])

    wanted = values(reference)
    with np.errstate(invalid="ignore"):
        apart = [np.abs(values(other) - wanted) for other in others]
    largest = max((float(each[np.isfinite(each)].max(initial=0.0)) for each in apart), default=0.0)
    rounding = ROUNDING * float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0.0))
    bound = max(SLACK * largest, rounding if reference[0][i].dtype.kind == "f" else 0.0)
    digits = 10.0 ** (math.floor(math.log10(bound)) - 2) if bound else 1.0
    return float(f"{math.ceil(bound / digits) * digits:.3g}")  # three digits are enough, rounded up


def _bundled(
    program: bytes, inputs: Sequence[Arrays], outputs: Sequence[Arrays], atol: float
) -> tuple[bytes, tuple[Finding, ...]]:
    """The bundled program, where the runtime has found its own outputs in it."""
    data = pte.bundled(program, inputs, outputs)
    try:
        with as_file(data, ".bpte") as file, host.start(file, HOST, 1) as worker:
            worker.ask("verify", cases=len(inputs), atol=atol)
    except DeviceError as error:
        return b"", (Finding("skipped", "bundled program", f"left out, as the runtime does not confirm it: {error}"),)
    return data, ()


def vectors(made: Report, sampled: Sampled) -> dict[str, bytes]:
    """The files of the test vectors, by their names in the bundle."""
    files = {VECTORS: bundle.vectors(sampled.inputs, sampled.outputs)}
    return {**files, _bundled_name(made): sampled.bundled} if sampled.bundled else files


def describe(
    made: Report, loaded: Loaded, profile: Profile, sampled: Sampled, plan: bytes, profile_file: bytes
) -> Contents:
    """What the manifest says of a build, whose plan and profile are given as their files."""
    runtime: Literal["executorch", "torchscript"] = "executorch" if profile.artifact == "pte" else "torchscript"
    operators, backends = sampled.requirements
    assert made.outcome != "infeasible"
    return Contents(
        edgebuild=__version__,
        task=made.task,
        artifact=Artifact(file=made.artifact, format=profile.artifact, sha256=made.artifact_sha256),
        inputs=loaded.inputs,
        outputs=_outputs(loaded.outputs, sampled),
        runtime=Runtime(
            name=runtime,
            version=versions()["executorch" if runtime == "executorch" else "torch"],
            operators=operators,
            backends=backends,
        ),
        profile=Built(
            name=profile.name,
            targets=profile.targets,
            threads=profile.threads,
            outcome=made.outcome,
            budgets=tuple(Budget(kind=b.kind, bound=b.bound, relative=b.relative) for b in profile.budgets),
            verdicts=tuple(
                Verdict(kind=v.kind, target=v.target, bound=v.bound, value=v.value, method=v.method, status=v.status)
                for v in made.verdicts
            ),
        ),
        vectors=Vectors(
            file=VECTORS,
            samples=len(sampled.inputs),
            expected=sampled.expected,
            tolerance=sampled.tolerance,
            bundled_program=_bundled_name(made) if sampled.bundled else "",
        ),
        provenance=Provenance(
            build_id=made.build_id,
            seed=profile.seed,
            sources=loaded.sources,
            weights=_weights(loaded),
            calibration=_digest(
                (f"{s}.{i}", x) for s, sample in enumerate(loaded.samples) for i, x in enumerate(sample)
            ),
            plan=sha256(plan),
            profile=sha256(profile_file),
            versions=dict(versions()),
        ),
    )


def code(contents: Contents, artifact: Lowered) -> dict[str, bytes]:
    """The files of the integration code, by their names in the bundle."""
    plain: tuple[list[tuple[int, ...]], ...] = ([()] * len(contents.inputs), [()] * len(contents.outputs))
    takes, gives = xnnpack.memory_orders(artifact.data) if artifact.kind == "pte" else plain
    inputs = tuple(
        TensorInfo(each.name, each.shape, each.dtype, order, each.layout, each.normalization)
        for each, order in zip(contents.inputs, takes, strict=True)
    )
    outputs = tuple(
        TensorInfo(each.name, each.shape, each.dtype, order, each.layout, labels=each.labels, atol=each.atol)
        for each, order in zip(contents.outputs, gives, strict=True)
    )
    runtime = contents.runtime.version.partition("+")[0]
    return integration.files(
        integration.Model(
            contents.task, artifact.kind, contents.artifact.file, runtime, inputs, outputs, contents.vectors.samples
        )
    )


def _bundled_name(made: Report) -> str:
    return f"{Path(made.artifact).stem}.bpte"


def _outputs(named: Sequence[Output], sampled: Sampled) -> tuple[Output, ...]:
    return tuple(
        msgspec.structs.replace(output, shape=y.shape, dtype=str(y.dtype), atol=atol)
        for output, y, atol in zip(named, sampled.outputs[0], sampled.atol, strict=True)
    )


def _weights(loaded: Loaded) -> str:
    model = loaded.task.model
    return _digest(sorted((model.state_dict() if isinstance(model, nn.Module) else model.state_dict).items()))


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and values."""
    parts: list[str | bytes] = []
    for name, tensor in tensors:
        parts += [f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor.detach().contiguous().numpy().tobytes()]
    return cache.key(*parts)
