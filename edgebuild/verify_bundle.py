"""Checks a bundle that comes from anywhere: what it holds, and that its artifact does what its test vectors say.

Nothing of it is run before its hash is checked, and then in a confined process of its own with a time limit. Hashes
find damage; who wrote the bundle is for a signature to say.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from edgebuild import bundle, report
from edgebuild.bundle import Bundle
from edgebuild.devices import Arrays, as_file, confine, host
from edgebuild.errors import DeviceError, SpecError
from edgebuild.manifest import Input, Output
from edgebuild.spec import Target

HOST = Target(name="this machine", title="", device="host", status="measured")
MOST_SAMPLES = 1000
TIMEOUT = 60.0  # seconds for all samples
MEMORY = 1 << 30  # bytes beside what the artifact and its outputs take several times over


@dataclass(frozen=True)
class Check:
    """Something that was checked, and what was found. Only outputs can be wrong: all else is an error."""

    what: str
    found: str
    ok: bool = True


def verify(path: Path, tell: Callable[[Check], None], loaded: Bundle | None = None) -> bool:
    """Check the bundle in a folder or an archive, telling each check; False where outputs differ from the expected.

    `loaded` is the bundle where it is read already, as `signing.verify` does. Raises UsageError where there is no
    bundle, SpecError where it is damaged or hostile, MissingEnvironment where the runtime is not installed.
    """
    loaded, inputs, outputs = read(path, loaded)
    program, name = loaded.manifest.artifact, loaded.manifest.vectors.bundled_program
    size = sum(file.size for file in loaded.manifest.files.values())
    tell(Check("files", f"{len(loaded.files)} as listed, {size:,} bytes, every SHA-256 is right"))
    tell(Check("manifest", f"{program.file} by edgebuild {loaded.manifest.edgebuild}; plan, report and vectors agree"))
    tell(_confinement())
    found = [_run(path, loaded, inputs, outputs)]
    found += [_run_bundled(path, loaded, name)] if name else []
    for check in found:
        tell(check)
    return all(check.ok for check in found)


def read(path: Path, loaded: Bundle | None = None) -> tuple[Bundle, list[Arrays], list[Arrays]]:
    """A bundle with its test vectors, whose files agree with each other. Nothing is run; arguments as of `verify`."""
    loaded = loaded or bundle.load(path)
    made = loaded.manifest
    _check_report(path, loaded)
    for name, digest in (("plan.json", made.provenance.plan), ("profile.toml", made.provenance.profile)):
        if name in made.files and made.files[name].sha256 != digest:
            raise SpecError(f"{path}: {name} is not the one that the manifest says it was built by")
    inputs, outputs = _vectors(path, loaded)
    if (name := made.vectors.bundled_program) and loaded.files[made.artifact.file] not in loaded.files[name]:
        raise SpecError(f"{path}: {name} holds another program than {made.artifact.file}")
    return loaded, inputs, outputs


def _check_report(path: Path, loaded: Bundle) -> None:
    if "report.json" not in loaded.files:
        return
    try:
        made = report.from_json(loaded.files["report.json"])
    except SpecError as error:
        raise SpecError(f"{path}: {error.what}", error.remedy) from None
    if made["artifact_sha256"] != loaded.manifest.artifact.sha256:
        raise SpecError(f"{path}: report.json is about another artifact than {loaded.manifest.artifact.file}")


def _vectors(path: Path, loaded: Bundle) -> tuple[list[Arrays], list[Arrays]]:
    manifest = loaded.manifest
    try:
        inputs, outputs = bundle.read_vectors(loaded.files[manifest.vectors.file])
    except SpecError as error:
        raise SpecError(f"{path}: {error.what}") from None
    if len(inputs) != manifest.vectors.samples or not 0 < len(inputs) <= MOST_SAMPLES:
        raise SpecError(f"{path}: {len(inputs)} test vectors, the manifest says {manifest.vectors.samples}")
    for kind, samples, named in (("input", inputs, manifest.inputs), ("output", outputs, manifest.outputs)):
        for sample in samples:
            if [(y.shape, str(y.dtype)) for y in sample] != [(port.shape, port.dtype) for port in named]:
                raise SpecError(f"{path}: the test vectors' {kind}s are not of the shapes and dtypes of the manifest")
    return inputs, outputs


def _confinement() -> Check:
    version = confine.landlock()
    how = f"Landlock {version}: no writing, no programs, no network" if version else "no Landlock in this kernel"
    return Check("confinement", f"{how}; limited memory, {TIMEOUT:g} s")


def _run(path: Path, loaded: Bundle, inputs: Sequence[Arrays], outputs: Sequence[Arrays]) -> Check:
    artifact = loaded.manifest.artifact
    data = loaded.files[artifact.file]
    by_reference = loaded.manifest.runtime.microcontroller
    graphs = bundle.graphs(loaded.files, artifact.file)
    with as_file(data, ".pte" if artifact.format == "pte" else ".pt", graphs) as file:
        try:
            with host.start(file, HOST, 1, _limits(data, loaded), by_reference) as worker:
                worker.ask("load", timeout=TIMEOUT)
                stacked = tuple(np.stack(arrays) for arrays in zip(*inputs, strict=True))
                _, found = worker.ask("many", stacked, TIMEOUT)
        except DeviceError as error:
            raise SpecError(f"{path}: {artifact.file} cannot be run: {error.what}") from None
    worst = []
    if [y.shape[1:] for y in found] != [output.shape for output in loaded.manifest.outputs]:
        raise SpecError(f"{path}: {artifact.file} gives outputs of other shapes than its manifest says")
    for y, wanted, output in zip(found, zip(*outputs, strict=True), loaded.manifest.outputs, strict=True):
        worst.append((output, difference(y, np.stack(wanted))))
    said = ", ".join(f"{output.name} within {far:.3g} of {output.atol:.3g}" for output, far in worst)
    return Check("outputs", f"{len(inputs)} test vectors: {said}", all(far <= output.atol for output, far in worst))


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference of two arrays of a shape; infinite where one is not finite and the other not the same."""
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(np.nan_to_num(apart, nan=np.inf, posinf=np.inf).max(initial=0.0))


def _run_bundled(path: Path, loaded: Bundle, name: str) -> Check:
    """ExecuTorch's own comparison, by the loosest of the outputs' tolerances: it takes one for all."""
    data, cases = loaded.files[name], loaded.manifest.vectors.samples
    atol = max(output.atol for output in loaded.manifest.outputs)
    with as_file(data, ".bpte") as file:
        try:
            with host.start(file, HOST, 1, _limits(data, loaded)) as worker:
                worker.ask("verify", timeout=TIMEOUT, cases=cases, atol=atol)
        except DeviceError as error:
            if MISMATCH in error.what:
                return Check("bundled program", f"{name}: its outputs differ from the expected ones", ok=False)
            raise SpecError(f"{path}: {name} cannot be run: {error.what}") from None
    return Check("bundled program", f"{name}: {cases} test cases pass ExecuTorch's own comparison")


MISMATCH = "verification failed with status 32"  # NotFound's neighbour Error::InvalidState, for a difference alone


def _limits(data: bytes, loaded: Bundle) -> host.Confined:
    def size(ports: Sequence[Input | Output]) -> int:
        return sum(prod(port.shape) * np.dtype(port.dtype).itemsize for port in ports)

    manifest = loaded.manifest
    values = manifest.vectors.samples * (size(manifest.inputs) + size(manifest.outputs))
    return host.Confined(memory=MEMORY + 8 * len(data) + 8 * values, most=values + (1 << 20))
