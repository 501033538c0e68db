from __future__ import annotations

from itertools import pairwise
from pathlib import Path

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
)
from engineworks.runtime.results import Candidate

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
