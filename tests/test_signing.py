"""Signatures: what is signed is what is there, other tools agree, and nothing else passes."""

import base64
import hashlib
import json
import os
import random
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from bundles import contents, runnable
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from msgspec.structs import replace
from securesystemslib.dsse import Envelope
from securesystemslib.signer import SSlibKey

from edgebuild import bundle, signing
from edgebuild.errors import MissingEnvironment, SpecError, UsageError
from edgebuild.manifest import Contents

ENVELOPE = "provenance.intoto.json"
TYPE = "application/vnd.in-toto+json"


def manifest(files: Mapping[str, bytes]) -> Contents:
    said = contents(files)
    versions = {"python": "3.11", "torch": "2.13.0+cpu", "torchvision": "absent", "edgebuild": "0.1.0"}
    return replace(said, provenance=replace(said.provenance, versions=versions))


FILES = {"digits.pte": b"\x00\x01" * 500, "plan.json": b"{}\n", "profile.toml": b"", "targets/host.toml": b""}


def never() -> bytes:
    raise AssertionError("the key is not encrypted")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the key pairs a and b."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("a", "b"):
        signing.generate(folder / name)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    bundle.write(tmp_path / "out", FILES, manifest(FILES))
    return tmp_path / "out"


@pytest.fixture
def signed(out: Path, keys: Path) -> Path:
    signing.sign(out, [signing.signer(str(keys / "a"), never)])
    return out


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def envelope(folder: Path) -> dict:
    return json.loads((folder / ENVELOPE).read_bytes())


def payload(folder: Path) -> dict:
    return json.loads(base64.b64decode(envelope(folder)["payload"]))


def pae(kind: str, body: bytes) -> bytes:
    """DSSE's pre-authentication encoding, from its specification."""
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind.encode(), len(body), body)


def seal(folder: Path, key: Path, body: bytes, kind: str = TYPE) -> None:
    """Sign any bytes with a good key, as somebody with another tool could."""
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    signature = {"keyid": "", "sig": base64.b64encode(private.sign(pae(kind, body))).decode()}
    whole = {"payload": base64.b64encode(body).decode(), "payloadType": kind, "signatures": [signature]}
    (folder / ENVELOPE).write_text(json.dumps(whole))


# ---------------------------------------------------------------------------------------------------- round trip


def test_what_was_signed_is_verified(signed, keys):
    found = signing.verify(signed, [keys / "b.pub", keys / "a.pub"])
    assert found.key == keys / "a.pub" and len(found.keyid) == 64
    assert found.bundle.files == FILES
    assert found.predicate["runDetails"]["metadata"] == {"invocationId": "0123"}
    assert bundle.read(signed) == FILES


def test_the_same_bundle_and_key_give_the_same_bytes(signed, keys):
    before = tree(signed)
    signing.sign(signed, [signing.signer(str(keys / "a"), never)])
    assert tree(signed) == before and os.listdir(signed.parent) == ["out"]


def test_two_keys_sign_and_either_is_enough(out, keys):
    signing.sign(out, [signing.signer(str(keys / name), never) for name in ("a", "b")])
    assert len(envelope(out)["signatures"]) == 2
    for name in ("a", "b"):
        assert signing.verify(out, [keys / f"{name}.pub"]).key == keys / f"{name}.pub"


def test_an_archive_of_a_signed_bundle(signed, keys, tmp_path):
    archive = tmp_path / "out.zip"
    bundle.write_archive(signed, archive)
    assert signing.verify(archive, [keys / "a.pub"]).bundle.files == FILES
    with pytest.raises(SpecError, match="none of the keys"):
        signing.verify(archive, [keys / "b.pub"])


def test_a_new_build_takes_the_old_signature_away(signed, keys):
    bundle.check_writable(signed)
    bundle.write(signed, FILES, manifest(FILES))
    assert not (signed / ENVELOPE).exists() and os.listdir(signed.parent) == ["out"]
    with pytest.raises(SpecError, match="is not signed"):
        signing.verify(signed, [keys / "a.pub"])


