"""One ruler for validation and for the INT8 gate.

Everywhere a score at or above a threshold means "positive". What is read off a curve of such
thresholds is in ``runtime.curves``; scikit-learn's metrics would each sort everything once more,
and the tests hold these ones against them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from runtime.boxes import iou
from runtime.curves import of_pixels, of_scores
from runtime.errors import BackendError, InputError
from runtime.pixels import Pixels
from runtime.results import Candidate
from runtime.tensors import Array

AUPRO_LIMIT = 0.3
TOP = 5
ECE_BINS = 15
RANKS = (30, 50, 150, 500)
_ROWS_AT_ONCE = 1024  # of a matrix of similarities


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


class ClassificationMetrics:
    """Collects logits image by image; then the metrics of a classifier in one go.

    Keys of ``compute``, all in [0, 1] but nll:

    * top1, top5: share of images whose class is the most probable one, or among the five most
      probable; of equal logits the first counts as larger. top5 only with more than 5 classes.
    * balanced_accuracy: mean over the classes that occur of the share found of each.
    * ece: expected calibration error: how far the probability of the most probable class is from
      the share of images where it is the right one, in 15 bins of equal width, mean over images.
    * nll: mean of the negative logarithm of the right class's probability, in nats.

    Attributes:
        confusion: (C, C) int64 counts so far: row the class, column the most probable one.

    Source of ece: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion: Array = np.zeros((num_classes, num_classes), np.int64)
        self._num_in_top = 0
        self._nll = 0.0
        self._gaps = np.zeros(ECE_BINS)  # sum of (right - probability) per bin

    def update(self, logits_C: Array, label: int) -> None:
        """Add one image.

        Args:
            logits_C: (C,) float; logarithms of probabilities are logits as well.
            label: index of its class.

        Raises:
            InputError: logits that are not finite or not C, or a label that is none of C.
        """
        num_classes = len(self.confusion)
        if logits_C.shape != (num_classes,) or not 0 <= label < num_classes:
            raise InputError(
                f"logits of shape {logits_C.shape} and label {label} do not fit "
                f"{num_classes} classes"
            )
        if not np.isfinite(logits_C).all():
            raise InputError(
                "an image has logits that are not finite",
                fix="look for NaN in the graph's outputs: compare float and INT8",
            )
        log_C = log_softmax(logits_C)
        order = np.argsort(-log_C, kind="stable")
        best = int(order[0])
        probability = float(np.exp(log_C[best]))
        self.confusion[label, best] += 1
        self._num_in_top += int(label in order[:TOP])
        self._nll -= float(log_C[label])
        # a bin holds its upper end: (0, 1/15], (1/15, 2/15], ...
        self._gaps[int(np.ceil(probability * ECE_BINS)) - 1] += (best == label) - probability

    def compute(self) -> dict[str, float]:
        """All metrics; none before the first image."""
        total = int(self.confusion.sum())
        if not total:
            return {}
        right, occurs = np.diag(self.confusion), self.confusion.sum(axis=1)
        found = {"top1": float(right.sum() / total)}
        if len(self.confusion) > TOP:
            found["top5"] = self._num_in_top / total
        recall = right[occurs > 0] / occurs[occurs > 0]
        return found | {
            "balanced_accuracy": float(recall.mean()),
            "ece": float(np.abs(self._gaps).sum() / total),
            "nll": self._nll / total,
        }


def leave_one_out_top1(vectors_NF: Array, labels_N: Array) -> float:
    """Share of pictures whose most similar other picture is of their class.

    Of equally similar ones the first counts. A picture that is alone in its class is only there to
    be taken for another.

    Args:
        vectors_NF: float, of length 1.
        labels_N: class of each.

    Raises:
        InputError: no class has two pictures.
    """
    _, which_N, sizes = np.unique(labels_N, return_inverse=True, return_counts=True)
    asked = np.flatnonzero(sizes[which_N] > 1)
    if not len(asked):
        raise InputError(
            f"of {len(labels_N)} pictures no two are of one class",
            fix="give at least two pictures of a class",
        )
    num_right = 0
    for start in range(0, len(asked), _ROWS_AT_ONCE):
        rows = asked[start : start + _ROWS_AT_ONCE]
        similarity = vectors_NF[rows] @ vectors_NF.T
        similarity[np.arange(len(rows)), rows] = -np.inf  # nobody is compared with itself
        num_right += int((labels_N[similarity.argmax(axis=1)] == labels_N[rows]).sum())
    return num_right / len(asked)


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
        self._hits: list[float] = []
        self._false: list[float] = []
        self._num_images = 0
        self._num_regions = 0
        self._complete = True

    def update(self, candidates: Sequence[Candidate], label: int, mask_HW: Array | None) -> None:
        """Add one image.

        Args:
            candidates: best first.
            label: 0 normal, 1 defective.
            mask_HW: (H, W) bool ground truth; None on a normal image: there is no defect.
        """
        self._num_images += 1
        self._complete &= mask_HW is not None or not label
        if mask_HW is None or not mask_HW.any():
            self._false += [candidate.score for candidate in candidates]
            return
        count, regions_HW = cv2.connectedComponents(mask_HW.astype(np.uint8), connectivity=8)
        self._num_regions += count - 1
        found: set[int] = set()
        for candidate in candidates:
            region = self._nearest(regions_HW, candidate)
            if region == 0:
                self._false.append(candidate.score)
            elif region not in found:
                found.add(region)
                self._hits.append(candidate.score)

    def compute(self) -> dict[str, float]:
        """All metrics that the images allow."""
        if not self._complete or not self._num_regions:
            return {}
        hits, false = np.sort(self._hits)[::-1], np.sort(self._false)[::-1]
        # the score of the first false candidate that is one too many
        limit = false[self._num_images] if len(false) > self._num_images else -np.inf
        found = {"recall_at_1_false": int((hits > limit).sum()) / self._num_regions}
        above = np.searchsorted(-false, -hits, side="right")  # false ones before each hit
        rank = above + np.arange(1, len(hits) + 1)
        for count in RANKS:
            found[f"recall_at_{count}"] = int((rank <= count).sum()) / self._num_regions
        if self._threshold is not None:
            found["recall"] = int((hits >= self._threshold).sum()) / self._num_regions
            num_false = int((false >= self._threshold).sum())
            found["false_per_image"] = num_false / self._num_images
        return found

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


