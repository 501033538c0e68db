"""The dual head: boxes of what resembles a prototype, and boxes of the base classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engineworks.training.systems.refdet.backbone import Conv

_SHORTEST = 1e-12  # length of an embedding, so that nothing is divided by 0


@dataclass
class Raw:
    """What one branch says of the anchors of each scale, finest first, A of them in all.

    A training wants the channels of an anchor side by side, as the convolutions leave them with
    ``channels_last``; a graph for inference wants the anchors so, and no map transposed.

    Attributes:
        sides: (B, 4 R, A_s): l, t, r, b in units of the stride: logits of R bins at 0, 1 ... R - 1;
            with R = 1 values before the softplus.
        logits: (B, C, A_s) of the branch's classes.
        embeddings: (B, width, h, w) of each scale: what is compared with the prototypes; empty for
            base classes.
    """

    sides: tuple[Tensor, ...]
    logits: tuple[Tensor, ...]
    embeddings: tuple[Tensor, ...] = ()

    @cached_property
    def distances_BA4R(self) -> Tensor:
        sides_BAK = torch.cat([part.transpose(1, 2) for part in self.sides], 1)
        return sides_BAK.reshape(*sides_BAK.shape[:2], 4, -1)

    @cached_property
    def logits_BAC(self) -> Tensor:
        return torch.cat([part.transpose(1, 2) for part in self.logits], 1)

    @property
    def sides_BKA(self) -> Tensor:
        return torch.cat(self.sides, -1)

    @property
    def logits_BCA(self) -> Tensor:
        return torch.cat(self.logits, -1)


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
        return decode(raw.distances_BA4R, self.anchors_A2, self.strides_A)


def decode(distances_BM4R: Tensor, anchors_BM2: Tensor, strides_BM: Tensor) -> Tensor:
    """Boxes (B, M, 4) xyxy in pixels, float32, with gradient.

    Args:
        distances_BM4R: of M anchors, see ``Raw``.
        anchors_BM2, strides_BM: of these anchors, see ``Output``; (M, 2) and (M,) if for all frames
            alike.
    """
    distances = distances_BM4R.float()
    bins = distances.shape[-1]
    if bins == 1:
        sides_BM4 = F.softplus(distances[..., 0])
    else:  # the expectation of the distribution; as a product it would be quantized
        places_R = torch.arange(bins, device=distances.device, dtype=torch.float32)
        sides_BM4 = (distances.softmax(-1) * places_R).sum(-1)
    sides_BM4 = sides_BM4 * strides_BM[..., None]
    near, far = sides_BM4[..., :2], sides_BM4[..., 2:]
    return torch.cat([anchors_BM2 - near, anchors_BM2 + far], dim=-1)


class _Sides(nn.Module):
    """Box sides of one scale."""

    def __init__(self, inputs: int, bins: int, *, separable: bool) -> None:
        super().__init__()
        hidden = max(16, inputs // 4, 4 * bins)
        self.body = _neck(inputs, hidden, separable=separable)
        self.out = nn.Conv2d(hidden, 4 * bins, 1)
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        sides: Tensor = self.out(self.body(x))
        return sides.flatten(2)


def _neck(inputs: int, outputs: int, *, separable: bool) -> nn.Module:
    if separable:
        return nn.Sequential(Conv(inputs, inputs, 3, groups=inputs), Conv(inputs, outputs, 1))
    return Conv(inputs, outputs, 3)


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
            embedded_BWA = embedded.flatten(2).float()
            lengths_B1A = embedded_BWA.norm(dim=1, keepdim=True).clamp_min(_SHORTEST)
            cosines_BNA = part_NW.float() @ embedded_BWA / lengths_B1A
            objectness_B1A = self.objectness[i](x).flatten(2).float()
            logits.append(cosines_BNA * self.log_temperature[i].exp() + objectness_B1A)
            sides.append(self.sides[i](x))
            embeddings.append(embedded)
        return Raw(tuple(sides), tuple(logits), tuple(embeddings))


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
        return Raw(
            tuple(side(x) for side, x in zip(self.sides, maps, strict=True)),
            tuple(
                classify(x).flatten(2).float()
                for classify, x in zip(self.classify, maps, strict=True)
            ),
        )


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
