"""What a layer costs on a machine, learnt from the times of a few hundred layers, measured or simulated.

A layer's time is a sum of terms (`_terms`), each an amount times the seconds for one of its units: multiply-accumulates
in whole kernel tiles, elements read and written, weights, one for the operator itself. The tiles are those that explain
the times best, since they differ with the instruction set. What the sum leaves over is interpolated in the logarithm of
a layer's dimensions by a Gaussian process (Rasmussen and Williams, "Gaussian Processes for Machine Learning", 2006,
chapter 2), which fades out where nothing was timed: there the sum alone speaks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import prod

import numpy as np
from numpy.typing import NDArray

from edgebuild.devices.operators import parts
from edgebuild.spec import MODEL_INPUT, CalibrationError, LayerFacts, Precision

Array = NDArray[np.float64]
Sample = tuple[LayerFacts, Precision, float]

# Operators that are timed as another one that reads and writes as much.
LIKE = {
    "avg_pool2d": "max_pool2d", "mean": "adaptive_avg_pool2d", "sub": "add", "truediv": "mul", "div": "mul",
    "cat": "add", "tanh": "sigmoid", "gelu": "silu", "softmax": "silu",
}  # fmt: skip
OTHER = "other"  # the kind of an operator that is like none that was timed
KERNELS = ("gemm", "igemm", "depthwise")

ROWS, COLUMNS, DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16), (4, 8, 16, 32, 64), (1, 2, 4, 8)
ROOMS = (1 << 40, 1 << 16, 1 << 17, 1 << 18, 1 << 19, 1 << 20, 1 << 21)
LENGTHS, NOISES = (0.4, 0.8, 1.6), (0.03, 0.1, 0.3, 1.0)  # in e-foldings; a share of the residuals' spread
FARTHEST = 0.5  # the interpolation may move a logarithm by so much


@dataclass(frozen=True)
class Tile:
    """What a kernel computes at once: output positions, output channels, input channels.

    Layers whose channels do not fill their tiles may be left to a slower kernel: `half` says that half a tile's columns
    are enough for a layer that has no more, `edge` that any layer is made of half tiles. A layer of more than `room`
    weights fetches them again for each row of tiles.
    """

    rows: int = 1
    columns: int = 1
    depth: int = 1
    half: bool = False
    edge: bool = False
    room: float = ROOMS[0]


@dataclass(frozen=True)
class Curve:
    """The fitted cost of a kind of layer in a precision.

    `unit` holds the seconds for one of each term. The interpolation is a sum over the timed layers' `points` (see
    `_places`) with `weights`, of Gaussians as wide as `length`.
    """

    tile: Tile
    unit: tuple[float, ...]
    length: float
    points: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def seconds(self, dimensions: Array) -> Array:
        """Predicted seconds of layers, given their dimensions [layers, 6] as of `_dimensions`."""
        base = _terms(dimensions, self.tile) @ np.array(self.unit)
        moved = _kernel(_places(dimensions, self.tile), np.array(self.points), self.length) @ np.array(self.weights)
        return base * np.exp(np.clip(moved, -FARTHEST, FARTHEST))


@dataclass(frozen=True)
class Rates:
    """All curves, under "kind.precision"; the seconds of a call beside its layers; how far off the curves are."""

    call: float
    curves: Mapping[str, Curve]
    errors: tuple[CalibrationError, ...]

    def seconds(self, layers: Sequence[tuple[LayerFacts, Precision]]) -> Array:
        """Predicted seconds of each layer for a single sample."""
        split = [(part, precision, i) for i, (layer, precision) in enumerate(layers) for part in parts(layer)]
        taken = np.zeros(len(split))
        for key, places in _grouped((kind(part), precision) for part, precision, _ in split).items():
            curve = self.curves.get(key) or self.curves[other(key)]
            taken[places] = curve.seconds(np.array([_dimensions(split[i][0]) for i in places]))
        found: Array = np.bincount([i for _, _, i in split], taken, len(layers)).astype(np.float64)
        # What reads the model's input pays for its copy and for turning it to channels last.
        for i, (layer, precision) in enumerate(layers):
            if reads_input(layer):
                found[i] += float(self.curves[f"input.{precision}"].seconds(np.array([_tensor(layer)]))[0])
        return found


@cache
def kind(layer: LayerFacts) -> str:
    """Which curve a layer belongs to."""
    if layer.op in ("linear", "bmm"):
        return "gemm"
    if layer.op == "conv2d":
        plain = prod(layer.kernel) == prod(layer.stride) == 1
        return "depthwise" if layer.depthwise else "gemm" if plain else "igemm"
    if layer.op == "mul" and layer.in_elements < 2 * layer.out_elements:
        return "scale"
    return LIKE.get(layer.op, layer.op)


def reads_input(layer: LayerFacts) -> bool:
    """Whether a layer waits for the model's input to be turned to channels last."""
    return MODEL_INPUT in layer.sources and len(layer.in_shape) == 4


