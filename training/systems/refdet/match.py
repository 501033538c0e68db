"""``refdet`` by matching: one frozen net for frames and references, templates that are compared.

A reference becomes a *template*: a grid of t x t cells of the net's maps over the object's box, at
several sizes of the picture, for a net says other things of a small object than of a large one.
A frame's map is compared with every cell; where the cells of a box of some size lie, their
similarities are added up. That is a correlation of the map with the template stretched to the
box, without stretching either: only similarities are sampled, by products with small matrices.

What is alike everywhere in a frame explains nothing. So the score of a place is also told in
deviations from the frame's own mean, for each size: then sizes can be compared, and a whole object
outscores its parts, of which there are many that look like something.

Templates tell where something of that shape is, and little of what it is: they are of a net's
middle maps. Its deepest map, of a few cells, knows kinds; what it says on average over a
candidate's box is compared with what it says of the references.

Source: DE-ViT (arXiv 2309.12969) for templates of frozen features; standardised similarity after
Hanselmann et al., "Local normalised cross-correlation", and FSOD-VFM (arXiv 2603.03137) for wholes
before parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.training import backbones
from engineworks.training.systems.refdet.config import EncoderConfig, FollowConfig, MatchConfig
from engineworks.training.systems.refdet.relation import (
    NUM_FACTS,
    Relation,
    averaged,
    moved,
    resampled,
)

_EPS = 1e-6
_NOWHERE = -20.0  # logit of places that are no peak, or lie beside the frame
_FLAT = 0.025  # curvature of a peak of logits that noise might make
_EVEN = 1e-3  # of the grey around a frame, in deviations of its pixels
_DEEP_PLACES = 8  # in a box, each way, that the deepest map is read at
AT_ONCE = 16  # objects that are judged together; each has candidates of its own
FEATURES = ("above", "similarity", "mean", "deviation", "size")  # that a score is made of


def quadratic_peak(below: Tensor, middle: Tensor, above: Tensor) -> Tensor:
    """Where a parabola through three values has its peak, in [-0.5, 0.5]; flat ones stay near 0."""
    curvature = (2 * middle - below - above).clamp(min=0)
    return (0.5 * (above - below) / (curvature + _FLAT)).clamp(-0.5, 0.5)


def scored(factors: Sequence[float], bias: float) -> nn.Linear:
    """What makes a logit of ``FEATURES``."""
    score = nn.Linear(len(FEATURES), 1)
    with torch.no_grad():
        score.weight.copy_(torch.tensor([factors]))
        score.bias.fill_(bias)
    return score


def _told_by_kind(factor: float, usual: float) -> nn.Linear:
    """What a cosine of kinds adds to a logit; nothing where it is as usual."""
    told = nn.Linear(1, 1)
    with torch.no_grad():
        told.weight.fill_(factor)
        told.bias.fill_(-factor * usual)
    return told


def _unit(vectors: Tensor) -> Tensor:
    """The same along their last axis, of length 1."""
    return vectors / (vectors.square().sum(-1, keepdim=True) + _EPS).sqrt()


class Maps(NamedTuple):
    """What the net says of pictures.

    Attributes:
        fine: (B, C, h, w) on the finest grid: the part of each stage has length 1 at each place.
        deep: (B, K, h', w') of the stage that tells kinds; K is 0 where none does.
    """

    fine: Tensor
    deep: Tensor

    def of(self, picture: int) -> Maps:
        """One picture's."""
        return Maps(*(each[picture : picture + 1] for each in self))


class Found(NamedTuple):
    """What matching says of every place, for B frames, N objects and S sizes.

    Attributes:
        maps: of the frames.
        seen: (B, h, w): 1 where a frame is, 0 beside it.
        cosines: (B, N V t t, h, w), see ``Matcher.cosines``.
        similar: (B, N, S, h, w), see ``Matcher.similarities``.
        logits: (B, N, S, h, w).
        features: (B, N, S, h, w, 5), ``FEATURES``.
    """

    maps: Maps
    seen: Tensor
    cosines: Tensor
    similar: Tensor
    logits: Tensor
    features: Tensor


