"""``refdet`` by matching: one frozen net for frames and references, templates that are compared.

A reference becomes a *template*: a grid of t x t cells of the net's maps over the object's box, at
several sizes of the picture, for a net says other things of a small object than of a large one.
A frame's map is compared with every cell; where the cells of a box of some size lie, their
similarities are added up. That is a correlation of the map with the template stretched to the
box, without stretching either: only similarities are sampled, by products with small matrices.

What is alike everywhere in a frame explains nothing. So the score of a place is also told in
deviations from the frame's own mean, for each size: then sizes can be compared, and a whole object
outscores its parts, of which there are many that look like something.

Source: DE-ViT (arXiv 2309.12969) for templates of frozen features; standardised similarity after
Hanselmann et al., "Local normalised cross-correlation", and FSOD-VFM (arXiv 2603.03137) for wholes
before parts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.training import backbones
from engineworks.training.systems.refdet.config import EncoderConfig, MatchConfig

_EPS = 1e-6
_NOWHERE = -20.0  # logit of places that are no peak, or lie beside the frame
_FLAT = 0.025  # curvature of a peak of logits that noise might make
_EVEN = 1e-3  # of the grey around a frame, in deviations of its pixels
FEATURES = ("above", "similarity", "mean", "deviation", "size")  # that a score is made of


def resampled(places_K: Tensor, size: int) -> Tensor:
    """(..., K, size): what linear interpolation takes of a row of cells at places in it.

    Args:
        places_K: (..., K) in cells; the first cell's centre is 0. Outside of the row is nothing.
        size: cells of the row.
    """
    cells = torch.arange(size, dtype=places_K.dtype, device=places_K.device)
    return (1 - (places_K[..., None] - cells).abs()).clamp(min=0)


def quadratic_peak(below: Tensor, middle: Tensor, above: Tensor) -> Tensor:
    """Where a parabola through three values has its peak, in [-0.5, 0.5]; flat ones stay near 0."""
    curvature = (2 * middle - below - above).clamp(min=0)
    return (0.5 * (above - below) / (curvature + _FLAT)).clamp(-0.5, 0.5)


class Matcher(nn.Module):
    """Frozen maps, templates, and the few numbers that make a score of similarities.

    Attributes:
        width: P of a prototype: templates of all sizes, cell by cell, and the logarithm of the
            object's width over its height.
        sizes: of the longer side of boxes that are looked for, in pixels of the network's input.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        config: MatchConfig,
        *,
        preprocess: PreprocessSpec,
        object_size: float,
        seed: int = 0,
        weights: bool = True,
    ) -> None:
        """Build the net.

        Args:
            preprocess: of frames.
            object_size: longer side of the object in a reference picture, in pixels.
            weights: False: random ones, for a checkpoint to replace.

        Raises:
            ConfigError, WeightsError: see ``training.backbones.create``.
        """
        super().__init__()
        made = backbones.create(encoder, seed=seed, weights=weights, size=preprocess.size)
        self.provenance = made.provenance
        self.net = made.net.requires_grad_(False)
        self.config = config
        self.channels = sum(made.channels)
        self.stride = preprocess.size[0] // made.grids[0][0]
        self.sizes = config.sizes
        self.object_size = object_size
        self.width = len(config.scales) * config.cells**2 * self.channels + 1
        grey = [
            (preprocess.pad_value / 255 - mean) / std
            for mean, std in zip(preprocess.mean, preprocess.std, strict=True)
        ]
        self.register_buffer("grey_C", torch.tensor(grey), persistent=False)
        self.grey_C: Tensor
        self.score = nn.Linear(len(FEATURES), 1)
        with torch.no_grad():
            self.score.weight.copy_(torch.tensor([config.score]))
            self.score.bias.fill_(config.bias)

    def maps(self, pictures_BCHW: Tensor) -> Tensor:
        """(B, C, h, w) on the finest grid: the part of each stage has length 1 at each place."""
        with torch.no_grad():
            maps = self.net(pictures_BCHW)
        grid = maps[0].shape[2:]
        parts = []
        for each in maps:
            if each.shape[2:] != grid:
                each = F.interpolate(each, size=grid, mode="bilinear", align_corners=False)
            parts.append(each / (each.square().sum(1, keepdim=True) + _EPS).sqrt())
        return torch.cat(parts, 1) / math.sqrt(len(parts))

    def encode(self, pictures_RCHW: Tensor, boxes_R4: Tensor) -> Tensor:
        """Rows (R, P) of references.

        Args:
            boxes_R4: xyxy of the object in pixels of its picture.
        """
        templates = []
        for scale in self.config.scales:
            smaller = F.avg_pool2d(pictures_RCHW, scale) if scale > 1 else pictures_RCHW
            templates.append(self._template(self.maps(smaller), boxes_R4 / scale).flatten(1))
        width_R = (boxes_R4[:, 2] - boxes_R4[:, 0]).clamp(min=1)
        height_R = (boxes_R4[:, 3] - boxes_R4[:, 1]).clamp(min=1)
        return torch.cat([*templates, (width_R / height_R).log()[:, None]], 1)

    def _template(self, maps_RCHW: Tensor, boxes_R4: Tensor) -> Tensor:
        """(R, t * t, C): cells of each box, row by row; each is the mean of four places in it."""
        cells = self.config.cells
        shares = (torch.arange(2 * cells, dtype=maps_RCHW.dtype) + 0.5) / (2 * cells)
        low_R2, side_R2 = boxes_R4[:, :2], boxes_R4[:, 2:] - boxes_R4[:, :2]
        places_R2K = (low_R2[..., None] + side_R2[..., None] * shares) / self.stride - 0.5
        height, width = maps_RCHW.shape[2:]
        across_RKW = self._pairs(resampled(places_R2K[:, 0], width))
        down_RKH = self._pairs(resampled(places_R2K[:, 1], height))
        rows = torch.matmul(maps_RCHW, across_RKW.transpose(1, 2)[:, None])  # (R, C, H, t)
        cells_RCTT = torch.matmul(down_RKH[:, None], rows)
        return cells_RCTT.flatten(2).transpose(1, 2)

    @staticmethod
    def _pairs(weights_RKS: Tensor) -> Tensor:
        num, _, size = weights_RKS.shape
        return weights_RKS.reshape(num, -1, 2, size).mean(2)

    def forward(self, frames_BCHW: Tensor, prototypes_NP: Tensor) -> tuple[Tensor, Tensor]:
        """What is found everywhere.

        Returns:
            logits (B, N, S, h, w), and (B, N, S, h, w, 5) what they were made of: the similarity in
            deviations from the frame's mean, itself, that mean, the deviation, and the logarithm of
            the size.
        """
        similar = self.similarities(self.maps(frames_BCHW), prototypes_NP)
        return self.judged(similar, self.seen(frames_BCHW))

    def similarities(self, maps_BCHW: Tensor, prototypes_NP: Tensor) -> Tensor:
        """(B, N, S, h, w): mean similarity of the cells of a box of each size at each place."""
        cells, scales = self.config.cells, len(self.config.scales)
        height, width = maps_BCHW.shape[2:]
        templates = prototypes_NP[:, :-1].reshape(-1, self.channels)  # (N V t t, C)
        cosines = torch.matmul(templates, maps_BCHW.flatten(2))
        # rows of the template beside rows of the map, and columns beside columns: both at once
        # are then the long side of a product
        grid = (-1, scales, cells, cells, height, width)
        cosines = cosines.reshape(maps_BCHW.shape[0], *grid).permute(0, 1, 2, 3, 5, 4, 6)
        cosines = cosines.reshape(maps_BCHW.shape[0], -1, scales, cells * height, cells * width)
        ratio_N = prototypes_NP[:, -1].clamp(-3, 3)
        found = []
        for v, sizes in enumerate(self._sizes_of_scales()):
            if not sizes:
                continue
            sides_S = prototypes_NP.new_tensor(sizes) / self.stride / cells
            across_NS = sides_S * ratio_N.clamp(max=0).exp()[:, None]
            down_NS = sides_S * (-ratio_N).clamp(max=0).exp()[:, None]
            columns = self._spread(across_NS, width)  # (N, S, w', t w)
            rows = self._spread(down_NS, height)
            there = torch.matmul(cosines[:, :, v, None], columns.transpose(-1, -2))
            found.append(torch.matmul(rows, there))
        return torch.cat(found, 2) / cells**2

    def _spread(self, cell_NS: Tensor, size: int) -> Tensor:
        """(N, S, size, t * size): which places of a row the cells of a template take there.

        Args:
            cell_NS: side of a cell, in places.
        """
        cells = self.config.cells
        offsets_T = torch.arange(cells, dtype=cell_NS.dtype) - (cells - 1) / 2
        centres_K = torch.arange(size, dtype=cell_NS.dtype)
        places = centres_K[:, None] + cell_NS[..., None, None] * offsets_T
        return resampled(places, size).flatten(3)

    def _sizes_of_scales(self) -> list[list[float]]:
        """The sizes that templates of each scale are compared at; joined, they ascend."""
        shown = [self.object_size / scale for scale in self.config.scales]
        found: list[list[float]] = [[] for _ in shown]
        for size in self.sizes:
            nearest = min(range(len(shown)), key=lambda v: abs(math.log(shown[v] / size)))
            found[nearest].append(size)
        return found

    def seen(self, frames_BCHW: Tensor) -> Tensor:
        """(B, h, w): 1 where a frame is, 0 in the even grey around it."""
        apart = (frames_BCHW - self.grey_C[:, None, None]).abs().amax(1, keepdim=True)
        return (F.max_pool2d(apart, self.stride)[:, 0] > _EVEN).to(frames_BCHW.dtype)

    def judged(self, similar: Tensor, seen_BHW: Tensor) -> tuple[Tensor, Tensor]:
        """See ``forward``."""
        weight = seen_BHW[:, None, None]
        count = weight.sum((3, 4), keepdim=True).clamp(min=1)
        mean = (similar * weight).sum((3, 4), keepdim=True) / count
        spread = (((similar - mean).square() * weight).sum((3, 4), keepdim=True) / count).sqrt()
        above = (similar - mean) / (spread + self.config.softening)
        sizes = similar.new_tensor(self.sizes)
        size = (sizes / self.config.unit).log()[:, None, None]
        same = torch.zeros_like(similar)
        features = torch.stack([above, similar, mean + same, spread + same, size + same], -1)
        return self.score(features)[..., 0], features


