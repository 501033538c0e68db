"""Processes that train together: which one this is, and how they are started on this machine.

Whoever starts them (``launch`` here, torchrun, a cluster) says it in the variables of torchrun:
RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. What they then say to each other is in
``training.ranks``. Only ``launch`` loads torch.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engineworks.runtime.errors import EngineworksError, RankError, UsageError
from engineworks.runtime.signals import Stopped, unbroken

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# by which accelerate would start a group of its own
_OF_MPI = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_ERRORS = "ENGINEWORKS_TRAIN_ERRORS"  # folder in which a process that was launched leaves its error
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)
_POLL_S = 0.1
_BY_SIGNAL = 128  # exit codes of commands that a signal ended are so much more


@dataclass(frozen=True)
class Place:
    """A process among those that train together.

    Attributes:
        rank: its number, in [0, size); 0 is the main process, which alone writes.
        local_rank, local_size: the same among those of its machine; None where nobody says so.
    """

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    local_size: int | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def place() -> Place:
    """What the environment says of this process; alone, where it says nothing.

    Raises:
        UsageError: half of it is missing, or is no number.
    """
    said = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    try:
        numbers = {name: int(value) for name, value in said.items()}
    except ValueError as error:
        raise UsageError(f"of {said} not all are numbers", fix="set or unset them all") from error
    size = numbers.get("WORLD_SIZE", 1)
    if size == 1:
        return Place()
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if not os.environ.get(name)]
    if missing or not 0 <= numbers["RANK"] < size:
        raise UsageError(
            f"WORLD_SIZE is {size}, and {', '.join(missing) or 'RANK'} "
            f"{'is not set' if missing else 'is ' + said['RANK']}",
            fix="set RANK (from 0), WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or start with "
            "--processes or torchrun",
        )
    return Place(numbers["RANK"], size, numbers.get("LOCAL_RANK"), numbers.get("LOCAL_WORLD_SIZE"))


@contextmanager
def untold() -> Iterator[None]:
    """The environment of a process that is alone, for packages that would start groups."""
    hidden = {name: os.environ.pop(name, None) for name in (*_VARIABLES, *_OF_MPI)}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in hidden.items() if value is not None})


def tells_launcher(error: EngineworksError | Stopped) -> bool:
    """Whether what ends this process is told by another one, so that it is told once.

    Where ``launch`` has started it, it is left for that one to tell.
    """
    follows = isinstance(error, RankError)
    folder = os.environ.get(_ERRORS)
    if folder is None:
        return (follows or isinstance(error, Stopped)) and os.environ.get("RANK", "0") != "0"
    content = {"text": str(error), "exit_code": error.exit_code, "follows": follows}
    Path(folder, f"{time.time_ns():020d}.json").write_text(json.dumps(content), encoding="utf-8")
    return True


def follow_launcher() -> None:
    """Let the kernel end this process when the one that launched it is killed; Linux alone can."""
    library = ctypes.CDLL(None)
    if os.environ.get(_ERRORS) is not None and hasattr(library, "prctl"):
        library.prctl(_END_WITH_PARENT, int(signal.SIGTERM))


class LaunchError(EngineworksError):
    """What ended a process that was launched, with its exit code."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def launch(processes: int) -> None:
    """Run this command once more, in so many processes of this machine.

    Signals to end are passed on, and the processes take the time that they need. When one fails,
    the others are ended.

    Raises:
        LaunchError: one has failed; it is the first of them.
        RankError: one was killed.
        Stopped: by a signal.
    """
    # torch's own launcher, without the rendezvous that several machines need
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    from engineworks.runtime.threads import available_threads

    _silence()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, available_threads() // processes)
    with tempfile.TemporaryDirectory(prefix="engineworks-") as folder:
        shared = {
            "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": store.port,
            "TORCHELASTIC_USE_AGENT_STORE": True,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
            _ERRORS: folder,
        }
        each = {i: {**shared, "RANK": i, "LOCAL_RANK": i} for i in range(processes)}
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
        context = start_processes(
            "train",
            sys.executable,
            {i: tuple(sys.argv) for i in each},
            {i: {name: str(value) for name, value in said.items()} for i, said in each.items()},
            DefaultLogsSpecs(log_dir=folder),
        )
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:  # torch's, which kills after 30 seconds
                signal.signal(number, handler)
        try:
            _conclude(_watch(context), Path(folder))
        finally:
            context.close(signal.SIGKILL)


def _watch(context: Any) -> Mapping[int, Any]:
    """Wait for all processes to end, or for the first to fail: local rank -> failure.

    Raises:
        Stopped: by a signal, after they have ended.
    """
    stopped: Stopped | None = None
    while True:
        try:
            with unbroken():
                result = context.wait(0)
            if result is not None:
                break
            time.sleep(_POLL_S)
        except Stopped as asked:
            stopped = asked
            for pid in context.pids().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, asked.number)
    if stopped is not None:
        raise stopped
    failures: Mapping[int, Any] = result.failures
    return failures


def _conclude(failures: Mapping[int, Any], folder: Path) -> None:
    if not failures:
        return
    told = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    causes = [each for each in told if not each["follows"]]
    if causes:
        if (code := causes[0]["exit_code"]) > _BY_SIGNAL:
            raise Stopped(code - _BY_SIGNAL)
        raise LaunchError(causes[0]["text"], code)
    # those that were ended because of another one are no cause
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    rank, code = min(codes.items(), key=lambda item: (item[1] == -signal.SIGTERM, item[1]))
    if code > _BY_SIGNAL:
        raise Stopped(code - _BY_SIGNAL)
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    raise RankError(
        f"process {rank} of this training {how}",
        fix="there may be too little memory: lower --processes, train.workers or "
        "train.batch_size; then go on with --resume",
    )


def _silence() -> None:
    """Torch's launcher tells of each process that fails, in a table of its own."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)


def check_alone(here: Place, processes: int) -> None:
    """Whether nobody else starts processes already.

    Raises:
        UsageError: somebody does.
    """
    if here.size > 1:
        raise UsageError(
            f"--processes is {processes}, and WORLD_SIZE of the environment {here.size}",
            fix="leave out --processes where torchrun or a cluster starts the processes",
        )
