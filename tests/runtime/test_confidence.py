from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import optimize

from engineworks.runtime.confidence import (
    Confidence,
    conformal_limit,
    fit_probabilities,
    fit_temperature,
    generalised_entropy,
)
from engineworks.runtime.errors import InputError
from engineworks.runtime.metrics import ClassificationMetrics, log_softmax
from engineworks.runtime.tensors import Array


def drawn(count: int, seed: int, *, heat: float = 1.0, num_classes: int = 6) -> tuple[Array, Array]:
    """Logits whose softmax at the temperature ``heat`` is each class's true chance, and labels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, (count, num_classes))
    chances = np.exp(log_softmax(logits))
    labels = np.array([rng.choice(num_classes, p=row) for row in chances])
    return (heat * logits).astype(np.float32), labels


class TestATemperature:
    @pytest.mark.parametrize("heat", [0.3, 1.0, 4.0])
    def test_is_the_one_that_the_answers_were_drawn_with(self, heat: float) -> None:
        logits, labels = drawn(4000, 0, heat=heat)
        # the spread of the estimate over such draws is 2 %
        assert fit_temperature(logits, labels) == pytest.approx(heat, rel=0.06)

    @given(st.integers(2, 60), st.integers(2, 8), st.integers(0, 2**32 - 1))
    @settings(max_examples=40, deadline=None)
    def test_is_the_likeliest_with_one_picture_of_doubt(
        self, count: int, num_classes: int, seed: int
    ) -> None:
        logits, labels = drawn(count, seed, num_classes=num_classes)
        wanted = np.full(logits.shape, 1 / (count + 2) / (num_classes - 1))
        wanted[np.arange(count), labels] = 1 - 1 / (count + 2)

        def loss(log_t: float) -> float:
            log_p = log_softmax(logits.astype(np.float64) / math.exp(log_t))
            return -float((wanted * log_p).sum())

        found = fit_temperature(logits, labels)
        edges = (math.log(1e-3), math.log(1e3))
        best = optimize.minimize_scalar(loss, bounds=edges, method="bounded")
        assert loss(math.log(found)) <= best.fun + 1e-6 * abs(best.fun)

    @pytest.mark.parametrize("count", [5, 50, 500])
    def test_of_answers_that_are_all_right_is_not_that_of_certainty(self, count: int) -> None:
        """Of so many pictures one may still be wrong."""
        logits = np.tile(np.float32([[4, 0, 0]]), (count, 1))
        found = fit_temperature(logits, np.zeros(count, int))
        probability = np.exp(log_softmax(logits[0].astype(np.float64) / found))[0]
        assert probability == pytest.approx(1 - 1 / (count + 2), rel=1e-9)

    def test_stays_within_its_range_where_nothing_tells(self) -> None:
        assert fit_temperature(np.zeros((4, 3), np.float32), np.zeros(4, int)) <= 1000.001
        backwards = np.tile(np.float32([[9, 0, 0]]), (4, 1))
        assert fit_temperature(backwards, np.ones(4, int)) == pytest.approx(1000)

    def test_takes_the_calibration_error_from_a_net_that_is_too_sure(self) -> None:
        logits, labels = drawn(4000, 1, heat=3)
        fitted, _ = Confidence.fit(logits, labels)
        others, classes = drawn(4000, 2, heat=3)

        before = ClassificationMetrics.of(others, classes).compute()["ece"]
        after = ClassificationMetrics.of(fitted.log_probabilities(others), classes).compute()["ece"]

        assert before > 0.15
        assert after < 0.03  # as many pictures of a perfect classifier show 0.02


class TestEqualChances:
    def drawn(self, equal: float, count: int = 4000) -> tuple[Array, Array]:
        """Logits, and labels of which that share has nothing to do with them."""
        rng = np.random.default_rng(0)
        logits = 3 * rng.normal(size=(count, 5))
        odds = np.exp(logits)
        told = (odds.cumsum(1) / odds.sum(1, keepdims=True) < rng.random((count, 1))).sum(1)
        blind = rng.random(count) < equal
        return logits.astype(np.float32), np.where(blind, rng.integers(5, size=count), told)

    def test_are_found_where_some_labels_have_no_sign_of_themselves(self) -> None:
        temperature, equal = fit_probabilities(*self.drawn(0.08))
        assert equal == pytest.approx(0.08)
        assert temperature == pytest.approx(1, abs=0.06)

    def test_are_none_where_a_temperature_says_all(self) -> None:
        logits, labels = self.drawn(0.0)
        assert fit_probabilities(logits, labels) == (fit_temperature(logits, labels), 0.0)

    def test_are_not_asked_of_so_few_pictures(self) -> None:
        logits, labels = self.drawn(0.5, count=4)
        assert fit_probabilities(logits, labels) == (fit_temperature(logits, labels), 0.0)

    def test_make_probabilities_that_add_up(self) -> None:
        logits, labels = self.drawn(0.08)
        fitted, _ = Confidence.fit(logits, labels)
        odds = np.exp(logits.astype(np.float64) / fitted.temperature)
        want = (1 - fitted.equal) * odds / odds.sum(1, keepdims=True) + fitted.equal / 5
        np.testing.assert_allclose(np.exp(fitted.log_probabilities(logits)), want, rtol=1e-12)
        assert fitted.equal > 0

    def test_take_the_calibration_error_that_a_temperature_leaves(self) -> None:
        logits, labels = self.drawn(0.08)
        half = len(labels) // 2
        fitted, _ = Confidence.fit(logits[:half], labels[:half])
        alone = logits[half:] / fit_temperature(logits[:half], labels[:half])
        error, before = (
            ClassificationMetrics.of(each, labels[half:]).compute()["ece"]
            for each in (fitted.log_probabilities(logits[half:]), alone)
        )
        assert error < 0.6 * before

    def test_come_with_the_likeliest_temperature_beside_them(self) -> None:
        logits, labels = self.drawn(0.08)
        temperature, equal = fit_probabilities(logits, labels)
        doubt = 1 / (len(labels) + 2)
        wanted = np.full(logits.shape, doubt / 4)
        wanted[np.arange(len(labels)), labels] = 1 - doubt

        def lack(heat: float) -> float:
            chance = np.exp(log_softmax(logits.astype(np.float64) / heat))
            return -float((wanted * np.log((1 - equal) * chance + equal / 5)).sum())

        want = optimize.minimize_scalar(lack, bounds=(0.2, 5), method="bounded").x
        assert temperature == pytest.approx(want, rel=1e-3)


class TestALimit:
    def test_is_the_ranked_probability_of_the_right_class(self) -> None:
        right = np.array([0.1, 0.9, 0.3, 0.7, 0.5, 0.2, 0.8, 0.6, 0.4])

        assert conformal_limit(right, 0.5) == 0.5  # the fifth largest of nine
        assert conformal_limit(right, 0.51) == 0.4
        assert conformal_limit(right, 0.9) == 0.1
        assert conformal_limit(right, 0.1) == 0.9

    def test_takes_everything_where_so_few_pictures_cannot_promise_it(self) -> None:
        assert conformal_limit(np.full(8, 0.7), 0.9) == 0.0
        assert conformal_limit(np.full(9, 0.7), 0.9) == 0.7

    @pytest.mark.parametrize(("count", "coverage"), [(15, 0.8), (40, 0.9), (200, 0.9)])
    def test_covers_as_often_as_it_says_whatever_the_classifier(
        self, count: int, coverage: float
    ) -> None:
        """Over many draws of calibration pictures, even of a classifier that is far too sure."""
        covered = []
        for seed in range(150):
            fitted, _ = Confidence.fit(*drawn(count, 2 * seed, heat=5), coverage=coverage)
            logits, labels = drawn(200, 2 * seed + 1, heat=5)
            right = fitted.log_probabilities(logits)[np.arange(200), labels]
            covered.append(float((np.exp(right) >= fitted.limit).mean()))
        # at least what is promised, at most 1 / (N + 1) more; 150 draws differ by less than 0.02
        assert coverage - 0.02 <= np.mean(covered) <= coverage + 1 / (count + 1) + 0.02


class TestAConfidence:
    def test_calls_about_the_share_of_its_budget_unknown(self) -> None:
        fitted, unknown = Confidence.fit(*drawn(2000, 3), budget=0.1)
        logits, _ = drawn(2000, 4)

        unlike = fitted.unlikeness(fitted.log_probabilities(logits))

        assert (unlike >= unknown.value).mean() == pytest.approx(0.1, abs=0.025)
        assert unknown.source == "false-reject budget 0.1 on 2000 validation pictures"
        assert unknown.held_out is not None and unknown.held_out.count == 2000

    def test_scores_what_is_unknown_as_it_says(self) -> None:
        fitted, _ = Confidence.fit(*drawn(50, 5))
        log = np.log([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]])

        entropy = [sum((p * (1 - p)) ** 0.1 for p in (0.7, 0.2, 0.1)), 3 * (2 / 9) ** 0.1]
        np.testing.assert_allclose(fitted.unlikeness(log), entropy, rtol=1e-12)
        before = fitted.model_copy(update={"novelty": "surprise"})
        np.testing.assert_allclose(before.unlikeness(log), [-np.log(0.7), np.log(3)], rtol=1e-12)

    def test_takes_the_surprise_where_a_bundle_of_before_does_not_say(self) -> None:
        kept = Confidence.fit(*drawn(50, 5))[0].model_dump(exclude={"novelty"})
        assert Confidence.model_validate(kept).novelty == "surprise"

    def test_comes_back_from_json(self) -> None:
        fitted, _ = Confidence.fit(*drawn(50, 5))
        assert Confidence.model_validate_json(fitted.model_dump_json()) == fitted
        assert fitted.num_pictures == 50

    def test_divides_logits_in_double_precision(self) -> None:
        fitted, _ = Confidence.fit(*drawn(50, 5))
        logits = np.float32([1e4, -1e4, 0])
        want = log_softmax(logits.astype(np.float64) / fitted.temperature)
        np.testing.assert_array_equal(fitted.log_probabilities(logits), want)

    def test_is_not_changed(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            Confidence.fit(*drawn(20, 0))[0].limit = 0.5  # type: ignore[misc]

    def test_needs_pictures(self) -> None:
        with pytest.raises(InputError, match="labelled pictures"):
            Confidence.fit(np.zeros((0, 3), np.float32), np.zeros(0, int))

    @pytest.mark.parametrize("shares", [{"coverage": 1.0}, {"coverage": 0.0}, {"budget": 1.0}])
    def test_needs_shares_between_nothing_and_all(self, shares: dict[str, float]) -> None:
        with pytest.raises(InputError, match="above 0 and below 1") as caught:
            Confidence.fit(*drawn(20, 0), **shares)
        assert caught.value.fix is not None

    @pytest.mark.parametrize(
        "change",
        [
            *({"temperature": each} for each in (0.0, 2000.0)),
            *({"limit": each} for each in (-0.1, 1.5)),
            *({name: each} for name in ("coverage", "budget") for each in (0.0, 1.0)),
            {"num_pictures": 0},
        ],
    )
    def test_of_no_sense_is_refused(self, change: dict[str, float]) -> None:
        content = Confidence.fit(*drawn(20, 0))[0].model_dump() | change
        with pytest.raises(ValidationError):
            Confidence.model_validate(content)


class TestTheGeneralisedEntropy:
    def test_is_nothing_where_a_class_is_certain(self) -> None:
        assert generalised_entropy(np.array([0.0, -np.inf, -np.inf])) == 0

    def test_looks_at_the_ten_largest_alone(self) -> None:
        faint = np.full(30, 1e-9)
        many = np.log(np.concatenate([np.full(10, 0.1), faint]))
        assert generalised_entropy(many) == pytest.approx(10 * (0.1 * 0.9) ** 0.1, rel=1e-12)

    def test_rises_by_a_second_class_that_is_faint(self) -> None:
        """As sure of the best class: what the others share of the rest counts."""
        one, several = np.log([0.9, 0.1 - 3e-12, 1e-12, 1e-12, 1e-12]), np.log([0.9, *[0.025] * 4])
        assert generalised_entropy(several) > 1.5 * generalised_entropy(one)