class DetectionMetrics:
    """Collects boxes by image and class; then COCO's average precision, by faster-coco-eval.

    Keys of ``compute``, both in [0, 1], means over the classes that have a true box:

    * map50: average precision where a box is right from an IoU of 0.5 with the truth.
    * map50_95: mean of it over the IoUs 0.5, 0.55, ... 0.95.

    Of an image and class the 100 best boxes count. There are no keys without a true box.

    Raises:
        BackendError: faster-coco-eval is not installed.

    Source: Lin et al., "Microsoft COCO: Common Objects in Context", 2014, and its evaluation.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("faster_coco_eval") is None:
            raise BackendError(
                "metrics of boxes need the package 'faster-coco-eval', which is not installed",
                fix='pip install "engineworks[refdet]"',
            )
        self._images: dict[int, int] = {}
        self._classes: dict[str, int] = {}
        self._found: list[dict[str, Any]] = []
        self._truth: list[dict[str, Any]] = []

    def update(
        self, image: int, name: str, boxes_N4: Array, scores_N: Array, truth_M4: Array
    ) -> None:
        """Add what was found of one class in one image, and what is there.

        Args:
            image: a number that tells images apart.
            name: of the class.
            boxes_N4, scores_N: found, in any order; no box is empty.
            truth_M4: in the unit of ``boxes_N4``.

        Raises:
            InputError: a score or box that is not finite.
        """
        if not np.isfinite(scores_N).all() or not np.isfinite(boxes_N4).all():
            raise InputError(
                "an image has boxes or scores that are not finite",
                fix="look for NaN in the graph's outputs: compare float and INT8",
            )
        # numbers from 1: the evaluation takes 0 for "no such"
        place = {
            "image_id": self._images.setdefault(image, len(self._images) + 1),
            "category_id": self._classes.setdefault(name, len(self._classes) + 1),
            "iscrowd": 0,
        }
        for box, score in zip(_corner_and_size(boxes_N4), scores_N.tolist(), strict=True):
            self._found.append({**place, **box, "score": score, "id": len(self._found) + 1})
        for box in _corner_and_size(truth_M4):
            self._truth.append({**place, **box, "id": len(self._truth) + 1})

    def compute(self) -> dict[str, float]:
        """Both metrics, or none."""
        from faster_coco_eval import COCO, COCOeval_faster

        if not self._truth:
            return {}
        listed = {
            "images": [{"id": number} for number in self._images.values()],
            "categories": [{"id": number, "name": k} for k, number in self._classes.items()],
        }
        truth, found = (
            COCO({**listed, "annotations": each}, print_function=_say_nothing)
            for each in (self._truth, self._found)
        )
        judged = COCOeval_faster(truth, found, "bbox", print_function=_say_nothing)
        judged.evaluate()
        judged.accumulate()
        # by IoU, recall and class, for boxes of all sizes and the largest number of them; -1 where
        # a class has no true box
        precision_TRC = judged.eval["precision"][:, :, :, 0, -1]
        precision_TRC = precision_TRC[:, :, precision_TRC[0, 0] >= 0]
        return {"map50": float(precision_TRC[0].mean()), "map50_95": float(precision_TRC.mean())}


def _corner_and_size(boxes_N4: Array) -> list[dict[str, Any]]:
    """Boxes in COCO's form."""
    boxes = boxes_N4.astype(np.float64)
    rows = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()
    return [{"bbox": row, "area": row[2] * row[3]} for row in rows]


def _say_nothing(*_texts: object) -> None:
    pass


def st_iou(found: Mapping[int, Array], truth: Mapping[int, Array]) -> float:
    """How well an object is found in space and time, over the frames of one video.

    The sum of the overlaps in frames where there is both a found and a true box, over the number of
    frames where there is either: a miss and a false alarm cost a frame each.

    Args:
        found: frame -> (4,) the best box found, for frames where there is one.
        truth: frame -> (M, 4) the true boxes, M >= 1, for frames that have any; of several the one
            that fits best counts.

    Returns:
        In [0, 1].

    Raises:
        InputError: no frame has a box.

    Source: metric of the Zalo AI Challenge 2025.
    """
    frames = found.keys() | truth.keys()
    if not frames:
        raise InputError("there is no box in any frame", fix="leave such videos out")
    overlaps = (iou(found[i][None], truth[i]).max() for i in found.keys() & truth.keys())
    return float(sum(overlaps)) / len(frames)


def log_softmax(logits: Array) -> Array:
    """Logarithm of the softmax over the last axis, in float64 and without overflow."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