def test_the_commands(out, keys, tmp_path):
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "edgebuild", *arguments]
        where = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), **environment}
        return subprocess.run(
            command, cwd=tmp_path, env=where, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
        )

    made = run("keys", "generate", "-o", "key", "--encrypt", EDGEBUILD_SIGNING_PASSPHRASE="open sesame")
    assert made.returncode == 0, made.stderr
    assert "encrypted" in made.stdout and "PRIVATE" not in made.stdout
    again = run("keys", "generate", "-o", "key")
    assert again.returncode == 2 and again.stderr.startswith("error: key exists already")
    alone = run("sign", "out", "--key", "key")
    assert alone.returncode == 2 and "EDGEBUILD_SIGNING_PASSPHRASE" in alone.stderr
    secret = (tmp_path / "key").read_text()
    done = run("sign", "out", EDGEBUILD_SIGNING_KEY=secret, EDGEBUILD_SIGNING_PASSPHRASE="open sesame")
    assert done.returncode == 0, done.stderr
    good = run("verify-signature", "out", "--key", "key.pub")
    assert good.returncode == 0 and "all 5 files as signed" in good.stdout, good.stderr
    for verb in ("check", "verify-bundle"):
        other = run(verb, "out", "--require-signature", str(keys / "b.pub"))
        assert other.returncode == 2 and "signed by none of the keys" in other.stderr, "before anything in it is used"
    (out / "plan.json").write_bytes(b"[]\n")
    bad = run("verify-signature", "out", "--key", "key.pub")
    assert bad.returncode == 2 and bad.stderr.startswith("error: out: plan.json was changed")
    assert bad.stderr.count("\n") == 1


def test_a_signed_bundle_is_run(tmp_path, keys):
    """`verify-bundle` runs what was verified, and does not read it a second time."""
    from edgebuild import verify_bundle

    files, said = runnable()
    bundle.write(tmp_path / "out", files, said)
    signing.sign(tmp_path / "out", [signing.signer(str(keys / "a"), never)])
    signed = signing.verify(tmp_path / "out", [keys / "a.pub"])
    shutil.rmtree(tmp_path / "out")
    checks: list[verify_bundle.Check] = []
    assert verify_bundle.verify(tmp_path / "out", checks.append, signed.bundle)
    assert len(checks) >= 4


# ------------------------------------------------------------------------------------------------ what is signed


def test_the_statement_is_in_toto_s_with_slsa_s_predicate(signed):
    """By the published schemas, which refuse what they do not know."""
    body = json.dumps(payload(signed))
    Statement.copy_from_pb(json_format.Parse(body, statement_pb2.Statement())).validate()
    said = payload(signed)
    assert said["_type"] == "https://in-toto.io/Statement/v1"
    assert said["predicateType"] == "https://slsa.dev/provenance/v1"
    made = json_format.ParseDict(said["predicate"], Provenance())
    assert made.build_definition.build_type and made.run_details.builder.id
    for needed in made.build_definition.resolved_dependencies:
        assert needed.uri or needed.digest or needed.content
    assert not made.run_details.metadata.HasField("finished_on"), "the same bundle shall give the same bytes"


def test_it_names_every_file_and_the_build(signed):
    said = payload(signed)
    contents = tree(signed)
    del contents[ENVELOPE]
    assert {one["name"]: one["digest"]["sha256"] for one in said["subject"]} == {
        name: hashlib.sha256(data).hexdigest() for name, data in contents.items()
    }
    made = manifest(FILES)
    definition = said["predicate"]["buildDefinition"]
    assert definition["externalParameters"] == {"task": made.task, "profile": "phone", "targets": ["host"]}
    assert definition["internalParameters"] == {"seed": 0}
    needed = {one["name"]: one for one in definition["resolvedDependencies"]}
    for name in ("plan.json", "profile.toml", "targets/host.toml"):
        assert needed.pop(name)["digest"]["sha256"] == hashlib.sha256(FILES[name]).hexdigest()
    assert needed.pop("python")["uri"] == "pkg:generic/python@3.11"
    assert needed.pop("torch")["uri"] == "pkg:pypi/torch@2.13.0%2Bcpu"
    assert {name: one["digest"] for name, one in needed.items()} == {
        name: {"edgebuild": getattr(made.provenance, name)} for name in ("sources", "weights", "calibration")
    }


