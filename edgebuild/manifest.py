"""`manifest.json`: what a bundle holds, for people and programs that know nothing of edgebuild.

`schemas/manifest.json` in the package is its JSON Schema (2020-12). Sizes are in bytes, times in seconds.
"""

import hashlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from edgebuild.errors import SpecError
from edgebuild.spec import BudgetKind, Method

KIND = "edgebuild-bundle"
SCHEMA_VERSION = 2

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Dimension = Annotated[int, msgspec.Meta(ge=0, le=1 << 31)]
DType = Literal[
    "bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "float32", "float64"
]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class File(_Strict, frozen=True, kw_only=True):
    """A file of the bundle, other than the manifest."""

    sha256: Sha256
    size: Size


class Artifact(_Strict, frozen=True, kw_only=True):
    """What runs on the device."""

    file: str
    format: Literal["pte", "torchscript"]
    sha256: Sha256


class Normalization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the app does to an input before the model sees it: `(x * scale - mean) / std`, a value for each channel.

    One value stands for all channels. For 8-bit pixels that the model wants in [0, 1], `scale` is 1/255.
    """

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    scale: float = 1.0


class Input(_Strict, frozen=True, kw_only=True):
    """An input, in the order of the call. `layout` names the dimensions ("NCHW"), "" where the task does not say.

    `dim_order`: the dimensions as the data lies in memory, outermost first; (0, 2, 3, 1) is PyTorch's channels_last.
    `normalization` is None where the task gives none.
    """

    name: str
    shape: tuple[Dimension, ...]
    dtype: DType
    layout: str = ""
    dim_order: tuple[Dimension, ...] = ()
    normalization: Normalization | None = None


class Output(_Strict, frozen=True, kw_only=True):
    """An output. `labels` are the classes of its last dimension, empty where the task names none.

    A runtime passes a test vector where every value is within `atol` of the expected one.
    """

    name: str
    shape: tuple[Dimension, ...]
    dtype: DType
    layout: str = ""
    dim_order: tuple[Dimension, ...] = ()
    labels: tuple[str, ...] = ()
    atol: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Part(_Strict, frozen=True, kw_only=True):
    """A part of the runtime. `counted`: "whole", code and data of a library; "reached", code that its kernels use."""

    name: str
    bytes: Size
    counted: Literal["whole", "reached"]


class Footprint(_Strict, frozen=True, kw_only=True):
    """What a Linux device of a `machine`, as `uname -m` names it, keeps of the runtime in a selective build.

    `missing` names the operators and backends that the libraries have no code for, or says why nothing was counted.
    """

    machine: str
    parts: tuple[Part, ...]
    missing: str = ""


class Runtime(_Strict, frozen=True, kw_only=True):
    """What the device needs: `operators` and `backends` are what ExecuTorch's selective build is told to link.

    `footprint`: what that takes, for each machine that it could be counted for; empty for microcontrollers and
    TorchScript.
    """

    name: Literal["executorch", "torchscript"]
    version: str
    operators: tuple[str, ...]
    backends: tuple[str, ...]
    footprint: tuple[Footprint, ...] = ()

    @property
    def microcontroller(self) -> bool:
        """Whether it takes a microcontroller's kernels, so that on other machines reference operators stand for them.

        Those of an Ethos-U read the TOSA graphs beside the artifact: `NAME.0.tosa`, ..., one for each delegate.
        """
        return "EthosUBackend" in self.backends or any(name.startswith("cortex_m::") for name in self.operators)


class Budget(_Strict, frozen=True, kw_only=True):
    """A bound; `relative`: the bound is a share of the original's metric."""

    kind: BudgetKind
    bound: float
    relative: bool


class Verdict(_Strict, frozen=True, kw_only=True):
    """A budget held against a figure; `target` is "" for a figure of the artifact itself."""

    kind: BudgetKind
    target: str
    bound: float
    value: float | None
    method: Method | None
    status: Literal["pass", "fail", "inconclusive"]


class Profile(_Strict, frozen=True, kw_only=True):
    """The profile that was built for, and how it went. The first target is the one that plans are made for."""

    name: str
    targets: tuple[str, ...]
    threads: int
    outcome: Literal["met", "broken", "inconclusive"]
    budgets: tuple[Budget, ...]
    verdicts: tuple[Verdict, ...]


