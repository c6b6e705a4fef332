"""Low-rank factorization of weights.

svd: a linear layer or 1x1 convolution as two (Denton et al. 2014, arXiv:1404.0736).
spatial: a k x k convolution as k x 1 and 1 x k (Jaderberg et al. 2014, arXiv:1405.3866).
tucker2: as 1x1, k x k on fewer channels, and 1x1 (Kim et al. 2016, arXiv:1511.06530).

What is decomposed is the weight times the square root of its inputs' second moments: the error that is least is then
that of the layer's outputs, not of its weights (Zhang et al. 2015, arXiv:1505.06798; Chen et al. 2021, DRONE).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import tensorly as tl
import torch
from tensorly.decomposition import partial_tucker
from torch import Tensor, fx, nn

from edgebuild.errors import TransformError
from edgebuild.lift import outputs_of
from edgebuild.plan import fits, rank_bounds
from edgebuild.sensitivity import Probe, Sensitivity, loss
from edgebuild.spec import Candidate, Form, FormKind, LayerFacts, ModelFacts, pays

SHARES = (0.75, 0.5, 0.375, 0.25, 0.125)  # of the full rank
SMALLEST_RANK = 4
RIDGE = 1e-2  # of the mean second moment: few samples must not be fitted to the last digit


def forms(layer: LayerFacts, tile: int) -> tuple[Form, ...]:
    """The factorizations of a layer that need fewer multiply-accumulates than it does, in a fixed order."""
    if not layer.weighted or layer.groups > 1:
        return ()
    n, m = layer.in_channels, layer.out_channels
    found: list[Form] = []
    for kind in _kinds(layer):
        for share in SHARES:
            if kind == "tucker2":
                ranks: tuple[int, ...] = (_round(m * share, tile), _round(n * share, tile))
            elif kind == "spatial":
                ranks = (_round(min(n * layer.kernel[0], m * layer.kernel[1]) * share, tile),)
            else:
                ranks = (_round(min(n, m) * share, tile),)
            form = Form(layer.name, kind, ranks)
            if form not in found and pays(layer, form):
                found.append(form)
    return tuple(found)


def _kinds(layer: LayerFacts) -> tuple[FormKind, ...]:
    pointwise = layer.op == "linear" or layer.kernel == (1, 1)
    return ("svd",) if pointwise else ("spatial", "tucker2")


def _round(rank: float, tile: int) -> int:
    step = tile if rank >= tile else SMALLEST_RANK
    return max(SMALLEST_RANK, int(rank) // step * step)


# --------------------------------------------------------------------------------------------------- candidates


@dataclass(frozen=True)
class _Basis:
    """The orthogonal bases in which a lower rank is a leading block: left (rows x k) and right (k x columns)."""

    left: Tensor
    right: Tensor
    core: Tensor


def probes(model: fx.GraphModule, facts: ModelFacts, moments: Mapping[str, Tensor], tile: int) -> dict[str, Probe]:
    """For each layer with forms, the map from its weight's gradient to g . dW of every form."""
    found = {}
    for layer in facts.layers:
        if chosen := forms(layer, tile):
            weight: Tensor = model.get_submodule(layer.name).weight.detach()  # type: ignore[operator]
            found[layer.name] = _probe(weight, _scaling(weight, moments.get(layer.name)), chosen)
    return found


@dataclass(frozen=True)
class _Scaling:
    """A square root S of the second moments of a layer's inputs (M = S S^T), and its inverse: in x in."""

    root: Tensor
    inverse: Tensor


def _scaling(weight: Tensor, moments: Tensor | None) -> _Scaling:
    """By a layer's own moments; the identity where none were kept."""
    if moments is None:
        one = torch.eye(weight.shape[1], dtype=weight.dtype)
        return _Scaling(one, one)
    ridge = RIDGE * moments.diagonal().mean().clamp(min=1e-12) * torch.eye(len(moments), dtype=moments.dtype)
    root = torch.linalg.cholesky(moments + ridge)
    inverse = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=False)
    return _Scaling(root.to(weight.dtype), inverse.to(weight.dtype))


def _scaled(weight: Tensor, by: Tensor) -> Tensor:
    return torch.einsum("oi...,ij->oj...", weight, by)


def candidates(facts: ModelFacts, sensitivity: Sensitivity, tile: int) -> tuple[Candidate, ...]:
    """Every form of every layer with its loss."""
    found = []
    for name, dots in sensitivity.probed.items():
        losses = loss(dots)
        found += [Candidate(form, float(losses[i])) for i, form in enumerate(forms(facts.layer(name), tile))]
    return tuple(found)


