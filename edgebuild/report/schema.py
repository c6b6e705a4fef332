"""A report as JSON, and back without trusting it."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from inspect import cleandoc
from math import isfinite
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from edgebuild import spec
from edgebuild.errors import SpecError

SCHEMA_VERSION = 1


def to_json(report: Any) -> str:
    """A `spec.Report`, or another value with `findings`, as JSON: fields in their order, mappings sorted, indented.

    A figure that is not finite becomes null, and a finding says which and what it was. One is expected and has none:
    the SQNR of outputs without any noise, which is infinite.
    """
    odd: list[tuple[str, float]] = []
    data = _plain(report, "", odd)
    data["findings"] += [
        {"kind": "note", "where": where, "what": f"the figure is {value} and was written as null"}
        for where, value in odd
        if not (where.endswith(".sqnr_db") and value == float("inf"))
    ]
    return msgspec.json.format(msgspec.json.encode(data), indent=2).decode() + "\n"


def from_json(text: str | bytes) -> dict[str, Any]:
    """The report as a dict, after its schema version and its shape were checked. Raises SpecError."""
    try:
        data = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeError) as error:
        raise SpecError(f"report: not JSON: {error}") from None
    if not isinstance(data, dict) or "schema_version" not in data:
        raise SpecError("report: no schema_version", "give the report.json that a build wrote")
    if data["schema_version"] != SCHEMA_VERSION:
        raise SpecError(
            f"report: schema_version is {data['schema_version']!r}, and this edgebuild reads {SCHEMA_VERSION}",
            "read it with the edgebuild version that wrote it",
        )
    try:
        msgspec.convert(_filled(data, spec.Report, ""), spec.Report)
    except msgspec.ValidationError as error:
        raise SpecError(f"report: {str(error).replace('$.', '')}") from None
    return data


def schema() -> dict[str, Any]:
    """What report.json holds, as JSON Schema 2020-12. Made from `edgebuild.spec`, as strict as `from_json`.

    Every key is there and no other; a figure may be null, where it is not known or was not finite.
    """
    (top,), parts = msgspec.json.schema_components([spec.Report], ref_template="#/$defs/{name}")
    for part in parts.values():
        part |= {"required": list(part["properties"]), "additionalProperties": False}
        part["description"] = cleandoc(part["description"])
        for item in part["properties"].values():
            item.pop("default", None)  # no key may be left out
    parts["Report"]["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:edgebuild:report:{SCHEMA_VERSION}",
        "title": "The report of a build by edgebuild",
        **top,
        "$defs": {name: _nullable(part) for name, part in parts.items()},
    }


def _nullable(part: Any) -> Any:
    """The schema with null beside each number that is a figure; counts are integers and stay."""
    if isinstance(part, list):
        return [_nullable(item) for item in part]
    if not isinstance(part, dict):
        return part
    if part.get("type") == "number":
        return {**part, "type": ["number", "null"]}
    return {key: _nullable(value) for key, value in part.items()}


def _plain(value: Any, where: str, odd: list[tuple[str, float]]) -> Any:
    """A value as JSON knows it. Also takes the numbers of numpy and `edgebuild.units`, and text that is no UTF-8."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        if not isfinite(value):
            odd.append((where, float(value)))
            return None
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(key, where, odd): _plain(value[key], _at(where, key), odd) for key in sorted(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item, f"{where}[{i}]", odd) for i, item in enumerate(value)]
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name), _at(where, field.name), odd) for field in fields(value)}
    raise TypeError(f"{where}: a report cannot hold a {type(value).__name__}")


def _filled(value: Any, hint: Any, where: str) -> Any:
    """The value with a number for each null that stands for one; refuses missing and unknown keys."""
    origin, parts = get_origin(hint), get_args(hint)
    if value is None and hint is float:
        return 0.0
    if origin in (Union, UnionType):  # always `kind | None` in a report
        return None if value is None else _filled(value, parts[0], where)
    if isinstance(value, list) and origin is tuple:
        return [_filled(item, parts[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and origin is Mapping:
        return {key: _filled(item, parts[1], _at(where, key)) for key, item in value.items()}
    if isinstance(value, dict) and is_dataclass(hint):
        hints = get_type_hints(hint)
        for key in [*hints, *value]:
            if key not in value or key not in hints:
                raise SpecError(f"report: {'unknown' if key in value else 'missing'} key {_at(where, key)!r}")
        return {key: _filled(item, hints[key], _at(where, key)) for key, item in value.items()}
    return value


def _at(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
