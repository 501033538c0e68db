"""Metrics of boxes: COCO's average precision, what is found at a score, overlap through a video."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engineworks.runtime.boxes import iou
from engineworks.runtime.errors import InputError
from engineworks.runtime.evaluation import Decisions, Evaluation, Rate, warned
from engineworks.runtime.evidence import IOUS, BoxRanking, Found
from engineworks.runtime.tensors import Array

_MAX_BOXES = 100  # of an image and class


class DetectionMetrics:
    """Collects boxes by image and class; then COCO's average precision.

    Keys of ``compute``, both in [0, 1], means over the classes that have a true box:

    * map50: average precision where a box is right from an IoU of 0.5 with the truth.
    * map50_95: mean of it over the IoUs 0.5, 0.55, ... 0.95.

    Of an image and class the 100 best boxes count. There are no keys without a true box.

    Source: Lin et al., "Microsoft COCO: Common Objects in Context", 2014, and its evaluation.
    """

    def __init__(self) -> None:
        self._images: dict[int, int] = {}  # number -> place
        self._matched: dict[str, list[_Matched]] = defaultdict(list)
        self._peaks: list[bool] = []  # of each image and class that is there: is the best box on it

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
        place = self._images.setdefault(image, len(self._images))
        self._matched[name].append(_match(place, boxes_N4, scores_N, truth_M4))
        if len(truth_M4):
            self._peaks.append(_is_within(boxes_N4, scores_N, truth_M4))

    def compute(self) -> dict[str, float]:
        """Both metrics, or none."""
        return self._metrics(self._classes())

    def evaluation(self, conf: float) -> Evaluation:
        """Metrics, what is found at a score, and evidence of those of ``compute``.

        Two metrics are added, both in [0, 1]: ``peak_in_box``, the share of images and classes with
        a true box where the centre of the best one found lies in one, and ``recall_fp1``, the share
        of true boxes found by an IoU of 0.5 at the score where there is one false box per image and
        class.

        Frames of one video count as so many pictures, though they are alike: the intervals of a few
        videos are too narrow.

        Args:
            conf: the score that an object needs.
        """
        classes = self._classes()
        metrics = self._metrics(classes)
        borders = {"shipped": conf}
        if metrics:
            scores_D = np.concatenate([found.scores_D for found in classes.values()])
            right_D = np.concatenate([found.right_TD[0] for found in classes.values()])
            num_truth = sum(int(found.truth_I.sum()) for found in classes.values())
            if right_D.any():
                best = _best_conf(scores_D, right_D, num_truth)
                borders["largest F1 on these pictures"] = best
            num_searched = sum(len(matched) for matched in self._matched.values())
            metrics["peak_in_box"] = sum(self._peaks) / len(self._peaks)
            metrics["recall_fp1"] = _recall(scores_D, right_D, num_truth, num_searched)
        return Evaluation(
            metrics,
            tuple(_decided(each, source, classes) for source, each in borders.items()),
            (BoxRanking(list(classes.values())),),
            np.zeros(len(self._images), np.int64),
        )

    def _classes(self) -> dict[str, Found]:
        num_images = len(self._images)
        return {name: _joined(matched, num_images) for name, matched in self._matched.items()}

    def _metrics(self, classes: Mapping[str, Found]) -> dict[str, float]:
        once_1I = np.ones((1, len(self._images)), np.int64)
        precision = BoxRanking(list(classes.values())).resampled(once_1I)
        return {name: float(values_1[0]) for name, values_1 in precision.items()}


@dataclass(frozen=True, slots=True)
class _Matched:
    """The boxes of one class in one image by falling score, and where they are right."""

    image: int
    scores_D: Array
    right_TD: Array
    num_truth: int


def _joined(matched: Sequence[_Matched], num_images: int) -> Found:
    """What was found of one class in all images."""
    scores_D = np.concatenate([each.scores_D for each in matched])
    pictures_D = np.repeat(
        np.array([each.image for each in matched], np.int32),
        [len(each.scores_D) for each in matched],
    )
    order = np.lexsort((pictures_D, -scores_D))
    truth_I = np.zeros(num_images, np.int64)
    for each in matched:
        truth_I[each.image] += each.num_truth
    right_TD = np.concatenate([each.right_TD for each in matched], axis=1)
    return Found(scores_D[order], pictures_D[order], right_TD[:, order], truth_I)


def _match(image: int, boxes_N4: Array, scores_N: Array, truth_M4: Array) -> _Matched:
    """By COCO's rule: from the best score down, each takes the true box left that fits it best."""
    order = np.argsort(-scores_N, kind="stable")[:_MAX_BOXES]
    overlap_DM = iou(boxes_N4[order].astype(np.float64), truth_M4.astype(np.float64))
    right_TD = np.zeros((len(IOUS), len(order)), bool)
    left_TM = np.ones((len(IOUS), len(truth_M4)), bool)
    for d in np.flatnonzero((overlap_DM >= IOUS[0]).any(axis=1)):
        for t, limit in enumerate(IOUS):
            fits_M = np.where(left_TM[t], overlap_DM[d], -1.0)
            best = len(fits_M) - 1 - int(fits_M[::-1].argmax())  # of equal ones the last
            if fits_M[best] >= limit:
                right_TD[t, d], left_TM[t, best] = True, False
    return _Matched(image, scores_N[order], right_TD, len(truth_M4))


