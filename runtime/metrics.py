"""One ruler for validation and for the INT8 gate."""

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


def f1max(scores_N: Array, labels_N: Array) -> tuple[float, float]:
    """The largest F1 over all thresholds, and a threshold that reaches it.

    Args:
        scores_N: (N,) float; at or above the threshold means positive.
        labels_N: (N,) 0 or 1, at least one 1.

    Returns:
        (F1, threshold); the highest threshold where several reach it.
    """
    order = np.argsort(-scores_N, kind="stable")
    scores, labels = scores_N[order], labels_N[order].astype(np.float64)
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    hits = np.cumsum(labels)[last]
    f1 = 2 * hits / (last + 1 + labels.sum())
    best = int(np.argmax(f1))
    return float(f1[best]), float(scores[last[best]])


def aupro(maps: Sequence[Array], masks: Sequence[Array], limit: float = AUPRO_LIMIT) -> float:
    """Area under the per-region overlap, over the false positive rate up to ``limit``, in [0, 1].

    At each threshold the per-region overlap is the mean over all defect regions (8-connected) of
    the share of the region that is found; the area is divided by ``limit``. The integral runs over
    every distinct score, linear between them, cut off at ``limit`` by interpolation.

    Args:
        maps: (H, W) float scores per image.
        masks: (H, W) bool ground truth per image; at least one region and one normal pixel.

    Source: Bergmann et al., "The MVTec Anomaly Detection Dataset", 2021, section 4.2.
    """
    scores_parts, weight_parts, normal_parts = [], [], []
    num_regions = 0
    for scores, mask in zip(maps, masks, strict=True):
        count, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        sizes = np.bincount(regions.ravel(), minlength=count)
        weights = np.where(mask, 1.0 / np.maximum(sizes, 1)[regions], 0.0)
        num_regions += count - 1
        scores_parts.append(scores.ravel())
        weight_parts.append(weights.ravel())
        normal_parts.append(~mask.ravel())
    scores = np.concatenate(scores_parts)
    order = np.argsort(-scores, kind="stable")
    scores = scores[order]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    normal = np.concatenate(normal_parts)[order]
    overlap = np.cumsum(np.concatenate(weight_parts)[order])[last] / num_regions
    rate = np.cumsum(normal)[last] / normal.sum()
    rate, overlap = np.append(0.0, rate), np.append(0.0, overlap)
    inside = rate <= limit
    at_limit = np.interp(limit, rate, overlap)
    rate, overlap = np.append(rate[inside], limit), np.append(overlap[inside], at_limit)
    return float(np.trapezoid(overlap, rate) / limit)


def false_reject_threshold(normal_scores_N: Array, budget: float) -> float:
    """The smallest threshold that at most a share ``budget`` of normal scores reaches.

    With few scores it errs on the side of fewer rejects: floor(budget N) of them lie at or above
    it; with none allowed it is the next number above the largest.

    Raises:
        InputError: no scores.
    """
    if normal_scores_N.size == 0:
        raise InputError("a threshold needs normal scores")
    ordered = np.sort(normal_scores_N.astype(np.float64))[::-1]
    allowed = int(np.floor(budget * ordered.size + 1e-9))
    # the highest score that must stay below; equal ones must as well
    return float(np.nextafter(ordered[min(allowed, ordered.size - 1)], np.inf))


class AnomalyMetrics:
    """Collects scores image by image; then image and pixel metrics in one go.

    Keys of ``compute``: image_auroc, image_ap, image_f1max, image_f1max_threshold; and, where every
    defective image came with a mask, pixel_auroc, pixel_ap, pixel_f1max, pixel_f1max_threshold and
    aupro. Where only one class was seen, the keys that need both are left out.
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
            mask_HW: (H, W) bool ground truth; None where it is not known.
        """
        self._scores.append(score)
        self._labels.append(label)
        self._maps.append(map_HW.astype(np.float32))
        self._masks.append(mask_HW)

    def compute(self) -> dict[str, float]:
        """All metrics that the images allow.

        Raises:
            BackendError: scikit-learn is not installed.
        """
        found = _ranking("image", np.array(self._scores), np.array(self._labels))
        masks = [mask for mask in self._masks if mask is not None]
        if len(masks) == len(self._masks) and masks:
            pixels = np.concatenate([m.ravel() for m in self._maps])
            truth = np.concatenate([m.ravel() for m in masks])
            found |= _ranking("pixel", pixels, truth)
            if truth.any() and not truth.all():
                found["aupro"] = aupro(self._maps, masks)
        return found


def _ranking(prefix: str, scores_N: Array, labels_N: Array) -> dict[str, float]:
    if not labels_N.any() or labels_N.all():
        return {}
    metrics = _sklearn()
    best, threshold = f1max(scores_N, labels_N)
    return {
        f"{prefix}_auroc": float(metrics.roc_auc_score(labels_N, scores_N)),
        f"{prefix}_ap": float(metrics.average_precision_score(labels_N, scores_N)),
        f"{prefix}_f1max": best,
        f"{prefix}_f1max_threshold": threshold,
    }
