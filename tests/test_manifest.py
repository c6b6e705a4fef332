"""The manifest: its schema, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from bundles import contents

import edgebuild
from edgebuild import manifest
from edgebuild.errors import SpecError

FILES = {"model.pte": b"model", "plan.json": b"{}"}
SCHEMA = Path(edgebuild.__file__).with_name("schemas") / "manifest.json"


def written() -> dict[str, Any]:
    return json.loads(manifest.encode(contents(FILES), FILES))


def sealed(data: dict[str, Any]) -> bytes:
    """The bytes of a manifest as an attacker would write them."""
    rest = {key: value for key, value in data.items() if key != "checksum"}
    return json.dumps({**rest, "checksum": manifest.checksum(rest)}).encode()


def test_the_published_schema_is_that_of_the_code() -> None:
    assert SCHEMA.read_bytes() == manifest.schema()


def test_a_manifest_is_valid_by_its_schema() -> None:
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(written(), schema, cls=jsonschema.Draft202012Validator)
    for spoilt in ({**written(), "files": {"x": {}}}, {**written(), "more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(spoilt, schema, cls=jsonschema.Draft202012Validator)


def test_what_was_encoded_is_decoded() -> None:
    found = manifest.decode(manifest.encode(contents(FILES), FILES))
    assert found.artifact.file == "model.pte" and found.inputs == contents(FILES).inputs
    assert {name: file.size for name, file in found.files.items()} == {"model.pte": 5, "plan.json": 2}


def test_white_space_does_not_matter_and_a_changed_letter_does() -> None:
    data = written()
    assert manifest.decode(json.dumps(data).encode()) == manifest.decode(json.dumps(data, indent=7).encode())
    with pytest.raises(SpecError, match="was changed"):
        manifest.decode(json.dumps({**data, "task": "smell"}).encode())


def test_every_flipped_bit_is_refused_or_means_the_same() -> None:
    data = manifest.encode(contents(FILES), FILES)
    whole = manifest.decode(data)
    refused = 0
    for at in range(0, len(data), 3):
        spoilt = bytearray(data)
        spoilt[at] ^= 1 << at % 8
        try:
            assert manifest.decode(bytes(spoilt)) == whole
        except SpecError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(data) // 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 1}, "schema_version 1, this edgebuild reads 2"),
        ({"schema_version": 10**30}, "schema_version"),
        ({"schema_version": "2"}, "schema_version"),
        ({"kind": "else"}, "kind"),
        ({"files": []}, "files"),
        ({"files": {"model.pte": {"sha256": "0" * 63, "size": 5}}}, "sha256"),
        ({"files": {"model.pte": {"sha256": "0" * 64, "size": 1 << 54}}}, "size"),
        ({"files": {"model.pte": {"sha256": "0" * 64, "size": 5.5}}}, "size"),
        ({"files": {"model.pte": {"sha256": "0" * 64, "size": 5}}}, "two SHA-256"),
        ({"files": {}}, "'model.pte' as its artifact.file"),
        ({"inputs": None}, "inputs"),
        ({"task": {"a": 1}}, "task"),
        ({"more": 1}, "more"),
    ],
)
def test_an_absurd_manifest_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as error:
        manifest.decode(sealed({**written(), **change}))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("section", ["artifact", "runtime", "profile", "vectors", "provenance"])
def test_a_missing_or_unknown_field_is_named(section: str) -> None:
    data = written()
    name = next(iter(data[section]))
    for spoilt in ({**data[section], "more": 1}, {key: data[section][key] for key in data[section] if key != name}):
        with pytest.raises(SpecError, match=f"(`more`|`{name}`) - at `[$].{section}`"):
            manifest.decode(sealed({**data, section: spoilt}))


@pytest.mark.parametrize("number", ["NaN", "1e999", "9" * 5000, "-1", "[" * 100_000])
def test_an_absurd_number_is_refused(number: str) -> None:
    text = json.dumps(written()).replace('"atol": 0.1', f'"atol": {number}')
    with pytest.raises(SpecError, match="not edgebuild's"):
        manifest.decode(text.encode())
