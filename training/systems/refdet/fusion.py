"""What is looked for speaks to what is seen: fusions of a pyramid of maps with prototypes.

``Psalm``: a map of each scale is mixed with its neighbours, attends to itself at a cost linear in
its size, and is weighed channel by channel by the prototypes of the prompt. Many prototypes weigh
by the mean of their gates, so that the cost does not depend on how many there are: which of them is
where is told by the head.

``Cheaf``: the alternative with attention and convolutions side by side. As published it does not
look at the prototypes at all.

Source: the PSALM and CHEAF blocks of YOLOv8n-RefDet; Shen et al., "Efficient Attention: Attention
with Linear Complexities", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ShortLong(nn.Sequential):
    """Two depthwise convolutions, of 3 x 3 and 7 x 7, with SiLU between them."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.SiLU(),
            nn.Conv2d(width, width, 7, padding=3, groups=width),
        )


class LinearAttention(nn.Module):
    """What a map (B, C, h, w) finds in itself, weighed by gates (B, C / 2) or (1, C / 2).

    Keys are normalised over positions and queries over channels, so that the small matrix
    keys x values comes first.

    Args:
        local: queries and keys see their surroundings.
    """

    def __init__(self, width: int, *, local: bool) -> None:
        super().__init__()
        inner = width // 2
        self.heads = max(1, min(4, width // 16))
        self.before_queries, self.before_keys = (
            ShortLong(width) if local else nn.Identity() for _ in range(2)
        )
        self.queries = nn.Conv2d(width, inner, 1)
        self.keys = nn.Conv2d(width, inner, 1)
        self.values = nn.Conv2d(width, inner, 1)
        self.out = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        parts = (
            self.queries(self.before_queries(x)),
            self.keys(self.before_keys(x)),
            self.values(x),
        )
        # in float32: sums over all positions
        queries, keys, values = (
            part.flatten(2).unflatten(1, (self.heads, -1)).float() for part in parts
        )
        context = keys.softmax(-1) @ values.transpose(-1, -2)
        found = (context.transpose(-1, -2) @ queries.softmax(-2)).flatten(1, 2)
        if gates is not None:
            found = found * gates[..., None]
        out: Tensor = self.out(found.unflatten(2, (height, width)).to(x.dtype))
        return out


class Psalm(nn.Module):
    """The pyramid of the frames, modulated by what is looked for.

    Args:
        channels: of the maps, finest first.
        widths: of the prototypes' parts, one per map.
        outputs: channels of the maps that come out.
    """

    def __init__(
        self, channels: Sequence[int], widths: Sequence[int], outputs: Sequence[int]
    ) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.widths = tuple(widths)
        self.top_down = nn.ModuleList(nn.Conv2d(above, here, 1) for here, above in pairs)
        self.bottom_up = nn.ModuleList(
            nn.Conv2d(below, here, 3, 2, 1, groups=below) for below, here in pairs
        )
        self.smooth = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 3, padding=1, groups=c), nn.BatchNorm2d(c), nn.SiLU())
            for c in channels
        )
        self.attentions = nn.ModuleList(LinearAttention(c, local=True) for c in channels)
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(p, c // 2), nn.LayerNorm(c // 2), nn.Sigmoid())
            for c, p in zip(channels, widths, strict=True)
        )
        self.refine = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, c, 3, padding=1, groups=c),
                nn.BatchNorm2d(c),
                nn.SiLU(),
                nn.Conv2d(c, out, 1),
                nn.BatchNorm2d(out),
                nn.SiLU(),
            )
            for c, out in zip(channels, outputs, strict=True)
        )
        self.around = _around(channels, outputs)

    def forward(
        self, maps: Sequence[Tensor], prototypes_NP: Tensor, prompted_BN: Tensor | None = None
    ) -> list[Tensor]:
        """Maps of ``outputs`` channels, of the sizes of ``maps``.

        Args:
            maps: (B, C_s, h_s, w_s) of each scale, each half as large as the one before.
            prototypes_NP: what is looked for.
            prompted_BN: bool: in which frame; None: all in all. At least one in each.
        """
        mixed = self._pyramid(maps)
        out = []
        parts = torch.split(prototypes_NP, list(self.widths), dim=1)
        for i, part_NW in enumerate(parts):
            gates = self.gates[i](part_NW)
            if prompted_BN is None:
                gates = gates.mean(0, keepdim=True)
            else:
                shares_BN = prompted_BN.to(gates.dtype)
                gates = (shares_BN / shares_BN.sum(1, keepdim=True)) @ gates
            attended = self.attentions[i](mixed[i], gates) + mixed[i]
            out.append(self.refine[i](attended) + self.around[i](maps[i]))
        return out

    def _pyramid(self, maps: Sequence[Tensor]) -> list[Tensor]:
        mixed = [maps[-1]]
        for q, conv in zip(reversed(maps[:-1]), reversed(list(self.top_down)), strict=True):
            mixed.insert(0, q + _twice(conv(mixed[0])))
        for i, conv in enumerate(self.bottom_up, 1):
            mixed[i] = mixed[i] + conv(mixed[i - 1])
        return [smooth(x) + q for smooth, x, q in zip(self.smooth, mixed, maps, strict=True)]


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def _around(channels: Sequence[int], outputs: Sequence[int]) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Identity() if c == out else nn.Conv2d(c, out, 1)
        for c, out in zip(channels, outputs, strict=True)
    )


