"""What a change really does to a model: the KL divergence between its outputs before and after it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgebuild.lift import batch_is_free, outputs_of, stacked

# A trained classifier is so sure of itself that its gradients vanish; the softened distribution still ranks the
# changes, and is what distillation fits.
TEMPERATURE = 4.0
BATCH = 16


def batches(model: fx.GraphModule, samples: Sequence[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
    """The samples as batches of up to 16 where the model takes batches, else one by one."""
    size = BATCH if batch_is_free(model, samples[0]) else 1
    return list(stacked(samples, size))


def divergence(before: Sequence[Tensor], after: Sequence[Tensor], logits: bool) -> float:
    """KL divergence in nats a sample from the outputs before a change to those after it, softened as the estimates are.

    For values with unit Gaussian noise it is half the squared distance.
    """
    total = 0.0
    for y, z in zip(before, after, strict=True):
        if not y.is_floating_point():
            continue
        y, z = y.detach().double(), z.detach().double()
        if logits and y.dim() >= 2:
            p, q = (y / TEMPERATURE).log_softmax(-1), (z / TEMPERATURE).log_softmax(-1)
            total += float((p.exp() * (p - q)).sum()) / len(y)
        else:
            total += 0.5 * float((y - z).square().sum()) / len(y)
    return max(total, 0.0)


def distance(model: nn.Module, other: nn.Module, inputs: Sequence[tuple[Tensor, ...]], logits: bool) -> float:
    """The KL divergence (nats a sample) from a model to another, on inputs in batches that both take."""
    total = 0.0
    with torch.no_grad():
        for batch in inputs:
            total += divergence(outputs_of(model(*batch)), outputs_of(other(*batch)), logits) * len(batch[0])
    return total / sum(len(batch[0]) for batch in inputs)


def indifference(model: nn.Module, inputs: Sequence[tuple[Tensor, ...]], logits: bool) -> float:
    """The KL divergence (nats a sample) from a model to one that answers every input alike: all that it knows of them.

    That answer is the mean of its softened distributions, or of its values; the divergence is then the mutual
    information of input and answer. Inputs of batch size 1.
    """
    with torch.no_grad():
        answers = [outputs_of(model(*sample)) for sample in inputs]
    alike = []
    for each in zip(*answers, strict=True):
        together = torch.stack([y.double() for y in each])
        softened = logits and each[0].dim() >= 2
        mean = (together / TEMPERATURE).softmax(-1).mean(0).log() * TEMPERATURE if softened else together.mean(0)
        alike.append(mean)
    return sum(divergence(answer, alike, logits) for answer in answers) / len(answers)


def divergences(
    model: fx.GraphModule,
    samples: Sequence[tuple[Tensor, ...]],
    variants: Iterable[Mapping[str, Tensor]],
    logits: bool,
) -> list[float]:
    """The KL divergence (nats) from the model to each variant: the same model with other weights for some layers.

    What lies before the first changed layer is computed once for all of them.
    """
    variants = list(variants)
    if not variants:
        return []
    runner = _Resumed(model)
    totals = [0.0] * len(variants)
    with torch.no_grad():
        for batch in batches(model, samples):
            expected, found = runner.outputs(batch, variants)
            for i, after in enumerate(found):
                totals[i] += divergence(expected, after, logits) * len(batch[0])
    return [total / len(samples) for total in totals]


class _Resumed(fx.Interpreter):
    """Runs a graph with several sets of weights, each from the first layer that differs."""

    def __init__(self, model: fx.GraphModule):
        super().__init__(model)
        self._model = model
        self._nodes = [node for node in model.graph.nodes if node.op != "placeholder"]

    def outputs(
        self, inputs: tuple[Tensor, ...], variants: Sequence[Mapping[str, Tensor]]
    ) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
        """The model's own outputs and those of each variant."""
        places = [node for node in self._model.graph.nodes if node.op == "placeholder"]
        env: dict[fx.Node, Any] = dict(zip(places, inputs, strict=True))
        found: dict[int, tuple[Tensor, ...]] = {}
        for step, node in enumerate(self._nodes):
            for i, variant in enumerate(variants):
                if i not in found and node.op == "call_module" and str(node.target) in variant:
                    found[i] = self._with(variant, env, step)
            env = self._advance(env, node)
        expected = outputs_of(env[self._nodes[-1]])
        return expected, [found.get(i, expected) for i in range(len(variants))]

    def _with(self, variant: Mapping[str, Tensor], env: dict[fx.Node, Any], step: int) -> tuple[Tensor, ...]:
        layers = {name: self._model.get_submodule(name) for name in variant}
        own = {name: layer.weight.data for name, layer in layers.items()}
        try:
            for name, layer in layers.items():
                layer.weight.data = variant[name]
            for node in self._nodes[step:]:
                env = self._advance(env, node)
        finally:
            for name, layer in layers.items():
                layer.weight.data = own[name]
        return outputs_of(env[self._nodes[-1]])

    def _advance(self, env: dict[fx.Node, Any], node: fx.Node) -> dict[fx.Node, Any]:
        """The values after one more node, without those that nothing reads any more."""
        self.env = env
        value = self.run_node(node)
        dead = set(self.user_to_last_uses.get(node, ()))
        return {**{key: kept for key, kept in env.items() if key not in dead}, node: value}
