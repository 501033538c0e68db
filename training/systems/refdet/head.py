"""The dual head: boxes of what resembles a prototype, and boxes of the base classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.systems.refdet.backbone import Conv


@dataclass
class Raw:
    """What one branch says of A anchors, all scales in turn, finest first.

    Attributes:
        distances_BA4R: l, t, r, b in units of the stride: logits of R bins at 0, 1 ... R - 1; with
            R = 1 values before the softplus.
        logits_BAC: of the branch's classes.
        embeddings: (B, width, h, w) of each scale: what is compared with the prototypes; empty for
            base classes.
    """

    distances_BA4R: Tensor
    logits_BAC: Tensor
    embeddings: tuple[Tensor, ...] = ()


@dataclass
class Output:
    """The answer of the detector for B frames, before thresholds and suppression.

    Attributes:
        anchors_A2: x, y of each anchor in pixels of the frame.
        strides_A: of each anchor.
        strides: of each scale.
    """

    prototype: Raw
    base: Raw | None
    anchors_A2: Tensor
    strides_A: Tensor
    strides: tuple[int, ...]

    def boxes(self, raw: Raw) -> Tensor:
        """(B, A, 4) xyxy in pixels, float32, with gradient."""
        distances = raw.distances_BA4R.float()
        bins = distances.shape[-1]
        if bins == 1:
            sides_BA4 = F.softplus(distances[..., 0])
        else:  # the expectation of the distribution; as a product it would be quantized
            places_R = torch.arange(bins, device=distances.device, dtype=torch.float32)
            sides_BA4 = (distances.softmax(-1) * places_R).sum(-1)
        sides_BA4 = sides_BA4 * self.strides_A[:, None]
        near, far = sides_BA4[..., :2], sides_BA4[..., 2:]
        return torch.cat([self.anchors_A2 - near, self.anchors_A2 + far], dim=-1)


class _Sides(nn.Module):
    """Box sides of one scale."""

    def __init__(self, inputs: int, bins: int, *, separable: bool) -> None:
        super().__init__()
        hidden = max(16, inputs // 4, 4 * bins)
        self.bins = bins
        self.body = _neck(inputs, hidden, separable=separable)
        self.out = nn.Conv2d(hidden, 4 * bins, 1)
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        sides_BAK = _anchors_last(self.out(self.body(x)))
        return sides_BAK.reshape(*sides_BAK.shape[:2], 4, self.bins)


def _neck(inputs: int, outputs: int, *, separable: bool) -> nn.Module:
    if separable:
        return nn.Sequential(Conv(inputs, inputs, 3, groups=inputs), Conv(inputs, outputs, 1))
    return Conv(inputs, outputs, 3)


def _anchors_last(map_BCHW: Tensor) -> Tensor:
    return map_BCHW.flatten(2).transpose(1, 2)


class PrototypeBranch(nn.Module):
    """Logits: learned temperature times the cosine with each prototype, plus how much a place
    looks like an object at all, which starts at the prior.

    Source: Snell et al., "Prototypical Networks", 2017; the prior: Lin et al., "Focal Loss", 2017.
    """

    def __init__(
        self,
        channels: Sequence[int],
        widths: Sequence[int],
        *,
        bins: int,
        separable: bool,
        temperature: float,
        prior: float,
    ) -> None:
        super().__init__()
        self.widths = tuple(widths)
        self.embed = nn.ModuleList(
            nn.Sequential(_neck(c, c, separable=separable), nn.Conv2d(c, width, 1))
            for c, width in zip(channels, widths, strict=True)
        )
        self.objectness = nn.ModuleList(nn.Conv2d(c, 1, 1) for c in channels)
        for conv in self.objectness:
            assert isinstance(conv, nn.Conv2d)
            _prior(conv, prior)
        self.log_temperature = nn.Parameter(torch.full((len(widths),), math.log(temperature)))
        self.sides = nn.ModuleList(_Sides(c, bins, separable=separable) for c in channels)

    def forward(self, maps: Sequence[Tensor], prototypes_NP: Tensor) -> Raw:
        logits, sides, embeddings = [], [], []
        parts = torch.split(prototypes_NP, list(self.widths), dim=1)
        for i, (x, part_NW) in enumerate(zip(maps, parts, strict=True)):
            embedded = self.embed[i](x)
            direction_BAW = F.normalize(_anchors_last(embedded).float(), dim=-1)
            cosines_BAN = direction_BAW @ part_NW.float().T
            objectness = _anchors_last(self.objectness[i](x)).float()
            logits.append(cosines_BAN * self.log_temperature[i].exp() + objectness)
            sides.append(self.sides[i](x))
            embeddings.append(embedded)
        return Raw(torch.cat(sides, 1), torch.cat(logits, 1), tuple(embeddings))


class BaseBranch(nn.Module):
    """Logits of the classes that training has boxes of."""

    def __init__(
        self, channels: Sequence[int], classes: int, *, bins: int, separable: bool, prior: float
    ) -> None:
        super().__init__()
        self.classify = nn.ModuleList(
            nn.Sequential(_neck(c, c, separable=separable), nn.Conv2d(c, classes, 1))
            for c in channels
        )
        for branch in self.classify:
            assert isinstance(branch, nn.Sequential) and isinstance(branch[1], nn.Conv2d)
            _prior(branch[1], prior)
        self.sides = nn.ModuleList(_Sides(c, bins, separable=separable) for c in channels)

    def forward(self, maps: Sequence[Tensor]) -> Raw:
        sides = [side(x) for side, x in zip(self.sides, maps, strict=True)]
        logits = [
            _anchors_last(classify(x)).float()
            for classify, x in zip(self.classify, maps, strict=True)
        ]
        return Raw(torch.cat(sides, 1), torch.cat(logits, 1))


def _prior(conv: nn.Conv2d, probability: float) -> None:
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.constant_(conv.bias, math.log(probability / (1 - probability)))


def anchors(maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(A, 2) centres in pixels and (A,) strides of the cells of all maps, row by row."""
    centres, sizes = [], []
    for x, stride in zip(maps, strides, strict=True):
        height, width = x.shape[2:]
        ys, xs = (
            (torch.arange(num, device=x.device, dtype=torch.float32) + 0.5) * stride
            for num in (height, width)
        )
        grid_HW2 = torch.stack(
            [xs.expand(height, width), ys[:, None].expand(height, width)], dim=-1
        )
        centres.append(grid_HW2.flatten(0, 1))
        sizes.append(torch.full((height * width,), float(stride), device=x.device))
    return torch.cat(centres), torch.cat(sizes)
