"""Batch norms as they are trained: over the rows of all processes, and fast where the channels are few.

Ioffe and Szegedy 2015, arXiv:1502.03167.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from edgebuild.training import processes

LANES = 16  # floats in a vector of AVX-512
WORTHWHILE = 1 << 17  # elements; below it the calls cost more than the kernels


def for_training(model: nn.Module) -> None:
    """Replace a model's batch norms by what gives the same in one process, or what one process would give in several.

    PyTorch's own share their statistics on GPUs alone.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            if processes.count() > 1:
                model.set_submodule(name, SharedBatchNorm(module))
            elif module.affine and module.num_features % LANES:
                model.set_submodule(name, FoldedBatchNorm(module))


def as_before(model: nn.Module) -> None:
    """Undo `for_training`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, _Training):
            model.set_submodule(name, module.norm)


class _Training(nn.Module):
    """Stands for a batch norm, whose parameters and running statistics it trains."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.norm = norm

    def _keep(self, mean: Tensor, variance: Tensor, rows: Tensor | int) -> None:
        """Move the running statistics towards a batch's, of so many rows."""
        norm = self.norm
        assert norm.running_mean is not None and norm.running_var is not None
        share = norm.momentum if norm.momentum is not None else 0.1
        with torch.no_grad():
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
            norm.running_var.lerp_((variance * rows / (rows - 1)).to(norm.running_var.dtype), share)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)


class SharedBatchNorm(_Training):
    """A batch norm over all processes' rows."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed.nn.functional import all_reduce

        norm = self.norm
        if not norm.training:
            result: Tensor = norm(x)
            return result
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        sums = torch.cat([x.sum(dims), x.new_tensor([x.numel() / x.shape[1]])])
        sums = all_reduce(sums)
        rows, average = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centred = x - average.view(shape)
        variance = all_reduce(centred.square().sum(dims)) / rows
        self._keep(average, variance, rows)
        scaled: Tensor = centred * (variance + norm.eps).rsqrt().view(shape)
        return scaled * norm.weight.view(shape) + norm.bias.view(shape) if norm.affine else scaled


class FoldedBatchNorm(_Training):
    """A batch norm of channels that do not fill a CPU's vectors, on neighbouring pixels at once.

    PyTorch's kernels go through channels-last images of 8 or 24 channels one element after the other: ten times as slow
    as of 16. Here several pixels' channels count as channels of their own, whose statistics are brought together.
    """

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__(norm)
        self.pixels = LANES // math.gcd(LANES, norm.num_features)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        if not (norm.training and self._folds(x)):
            result: Tensor = norm(x)
            return result
        y, mean, variance = _Folded.apply(x, norm.weight, norm.bias, norm.eps, self.pixels)
        self._keep(mean, variance, x.numel() // x.shape[1])
        return y

    def _folds(self, x: Tensor) -> bool:
        fitting = x.dim() == 4 and x.shape[2] * x.shape[3] % self.pixels == 0 and x.numel() >= WORTHWHILE
        known = x.dtype in (torch.float32, torch.bfloat16) and self.norm.weight.dtype == torch.float32
        return fitting and known and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)


class _Folded(torch.autograd.Function):
    """Of images [n, c, h, w], channels last: normalized, with the mean and the biased variance of each channel."""

    @staticmethod
    def forward(
        context: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, pixels: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide, channels = _fold(x, pixels), x.shape[1]
        unused = weight.new_zeros(2, pixels * channels)  # running statistics, which also tell the precision
        means, variances = torch.ops.aten.batch_norm_update_stats(wide, unused[0], unused[1], 0.0)
        means, variances = means.view(pixels, channels), variances.view(pixels, channels)
        mean, variance = means.mean(0), variances.mean(0) + means.var(0, correction=0)
        context.save_for_backward(x, weight, mean, variance)
        context.eps, context.pixels = eps, pixels
        context.mark_non_differentiable(mean, variance)
        return _unfold(_scaled(wide, pixels, mean, variance, weight, bias, eps), x), mean, variance

    @staticmethod
    def backward(context: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, variance = context.saved_tensors
        eps, pixels, channels = context.eps, context.pixels, x.shape[1]
        wide = _fold(x, pixels)
        given = _fold(gradient.contiguous(memory_format=torch.channels_last), pixels)
        # as if the statistics were constants
        scale, m, v = weight.repeat(pixels), mean.repeat(pixels), variance.repeat(pixels)
        through = torch.ops.aten.native_batch_norm_backward(
            given, wide, scale, m, v, None, None, False, eps, [True, True, True]
        )
        of_weight, of_bias = (y.view(pixels, channels).sum(0) for y in through[1:])
        # and what goes through them
        share = -weight * (variance + eps).rsqrt() * channels / x.numel()
        rest = _scaled(wide, pixels, mean, variance, share * of_weight, share * of_bias, eps)
        return _unfold(through[0].add_(rest), x), of_weight, of_bias, None, None


def _scaled(
    wide: Tensor, pixels: int, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """What is folded, normalized by these statistics and scaled."""
    each = [y.repeat(pixels) for y in (weight, bias, mean, variance)]
    scaled: Tensor = torch.ops.aten.native_batch_norm(wide, *each, False, 0.0, eps)[0]
    return scaled


def _fold(x: Tensor, pixels: int) -> Tensor:
    """Images [n, c, h, w], channels last, as [n, pixels * c, h * w / pixels, 1]; no copy."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(n, h * w // pixels, 1, pixels * c).permute(0, 3, 1, 2)


def _unfold(wide: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_fold`."""
    n, c, h, w = like.shape
    return wide.permute(0, 2, 3, 1).view(n, h, w, c).permute(0, 3, 1, 2)
