"""What a build hands over beside the artifact: test vectors with a tolerance, and what the manifest says."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from msgspec.structs import replace as replaced
from numpy.typing import NDArray
from torch import Tensor, nn

from edgebuild import __version__, bundle, cache, integration, selective, settings
from edgebuild.attempt import HOST, Attempt
from edgebuild.backends import pte
from edgebuild.backends.xnnpack import memory_orders
from edgebuild.devices import Arrays, as_file, host
from edgebuild.environment import versions
from edgebuild.errors import DeviceError
from edgebuild.integration import TensorInfo
from edgebuild.load import Loaded
from edgebuild.manifest import Artifact, Budget, Contents, Input, Output, Provenance, Runtime, Vectors, Verdict, sha256
from edgebuild.manifest import Profile as Built
from edgebuild.spec import Finding, Profile, Report
from edgebuild.verify import to_arrays

EAGER = "eager PyTorch, as lowered"
VECTORS = "vectors.safetensors"
SAMPLES = 8
SLACK = 2.0  # on the largest difference that was seen
ROUNDING = 1e-6  # of the largest value: some 8 units in the last place of fp32


@dataclass(frozen=True)
class Sampled:
    """Inputs of the task with the outputs to expect, the tolerance of each output, and ExecuTorch's form of them.

    `bundled` is empty where there is none; `findings` say why where there could be.
    """

    inputs: Sequence[Arrays]
    outputs: Sequence[Arrays]
    expected: Literal["artifact", "eager"]
    atol: tuple[float, ...]
    tolerance: str
    bundled: bytes = field(default=b"", repr=False)
    findings: tuple[Finding, ...] = ()


def sample(best: Attempt, loaded: Loaded) -> Sampled:
    """Take the test vectors of what was built: the artifact's outputs, eager PyTorch's where they differ.

    The artifact's are those of the target that scored it, which is the host for all but microcontrollers.

    `atol` of an output is twice the largest difference between these and all others that are known, of eager PyTorch
    and of the artifact on each target that agrees with it, over all samples that were compared.
    """
    wrong = {row.target for row in best.parity if not row.ok}
    right = {name: outputs for name, outputs in best.outputs.items() if name not in wrong}
    known: dict[str, Sequence[Arrays]] = {EAGER: best.built.expected, **right}
    scorer = next(iter(best.outputs), "")
    expected: Literal["artifact", "eager"] = "artifact" if scorer in right else "eager"
    reference = known.pop(scorer if expected == "artifact" else EAGER)
    atol = tuple(_tolerance(i, reference, list(known.values())) for i in range(len(reference[0])))
    seen = f"the largest difference from {', '.join(known)} over {len(reference)} samples" if known else "rounding"
    tolerance = f"{SLACK:g} times {seen}, at least {ROUNDING:g} of the largest value"
    inputs = [to_arrays(sample) for sample in loaded.samples[:SAMPLES]]
    outputs = list(reference[:SAMPLES])
    sampled = Sampled(inputs, outputs, expected, atol, tolerance)
    if best.built.artifact.kind == "torchscript":
        return sampled
    if not best.base.backend.on_host:
        why = "left out: this machine's runtime, which would have to confirm it, has none of the target's kernels"
        return replace(sampled, findings=(Finding("skipped", "bundled program", why),))
    program = best.built.artifact.data
    data, findings = _bundled(program, inputs, outputs, max(atol))
    return replace(sampled, bundled=data, findings=findings)


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


def describe(made: Report, loaded: Loaded, profile: Profile, sampled: Sampled, files: Mapping[str, bytes]) -> Contents:
    """What the manifest says of a build, of whose bundle the artifact, the plan and the profile are among `files`."""
    program = files[made.artifact]
    runtime: Literal["executorch", "torchscript"] = "executorch" if profile.artifact == "pte" else "torchscript"
    operators, backends = pte.requirements(program) if runtime == "executorch" else ((), ())
    takes, gives = memory_orders(program) if runtime == "executorch" else _plain(loaded)
    needs = Runtime(
        name=runtime,
        version=versions()["executorch" if runtime == "executorch" else "torch"],
        operators=operators,
        backends=backends,
    )
    if runtime == "executorch" and not needs.microcontroller:
        needs = replaced(needs, footprint=selective.footprints(operators, backends))
    assert made.outcome != "infeasible"
    return Contents(
        edgebuild=__version__,
        task=made.task,
        artifact=Artifact(file=made.artifact, format=profile.artifact, sha256=made.artifact_sha256),
        inputs=tuple(replaced(port, dim_order=order) for port, order in zip(loaded.inputs, takes, strict=True)),
        outputs=_outputs(loaded.outputs, sampled, gives),
        runtime=needs,
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
            plan=sha256(files["plan.json"]),
            profile=sha256(files[settings.PROFILE]),
            versions=dict(versions()),
        ),
    )


def _bundled_name(made: Report) -> str:
    return f"{Path(made.artifact).stem}.bpte"


Orders = Sequence[tuple[int, ...]]


def _outputs(named: Sequence[Output], sampled: Sampled, orders: Orders) -> tuple[Output, ...]:
    return tuple(
        replaced(output, shape=y.shape, dtype=str(y.dtype), dim_order=order, atol=atol)
        for output, y, order, atol in zip(named, sampled.outputs[0], orders, sampled.atol, strict=True)
    )


def _plain(loaded: Loaded) -> tuple[Orders, Orders]:
    inputs, outputs = ([tuple(range(len(port.shape))) for port in ports] for ports in (loaded.inputs, loaded.outputs))
    return inputs, outputs


def model(said: Contents) -> integration.Model:
    """What the integration code is made for."""
    return integration.Model(
        task=said.task,
        kind=said.artifact.format,
        artifact=said.artifact.file,
        runtime=said.runtime.version.partition("+")[0],
        inputs=tuple(_tensor(port, normalization=port.normalization) for port in said.inputs),
        outputs=tuple(_tensor(port, labels=port.labels, atol=port.atol) for port in said.outputs),
        samples=said.vectors.samples,
        microcontroller=said.runtime.microcontroller,
        operators=(*said.runtime.operators, *said.runtime.backends),
    )


def _tensor(port: Input | Output, **more: Any) -> TensorInfo:
    return TensorInfo(port.name, port.shape, port.dtype, port.dim_order, port.layout, **more)


def _weights(loaded: Loaded) -> str:
    model = loaded.task.model
    return _digest(sorted((model.state_dict() if isinstance(model, nn.Module) else model.state_dict).items()))


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and values."""
    parts: list[str | bytes] = []
    for name, tensor in tensors:
        parts += [f"{name} {tuple(tensor.shape)} {tensor.dtype}", tensor.detach().contiguous().numpy().tobytes()]
    return cache.key(*parts)
