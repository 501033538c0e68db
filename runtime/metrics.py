"""One ruler for validation and for the INT8 gate.

Everywhere a score at or above a threshold means "positive". What is read off a curve of such
thresholds is in ``runtime.curves``; scikit-learn's metrics would each sort everything once more,
and the tests hold these ones against them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from engineworks.runtime.curves import of_pixels, of_scores
from engineworks.runtime.errors import InputError
from engineworks.runtime.evaluation import Decisions, Evaluation, Rate, decide, warned
from engineworks.runtime.evidence import CandidateRanking, Evidence, PixelRanking, Ranking, Shares
from engineworks.runtime.pixels import Pixels
from engineworks.runtime.results import Candidate
from engineworks.runtime.tensors import Array

AUPRO_LIMIT = 0.3
TOP = 5
ECE_BINS = 15
RANKS = (30, 50, 150, 500)
SURE = 0.9  # probability from which a classifier's errors are counted apart
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
        self._answers: list[tuple[int, bool, float]] = []  # label, whether right, probability

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
        self._answers.append((label, best == label, probability))
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

    def evaluation(self, labels: Sequence[str]) -> Evaluation:
        """Metrics, errors at the classifier's own confidence, and evidence of top1.

        Args:
            labels: name of each class.
        """
        label_I, right_I, probability_I = (
            np.array([answer[i] for answer in self._answers], kind)
            for i, kind in enumerate((np.int64, bool, np.float64))
        )
        sure_I = probability_I >= SURE
        rates = {
            name: Rate.counted(int((~right_I & of).sum()), int(of.sum()))
            for name, of in (
                ("errors", np.ones(len(label_I), bool)),
                (f"errors of those at {SURE} or more", sure_I),
                (f"errors of those below {SURE}", ~sure_I),
            )
        }
        of_sure = rates[f"errors of those at {SURE} or more"]
        warnings = warned(rates, {"errors": "gets {} of {} labelled pictures wrong"})
        if of_sure.low > 1 - SURE:
            told = f"answers that it is {100 * SURE:.0f} % sure of"
            warnings = (*warnings, f"is wrong in {of_sure.fraction} {told}")
        decided = Decisions(
            border="confidence",
            value=SURE,
            source="the most probable class",
            rates=rates,
            kinds={
                name: {"errors": Rate.counted(int((~right_I & of).sum()), int(of.sum()))}
                for i, name in enumerate(labels)
                for of in [label_I == i]
                if of.any()
            },
            warnings=warnings,
        )
        ones_I = np.ones(len(label_I), np.int64)
        return Evaluation(
            self.compute(),
            (decided,),
            (Shares("top1", right_I.astype(np.int64), ones_I),),
            np.zeros(len(label_I), np.int64),
        )


def leave_one_out(vectors_NF: Array, labels_N: Array) -> Evaluation:
    """``top1``: share of pictures whose most similar other picture is of their class.

    Of equally similar ones the first counts. A picture that is alone in its class is only there to
    be taken for another. A resample asks other pictures, and compares them with the same ones.

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
    right_N = np.zeros(len(labels_N), np.int64)
    for start in range(0, len(asked), _ROWS_AT_ONCE):
        rows = asked[start : start + _ROWS_AT_ONCE]
        similarity = vectors_NF[rows] @ vectors_NF.T
        similarity[np.arange(len(rows)), rows] = -np.inf  # nobody is compared with itself
        right_N[rows] = labels_N[similarity.argmax(axis=1)] == labels_N[rows]
    return Evaluation(
        {"top1": int(right_N.sum()) / len(asked)},
        evidence=(Shares("top1", right_N, (sizes[which_N] > 1).astype(np.int64)),),
        groups_I=np.zeros(len(labels_N), np.int64),
    )


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


def log_softmax(logits: Array) -> Array:
    """Logarithm of the softmax over the last axis, in float64 and without overflow."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
