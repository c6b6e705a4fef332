"""The store: what was written is read, and a damaged file counts as none."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from edgebuild import cache


@dataclass(frozen=True)
class Fit:
    name: str
    values: tuple[float, ...]


def test_a_value_comes_back_as_its_type(empty_cache: Path) -> None:
    fit = Fit("gemm", (1.5, 2.0))
    assert cache.read_as("fits", "a.json", Fit) is None
    cache.write("fits", "a.json", msgspec.json.encode(fit))
    assert cache.read_as("fits", "a.json", Fit) == fit
    cache.write("fits", "b.json", msgspec.json.encode({"a": 1.0}))
    assert cache.read_as("fits", "b.json", dict[str, float]) == {"a": 1.0}
    assert cache.read_as("fits", "b.json", Fit) is None, "a value of another type"


@pytest.mark.parametrize("damaged", [b"", b'{"name": "gemm", "val', b"\xff\xfe", b"[]", b'{"name": 1, "values": []}'])
def test_a_damaged_file_counts_as_none(empty_cache: Path, damaged: bytes) -> None:
    cache.write("fits", "a.json", damaged)
    assert cache.read("fits", "a.json") == damaged
    assert cache.read_as("fits", "a.json", Fit) is None