def other(key: str) -> str:
    """The curve of operators that are like none that was timed, in the precision of a key."""
    return f"{OTHER}.{key.rpartition('.')[2]}"


def _grouped(keys: Iterable[tuple[str, Precision]]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for i, (name, precision) in enumerate(keys):
        places.setdefault(f"{name}.{precision}", []).append(i)
    return places


# ------------------------------------------------------------------------------------------------------- the terms


@cache
def _dimensions(layer: LayerFacts) -> tuple[float, ...]:
    """Groups, output positions, output and input channels of a group, kernel taps, elements read.

    Groups are 0.5 for a depthwise convolution, and 0 for an operator without weights, which has elements read and
    written and channels in place of the rest.
    """
    if layer.op == "bmm":  # the second factor takes the place of weights
        return 1, layer.positions, layer.out_channels, layer.in_channels, 1, layer.in_elements
    if not layer.weighted:
        return 0, layer.in_elements, layer.out_elements, max(layer.in_channels, 1), 1, 1
    if layer.depthwise:
        return 0.5, layer.positions, layer.out_channels, 1, prod(layer.kernel), layer.in_elements
    each = layer.out_channels / layer.groups, layer.in_channels / layer.groups
    return layer.groups, layer.positions, *each, prod(layer.kernel), layer.in_elements


def _tensor(layer: LayerFacts) -> tuple[float, ...]:
    return 0, layer.in_elements, layer.in_elements, max(layer.in_channels, 1), 1, 1


def _places(dimensions: Array, tile: Tile) -> Array:
    """Where layers lie for the interpolation: their dimensions' logarithms; apart, whether they fill their tiles."""
    torn = dimensions[:, 2] % tile.columns > 0
    return np.column_stack([np.log(np.maximum(dimensions[:, 1:], 1.0)), 2.0 * torn])


def _terms(dimensions: Array, tile: Tile) -> Array:
    """Amounts of what layers of one kind cost, [layers, terms]."""
    groups, rows, columns, depth, taps, inputs = dimensions.T
    one = np.ones_like(rows)
    if not groups[0]:  # elements read and written, and runs of one channel each
        return np.stack([one, rows + columns, np.maximum(rows, columns) / depth], 1)
    torn = columns % tile.columns > 0
    wide = _up(columns, tile.columns // 2 if tile.edge else tile.columns)
    if tile.half:
        wide = np.where(columns <= tile.columns / 2, tile.columns / 2, wide)
    if groups[0] == 0.5:
        return np.stack([one, rows * wide * taps, rows * taps, rows * columns, columns * taps, inputs], 1)
    tall, deep = _up(rows, tile.rows), _up(depth, tile.depth) * taps
    read, write, weights = rows * deep, rows * columns, columns * deep
    tiles = tall * wide / (tile.rows * tile.columns)
    again = tall / tile.rows * weights * (weights > tile.room)
    whole = tall * wide * deep
    found = (whole, whole * torn, tiles, read, write, weights, again, rows, inputs / groups)
    return np.stack([one, *(groups * term for term in found)], 1)


def _up(count: Array, tile: int) -> Array:
    return np.ceil(count / tile) * tile


def _kernel(left: Array, right: Array, length: float) -> Array:
    apart = ((left[:, None, :] - right[None, :, :]) ** 2).sum(2)
    return np.exp(-0.5 * apart / length**2)


# --------------------------------------------------------------------------------------------------------- the fit


def fit(samples: Sequence[Sample], call: float) -> Rates:
    """Curves through the times of single layers in seconds; `call` is that of an inference without layers."""
    curves, errors = {}, []
    kept = [sample for sample in samples if sample[2] > 0]
    groups = _grouped((kind(layer), precision) for layer, precision, _ in kept)
    for key, places in groups.items():
        curves[key], error = fit_kind([kept[i] for i in places])
        errors.append(error)
    for precision in {sample[1] for sample in kept}:
        plain = [s for s in kept if s[1] == precision and not s[0].weighted and s[0].op != "input"]
        if plain:
            curves[f"{OTHER}.{precision}"] = fit_others(plain)
    return Rates(call, curves, tuple(errors))


def fit_kind(samples: Sequence[Sample]) -> tuple[Curve, CalibrationError]:
    """The curve of layers that are all of one kind and precision, and how far off it is on the layers left out."""
    name, precision = kind(samples[0][0]), samples[0][1]
    dimensions, seconds = _columns(samples)
    curve = _curve(dimensions, seconds, _tile(dimensions, seconds, name))
    return curve, _error(name, precision, dimensions, seconds, curve)


def fit_others(samples: Sequence[Sample]) -> Curve:
    """A curve through operators of many kinds, all without weights."""
    return _curve(*_columns(samples), Tile(), interpolate=False)


def _columns(samples: Sequence[Sample]) -> tuple[Array, Array]:
    return (
        np.array([_dimensions(layer) for layer, _, _ in samples]),
        np.array([seconds for _, _, seconds in samples]),
    )


def _tile(dimensions: Array, seconds: Array, name: str) -> Tile:
    """The tile with which the terms alone explain the times best."""
    if name not in KERNELS:
        return Tile()
    dense = name != "depthwise"
    edges = (False, True) if dense else (False,)
    options = product(ROWS if dense else (1,), COLUMNS, DEPTHS if dense else (1,), (False, True), edges)

    def rest(tile: Tile) -> float:
        terms = _terms(dimensions, tile)
        return float(np.abs(np.log(np.maximum(terms @ _unit(terms, seconds), 1e-12) / seconds)).mean())

    best = min((Tile(*option) for option in options), key=rest)
    return min((replace(best, room=room) for room in ROOMS), key=rest) if dense else best


def _unit(terms: Array, seconds: Array) -> Array:
    """Non-negative least squares on the relative error, and once more with less weight for what fits badly."""
    from scipy.optimize import nnls

    scale = np.where(terms.max(axis=0) > 0, terms.max(axis=0), 1.0)  # the units differ by ten orders of magnitude
    rows = terms / scale / seconds[:, None]
    weight = np.ones(len(rows))
    for _ in range(2):
        found, _ = nnls(rows * weight[:, None], weight)
        off = np.abs(rows @ found - 1)
        weight = 1 / np.sqrt(1 + (off / max(2 * float(np.median(off)), 1e-9)) ** 2)
    return found / scale


def _curve(dimensions: Array, seconds: Array, tile: Tile, interpolate: bool = True) -> Curve:
    terms = _terms(dimensions, tile)
    unit = _unit(terms, seconds)
    rest = np.log(seconds / np.maximum(terms @ unit, 1e-12))
    points = _places(dimensions, tile)
    length, weights = LENGTHS[0], np.zeros_like(rest)
    if interpolate and len(rest) > 2:
        best = np.abs(rest).mean()
        for option, noise in product(LENGTHS, NOISES):
            inverse = np.linalg.inv(_kernel(points, points, option) + noise**2 * np.eye(len(rest)))
            guess = inverse @ rest
            left_out = np.abs(guess / np.diag(inverse)).mean()  # Rasmussen and Williams, equation 5.12
            if left_out < best:
                best, length, weights = left_out, option, guess
    return Curve(tile, tuple(unit.tolist()), length, tuple(map(tuple, points.tolist())), tuple(weights.tolist()))


def _error(name: str, precision: Precision, dimensions: Array, seconds: Array, curve: Curve) -> CalibrationError:
    found = []
    for i in range(len(seconds)):
        others = np.arange(len(seconds)) != i
        trial = _curve(dimensions[others], seconds[others], curve.tile)
        found.append(abs(float(trial.seconds(dimensions[i : i + 1])[0]) / seconds[i] - 1))
    return CalibrationError(name, precision, len(found), float(np.median(found)), float(max(found)))
