"""A network's first layers settle first: after a while they stay as they are, and training the rest takes less time.

Raghu et al. 2017, arXiv:1706.05806 (freeze training); Brock et al. 2017, arXiv:1706.04983 (FreezeOut).
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from edgebuild.lift import up_to
from edgebuild.training.compiled import Answering, Means, evaluating

SHARE = 0.5  # at most, of the elements that a model computes, in the layers that are frozen


@dataclass(frozen=True)
class Cut:
    """A lifted model in two, which have its layers: `rest(first(inputs))` is what it gives. One tensor goes between."""

    first: fx.GraphModule
    rest: fx.GraphModule

    @property
    def layers(self) -> int:
        """How many layers with weights are in the first part."""
        return sum(any(True for _ in module.parameters(recurse=False)) for module in self.first.modules())


def cut(model: nn.Module, inputs: tuple[Tensor, ...], hinted: tuple[str, ...] = ()) -> Cut | None:
    """A model cut at the last place before SHARE where the rest needs nothing but one tensor.

    The layers before it have no weights in common with those after it, and none of them is `hinted`. None where there
    is no such place, or the model is not lifted. `inputs`: a batch.
    """
    if not isinstance(model, fx.GraphModule):
        return None
    nodes = list(model.graph.nodes)
    last = {read: i for i, node in enumerate(nodes) for read in node.all_input_nodes}  # reader of each
    computed = list(accumulate(_elements(model, inputs)))
    at = None
    needed: set[fx.Node] = set()
    for i, node in enumerate(nodes):
        if computed[i] > SHARE * computed[-1] or node.target in hinted:
            break
        needed = {read for read in (*needed, node) if last.get(read, -1) > i and read.op != "get_attr"}
        if needed == {node} and computed[i]:
            at = i
    if at is None:
        return None
    parts = _parts(model, nodes[: at + 1], nodes[at + 1 :])
    first, rest = (set(part.parameters()) for part in (parts.first, parts.rest))
    return parts if first and rest and not first & rest else None


def _parts(model: fx.GraphModule, before: list[fx.Node], after: list[fx.Node]) -> Cut:
    rest = fx.Graph()
    copies = {before[-1]: rest.placeholder("settled")}
    constants = {read for node in after for read in node.all_input_nodes if read.op == "get_attr"} & set(before)
    for node in [*(node for node in before if node in constants), *after]:
        copies[node] = rest.node_copy(node, copies.__getitem__)
    return Cut(up_to(model, before[-1]), fx.GraphModule(model, rest))


def _elements(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> list[int]:
    """How many elements each node of a graph computes."""
    with evaluating(model), torch.no_grad():
        ShapeProp(model).propagate(*inputs)
    computing = ("call_module", "call_function", "call_method")
    shapes = [getattr(node.meta.get("tensor_meta"), "shape", torch.Size([0])) for node in model.graph.nodes]
    return [s.numel() if node.op in computing else 0 for node, s in zip(model.graph.nodes, shapes, strict=True)]


class Settled(nn.Module):
    """A model whose first part is frozen, in eval mode and without gradients. Its parameters are those of the rest."""

    def __init__(self, parts: Cut, means: Means):
        super().__init__()
        self.rest = parts.rest
        self._first = Answering(parts.first, means=means)

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        (x,) = self._first(inputs)
        answers: Tensor | tuple[Tensor, ...] = self.rest(x)
        return answers
