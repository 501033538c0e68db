"""Batch norms over a batch that several ranks have a part of each.

torch's own (``SyncBatchNorm``) runs on GPUs alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from engineworks.training import ranks


def share_statistics(module: nn.Module) -> None:
    """In training, let all batch norms of a module normalise by the batch of all ranks.

    Their names, parameters and buffers stay; in eval mode they are what they were.
    """
    for part in module.modules():
        if isinstance(part, _BatchNorm) and not isinstance(part, _Shared):
            kind: Any = type(part)
            part.__class__ = _shared(kind)


@cache
def _shared(kind: Any) -> Any:
    return type(f"Shared{kind.__name__}", (_Shared, kind), {})


class _Shared(_BatchNorm):
    """What goes before the class of a batch norm."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        shape = [1, -1] + [1] * (x.ndim - 2)
        y, mean_C, variance_C, count = _Normalised.apply(x, self.weight, self.bias, self.eps, shape)
        if self.running_mean is not None and self.running_var is not None:
            self._follow(mean_C, variance_C * count / (count - 1).clamp_min(1))
        for name in ("drop", "act"):  # timm has these in the same module
            if (follows := getattr(self, name, None)) is not None:
                y = follows(y)
        return torch.as_tensor(y)

    @torch.no_grad()
    def _follow(self, mean_C: Tensor, variance_C: Tensor) -> None:
        """Let the running statistics learn from those of a batch."""
        assert self.running_mean is not None and self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean_C.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance_C.to(self.running_var.dtype), share)


class _Normalised(torch.autograd.Function):
    """(B, C, ...) of this rank -> the same, normalised by mean and variance (C,) of all ranks.

    Computed in float32 at least. Returns these two as well, and the number of values of a channel.

    Source: Ioffe and Szegedy, "Batch Normalization", 2015; variances are joined as in Chan et al.,
    "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        eps: float,
        shape: list[int],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = x.to(torch.promote_types(x.dtype, torch.float32))
        axes = [axis for axis in range(x.ndim) if axis != 1]
        own = values.numel() // x.shape[1]
        own_mean_C = values.sum(axes) / max(own, 1)
        spread_C = (values - own_mean_C.view(shape)).square().sum(axes)
        row = torch.cat([values.new_tensor([own]), own_mean_C, spread_C])
        rows = ranks.stack(row)
        count_R1, (mean_RC, spread_RC) = rows[:, :1], rows[:, 1:].chunk(2, 1)
        count = count_R1.sum()
        mean_C = (count_R1 * mean_RC).sum(0) / count
        apart_RC = count_R1 * (mean_RC - mean_C).square()
        variance_C = (spread_RC + apart_RC).sum(0) / count
        ctx.save_for_backward(x, weight_C, mean_C, (variance_C + eps).rsqrt(), count)
        ctx.axes, ctx.shape, ctx.has_bias = axes, shape, bias_C is not None
        ctx.mark_non_differentiable(mean_C, variance_C, count)
        y = F.batch_norm(values, mean_C, variance_C, weight_C, bias_C, False, 0.0, eps)
        return y.to(x.dtype), mean_C, variance_C, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, mean_C, scale_C, count = ctx.saved_tensors
        dy = gradients[0].to(mean_C.dtype)
        normal = (x.to(mean_C.dtype) - mean_C.view(ctx.shape)) * scale_C.view(ctx.shape)
        sums_2C = torch.stack([dy.sum(ctx.axes), (dy * normal).sum(ctx.axes)])
        mean_dy, mean_dy_normal = (ranks.total(sums_2C) / count).view(2, *ctx.shape)
        inward_C = scale_C if weight_C is None else scale_C * weight_C
        dx = (dy - mean_dy - normal * mean_dy_normal) * inward_C.view(ctx.shape)
        dweight = None if weight_C is None else sums_2C[1].to(weight_C.dtype)
        dbias = sums_2C[0].to(mean_C.dtype) if ctx.has_bias else None
        return dx.to(x.dtype), dweight, dbias, None, None