def _probe(weight: Tensor, scaling: _Scaling, chosen: Sequence[Form]) -> Probe:
    weight = _scaled(weight, scaling.root)
    bases = {kind: _basis(weight, kind) for kind in {form.kind for form in chosen}}

    def probe(grad: Tensor) -> Tensor:
        grad = _scaled(grad, scaling.inverse.T)
        whole = (grad * weight).sum()
        inside = {kind: _inside(grad, basis, kind) for kind, basis in bases.items()}
        return torch.stack([inside[form.kind][tuple(r - 1 for r in form.ranks)] - whole for form in chosen])

    return probe


def _inside(grad: Tensor, basis: _Basis, kind: FormKind) -> Tensor:
    """g . W_r for every rank r at once, the weight's leading block: index r - 1 (tucker2: r_out - 1, r_in - 1)."""
    if kind == "tucker2":
        part = torch.einsum("rihw,is->rshw", torch.einsum("oihw,or->rihw", grad, basis.left), basis.right)
        return (part * basis.core).sum((2, 3)).cumsum(0).cumsum(1)
    return ((basis.left.T @ _matrix(grad, kind) * basis.right).sum(1) * basis.core).cumsum(0)


def _basis(weight: Tensor, kind: FormKind) -> _Basis:
    if kind == "tucker2":
        left = torch.linalg.svd(weight.flatten(1), full_matrices=False)[0]
        right = torch.linalg.svd(weight.transpose(0, 1).flatten(1), full_matrices=False)[0]
        return _Basis(left, right, torch.einsum("oihw,or,is->rshw", weight, left, right))
    left, values, right = torch.linalg.svd(_matrix(weight, kind), full_matrices=False)
    return _Basis(left, right, values)


def _matrix(weight: Tensor, kind: FormKind) -> Tensor:
    """The weight as the matrix that a rank is taken of; a tucker2 weight stays a 4-tensor."""
    if kind == "tucker2":
        return weight
    if kind == "svd":
        return weight.flatten(1)
    out, into, kh, kw = weight.shape
    return weight.permute(1, 2, 0, 3).reshape(into * kh, out * kw)  # (in, kh) x (out, kw)


# -------------------------------------------------------------------------------------------------------- apply


def apply(
    model: fx.GraphModule,
    inputs: tuple[Tensor, ...],
    chosen: Sequence[Form],
    moments: Mapping[str, Tensor] = MappingProxyType({}),
) -> fx.GraphModule:
    """A copy with each chosen layer replaced by its factors. Raises TransformError where a form does not fit.

    `moments[layer]` is E[x x^T] of what the layer reads; where it is missing the weight's own error is made least.
    """
    result = copy.deepcopy(model)
    for form in chosen:
        try:
            layer = result.get_submodule(form.layer)
        except AttributeError:
            raise TransformError(f"the plan factorizes layer {form.layer!r}, which the model does not have") from None
        _check_form(layer, form)
        factors = _balanced(_decompose(layer, form, moments.get(form.layer)))
        result.set_submodule(form.layer, nn.Sequential(*factors))
    with torch.no_grad():
        for want, got in zip(outputs_of(model(*inputs)), outputs_of(result(*inputs)), strict=True):
            if want.shape != got.shape or not torch.isfinite(got).all():
                raise TransformError("the factorized model's outputs are not finite or changed shape")
    return result


def lowered(model: fx.GraphModule, form: Form, moments: Mapping[str, Tensor]) -> Tensor:
    """The layer's weight as its factors multiply out to: with it the layer computes what they do."""
    layer = model.get_submodule(form.layer)
    _check_form(layer, form)
    factors = [part.weight.detach() for part in _decompose(layer, form, moments.get(form.layer))]  # type: ignore[operator]
    if form.kind == "tucker2":
        into, core, out = factors
        return torch.einsum("mr,rshw,sn->mnhw", out.flatten(1), core, into.flatten(1))
    first, second = factors
    if form.kind == "spatial":  # (r, in, kh, 1) then (out, r, 1, kw)
        return torch.einsum("mrw,rnh->mnhw", second[:, :, 0], first[..., 0])
    return (second.flatten(1) @ first.flatten(1)).reshape(layer.weight.shape)  # type: ignore[arg-type]


def _check_form(layer: nn.Module, form: Form) -> None:
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        facts = LayerFacts(form.layer, "conv2d", layer.in_channels, layer.out_channels, kernel=layer.kernel_size)
    elif isinstance(layer, nn.Linear):
        facts = LayerFacts(form.layer, "linear", layer.in_features, layer.out_features)
    else:
        raise TransformError(f"layer {form.layer!r} ({type(layer).__name__}) cannot be factorized")
    if form.kind not in (kinds := _kinds(facts)):
        raise TransformError(
            f"layer {form.layer!r}, a {facts.op} {facts.kernel}, cannot be factorized by {form.kind}",
            f"factorize it by {' or '.join(kinds)}",
        )
    if not fits(facts, form):
        bounds = rank_bounds(facts, form)
        raise TransformError(f"layer {form.layer!r} cannot have ranks {form.ranks} for {form.kind}, at most {bounds}")


