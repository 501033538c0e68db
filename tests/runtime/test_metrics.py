from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engineworks.runtime import datasets
from engineworks.runtime.errors import InputError
from engineworks.runtime.images import read_mask
from engineworks.runtime.metrics import (
    AnomalyMetrics,
    CandidateMetrics,
    ClassificationMetrics,
    aupro,
    f1max,
    false_reject_threshold,
    leave_one_out,
    log_softmax,
)
from engineworks.runtime.results import Candidate
from engineworks.runtime.spool import Spool

# few distinct values, so that ties are common; halves are exact in float32
SCORES = st.integers(-3, 3).map(lambda i: i / 2)


def pairs_won(scores: np.ndarray, labels: np.ndarray) -> float:
    """AUROC by its definition: over all pairs of a positive and a negative."""
    won = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    return float(np.mean(won))


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Sum of precision times the recall gained, threshold by threshold."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = scores >= threshold
        now = (found & labels).sum() / labels.sum()
        total += (now - recall) * (found & labels).sum() / found.sum()
        recall = now
    return total


def best_f1(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Tries every score as a threshold, from the highest down."""
    tried = []
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = scores >= threshold
        tried.append((2 * (found & labels).sum() / (found.sum() + labels.sum()), threshold))
    return max(tried, key=lambda pair: pair[0])


def regions(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """8-connected regions by flooding."""
    left = set(zip(*np.nonzero(mask), strict=True))
    found = []
    while left:
        edge = [left.pop()]
        region = set(edge)
        while edge:
            y, x = edge.pop()
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            region |= near
            edge += near
        found.append(region)
    return found


def per_region_overlap_area(maps: np.ndarray, masks: np.ndarray, limit: float) -> float:
    """AUPRO as the benchmark defines it: threshold by threshold, region by region."""
    curve = [(0.0, 0.0)]
    for threshold in sorted(set(maps.ravel().tolist()), reverse=True):
        overlaps = [
            np.mean([scores[pixel] >= threshold for pixel in region])
            for scores, mask in zip(maps, masks, strict=True)
            for region in regions(mask)
        ]
        curve.append((float((maps[~masks] >= threshold).mean()), float(np.mean(overlaps))))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 >= limit:
            break
        end = min(x1, limit)
        if x1 > x0:
            area += (end - x0) * (y0 + y0 + (y1 - y0) * (end - x0) / (x1 - x0)) / 2
    return area / limit


@st.composite
def labelled_scores(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    count = draw(st.integers(2, 20))
    scores = draw(hnp.arrays(np.float64, count, elements=SCORES))
    labels = draw(hnp.arrays(np.bool_, count))
    labels[:2] = [True, False]
    return scores, labels


@st.composite
def labelled_maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = (draw(st.integers(1, 3)), draw(st.integers(2, 5)), draw(st.integers(2, 5)))
    maps = draw(hnp.arrays(np.float32, shape, elements=SCORES))
    masks = draw(hnp.arrays(np.bool_, shape))
    masks[0, 0, :2] = [True, False]
    return maps, masks


class TestImageMetrics:
    @settings(deadline=None)
    @given(labelled_scores())
    def test_are_those_of_their_definitions(self, drawn: tuple[np.ndarray, np.ndarray]) -> None:
        scores, labels = drawn
        metrics = AnomalyMetrics()
        for score, label in zip(scores, labels, strict=True):
            metrics.update(score, int(label), np.zeros((1, 1)), None)

        found = metrics.compute()

        best, threshold = best_f1(scores, labels)
        # float64 sums of at most 400 terms
        assert found["image_auroc"] == pytest.approx(pairs_won(scores, labels), abs=1e-12)
        assert found["image_ap"] == pytest.approx(average_precision(scores, labels), abs=1e-12)
        assert found["image_f1max"] == pytest.approx(best, abs=1e-12)
        assert found["image_f1max_threshold"] == threshold

    @pytest.mark.parametrize("label", [0, 1])
    def test_are_left_out_where_one_class_was_seen(self, label: int) -> None:
        metrics = AnomalyMetrics()
        metrics.update(1.0, label, np.zeros((2, 2)), np.zeros((2, 2), bool))

        assert metrics.compute() == {}

    def test_of_nothing_are_nothing(self) -> None:
        assert AnomalyMetrics().compute() == {}


class TestPixelMetrics:
    @settings(deadline=None)
    @given(labelled_maps())
    def test_are_those_of_all_pixels_together(self, drawn: tuple[np.ndarray, np.ndarray]) -> None:
        maps, masks = drawn
        metrics = AnomalyMetrics()
        for scores, mask in zip(maps, masks, strict=True):
            metrics.update(0.0, int(mask.any()), scores, mask)

        found = metrics.compute()

        pixels, truth = maps.ravel().astype(np.float64), masks.ravel()
        # float64 sums of at most 1,500 terms
        assert found["pixel_auroc"] == pytest.approx(pairs_won(pixels, truth), abs=1e-12)
        assert found["pixel_ap"] == pytest.approx(average_precision(pixels, truth), abs=1e-12)
        assert found["pixel_f1max"] == pytest.approx(best_f1(pixels, truth)[0], abs=1e-12)
        assert found["pixel_f1max_threshold"] == best_f1(pixels, truth)[1]
        assert found["aupro"] == aupro(list(maps), list(masks))

    def test_are_left_out_where_a_defective_image_has_no_mask(self) -> None:
        metrics = AnomalyMetrics()
        metrics.update(0.0, 0, np.zeros((2, 2)), np.zeros((2, 2), bool))
        metrics.update(1.0, 1, np.ones((2, 2)), np.eye(2, dtype=bool))
        metrics.update(1.0, 1, np.ones((2, 2)), None)

        assert {name.split("_")[0] for name in metrics.compute()} == {"image"}

    def test_take_a_normal_image_without_a_mask_as_free_of_defects(self) -> None:
        answers = []
        for normal in (None, np.zeros((2, 2), bool)):
            metrics = AnomalyMetrics()
            metrics.update(0.0, 0, np.full((2, 2), 0.2), normal)
            metrics.update(1.0, 1, np.array([[0.1, 0.3], [0.2, 0.9]]), np.eye(2, dtype=bool))
            answers.append(metrics.compute())

        assert answers[0] == answers[1]
        assert "pixel_auroc" in answers[0]

    def test_do_not_depend_on_maps_that_the_caller_changes_later(self) -> None:
        metrics, scores = AnomalyMetrics(), np.array([[0.0, 1.0]], np.float32)
        metrics.update(1.0, 1, scores, np.array([[False, True]]))
        metrics.update(0.0, 0, np.zeros((1, 2)), None)
        scores[:] = 0

        assert metrics.compute()["pixel_auroc"] == 1


class TestWhatCannotBeJudged:
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_score_that_is_not_finite_is_refused(self, bad: float) -> None:
        for score, pixel in ((bad, 0.0), (0.0, bad)):
            with pytest.raises(InputError, match="not finite"):
                AnomalyMetrics().update(score, 0, np.full((2, 2), pixel), None)

    def test_a_mask_of_another_size_is_refused_with_both_sizes(self) -> None:
        with pytest.raises(InputError, match=r"\(3, 3\) does not fit a map of \(2, 2\)"):
            AnomalyMetrics().update(0.0, 1, np.zeros((2, 2)), np.ones((3, 3), bool))


class TestAgainstScikitLearn:
    @pytest.mark.parametrize("decimals", [1, 7], ids=["many ties", "few ties"])
    def test_pixel_metrics_are_equal(self, rng: np.random.Generator, decimals: int) -> None:
        masks = rng.random((4, 32, 32)) < 0.05
        maps = (rng.normal(size=masks.shape) + masks).round(decimals).astype(np.float32)
        metrics = AnomalyMetrics()
        for scores, mask in zip(maps, masks, strict=True):
            metrics.update(float(scores.max()), 1, scores, mask)

        found = metrics.compute()

        truth, pixels = masks.ravel(), maps.ravel()
        precision, recall, _ = sklearn.metrics.precision_recall_curve(truth, pixels)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
        # both sum in float64, in another order
        assert found["pixel_auroc"] == pytest.approx(
            sklearn.metrics.roc_auc_score(truth, pixels), abs=1e-12
        )
        assert found["pixel_ap"] == pytest.approx(
            sklearn.metrics.average_precision_score(truth, pixels), abs=1e-12
        )
        assert found["pixel_f1max"] == pytest.approx(f1.max(), abs=1e-12)


class TestF1Max:
    @settings(deadline=None)
    @given(labelled_scores())
    def test_is_the_best_of_all_thresholds(self, drawn: tuple[np.ndarray, np.ndarray]) -> None:
        scores, labels = drawn

        # the same integers divided
        assert f1max(scores, labels) == best_f1(scores, labels)

    def test_without_positives_is_zero(self) -> None:
        assert f1max(np.array([1.0, 2.0]), np.zeros(2, bool))[0] == 0


class TestAupro:
    @settings(deadline=None)
    @given(labelled_maps(), st.sampled_from([0.05, 0.3, 1.0]))
    def test_is_the_area_over_every_threshold_and_region(
        self, drawn: tuple[np.ndarray, np.ndarray], limit: float
    ) -> None:
        maps, masks = drawn

        # float64 sums over at most 76 thresholds
        want = per_region_overlap_area(maps, masks, limit)
        assert aupro(list(maps), list(masks), limit) == pytest.approx(want, abs=1e-12)

    def test_counts_a_small_region_as_much_as_a_large_one(self) -> None:
        mask = np.zeros((10, 10), bool)
        mask[:5, :5] = True
        mask[9, 9] = True
        scores = np.zeros((10, 10), np.float32)
        scores[:5, :5] = 1  # the large one is found, the small one only with everything else

        # the curve rises from 1/2 at rate 0 to 1 at rate 1: (0.5 + 0.65) / 2 up to 0.3
        assert aupro([scores], [mask]) == pytest.approx(0.575)

    def test_takes_regions_that_touch_at_a_corner_as_one(self) -> None:
        mask = np.zeros((6, 6), bool)
        mask[0, 0] = mask[1, 1] = True
        mask[5, 5] = True
        scores = np.zeros((6, 6), np.float32)
        scores[0, 0] = 1

        # a quarter of two regions at rate 0, 1 at rate 1
        assert aupro([scores], [mask]) == pytest.approx(0.25 + 0.75 * 0.15)

    def test_ends_before_a_jump_that_lies_exactly_at_its_limit(self) -> None:
        """3 of 10 normal pixels score above the region: it is found where the integral ends."""
        mask = np.zeros((1, 14), bool)
        mask[0, :4] = True
        scores = np.full((1, 14), 2.0, np.float32)
        scores[0, 4:7] = 3
        scores[0, 7:] = 1

        assert aupro([scores], [mask], 0.3) == 0
        assert aupro([scores], [mask], 0.6) == pytest.approx(0.5, abs=1e-12)

    def test_follows_a_slope_that_begins_exactly_at_its_limit(self) -> None:
        """Half of the region is found at once, the rest with 2 normal pixels that score alike."""
        mask = np.zeros((1, 14), bool)
        mask[0, :4] = True
        scores = np.full((1, 14), 1.0, np.float32)
        scores[0, :2], scores[0, 4:7] = 4, 3
        scores[0, 2:4] = scores[0, 7:9] = 2

        assert aupro([scores], [mask], 0.3) == pytest.approx(0.5, abs=1e-12)
        # 0.5 up to 0.3, then from 0.5 to 1 at 0.5
        assert aupro([scores], [mask], 0.5) == pytest.approx((0.15 + 0.15) / 0.5, abs=1e-12)

    def test_of_a_perfect_map_is_one(self, rng: np.random.Generator) -> None:
        masks = [rng.random((8, 8)) < 0.2 for _ in range(3)]

        assert aupro([mask.astype(np.float32) for mask in masks], masks) == pytest.approx(1)

    @pytest.mark.parametrize("value", [True, False])
    def test_needs_regions_and_normal_pixels(self, value: bool) -> None:
        with pytest.raises(InputError, match="region"):
            aupro([np.zeros((2, 2))], [np.full((2, 2), value)])


class TestAFalseRejectThreshold:
    @settings(deadline=None)
    @given(
        hnp.arrays(np.float32, st.integers(1, 30), elements=SCORES),
        st.floats(0, 0.99),
    )
    def test_keeps_the_budget_and_is_the_smallest_that_does(
        self, scores: np.ndarray, budget: float
    ) -> None:
        threshold = false_reject_threshold(scores, budget)

        allowed = budget * scores.size + 1e-9
        assert (scores >= threshold).sum() <= allowed
        assert (scores >= np.nextafter(np.float32(threshold), np.float32(-np.inf))).sum() > allowed

    @pytest.mark.parametrize(("budget", "rejected"), [(0.0, 0), (0.01, 1), (0.29, 29), (0.5, 50)])
    def test_meets_the_budget_where_scores_differ(self, budget: float, rejected: int) -> None:
        scores = np.arange(100, dtype=np.float32)

        assert (scores >= false_reject_threshold(scores, budget)).sum() == rejected

    def test_rejects_no_image_where_there_are_too_few(self) -> None:
        scores = np.array([1.0, 2.0, 3.0])

        assert (scores < false_reject_threshold(scores, 0.3)).all()

    def test_rejects_none_of_equal_scores(self) -> None:
        scores = np.array([1.0, 5.0, 5.0, 5.0])

        assert (scores < false_reject_threshold(scores, 0.5)).all()

    def test_lies_above_a_float32_score_in_float32_too(self) -> None:
        scores = np.array([0.1, 0.2, 0.3], np.float32)

        threshold = false_reject_threshold(scores, 0.0)

        # a map in float32 is compared in float32: a border one float64 step above would be rounded
        assert not (scores >= threshold).any()
        assert all(float(score) < threshold for score in scores)

    @pytest.mark.parametrize(
        ("scores", "budget"), [([], 0.1), ([1.0, np.nan], 0.1), ([1.0], 1.0), ([1.0], -0.1)]
    )
    def test_needs_scores_and_a_share(self, scores: list[float], budget: float) -> None:
        with pytest.raises(InputError):
            false_reject_threshold(np.array(scores), budget)


@pytest.mark.data
def test_a_map_that_is_the_mask_scores_one_on_real_masks(shared: Path) -> None:
    metrics = AnomalyMetrics()
    for sample in datasets.mvtec(shared / "data" / "mvtec_bottle", "test")[::8]:
        mask = None if sample.mask_path is None else read_mask(sample.mask_path) > 0
        shape = (8, 8) if mask is None else mask.shape
        scores = np.zeros(shape) if mask is None else mask.astype(np.float32)
        metrics.update(float(scores.max()), sample.label, scores, mask)

    found = metrics.compute()

    assert all(value == pytest.approx(1) for value in found.values())
    assert len(found) == 9


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = [np.exp(np.longdouble(v) - np.longdouble(logits.max())) for v in logits]
    return np.array([w / sum(weights) for w in weights], np.float64)


def calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Bin by bin: |mean of right answers - mean confidence|, weighted by the bin's share."""
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    total = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return float(total)


def collected(logits: np.ndarray, labels: np.ndarray) -> ClassificationMetrics:
    metrics = ClassificationMetrics(logits.shape[1])
    for logits_C, label in zip(logits, labels, strict=True):
        metrics.update(logits_C, int(label))
    return metrics


class TestClassification:
    @settings(max_examples=40, deadline=None)
    @given(st.integers(2, 9), st.integers(1, 60), st.integers(0, 2**32 - 1))
    def test_agrees_with_scikit_learn_and_with_the_definitions(
        self, num_classes: int, num: int, seed: int
    ) -> None:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, num_classes, num)
        # mostly right, of all degrees of confidence
        logits = rng.normal(0, 3, (num, num_classes))
        logits[np.arange(num), labels] += 2
        logits = logits.astype(np.float32)
        probabilities = np.stack([softmax(row) for row in logits.astype(np.float64)])
        answers = probabilities.argmax(axis=1)

        metrics = collected(logits, labels)
        found = metrics.compute()

        assert found["top1"] == np.mean(answers == labels)
        with warnings.catch_warnings():  # of classes that are answered but never occur
            warnings.simplefilter("ignore", UserWarning)
            balanced = sklearn.metrics.balanced_accuracy_score(labels, answers)
        # float64 sums in another order, here and below
        assert found["balanced_accuracy"] == pytest.approx(balanced, abs=1e-12)
        nll = sklearn.metrics.log_loss(labels, probabilities, labels=range(num_classes))
        # scikit-learn clips probabilities at the precision of float64
        assert found["nll"] == pytest.approx(nll, rel=1e-9, abs=1e-9)
        assert found["ece"] == pytest.approx(calibration_error(probabilities, labels), abs=1e-12)
        assert ("top5" in found) == (num_classes > 5)
        if num_classes > 5:
            among = [y in np.argsort(-row)[:5] for y, row in zip(labels, logits, strict=True)]
            assert found["top5"] == np.mean(among)
        everything = range(num_classes)
        counts = sklearn.metrics.confusion_matrix(labels, answers, labels=everything)
        assert np.array_equal(metrics.confusion, counts)

    def test_of_a_class_that_does_not_occur_count_nothing(self) -> None:
        logits = np.array([[2.0, 0, 0], [2.0, 0, 0], [0, 2.0, 0]])

        found = collected(logits, np.array([0, 1, 1])).compute()

        assert found["balanced_accuracy"] == pytest.approx((1 + 0.5) / 2)

    def test_of_equal_logits_takes_the_first_class(self) -> None:
        flat = np.zeros((7, 7), np.float32)

        metrics = collected(flat, np.arange(7))

        assert metrics.confusion[:, 0].tolist() == [1] * 7
        assert metrics.compute()["top1"] == pytest.approx(1 / 7)
        assert metrics.compute()["top5"] == pytest.approx(5 / 7)
        # as confident as it is right
        assert metrics.compute()["ece"] == pytest.approx(0, abs=1e-12)
        assert metrics.compute()["nll"] == pytest.approx(np.log(7))

    def test_of_many_equal_logits_takes_the_classes_in_their_order(self) -> None:
        """So many that a sort which is not stable would change their order."""
        logits = np.zeros((300, 300), np.float32)
        logits[:, 150:] = 1

        found = collected(logits, np.arange(300)).compute()

        assert found["top1"] == pytest.approx(1 / 300)
        assert found["top5"] == pytest.approx(5 / 300)
        assert collected(logits[:5], np.arange(150, 155)).compute()["top5"] == 1

    def test_are_the_same_for_logarithms_of_probabilities(self, rng: np.random.Generator) -> None:
        logits, labels = rng.normal(0, 2, (9, 4)), rng.integers(0, 4, 9)
        logs = np.stack([np.log(softmax(row)) for row in logits])

        assert collected(logs, labels).compute() == pytest.approx(
            collected(logits, labels).compute(), abs=1e-12
        )

    def test_survive_logits_whose_exponential_overflows(self) -> None:
        found = collected(np.array([[3e4, -3e4], [3e4, -3e4]], np.float32), np.array([0, 1]))

        assert found.compute() == pytest.approx(
            {"top1": 0.5, "balanced_accuracy": 0.5, "ece": 0.5, "nll": 3e4}
        )

    def test_before_the_first_image_are_none(self) -> None:
        assert ClassificationMetrics(3).compute() == {}

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_refuse_logits_that_are_not_finite(self, bad: float) -> None:
        with pytest.raises(InputError, match="not finite"):
            ClassificationMetrics(2).update(np.array([0.0, bad]), 0)

    @pytest.mark.parametrize(("num", "label"), [(3, 0), (2, 2), (2, -1)])
    def test_refuse_what_does_not_fit_the_classes(self, num: int, label: int) -> None:
        with pytest.raises(InputError, match="2 classes"):
            ClassificationMetrics(2).update(np.zeros(num), label)


