"""Which patches show the part, and which the ground that it lies on.

Patches of part and ground differ more than patches of the part among themselves: the first
principal direction of normal patches tells them apart, and Otsu's border cuts along it. The ground
is what the outermost ring of patches mostly shows. This is for parts that leave the ring free;
where a texture fills the picture there is nothing to tell apart.

Source: Damm et al., "AnomalyDINO: Boosting Patch-based Few-shot Anomaly Detection with DINOv2",
2025 (the principal direction and the closing); Otsu, "A Threshold Selection Method from Gray-Level
Histograms", 1979.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from engineworks.runtime.tensors import Array

_SAMPLE = 20_000  # patches that the direction is learned from
_KERNEL = np.ones((3, 3), np.uint8)


@dataclass(frozen=True)
class Foreground:
    """A direction that tells part from ground, and the border along it.

    Attributes:
        direction_D: (D,) float32.
    """

    direction_D: Array
    border: float

    @classmethod
    def learn(
        cls, features_IND: Array, grid: tuple[int, int], rng: np.random.Generator
    ) -> Foreground:
        """From normal images.

        Args:
            features_IND: (I, N, D), N = h w; may be memory-mapped.
            grid: (h, w).
            rng: chooses the images that are looked at.
        """
        num_images, num_patches, width = features_IND.shape
        num = min(num_images, max(2, _SAMPLE // num_patches))
        chosen = np.sort(rng.permutation(num_images)[:num])
        rows_SND = np.asarray(features_IND[chosen], np.float64)
        centred = (rows_SND - rows_SND.mean(axis=(0, 1))).reshape(-1, width)
        direction_D = np.linalg.eigh(centred.T @ centred)[1][:, -1]
        along_SN = rows_SND @ direction_D
        border = _otsu(along_SN)
        is_ring_N = _ring(grid)
        is_above_SN = along_SN > border
        if is_above_SN[:, is_ring_N].mean() > is_above_SN.mean():
            direction_D, border = -direction_D, -border
        return cls(direction_D.astype(np.float32), border)

    def shows(self, features_ND: Array, grid: tuple[int, int]) -> Array:
        """Whether each patch shows the part: (N,) bool; holes are closed, its rim belongs to it."""
        is_part = (features_ND @ self.direction_D > self.border).reshape(grid).astype(np.uint8)
        around = np.pad(is_part, 2)  # or what the closing grows to the border would stay there
        closed = cv2.morphologyEx(cv2.dilate(around, _KERNEL), cv2.MORPH_CLOSE, _KERNEL)
        return np.asarray(closed[2:-2, 2:-2].ravel() > 0)

    def judge(self, scores_N: Array, features_ND: Array, grid: tuple[int, int]) -> Array:
        """Standardised scores, the ground's no more than an average normal patch's: (N,)."""
        is_part_N = self.shows(features_ND, grid)
        return np.where(is_part_N, scores_N, np.minimum(scores_N, 0)).astype(np.float32)


def _ring(grid: tuple[int, int]) -> Array:
    """Which patches are outermost: (N,) bool."""
    is_ring = np.ones(grid, bool)
    is_ring[1:-1, 1:-1] = False
    return is_ring.ravel()


def _otsu(values: Array) -> float:
    low, high = float(values.min()), float(values.max())
    if low == high:
        return low
    levels = np.rint((values - low) / (high - low) * 255).astype(np.uint8)
    level, _ = cv2.threshold(levels.reshape(1, -1), 0, 255, cv2.THRESH_OTSU)
    return low + (level + 0.5) / 255 * (high - low)
