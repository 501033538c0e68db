from __future__ import annotations

from pathlib import Path
from typing import Any

import faster_coco_eval
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime.boxes import iou
from engineworks.runtime.errors import InputError
from engineworks.runtime.metrics import DetectionMetrics, precision_20px, st_iou, success_auc


def plain_hits(
    found: list[tuple[np.ndarray, np.ndarray]], truth: list[np.ndarray], limit: float
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of one class's boxes in all images, falling, and which of them are right.

    In each image the boxes choose in the order of their scores: the true box that fits best of
    those that are left, if it fits well enough.
    """
    scores, hits = [], []
    for (boxes, given_scores), true in zip(found, truth, strict=True):
        left = list(range(len(true)))
        for i in np.argsort(-given_scores):
            fits = {j: float(iou(boxes[i][None], true[j][None])[0, 0]) for j in left}
            best = max(fits, key=lambda j: fits[j], default=None)
            hit = best is not None and fits[best] >= limit
            if best is not None and hit:
                left.remove(best)
            scores.append(given_scores[i])
            hits.append(hit)
    order = np.argsort(-np.array(scores), kind="stable")
    return np.array(scores)[order], np.array(hits, bool)[order]


def plain_ap(hits: np.ndarray, num_true: int, recalls: np.ndarray | None) -> float:
    """Mean of the best precision at each of ``recalls`` or more, or at all of them."""
    right = np.cumsum(hits)
    precision, recall = right / np.arange(1, len(hits) + 1), right / num_true
    best = np.maximum.accumulate(precision[::-1])[::-1]
    if recalls is None:
        return float((np.diff(recall, prepend=0) * best).sum())
    at = np.searchsorted(recall, recalls, side="left")
    return float(np.where(at < len(best), np.append(best, 0)[at], 0).mean())


class TestDetectionMetrics:
    LIMITS = np.linspace(0.5, 0.95, 10)
    RECALLS = np.linspace(0, 1, 101)

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 3))
    def test_are_those_of_a_plain_loop(self, seed: int, num_images: int, num_classes: int) -> None:
        rng = np.random.default_rng(seed)
        metrics, wanted = DetectionMetrics(), []
        for name in "abc"[:num_classes]:
            truth, found = [], []
            for _ in range(num_images):
                corner = rng.uniform(0, 200, (int(rng.integers(0, 5)), 2))
                true = np.concatenate([corner, corner + rng.uniform(10, 60, corner.shape)], axis=1)
                near = true[rng.uniform(size=len(true)) < 0.8]
                near = near.repeat(2, axis=0) + rng.uniform(-4, 4, (2 * len(near), 4))
                found.append((near, rng.uniform(size=len(near))))
                truth.append(true)
            for image, (true, (boxes, scores)) in enumerate(zip(truth, found, strict=True)):
                metrics.update(image, name, boxes, scores, true)
            if num_true := sum(map(len, truth)):
                aps = [
                    plain_ap(plain_hits(found, truth, limit)[1], num_true, self.RECALLS)
                    if any(len(boxes) for boxes, _ in found)
                    else 0.0
                    for limit in self.LIMITS
                ]
                wanted.append(aps)

        result = metrics.compute()

        if not wanted:
            assert result == {}
            return
        # a box is right or not: both count the same ones, and then divide in float64
        assert result["map50"] == pytest.approx(np.mean(wanted, axis=0)[0], abs=1e-9)
        assert result["map50_95"] == pytest.approx(np.mean(wanted), abs=1e-9)

    def test_are_perfect_where_all_is_found_and_nothing_else(self) -> None:
        box = np.array([[2, 3, 40, 50]], np.float32)
        metrics = DetectionMetrics()
        metrics.update(7, "cup", box, np.array([0.2], np.float32), box)
        metrics.update(8, "cup", box[:0], np.empty(0), box[:0])
        assert metrics.compute() == {"map50": 1, "map50_95": 1}

    def test_suffer_from_boxes_in_an_image_without_the_object(self) -> None:
        box = np.array([[2, 3, 40, 50]], np.float32)
        metrics = DetectionMetrics()
        metrics.update(0, "cup", box, np.array([0.5]), box)
        metrics.update(1, "cup", box, np.array([0.9]), box[:0])
        assert metrics.compute() == {"map50": 0.5, "map50_95": 0.5}

    def test_leave_classes_out_that_do_not_occur(self) -> None:
        box = np.array([[2, 3, 40, 50]], np.float32)
        metrics = DetectionMetrics()
        metrics.update(0, "cup", box, np.array([0.5]), box)
        metrics.update(0, "jar", box, np.array([0.9]), box[:0])
        assert metrics.compute()["map50"] == 1

    def test_are_none_without_a_true_box_and_zero_without_a_found_one(self) -> None:
        box = np.array([[2, 3, 40, 50]], np.float32)
        metrics = DetectionMetrics()
        metrics.update(0, "cup", box, np.array([0.5]), box[:0])
        assert metrics.compute() == {}
        metrics = DetectionMetrics()
        metrics.update(0, "cup", box[:0], np.empty(0), box)
        assert metrics.compute() == {"map50": 0, "map50_95": 0}

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_refuse_what_is_not_finite(self, bad: float) -> None:
        box = np.array([[2, 3, 40, 50]], np.float32)
        with pytest.raises(InputError, match="not finite"):
            DetectionMetrics().update(0, "cup", box, np.array([bad]), box)
        with pytest.raises(InputError, match="not finite"):
            DetectionMetrics().update(0, "cup", box * bad, np.array([0.5]), box)

    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 12))
    def test_are_those_of_faster_coco_eval(self, seed: int, num_images: int) -> None:
        rng = np.random.default_rng(seed)
        frames = drawn_frames(rng, num_images, most=150, decimals=2)
        assert collected(frames).compute() == pytest.approx(by_faster_coco_eval(frames), abs=1e-9)

    @pytest.mark.data
    def test_are_near_the_published_ones(self, shared: Path) -> None:
        """Those interpolate at every recall that is reached, COCO at 101 of them."""
        known = np.load(shared / "fixtures" / "refdet_ap.npz")
        metrics, exact = DetectionMetrics(), []
        for kind in np.unique(known["gcls"]):
            mine, true = known["pcls"] == kind, known["gt"][known["gcls"] == kind]
            boxes, scores = known["pred"][mine], known["scores"][mine]
            metrics.update(0, str(kind), boxes, scores, true)
            hits = [plain_hits([(boxes, scores)], [true], limit)[1] for limit in self.LIMITS]
            exact.append([plain_ap(each, len(true), None) for each in hits])

        result = metrics.compute()

        assert np.mean(exact, axis=0)[0] == pytest.approx(float(known["map50"]))
        assert np.mean(exact) == pytest.approx(float(known["map_range"]))
        # a step of the recall is counted up to a point of 101 too long
        assert result["map50"] == pytest.approx(float(known["map50"]), abs=0.01)
        assert result["map50_95"] == pytest.approx(float(known["map_range"]), abs=0.01)


BOX, AWAY = np.array([[2.0, 3, 40, 50]]), np.array([[60.0, 60, 90, 90]])


# of a class: boxes, scores, truth
Frame = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]


def drawn_frames(
    rng: np.random.Generator, num_images: int, *, most: int = 2, decimals: int = 12
) -> list[Frame]:
    """Per image and class boxes, scores and truth; some found, some twice, some out of nowhere.

    Args:
        most: boxes out of nowhere.
        decimals: of scores; with few of them some are equal.
    """
    frames = []
    for _ in range(num_images):
        frame: Frame = {}
        for name in "ab":
            corner = rng.uniform(0, 200, (int(rng.integers(0, 4)), 2))
            true = np.concatenate([corner, corner + rng.uniform(10, 60, corner.shape)], axis=1)
            near = true[rng.uniform(size=len(true)) < 0.7].repeat(2, axis=0)
            lost = np.tile([300.0, 300, 330, 330], (int(rng.integers(0, most + 1)), 1))
            found = np.concatenate([near + rng.uniform(-4, 4, near.shape), lost])
            frame[name] = found, np.round(rng.uniform(size=len(found)), decimals), true
        frames.append(frame)
    return frames


def by_faster_coco_eval(frames: list[Frame]) -> dict[str, float]:
    names = sorted({name for frame in frames for name in frame})
    listed = {
        "images": [{"id": i + 1} for i in range(len(frames))],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(names)],
    }
    sides: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for i, frame in enumerate(frames):
        for name, (boxes, scores, truth) in frame.items():
            place = {"image_id": i + 1, "category_id": names.index(name) + 1, "iscrowd": 0}
            for side, given_boxes in zip(sides, (truth, boxes), strict=True):
                for k, (x1, y1, x2, y2) in enumerate(given_boxes.tolist()):
                    box = {"bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                    score = {"score": float(scores[k])} if side is sides[1] else {}
                    side.append({**place, **box, **score, "id": len(side) + 1})
    if not sides[0]:
        return {}
    truth_, found_ = (
        faster_coco_eval.COCO({**listed, "annotations": side}, print_function=lambda *_: None)
        for side in sides
    )
    judged = faster_coco_eval.COCOeval_faster(
        truth_, found_, "bbox", print_function=lambda *_: None
    )
    judged.evaluate()
    judged.accumulate()
    # by IoU, recall and class, for boxes of all sizes and the largest number of them; -1 where a
    # class has no true box
    precision_TRC = judged.eval["precision"][:, :, :, 0, -1]
    precision_TRC = precision_TRC[:, :, precision_TRC[0, 0] >= 0]
    return {"map50": float(precision_TRC[0].mean()), "map50_95": float(precision_TRC.mean())}


def collected(frames: list[Frame]) -> DetectionMetrics:
    metrics = DetectionMetrics()
    for image, frame in enumerate(frames):
        for name, (boxes, scores, truth) in frame.items():
            metrics.update(image, name, boxes, scores, truth)
    return metrics


class TestTheEvidence:
    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_gives_the_metrics_of_pictures_that_were_judged_anew(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        frames = drawn_frames(rng, 6)
        counts = np.array([np.ones(6, np.int64), *rng.multinomial(6, np.full(6, 1 / 6), 4)])

        (evidence,) = collected(frames).evaluation(0.5).evidence
        got = evidence.resampled(counts)

        for row, chosen in enumerate(counts):
            again = [frame for i, frame in enumerate(frames) for _ in range(chosen[i])]
            wanted = collected(again).compute()
            for name in ("map50", "map50_95"):
                value = got[name][row] if got else np.nan
                # the same sums in another order
                assert np.isnan(value) if not wanted else value == pytest.approx(wanted[name])


class TestDecisions:
    def test_count_what_is_found_missed_and_false_at_a_score(self) -> None:
        metrics = DetectionMetrics()
        metrics.update(0, "cup", np.concatenate([BOX, AWAY]), np.array([0.9, 0.4]), BOX)
        metrics.update(1, "cup", BOX, np.array([0.2]), np.concatenate([BOX, AWAY]))
        metrics.update(1, "jar", BOX[:0], np.empty(0), BOX)

        shipped, best = metrics.evaluation(0.3).decisions

        assert shipped.rates["missed objects"].fraction == "3 of 4"
        assert shipped.rates["false boxes"].fraction == "1 of 2"
        assert shipped.kinds["cup"]["missed objects"].fraction == "2 of 3"
        assert shipped.kinds["jar"]["missed objects"].fraction == "1 of 1"
        assert shipped.warnings == ("misses 3 of 4 labelled objects at its border",)
        # 2 of 4 found with one false: F1 4/7, against 2/5 for the first box alone
        assert (best.value, best.rates["missed objects"].fraction) == (0.2, "2 of 4")

    def test_are_there_for_frames_without_any_object(self) -> None:
        metrics = DetectionMetrics()
        metrics.update(0, "cup", BOX, np.array([0.9]), BOX[:0])

        judged = metrics.evaluation(0.3)

        assert judged.metrics == {}
        (shipped,) = judged.decisions
        assert shipped.rates["false boxes"].fraction == "1 of 1"
        assert shipped.warnings == ()  # nothing else could be found


def box(x: float, y: float, side: float = 10) -> np.ndarray:
    return np.array([x, y, x + side, y + side], np.float64)


TRUTH = {i: box(0, 0)[None] for i in range(4)}


class TestAnObjectThroughAVideo:
    def test_succeeds_by_how_much_it_overlaps(self) -> None:
        found = {0: box(0, 0), 1: box(5, 0), 2: box(50, 50), 9: box(0, 0)}
        # overlaps of 1, a third, 0 and none: above 20, 7 and none of the 21 limits
        assert success_auc(found, TRUTH) == pytest.approx((20 + 7) / 21 / 4)

    def test_is_precise_within_twenty_pixels(self) -> None:
        found = {0: box(0, 0), 1: box(12, 16), 2: box(12, 16.1), 9: box(0, 0)}
        assert precision_20px(found, TRUTH) == 0.5

    def test_overlaps_over_all_frames_that_either_knows(self) -> None:
        found = {0: box(0, 0), 1: box(5, 0), 9: box(0, 0)}
        assert st_iou(found, TRUTH) == pytest.approx((1 + 1 / 3) / len({*TRUTH, *found}))

    def test_that_is_never_there_is_refused(self) -> None:
        for measure in (success_auc, precision_20px):
            with pytest.raises(InputError, match="no true box"):
                measure({0: box(0, 0)}, {})


def test_the_best_box_and_the_recall_at_one_false_box_per_picture() -> None:
    metrics = DetectionMetrics()
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], np.float32)
    # the best is false and its centre on nothing, then one right, two false, one right
    found = np.array([box(50, 50), box(0, 0), box(60, 0), box(70, 0), box(20, 0)], np.float32)
    metrics.update(0, "cup", found, np.array([0.9, 0.8, 0.7, 0.6, 0.5]), truth)
    metrics.update(1, "cup", found[1:2], np.array([0.4]), truth[:1])
    metrics.update(2, "cup", found[:0], np.zeros(0), truth[:1])
    judged = metrics.evaluation(0.5).metrics
    assert judged["peak_in_box"] == pytest.approx(1 / 3)
    # three pictures allow three false boxes: all three right ones are then found
    assert judged["recall_fp1"] == pytest.approx(3 / 4)
    few = DetectionMetrics()
    few.update(0, "cup", found, np.array([0.9, 0.8, 0.7, 0.6, 0.5]), truth)
    assert few.evaluation(0.5).metrics["recall_fp1"] == pytest.approx(1 / 2)


def test_a_box_that_overlaps_by_exactly_the_limit_is_right() -> None:
    metrics = DetectionMetrics()
    half = np.array([[0, 0, 10, 20]], np.float32)
    metrics.update(0, "cup", np.array([box(0, 0)], np.float32), np.array([0.9]), half)
    assert metrics.compute()["map50"] == 1
    assert metrics.compute()["map50_95"] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("x", "y"), [(-20, 0), (20, 0), (0, -20), (0, 20)], ids=["left", "right", "above", "below"]
)
def test_a_best_box_beside_the_object_is_no_peak_in_it(x: int, y: int) -> None:
    metrics = DetectionMetrics()
    truth = np.array([box(0, 0)], np.float32)
    found = np.array([box(x, y), box(0, 0)], np.float32)
    metrics.update(0, "cup", found, np.array([0.9, 0.1]), truth)
    assert metrics.evaluation(0.5).metrics["peak_in_box"] == 0


def test_a_score_that_lets_one_false_box_too_many_through_is_not_reached() -> None:
    metrics = DetectionMetrics()
    found = np.array([box(50, 50), box(60, 0), box(0, 0)], np.float32)
    metrics.update(0, "cup", found, np.array([0.9, 0.8, 0.7]), np.array([box(0, 0)], np.float32))
    assert metrics.evaluation(0.5).metrics["recall_fp1"] == 0
