"""Processes that train together, forked from one that has loaded torch: a test needs no seconds."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

from torch.distributed import TCPStore

_LIMIT_S = 120  # of one test; none takes a tenth of it on an idle machine


@cache
def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["engineworks.training.train", "tests.training.toy"])
    return context


def together(work: Callable[..., Any], *arguments: Any, processes: int = 2) -> list[Any]:
    """What ``work(*arguments)`` returns in each of several processes that meet.

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
            _context().Process(target=_work, args=(sending, said, work, arguments), daemon=True)
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


def _work(
    sending: Connection, said: dict[str, Any], work: Callable[..., Any], arguments: Any
) -> None:
    os.environ.update({name: str(value) for name, value in said.items()})
    try:
        sending.send((work(*arguments), None))
    except BaseException:
        sending.send((None, traceback.format_exc()))
