from __future__ import annotations

import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engineworks.runtime.errors import InputError
from engineworks.runtime.metrics import (
    ClassificationMetrics,
    log_softmax,
)


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
