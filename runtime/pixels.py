"""Scores of the pixels of many images: more than fit into memory."""

from __future__ import annotations

from collections.abc import Iterator

import cv2
import numpy as np

from engineworks.runtime.spool import Spool
from engineworks.runtime.tensors import Array

_AT_ONCE = 8 << 20  # scores that are sorted together


class Pixels:
    """Maps with their masks, in the order in which they came; each reading goes through all.

    They are kept in a ``Spool``, 4.1 bytes per pixel.

    Attributes:
        num_positives, num_negatives: defective and normal pixels.
        num_regions: connected defective regions (8 neighbours).
    """

    def __init__(self) -> None:
        self.num_positives = self.num_negatives = self.num_regions = 0
        self._kept = Spool()  # a map and its packed mask in turn

    def __len__(self) -> int:
        return len(self._kept) // 2

    def add(self, map_HW: Array, mask_HW: Array) -> None:
        """Keep one image's scores, as float32, and where it is defective."""
        self._kept.append(map_HW.astype(np.float32))
        self._kept.append(np.packbits(mask_HW))
        marked = int(mask_HW.sum())
        self.num_positives += marked
        self.num_negatives += mask_HW.size - marked
        if marked:
            self.num_regions += _regions(mask_HW)[0]

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """(H, W) float32 scores and (H, W) bool mask of each image."""
        for place in range(0, len(self._kept), 2):
            map_HW = self._kept[place]
            mask = np.unpackbits(self._kept[place + 1], count=map_HW.size).astype(bool)
            yield map_HW, mask.reshape(map_HW.shape)

    def positives(self, low: float, high: float) -> tuple[Array, Array]:
        """Scores of defective pixels in [low, high), and the share of its region that each is."""
        scores, shares = [], []
        for map_HW, mask_HW in self:
            if mask_HW.any():
                _, regions_HW = _regions(mask_HW)
                region_of_pixel, found = regions_HW[mask_HW], map_HW[mask_HW]
                inside = (found >= low) & (found < high)
                scores.append(found[inside])
                shares.append((1.0 / np.bincount(region_of_pixel)[region_of_pixel])[inside])
        nothing = [np.empty(0, np.float32)]
        return np.concatenate(scores or nothing), np.concatenate(shares or nothing)

    def normal_above(self, thresholds_T: Array) -> tuple[Array, Array]:
        """How many normal pixels score above each threshold, and how many at or above it."""
        above_T, reached_T = (np.zeros(len(thresholds_T), np.int64) for _ in range(2))
        for scores in self._normal():
            above, reached = count_above(scores, thresholds_T)
            above_T += above
            reached_T += reached
        return above_T, reached_T

    def sample(self, count: int) -> tuple[Array, Array]:
        """About ``count`` scores of defective and as many of normal pixels, sorted.

        They are spread evenly over all images, for quantiles.
        """
        chosen: tuple[list[Array], list[Array]] = ([], [])
        steps = [max(1, n // count) for n in (self.num_positives, self.num_negatives)]
        seen = [0, 0]
        for map_HW, mask_HW in self:
            for i, scores in enumerate((map_HW[mask_HW], map_HW[~mask_HW])):
                first = (steps[i] // 2 - seen[i]) % steps[i]
                chosen[i].append(np.sort(scores)[first :: steps[i]].copy())  # not the whole array
                seen[i] += len(scores)
        nothing = [np.empty(0, np.float32)]
        found = [np.sort(np.concatenate(each or nothing)) for each in chosen]
        return found[0], found[1]

    def _normal(self) -> Iterator[Array]:
        """Scores of normal pixels, many at once."""
        waiting: list[Array] = []
        for map_HW, mask_HW in self:
            waiting.append(map_HW[~mask_HW])
            if sum(len(each) for each in waiting) >= _AT_ONCE:
                yield np.concatenate(waiting)
                waiting = []
        if waiting:
            yield np.concatenate(waiting)


def count_above(scores_N: Array, thresholds_T: Array) -> tuple[Array, Array]:
    """How many scores lie above each threshold, and how many at or above it."""
    ascending = np.sort(scores_N)
    above_T = len(ascending) - np.searchsorted(ascending, thresholds_T, "right")
    reached_T = len(ascending) - np.searchsorted(ascending, thresholds_T, "left")
    return above_T, reached_T


def _regions(mask_HW: Array) -> tuple[int, Array]:
    """How many regions a mask has, and (H, W) which one a pixel belongs to, 0 for none."""
    count, regions_HW = cv2.connectedComponents(mask_HW.astype(np.uint8), connectivity=8)
    return count - 1, regions_HW
