from __future__ import annotations

import time

import pytest

from engineworks.training.profiler import Profiler, section

pytestmark = pytest.mark.train


def test_sections_keep_their_own_time_without_what_is_inside_of_them() -> None:
    with Profiler() as profiler:
        time.sleep(0.02)
        with section("outer"):
            time.sleep(0.01)
            with section("inner"):
                time.sleep(0.04)
        with section("inner"):
            time.sleep(0.01)
    shares = profiler.shares()
    assert set(shares) == {"inner", "other", "outer"}
    seconds = [row["seconds"] for row in shares.values()]
    assert seconds == sorted(seconds, reverse=True)
    # a sleep takes at least as long as asked for; on a busy machine any of them takes longer
    for name, slept in {"inner": 0.05, "other": 0.02, "outer": 0.01}.items():
        assert shares[name]["seconds"] >= slept
    assert sum(row["share"] for row in shares.values()) == pytest.approx(1)


def test_an_error_closes_its_section() -> None:
    with Profiler() as profiler:
        with pytest.raises(ValueError, match="no"), section("broken"):
            raise ValueError("no")
        with section("after"):
            pass
    assert set(profiler.shares()) == {"other", "broken", "after"}


def test_without_a_profiler_a_section_does_nothing() -> None:
    with section("unheard"):
        pass
    with Profiler() as profiler:
        pass
    assert set(profiler.shares()) == {"other"}