class _Emphasis(nn.Module):
    """A map times how much each channel matters, then times how much each place does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // 16)
        self.channels = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width, inner, 1),
            nn.ReLU(),
            nn.Conv2d(inner, width, 1),
            nn.Sigmoid(),
        )
        self.places = nn.Sequential(
            nn.Conv2d(width, inner, 1),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, 1, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.channels(x)
        out: Tensor = x * self.places(x)
        return out


class Cheaf(nn.Module):
    """The pyramid of the frames, each map attending to itself beside convolutions.

    Args: see ``Psalm``; the prototypes make no difference.
    """

    def __init__(
        self, channels: Sequence[int], widths: Sequence[int], outputs: Sequence[int]
    ) -> None:
        super().__init__()
        pairs = list(pairwise(channels))
        self.attentions = nn.ModuleList(LinearAttention(c, local=False) for c in channels)
        self.convolutions = nn.ModuleList(ShortLong(c) for c in channels)
        self.join = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * c, c, 1), nn.BatchNorm2d(c), nn.SiLU()) for c in channels
        )
        self.emphasis = nn.ModuleList(_Emphasis(c) for c in channels if pairs)
        self.top_down = nn.ModuleList(nn.Conv2d(above, here, 1) for here, above in pairs)
        self.bottom_up = nn.ModuleList(nn.Conv2d(below, here, 3, 2, 1) for below, here in pairs)
        self.smooth = nn.ModuleList(_separable(c, c) for c in channels)
        self.refine = nn.ModuleList(
            _separable(c, out) for c, out in zip(channels, outputs, strict=True)
        )
        self.around = _around(channels, outputs)

    def forward(
        self, maps: Sequence[Tensor], prototypes_NP: Tensor, prompted_BN: Tensor | None = None
    ) -> list[Tensor]:
        """See ``Psalm.forward``."""
        both = [
            join(torch.cat([attend(q) + q, convolve(q)], 1)) + q
            for q, attend, convolve, join in zip(
                maps, self.attentions, self.convolutions, self.join, strict=True
            )
        ]
        mixed = self._pyramid(both)
        return [
            refine(x) + around(q)
            for x, q, refine, around in zip(mixed, maps, self.refine, self.around, strict=True)
        ]

    def _pyramid(self, maps: Sequence[Tensor]) -> list[Tensor]:
        mixed = list(maps)
        for i in reversed(range(len(self.top_down))):
            mixed[i] = self.emphasis[i](maps[i]) + _twice(self.top_down[i](mixed[i + 1]))
        for i, conv in enumerate(self.bottom_up, 1):
            mixed[i] = self.emphasis[i](mixed[i]) + conv(mixed[i - 1])
        return [smooth(x) + q for smooth, x, q in zip(self.smooth, mixed, maps, strict=True)]


def _separable(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, groups=math.gcd(inputs, outputs)),
        nn.Conv2d(outputs, outputs, 1),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )


class Plain(nn.Module):
    """No fusion: maps as they are, but with ``outputs`` channels; for small nets."""

    def __init__(
        self, channels: Sequence[int], widths: Sequence[int], outputs: Sequence[int]
    ) -> None:
        super().__init__()
        self.around = _around(channels, outputs)

    def forward(
        self, maps: Sequence[Tensor], prototypes_NP: Tensor, prompted_BN: Tensor | None = None
    ) -> list[Tensor]:
        return [around(q) for around, q in zip(self.around, maps, strict=True)]


FUSIONS: dict[str, type[nn.Module]] = {"psalm": Psalm, "cheaf": Cheaf, "none": Plain}