def _decompose(layer: nn.Module, form: Form, moments: Tensor | None) -> list[nn.Module]:
    weight = layer.weight.detach()  # type: ignore[operator]
    bias = layer.bias.detach() if layer.bias is not None else None  # type: ignore[operator]
    assert isinstance(weight, Tensor)
    scaling = _scaling(weight, moments)
    weight = _scaled(weight, scaling.root)
    if form.kind == "tucker2":
        return _tucker2(layer, weight, scaling, bias, form.ranks)
    basis, r = _basis(weight, form.kind), form.ranks[0]
    root = basis.core[:r].sqrt()
    left, right = basis.left[:, :r] * root, root[:, None] * basis.right[:r]
    if form.kind == "spatial":
        left = torch.einsum("ihr,ij->jhr", left.reshape(len(scaling.root), -1, r), scaling.inverse).flatten(0, 1)
    else:
        right = right @ scaling.inverse
    if isinstance(layer, nn.Linear):  # W = left @ right, so `right` runs first
        first, second = nn.Linear(layer.in_features, r, bias=False), nn.Linear(r, layer.out_features, bias is not None)
        return [_filled(first, right), _filled(second, left, bias)]
    assert isinstance(layer, nn.Conv2d)
    n, m, (kh, kw), (sh, sw) = layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride
    (ph, pw), (dh, dw) = _padding(layer), layer.dilation
    if form.kind == "svd":
        return [
            _filled(nn.Conv2d(n, r, 1, (sh, sw), (ph, pw), bias=False), right[:, :, None, None]),
            _filled(nn.Conv2d(r, m, 1, bias=bias is not None), left[:, :, None, None], bias),
        ]
    vertical = left.reshape(n, kh, r).permute(2, 0, 1)[..., None]
    horizontal = right.reshape(r, m, kw).permute(1, 0, 2)[:, :, None, :]
    return [
        _filled(nn.Conv2d(n, r, (kh, 1), (sh, 1), (ph, 0), (dh, 1), bias=False), vertical),
        _filled(nn.Conv2d(r, m, (1, kw), (1, sw), (0, pw), (1, dw), bias=bias is not None), horizontal, bias),
    ]


def _tucker2(
    layer: nn.Module, weight: Tensor, scaling: _Scaling, bias: Tensor | None, ranks: tuple[int, ...]
) -> list[nn.Module]:
    """`weight` is scaled."""
    assert isinstance(layer, nn.Conv2d)
    with tl.backend_context("pytorch"):
        (core, (out, into)), _ = partial_tucker(weight, rank=list(ranks), modes=[0, 1], init="svd", random_state=0)
    into = scaling.inverse.T @ into
    n, m, (r_out, r_in) = layer.in_channels, layer.out_channels, ranks
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    return [
        _filled(nn.Conv2d(n, r_in, 1, bias=False), into.T[:, :, None, None]),
        _filled(nn.Conv2d(r_in, r_out, (kh, kw), (sh, sw), _padding(layer), (dh, dw), bias=False), core),
        _filled(nn.Conv2d(r_out, m, 1, bias=bias is not None), out[:, :, None, None], bias),
    ]


def _balanced(factors: list[nn.Module]) -> list[nn.Module]:
    """The factors with weights of one norm and the same product.

    How far a step of gradient descent moves a factor goes by the others' norms: between factors of 30 and 0.3, as an
    orthonormal basis and its core are behind inputs of little variance, only the small one learns.
    """
    weights = [factor.get_parameter("weight").data for factor in factors]
    norms = torch.stack([weight.norm() for weight in weights]).double()
    if bool((norms > 0).all()):
        for weight, scale in zip(weights, norms.log().mean().exp() / norms, strict=True):
            weight.mul_(scale)
    return factors


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer.padding, str):
        if layer.padding == "valid":
            return 0, 0
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        if any(total % 2 for total in totals):
            raise TransformError("an even kernel with padding='same' cannot be split")
        return totals[0] // 2, totals[1] // 2
    return layer.padding[0], layer.padding[1]


def _filled(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    with torch.no_grad():
        layer.weight.copy_(weight)  # type: ignore[operator]
        if bias is not None:
            layer.bias.copy_(bias)  # type: ignore[operator]
    return layer.eval()
