"""Multi-head self-attention, found in a lifted graph and written as one layer whose heads can be cut.

Everybody reshapes queries, keys and values in a way of their own. So the views are not read but run: on a tensor that
holds the index of every element, what comes out says which head and token each element went to.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

aten = torch.ops.aten

_VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    torch.flatten,
}
_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_SOFTMAX = {aten.softmax.int, aten._softmax.default}
_PASSING = (nn.Dropout, nn.Identity)
ROLES = ("query", "key", "value")


class Attention(nn.Module):
    """softmax(q k^T) v in each head (Vaswani et al. 2017, arXiv:1706.03762), [batch, tokens, heads x head_dim] each.

    How many heads there are follows from the width of the input, so that they can be cut. The usual scale is left to
    the layer that makes q. Of 3-D products alone, which are what the XNNPACK delegate takes.
    """

    def __init__(self, head_dim: int):
        super().__init__()
        self.head_dim = head_dim

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, tokens, width = query.shape
        q, k, v = self._by_head(query), self._by_head(key), self._by_head(value)
        mixed = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
        return (
            mixed.reshape(batch, width // self.head_dim, tokens, self.head_dim)
            .transpose(1, 2)
            .reshape(batch, tokens, width)
        )

    def _by_head(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = width // self.head_dim
        return x.reshape(batch, tokens, heads, self.head_dim).transpose(1, 2).reshape(-1, tokens, self.head_dim)


def rewrite(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> None:
    """Put an `Attention` in place of every unmasked self-attention between linear layers; changes the model.

    A layer that makes queries, keys and values at once is split. What is not understood stays as it is.
    """
    if not any(_spelled(node, model) for node in model.graph.nodes):
        return
    views = _views(model, inputs)
    for node in list(model.graph.nodes):
        spelled = _spelled(node, model)
        if spelled is not None:
            _replace(model, spelled, views)
    model.delete_all_unused_submodules()
    model.graph.lint()
    model.recompile()


# ------------------------------------------------------------------------------------------------------ the anchors


@dataclass(frozen=True)
class _Spelled:
    """softmax(scale q k^T) v as it stands in the graph; with `turned`, `key` is k^T. `result` is its output."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    turned: bool
    scale: float | None  # None: one over the square root of a head's width
    softmax: fx.Node
    result: fx.Node


def _spelled(node: fx.Node, model: fx.GraphModule) -> _Spelled | None:
    if node.target is aten.scaled_dot_product_attention.default:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if any(given.get(name) for name in ("is_causal", "enable_gqa")) or given.get("attn_mask") is not None:
            return None
        return _Spelled(given["query"], given["key"], given["value"], False, given.get("scale"), node, node)  # type: ignore[arg-type]
    if node.target not in _SOFTMAX:
        return None
    scores, scale = _unscaled(node.args[0])
    result = _only_user(node)
    while result is not None and _passes(result, model):
        result = _only_user(result)
    if scores.target not in _PRODUCTS or result is None or result.target not in _PRODUCTS:
        return None
    query, key = scores.args[:2]
    return _Spelled(query, key, result.args[1], True, scale, node, result)  # type: ignore[arg-type]


def _unscaled(node: Any) -> tuple[fx.Node, float]:
    """What is multiplied by constants, and their product."""
    factor = 1.0
    while (scalar := _scalar(node)) is not None:
        factor, node = factor * scalar, node.args[0]
    return node, factor


def _scalar(node: fx.Node) -> float | None:
    """The constant that a node multiplies with; None where it does something else."""
    name = getattr(node.target, "__name__", "").split(".")[0]
    if node.op != "call_function" or name not in ("mul", "truediv", "div") or len(node.args) < 2:
        return None
    by = node.args[1]
    if not isinstance(by, int | float):
        return None
    return float(by) if name == "mul" else 1 / by


def _passes(node: fx.Node, model: fx.GraphModule) -> bool:
    return node.op == "call_module" and isinstance(model.get_submodule(str(node.target)), _PASSING)


def _is_last(softmax: fx.Node, views: "_Views") -> bool:
    return softmax.target not in _SOFTMAX or softmax.args[1] in (-1, len(views.shapes[softmax]) - 1)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _linear(node: fx.Node, model: fx.GraphModule) -> nn.Linear | None:
    module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    return module if isinstance(module, nn.Linear) else None


# ------------------------------------------------------------------------------------------------ views, by running


