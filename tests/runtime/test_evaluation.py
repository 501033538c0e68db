from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from engineworks.runtime.errors import InputError
from engineworks.runtime.evaluation import Decisions, Evaluation, Rate, decide, table, wilson
from engineworks.runtime.evidence import Shares


class TestTheInterval:
    @pytest.mark.parametrize("of", [1, 2, 7, 50, 617])
    def test_is_wilsons(self, of: int) -> None:
        for count in {0, 1, of // 3, of - 1, of}:
            known = binomtest(count, of).proportion_ci(0.95, method="wilson")
            # the same formula in another order of float64 operations
            assert wilson(count, of) == pytest.approx((known.low, known.high), abs=1e-12)

    def test_of_nothing_is_everything(self) -> None:
        assert wilson(0, 0) == (0, 1)

    @pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
    def test_covers_the_share_about_as_often_as_it_says(self, share: float) -> None:
        covered = 0.0
        for count in range(41):
            low, high = wilson(count, 40)
            covered += binom.pmf(count, 40, share) * (low <= share <= high)
        # exact: Wilson's coverage swings around 95 % with the share (Brown et al., 2001, figure 5)
        assert 0.92 <= covered <= 0.98


SCORES = np.array([0.1, 0.6, 0.2, 0.3, 0.7, 0.5])
LABELS = np.array([0, 0, 0, 1, 1, 1])
KINDS = ["good", "good", "good", "crack", "crack", "dirt"]


class TestDecisionsOnPictures:
    def test_count_false_rejects_and_misses_and_misses_of_each_kind(self) -> None:
        made = decide("image", 0.5, "shipped", SCORES, LABELS, KINDS)

        assert made.rates["false rejects"].fraction == "1 of 3"
        assert made.rates["misses"].fraction == "1 of 3"  # a score at the border is rejected
        assert {k: v["misses"].fraction for k, v in made.kinds.items()} == {
            "crack": "1 of 2",
            "dirt": "0 of 1",
        }
        assert made.warnings == ()

    def test_warn_in_plain_words_where_most_goes_wrong(self) -> None:
        high = decide("image", 0.9, "shipped", SCORES, LABELS, KINDS)
        low = decide("image", 0.15, "shipped", SCORES, LABELS, KINDS)

        assert high.warnings == ("passes 3 of 3 labelled defects at its border",)
        assert low.warnings == ("rejects 2 of 3 good pictures at its border",)

    def test_warn_of_a_kind_that_mostly_passes_where_others_do_not(self) -> None:
        made = decide("image", 0.6, "shipped", SCORES, LABELS, ["good"] * 3 + ["a", "b", "b"])

        assert made.rates["misses"].fraction == "2 of 3" and len(made.warnings) == 1
        scores = np.array([0, 0, 0, 0.3, 0.7, 0.7])
        made = decide("image", 0.6, "shipped", scores, LABELS, ["good"] * 3 + ["a", "b", "b"])
        assert made.warnings == ("passes 1 of 1 labelled defects of 'a'",)

    def test_of_good_pictures_alone_are_false_rejects(self) -> None:
        made = decide("image", 0.5, "shipped", SCORES[:3], LABELS[:3], KINDS[:3])

        assert str(made.rates["false rejects"]) == "1 of 3 (6.1 to 79.2 %)"
        assert str(made.rates["misses"]) == "none there"
        assert made.kinds == {} and made.warnings == ()

    def test_come_back_from_json_as_they_were(self) -> None:
        made = decide("image", 0.5, "shipped", SCORES, LABELS, KINDS)
        text = json.dumps(made.model_dump(mode="json"), allow_nan=False)
        assert Decisions.model_validate(json.loads(text)) == made


def test_a_table_has_a_column_per_border_and_a_row_per_rate_and_kind() -> None:
    borders = (("shipped", 0.5), ("largest F1", 0.3))
    header, rows = table([decide("image", v, s, SCORES, LABELS, KINDS) for s, v in borders])

    assert header == ("", "image 0.5, shipped", "image 0.3, largest F1")
    assert [row[0] for row in rows] == ["false rejects", "misses", "misses: crack", "misses: dirt"]
    assert rows[2][1:] == ("1 of 2 (9.5 to 90.5 %)", "0 of 2 (0.0 to 65.8 %)")


def test_a_table_of_many_kinds_shows_the_worst() -> None:
    kinds = [f"kind {i}" for i in range(30) for _ in range(2)]
    scores = np.ones(60)
    scores[50] = 0  # of kind 25
    header, rows = table([decide("image", 0.5, "shipped", scores, np.ones(60, np.int64), kinds)])

    assert len(rows) == 2 + 20 + 1
    assert rows[2] == ("misses: kind 25", "1 of 2 (9.5 to 90.5 %)")
    assert rows[-1] == ("10 more, with less that is wrong", "")
    assert len(header) == 2


class TestADrop:
    def evaluation(self, right: list[int]) -> Evaluation:
        ones = np.ones(len(right), np.int64)
        shares = Shares("top1", np.array(right), ones)
        metrics = {"top1": sum(right) / len(right), "nll": 0.5}
        return Evaluation(metrics, evidence=(shares,), groups_I=0 * ones)

    def test_is_exact_and_has_an_interval_where_evidence_tells(self) -> None:
        drops = self.evaluation([1, 1, 1, 0]).drops_to(
            self.evaluation([1, 0, 1, 0]), ["top1", "nll"]
        )

        assert (drops["top1"].value, drops["top1"].num_pictures) == (0.25, 4)
        assert drops["top1"].interval is not None
        assert (drops["nll"].value, drops["nll"].interval) == (0, None)

    def test_is_not_made_of_other_pictures(self) -> None:
        with pytest.raises(InputError, match="4 and 3 pictures cannot be paired"):
            self.evaluation([1, 1, 1, 0]).drops_to(self.evaluation([1, 1, 1]), ["top1"])

    def test_rates_say_when_they_are_the_most(self) -> None:
        assert Rate.counted(2, 3).most
        assert not Rate.counted(2, 4).most and not Rate.counted(0, 0).most