def spooled(rows_NF: np.ndarray, at_once: int = 3) -> Spool:
    vectors = Spool()
    for start in range(0, len(rows_NF), at_once):
        vectors.append(rows_NF[start : start + at_once])
    return vectors


class TestLeaveOneOut:
    @given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.integers(1, 6))
    @settings(max_examples=50, deadline=None)
    def test_asks_every_picture_for_the_class_of_the_most_similar_other(
        self, seed: int, num: int, num_classes: int
    ) -> None:
        rng = np.random.default_rng(seed)
        vectors = rng.normal(size=(num, 3))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        labels = rng.integers(num_classes, size=num)
        right = asked = 0
        for i in range(num):
            others = [j for j in range(num) if j != i]
            if any(labels[j] == labels[i] for j in others):
                similarity = {j: float(sum(vectors[i] * vectors[j])) for j in others}
                nearest = max(others, key=similarity.__getitem__)
                right, asked = right + (labels[nearest] == labels[i]), asked + 1
        if asked:
            assert leave_one_out(spooled(vectors), labels).metrics["top1"] == right / asked
        else:
            with pytest.raises(InputError, match="no two are of one class"):
                leave_one_out(spooled(vectors), labels)

    def test_takes_the_first_of_equally_similar_ones(self) -> None:
        vectors = np.ones((3, 1), np.float32)
        # the first is taken for the second, the others for the first
        assert leave_one_out(spooled(vectors), np.array([0, 1, 0])).metrics == {"top1": 0.5}

    def test_does_not_depend_on_how_many_are_compared_at_once(
        self, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        vectors, labels = rng.normal(size=(50, 4)), rng.integers(5, size=50)
        whole = leave_one_out(spooled(vectors), labels).metrics
        monkeypatch.setattr("engineworks.runtime.metrics.vectors._ROWS_AT_ONCE", 7)
        assert leave_one_out(spooled(vectors), labels).metrics == whole


class TestLogSoftmax:
    @settings(max_examples=50)
    @given(
        hnp.arrays(
            np.float32,
            hnp.array_shapes(min_dims=2, max_dims=2, max_side=6),
            elements=st.floats(-1e3, 1e3, width=32),
        )
    )
    def test_is_the_logarithm_of_the_softmax_of_each_row(self, logits: np.ndarray) -> None:
        found = log_softmax(logits)

        assert found.dtype == np.float64
        for row, logs in zip(logits.astype(np.float64), found, strict=True):
            # the reference underflows where the logarithm does not
            assert np.exp(logs) == pytest.approx(softmax(row), rel=1e-9, abs=1e-300)


class TestCandidates:
    @staticmethod
    def mask(*boxes: tuple[int, int, int, int]) -> np.ndarray:
        """(60, 50) with defects at (top, left, height, width)."""
        marked = np.zeros((60, 50), bool)
        for top, left, height, width in boxes:
            marked[top : top + height, left : left + width] = True
        return marked

    def test_of_a_hand_made_set(self) -> None:
        metrics = CandidateMetrics(radius=2, threshold=0.5)
        metrics.update(
            [
                Candidate(x=11, y=11, score=0.9),  # in the first defect
                Candidate(x=14, y=11, score=0.8),  # 2 beside it: the same one again
                Candidate(x=30, y=30, score=0.7),  # nothing there
                Candidate(x=43, y=43, score=0.3),  # sqrt(2) from the corner of the second
            ],
            1,
            self.mask((10, 10, 3, 3), (40, 40, 3, 3)),
        )
        metrics.update([Candidate(x=5, y=5, score=0.6), Candidate(x=9, y=9, score=0.1)], 0, None)
        # one defect at (20, 20), missed by 3 pixels
        metrics.update([Candidate(x=20, y=25, score=0.4)], 1, self.mask((20, 20, 3, 3)))

        found = metrics.compute()

        # false: 0.7, 0.6, 0.4, 0.1 on three images: three are allowed, so all above 0.1 counts
        assert found["recall_at_1_false"] == 2 / 3
        assert found["recall_at_30"] == 2 / 3
        assert found["recall"] == 1 / 3
        assert found["false_per_image"] == 2 / 3

    def test_a_budget_of_false_candidates_limits_what_counts(self) -> None:
        metrics = CandidateMetrics(radius=0)
        false = [Candidate(x=0, y=i, score=0.5 + i / 100) for i in reversed(range(4))]
        true = [Candidate(x=20, y=20, score=0.9), Candidate(x=30, y=30, score=0.5)]
        metrics.update([*true, *false], 1, self.mask((20, 20, 1, 1), (30, 30, 1, 1)))

        # of one image's four false candidates one is allowed: what scores above the second counts
        assert metrics.compute()["recall_at_1_false"] == 0.5

    def test_a_find_that_scores_like_the_false_candidate_too_many_comes_after_it(self) -> None:
        for score, share in ((0.5, 0.0), (0.51, 1.0)):
            metrics = CandidateMetrics(radius=0)
            false = [Candidate(x=0, y=i, score=0.5) for i in range(2)]
            true = [Candidate(x=20, y=20, score=score)]
            metrics.update([*true, *false], 1, self.mask((20, 20, 1, 1)))
            assert metrics.compute()["recall_at_1_false"] == share

    def test_ranks_count_the_best_of_all_images_together(self) -> None:
        metrics = CandidateMetrics(radius=0)
        for i in range(40):
            score = 1 - i / 100
            metrics.update([Candidate(x=3, y=3, score=score)], 1, self.mask((3, 3, 1, 1)))
            metrics.update([Candidate(x=3, y=3, score=score)], 0, None)  # as good, and false

        found = metrics.compute()

        # pairs of one false and one true: the false one comes first
        assert found["recall_at_30"] == 15 / 40
        assert found["recall_at_50"] == 25 / 40
        assert found["recall_at_150"] == 1

    @pytest.mark.parametrize("masks", [[None], [np.zeros((60, 50), bool)]])
    def test_without_known_regions_there_are_no_keys(self, masks: list[np.ndarray | None]) -> None:
        metrics = CandidateMetrics(radius=2)
        for mask in masks:
            metrics.update([Candidate(x=1, y=1, score=0.9)], 1, mask)
        assert metrics.compute() == {}

    @settings(max_examples=50)
    @given(
        spots=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 49)), min_size=1, max_size=6),
        places=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 49)), max_size=8),
        radius=st.sampled_from([0, 1, 1.5, 3]),
    )
    def test_a_region_is_found_by_whatever_candidate_is_nearest_to_it(
        self, spots: list[tuple[int, int]], places: list[tuple[int, int]], radius: float
    ) -> None:
        mask = np.zeros((60, 50), bool)
        for y, x in spots:
            mask[y, x] = True
        metrics = CandidateMetrics(radius, threshold=0.0)
        candidates = [Candidate(x=x, y=y, score=0.5) for y, x in places]
        metrics.update(candidates, 1, mask)
        found = metrics.compute()

        num, regions = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
        reached: set[int] = set()
        num_false = 0
        for y, x in places:
            distance = {
                region: min(np.hypot(*(pixel - (y, x))) for pixel in np.argwhere(regions == region))
                for region in range(1, num)
            }
            within = {r for r, d in distance.items() if d <= radius}
            nearest = [r for r in within if distance[r] == min(distance.values())]
            num_false += not within
            if len(nearest) == 1:
                reached |= set(nearest)
        # where two are equally near, either may be taken
        assert found["recall"] >= len(reached) / (num - 1)
        assert found["false_per_image"] == num_false