class Vectors(_Strict, frozen=True, kw_only=True):
    """The test vectors, `samples` of the task's own inputs with the outputs to expect.

    `expected` says whose outputs these are: the artifact's on the machine that built it, or eager PyTorch's where it
    does not run there, or differs too much. `tolerance` says what `atol` of the outputs was derived from.
    `bundled_program` holds the same vectors inside ExecuTorch's own format, "" where there is none.
    """

    file: str
    samples: Size
    expected: Literal["artifact", "eager"]
    tolerance: str
    bundled_program: str


class Provenance(_Strict, frozen=True, kw_only=True):
    """What the artifact was made from.

    SHA-256 digests: `sources` of the task's code and first training batches, `weights` of the model's parameters and
    buffers as loaded, `calibration` of the calibration inputs, `plan` and `profile` of their files.
    """

    build_id: str
    seed: int
    sources: Sha256
    weights: Sha256
    calibration: Sha256
    plan: Sha256
    profile: Sha256
    versions: dict[str, str]


class Contents(_Strict, frozen=True, kw_only=True):
    """What a bundle holds, apart from the list of its files. `edgebuild` is the version that wrote it."""

    edgebuild: str
    task: str
    artifact: Artifact
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    runtime: Runtime
    profile: Profile
    vectors: Vectors
    provenance: Provenance


class Manifest(Contents, frozen=True, kw_only=True):
    """`files` lists every file of the bundle but `manifest.json`. `kind` tells it from the manifests of others.

    `checksum` is the SHA-256 of the rest of the manifest, as JSON without white space. It finds damage.
    """

    kind: Literal["edgebuild-bundle"]
    schema_version: Literal[2]
    files: dict[str, File]
    checksum: Sha256


class _Head(msgspec.Struct, frozen=True):
    kind: Literal["edgebuild-bundle"]
    schema_version: int


def encode(contents: Contents, files: Mapping[str, bytes]) -> bytes:
    """The manifest of these files; equal contents and files give equal bytes. Raises SpecError as `decode` does."""
    entries = {name: File(sha256=sha256(files[name]), size=len(files[name])) for name in sorted(files)}
    head = {"kind": KIND, "schema_version": SCHEMA_VERSION}
    rest = {**head, **msgspec.to_builtins(contents), "files": msgspec.to_builtins(entries)}
    data = msgspec.json.encode({**rest, "checksum": checksum(rest)})
    decode(data)
    return msgspec.json.format(data) + b"\n"


def checksum(rest: dict[str, Any]) -> str:
    """The checksum of a manifest, given as plain values without it."""
    return sha256(msgspec.json.encode(rest))


def decode(data: bytes) -> Manifest:
    """The manifest that the bytes hold. Raises SpecError where it is not ours, or contradicts itself."""
    try:
        head = msgspec.json.decode(data, type=_Head)
        if head.schema_version != SCHEMA_VERSION:
            raise SpecError(
                f"has schema_version {head.schema_version}, this edgebuild reads {SCHEMA_VERSION}",
                "read it with the edgebuild that wrote it",
            )
        manifest = msgspec.json.decode(data, type=Manifest)
        rest = msgspec.json.decode(data)
        if rest.pop("checksum") != checksum(rest):
            raise SpecError("was changed: its checksum is that of another")
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise SpecError(f"is not edgebuild's: {str(error)[:300]}") from None
    for what, name in (
        ("artifact.file", manifest.artifact.file),
        ("vectors.file", manifest.vectors.file),
        ("vectors.bundled_program", manifest.vectors.bundled_program),
    ):
        if name not in manifest.files and not (what == "vectors.bundled_program" and name == ""):
            raise SpecError(f"names {name[:100]!r} as its {what}, which its files do not hold")
    if manifest.files[manifest.artifact.file].sha256 != manifest.artifact.sha256:
        raise SpecError(f"gives two SHA-256 for {manifest.artifact.file}")
    return manifest


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def schema() -> bytes:
    """The JSON Schema of `manifest.json`."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Manifest)), indent=2) + b"\n"
