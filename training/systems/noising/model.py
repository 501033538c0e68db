"""The features of image patches: the graph ``features`` of the bundle.

backbone stages -> 3x3 neighbourhood mean -> finer maps averaged to the grid of the patches -> roots
-> coarser maps enlarged to it (bilinear) -> channels side by side -> pooling along the channels ->
rows in row-major order.

Beyond a map's border the mean counts zeros. Means of the part inside, of fewer patches, are noisier
there, and the highest distance of a normal picture then lies on its outermost ring.

The roots keep a few strong channels from deciding alone how far apart two patches are, and take
half of a patch's contrast out of it; see ``roots``.

Pooling is written as one channel gather instead of ``AdaptiveAvgPool1d`` along the last axis, which
would need two transpositions and has no ONNX operator.

Source: Roth et al., "Towards Total Recall in Industrial Anomaly Detection" (PatchCore), 2022.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engineworks.training.systems.noising.config import Neighbourhood, Scale

_SHORTEST = 1e-3  # a position where nothing is seen has no length


class ChannelPool(nn.Module):
    """``AdaptiveAvgPool1d`` along the channels of (B, C, H, W), exact.

    Output channel i is the mean of the input channels floor(i C / D) .. ceil((i + 1) C / D) - 1.
    One gather lays out L channels for each, L the longest window; a shorter window has weight 0
    for its last ones.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        out = torch.arange(width)
        start = out * channels // width
        length = -(-(out + 1) * channels // width) - start
        self.longest = int(length.max())
        self.width = width
        self.keeps_all = channels == width
        self.has_one_length = bool((length == self.longest).all())
        offset = torch.arange(self.longest)[:, None]
        index_LD = (start + offset).clamp(max=channels - 1)
        weight_LD = (offset < length) / length.to(torch.float32)
        # not in the state: both follow from the two numbers
        self.register_buffer("index", index_LD.flatten(), persistent=False)
        self.register_buffer("weight_LD11", weight_LD[:, :, None, None], persistent=False)
        self.index: Tensor
        self.weight_LD11: Tensor

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, H, W)."""
        if self.keeps_all:
            return maps_BCHW
        laid_out = maps_BCHW.index_select(1, self.index)
        windows_BLDHW = laid_out.view(-1, self.longest, self.width, *maps_BCHW.shape[2:])
        if self.has_one_length:
            return windows_BLDHW.mean(1)
        return (windows_BLDHW * self.weight_LD11.to(maps_BCHW.dtype)).sum(1)


class PatchFeatures(nn.Module):
    """Images to one feature row per patch.

    Args:
        backbone: images -> one map per stage.
        channels: of each map.
        width: feature width D; None keeps all channels.
        neighbourhood: what a patch is the mean of; see ``TaskConfig``.
        scale: ``roots``, ``unit`` or ``none``; see ``TaskConfig``.
        patches: number of the map whose positions the patches are; None: the one with the most.
        deep: what maps with fewer positions than there are patches are multiplied by; not read
            where ``scale`` is ``unit``.

    Attributes:
        widths: of the maps' parts in a row, where their channels are not pooled.
        width: D.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: Sequence[int],
        width: int | None = None,
        neighbourhood: Neighbourhood = "zeros",
        scale: Scale = "roots",
        patches: int | None = None,
        deep: float = 1.0,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neighbourhood = neighbourhood
        self.scale = scale
        self.patches = patches
        self.deep = deep
        self.widths = tuple(channels)
        self.width = width or sum(channels)
        self.pool = ChannelPool(sum(channels), self.width)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) float32, normalised -> (B, N, D) float32, N = h w of the patches."""
        return self.rows(self.pooled(self.backbone(images_BCHW)))

    @torch.no_grad()
    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(h, w) of the patches of an image of that size; found by looking."""
        device = next(self.parameters()).device
        maps = self.backbone(torch.zeros(1, 3, height, width, device=device))
        return self._grid(maps)

    def _grid(self, maps: Sequence[Tensor]) -> tuple[int, int]:
        return largest_grid(maps if self.patches is None else [maps[self.patches]])

    def pooled(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps (B, C_s, h_s, w_s) of all stages -> (B, D, h, w)."""
        if self.neighbourhood == "zeros":
            maps = [neighbourhood_mean(m, zeros=True) for m in maps]
        grid = self._grid(maps)
        maps = [_averaged(m, grid) for m in maps]
        if self.scale == "roots":
            maps = [roots(m) for m in maps]
        if self.scale == "unit":
            maps = [unit(_resized(m, grid)) for m in maps]
        elif self.deep != 1:
            maps = [m if _num_positions(m) == grid[0] * grid[1] else m * self.deep for m in maps]
        pooled = self.pool(side_by_side(maps))
        return neighbourhood_mean(pooled, zeros=False) if self.neighbourhood == "inside" else pooled

    @staticmethod
    def rows(maps_BDHW: Tensor) -> Tensor:
        """(B, D, h, w) -> (B, h w, D), row by row."""
        return maps_BDHW.flatten(2).transpose(1, 2)


def side_by_side(maps: Sequence[Tensor]) -> Tensor:
    """Resize every map to the largest grid (bilinear, pixel centres) and stack the channels."""
    grid = largest_grid(maps)
    return torch.cat([_resized(m, grid) for m in maps], dim=1)


def _resized(map_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    h, w = map_BCHW.shape[2:]
    if (h, w) == grid:
        return map_BCHW
    if grid[0] % h or grid[1] % w:
        return F.interpolate(map_BCHW, size=grid, mode="bilinear", align_corners=False)
    # the same, and in ONNX a constant instead of a shape computed from the batch
    scale = (float(grid[0] // h), float(grid[1] // w))
    return F.interpolate(map_BCHW, scale_factor=scale, mode="bilinear", align_corners=False)


def _averaged(map_BCHW: Tensor, grid: tuple[int, int]) -> Tensor:
    """A finer map's means over the positions of a grid, or between its centres where the grid does
    not divide it; a coarser map as it is.
    """
    h, w = map_BCHW.shape[2:]
    if h * w <= grid[0] * grid[1]:
        return map_BCHW
    if h % grid[0] or w % grid[1]:
        return _resized(map_BCHW, grid)
    return F.avg_pool2d(map_BCHW, (h // grid[0], w // grid[1]))


def largest_grid(maps: Sequence[Tensor]) -> tuple[int, int]:
    """(h, w) of the map with the most positions."""
    h, w = max(maps, key=_num_positions).shape[2:]
    return h, w


def _num_positions(map_BCHW: Tensor) -> int:
    return int(map_BCHW.shape[2] * map_BCHW.shape[3])


def neighbourhood_mean(maps_BCHW: Tensor, *, zeros: bool) -> Tensor:
    """Mean of each 3x3 neighbourhood; at the border with zeros around the map, or without."""
    return F.avg_pool2d(maps_BCHW, kernel_size=3, stride=1, padding=1, count_include_pad=zeros)


def roots(maps_BCHW: Tensor) -> Tensor:
    """Signed square root of each value; then each position's vector over the root of its length.

    Source: the square root is Arandjelovic and Zisserman's, "Three things everyone should know to
    improve object retrieval" (RootSIFT), 2012, who divide by the whole length; half of it was
    better here on every set of pictures.
    """
    rooted = maps_BCHW.sign() * maps_BCHW.abs().sqrt()
    # of rooted values the square of the length is the sum of what was there before
    length = maps_BCHW.abs().sum(1, keepdim=True).sqrt()
    return rooted / (length + _SHORTEST).sqrt()


def unit(map_BCHW: Tensor) -> Tensor:
    """Each position's vector divided by its length: products of such are cosines."""
    length_B1HW: Tensor = torch.linalg.vector_norm(map_BCHW, dim=1, keepdim=True)
    return map_BCHW / length_B1HW.clamp_min(1e-12)