@dataclass(frozen=True)
class _Views:
    """A run of the graph: its inputs and the shape of every tensor, for batches of `batch`."""

    inputs: Mapping[fx.Node, Tensor]
    shapes: Mapping[fx.Node, tuple[int, ...]]
    batch: int

    def numbered(self, node: fx.Node) -> Tensor:
        """A tensor of a node's shape that holds the index of each element."""
        shape = self.shapes[node]
        return torch.arange(math.prod(shape)).reshape(shape)

    def through(self, node: fx.Node, known: Mapping[fx.Node, Tensor]) -> Any:
        """What views make of the `known` tensors; None where there is more than views between."""
        try:
            return self._value(node, {**self.inputs, **known})
        except _NotAViewError:
            return None

    def _value(self, node: Any, known: dict[fx.Node, Any]) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node not in known:
            if _scalar(node) is not None and node in self.shapes:
                known[node] = self._value(node.args[0], known)  # it moves nothing
            elif node.op == "call_function" and (_is_view(node) or node not in self.shapes):
                args = fx.node.map_arg(node.args, lambda n: self._value(n, known))
                kwargs = fx.node.map_arg(node.kwargs, lambda n: self._value(n, known))
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            else:
                raise _NotAViewError
        return known[node]


class _NotAViewError(Exception):
    pass


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_function" and (
        node.target in _VIEWS or getattr(node.target, "__name__", "") in ("getitem", "sym_size.int")
    )


class _Run(fx.Interpreter):
    def __init__(self, model: fx.GraphModule):
        super().__init__(model)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def _views(model: fx.GraphModule, inputs: tuple[Tensor, ...]) -> _Views:
    """For a batch of two where the graph takes one: only then do batches and tokens come apart for sure."""
    placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
    for tried in (tuple(torch.cat([x, x]) if x.dim() else x for x in inputs), inputs):
        run = _Run(model)
        try:
            with torch.no_grad():
                run.run(*tried)
        except (RuntimeError, AssertionError):
            continue
        batch = max((x.shape[0] for x in tried if x.dim()), default=1)
        return _Views(dict(zip(placeholders, tried, strict=True)), run.shapes, batch)
    return _Views({}, {}, 1)


# ---------------------------------------------------------------------------------------------------- the rewriting


@dataclass(frozen=True)
class _Made:
    """A head's queries, keys or values: which outputs of `layer`, a scale, and the [batch, tokens, width] it reads."""

    layer: fx.Node
    start: int
    scale: float
    reads: fx.Node


def _replace(model: fx.GraphModule, found: _Spelled, views: _Views) -> None:
    """Write one attention anew, where it is understood."""
    sizes = views.shapes.get(found.query, ())
    if len(sizes) not in (3, 4) or not _is_last(found.softmax, views):
        return
    tokens, head_dim = sizes[-2:]
    heads = math.prod(sizes[:-2]) // views.batch
    shape = (views.batch, heads, tokens, head_dim)
    made = [
        _maker(model, operand, turned, shape, views)
        for operand, turned in ((found.query, False), (found.key, found.turned), (found.value, False))
    ]
    end = _end(model, found.result, shape, views)
    if end is None or any(part is None for part in made):
        return
    scale = found.scale if found.scale is not None else head_dim**-0.5
    scales = (scale * made[0].scale * made[1].scale, 1.0, made[2].scale)  # type: ignore[union-attr]
    last, out = end
    layers = [part.layer for part in made]  # type: ignore[union-attr]
    with model.graph.inserting_before(last):
        operands = []
        for role, part, factor in zip(ROLES, made, scales, strict=True):
            assert part is not None
            shared = layers.count(part.layer) > 1 or _calls(model, part.layer) > 1
            name = _own_layer(model, part, role, heads * head_dim, factor, shared)
            operands.append(model.graph.call_module(name, (part.reads,)))
            operands[-1].meta = dict(part.layer.meta)
        name = _free_name(model, found.result)
        _place(model, name, Attention(head_dim))
        attention = model.graph.call_module(name, tuple(operands))
        attention.meta = dict(found.result.meta)
        replacement = attention
        if out is not None:
            replacement = model.graph.call_module(str(out.target), (attention,))
            replacement.meta = dict(out.meta)
    last.replace_all_uses_with(replacement)
    # also what is random in training, which counts as impure
    model.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def _maker(
    model: fx.GraphModule, operand: fx.Node, turned: bool, shape: tuple[int, ...], views: _Views
) -> _Made | None:
    """Where an operand of shape [batch, heads, tokens, head_dim] comes from."""
    batch, heads, tokens, head_dim = shape
    scale, node = 1.0, operand
    while _scalar(node) is not None or _is_view(node):
        scale *= _scalar(node) or 1.0
        if not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    layer = _linear(node, model)
    index = views.through(operand, {node: views.numbered(node)}) if layer is not None else None
    if layer is None or index is None:
        return None
    index = index.transpose(-2, -1) if turned else index
    if index.numel() != math.prod(shape):
        return None  # keys and values of other tokens than the queries'
    index = index.reshape(shape)
    rows, columns = index // layer.out_features, index % layer.out_features
    start = int(columns[0, 0, 0, 0])
    wanted = start + torch.arange(heads * head_dim).reshape(1, heads, 1, head_dim)
    if not (columns == wanted).all() or not (rows == rows[:, :1, :, :1]).all():
        return None
    order = rows[:, 0, :, 0].flatten()
    reads: Any = node.args[0]
    read = reads
    while isinstance(read, fx.Node) and read in views.shapes:
        if views.shapes[read] == (batch, tokens, layer.in_features):
            seen = views.through(reads, {read: views.numbered(read)})
            if seen is not None and seen.reshape(-1, layer.in_features)[order].flatten().equal(
                torch.arange(seen.numel())
            ):
                return _Made(node, start, scale, read)
        if not _is_view(read):
            break
        read = read.args[0]
    return None


