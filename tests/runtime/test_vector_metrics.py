from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime.errors import InputError
from engineworks.runtime.metrics import (
    leave_one_out,
)
from engineworks.runtime.spool import Spool


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
