"""What is known of a model before anything is done to it. Kept in the cache as safetensors: nothing is unpickled."""

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from edgebuild import cache
from edgebuild.built import about_of
from edgebuild.sensitivity import Sensitivity
from edgebuild.spec import Candidate, Cast, ChannelGroup, Form, LayerFacts, ModelFacts, Trial, Width

KIND = "analysis"
PARTS = ("gates", "probed", "moments", "ranking")


@dataclass(frozen=True)
class Analysis:
    """Layer facts, sensitivities, and candidates with losses that the trials have calibrated."""

    facts: ModelFacts
    sensitivity: Sensitivity
    candidates: tuple[Candidate, ...]
    trials: tuple[Trial, ...]


class _Written(msgspec.Struct):
    """What is no tensor. `arrays` gives the names of the tensors of each part in order."""

    layers: tuple[LayerFacts, ...]
    groups: tuple[ChannelGroup, ...]
    unprunable: dict[str, str]
    casts: dict[str, float]
    candidates: list[tuple[dict[str, Any], float]]
    trials: tuple[Trial, ...]
    arrays: dict[str, list[str]]


def write(name: str, found: Analysis) -> None:
    """Keep an analysis."""
    from safetensors.numpy import save

    facts, sensitivity = found.facts, found.sensitivity
    parts: dict[str, dict[str, Any]] = {part: dict(getattr(sensitivity, part)) for part in PARTS}
    parts["moments"] = {key: moment.numpy() for key, moment in sensitivity.moments.items()}
    arrays = {f"{part}/{key}": np.ascontiguousarray(x) for part, of in parts.items() for key, x in of.items()}
    about = _Written(
        facts.layers,
        facts.groups,
        dict(facts.unprunable),
        dict(sensitivity.casts),
        [(msgspec.to_builtins(candidate.choice), candidate.loss) for candidate in found.candidates],
        found.trials,
        {part: list(of) for part, of in parts.items()},
    )
    cache.write(KIND, name, save(arrays, {"about": msgspec.json.encode(about).decode()}))


def read(name: str) -> Analysis | None:
    """What was kept under a name, or None: nothing was, or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = cache.read(KIND, name)
    if data is None:
        return None
    try:
        arrays = {key: array.copy() for key, array in load(data).items()}
        about = msgspec.json.decode(about_of(data)["about"], type=_Written)
        parts = {part: {key: arrays[f"{part}/{key}"] for key in about.arrays[part]} for part in PARTS}
        moments = {key: torch.from_numpy(array) for key, array in parts.pop("moments").items()}
        return Analysis(
            ModelFacts(about.layers, about.groups, about.unprunable),
            Sensitivity(casts=about.casts, moments=moments, **parts),
            tuple(Candidate(_choice(choice), loss) for choice, loss in about.candidates),
            about.trials,
        )
    except (SafetensorError, msgspec.MsgspecError, KeyError, ValueError, TypeError):
        return None  # damaged: it is made again


def _choice(written: dict[str, Any]) -> Width | Form | Cast:
    if "group" in written:
        return msgspec.convert(written, Width)
    return msgspec.convert(written, Form) if "kind" in written else msgspec.convert(written, Cast)
