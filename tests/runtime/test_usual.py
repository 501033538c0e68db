from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from engineworks.runtime.results import Classification, Detection, Detections, Embedding
from engineworks.runtime.usual import Drift, Usual, brightness, score_of

LEVELS = [100.0 + i for i in range(21)]
USUAL = Usual.of([(level, level / 100) for level in LEVELS])


def drift_of(levels: list[float], scores: list[float] | None = None) -> Drift:
    drift = Drift(USUAL)
    for i, level in enumerate(levels):
        drift.add(level, 1.1 if scores is None else scores[i])
    return drift


class TestUsual:
    def test_is_quantiles(self) -> None:
        assert USUAL.num == 21
        assert USUAL.brightness == (100, 101, 110, 119, 120)
        assert USUAL.score == (1.0, 1.01, 1.1, 1.19, 1.2)

    def test_of_answers_without_scores_is_of_the_pictures_alone(self) -> None:
        assert Usual.of([(3.0, None)]).score is None

    def test_survives_json(self) -> None:
        reports = json.loads(json.dumps({"usual": USUAL.model_dump(mode="json")}))
        assert Usual.in_reports(reports) == USUAL
        assert Usual.in_reports({}) is None

    @pytest.mark.parametrize(
        "wrong", [{}, {"num": 0}, {"num": 1, "brightness": [1, 2]}, {"num": 1, "brightness": "x"}]
    )
    def test_of_a_broken_bundle_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValidationError):
            Usual.in_reports({"usual": wrong})

    def test_brightness_is_in_the_unit_of_the_pixels(self) -> None:
        assert brightness(np.full((9, 13, 3), 40000, np.uint16)) == 40000
        assert brightness(np.zeros((1, 1, 3), np.uint8)) == 0

    def test_scores_are_those_of_results(self) -> None:
        vector = np.zeros(3, np.float32)
        assert score_of(Classification("a", 0, 0.75, (("a", 0.75),), vector)) == 0.75
        assert score_of(Detections((Detection("a", 0.5, (0, 0, 1, 1)),))) == 0.5
        assert score_of(Detections(())) == 0
        assert score_of(Embedding(vector)) is None


class TestDrift:
    def test_is_seen_where_most_pictures_are_outside(self) -> None:
        assert set(drift_of([130.0] * 60).signs) == {"brightness"}
        assert set(drift_of([90.0] * 60).signs) == {"brightness"}
        both = drift_of([130.0] * 60, [2.0] * 60)
        assert set(both.signs) == {"brightness", "score"}
        assert "130" in both.signs["brightness"] and "101 to 119" in both.signs["brightness"]

    def test_is_of_the_middle_nine_tenths(self) -> None:
        assert drift_of([100.5] * 60).signs and drift_of([119.5] * 60).signs
        assert drift_of([101.5] * 60).signs == drift_of([118.5] * 60).signs == {}

    def test_is_none_where_pictures_are_alike_as_those_of_a_fixed_camera_are(self) -> None:
        assert drift_of([110.0] * 300).signs == {}

    @given(st.lists(st.sampled_from(LEVELS[1:-1]), min_size=50, max_size=250))
    def test_is_none_within_what_is_usual(self, levels: list[float]) -> None:
        assert drift_of(levels).signs == {}

    def test_needs_some_pictures_and_forgets_old_ones(self) -> None:
        assert drift_of([130.0] * 49).signs == {}
        assert drift_of([130.0] * 500 + [110.0] * 200).signs == {}
        assert drift_of([110.0] * 500 + [130.0] * 101).signs

    def test_is_told_as_json(self) -> None:
        told = drift_of([130.0] * 60).to_json()
        assert told["brightness"] == {"recent": [130.0] * 3, "calibration": [101, 110, 119]}
        assert told["drifted"] == ["brightness"]

    def test_of_a_bundle_that_does_not_know_is_nothing(self) -> None:
        drift = Drift(None)
        drift.add(1.0, 2.0)
        assert drift.signs == {}
        assert drift.to_json() == {"drifted": []}
