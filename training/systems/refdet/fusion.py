"""What is looked for speaks to what is seen: support-modulated fusion of the pyramid.

A map of each scale is mixed with its neighbours, attends to itself at a cost linear in its size,
and is weighed channel by channel by the prototypes of the prompt. Many prototypes weigh by the
mean of their gates, so that the cost does not depend on how many there are: which of them is where
is told by the head.

Source: the PSALM block of YOLOv8n-RefDet; Shen et al., "Efficient Attention: Attention with Linear
Complexities", 2021.
"""

from __future__ import annotations

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
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = width // 2
        self.heads = max(1, min(4, width // 16))
        self.before_queries, self.before_keys = ShortLong(width), ShortLong(width)
        self.queries = nn.Conv2d(width, inner, 1)
        self.keys = nn.Conv2d(width, inner, 1)
        self.values = nn.Conv2d(width, inner, 1)
        self.out = nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor, gates: Tensor) -> Tensor:
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
        found = (found * gates[..., None]).unflatten(2, (height, width)).to(x.dtype)
        out: Tensor = self.out(found)
        return out


class Fusion(nn.Module):
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
        self.attentions = nn.ModuleList(LinearAttention(c) for c in channels)
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
        self.around = nn.ModuleList(
            nn.Identity() if c == out else nn.Conv2d(c, out, 1)
            for c, out in zip(channels, outputs, strict=True)
        )

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


class Plain(nn.Module):
    """No fusion: maps as they are, but with ``outputs`` channels; for small nets and comparison."""

    def __init__(
        self, channels: Sequence[int], widths: Sequence[int], outputs: Sequence[int]
    ) -> None:
        super().__init__()
        self.around = nn.ModuleList(
            nn.Identity() if c == out else nn.Conv2d(c, out, 1)
            for c, out in zip(channels, outputs, strict=True)
        )

    def forward(
        self, maps: Sequence[Tensor], prototypes_NP: Tensor, prompted_BN: Tensor | None = None
    ) -> list[Tensor]:
        return [around(q) for around, q in zip(self.around, maps, strict=True)]


FUSIONS: dict[str, type[nn.Module]] = {"psalm": Fusion, "none": Plain}
