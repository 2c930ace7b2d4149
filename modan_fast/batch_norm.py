"""Batch-norm whose statistics are those of the images of all ranks. N images, C channels, on all ranks together."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modan_fast.ranks import summed


def synchronised(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with every batch-norm replaced by one over all ranks; names and values of weights stay.

    On a GPU it is torch's own, which refuses tensors of a CPU.
    """
    if device.type == "cuda":
        found: nn.Module = convert_sync_batchnorm(network)
        return found
    for name, child in network.named_children():
        setattr(
            network,
            name,
            SyncedBatchNorm(child) if isinstance(child, _BatchNorm) else synchronised(child, device),
        )
    return network


class SyncedBatchNorm(_BatchNorm):
    """Batch-norm over all ranks, on any device; what timm's batch-norms do after it (`act`, `drop`) stays.

    A rank may have no image.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.drop, self.act = getattr(norm, "drop", nn.Identity()), getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def _check_input_dim(self, input: Tensor) -> None:
        """Any number of axes."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, …) to the same shape; the statistics are float32, or float64 for float64."""
        if not self.training:
            return self.act(self.drop(super().forward(input)))
        with torch.autocast(input.device.type, enabled=False):
            wide = input if input.dtype == torch.float64 else input.float()
            normalised, mean_C, variance_C, count = _Normalise.apply(wide, self.eps)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean_C, share)
            self.running_var.lerp_(variance_C * (count / (count - 1)), share)
        if self.affine:
            shape = (1, -1, *[1] * (input.ndim - 2))
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return self.act(self.drop(normalised.to(input.dtype)))


class _Normalise(torch.autograd.Function):
    """(x - mean) / standard deviation of each channel, and the mean, the variance and the number of values.

    Sums are float64, as in torch's batch-norm on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes, shape = [0, *range(2, x.ndim)], (1, -1, *[1] * (x.ndim - 2))
        sum_C, own = x.sum(axes, dtype=torch.float64), torch.tensor([x.numel() / x.shape[1]], dtype=torch.float64)
        sum_C, count = summed(torch.cat([sum_C, own])).split([x.shape[1], 1])
        mean_C = sum_C / count
        centred = x - mean_C.to(x.dtype).view(shape)
        # Of the centred values: the difference of two large sums would lose what float32 can hold.
        variance_C = summed((centred * centred).sum(axes, dtype=torch.float64)) / count
        scale_C = torch.rsqrt(variance_C + eps).to(x.dtype)
        normalised = centred * scale_C.view(shape)
        ctx.save_for_backward(normalised, scale_C, count)
        found = mean_C.to(x.dtype), variance_C.to(x.dtype), count.to(x.dtype)
        ctx.mark_non_differentiable(*found)
        return normalised, *found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        normalised, scale_C, count = ctx.saved_tensors
        axes, shape = [0, *range(2, gradient.ndim)], (1, -1, *[1] * (gradient.ndim - 2))
        own = [each.sum(axes, dtype=torch.float64) for each in (gradient, gradient * normalised)]
        mean_C, along_C = (summed(torch.cat(own)) / count).to(gradient.dtype).chunk(2)
        pulled = gradient - mean_C.view(shape) - normalised * along_C.view(shape)
        return pulled * scale_C.view(shape), None
