"""The order in which operators run, for the least memory at the worst step.

Any order that makes tensors before they are read computes the same. With branches the orders differ in what is alive at
once; the best is found exactly, by a search over the sets of operators that have run, as long as there are not too many
(Ahn et al. 2020, arXiv:2003.02369, "SERENITY").
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from edgebuild.analyse import analyse
from edgebuild.spec import MODEL_INPUT, LayerFacts

MOST_SETS = 100_000  # of operators that have run; with more the order stays


@dataclass(frozen=True)
class Ordered:
    """A model whose operators run in another order, and the activations alive at once at the worst step, elements."""

    model: fx.GraphModule
    before: int
    after: int


def apply(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> Ordered:
    """The lifted model in its best order; the same model where that brings nothing, or too many orders are possible."""
    layers = analyse(model, inputs).layers
    before = peak(layers, range(len(layers)))
    order = best(layers)
    if order is None or peak(layers, order) >= before:
        return Ordered(model, before, before)
    return Ordered(_moved(model, [layers[i].name for i in order]), before, peak(layers, order))


def peak(layers: Sequence[LayerFacts], order: Sequence[int]) -> int:
    """Elements alive at the worst step when layers run in an order, which is one of their indices."""
    graph = _Graph(layers)
    done, most = 0, 0
    for i in order:
        most = max(most, graph.alive(done) + layers[i].out_elements)
        done |= 1 << i
    return most


def best(layers: Sequence[LayerFacts]) -> list[int] | None:
    """The order with the least peak, None where there are too many sets to look at.

    The lowest peak first, and of those the set that has got farthest: the first whole one is the best.
    """
    graph = _Graph(layers)
    everything = (1 << len(layers)) - 1
    heap: list[tuple[int, int, int, list[int]]] = [(0, 0, 0, [])]
    seen: set[int] = set()
    while heap and len(seen) < MOST_SETS:
        most, _, done, order = heapq.heappop(heap)
        if done == everything:
            return order
        if done in seen:
            continue
        seen.add(done)
        alive = graph.alive(done)
        for i, needs in enumerate(graph.needs):
            if not done >> i & 1 and needs & ~done == 0:
                reached = max(most, alive + layers[i].out_elements)
                heapq.heappush(heap, (reached, -len(order) - 1, done | 1 << i, [*order, i]))
    return None


class _Graph:
    """Who needs whom, as sets of layers in the bits of an integer."""

    def __init__(self, layers: Sequence[LayerFacts]):
        index = {layer.name: i for i, layer in enumerate(layers)}
        self.needs = [sum(1 << index[source] for source in {*layer.sources} - {MODEL_INPUT}) for layer in layers]
        self.sizes = [layer.out_elements for layer in layers]
        self.readers = [sum(1 << j for j, needs in enumerate(self.needs) if needs >> i & 1) for i in range(len(layers))]
        reads_input = [i for i, layer in enumerate(layers) if MODEL_INPUT in layer.sources]
        self.input_readers = sum(1 << i for i in reads_input)
        self.input_size = max((layers[i].in_elements for i in reads_input), default=0)

    def alive(self, done: int) -> int:
        """Elements that are kept once a set of layers has run: what others still read, and the model's outputs."""
        kept = self.input_size if self.input_readers & ~done else 0
        for i, (size, readers) in enumerate(zip(self.sizes, self.readers, strict=True)):
            if done >> i & 1 and (not readers or readers & ~done):
                kept += size
        return kept


def _moved(model: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """The model with its layers in the order of their names; what is folded into a layer follows it."""
    place = {name: i for i, name in enumerate(names)}
    when: dict[fx.Node, int] = {}
    for node in model.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            when[node] = -1
        elif node.op == "output":
            when[node] = len(names)
        else:
            name = str(node.target) if node.op == "call_module" else node.name
            when[node] = place.get(name, max((when[source] for source in node.all_input_nodes), default=-1))
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for node in sorted(model.graph.nodes, key=lambda node: when[node]):  # stable: within a layer as it was
        copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.lint()
    moved = fx.GraphModule(model, graph)
    moved.training = model.training
    return moved