class Matcher(nn.Module):
    """Frozen maps, templates, and the few numbers that make a score of similarities.

    Attributes:
        width: P of a prototype: templates of all sizes, cell by cell, what the deepest map says of
            the object, and the logarithm of its width over its height.
        sizes: of the longer side of boxes that are looked for, in pixels of the network's input.
        scale, shift: what turns a logit into that of a share of right boxes.
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
        kind = config.kind
        if kind is not None:
            assert encoder.stages is not None
            encoder = encoder.model_copy(update={"stages": (*encoder.stages, kind.stage)})
        made = backbones.create(encoder, seed=seed, weights=weights, size=preprocess.size)
        self.provenance = made.provenance
        self.net = made.net.requires_grad_(False)
        self.config = config
        fine, deep = (made.channels, 0) if kind is None else (made.channels[:-1], made.channels[-1])
        self.num_kinds = deep
        self.channels = sum(fine)
        self.stride = preprocess.size[0] // made.grids[0][0]
        self.deep_stride = preprocess.size[0] // made.grids[-1][0]
        self.sizes = config.sizes
        self.object_size = object_size
        self.num_templates = len(config.scales) * config.cells**2 * self.channels  # numbers of them
        self.width = self.num_templates + self.num_kinds + 1
        grey = [
            (preprocess.pad_value / 255 - mean) / std
            for mean, std in zip(preprocess.mean, preprocess.std, strict=True)
        ]
        self.register_buffer("grey_C", torch.tensor(grey), persistent=False)
        self.grey_C: Tensor
        self.scale, self.shift = 1.0, 0.0
        self.score = scored(config.score, config.bias)
        self.kind = None if kind is None else _told_by_kind(kind.factor, kind.usual)
        ground = None if kind is None or not kind.ground else torch.zeros(deep)
        self.register_buffer("ground_K", ground)  # of places without an object, of all kinds alike
        self.ground_K: Tensor | None
        num_facts = NUM_FACTS + (kind is not None)
        self.relation = (
            None if config.relation is None else Relation(config.relation, config.cells, num_facts)
        )

    def calibrate(self, scale: float, shift: float) -> None:
        """Make the last logits ``scale`` times as large and add ``shift``."""
        self.scale, self.shift = scale * self.scale, scale * self.shift + shift

    def maps(self, pictures_BCHW: Tensor) -> Maps:
        """What the net says of pictures."""
        with torch.no_grad():
            said: Sequence[Tensor] = self.net(pictures_BCHW)
        maps, deep = (said, said[-1][:, :0]) if self.kind is None else (said[:-1], said[-1])
        grid = maps[0].shape[2:]
        parts = []
        for each in maps:
            if each.shape[2:] != grid:
                each = F.interpolate(each, size=grid, mode="bilinear", align_corners=False)
            parts.append(each / (each.square().sum(1, keepdim=True) + _EPS).sqrt())
        return Maps(torch.cat(parts, 1) / math.sqrt(len(parts)), deep)

    def encode(self, pictures_RCHW: Tensor, boxes_R4: Tensor) -> Tensor:
        """Rows (R, P) of references.

        Args:
            boxes_R4: xyxy of the object in pixels of its picture.
        """
        templates, kinds = [], []
        for scale in self.config.scales:
            smaller = F.avg_pool2d(pictures_RCHW, scale) if scale > 1 else pictures_RCHW
            maps, boxes = self.maps(smaller), boxes_R4 / scale
            templates.append(self._template(maps.fine, boxes).flatten(1))
            kinds.append(self.kinds(maps.deep, boxes[:, None])[:, 0])
        width_R = (boxes_R4[:, 2] - boxes_R4[:, 0]).clamp(min=1)
        height_R = (boxes_R4[:, 3] - boxes_R4[:, 1]).clamp(min=1)
        ratio_R1 = (width_R / height_R).log()[:, None]
        return torch.cat([*templates, torch.stack(kinds).mean(0), ratio_R1], 1)

    def kinds(self, deep_BKHW: Tensor, boxes_BM4: Tensor) -> Tensor:
        """(B, M, K): what the deepest map says of boxes on average, of length 1.

        Args:
            boxes_BM4: xyxy in pixels of the pictures.
        """
        shares_P = (torch.arange(_DEEP_PLACES, device=boxes_BM4.device) + 0.5) / _DEEP_PLACES
        low_BM2 = boxes_BM4[..., :2] / self.deep_stride - 0.5
        side_BM2 = (boxes_BM4[..., 2:] - boxes_BM4[..., :2]) / self.deep_stride
        places_BM2P = low_BM2[..., None] + side_BM2[..., None] * shares_P
        height, width = deep_BKHW.shape[2:]
        down_BMH = resampled(places_BM2P[:, :, 1], height).mean(2)
        across_BMW = resampled(places_BM2P[:, :, 0], width).mean(2)
        taken_BMA = (down_BMH[..., None] * across_BMW[:, :, None]).flatten(2)
        means_BMK = torch.matmul(taken_BMA, deep_BKHW.flatten(2).transpose(1, 2))
        return _unit(means_BMK)

    def kind_cosines(
        self, maps: Maps, boxes_BM4: Tensor, whose_BM: Tensor, prototypes_NP: Tensor
    ) -> Tensor:
        """(B, M): how much each box is of its object's kind.

        A prototype is as long as its references agree, and so are its cosines.

        Args:
            whose_BM: number of the object.
        """
        kinds_BMK = self.kinds(maps.deep, boxes_BM4)
        wanted_NK = prototypes_NP[:, self.num_templates : -1]
        if self.ground_K is not None:
            length_N1 = wanted_NK.square().sum(1, keepdim=True).sqrt()
            kinds_BMK = _unit(kinds_BMK - self.ground_K)
            wanted_NK = length_N1 * _unit(wanted_NK - self.ground_K)
        return (kinds_BMK * wanted_NK[whose_BM]).sum(2)

    @torch.no_grad()
    def said_of_places(self, frames_BCHW: Tensor) -> Tensor:
        """(B, h', w', K): what the deepest map says of each place, of length 1."""
        return _unit(self.maps(frames_BCHW).deep.movedim(1, -1))

    def _template(self, maps_RCHW: Tensor, boxes_R4: Tensor) -> Tensor:
        """(R, t * t, C): cells of each box, row by row; each is the mean of four places in it."""
        cells = self.config.cells
        low_R2, side_R2 = (
            boxes_R4[:, :2] / self.stride,
            (boxes_R4[:, 2:] - boxes_R4[:, :2]) / self.stride,
        )
        height, width = maps_RCHW.shape[2:]
        across_RKW = averaged(low_R2[:, 0], side_R2[:, 0], cells, width)
        down_RKH = averaged(low_R2[:, 1], side_R2[:, 1], cells, height)
        rows = torch.matmul(maps_RCHW, across_RKW.transpose(1, 2)[:, None])  # (R, C, H, t)
        cells_RCTT = torch.matmul(down_RKH[:, None], rows)
        return cells_RCTT.flatten(2).transpose(1, 2)

    def forward(
        self,
        frames_BCHW: Tensor,
        prototypes_NP: Tensor,
        sizes: Sequence[float] | None = None,
        score: nn.Linear | None = None,
    ) -> Found:
        """What is found everywhere.

        Args:
            sizes: of the longer side of boxes, ascending; None: ``self.sizes``.
            score: what makes a score of similarities; None: ``self.score``.
        """
        maps = self.maps(frames_BCHW)
        return self.found(maps, self.seen(frames_BCHW), prototypes_NP, sizes, score)

    def found(
        self,
        maps: Maps,
        seen_BHW: Tensor,
        prototypes_NP: Tensor,
        sizes: Sequence[float] | None = None,
        score: nn.Linear | None = None,
    ) -> Found:
        """As ``forward``, of maps that are known, and where they show a frame."""
        cosines = self.cosines(maps.fine, prototypes_NP)
        similar = self.similarities(cosines, prototypes_NP, sizes or self.sizes)
        logits, features = self.judged(similar, seen_BHW, sizes or self.sizes, score)
        return Found(maps, seen_BHW, cosines, similar, logits, features)

    def cosines(self, maps_BCHW: Tensor, prototypes_NP: Tensor) -> Tensor:
        """(B, N V t t, h, w): how much each place looks like each cell of each template."""
        templates = prototypes_NP[:, : self.num_templates].reshape(
            -1, self.channels
        )  # (N V t t, C)
        batch, _, height, width = maps_BCHW.shape
        cosines = torch.matmul(templates, maps_BCHW.flatten(2))
        return cosines.reshape(batch, -1, height, width)

    def similarities(
        self, cosines: Tensor, prototypes_NP: Tensor, sizes: Sequence[float] | None = None
    ) -> Tensor:
        """(B, N, S, h, w): mean similarity of the cells of a box of each size at each place.

        Args:
            cosines: see there.
        """
        cells, scales = self.config.cells, len(self.config.scales)
        batch, _, height, width = cosines.shape
        # rows of the template beside rows of the map, and columns beside columns: both at once
        # are then the long side of a product
        grid = (-1, scales, cells, cells, height, width)
        cosines = cosines.reshape(batch, *grid).permute(0, 1, 2, 3, 5, 4, 6)
        cosines = cosines.reshape(batch, -1, scales, cells * height, cells * width)
        ratio_N = prototypes_NP[:, -1].clamp(-3, 3)
        found = []
        for v, its_sizes in enumerate(self._sizes_of_scales(sizes or self.sizes)):
            if not its_sizes:
                continue
            sides_S = prototypes_NP.new_tensor(its_sizes) / self.stride / cells
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

    def _sizes_of_scales(self, sizes: Sequence[float]) -> list[list[float]]:
        """The sizes that templates of each scale are compared at; joined, they ascend."""
        scales = self.scale_of_size(sizes)
        return [
            [size for size, scale in zip(sizes, scales, strict=True) if scale == v]
            for v in range(len(self.config.scales))
        ]

    def scale_of_size(self, sizes: Sequence[float]) -> list[int]:
        """Place of the scale whose templates show objects nearest to each size."""
        shown = [self.object_size / scale for scale in self.config.scales]
        return [
            min(range(len(shown)), key=lambda v: abs(math.log(shown[v] / size))) for size in sizes
        ]

    def seen(self, frames_BCHW: Tensor) -> Tensor:
        """(B, h, w): 1 where a frame is, 0 in the even grey around it."""
        apart = (frames_BCHW - self.grey_C[:, None, None]).abs().amax(1, keepdim=True)
        return (F.max_pool2d(apart, self.stride)[:, 0] > _EVEN).to(frames_BCHW.dtype)

    def judged(
        self,
        similar: Tensor,
        seen_BHW: Tensor,
        sizes: Sequence[float] | None = None,
        score: nn.Linear | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits and features, see ``Found``."""
        weight = seen_BHW[:, None, None]
        count = weight.sum((3, 4), keepdim=True).clamp(min=1)
        mean = (similar * weight).sum((3, 4), keepdim=True) / count
        spread = (((similar - mean).square() * weight).sum((3, 4), keepdim=True) / count).sqrt()
        above = (similar - mean) / (spread + self.config.softening)
        sides = similar.new_tensor(sizes or self.sizes)
        size = (sides / self.config.unit).log()[:, None, None]
        same = torch.zeros_like(similar)
        features = torch.stack([above, similar, mean + same, spread + same, size + same], -1)
        return (score or self.score)(features)[..., 0], features


