from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime.metrics import (
    CandidateMetrics,
)
from engineworks.runtime.results import Candidate


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

    def test_where_no_budget_is_used_up_all_finds_count(self) -> None:
        metrics = CandidateMetrics(radius=0)
        false = Candidate(x=0, y=0, score=0.9)
        true = Candidate(x=20, y=20, score=0.1)
        metrics.update([false, true], 1, self.mask((20, 20, 1, 1)))

        assert metrics.compute()["recall_at_1_false"] == 1.0

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
