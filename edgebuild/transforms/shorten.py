"""Drops whole residual blocks: a sum `x + f(x)` becomes `x`, and what remains keeps its weights.

Residual networks behave like ensembles of shallower ones (Veit et al. 2016, arXiv:1605.06431), so that a block can go
where a layer of a plain network could not. The blocks are read off the graph, not off the names of known families.
"""

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from edgebuild.analyse import layers_of
from edgebuild.divergence import batches, distance
from edgebuild.errors import TransformError
from edgebuild.lift import outputs_of
from edgebuild.spec import LayerFacts

MACS = 1e11  # to measure the removals of one step with, in all: some seconds of one core
FEWEST_SAMPLES = 8
_IDEMPOTENT = (F.relu, F.relu6, F.hardtanh)  # once more changes nothing


@dataclass(frozen=True)
class Block:
    """The inside of a residual sum: `name` is its first layer with weights, `layers` are all; `macs` of a sample."""

    name: str
    layers: tuple[str, ...]
    macs: int


@dataclass(frozen=True)
class Shortened:
    """A model without some of its blocks, in the order in which they went.

    `loss`: nats of the softened output distribution from the whole model to this one.
    """

    model: fx.GraphModule
    dropped: tuple[Block, ...]
    loss: float


def blocks(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> tuple[Block, ...]:
    """The residual blocks that can be dropped, in execution order; `inputs` have batch size 1.

    A block is a sum of two tensors of one shape: x, and what is computed from x by layers with weights and read by
    nothing but this sum. A shortcut with a projection has no such x. Beside x, the inside may read what does not
    depend on x, as an attention mask.
    """
    return tuple(found.block for found in _find(model, inputs))


def apply(model: fx.GraphModule, inputs: tuple[Tensor, ...], dropped: Sequence[str]) -> fx.GraphModule:
    """A copy of the model without the blocks of these names.

    Raises TransformError where there is no such block, or where the rest does not work.
    """
    short = copy.deepcopy(model)
    for name in dropped:
        found = {found.block.name: found for found in _find(short, inputs)}
        if name not in found:
            raise TransformError(
                f"the plan drops block {name!r}, which the model does not have",
                f"its residual blocks are {', '.join(found) or 'none'}",
            )
        _drop(short, found[name])
    _check(model, short, inputs)
    return short


def greedy(
    model: fx.GraphModule, inputs: tuple[Tensor, ...], samples: Sequence[tuple[Tensor, ...]], logits: bool
) -> Iterator[Shortened]:
    """The model without 1, 2, ... blocks: the one that goes next is the one without which the loss is least.

    The loss is measured anew after each drop, as blocks make up for each other.
    """
    current = Shortened(model, (), 0.0)
    while True:
        left = blocks(current.model, inputs)
        if not left:
            return
        cost = max(1, sum(layer.macs for layer in layers_of(current.model, inputs)) * len(left))
        shown = batches(model, samples[: max(FEWEST_SAMPLES, int(MACS / cost))])
        found = []
        for block in left:
            short = apply(current.model, inputs, [block.name])
            lost = distance(model, short, shown, logits)
            found.append(Shortened(short, (*current.dropped, block), lost))
        # a model does not come closer to the whole one by what it loses, however the samples fell
        best = min(found, key=lambda shortened: shortened.loss)
        current = Shortened(best.model, best.dropped, max(best.loss, current.loss))
        yield current


# ----------------------------------------------------------------------------------------------------- the graph


@dataclass(frozen=True)
class _Found:
    block: Block
    total: fx.Node  # the sum
    x: fx.Node


def _find(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[_Found]:
    facts = {layer.name: layer for layer in layers_of(model, inputs)}
    found: dict[str, _Found] = {}
    for node in model.graph.nodes:
        if node.target is not operator.add or not all(isinstance(arg, fx.Node) for arg in node.args):
            continue
        layer = facts.get(node.name)
        if layer is None or layer.in_elements != 2 * layer.out_elements:  # one is broadcast
            continue
        for x, end in (node.args, reversed(node.args)):
            block = _block(node, x, end, facts)
            if block is not None:
                found.setdefault(block.name, _Found(block, node, x))
    return list(found.values())


def _block(total: fx.Node, x: fx.Node, end: fx.Node, facts: dict[str, LayerFacts]) -> Block | None:
    """What lies between x and the end of the branch, if nothing else reads it."""
    below = {x}
    for node in total.graph.nodes:
        of_shape = node.target is torch.ops.aten.sym_size.int and node.args[0] is x  # the same without the block
        if below & set(node.all_input_nodes) and not of_shape:
            below.add(node)
    inside, waiting = set(), [end]
    while waiting:
        node = waiting.pop()
        if node is not x and node in below and node not in inside:
            inside.add(node)
            waiting += node.all_input_nodes
    if end not in inside or any(user not in inside and user is not total for node in inside for user in node.users):
        return None
    names = [_name(node) for node in total.graph.nodes if node in inside]
    layers = [facts[name] for name in names if name in facts and facts[name].weighted]
    if not layers:
        return None
    return Block(layers[0].name, tuple(layer.name for layer in layers), sum(layer.macs for layer in layers))


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else node.name


def _drop(model: fx.GraphModule, found: _Found) -> None:
    found.total.replace_all_uses_with(found.x)
    for user in list(found.x.users):
        same = user.target is found.x.target and user.args[1:] == found.x.args[1:] and user.kwargs == found.x.kwargs
        if same and user.target in _IDEMPOTENT:
            user.replace_all_uses_with(found.x)
    # attention and dropout count as impure for the random numbers that they may draw
    model.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    model.delete_all_unused_submodules()
    model.recompile()


def _check(model: fx.GraphModule, short: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        wanted, found = outputs_of(model(*inputs)), outputs_of(short(*inputs))
    for before, after in zip(wanted, found, strict=True):
        if before.shape != after.shape:
            raise TransformError(f"without the blocks the output is {tuple(after.shape)}, not {tuple(before.shape)}")
        if not torch.isfinite(after).all():
            raise TransformError("without the blocks the model's outputs are not finite")