def test_a_damaged_bundle_and_an_archive_are_not_signed(out, keys):
    key = [signing.signer(str(keys / "a"), never)]
    bundle.write_archive(out, out.with_suffix(".zip"))
    with pytest.raises(UsageError, match="edgebuild pack"):
        signing.sign(out.with_suffix(".zip"), key)
    (out / "plan.json").write_bytes(b"[]\n")
    with pytest.raises(SpecError, match=r"plan.json was changed"):
        signing.sign(out, key)
    assert not (out / ENVELOPE).exists() and sorted(os.listdir(out.parent)) == ["out", "out.zip"]


# ------------------------------------------------------------------------------------------------------ tampering


def rewrite(folder: Path, change) -> None:
    whole = envelope(folder)
    change(whole)
    (folder / ENVELOPE).write_text(json.dumps(whole))


def relist(folder: Path, files: dict[str, bytes]) -> None:
    """Other files, with a manifest that fits them, and the old signature."""
    old = (folder / ENVELOPE).read_bytes()
    bundle.write(folder, files, manifest(files))
    (folder / ENVELOPE).write_bytes(old)


def changed_payload(out: Path, keys: Path) -> None:
    body = base64.b64decode(envelope(out)["payload"]).replace(b'"small"', b'"smalL"')
    rewrite(out, lambda whole: whole.update(payload=base64.b64encode(body).decode()))


def other_spelling(out: Path, keys: Path) -> None:
    """The same JSON in other bytes: the signature is over bytes, not over what they mean."""
    rewrite(out, lambda whole: whole.update(payload=base64.b64encode(json.dumps(payload(out)).encode()).decode()))


def over_the_payload_alone(out: Path, keys: Path) -> None:
    """Signed, but not in the encoding that binds the payload's type."""
    body = base64.b64decode(envelope(out)["payload"])
    private = serialization.load_pem_private_key((keys / "a").read_bytes(), None)
    rewrite(out, lambda whole: whole["signatures"][0].update(sig=base64.b64encode(private.sign(body)).decode()))


def wrong_payload_type(out: Path, keys: Path) -> None:
    seal(out, keys / "a", base64.b64decode(envelope(out)["payload"]), "text/plain")


def relabelled(out: Path, keys: Path) -> None:
    """Signed as another type, and shown as ours."""
    wrong_payload_type(out, keys)
    rewrite(out, lambda whole: whole.update(payloadType=TYPE))


def other_key(out: Path, keys: Path) -> None:
    seal(out, keys / "b", base64.b64decode(envelope(out)["payload"]))


def claims_the_key(out: Path, keys: Path) -> None:
    keyid = envelope(out)["signatures"][0]["keyid"]
    other_key(out, keys)
    rewrite(out, lambda whole: whole["signatures"][0].update(keyid=keyid))


def statement(**changes):
    def spoil(out: Path, keys: Path) -> None:
        seal(out, keys / "a", json.dumps({**payload(out), **changes}).encode())

    return spoil


def subjects(change):
    def spoil(out: Path, keys: Path) -> None:
        said = payload(out)
        change(said["subject"])
        seal(out, keys / "a", json.dumps(said).encode())

    return spoil


