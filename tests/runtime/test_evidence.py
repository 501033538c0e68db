from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime.evidence import (
    Drop,
    Evidence,
    PixelRanking,
    Ranking,
    Shares,
    paired_drops,
    resamples,
)
from engineworks.runtime.metrics import AnomalyMetrics, CandidateMetrics
from engineworks.runtime.pixels import Pixels
from engineworks.runtime.results import Candidate
from engineworks.runtime.tensors import Array

KINDS = ["good"] * 4 + ["crack"] * 4
LABELS = [0, 0, 0, 0, 1, 1, 1, 1]


def counts_of(seed: int, num_pictures: int, rounds: int = 5) -> Array:
    """All pictures once, and a few resamples of them."""
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(num_pictures, np.full(num_pictures, 1 / num_pictures), rounds)
    return np.array([np.ones(num_pictures, np.int64), *drawn])


def repeated(items: list[Any], counts: Array) -> list[Any]:
    return [item for item, count in zip(items, counts, strict=True) for _ in range(count)]


def pictures(seed: int) -> list[tuple[float, int, Array, Array]]:
    """Score, label, map and mask of eight pictures; some of the scores are equal."""
    rng = np.random.default_rng(seed)
    made = []
    for label in LABELS:
        mask = np.zeros((12, 10), bool)
        if label:
            mask[2:5, 3:7] = True
        scores = rng.normal(size=mask.shape) + 1.5 * mask
        made.append((float(rng.integers(0, 6)) + label, label, scores.astype(np.float32), mask))
    return made


def judged(made: list[tuple[float, int, Array, Array]]) -> AnomalyMetrics:
    metrics = AnomalyMetrics()
    for picture in made:
        metrics.update(*picture)
    return metrics


