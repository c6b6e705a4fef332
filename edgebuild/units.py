"""Quantities as people write them: "20 ms", "4 MiB". Each is a float in SI units; a bare number is an error."""

import re
from typing import ClassVar, Self

from edgebuild.errors import SpecError

_WRITTEN = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(\S.*?)?\s*")


class Quantity(float):
    """A float in the SI unit of its class. `units` maps each spelling to its factor, smallest first."""

    units: ClassVar[dict[str, float]] = {}

    @classmethod
    def parse(cls, written: object) -> Self:
        """Read "20 ms" and the like. Raises SpecError for a bare number, an unknown unit or a negative value."""
        examples = " or ".join(f'"{written if _is_number(written) else 20} {unit}"' for unit in cls._common())
        if _is_number(written):
            raise SpecError(f"a bare number, {written}, has no unit", f"write {examples}")
        match = _WRITTEN.fullmatch(written) if isinstance(written, str) else None
        if match is None:
            raise SpecError(f"{written!r} is not a quantity", f"write {examples}")
        number, unit = float(match[1]), match[2]
        if unit is None:
            raise SpecError(f'a bare number, "{written}", has no unit', f"write {examples}")
        if unit not in cls.units:
            raise SpecError(f"unknown unit {unit!r} in {written!r}", f"known: {', '.join(cls.units)}")
        if number < 0:
            raise SpecError(f"{written!r} is negative")
        return cls(number * cls.units[unit])

    @classmethod
    def _common(cls) -> list[str]:
        return list(cls.units)[:2]

    def __str__(self) -> str:
        shown = {unit: factor for unit, factor in self.units.items() if unit in self._shown()}
        unit, factor = next(iter(shown.items()))
        for unit_, factor_ in shown.items():
            if abs(self) >= factor_:
                unit, factor = unit_, factor_
        value = float(self) / factor
        return f"{value:,.0f} {unit}" if value >= 10_000 else f"{value:.4g} {unit}"

    @classmethod
    def _shown(cls) -> tuple[str, ...]:
        return tuple(cls.units)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Bytes(Quantity):
    """A size in bytes."""

    units: ClassVar = {"B": 1, "KB": 1e3, "kB": 1e3, "KiB": 2**10, "MB": 1e6, "MiB": 2**20, "GB": 1e9, "GiB": 2**30}

    @classmethod
    def _common(cls) -> list[str]:
        return ["KiB", "MiB"]

    @classmethod
    def _shown(cls) -> tuple[str, ...]:
        return ("B", "KiB", "MiB", "GiB")


class Seconds(Quantity):
    """A duration in seconds."""

    units: ClassVar = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}

    @classmethod
    def _common(cls) -> list[str]:
        return ["ms", "s"]


class Hertz(Quantity):
    """A clock in cycles a second."""

    units: ClassVar = {"Hz": 1, "kHz": 1e3, "MHz": 1e6, "GHz": 1e9}

    @classmethod
    def _common(cls) -> list[str]:
        return ["MHz", "GHz"]


class Bandwidth(Quantity):
    """Bytes a second."""

    units: ClassVar = {"B/s": 1, "MB/s": 1e6, "GB/s": 1e9}

    @classmethod
    def _common(cls) -> list[str]:
        return ["MB/s", "GB/s"]


class Throughput(Quantity):
    """Inferences a second."""

    units: ClassVar = {"/s": 1.0, "/min": 1 / 60}

    @classmethod
    def _shown(cls) -> tuple[str, ...]:
        return ("/s",)


class PerCycle(Quantity):
    """Operations a clock cycle, of one core."""

    units: ClassVar = {"/cycle": 1.0}


class Percent(Quantity):
    """A share; "80 %" is 0.8."""

    units: ClassVar = {"%": 0.01}


class Points(Quantity):
    """An absolute drop of a metric in [0, 1]; "1.5 points" is 0.015."""

    units: ClassVar = {"points": 0.01, "point": 0.01}

    @classmethod
    def _shown(cls) -> tuple[str, ...]:
        return ("points",)


def parse_drop(written: object) -> Points | Percent:
    """Read an accuracy drop, which says its kind: "1 point" (absolute) or "2 %" (of the original's metric)."""
    kinds: tuple[type[Points], type[Percent]] = (Points, Percent)
    for kind in kinds:
        if isinstance(written, str) and any(written.rstrip().endswith(unit) for unit in kind.units):
            return kind.parse(written)
    raise SpecError(
        f"{written!r} does not say which kind of drop it is",
        'write "1 point" for an absolute drop, or "2 %" for a share of the original\'s metric',
    )