def raw(data: bytes):
    return lambda out, keys: (out / ENVELOPE).write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out, keys: (out / ENVELOPE).unlink(), "is not signed"),
        (changed_payload, "is not what key [0-9a-f]{16} signed"),
        (other_spelling, "is not what key"),
        (over_the_payload_alone, "is not what key"),
        (wrong_payload_type, "holds 'text/plain'"),
        (relabelled, "signed by none of the keys"),
        (other_key, "signed by none of the keys"),
        (claims_the_key, "is not what key"),
        (lambda out, keys: rewrite(out, lambda whole: whole.update(signatures=[])), "no DSSE envelope"),
        (lambda out, keys: rewrite(out, lambda whole: whole["signatures"].extend(whole["signatures"] * 20)), "no DSSE"),
        (lambda out, keys: rewrite(out, lambda whole: whole["signatures"][0].update(sig="")), "is not what key"),
        (lambda out, keys: rewrite(out, lambda whole: whole["signatures"][0].update(sig="%")), "no DSSE envelope"),
        (lambda out, keys: rewrite(out, lambda whole: whole.update(payload="é")), "no DSSE envelope"),
        (lambda out, keys: rewrite(out, lambda whole: whole.pop("payloadType")), "no DSSE envelope"),
        (raw(b""), "no DSSE envelope"),
        (raw(b"\xff{"), "no DSSE envelope"),
        (raw(b"[" * 500_000), "no DSSE envelope"),
        (raw(b'{"payload": 1, "payloadType": [], "signatures": {}}'), "no DSSE envelope"),
        (raw(b" " * (bundle.PROVENANCE_LIMIT + 1)), "is larger than"),
        (lambda out, keys: seal(out, keys / "a", b"no JSON"), "no in-toto statement"),
        (lambda out, keys: seal(out, keys / "a", b"[" * 500_000), "no in-toto statement"),
        (statement(_type="https://in-toto.io/Statement/v0.1"), "Statement/v0.1'"),
        (statement(predicateType="https://slsa.dev/provenance/v0.2"), "provenance/v0.2'"),
        (statement(subject=[]), "is not covered by the signature"),
        (statement(subject=[{"name": "digits.pte"}]), "no in-toto statement"),
        (subjects(lambda found: found.pop(0)), "digits.pte is not covered by the signature"),
        (subjects(lambda found: found.pop(1)), "manifest.json is not covered by the signature"),
        (
            subjects(lambda found: found.append({"name": "x", "digest": {"sha256": "00"}})),
            "'x' was signed, and is missi",
        ),
        (subjects(lambda found: found.append(found[0])), "names a file twice"),
        (
            subjects(lambda found: found[0].update(digest={"sha256": "0" * 64})),
            "digits.pte is not the file that was sig",
        ),
        (subjects(lambda found: found[0].update(digest={"sha512": "0" * 128})), "digits.pte is not the file"),
        (lambda out, keys: relist(out, {**FILES, "digits.pte": b"another"}), "digits.pte is not the file that was sig"),
        (
            lambda out, keys: relist(out, {**FILES, "more.txt": b""}),
            "manifest.json is not the file|more.txt is not cov",
        ),
        (
            lambda out, keys: relist(out, {k: v for k, v in FILES.items() if k != "plan.json"}),
            "is not the file|missing",
        ),
        (lambda out, keys: (out / "digits.pte").write_bytes(b"cut"), "digits.pte is shorter"),
        (lambda out, keys: (out / "more.txt").write_bytes(b""), "more.txt is not listed"),
    ],
)
def test_whatever_is_changed_is_refused_and_stays(signed, keys, spoil, message):
    spoil(signed, keys)
    before = tree(signed.parent)
    with pytest.raises(SpecError, match=message) as error:
        signing.verify(signed, [keys / "a.pub"])
    assert "\n" not in str(error.value) and str(signed) in str(error.value)
    assert tree(signed.parent) == before


def test_mutated_envelopes(signed, keys):
    """Flipped, cut, doubled: refused, or with a payload that is signed to the byte all the same."""
    path, rng = signed / ENVELOPE, random.Random(6)
    good, body = path.read_bytes(), base64.b64decode(envelope(signed)["payload"])
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for _ in range(rng.choice((1, 1, 1, 4))):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[at : at + rng.randrange(1, 60)]
            elif kind == 2:
                data[at:at] = data[rng.randrange(len(data)) :][: rng.randrange(1, 60)]
            else:
                data[at] = rng.randrange(256)
        path.write_bytes(data)
        try:
            signing.verify(signed, [keys / "a.pub"])
        except SpecError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert base64.b64decode(envelope(signed)["payload"]) == body
    assert refused > 200


