from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from engineworks.runtime.results import (
    AnomalyMap,
    Candidate,
    Classification,
    DefectMap,
    Detection,
    Detections,
)


def result(**changes: Any) -> AnomalyMap:
    values = np.arange(8, dtype=np.float32).reshape(2, 4)
    content = {
        "score": 3.25,
        "threshold": 3.0,
        "pixel_threshold": 6.0,
        "map_HW": values,
        "influence_HW": values,
    }
    return AnomalyMap(**{**content, **changes})


class TestAnAnomalyMap:
    @pytest.mark.parametrize(
        ("score", "label"), [(2.999, "normal"), (3.0, "anomalous"), (3.1, "anomalous")]
    )
    def test_is_anomalous_at_its_threshold_and_above(self, score: float, label: str) -> None:
        assert result(score=score).is_anomalous == (label == "anomalous")
        assert result(score=score).to_json()["label"] == label

    def test_tells_the_share_of_pixels_at_their_threshold_and_above(self) -> None:
        assert result().to_json()["anomalous_area"] == 0.25

    def test_goes_into_one_json_line_as_plain_numbers(self) -> None:
        found = result(score=np.float32(3.25), threshold=np.float64(1 / 3))

        assert json.loads(json.dumps(found.to_json())) == {
            "label": "anomalous",
            "score": 3.25,
            "threshold": 0.333333,
            "anomalous_area": 0.25,
        }

    def test_cannot_be_changed(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            result().score = 0.0  # type: ignore[misc]

    def test_can_be_compared_and_kept_in_a_set(self) -> None:
        one, other = result(), result()

        assert len({one, other, one}) == 2
        assert one != other

    def test_says_in_a_line_what_it_found(self) -> None:
        assert result(score=3.211).summary() == "anomalous, score 3.21 (border 3.00)"
        assert result(score=1.0).summary() == "normal, score 1.00 (border 3.00)"


class TestAClassification:
    def result(self) -> Classification:
        return Classification(
            label="wheat",
            index=2,
            probability=np.float64(0.9213456789),
            top=(("wheat", np.float64(0.9213456789)), ("rye", 0.05)),
            embedding_F=np.zeros(4, np.float32),
        )

    def test_goes_into_one_json_line_best_first(self) -> None:
        assert json.loads(json.dumps(self.result().to_json())) == {
            "label": "wheat",
            "probability": 0.921346,
            "top": [
                {"label": "wheat", "probability": 0.921346},
                {"label": "rye", "probability": 0.05},
            ],
        }

    def test_says_in_a_line_what_it_found(self) -> None:
        assert self.result().summary() == "wheat 0.92, rye 0.05"

    def test_says_how_sure_it_is_where_it_knows(self) -> None:
        known = dataclasses.replace(self.result(), prediction_set=("wheat",), is_unknown=False)
        unknown = dataclasses.replace(self.result(), prediction_set=(), is_unknown=True)

        assert known.to_json() == {**self.result().to_json(), "unknown": False, "set": ["wheat"]}
        assert known.summary() == "wheat 0.92, rye 0.05"
        assert unknown.to_json()["set"] == []
        assert unknown.summary() == "unknown: wheat 0.92, rye 0.05"

    def test_cannot_be_changed(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            self.result().label = "oat"  # type: ignore[misc]


class TestDefectMap:
    def result(self, threshold: float) -> DefectMap:
        candidates = (Candidate(x=7, y=3, score=0.91234567), Candidate(x=1, y=2, score=0.25))
        return DefectMap(np.zeros((4, 9), np.float32), candidates, threshold)

    def test_holds_for_defects_what_reaches_the_threshold(self) -> None:
        assert [d.x for d in self.result(0.25).defects] == [7, 1]
        assert [d.x for d in self.result(0.5).defects] == [7]
        assert not self.result(0.95).is_defective
        assert self.result(0.95).score == 0.91234567

    def test_goes_into_one_json_line_with_its_defects(self) -> None:
        assert json.loads(json.dumps(self.result(0.5).to_json())) == {
            "label": "defective",
            "score": 0.912346,
            "threshold": 0.5,
            "num_defects": 1,
            "defects": [{"x": 7, "y": 3, "score": 0.912346}],
        }

    @pytest.mark.parametrize(
        ("threshold", "line"),
        [
            (0.2, "2 defects, score 0.91 (border 0.20)"),
            (0.5, "1 defect, score 0.91 (border 0.50)"),
            (0.95, "good, score 0.91 (border 0.95)"),
        ],
    )
    def test_says_in_a_line_what_it_found(self, threshold: float, line: str) -> None:
        assert self.result(threshold).summary() == line


class TestDetections:
    RESULT = Detections(
        (
            Detection("cup", 0.91234567, (1.004, 2.0, 30.25, 40.126), track=4),
            Detection("jar", 0.5, (0.0, 0.0, 5.0, 6.0)),
        )
    )

    def test_go_into_one_json_line_with_every_object(self) -> None:
        assert json.loads(json.dumps(self.RESULT.to_json())) == {
            "num_objects": 2,
            "best": "cup",
            "score": 0.912346,
            "objects": [
                {
                    **{"name": "cup", "score": 0.912346, "track": 4},
                    **{"x1": 1.0, "y1": 2.0, "x2": 30.25, "y2": 40.13},
                },
                {
                    **{"name": "jar", "score": 0.5, "track": None},
                    **{"x1": 0.0, "y1": 0.0, "x2": 5.0, "y2": 6.0},
                },
            ],
        }

    def test_of_nothing_have_no_best_one(self) -> None:
        assert Detections(()).to_json() == {
            **{"num_objects": 0, "best": None, "score": None, "objects": []}
        }

    def test_say_in_a_line_what_was_found(self) -> None:
        assert self.RESULT.summary() == "cup 0.91, jar 0.50"
        assert Detections(()).summary() == "nothing"