class EncodeTemplate(nn.Module):
    """The graph ``encode``: pictures (R, 3, S, S) and boxes (R, 4) in them -> rows (R, P)."""

    def __init__(self, matcher: Matcher) -> None:
        super().__init__()
        self.matcher = matcher

    def forward(self, pictures_RCHW: Tensor, boxes_R4: Tensor) -> Tensor:
        return self.matcher.encode(pictures_RCHW, boxes_R4)


class DetectMatch(nn.Module):
    """The graph ``detect``: frames (B, 3, H, W), prototypes (N, P) -> the best M candidates.

    A candidate is a peak among the places around it, for an object and a size; where between the
    places and sizes it lies is read off a parabola.
    """

    def __init__(self, matcher: Matcher, num_candidates: int) -> None:
        super().__init__()
        self.matcher = matcher
        self.num_candidates = num_candidates

    def forward(self, frames_BCHW: Tensor, prototypes_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, M, 4) xyxy in pixels, scores (B, M) in [0, 1], classes (B, M) int64."""
        logits, seen = self._found(frames_BCHW, prototypes_NP)
        boxes_B4A = self._boxes(logits, prototypes_NP)
        flat = logits.flatten(0, 2)[:, None]  # one channel: pooling takes four axes
        is_peak = (flat >= F.max_pool2d(flat, 3, 1, 1)).reshape(logits.shape)
        nowhere = torch.full_like(logits, _NOWHERE)
        peaks_BA = torch.where(is_peak & (seen > 0), logits, nowhere).flatten(1)
        best = peaks_BA.topk(min(self.num_candidates, peaks_BA.shape[1]), dim=1)
        places_BM = best.indices
        found_B4M = boxes_B4A.gather(2, places_BM[:, None].expand(-1, 4, -1))
        scores_BM = 1 / (1 + (-logits.flatten(1).gather(1, places_BM)).exp())
        scores_BM = scores_BM * (best.values > _NOWHERE / 2)  # what is no peak fills up
        objects = torch.arange(logits.shape[1], device=logits.device)[:, None, None, None]
        classes_BA = (objects + torch.zeros_like(logits, dtype=torch.int64)).flatten(1)
        return found_B4M.transpose(1, 2), scores_BM, classes_BA.gather(1, places_BM)

    def before_choice(self, frames_BCHW: Tensor, prototypes_NP: Tensor) -> tuple[Tensor, Tensor]:
        """What candidates are chosen from: boxes (B, 4, A) and logits (B, A)."""
        logits, _ = self._found(frames_BCHW, prototypes_NP)
        return self._boxes(logits, prototypes_NP), logits.flatten(1)

    def _found(self, frames_BCHW: Tensor, prototypes_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, N, S, h, w), and (B, 1, 1, h, w): 1 where a frame is."""
        logits, _ = self.matcher(frames_BCHW, prototypes_NP)
        return logits, self.matcher.seen(frames_BCHW)[:, None, None]

    def _boxes(self, logits: Tensor, prototypes_NP: Tensor) -> Tensor:
        """(B, 4, A): xyxy of the box of each object, size and place."""
        matcher = self.matcher
        size, down, across = (_move(logits, axis) for axis in (2, 3, 4))
        y = torch.arange(logits.shape[3], dtype=logits.dtype)[:, None]
        x = torch.arange(logits.shape[4], dtype=logits.dtype)
        x, y = (matcher.stride * (each + 0.5) for each in (x + across, y + down))
        sizes = logits.new_tensor(matcher.sizes).log()[:, None, None]
        half = 0.5 * (sizes + size * math.log(matcher.config.step)).exp()
        ratio = prototypes_NP[:, -1].clamp(-3, 3)[:, None, None, None]
        wide, high = half * ratio.clamp(max=0).exp(), half * (-ratio).clamp(max=0).exp()
        return torch.stack([x - wide, y - high, x + wide, y + high], 1).flatten(2)


def _move(logits_BNSHW: Tensor, axis: int) -> Tensor:
    """How far between places a peak lies along an axis; at its ends it stays."""
    first, last = logits_BNSHW.narrow(axis, 0, 1), logits_BNSHW.narrow(axis, -1, 1)
    if logits_BNSHW.shape[axis] < 3:
        return torch.zeros_like(logits_BNSHW)
    num = logits_BNSHW.shape[axis] - 2
    inner = quadratic_peak(*(logits_BNSHW.narrow(axis, start, num) for start in range(3)))
    return torch.cat([torch.zeros_like(first), inner, torch.zeros_like(last)], axis)