def _end(
    model: fx.GraphModule, result: fx.Node, shape: tuple[int, ...], views: _Views
) -> tuple[fx.Node, fx.Node | None] | None:
    """The node behind an attention that is [batch, tokens, width] again, and a linear layer on the way to it."""
    batch, heads, tokens, head_dim = shape
    wanted = torch.arange(math.prod(shape)).reshape(shape).transpose(1, 2).reshape(batch, tokens, heads * head_dim)
    known = {result: views.numbered(result)}
    layer: fx.Node | None = None
    node = _only_user(result)
    while node is not None:
        linear = _linear(node, model)
        if linear is not None:
            if layer is not None or _calls(model, node) > 1:
                return None
            rows = views.through(node.args[0], known).reshape(-1, heads * head_dim)  # type: ignore[arg-type]
            flat = wanted.reshape(rows.shape)
            places = rows[:, 0].argsort()[flat[:, 0].argsort().argsort()]  # of each row that is wanted
            if not rows[places].equal(flat):
                return None
            layer, width = node, linear.out_features
            wanted = torch.arange(batch * tokens * width).reshape(batch, tokens, width)
            moved = torch.empty(batch * tokens, width, dtype=torch.int64)
            moved[places] = wanted.reshape(batch * tokens, width)
            known = {node: moved.reshape(views.shapes[node])}
        elif not _is_view(node):
            return None
        seen = views.through(node, known)
        if seen is None:
            return None
        if seen.shape == wanted.shape and seen.equal(wanted):
            return node, layer
        node = _only_user(node)
    return None


def _own_layer(model: fx.GraphModule, part: _Made, role: str, width: int, scale: float, shared: bool) -> str:
    """The name of a linear layer that makes this role alone, scaled; `shared` if others use the layer too."""
    name, layer = str(part.layer.target), _linear(part.layer, model)
    assert layer is not None
    span = slice(part.start, part.start + width)
    if not shared and layer.out_features == width:
        own = layer
    else:
        own = nn.Linear(layer.in_features, width, layer.bias is not None)
        name = f"{name.removesuffix('_weight')}_{role}"
        _place(model, name, own.train(layer.training))
    with torch.no_grad():
        own.weight.copy_(layer.weight[span] * scale)
        if layer.bias is not None:
            own.bias.copy_(layer.bias[span] * scale)
    return name


def _calls(model: fx.GraphModule, node: fx.Node) -> int:
    return sum(other.op == "call_module" and other.target == node.target for other in model.graph.nodes)


def _free_name(model: fx.GraphModule, node: fx.Node) -> str:
    """A place for an attention beside its layers; the same one when a model is lifted again."""
    stack = node.meta.get("nn_module_stack")
    around = next(reversed(stack.values()))[0] if stack else "attention"
    name = around if around.endswith("heads") else f"{around}.heads".lstrip(".")
    taken = {name for name, _ in model.named_modules()}
    return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _place(model: fx.GraphModule, name: str, module: nn.Module) -> None:
    model.add_submodule(name, module)