def _decided(conf: float, source: str, classes: Mapping[str, Found]) -> Decisions:
    """What is found at a score, right from an IoU of 0.5 on."""
    counts = {
        name: (
            int((found.right_TD[0] & (found.scores_D >= conf)).sum()),
            int((found.scores_D >= conf).sum()),
            int(found.truth_I.sum()),
        )
        for name, found in classes.items()
    }

    def rates(num_right: int, num_found: int, num_truth: int) -> dict[str, Rate]:
        return {
            "missed objects": Rate.counted(num_truth - num_right, num_truth),
            "false boxes": Rate.counted(num_found - num_right, num_found),
        }

    whole = rates(*np.reshape(list(counts.values()), (-1, 3)).sum(axis=0, dtype=int).tolist())
    sentences = {"missed objects": "misses {} of {} labelled objects at its border"}
    if whole["missed objects"].of:
        sentences["false boxes"] = "{} of {} boxes at its border are false"
    return Decisions(
        border="conf",
        value=conf,
        source=source,
        rates=whole,
        kinds={name: rates(*each) for name, each in counts.items()},
        warnings=warned(whole, sentences),
    )


def _best_conf(scores_D: Array, right_D: Array, num_truth: int) -> float:
    """The highest of the scores with the largest F1; what is never found counts as missed."""
    order = np.argsort(-scores_D, kind="stable")
    last = np.flatnonzero(np.diff(scores_D[order], append=-np.inf))  # of equal scores
    f1 = 2 * np.cumsum(right_D[order])[last] / (last + 1 + num_truth)
    return float(scores_D[order][last[np.argmax(f1)]])


def _recall(scores_D: Array, right_D: Array, num_truth: int, most_false: int) -> float:
    """Share of true boxes above the score that lets at most so many false ones through."""
    order = np.argsort(-scores_D, kind="stable")
    last = np.flatnonzero(np.diff(scores_D[order], append=-np.inf))  # of equal scores
    num_right = np.cumsum(right_D[order])[last]
    allowed = last + 1 - num_right <= most_false
    return float(num_right[allowed].max(initial=0)) / num_truth


def _is_within(boxes_N4: Array, scores_N: Array, truth_M4: Array) -> bool:
    """Whether the centre of the best box lies in a true one."""
    if not len(boxes_N4):
        return False
    x1, y1, x2, y2 = boxes_N4[int(np.argmax(scores_N))]
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    across = (truth_M4[:, 0] <= x) & (x <= truth_M4[:, 2])
    return bool((across & (truth_M4[:, 1] <= y) & (y <= truth_M4[:, 3])).any())


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


_SUCCESS = np.linspace(0, 1, 21)  # overlaps that the curve of success is read at
_NEAR = 20.0  # pixels


def success_auc(found: Mapping[int, Array], truth: Mapping[int, Array]) -> float:
    """Area below the curve of success: frames whose overlap exceeds 0, 0.05, ... 1.

    Args:
        found, truth: see ``st_iou``; frames without a true box do not count, in one without a found
            box the overlap is 0.

    Returns:
        In [0, 1], the mean over the 21 overlaps.

    Raises:
        InputError: no frame has a true box.

    Source: Wu et al., "Object Tracking Benchmark", 2015.
    """
    overlaps = [
        float(iou(found[i][None], boxes).max()) if i in found else 0.0
        for i, boxes in _shown(truth).items()
    ]
    return float(np.mean([[overlap > least for least in _SUCCESS] for overlap in overlaps]))


def precision_20px(found: Mapping[int, Array], truth: Mapping[int, Array]) -> float:
    """Share of frames whose found box has its centre within 20 pixels of a true one's.

    Args:
        found, truth: see ``success_auc``, also for what is raised and the source.
    """
    near = [
        bool((np.linalg.norm(_centres(found[i][None]) - _centres(boxes), axis=1) <= _NEAR).any())
        if i in found
        else False
        for i, boxes in _shown(truth).items()
    ]
    return sum(near) / len(near)


def _shown(truth: Mapping[int, Array]) -> Mapping[int, Array]:
    if not truth:
        raise InputError("there is no true box in any frame", fix="leave such videos out")
    return truth


def _centres(boxes_N4: Array) -> Array:
    return np.asarray((boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2)