class TestWhatIsDecided:
    def test_by_a_classifier_are_errors_at_its_own_confidence(self) -> None:
        metrics = ClassificationMetrics(3)
        sure, unsure = np.array([9.0, 0, 0]), np.array([1.0, 0.5, 0])
        for logits, label in ((sure, 0), (sure, 1), (sure, 1), (unsure, 0), (unsure, 2)):
            metrics.update(logits, label)

        (decided,) = metrics.evaluation(["ash", "elm", "oak"]).decisions

        rates = {name: rate.fraction for name, rate in decided.rates.items()}
        assert rates == {
            "errors": "3 of 5",
            "errors of those at 0.9 or more": "2 of 3",
            "errors of those below 0.9": "1 of 2",
        }
        assert {kind: part["errors"].fraction for kind, part in decided.kinds.items()} == {
            "ash": "0 of 2",
            "elm": "2 of 2",
            "oak": "1 of 1",
        }
        assert decided.warnings == (
            "gets 3 of 5 labelled pictures wrong",
            "is wrong in 2 of 3 answers that it is 90 % sure of",
        )

    def test_of_strips_are_defects_missed_and_candidates_false(self) -> None:
        mask = np.zeros((20, 20), bool)
        mask[4, 4] = mask[14, 14] = True
        images, found = AnomalyMetrics(), CandidateMetrics(2.0, 0.5)
        for scores, label in (((0.9, 0.3, 0.6), 1), ((0.2, 0.1, 0.1), 1), ((0.1, 0.1, 0.7), 0)):
            places = ((4, 4), (14, 14), (4, 14))
            candidates = [Candidate(x, y, s) for (x, y), s in zip(places, scores, strict=True)]
            images.update(max(scores), label, np.zeros((20, 20)), mask if label else None)
            found.update(candidates, label, mask if label else None)
        kinds = ["spot", "spot", "good"]

        judged = found.added_to(images.evaluation("candidate", 0.5, kinds), kinds)

        shipped = judged.decisions[0]
        assert {name: rate.fraction for name, rate in shipped.rates.items()} == {
            "false rejects": "1 of 1",
            "misses": "1 of 2",
            "missed defects": "3 of 4",
            "false candidates": "2 of 3",
        }
        assert shipped.kinds["spot"]["missed defects"].fraction == "3 of 4"
        assert judged.metrics["recall"] == 0.25
        assert shipped.warnings == (
            "rejects 1 of 1 good pictures at its border",
            "misses 3 of 4 single defects at its border",
            "2 of 3 candidates at its border are false",
        )

    def test_of_good_strips_alone_are_false_rejects(self) -> None:
        images, found = AnomalyMetrics(), CandidateMetrics(2.0, 0.5)
        images.update(0.7, 0, np.zeros((4, 4)), None)
        found.update([Candidate(1, 1, 0.7)], 0, None)

        judged = found.added_to(images.evaluation("candidate", 0.5, ["good"]), ["good"])

        assert judged.metrics == {}
        (shipped,) = judged.decisions
        assert shipped.rates["false candidates"].fraction == "1 of 1"
        assert shipped.warnings == ("rejects 1 of 1 good pictures at its border",)