class EncodeTemplate(nn.Module):
    """The graph ``encode``: pictures (R, 3, S, S) and boxes (R, 4) in them -> rows (R, P)."""

    def __init__(self, matcher: Matcher) -> None:
        super().__init__()
        self.matcher = matcher

    def forward(self, pictures_RCHW: Tensor, boxes_R4: Tensor) -> Tensor:
        return self.matcher.encode(pictures_RCHW, boxes_R4)


class DetectMatch(nn.Module):
    """The graph ``detect``: frames (B, 3, H, W), prototypes (N, P) -> the best candidates of each.

    A candidate is a peak among the places around it, for an object and a size; where between the
    places and sizes it lies is read off a parabola.

    Args:
        sizes: of the longer side of boxes, each as many times as large as the one before; None:
            those of the matcher.
        score: see ``Matcher.forward``.
    """

    def __init__(
        self,
        matcher: Matcher,
        num_candidates: int,
        *,
        sizes: Sequence[float] | None = None,
        score: nn.Linear | None = None,
    ) -> None:
        super().__init__()
        self.matcher = matcher
        self.num_candidates = num_candidates
        self.sizes = tuple(sizes or matcher.sizes)
        self.score = score or matcher.score
        self.relation = matcher.relation if score is None else None
        self.kind = matcher.kind if score is None else None
        self.calibrated = score is None

    def forward(self, frames_BCHW: Tensor, prototypes_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, N M, 4) xyxy in pixels, scores (B, N M) in [0, 1], classes (B, N M) int64."""
        return self.answer(self.see(frames_BCHW), prototypes_NP)

    def see(self, frames_BCHW: Tensor) -> tuple[Maps, Tensor]:
        """What is seen of frames, whatever is looked for: maps, and where they show a frame."""
        return self.matcher.maps(frames_BCHW), self.matcher.seen(frames_BCHW)

    def answer(
        self, seen: tuple[Maps, Tensor], prototypes_NP: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As ``forward``, of what was seen."""
        found = self.matcher.found(*seen, prototypes_NP, self.sizes, self.score)
        return self._chosen(found, self.boxes(found.logits, prototypes_NP), prototypes_NP)

    def _chosen(
        self, found: Found, boxes_B4A: Tensor, prototypes_NP: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What ``forward`` gives, of what is found everywhere and its boxes."""
        places_BM, is_peak_BM = self.peaks(found)
        boxes_BM4 = boxes_B4A.gather(2, places_BM[:, None].expand(-1, 4, -1)).transpose(1, 2)
        logits_BM = found.logits.flatten(1).gather(1, places_BM)
        objects = torch.arange(found.logits.shape[1], device=places_BM.device)[:, None, None, None]
        classes_BA = (objects + torch.zeros_like(found.logits, dtype=torch.int64)).flatten(1)
        classes_BM = classes_BA.gather(1, places_BM)  # as boxes: exports know a choice by it
        if self.relation is None and self.kind is not None:
            cosines_BM = self.matcher.kind_cosines(found.maps, boxes_BM4, classes_BM, prototypes_NP)
            logits_BM = logits_BM + self.kind(cosines_BM[..., None])[..., 0]
        if self.relation is not None:
            windows, facts = self.candidates(found, places_BM, boxes_BM4, prototypes_NP)
            learned_R, moves_R4 = self.relation(windows, facts)
            logits_BM = self._beside(logits_BM.flatten(), facts, learned_R).reshape(logits_BM.shape)
            found_R4 = moved(boxes_BM4.reshape(-1, 4), moves_R4)
            # of what is no peak two libraries take different ones
            boxes_BM4 = found_R4.reshape(boxes_BM4.shape) * is_peak_BM[..., None]
        if self.calibrated:
            logits_BM = self.matcher.scale * logits_BM + self.matcher.shift
        scores_BM = 1 / (1 + (-logits_BM).exp())
        return boxes_BM4, scores_BM * is_peak_BM, classes_BM

    def _beside(self, logits_R: Tensor, facts_RF: Tensor, learned_R: Tensor) -> Tensor:
        """(R,): what is learned, beside what matching and the kind say; see ``RelationConfig``."""
        assert self.relation is not None
        share = self.relation.config.share
        if share is None:
            return learned_R
        if self.kind is not None:  # its cosine is the last fact
            logits_R = logits_R + self.kind(facts_RF[:, -1:])[:, 0]
        return logits_R + share * learned_R

    def before_choice(self, frames_BCHW: Tensor, prototypes_NP: Tensor) -> tuple[Tensor, Tensor]:
        """What candidates are chosen from: boxes (B, 4, A) and logits (B, A). What is judged once
        more behind the choice stays as it is: scores (B, N M), and boxes (B, N M, 4) that move.
        """
        found = self.matcher(frames_BCHW, prototypes_NP, self.sizes, self.score)
        boxes_B4A = self.boxes(found.logits, prototypes_NP)
        if self.relation is not None:
            return self._chosen(found, boxes_B4A, prototypes_NP)[:2]
        if self.kind is not None:
            return boxes_B4A, self._chosen(found, boxes_B4A, prototypes_NP)[1]
        return boxes_B4A, found.logits.flatten(1)

    def peaks(self, found: Found, num: int | None = None) -> tuple[Tensor, Tensor]:
        """The best places (B, N M) of each object, among all of ``found.logits``, and 1 where there
        is a peak.
        """
        logits = found.logits
        flat = logits.flatten(0, 2)[:, None]  # one channel: pooling takes four axes
        is_peak = (flat >= F.max_pool2d(flat, 3, 1, 1)).reshape(logits.shape)
        nowhere = torch.full_like(logits, _NOWHERE)
        seen = found.seen[:, None, None] > 0
        peaks_BNA = torch.where(is_peak & seen, logits, nowhere).flatten(2)
        num_places = peaks_BNA.shape[2]
        best = peaks_BNA.topk(min(num or self.num_candidates, num_places), dim=2)
        first_N = num_places * torch.arange(logits.shape[1], device=logits.device)
        places_BM = (best.indices + first_N[:, None]).flatten(1)
        return places_BM, (best.values > _NOWHERE / 2).to(logits.dtype).flatten(1)

    def candidates(
        self, found: Found, places_BM: Tensor, boxes_BM4: Tensor, prototypes_NP: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What ``relation`` judges: windows (B M, K, c, c) and facts (B M, 8 or, with kinds, 9).

        Args:
            places_BM, boxes_BM4: candidates, as places among all of ``found.logits``.
        """
        assert self.relation is not None
        matcher, logits = self.matcher, found.logits
        batch, objects, sizes, height, width = logits.shape
        scales, area = len(matcher.config.scales), height * width
        cosines = found.cosines.reshape(-1, matcher.config.cells**2, height, width)
        parts = self.relation.parts(cosines, found.maps.fine, found.seen)
        whose = torch.arange(batch, device=logits.device)[:, None] * objects
        whose_BM = whose + places_BM // (sizes * area)  # among the objects of all frames
        size_BM = places_BM // area % sizes
        scale_S = torch.tensor(matcher.scale_of_size(self.sizes), device=logits.device)
        row_R = (whose_BM * scales + scale_S[size_BM]).flatten()
        plane_R = (whose_BM * sizes + size_BM).flatten()
        alike = found.similar.reshape(-1, 1, height, width)
        planes = torch.cat([parts[row_R], alike[plane_R]], 1)
        windows = self.relation.sample(planes, boxes_BM4.reshape(-1, 4), matcher.stride)
        logits_BM = logits.flatten(1).gather(1, places_BM)
        best_R = logits.flatten(2).amax(2).flatten()[whose_BM.flatten()]
        facts_R5 = found.features.reshape(-1, len(FEATURES))[
            (
                places_BM + torch.arange(batch, device=logits.device)[:, None] * logits[0].numel()
            ).flatten()
        ]
        ratio_R = prototypes_NP[:, -1].repeat(batch)[whose_BM.flatten()]
        logit_R = logits_BM.flatten()
        facts = [facts_R5, logit_R[:, None], (logit_R - best_R)[:, None], ratio_R[:, None]]
        if self.kind is not None:
            kind_BM = matcher.kind_cosines(
                found.maps, boxes_BM4, places_BM // (sizes * area), prototypes_NP
            )
            facts.append(kind_BM.flatten()[:, None])
        return windows, torch.cat(facts, 1)

    def boxes(self, logits: Tensor, prototypes_NP: Tensor) -> Tensor:
        """(B, 4, A): xyxy of the box of each object, size and place."""
        matcher = self.matcher
        size, down, across = (_move(logits, axis) for axis in (2, 3, 4))
        y = torch.arange(logits.shape[3], dtype=logits.dtype)[:, None]
        x = torch.arange(logits.shape[4], dtype=logits.dtype)
        x, y = (matcher.stride * (each + 0.5) for each in (x + across, y + down))
        sizes = logits.new_tensor(self.sizes).log()[:, None, None]
        step = math.log(self.sizes[-1] / self.sizes[0]) / max(1, len(self.sizes) - 1)
        half = 0.5 * (sizes + size * step).exp()
        ratio = prototypes_NP[:, -1].clamp(-3, 3)[:, None, None, None]
        wide, high = half * ratio.clamp(max=0).exp(), half * (-ratio).clamp(max=0).exp()
        return torch.stack([x - wide, y - high, x + wide, y + high], 1).flatten(2)


_FOLLOWED = 16  # candidates around the last place of an object


def follower(matcher: Matcher, config: FollowConfig) -> DetectMatch:
    """The graph ``follow``: as ``detect``, of smaller pictures and few sizes."""
    score = scored(config.score, config.bias)
    return DetectMatch(matcher, _FOLLOWED, sizes=config.sizes, score=score)


def _move(logits_BNSHW: Tensor, axis: int) -> Tensor:
    """How far between places a peak lies along an axis; at its ends it stays."""
    first, last = logits_BNSHW.narrow(axis, 0, 1), logits_BNSHW.narrow(axis, -1, 1)
    if logits_BNSHW.shape[axis] < 3:
        return torch.zeros_like(logits_BNSHW)
    num = logits_BNSHW.shape[axis] - 2
    inner = quadratic_peak(*(logits_BNSHW.narrow(axis, start, num) for start in range(3)))
    return torch.cat([torch.zeros_like(first), inner, torch.zeros_like(last)], axis)
