"""Metrics of candidates: how many defects are found, and at what price."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from engineworks.runtime.evaluation import Decisions, Evaluation, Rate, warned
from engineworks.runtime.evidence import CandidateRanking
from engineworks.runtime.results import Candidate
from engineworks.runtime.tensors import Array

RANKS = (30, 50, 150, 500)


class CandidateMetrics:
    """Collects the candidates of images; then how many defects are found, and at what price.

    A candidate finds the region of ground truth (8-connected) that is nearest to it, if a pixel of
    it lies within ``radius``. Of several that find the same region the best counts and the others
    are left out; a candidate that finds none is false.

    Keys of ``compute``:

    * recall_at_1_false: share of the regions found while there is at most one false candidate per
      image on average.
    * recall_at_30, recall_at_50, recall_at_150, recall_at_500: share found among so many best
      candidates of all images together.
    * recall, false_per_image: at ``threshold``, where one is given.

    Of equal scores false candidates come first. There are no keys where an image of a defect came
    without a mask, or no region at all.

    Args:
        radius: in pixels.
        threshold: decision border for the score of a candidate.
    """

    def __init__(self, radius: float, threshold: float | None = None) -> None:
        self._radius = radius
        self._threshold = threshold
        self._hits: list[tuple[float, int]] = []  # score, image
        self._false: list[tuple[float, int]] = []
        self._regions: list[int] = []  # of each image
        self._complete = True

    def update(self, candidates: Sequence[Candidate], label: int, mask_HW: Array | None) -> None:
        """Add one image.

        Args:
            candidates: best first.
            label: 0 normal, 1 defective.
            mask_HW: (H, W) bool ground truth; None on a normal image: there is no defect.
        """
        image = len(self._regions)
        self._complete &= mask_HW is not None or not label
        if mask_HW is None or not mask_HW.any():
            self._regions.append(0)
            self._false += [(candidate.score, image) for candidate in candidates]
            return
        count, regions_HW = cv2.connectedComponents(mask_HW.astype(np.uint8), connectivity=8)
        self._regions.append(count - 1)
        found: set[int] = set()
        for candidate in candidates:
            region = self._nearest(regions_HW, candidate)
            if region == 0:
                self._false.append((candidate.score, image))
            elif region not in found:
                found.add(region)
                self._hits.append((candidate.score, image))

    def compute(self) -> dict[str, float]:
        """All metrics that the images allow."""
        num_images, num_regions = len(self._regions), sum(self._regions)
        if not self._complete or not num_regions:
            return {}
        hits, false = (
            np.sort([score for score, _ in scored])[::-1] for scored in (self._hits, self._false)
        )
        # the score of the first false candidate that is one too many
        limit = false[num_images] if len(false) > num_images else -np.inf
        found = {"recall_at_1_false": int((hits > limit).sum()) / num_regions}
        above = np.searchsorted(-false, -hits, side="right")  # false ones before each hit
        rank = above + np.arange(1, len(hits) + 1)
        for count in RANKS:
            found[f"recall_at_{count}"] = int((rank <= count).sum()) / num_regions
        if self._threshold is not None:
            found["recall"] = int((hits >= self._threshold).sum()) / num_regions
            num_false = int((false >= self._threshold).sum())
            found["false_per_image"] = num_false / num_images
        return found

    def added_to(self, images: Evaluation, kinds: Sequence[str]) -> Evaluation:
        """What was found of whole images, and beside it what was found of defects.

        Args:
            images: see ``AnomalyMetrics.evaluation``; of the same images.
            kinds: of defect, of each image.
        """
        if not self._complete:
            return images
        evidence = CandidateRanking(np.array(self._regions), self._hits, self._false)
        return replace(
            images,
            metrics=images.metrics | self.compute(),
            decisions=tuple(self._decided(each, kinds) for each in images.decisions),
            evidence=(*images.evidence, *([evidence] if any(self._regions) else [])),
        )

    def _decided(self, images: Decisions, kinds: Sequence[str]) -> Decisions:
        """Decisions on whole images with those on candidates at the same border."""
        found_I = np.zeros(len(self._regions), np.int64)
        for score, image in self._hits:
            found_I[image] += score >= images.value
        num_false = sum(score >= images.value for score, _ in self._false)
        names, regions_I = np.array(kinds, dtype=object), np.array(self._regions)

        def missed(of_I: Array) -> Rate:
            total = int(regions_I[of_I].sum())
            return Rate.counted(total - int(found_I[of_I].sum()), total)

        rates = {
            "missed defects": missed(np.ones(len(names), bool)),
            "false candidates": Rate.counted(num_false, num_false + int(found_I.sum())),
        }
        sentences = {"missed defects": "misses {} of {} single defects at its border"}
        if regions_I.any():  # where there is nothing to find, all that is found is false
            sentences["false candidates"] = "{} of {} candidates at its border are false"
        return images.model_copy(
            update={
                "rates": images.rates | rates,
                "kinds": {
                    kind: known | {"missed defects": missed(names == kind)}
                    for kind, known in images.kinds.items()
                },
                "warnings": images.warnings + warned(rates, sentences),
            }
        )

    def _nearest(self, regions_HW: Array, candidate: Candidate) -> int:
        """Number of the region that a candidate finds, 0 for none."""
        reach = int(self._radius)
        top, left = max(0, candidate.y - reach), max(0, candidate.x - reach)
        window = regions_HW[top : candidate.y + reach + 1, left : candidate.x + reach + 1]
        ys, xs = np.nonzero(window)
        if not len(ys):
            return 0
        distances = np.hypot(ys + top - candidate.y, xs + left - candidate.x)
        nearest = int(distances.argmin())
        return int(window[ys[nearest], xs[nearest]]) if distances[nearest] <= self._radius else 0
