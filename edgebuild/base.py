"""A model to compress: what it consists of, what could be done to it, and what that is estimated to lose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx, nn

from edgebuild import analysis, cache, trials
from edgebuild.analyse import analyse, check_prunable
from edgebuild.analysis import Analysis
from edgebuild.backends import Backend
from edgebuild.environment import versions
from edgebuild.load import Loaded
from edgebuild.sensitivity import Sensitivity, measure, moments
from edgebuild.spec import Candidate, ModelFacts, Profile, Scheme, Technique, Trial
from edgebuild.transforms import factorize, prune, quantize

SENSITIVITY_SAMPLES = 32
MOSTLY_LINEAR = 0.6  # of the MACs: from there on int8 ranged at run time and 4-bit groups are worth a trial
TILE = 8  # channels that XNNPACK's int8 and fp32 micro-kernels take at once, at the least, on every shipped core


@dataclass(frozen=True)
class Base:
    """A model to compress, analysed: the task's own, the same without some blocks, or its student once distilled.

    `backend` is what its plans are lowered by. The candidates' losses are calibrated by `trials`, for int8 in the
    `scheme` that loses less. `digest` covers the weights and all inputs that a realised plan depends on; `fresh` takes
    nothing from the cache but what was `made` in this build, `reused` says that the analysis was taken from there.
    `dropped`: the blocks that it is without, and `lost`, the nats from the task's model to this one; `why` it is tried.
    """

    name: str  # as in a plan: model, shortened or student
    model: fx.GraphModule
    facts: ModelFacts
    sensitivity: Sensitivity
    candidates: tuple[Candidate, ...]
    digest: str
    backend: Backend
    fresh: bool = False
    reused: bool = False
    made: set[str] = field(default_factory=set, compare=False)
    training: str = ""
    trials: tuple[Trial, ...] = ()
    scheme: Scheme = "static"
    dropped: tuple[str, ...] = ()
    lost: float = 0.0
    why: tuple[str, ...] = ()


def spread(samples: tuple[tuple[Tensor, ...], ...], most: int = SENSITIVITY_SAMPLES) -> tuple[tuple[Tensor, ...], ...]:
    """Some samples from all over the calibration data: as many as losses are measured on, if not said otherwise."""
    return samples[:: max(1, len(samples) // most)][:most]


def lifted_digest(model: fx.GraphModule) -> str:
    """SHA-256 of a model's graph, the settings of its layers, and its weights."""
    tensors = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in model.state_dict().items()]
    data = [t.detach().contiguous().numpy().tobytes() for t in model.state_dict().values()]
    return cache.key(str(model.graph), str(model), *tensors, *data)


def samples_digest(samples: Sequence[tuple[Tensor, ...]]) -> str:
    """SHA-256 of input tensors."""
    tensors = [x for sample in samples for x in sample]
    shapes = [f"{tuple(x.shape)} {x.dtype}" for x in tensors]
    return cache.key(*shapes, *(x.contiguous().numpy().tobytes() for x in tensors))


def prepare(
    name: str,
    model: fx.GraphModule,
    loaded: Loaded,
    profile: Profile,
    backend: Backend,
    inputs_digest: str,
    fresh: bool,
) -> Base:
    """Analyse a lifted model and say what could be done to it, or take that from the cache."""
    digest = lifted_digest(model)
    techniques = sorted(set(profile.techniques) - {"distil"})
    settings = (techniques, backend, profile.seed, loaded.task.outputs, sorted(versions().items()))
    keep = cache.key(digest, samples_digest([loaded.task.example_inputs, *loaded.samples]), repr(settings))
    with cache.locked(analysis.KIND, keep):
        kept = None if fresh else analysis.read(keep)
        found = kept or _analysed(model, loaded, profile, backend)
        if kept is None:
            analysis.write(keep, found)
    return Base(
        name=name,
        model=model,
        facts=found.facts,
        sensitivity=found.sensitivity,
        candidates=found.candidates,
        digest=cache.key(digest, inputs_digest),
        backend=backend,
        fresh=fresh,
        reused=kept is not None,
        trials=found.trials,
        scheme=trials.scheme_of(found.trials),
    )


def narrowed(base: Base, model: fx.GraphModule, loaded: Loaded, seed: int) -> Base:
    """The base with a model that was made of it, its channels ranked anew: to be cut further, not to be planned for."""
    facts, found = _studied(model, loaded, ("prune",), seed)
    return replace(base, model=model, facts=facts, sensitivity=found, candidates=(), trials=())


def _studied(
    model: fx.GraphModule, loaded: Loaded, techniques: Sequence[Technique], seed: int
) -> tuple[ModelFacts, Sensitivity]:
    """What a model consists of, and how sensitive it is to what the techniques would do to it."""
    inputs, logits = loaded.task.example_inputs, loaded.task.outputs == "logits"
    facts = analyse(model, inputs)
    facts = check_prunable(model, inputs, facts) if "prune" in techniques else facts
    if not {"prune", "factorize", "quantize"} & set(techniques):
        return facts, Sensitivity({}, {}, {}, {})
    samples = spread(loaded.samples)
    seen = moments(model, facts, loaded.samples)
    probes = factorize.probes(model, facts, seen, TILE) if "factorize" in techniques else {}
    found = measure(model, facts, samples, probes, seen, logits, seed)
    return facts, prune.ranked(model, facts, found, samples, logits) if "prune" in techniques else found


def _analysed(model: fx.GraphModule, loaded: Loaded, profile: Profile, backend: Backend) -> Analysis:
    inputs, samples, logits = loaded.task.example_inputs, spread(loaded.samples), loaded.task.outputs == "logits"
    techniques = profile.techniques
    facts, found = _studied(model, loaded, techniques, profile.seed)
    candidates: tuple[Candidate, ...] = ()
    if "prune" in techniques:
        candidates += prune.candidates(model, facts, found, samples, TILE, logits)
    if "factorize" in techniques:
        candidates += factorize.candidates(facts, found, TILE)
    if "quantize" in techniques:
        candidates += quantize.candidates(facts, found)
    laid = backend.layout(inputs)

    def quantized(scheme: Scheme) -> Callable[[Sequence[tuple[Tensor, ...]]], nn.Module]:
        return lambda few: quantize.apply(model, laid, few, backend.quantizer((), scheme), logits).model

    schemes = backend.schemes if _linear_share(facts) > MOSTLY_LINEAR else backend.schemes[:1]
    ways = {scheme: quantized(scheme) for scheme in schemes}
    tried = trials.run(model, facts, found, candidates, samples, ways, logits, profile.seed)
    candidates = trials.rescaled(candidates, trials.of_scheme(tried, trials.scheme_of(tried)))
    return Analysis(facts, found, candidates, tried)


def _linear_share(facts: ModelFacts) -> float:
    """The linear layers' share of the multiply-accumulates."""
    return sum(layer.macs for layer in facts.layers if layer.op == "linear") / max(1, facts.macs)