@pytest.mark.parametrize(
    "put",
    [
        lambda path: path.symlink_to(path.parent / "plan.json"),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
        lambda path: path.write_bytes(bytes(bundle.PROVENANCE_LIMIT + 1)),
    ],
    ids=["link", "folder", "pipe", "large"],
)
def test_the_envelope_is_a_plain_file_of_some_size(out, keys, put):
    put(out / ENVELOPE)
    for call in (bundle.read, lambda folder: signing.verify(folder, [keys / "a.pub"])):
        with pytest.raises(SpecError, match="provenance"):
            call(out)


# ---------------------------------------------------------------------------------------------------------- keys


def test_a_key_is_for_the_user_alone_and_never_replaced(tmp_path):
    before = os.umask(0)
    try:
        public, keyid = signing.generate(tmp_path / "key")
    finally:
        os.umask(before)
    assert public == tmp_path / "key.pub" and len(keyid) == 64
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    files = tree(tmp_path)
    with pytest.raises(UsageError, match="exists already"):
        signing.generate(tmp_path / "key")
    assert tree(tmp_path) == files
    (tmp_path / "key").unlink()
    with pytest.raises(UsageError, match=r"key.pub exists already"):
        signing.generate(tmp_path / "key")
    assert os.listdir(tmp_path) == ["key.pub"], "half a pair is of no use"
    with pytest.raises(UsageError, match="cannot write"):
        signing.generate(tmp_path / "nowhere" / "key")


def test_a_passphrase(tmp_path, out):
    signing.generate(tmp_path / "key", b"open sesame")
    assert b"ENCRYPTED" in (tmp_path / "key").read_bytes()
    for wrong in (b"", b"shut"):
        with pytest.raises(UsageError, match="wrong passphrase"):
            signing.signer(str(tmp_path / "key"), lambda wrong=wrong: wrong)
    signing.sign(out, [signing.signer((tmp_path / "key").read_text(), lambda: b"open sesame")])
    assert signing.verify(out, [tmp_path / "key.pub"]).bundle.files == FILES


def test_what_is_no_key(tmp_path, signed, keys):
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    other_curve = ec.generate_private_key(ec.SECP384R1())
    pem = serialization.Encoding.PEM
    for name, private in (("rsa", rsa_key), ("p384", other_curve)):
        form = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        (tmp_path / name).write_bytes(private.private_bytes(pem, *form))
        spki = serialization.PublicFormat.SubjectPublicKeyInfo
        (tmp_path / f"{name}.pub").write_bytes(private.public_key().public_bytes(pem, spki))
        for call in (
            lambda name=name: signing.signer(str(tmp_path / name), never),
            lambda name=name: signing.verify(signed, [tmp_path / f"{name}.pub"]),
        ):
            with pytest.raises(UsageError, match="use Ed25519 or ECDSA P-256"):
                call()
    (tmp_path / "text").write_text("no key")
    (tmp_path / "large").write_bytes(bytes(1 << 20))
    for name in ("text", "large", "missing"):
        for call in (
            lambda name=name: signing.signer(str(tmp_path / name), never),
            lambda name=name: signing.verify(signed, [tmp_path / name]),
        ):
            with pytest.raises(UsageError, match=name) as error:
                call()
            assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="is a private key"):
        signing.verify(signed, [keys / "a"])
    with pytest.raises(UsageError, match="none is given"):
        signing.verify(signed, [])
    with pytest.raises(UsageError, match="no bundle"):
        signing.verify(tmp_path / "nowhere", [keys / "a.pub"])