class TestEvidenceGivesTheMetricsOfPicturesThatWereJudgedAnew:
    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_of_image_scores_exactly_and_of_pixels_within_their_bins(self, seed: int) -> None:
        made, counts = pictures(seed), counts_of(seed, 8)
        image, pixel = judged(made).evaluation("image", 1.0, KINDS).evidence
        got = image.resampled(counts) | pixel.resampled(counts)

        for row, chosen in enumerate(counts):
            wanted = judged(repeated(made, chosen)).compute()
            for name in ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap"):
                if name not in wanted:
                    assert np.isnan(got[name][row])
                    continue
                # 960 pixels in 1024 bins: each defective one has its own, normal ones share some
                tolerance = 1e-9 if name.startswith("image") else 0.005
                assert got[name][row] == pytest.approx(wanted[name], abs=tolerance)

    @settings(max_examples=20, deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_of_candidates_exactly(self, seed: int) -> None:
        rng, counts = np.random.default_rng(seed), counts_of(seed, 8)
        mask = np.zeros((20, 20), bool)
        mask[4, 4] = mask[14, 14] = True
        made = []
        for label in LABELS:
            places = [(4, 4), (14, 14), (4, 14), (14, 4)]
            scores = np.sort(rng.integers(0, 8, 4))[::-1]  # few values: some are equal
            candidates = [
                Candidate(x, y, float(score))
                for (x, y), score in zip(rng.permutation(places).tolist(), scores, strict=True)
            ]
            made.append((candidates, label, mask if label else None))

        def metrics(of: list[Any]) -> CandidateMetrics:
            found = CandidateMetrics(2.0)
            for picture in of:
                found.update(*picture)
            return found

        empty = AnomalyMetrics().evaluation("candidate", None, [])
        (evidence,) = metrics(made).added_to(empty, KINDS).evidence
        got = evidence.resampled(counts)["recall_at_1_false"]

        for row, chosen in enumerate(counts):
            wanted = metrics(repeated(made, chosen)).compute().get("recall_at_1_false", np.nan)
            assert got[row] == pytest.approx(wanted, nan_ok=True)

    def test_of_shares_exactly(self) -> None:
        counts = counts_of(0, 4)
        got = Shares("top1", np.array([1, 0, 1, 0]), np.array([1, 1, 1, 0])).resampled(counts)
        wanted = [(row[0] + row[2]) / row[:3].sum() if row[:3].any() else np.nan for row in counts]
        assert got["top1"] == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize("bins", [16, 256, 1024])
def test_binning_moves_a_pixel_auroc_by_less_than_it_says(bins: int) -> None:
    rng = np.random.default_rng(3)
    masks = [rng.uniform(size=(40, 50)) < 0.05 for _ in range(10)]
    maps = [(rng.normal(size=mask.shape) + 1.2 * mask).astype(np.float32) for mask in masks]
    metrics, pixels = AnomalyMetrics(), Pixels()
    for scores, mask in zip(maps, masks, strict=True):
        pixels.add(scores, mask)
        metrics.update(0.0, int(mask.any()), scores, mask)

    binned = PixelRanking("pixel", pixels, bins=bins)
    (found,) = binned.resampled(np.ones((1, 10), np.int64))["pixel_auroc"]

    assert abs(found - metrics.compute()["pixel_auroc"]) < 1 / bins


class TestResamples:
    def test_have_as_many_of_each_group_as_there_are(self) -> None:
        groups = np.array([0, 1, 0, 1, 1, 0, 0])
        counts = np.concatenate(list(resamples(groups, rounds=250)))

        assert counts.shape == (250, 7)
        assert (counts[:, groups == 0].sum(axis=1) == 4).all()
        assert (counts[:, groups == 1].sum(axis=1) == 3).all()
        assert counts.mean(axis=0) == pytest.approx(1, abs=0.3)  # 5 sd of a mean of 250

    def test_are_the_same_each_time(self) -> None:
        first, second = (list(resamples(np.zeros(5), rounds=3)) for _ in range(2))
        assert np.array_equal(first, second)


def top1(right: Array) -> list[Evidence]:
    return [Shares("top1", right.astype(np.int64), np.ones(len(right), np.int64))]


class TestPairedDrops:
    def test_are_those_of_a_plain_loop(self) -> None:
        before, after = judged(pictures(1)), judged(pictures(2))
        groups, names = np.array(LABELS), ("image_auroc", "image_ap")
        sides = [each.evaluation("image", 1.0, KINDS) for each in (before, after)]
        exact = {name: sides[0].metrics[name] - sides[1].metrics[name] for name in names}

        got = paired_drops(exact, sides[0].evidence, sides[1].evidence, groups, rounds=200)

        drawn: dict[str, list[float]] = {name: [] for name in names}
        for chosen in np.concatenate(list(resamples(groups, rounds=200))):
            again = [judged(repeated(pictures(seed), chosen)).compute() for seed in (1, 2)]
            for name in names:
                drawn[name].append(again[0][name] - again[1][name])
        for name in names:
            assert got[name].value == exact[name]
            # both in float64, sums in another order
            assert got[name].interval == pytest.approx(np.percentile(drawn[name], [2.5, 97.5]))

    def test_do_not_depend_on_how_much_is_counted_at_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sides = [judged(pictures(seed)).evaluation("image", 1.0, KINDS) for seed in (1, 2)]
        evidence = [side.evidence for side in sides]
        exact = dict.fromkeys(("image_auroc", "pixel_auroc", "pixel_ap"), 0.1)
        whole = paired_drops(exact, *evidence, np.array(LABELS))
        monkeypatch.setattr("engineworks.runtime.evidence._COUNTS_AT_ONCE", 30)
        monkeypatch.setattr("engineworks.runtime.evidence._PICTURES_AT_ONCE", 3)
        assert paired_drops(exact, *evidence, np.array(LABELS)) == whole

    def test_are_moved_by_what_binning_costs(self) -> None:
        """The interval is that of the exact value, wherever the bins put it."""
        sides = [judged(pictures(seed)).evaluation("image", 1.0, KINDS) for seed in (1, 2)]
        evidence = [side.evidence for side in sides]
        drop, moved = (
            paired_drops({"pixel_auroc": value}, *evidence, np.array(LABELS))["pixel_auroc"]
            for value in (0.0, 0.25)
        )
        assert drop.interval is not None and moved.interval is not None
        assert np.subtract(moved.interval, drop.interval) == pytest.approx(0.25)

    def test_cancel_what_is_hard_for_both(self) -> None:
        """The pictures differ far more than the systems do."""
        rng = np.random.default_rng(0)
        labels = np.repeat([0, 1], 100)
        scores = rng.normal(size=200) + labels
        shaken = scores + rng.normal(0, 0.01, 200)
        first, second = ([Ranking("image", each, labels == 1)] for each in (scores, shaken))
        far = [Ranking("image", rng.permutation(scores[:100]).repeat(2), labels == 1)]

        def width(other: list[Ranking]) -> float:
            interval = paired_drops({"image_auroc": 0.0}, first, other, labels)["image_auroc"]
            assert interval.interval is not None
            return interval.interval[1] - interval.interval[0]

        assert width(second) < 0.1 * width(far)

    def test_cover_the_true_drop_about_as_often_as_they_say(self) -> None:
        """Top-1 of two classifiers that fall by 5 points, on 300 sets of 120 pictures."""
        rng = np.random.default_rng(1)
        covered = 0
        for _ in range(300):
            before = rng.uniform(size=120) < 0.9
            # each is lost with 0.05 / 0.9 + 0.2 * 0.1 / 0.9, each wrong one gained with 0.2
            lost = rng.uniform(size=120) < 0.07 / 0.9
            after = np.where(before, ~lost, rng.uniform(size=120) < 0.2)
            exact = {"top1": float(before.mean() - after.mean())}
            drop = paired_drops(exact, top1(before), top1(after), np.zeros(120), rounds=300)["top1"]
            assert drop.interval is not None
            covered += drop.interval[0] <= 0.05 <= drop.interval[1]
        # 95 % of 300 is 285; 4 sd below and some for a percentile interval of 120 pictures
        assert 262 <= covered <= 298

    def test_of_answers_that_are_all_the_same_say_what_they_may_have_missed(self) -> None:
        right = np.array([True, True, False, True] * 5)
        drop = paired_drops({"top1": 0.0}, top1(right), top1(right), np.zeros(20))["top1"]

        assert drop.unseen
        assert drop.interval == (-3 / 20, 3 / 20)  # the rule of three
        assert not drop.settled(0.01) and drop.needed(0.01) == 300

    def test_have_no_interval_where_no_evidence_tells_of_the_metric(self) -> None:
        drop = paired_drops({"nll": 0.3}, [], [], np.zeros(20))["nll"]
        assert drop == Drop(0.3, 20)
        assert drop.settled(0.1) and drop.needed(0.1) is None


class TestADrop:
    def test_of_just_what_is_allowed_does_not_exceed_it(self) -> None:
        assert not Drop(0.005, 200).exceeds(0.005)
        assert not Drop(0.0, 200).exceeds(0.0)
        assert Drop(0.005 + 1e-8, 200).exceeds(0.005)

    def test_is_settled_where_the_interval_ends_at_what_is_allowed(self) -> None:
        """At it is within; so an interval that begins there is not beyond."""
        assert Drop(0.001, 200, (-0.001, 0.005)).settled(0.005)
        assert not Drop(0.009, 200, (0.005, 0.012)).settled(0.005)

    @pytest.mark.parametrize(
        ("value", "interval", "settled", "needed"),
        [
            (0.001, (-0.001, 0.003), True, None),
            (0.009, (0.006, 0.012), True, None),
            # half an interval of .008 must shrink to .002: sixteen times as many
            (0.003, (-0.004, 0.011), False, 3200),
            (0.007, (-0.001, 0.014), False, 3200),
            (0.005, (-0.001, 0.014), False, None),
            (1 - 0.995, (-0.001, 0.014), False, None),  # 0.0050000000000000044
        ],
        ids=[
            "within",
            "beyond",
            "within, perhaps",
            "beyond, perhaps",
            "at the border",
            "at it but for rounding",
        ],
    )
    def test_is_told_from_noise_or_says_how_many_pictures_would(
        self, value: float, interval: tuple[float, float], settled: bool, needed: int | None
    ) -> None:
        drop = Drop(value, 200, interval)
        assert drop.settled(0.005) == settled
        assert drop.exceeds(0.005) == (value > 0.0051)
        if not settled:
            assert drop.needed(0.005) == pytest.approx(needed, abs=1)
