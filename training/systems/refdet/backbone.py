"""The detector's own backbone and neck: from frames to a feature pyramid.

Source: the YOLO family as the papers describe it. Wang et al., "CSPNet", 2020 (the split blocks);
He et al., "Spatial Pyramid Pooling", 2015; Liu et al., "Path Aggregation Network", 2018. At width
0.25 and depth 0.33 it has the size of what is known as YOLOv8n.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_WIDTHS = (64, 128, 256, 512, 1024)  # of the stem and of the stages of strides 4 to 32, at width 1
_DEPTHS = (3, 6, 6, 3)  # blocks of these stages, at depth 1


def channels(scales: Sequence[int], width: float) -> tuple[int, ...]:
    """Of the maps of a ``Backbone``."""
    widths = _widths(width)
    return tuple(widths[scale - 1] for scale in scales)


def _widths(width: float) -> list[int]:
    return [max(8, round(each * width / 8) * 8) for each in _WIDTHS]


class Conv(nn.Sequential):
    """Convolution, batch norm, SiLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.SiLU(inplace=True),
        )


class Bottleneck(nn.Module):
    """Two convolutions, with a way around them where ``shortcut``."""

    def __init__(self, width: int, *, shortcut: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(Conv(width, width), Conv(width, width))
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return x + out if self.shortcut else out


class C2f(nn.Module):
    """A split block: half of the channels pass through bottlenecks, and all stages are joined."""

    def __init__(self, inputs: int, outputs: int, depth: int, *, shortcut: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.enter = Conv(inputs, 2 * half, 1)
        self.blocks = nn.ModuleList(Bottleneck(half, shortcut=shortcut) for _ in range(depth))
        self.leave = Conv((2 + depth) * half, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(block(parts[-1]))
        out: Tensor = self.leave(torch.cat(parts, 1))
        return out


class SPPF(nn.Module):
    """Spatial pyramid pooling: three maxima of 5 x 5, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = Conv(width, width // 2, 1)
        self.leave = Conv(4 * (width // 2), width, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        out: Tensor = self.leave(torch.cat(parts, 1))
        return out


class Backbone(nn.Module):
    """Frames (B, 3, H, W) to one map per scale, H and W multiples of 32.

    Attributes:
        channels: of each map, in the order of ``scales``.
    """

    def __init__(
        self,
        scales: tuple[int, ...],
        *,
        width: float = 0.25,
        depth: float = 0.33,
        checkpointing: bool = False,
    ) -> None:
        """Build it.

        Args:
            scales: of 2 to 5, ascending: stride 2 ** scale. 2 comes from the backbone itself, the
                others from the neck; what no scale needs is not built.
            checkpointing: compute activations again in the backward pass, to save memory.
        """
        super().__init__()
        widths = _widths(width)
        depths = [max(1, round(each * depth)) for each in _DEPTHS]
        self.scales = scales
        self.checkpointing = checkpointing
        self.stem = Conv(3, widths[0], 3, 2)
        self.stages = nn.ModuleList(
            nn.Sequential(Conv(before, after, 3, 2), C2f(after, after, num, shortcut=True))
            for before, after, num in zip(widths, widths[1:], depths, strict=False)
        )
        self.pool = SPPF(widths[4])
        c3, c4, c5 = widths[2:]
        num = depths[-1]
        self.top_down = nn.ModuleDict({"4": C2f(c5 + c4, c4, num, shortcut=False)})
        if min(scales) < 4:
            self.top_down["3"] = C2f(c4 + c3, c3, num, shortcut=False)
        self.bottom_up, self.down = nn.ModuleDict(), nn.ModuleDict()
        for scale, below, here in ((4, c3, c4), (5, c4, c5)):
            if scale <= max(scales) and (scale == 5 or "3" in self.top_down):
                self.down[str(scale)] = Conv(below, below, 3, 2)
                self.bottom_up[str(scale)] = C2f(below + here, here, num, shortcut=False)
        self.channels = channels(scales, width)

    def forward(self, frames_BCHW: Tensor) -> list[Tensor]:
        x = self.stem(frames_BCHW)
        maps = {}
        for scale, stage in enumerate(self.stages, 2):
            if self.checkpointing and self.training:
                x = checkpoint(stage, x, use_reentrant=False)
            else:
                x = stage(x)
            maps[scale] = x
        top = self.pool(maps[5])
        out = {2: maps[2], 5: top}
        out[4] = self.top_down["4"](torch.cat([_twice(top), maps[4]], 1))
        if "3" in self.top_down:
            out[3] = self.top_down["3"](torch.cat([_twice(out[4]), maps[3]], 1))
        for scale in (4, 5):
            if str(scale) in self.bottom_up:
                below = self.down[str(scale)](out[scale - 1])
                out[scale] = self.bottom_up[str(scale)](torch.cat([below, out[scale]], 1))
        return [out[scale] for scale in self.scales]


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
