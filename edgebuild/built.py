"""What realising a plan makes: the artifact with what is known of it, and the trained model. Kept in the cache."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
from torch import fx, nn

from edgebuild import cache
from edgebuild.devices import Arrays
from edgebuild.spec import Artifact, Technique
from edgebuild.training.run import Training


@dataclass(frozen=True)
class Built:
    """An artifact, eager PyTorch's outputs for the model that it was lowered from, how training and quantizing went.

    `loss`: nats of the softened output distribution from the base's model to what was lowered, on the calibration
    samples; `unrounded`: before it was quantized. `losses`: what each technique added to it, in the order of the flow;
    of an untrained plan alone. `steps`: of distillation, as they were made.
    """

    artifact: Artifact
    expected: tuple[Arrays, ...]
    training: str
    steps: int
    reused: bool
    loss: float
    unrounded: float
    losses: Mapping[Technique, float]
    quantization: str = ""
    lowered: nn.Module | None = field(default=None, compare=False)  # None where the artifact came from the cache

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.artifact.data).hexdigest()


def write(name: str, built: Built) -> None:
    """Keep an artifact and what is known of it."""
    from safetensors.numpy import save

    facts = {key: value for key, value in asdict(built.artifact).items() if key not in ("data", "graphs")}
    tensors = {"artifact": np.frombuffer(built.artifact.data, dtype=np.uint8)}
    tensors |= {f"graph.{i:04}": np.frombuffer(g, dtype=np.uint8) for i, g in enumerate(built.artifact.graphs)}
    for s, sample in enumerate(built.expected):
        tensors |= {f"{s:04}.{i}": np.ascontiguousarray(y) for i, y in enumerate(sample)}
    losses = json.dumps({"total": built.loss} | dict(built.losses))
    about = {
        "facts": json.dumps(facts),
        "training": built.training,
        "steps": str(built.steps),
        "quantization": built.quantization,
        "losses": losses,
        "unrounded": repr(built.unrounded),
    }
    cache.write("built", name, save(tensors, about))


def write_trained(name: str, model: fx.GraphModule, how: Training) -> None:
    """Keep a trained model's weights and how its training went."""
    from safetensors.torch import save

    tensors = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    cache.write("trained", name, save(tensors, {"how": str(how), "steps": str(how.steps)}))


def read_trained(name: str, model: fx.GraphModule) -> tuple[fx.GraphModule, str, int] | None:
    """A copy of the model with the weights that were kept, how its training went, and its steps; None without."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = cache.read("trained", name)
    if data is None:
        return None
    try:
        about = about_of(data)
        trained = copy.deepcopy(model)
        trained.load_state_dict(load(data))
        return trained, about["how"], int(about["steps"])
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        return None  # damaged: it is made again


def read(name: str) -> Built | None:
    """What was kept under a name, or None: nothing was, or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = cache.read("built", name)
    if data is None:
        return None
    try:
        tensors = load(data)
        metadata = about_of(data)
        facts = json.loads(metadata["facts"])
        samples: dict[str, list[np.ndarray]] = {}
        for key in sorted(key for key in tensors if key[0].isdigit()):
            samples.setdefault(key.partition(".")[0], []).append(tensors[key])
        facts["fallen_back"] = tuple(facts["fallen_back"])
        graphs = tuple(tensors[key].tobytes() for key in sorted(tensors) if key.startswith("graph."))
        artifact = Artifact(data=tensors["artifact"].tobytes(), graphs=graphs, **facts)
        expected, losses = tuple(tuple(outputs) for outputs in samples.values()), json.loads(metadata["losses"])
        total, steps, unrounded = losses.pop("total"), int(metadata["steps"]), float(metadata["unrounded"])
        how, rounded = metadata["training"], metadata["quantization"]
        return Built(artifact, expected, how, steps, True, total, unrounded, losses, rounded)
    except (SafetensorError, KeyError, ValueError, TypeError):
        return None  # damaged: it is made again


def about_of(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file, which its reader of bytes leaves out."""
    about: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    return about
