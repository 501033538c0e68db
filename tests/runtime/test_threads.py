from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import cv2
import faiss
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from threadpoolctl import ThreadpoolController

from engineworks.runtime import images, threads
from engineworks.runtime.bank import Bank
from engineworks.runtime.engines import open_engine
from engineworks.runtime.errors import EngineError
from engineworks.runtime.testing import tiny_features
from engineworks.runtime.threads import Lending, in_parts

QUOTAS = pytest.mark.parametrize(
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


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where control groups are mounted, on a machine of eight cores."""
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    (tmp_path / "cgroup").mkdir()
    return tmp_path / "cgroup"


class TestAvailableThreads:
    @QUOTAS
    @pytest.mark.parametrize("place", ["", "system.slice/me"])
    def test_are_no_more_than_a_container_may_use(
        self, quota: str, allowed: int, place: str, groups: Path
    ) -> None:
        (groups / place).mkdir(parents=True, exist_ok=True)
        (groups / place / "cpu.max").write_text(quota)
        (groups.parent / "own").write_text(f"0::/{place}\n")

        assert threads.available_threads() == allowed

    @QUOTAS
    @pytest.mark.parametrize(
        ("mount", "own"), [("cpu", "/"), ("cpu,cpuacct", "/docker/abc"), ("cpu", "/docker/abc")]
    )
    def test_are_no_more_than_version_1_grants(
        self, quota: str, allowed: int, mount: str, own: str, groups: Path
    ) -> None:
        folder = groups / mount / own.lstrip("/")
        folder.mkdir(parents=True)
        granted, period = quota.split()
        (folder / "cpu.cfs_quota_us").write_text(granted.replace("max", "-1") + "\n")
        (folder / "cpu.cfs_period_us").write_text(period + "\n")
        (groups.parent / "own").write_text(f"7:memory:/x\n4:cpu,cpuacct:{own}\n")

        assert threads.available_threads() == allowed

    def test_are_bound_by_groups_above_as_well(self, groups: Path) -> None:
        (groups / "a/b").mkdir(parents=True)
        (groups / "a/cpu.max").write_text("300000 100000\n")
        (groups / "a/b/cpu.max").write_text("max 100000\n")
        (groups.parent / "own").write_text("0::/a/b\n")

        assert threads.available_threads() == 3

    def test_outside_of_a_container_are_the_cores_of_this_process(
        self, groups: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.sched_getaffinity", lambda _pid: {3, 5, 7}, raising=False)

        assert threads.available_threads() == 3


class TestPools:
    def test_are_bound_together(self) -> None:
        blas = ThreadpoolController().select(internal_api="openblas")
        before = (
            cv2.getNumThreads(),
            {each["filepath"]: each["num_threads"] for each in blas.info()},
        )
        try:
            threads.bound_pools(1)
            assert cv2.getNumThreads() == 1
            assert {each["num_threads"] for each in blas.info()} == {1}
        finally:
            cv2.setNumThreads(before[0])
            blas.limit(limits=max(before[1].values()))

    def test_of_faiss_are_not_used(self) -> None:
        """OpenMP would start a team for each of these threads."""
        rows = np.random.default_rng(0).random((3000, 32), np.float32)
        bank, found = Bank(rows), []

        def search() -> None:
            faiss.omp_set_num_threads(2)
            bank.search(rows, 3, threads=1)
            found.append(faiss.omp_get_max_threads())

        each = threading.Thread(target=search)
        each.start()
        each.join()
        assert found == [1]


class TestLentThreads:
    def test_are_never_more_than_there_are(self) -> None:
        cores, lent, most = Lending(4), 0, 0
        guard = threading.Lock()

        def work(wanted: int) -> None:
            nonlocal lent, most
            with cores.lent(wanted):
                with guard:
                    lent += min(wanted, 4)
                    most = max(most, lent)
                time.sleep(0.001)
                with guard:
                    lent -= min(wanted, 4)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, [1, 2, 3, 4, 9] * 8))

        assert lent == 0
        assert 1 < most <= 4

    def test_go_to_who_asked_first_however_many_these_want(self) -> None:
        cores, order = Lending(2), []

        def work(name: str, wanted: int) -> None:
            with cores.lent(wanted):
                order.append(name)

        with cores.lent(1):
            large = threading.Thread(target=work, args=("large", 2))
            large.start()
            wait_for(lambda: len(cores._waiting) == 1)
            small = threading.Thread(target=work, args=("small", 1))
            small.start()
            wait_for(lambda: len(cores._waiting) == 2)
            assert order == []
        large.join()
        small.join()
        assert order == ["large", "small"]

    def test_are_not_asked_for_twice(self) -> None:
        cores = Lending(1)
        with cores.lent(1), cores.lent(1):
            assert cores._free == 0
        assert cores._free == 1

    def test_come_back_from_work_that_fails(self) -> None:
        cores = Lending(2)
        with pytest.raises(ValueError, match="work"), cores.lent(2):
            raise ValueError("work")
        with cores.lent(2):
            pass


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds; a test that hangs should end."""
    for _ in range(30_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it never came to that")


def in_a_child(work: Callable[[], object]) -> int:
    """Exit status of a forked process that does this; -14 where it hangs for ten seconds."""
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(10)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def both(model: bytes, backend: str, num: int) -> Callable[[], None]:
    """What a child does with the engine of its parent, and with one of its own."""
    feeds = {"images": np.ones((2, 3, 64, 64), np.float32)}
    engine = open_engine(model, backend, threads=num)
    want = engine.run(feeds)["features"]

    def work() -> None:
        assert np.array_equal(engine.run(feeds)["features"], want)
        with closing(open_engine(model, backend, threads=num)) as own:
            assert np.array_equal(own.run(feeds)["features"], want)

    return work


def openvino_in_children() -> None:
    model = tiny_features((64, 64)).SerializeToString()
    for num in (1, 2):
        assert in_a_child(both(model, "openvino", num)) == 0
    open_engine(model, "openvino", threads=2).close()

    def told() -> None:
        with pytest.raises(EngineError, match="forked"):
            open_engine(model, "openvino", threads=2)

    assert in_a_child(told) == 0


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # that is what is tested
class TestAForkedProcess:
    def test_works_in_parts(self) -> None:
        in_parts(lambda part: part.stop, 10, 2)
        assert in_a_child(lambda: in_parts(lambda part: part.stop, 10, 2)) == 0

    def test_searches_a_bank(self) -> None:
        rows = np.random.default_rng(0).random((3000, 32), np.float32)
        bank = Bank(rows)
        bank.search(rows, 3)
        assert in_a_child(lambda: bank.search(rows, 3)) == 0

    @pytest.mark.parametrize("num", [1, 2])
    def test_runs_the_engine_of_its_parent_and_one_of_its_own(self, num: int) -> None:
        model = tiny_features((64, 64)).SerializeToString()
        assert in_a_child(both(model, "ort", num)) == 0

    def test_runs_openvino_or_is_told_where_it_would_hang(self) -> None:
        """In a process of its own: engines that other tests closed would count here."""
        script = "import test_threads; test_threads.openvino_in_children()"
        folder = str(Path(__file__).parent)
        subprocess.run([sys.executable, "-c", script], cwd=folder, env=ENVIRONMENT, check=True)

    def test_reads_pictures(self, tmp_path: Path) -> None:
        images.write(tmp_path / "a.png", np.zeros((20, 30, 3), np.uint8))
        assert in_a_child(lambda: images.read(tmp_path / "a.png")) == 0


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
