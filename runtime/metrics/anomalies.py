"""Metrics of anomaly maps: how images rank, how pixels rank, and where a border may lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engineworks.runtime.curves import of_pixels, of_scores
from engineworks.runtime.errors import InputError
from engineworks.runtime.evaluation import Evaluation, decide
from engineworks.runtime.evidence import Evidence, PixelRanking, Ranking
from engineworks.runtime.pixels import Pixels
from engineworks.runtime.tensors import Array

AUPRO_LIMIT = 0.3


def f1max(scores_N: Array, labels_N: Array) -> tuple[float, float]:
    """The largest F1 over all thresholds, and a threshold that reaches it.

    Args:
        scores_N: (N,) float, N >= 1.
        labels_N: (N,) 0 or 1; without any 1 the F1 is 0.

    Returns:
        (F1, threshold); the highest threshold where several reach it.
    """
    positive = labels_N.astype(bool)
    if not positive.any():
        return 0.0, float(scores_N.max())
    curve = of_scores(scores_N[positive], scores_N[~positive])
    return curve.f1max, curve.threshold


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
    pixels = Pixels()
    for map_HW, mask_HW in zip(maps, masks, strict=True):
        pixels.add(map_HW, mask_HW)
    if not pixels.num_positives or not pixels.num_negatives:
        raise InputError("AUPRO needs a defect region and normal pixels")
    return of_pixels(pixels, limit=limit).aupro


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
    where a defective image came without a mask. Memory does not grow with the number of images: see
    ``runtime.pixels.Pixels``.
    """

    def __init__(self) -> None:
        self._scores: list[float] = []
        self._labels: list[int] = []
        self._pixels: Pixels | None = Pixels()  # None: a mask is missing

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
        if mask_HW is None:
            self._pixels = None
        elif self._pixels is not None:
            self._pixels.add(map_HW, mask_HW.astype(bool))

    def compute(self) -> dict[str, float]:
        """All metrics that the images allow."""
        scores, labels = np.array(self._scores), np.array(self._labels, bool)
        found: dict[str, float] = {}
        if labels.any() and not labels.all():
            found |= of_scores(scores[labels], scores[~labels]).ranking("image")
        pixels = self._pixels
        if pixels is not None and pixels.num_positives and pixels.num_negatives:
            curve = of_pixels(pixels, limit=AUPRO_LIMIT)
            found |= curve.ranking("pixel") | {"aupro": curve.aupro}
        return found

    def evaluation(self, border: str, value: float | None, kinds: Sequence[str]) -> Evaluation:
        """Metrics, decisions on whole images, and evidence of AUROCs and average precisions.

        Args:
            border: name of the image score's threshold.
            value: the threshold that is shipped, where there is one already.
            kinds: of defect, of each image in the order that they came in.
        """
        metrics = self.compute()
        scores_I, labels_I = np.array(self._scores), np.array(self._labels, np.int64)
        borders = {} if value is None else {"shipped": value}
        evidence: list[Evidence] = []
        if "image_auroc" in metrics:
            borders["largest F1 on these pictures"] = metrics["image_f1max_threshold"]
            evidence.append(Ranking("image", scores_I, labels_I.astype(bool)))
        if self._pixels is not None and "pixel_auroc" in metrics:
            evidence.append(PixelRanking("pixel", self._pixels))
        return Evaluation(
            metrics,
            tuple(
                decide(border, each, source, scores_I, labels_I, kinds)
                for source, each in borders.items()
            ),
            tuple(evidence),
            labels_I,
        )
