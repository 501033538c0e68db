from __future__ import annotations

import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import threads
from runtime.threads import in_parts


class TestAvailableThreads:
    @pytest.mark.parametrize(
        ("quota", "allowed"),
        [
            ("max 100000\n", 8),
            ("200000 100000\n", 2),
            ("150000 100000\n", 2),
            ("50000 100000\n", 1),
            ("6400000 100000\n", 8),
        ],
        ids=["no limit", "two", "one and a half", "half", "more than there are"],
    )
    def test_are_no_more_than_a_container_may_use(
        self, quota: str, allowed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(threads, "_CGROUP_QUOTA", tmp_path / "cpu.max")
        monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)), raising=False)

        assert threads.available_threads() == allowed

    def test_outside_of_a_container_are_the_cores_of_this_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(threads, "_CGROUP_QUOTA", tmp_path / "none")
        monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {3, 5, 7}, raising=False)

        assert threads.available_threads() == 3


class TestWorkInParts:
    @given(count=st.integers(0, 40), num=st.integers(1, 8))
    def test_covers_everything_once_in_order(self, count: int, num: int) -> None:
        found = in_parts(lambda part: list(range(count))[part], count, num)

        assert [i for part in found for i in part] == list(range(count))
        assert len(found) == max(1, min(count, num))
        assert max(map(len, found)) - min(map(len, found)) <= 1

    def test_runs_in_as_many_threads(self) -> None:
        together = threading.Barrier(3, timeout=30)

        idents = in_parts(lambda _part: together.wait() * 0 + threading.get_ident(), 9, 3)

        assert len(set(idents)) == 3
        assert idents[-1] == threading.get_ident()

    @pytest.mark.parametrize("failing", [0, 2])
    def test_fails_as_its_parts_do(self, failing: int) -> None:
        def work(part: slice) -> None:
            if part.start == failing:
                raise ValueError("part")

        with pytest.raises(ValueError, match="part"):
            in_parts(work, 3, 3)
