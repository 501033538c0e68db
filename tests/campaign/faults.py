"""What may go wrong at any operation of the file system: the process dies, or the system refuses.

``operations`` counts the calls by which this project changes files, and lets the n-th one fail.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from engineworks.runtime import files
from engineworks.runtime.claims import claim

_MAKING: tuple[tuple[Any, str], ...] = (  # what a full disk may refuse
    *((os, name) for name in ("open", "write", "link", "fsync", "rename", "replace", "mkdir")),
    *((Path, name) for name in ("rename", "replace", "mkdir")),
    (files, "_rename_with_flag"),
    (shutil, "copyfileobj"),
)
_ALL = (
    *_MAKING,
    *((os, name) for name in ("unlink", "rmdir", "fchmod", "ftruncate")),
    (Path, "unlink"),
)


class Count:
    """How many operations there were."""

    num = 0


@contextmanager
def operations(at: int, fail: Callable[..., None]) -> Iterator[Count]:
    """Call ``fail`` before the ``at``-th operation within the block."""
    count = Count()

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count.num += 1
            if count.num == at:
                fail(*arguments)
            return original(*arguments, **options)

        return call

    owners = _MAKING if fail is refuse else _ALL
    patches = [patch.object(owner, name, watched(getattr(owner, name))) for owner, name in owners]
    for each in patches:
        each.start()
    try:
        yield count
    finally:
        for each in patches:
            each.stop()


def die(*_arguments: object) -> None:
    """As SIGKILL ends a process."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse(*arguments: object) -> None:
    """As a full disk does: an operation on a path names it, one on an open file does not."""
    named = [str(each) for each in arguments[:1] if isinstance(each, str | Path)]
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *named)


def without_exchange() -> Any:
    """A file system that knows no exchange of two names, and no unnamed files."""

    def unsupported(*_arguments: object) -> bool:
        return False

    return patch.multiple(files, _rename_with_flag=unsupported, _open_unnamed=lambda _folder: None)


def in_child(run: Callable[[], None]) -> int:
    """Run in a fork of this process; its exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@contextmanager
def other_process(path: Path, *, seconds: float = 30.0) -> Iterator[int]:
    """A child that has the claim for a while; its number."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with claim(path):
                os.write(told, b"x")
                time.sleep(seconds)
        finally:
            os._exit(0)
    os.read(ready, 1)
    try:
        yield pid
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(told)
