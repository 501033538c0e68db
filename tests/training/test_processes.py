"""Who a process is among several, and starting them: here they are scripts that load no torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.utils.data import BatchSampler

from engineworks.runtime.errors import ConfigError, RankError, UsageError
from engineworks.runtime.signals import Stopped, stoppable
from engineworks.runtime.testing import write_strips
from engineworks.training.data import EpochSampler, Shares
from engineworks.training.processes import LaunchError, Place, check_alone, launch, place, untold
from engineworks.training.ranks import Part
from engineworks.training.run import open_run
from tests.command import cli

pytestmark = pytest.mark.train

WHERE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets the environment say some of it, and nothing else."""
    for name in WHERE:
        monkeypatch.delenv(name, raising=False)

    def tell(**said: object) -> None:
        for name, value in said.items():
            monkeypatch.setenv(name, str(value))

    return tell


class TestAPlace:
    def test_is_alone_where_nobody_says_more(self, told: Callable[..., None]) -> None:
        assert place() == Place()
        told(RANK=0, WORLD_SIZE=1)
        assert place() == Place()

    def test_is_what_the_environment_says(self, told: Callable[..., None]) -> None:
        told(RANK=3, WORLD_SIZE=4, MASTER_ADDR="here", MASTER_PORT=1)
        assert place() == Place(3, 4)
        told(LOCAL_RANK=1)
        assert place() == Place(3, 4, 1)
        assert not place().is_main
        with untold():
            assert place() == Place()
        assert place().size == 4

    @pytest.mark.parametrize(
        ("said", "words"),
        [
            ({"WORLD_SIZE": "many"}, "not all are numbers"),
            ({"WORLD_SIZE": 2, "MASTER_PORT": 1}, "RANK, MASTER_ADDR is not set"),
            ({"WORLD_SIZE": 2, "RANK": 2, "MASTER_ADDR": "a", "MASTER_PORT": 1}, "RANK is 2"),
        ],
    )
    def test_that_is_half_said_is_refused(
        self, said: dict[str, object], words: str, told: Callable[..., None]
    ) -> None:
        told(**said)
        with pytest.raises(UsageError, match=words):
            place()

    def test_is_given_by_one_launcher(self) -> None:
        with pytest.raises(UsageError, match="WORLD_SIZE of the environment 4"):
            check_alone(Place(0, 4), 2)


class TestAPart:
    @pytest.mark.parametrize("count", [3, 4, 7, 9])
    def test_and_the_others_are_the_whole(self, count: int) -> None:
        parts = [range(count)[Part(rank, 3).of(count)] for rank in range(3)]
        assert [i for part in parts for i in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1

    def test_of_too_few_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="a batch of 2 samples cannot be shared by 3"):
            Part(0, 3).of(2)


def shares(num: int, size: int, *, whole: bool, ranks: int = 2) -> list[list[list[int]]]:
    found = []
    for rank in range(ranks):
        sampler = EpochSampler(num, seed=0, shuffle=False)
        batches = BatchSampler(sampler, size, drop_last=False)  # type: ignore[arg-type]
        share = Shares(batches, Part(rank, ranks), whole=whole)
        found.append([[index for _, index in keys] for keys in share])
        assert len(share) == len(found[-1])
    return found


class TestShares:
    def test_are_parts_of_each_batch(self) -> None:
        assert shares(7, 5, whole=False) == [[[0, 1], [5]], [[2, 3, 4], [6]]]

    def test_are_whole_batches_in_turn(self) -> None:
        assert shares(9, 2, whole=True) == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7], [8]]]

    def test_of_a_last_batch_that_is_too_small_are_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"1 of 9 samples(.|\n)*batch_size to 3 or 5"):
            shares(9, 4, whole=False)


class TestALaunch:
    @pytest.fixture
    def script(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
        """Makes a script what is launched; it knows its rank and writes to a file."""

        def write(body: str) -> Path:
            path = tmp_path / "script.py"
            head = "import os, signal, sys, time\nrank = int(os.environ['RANK'])\n"
            path.write_text(head + body)
            monkeypatch.setattr(sys, "argv", [str(path)])
            monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
            return tmp_path

        return write

    def test_says_who_each_is(self, script: Callable[[str], Path]) -> None:
        names = ", ".join(f"os.environ['{name}']" for name in WHERE[:4])
        folder = script(f"open(f'{{sys.argv[0]}}.{{rank}}', 'w').write(' '.join([{names}]))")
        launch(2)
        said = [(folder / f"script.py.{rank}").read_text() for rank in range(2)]
        assert said == ["0 2 0 2", "1 2 1 2"]

    def test_ends_all_where_one_is_killed(self, script: Callable[[str], Path]) -> None:
        script("os.kill(os.getpid(), signal.SIGKILL) if rank else time.sleep(100)")
        with pytest.raises(RankError, match="process 1 of this training was ended by SIGKILL"):
            launch(2)

    def test_tells_the_cause_and_not_what_followed(self, script: Callable[[str], Path]) -> None:
        script(
            "from engineworks.runtime.errors import ConfigError, RankError\n"
            "from engineworks.training.processes import tells_launcher\n"
            "time.sleep(rank)\n"
            "error = ConfigError('no such net', fix='another') if rank else RankError('lost')\n"
            "assert tells_launcher(error)\n"
            "time.sleep(2 * (1 - rank))\n"
            "sys.exit(error.exit_code)\n"
        )
        with pytest.raises(LaunchError, match=r"^no such net\n  fix: another$") as caught:
            launch(2)
        assert caught.value.exit_code == 2

    def test_passes_signals_on_and_waits(self, script: Callable[[str], Path]) -> None:
        folder = script(
            "def end(number, _):\n"
            "    time.sleep(0.5)\n"
            "    open(f'{sys.argv[0]}.{rank}.ended', 'w').close()\n"
            "    sys.exit(128 + number)\n"
            "signal.signal(signal.SIGTERM, end)\n"
            "open(f'{sys.argv[0]}.{rank}', 'w').close()\n"
            "time.sleep(100)\n"
        )

        def tell() -> None:
            while len(list(folder.glob("script.py.?"))) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        thread = threading.Thread(target=tell)
        thread.start()
        with pytest.raises(Stopped, match="SIGTERM"), stoppable():
            launch(2)
        thread.join()
        assert len(list(folder.glob("*.ended"))) == 2


def test_the_command_starts_processes_and_speaks_once(tmp_path: Path) -> None:
    data = write_strips(tmp_path / "data", num_train=2, num_good=1, num_defective=1)
    settings = ["network.width=4", "network.depth=1", "tiles.size=32", "train.device=cpu"]
    options = [*(part for each in settings for part in ("--set", each)), "--processes", 2]
    run = tmp_path / "run"
    answer = cli(
        "train", "stripe", "--data", data, "--out", run, *options, "--set", "train.epochs=1"
    )
    assert answer.code == 0, answer.all
    assert answer.out.rstrip().endswith(str(run))
    assert answer.out.count(str(run)) == 1
    assert answer.err.count("epoch 1/1") == 1
    assert open_run(run).info.processes == 2