@pytest.mark.parametrize("absent", ["cryptography", "securesystemslib"])
def test_without_the_library(monkeypatch, keys, out, absent):
    for name in [name for name in sys.modules if name.split(".")[0] == absent]:
        monkeypatch.setitem(sys.modules, name, None)
    for call in (
        lambda: signing.generate(out / "key"),
        lambda: signing.signer(str(keys / "a"), never),
        lambda: signing.verify(out, [keys / "a.pub"]),
    ):
        with pytest.raises(MissingEnvironment, match=r"pip install 'edgebuild\[sign\]'"):
            call()
    assert bundle.read(out) == FILES


# ------------------------------------------------------------------------------------------------------- interop


def openssl(*arguments: str | Path) -> str:
    return subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=True).stdout


needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
ALGORITHMS = {"ed25519": ("ed25519",), "p256": ("EC", "-pkeyopt", "ec_paramgen_curve:P-256")}


@needs_openssl
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_openssl_s_key_signs_and_openssl_verifies(out, tmp_path, algorithm):
    key, public = tmp_path / "key", tmp_path / "key.pub"
    openssl("genpkey", "-algorithm", *ALGORITHMS[algorithm], "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", public)
    signing.sign(out, [signing.signer(str(key), never)])
    assert signing.verify(out, [public]).key == public
    whole = envelope(out)
    (tmp_path / "pae").write_bytes(pae(TYPE, base64.b64decode(whole["payload"])))
    (tmp_path / "sig").write_bytes(base64.b64decode(whole["signatures"][0]["sig"]))
    how = ["-pubin", "-inkey", public, "-rawin", *(("-digest", "sha256") if algorithm == "p256" else ())]
    said = openssl("pkeyutl", "-verify", *how, "-in", tmp_path / "pae", "-sigfile", tmp_path / "sig")
    assert "Signature Verified Successfully" in said


@needs_openssl
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_envelope_of_openssl_s_without_a_key_id_is_verified(signed, tmp_path, algorithm):
    """As cosign leaves it out; with URL-safe base64, which the format allows."""
    key, public = tmp_path / "key", tmp_path / "key.pub"
    openssl("genpkey", "-algorithm", *ALGORITHMS[algorithm], "-out", key)
    openssl("pkey", "-in", key, "-pubout", "-out", public)
    body = base64.b64decode(envelope(signed)["payload"])
    (tmp_path / "pae").write_bytes(pae(TYPE, body))
    how = ["-inkey", key, "-rawin", *(("-digest", "sha256") if algorithm == "p256" else ())]
    openssl("pkeyutl", "-sign", *how, "-in", tmp_path / "pae", "-out", tmp_path / "sig")
    signature = {"sig": base64.urlsafe_b64encode((tmp_path / "sig").read_bytes()).decode()}
    whole = {"payload": base64.urlsafe_b64encode(body).decode(), "payloadType": TYPE, "signatures": [signature]}
    (signed / ENVELOPE).write_text(json.dumps(whole))
    assert signing.verify(signed, [public]).bundle.files == FILES


@pytest.mark.skipif(shutil.which("jq") is None or shutil.which("openssl") is None, reason="needs jq and openssl")
def test_the_documented_way_without_edgebuild(signed, keys):
    text = (Path(__file__).parent.parent / "docs" / "signing.md").read_text(encoding="utf-8")
    (script,) = (block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "sha256sum" in block)
    command = ["bash", "-euo", "pipefail", "-c", script]
    where = {**os.environ, "KEY": str(keys / "a.pub"), "TMPDIR": str(signed.parent)}
    done = subprocess.run(command, cwd=signed, env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Signature Verified Successfully" in done.stdout and "manifest.json: OK" in done.stdout
    where["KEY"] = str(keys / "b.pub")
    assert subprocess.run(command, cwd=signed, env=where, capture_output=True, check=False).returncode


def test_in_toto_s_own_library_verifies(signed, keys):
    public = SSlibKey.from_crypto(serialization.load_pem_public_key((keys / "a.pub").read_bytes()))
    assert list(Envelope.from_dict(envelope(signed)).verify([public], 1)) == [public.keyid]
