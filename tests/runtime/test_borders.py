from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from engineworks.runtime.borders import HeldOut, border
from engineworks.runtime.errors import InputError


def drawn(count: int, seed: int = 0, location: float = 2.0, scale: float = 0.3) -> np.ndarray:
    scores = stats.gumbel_r(location, scale).rvs(count, random_state=seed)
    return np.asarray(scores, np.float32)


class TestHeldOutScores:
    def test_keep_their_quantiles(self) -> None:
        scores = drawn(300)
        held_out = HeldOut.of(scores)
        assert held_out.count == 300
        for share in (0.0, 0.005, 0.5, 0.97, 1.0):
            # an exact knot of the kept quantiles
            assert held_out.quantile(share) == pytest.approx(float(np.quantile(scores, share)))

    @pytest.mark.parametrize("scores", [[], [1.0, np.nan], [np.inf]])
    def test_must_be_there_and_finite(self, scores: list[float]) -> None:
        with pytest.raises(InputError, match="finite"):
            HeldOut.of(np.array(scores, np.float32))

    def test_survive_json(self) -> None:
        held_out = HeldOut.of(drawn(20))
        assert HeldOut.model_validate_json(held_out.model_dump_json()) == held_out

    @pytest.mark.parametrize("change", [{"count": 0}, {"quantiles": [1.0] * 200}])
    def test_of_another_form_are_refused(self, change: dict[str, object]) -> None:
        content = HeldOut.of(drawn(20)).model_dump() | change
        with pytest.raises(ValidationError):
            HeldOut.model_validate(content)

    def test_must_ascend(self) -> None:
        content = HeldOut.of(drawn(20)).model_dump()
        content["quantiles"] = content["quantiles"][::-1]
        with pytest.raises(ValidationError, match="ascend"):
            HeldOut.model_validate(content)


class TestABorder:
    @pytest.mark.parametrize(("count", "budget"), [(200, 0.03), (100, 0.1), (1000, 0.005)])
    def test_with_many_samples_is_their_quantile(self, count: int, budget: float) -> None:
        scores = drawn(count)
        found = border(HeldOut.of(scores), budget)
        assert found == pytest.approx(float(np.quantile(scores, 1 - budget)), rel=1e-6)

    def test_with_few_is_that_of_the_tail_through_median_and_ninth_decile(self) -> None:
        scores = drawn(16)
        median, decile = np.quantile(scores.astype(np.float64), [0.5, 0.9])
        law = stats.gumbel_r
        scale = (decile - median) / (law.ppf(0.9) - law.ppf(0.5))
        location = median - scale * law.ppf(0.5)
        want = law(location, scale).ppf(0.97)
        assert border(HeldOut.of(scores), 0.03) == pytest.approx(want, rel=1e-6)

    def test_finds_the_law_that_the_samples_come_from(self) -> None:
        law = stats.gumbel_r(2.0, 0.3)
        # 61 samples are too few for 3 %; of 200 draws the mean border is the law's
        borders = [border(HeldOut.of(drawn(61, seed)), 0.03) for seed in range(200)]
        assert np.mean(borders) == pytest.approx(law.ppf(0.97), abs=0.03)

    @pytest.mark.parametrize("count", [12, 16, 60, 202])
    def test_is_hardly_moved_by_one_odd_sample(self, count: int) -> None:
        scores = np.sort(drawn(count))
        odd = scores.copy()
        odd[-1] = 100.0
        spread = scores[-1] - np.median(scores)
        moved = border(HeldOut.of(odd), 0.03) - border(HeldOut.of(scores), 0.03)
        assert abs(moved) < 0.1 * spread

    @settings(deadline=None)
    @given(
        scores=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=80),
        low=st.floats(0.001, 0.5),
        factor=st.floats(1.0, 1.9),
    )
    def test_falls_as_the_budget_grows_under_either_rule(
        self, scores: list[float], low: float, factor: float
    ) -> None:
        held_out = HeldOut.of(np.array(scores, np.float32))
        high = low * factor
        if (held_out.count * low >= 2) == (held_out.count * high >= 2):
            assert border(held_out, high) <= border(held_out, low)

    def test_does_not_reject_samples_that_are_all_alike(self) -> None:
        scores = np.full(300, np.float32(1.7))
        assert border(HeldOut.of(scores), 0.03) > scores[0]

    @pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, 2.0])
    def test_needs_a_budget_between_nothing_and_all(self, budget: float) -> None:
        with pytest.raises(InputError, match="above 0 and below 1"):
            border(HeldOut.of(drawn(20)), budget)
