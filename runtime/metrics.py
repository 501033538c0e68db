"""One ruler for validation and for the INT8 gate.

Everywhere a score at or above a threshold means "positive", and equal scores are never told apart:
curves have one point per distinct score.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from runtime.errors import BackendError, InputError
from runtime.tensors import Array

AUPRO_LIMIT = 0.3


def _sklearn() -> Any:
    if importlib.util.find_spec("sklearn") is None:
        raise BackendError(
            "metrics need scikit-learn, which is not installed",
            fix='pip install "engineworks[cpu]"  (or [gpu])',
        )
    import sklearn.metrics

    return sklearn.metrics


def _last_of_equals(descending: Array) -> Array:
    """Indices at which a run of equal scores ends: the points of a curve."""
    return np.flatnonzero(np.append(descending[1:] != descending[:-1], True))


def f1max(scores_N: Array, labels_N: Array) -> tuple[float, float]:
    """The largest F1 over all thresholds, and a threshold that reaches it.

    Args:
        scores_N: (N,) float, N >= 1.
        labels_N: (N,) 0 or 1; without any 1 the F1 is 0.

    Returns:
        (F1, threshold); the highest threshold where several reach it.
    """
    order = np.argsort(-scores_N)
    scores, labels = scores_N[order], labels_N[order]
    last = _last_of_equals(scores)
    hits = np.cumsum(labels, dtype=np.int64)[last]
    f1 = 2 * hits / (last + 1 + np.count_nonzero(labels))
    best = int(np.argmax(f1))
    return float(f1[best]), float(scores[last[best]])


def aupro(maps: Sequence[Array], masks: Sequence[Array], limit: float = AUPRO_LIMIT) -> float:
    """Area under the per-region overlap, over the false positive rate up to ``limit``, in [0, 1].

    At each threshold the per-region overlap is the mean over all defect regions (8-connected) of
    the share of the region that is found; the false positive rate is that of all normal pixels.
    The integral runs over every distinct score, linear between them and cut off at ``limit``, and
    is divided by ``limit``.

    Args:
        maps: (H, W) float scores per image.
        masks: (H, W) bool ground truth per image.

    Raises:
        InputError: no defect region, or no normal pixel.

    Source: Bergmann et al., "The MVTec Anomaly Detection Dataset", 2021, section 4.2.
    """
    shares, num_regions = [], 0
    for mask in masks:
        count, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        sizes = np.bincount(regions.ravel(), minlength=count)
        share = 1.0 / np.maximum(sizes, 1)
        share[0] = 0.0  # the background is no region
        shares.append(share[regions].ravel())
        num_regions += count - 1
    scores = np.concatenate([scores.ravel() for scores in maps])
    normal = ~np.concatenate([mask.ravel() for mask in masks])
    if not num_regions or not normal.any():
        raise InputError("AUPRO needs a defect region and normal pixels")
    order = np.argsort(-scores)
    last = _last_of_equals(scores[order])
    overlap = np.cumsum(np.concatenate(shares)[order])[last] / num_regions
    rate = np.cumsum(normal[order], dtype=np.int64)[last] / np.count_nonzero(normal)
    rate, overlap = np.append(0.0, rate), np.append(0.0, overlap)
    inside = rate <= limit
    at_limit = np.interp(limit, rate, overlap)
    rate, overlap = np.append(rate[inside], limit), np.append(overlap[inside], at_limit)
    return float(np.trapezoid(overlap, rate) / limit)


def false_reject_threshold(normal_scores_N: Array, budget: float) -> float:
    """The smallest threshold that at most a share ``budget`` of normal scores reaches.

    It is the next number, of the scores' own dtype, above one of them. Where scores are equal, or
    too few for the budget to be met exactly, it errs on the side of fewer rejects: with N scores
    at most floor(budget N) lie at or above it, so with N < 1 / budget none does.

    Args:
        normal_scores_N: (N,) float scores of normal images.
        budget: share in [0, 1).

    Raises:
        InputError: no scores, one that is not finite, or a budget outside of [0, 1).
    """
    if normal_scores_N.size == 0 or not np.isfinite(normal_scores_N).all():
        raise InputError("a threshold needs normal scores, all of them finite")
    if not 0 <= budget < 1:
        raise InputError(f"a false-reject budget is a share in [0, 1), got {budget}")
    descending = np.sort(normal_scores_N)[::-1]
    # a share such as 0.29 of 100 must not lose one to binary fractions
    allowed = min(int(budget * descending.size + 1e-9), descending.size - 1)
    return float(np.nextafter(descending[allowed], descending.dtype.type(np.inf)))


class AnomalyMetrics:
    """Collects scores image by image; then image and pixel metrics in one go.

    Keys of ``compute``, all in [0, 1] but the thresholds:

    * image_auroc: chance that a defective image scores above a normal one, a tie counting half.
    * image_ap: average precision, the mean of the precision over the defective images found.
    * image_f1max, image_f1max_threshold: see ``f1max``.
    * pixel_auroc, pixel_ap, pixel_f1max, pixel_f1max_threshold: the same over the pixels of all
      images together.
    * aupro: see ``aupro``.

    Keys that need both classes are left out where only one was seen, and all pixel keys and aupro
    where a defective image came without a mask. Memory: one float32 and one bool per pixel, and a
    few times that while computing.
    """

    def __init__(self) -> None:
        self._scores: list[float] = []
        self._labels: list[int] = []
        self._maps: list[Array] = []
        self._masks: list[Array | None] = []

    def update(self, score: float, label: int, map_HW: Array, mask_HW: Array | None) -> None:
        """Add one image.

        Args:
            score: image score.
            label: 0 normal, 1 defective.
            map_HW: (H, W) float scores of the pixels.
            mask_HW: (H, W) bool ground truth. None on a normal image: no pixel is defective; on a
                defective one: not known.

        Raises:
            InputError: a score that is not finite, or a mask of another size than its map.
        """
        if not np.isfinite(score) or not np.isfinite(map_HW).all():
            raise InputError(
                "an image has scores that are not finite",
                fix="look for NaN in the graph's outputs: compare float and INT8",
            )
        if mask_HW is None and not label:
            mask_HW = np.zeros(map_HW.shape, bool)
        if mask_HW is not None and mask_HW.shape != map_HW.shape:
            raise InputError(
                f"a mask of {mask_HW.shape} does not fit a map of {map_HW.shape}",
                fix="bring the mask to the map's size with runtime.preprocess.place",
            )
        self._scores.append(score)
        self._labels.append(label)
        self._maps.append(map_HW.astype(np.float32))
        self._masks.append(None if mask_HW is None else mask_HW.astype(bool))

    def compute(self) -> dict[str, float]:
        """All metrics that the images allow.

        Raises:
            BackendError: scikit-learn is not installed.
        """
        found = _ranking("image", np.array(self._scores), np.array(self._labels, bool))
        masks = [mask for mask in self._masks if mask is not None]
        if masks and len(masks) == len(self._masks):
            pixels = np.concatenate([scores.ravel() for scores in self._maps])
            truth = np.concatenate([mask.ravel() for mask in masks])
            if ranking := _ranking("pixel", pixels, truth):
                found |= ranking | {"aupro": aupro(self._maps, masks)}
        return found


def _ranking(prefix: str, scores_N: Array, labels_N: Array) -> dict[str, float]:
    if not labels_N.any() or labels_N.all():
        return {}
    metrics = _sklearn()
    # scikit-learn sorts twice, and several times faster what is sorted already
    order = np.argsort(-scores_N)
    scores, labels = scores_N[order], labels_N[order]
    best, threshold = f1max(scores, labels)
    return {
        f"{prefix}_auroc": float(metrics.roc_auc_score(labels, scores)),
        f"{prefix}_ap": float(metrics.average_precision_score(labels, scores)),
        f"{prefix}_f1max": best,
        f"{prefix}_f1max_threshold": threshold,
    }
