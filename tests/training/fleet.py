"""Processes that train together, forked from one that has loaded torch: a test needs no seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Mapping
from functools import cache, partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch.distributed import TCPStore

from engineworks.runtime.errors import EngineworksError, RunError
from engineworks.runtime.signals import Stopped
from engineworks.training import ranks
from engineworks.training.config import load_config
from engineworks.training.systems.noising.discriminator import Proposal
from engineworks.training.train import train
from tests.training.toy import config, known

_LIMIT_S = 120  # of one test; none takes a tenth of it on an idle machine


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def train_toy(root: Path, changes: Mapping[str, Any], **wanted: Any) -> Any:
    """Train the small system in a process of several: the run's record, or what went wrong.

    Args:
        wanted: ``resume``; ``dropout`` of the net; ``at`` which step of rank 1 which ``event``
            comes: it is told to end, or fails.
    """
    task = known(dict.__setitem__)
    task.dropout = wanted.get("dropout", 0.0)
    step = task.step

    def watched(self: Any, model: Any, batch: Any, position: Any) -> Any:
        if ranks.here().rank == 1 and position.step == wanted.get("at"):
            if wanted["event"] == "fails":
                raise RunError("the disk is gone")
            signal.raise_signal(signal.SIGTERM)
        return step(self, model, batch, position)

    task.step = watched  # type: ignore[method-assign]
    try:
        run = train(config(**changes), root.parent, root, resume=wanted.get("resume", False))
    except (EngineworksError, Stopped) as error:
        return type(error).__name__, str(error)
    return run.info.model_dump()


def train_system(system: str, file: str | None, settings: list[str], data: Path, root: Path) -> Any:
    """The results of a run; the noise of a discriminator is the same in each process."""
    with patch.object(Proposal, "forward", lambda self, rows_ND: self.std(rows_ND) * rows_ND.sin()):
        return _train_system(system, file, settings, data, root)


def _train_system(
    system: str, file: str | None, settings: list[str], data: Path, root: Path
) -> Any:
    chosen = load_config(system, None if file is None else Path(file), settings)
    return train(chosen, data, root).info.results


def together(
    work: Callable[..., Any], *arguments: Any, processes: int = 2, **options: Any
) -> list[Any]:
    """What ``work(*arguments, **options)`` returns in each of several processes that meet.

    Args:
        work: of a module, with arguments and results that can be sent.

    Raises:
        AssertionError: with what the processes raised.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers: list[Connection] = []
    children = []
    for rank in range(processes):
        said = {"RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
        said |= {"MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        answer, sending = _context().Pipe(duplex=False)
        children.append(
            _context().Process(
                target=_work,
                args=(sending, said, partial(work, *arguments, **options)),
                daemon=True,
            )
        )
        children[-1].start()
        sending.close()
        answers.append(answer)
    found = [answer.recv() if answer.poll(_LIMIT_S) else (None, "no answer") for answer in answers]
    for child in children:
        child.join(_LIMIT_S)
    assert [error for _, error in found] == [None] * processes, "\n".join(
        str(error) for _, error in found
    )
    return [result for result, _ in found]


def _work(sending: Connection, said: Mapping[str, Any], work: Callable[[], Any]) -> None:
    os.environ.update({name: str(value) for name, value in said.items()})
    try:
        sending.send((work(), None))
    except BaseException:
        sending.send((None, traceback.format_exc()))
