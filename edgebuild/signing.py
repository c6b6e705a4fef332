"""Signatures: what a bundle holds and how it was built, in SLSA's provenance form, signed by a key of the user's.

An in-toto Statement v1 (https://in-toto.io/Statement/v1) with SLSA provenance v1 (https://slsa.dev/provenance/v1) in a
DSSE envelope (https://github.com/secure-systems-lab/dsse), by in-toto's own library. It names the hash of every file,
the manifest's included, and holds no time: the same bundle and Ed25519 key give the same bytes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import msgspec

from edgebuild import bundle, environment
from edgebuild.bundle import Bundle
from edgebuild.errors import MissingEnvironment, SpecError, UsageError
from edgebuild.manifest import sha256

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, SSlibKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:edgebuild:build:v1"  # described in docs/signing.md
BUILDER = "urn:edgebuild:sign"  # whoever holds the key; a CI system can name itself

SCHEMES = {"ed25519": "Ed25519", "ecdsa-sha2-nistp256": "ECDSA P-256"}
KEY_LIMIT = 1 << 16  # bytes
SIGNATURES = 16  # each is tried with each key

# https://github.com/package-url/purl-spec
_PURLS = {"python": "pkg:generic/python"} | {name: f"pkg:pypi/{name}" for name in environment.PACKAGES}


class _Signature(msgspec.Struct, frozen=True):
    sig: str
    keyid: str = ""


class _Envelope(msgspec.Struct, frozen=True, rename="camel"):
    payload: str
    payload_type: str
    signatures: Annotated[tuple[_Signature, ...], msgspec.Meta(min_length=1, max_length=SIGNATURES)]


class _Subject(msgspec.Struct, frozen=True):
    name: str
    digest: dict[str, str]


class _Statement(msgspec.Struct, frozen=True, rename="camel"):
    type: str = msgspec.field(name="_type")
    predicate_type: str
    subject: tuple[_Subject, ...]
    predicate: dict[str, Any]


@dataclass(frozen=True)
class Signed:
    """A bundle whose signature holds: the key that made it, what it says of the build, and the bundle as verified."""

    key: Path
    keyid: str
    predicate: Mapping[str, Any]
    bundle: Bundle


# ---------------------------------------------------------------------------------------------------------- keys


def generate(path: Path, passphrase: bytes | None = None) -> tuple[Path, str]:
    """Write a new Ed25519 key to `path` (PKCS #8 PEM, for the user alone) and its public half beside it, as .pub.

    The private key is encrypted where a passphrase is given. Returns the public key's path and the key's id. Raises
    UsageError where either file is there already or cannot be written; then neither is left behind.
    """
    _library()
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from securesystemslib.signer import SSlibKey

    private = Ed25519PrivateKey.generate()
    public = private.public_key()
    lock = form.BestAvailableEncryption(passphrase) if passphrase else form.NoEncryption()
    pem = private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, lock)
    written: list[Path] = []
    beside = path.with_name(f"{path.name}.pub")
    public_pem = public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    try:
        for where, data, mode in ((path, pem, 0o600), (beside, public_pem, 0o644)):
            handle = os.open(where, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
            written.append(where)
            with open(handle, "wb") as file:
                file.write(data)
    except BaseException as error:
        for where in written:
            where.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise UsageError(
                f"{error.filename} exists already", "choose another name: a key is never replaced"
            ) from None
        if isinstance(error, OSError):
            raise UsageError(f"cannot write {error.filename or path}: {error.strerror}") from None
        raise
    return beside, SSlibKey.from_crypto(public).keyid


def signer(given: str, passphrase: Callable[[], bytes]) -> "CryptoSigner":
    """The private key in a file, or in the text of a PEM itself, as CI systems hand out secrets.

    `passphrase` is asked where the key is encrypted. Raises UsageError; it never shows the key.
    """
    _library()
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    inline = given.lstrip().startswith("-----BEGIN")
    where = "the signing key" if inline else given
    pem = given.strip().encode() + b"\n" if inline else _key_bytes(Path(given))
    try:
        try:
            private = load_pem_private_key(pem, None)
        except TypeError:  # it is encrypted
            private = load_pem_private_key(pem, passphrase())
        found = CryptoSigner(private)
    except (ValueError, TypeError) as error:
        if b"ENCRYPTED" in pem:
            raise UsageError(f"{where} does not open: wrong passphrase, or damaged") from None
        raise UsageError(f"{where} is no private key in PEM: {str(error)[:200]}", "edgebuild keys generate") from None
    _supported(found.public_key, where)
    return found


def _public(path: Path) -> "SSlibKey":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from securesystemslib.signer import SSlibKey

    pem = _key_bytes(path)
    if b"PRIVATE KEY-----" in pem:
        raise UsageError(f"{path} is a private key, which none but the signer should have", "give its .pub file")
    try:
        key = SSlibKey.from_crypto(load_pem_public_key(pem))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(f"{path} is no public key in PEM: {str(error)[:200]}") from None
    _supported(key, str(path))
    return key


def _supported(key: "SSlibKey", where: str) -> None:
    if key.scheme not in SCHEMES:
        raise UsageError(f"{where} is a key for {key.scheme}", f"use {' or '.join(SCHEMES.values())}")


def _key_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(KEY_LIMIT + 1)
    except OSError as error:
        raise UsageError(f"cannot read the key {path}: {error.strerror}") from None
    if len(data) > KEY_LIMIT:
        raise UsageError(f"{path} is no key: it is larger than {KEY_LIMIT:,} bytes")
    return data


def _library() -> None:
    """Raise MissingEnvironment where the extra is not installed: whoever does not sign needs none of it."""
    try:
        import cryptography.hazmat.primitives.serialization  # noqa: F401
        import securesystemslib.signer  # noqa: F401
    except ImportError as error:
        raise MissingEnvironment(f"signatures need {error.name}", "pip install 'edgebuild[sign]'") from None


# ------------------------------------------------------------------------------------------------------- signing


def sign(folder: Path, signers: Sequence["CryptoSigner"], builder: str = BUILDER) -> None:
    """Sign a bundle with each key, after it was checked against its manifest; a signature that is there is replaced.

    Raises UsageError and SpecError as `bundle.load` does, and where the bundle is an archive or cannot be written.
    """
    from securesystemslib.dsse import Envelope

    if folder.is_file():
        raise UsageError(f"{folder} is no folder", "sign the bundle's folder, then pack it: edgebuild pack")
    envelope = Envelope(_statement(bundle.load(folder), builder), PAYLOAD_TYPE, {})
    for one in signers:
        envelope.sign(one)
    bundle.attach(folder, msgspec.json.format(msgspec.json.encode(envelope.to_dict()), indent=2) + b"\n")


def _statement(loaded: Bundle, builder: str) -> bytes:
    """What is signed: the hash of every file, and the build as the manifest states it."""
    said, subjects = loaded.manifest, _digests(loaded)
    made = said.provenance
    given = [name for name in subjects if name in ("plan.json", "profile.toml") or name.startswith("targets/")]
    digests = {"sources": made.sources, "weights": made.weights, "calibration": made.calibration}
    packages = {name: made.versions[name] for name in _PURLS if made.versions.get(name, "absent") != "absent"}
    return msgspec.json.encode(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in subjects.items()],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "buildDefinition": {
                    "buildType": BUILD_TYPE,
                    "externalParameters": {
                        "task": said.task,
                        "profile": said.profile.name,
                        "targets": said.profile.targets,
                    },
                    "internalParameters": {"seed": made.seed},
                    "resolvedDependencies": [
                        *({"name": name, "digest": {"sha256": subjects[name]}} for name in given),
                        *({"name": name, "digest": {"edgebuild": digest}} for name, digest in digests.items()),
                        *({"name": name, "uri": f"{_PURLS[name]}@{quote(packages[name])}"} for name in packages),
                    ],
                },
                "runDetails": {
                    "builder": {"id": builder, "version": {"edgebuild": said.edgebuild}},
                    "metadata": {"invocationId": made.build_id},
                },
            },
        }
    )


def _digests(loaded: Bundle) -> dict[str, str]:
    files = {**loaded.files, bundle.MANIFEST: loaded.unlisted[bundle.MANIFEST]}
    return {name: sha256(files[name]) for name in sorted(files)}


# ----------------------------------------------------------------------------------------------------- verifying


def verify(path: Path, keys: Sequence[Path]) -> Signed:
    """A bundle, a folder or an archive, that one of the public keys has signed, each file compared to what was signed.

    The signature is checked over the payload's bytes before they are looked into; nothing is written or run. Raises
    UsageError for a key that cannot be read, or where there is no bundle; SpecError where there is no signature, it is
    by none of these keys or not over these bytes, or a file is missing, unsigned or another than was signed.
    """
    _library()
    if not keys:
        raise UsageError("a signature is checked against public keys, and none is given", "name them with --key")
    trusted = [(key, _public(key)) for key in keys]
    found = bundle.unlisted(path)
    if bundle.PROVENANCE not in found:
        raise SpecError(f"{path} is not signed: it holds no {bundle.PROVENANCE}", "edgebuild sign")
    where = f"{path}: {bundle.PROVENANCE}"
    payload, key, keyid = _opened(found[bundle.PROVENANCE], trusted, where)
    said = _parsed(payload, where)
    loaded = bundle.load(path)
    _compare(said.subject, _digests(loaded), path)
    return Signed(key, keyid, said.predicate, loaded)


def _opened(data: bytes, trusted: Sequence[tuple[Path, "SSlibKey"]], where: str) -> tuple[bytes, Path, str]:
    """The payload of an envelope that one of the keys has signed, and which one did."""
    from securesystemslib.dsse import Envelope
    from securesystemslib.exceptions import UnverifiedSignatureError
    from securesystemslib.signer import Signature

    try:
        outer = msgspec.json.decode(data, type=_Envelope)
        numbered = [{"keyid": str(i), "sig": signature.sig} for i, signature in enumerate(outer.signatures)]
        envelope = Envelope.from_dict(
            {"payload": outer.payload, "payloadType": outer.payload_type, "signatures": numbered}
        )
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise SpecError(f"{where} is no DSSE envelope: {str(error)[:200]}") from None
    if envelope.payload_type != PAYLOAD_TYPE:
        raise SpecError(f"{where} holds {outer.payload_type[:100]!r}, where {PAYLOAD_TYPE!r} is expected")
    signed = envelope.pae()
    for signature in envelope.signatures.values():
        for path, key in trusted:
            # not Envelope.verify, which wants a key's id in each signature; in the format it is a hint, and cosign's
            # envelopes have none
            try:
                key.verify_signature(Signature(key.keyid, signature.signature), signed)
            except UnverifiedSignatureError:
                continue
            return envelope.payload, path, key.keyid
    claimed = [signature.keyid for signature in outer.signatures]
    for _, key in trusted:
        if key.keyid in claimed:
            raise SpecError(f"{where}: what it holds is not what key {key.keyid[:16]} signed")
    names = ", ".join(repr(keyid[:16]) for keyid in claimed)
    raise SpecError(f"{where} is signed by none of the keys given, but by {names}", "name the signer's with --key")


def _parsed(payload: bytes, where: str) -> _Statement:
    try:
        said = msgspec.json.decode(payload, type=_Statement)
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        raise SpecError(f"{where} holds no in-toto statement: {str(error)[:200]}") from None
    for found, wanted in ((said.type, STATEMENT_TYPE), (said.predicate_type, PREDICATE_TYPE)):
        if found != wanted:
            raise SpecError(f"{where} holds {found[:100]!r}, where {wanted!r} is expected")
    return said


def _compare(subjects: Sequence[_Subject], found: Mapping[str, str], path: Path) -> None:
    signed = {subject.name: subject.digest.get("sha256", "") for subject in subjects}
    if len(signed) != len(subjects):
        raise SpecError(f"{path}: the signature names a file twice")
    for name in sorted(signed.keys() | found.keys()):
        if name not in found:
            raise SpecError(f"{path}: {name[:200]!r} was signed, and is missing")
        if name not in signed:
            raise SpecError(f"{path}: {name} is not covered by the signature")
        if signed[name] != found[name]:
            raise SpecError(f"{path}: {name} is not the file that was signed: its SHA-256 is another")
