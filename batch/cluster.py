"""Ray: a cluster of this machine for as long as it is needed, or one that is there.

One's own listens at the loopback address alone and answers nobody without its token: on a machine
with other users anybody could run programs by it. It says nothing to the outside (usage statistics,
dashboard), and works at the priority of any other command.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from engineworks.runtime.errors import ResourceError
from engineworks.runtime.signals import unbroken

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DEDUP_LOGS": "0",
}
_ALONE = {
    # so that nodes take 127.0.0.1 for their address, as they do on macOS
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "token",
}
_STORE_BYTES = 128 << 20  # names of files alone go through it
_LONGEST_FOLDER = 30  # letters: names of sockets end at 107, and Ray's part takes 75


@contextmanager
def joined(address: str | None, num_cpus: int) -> Iterator[None]:
    """Be connected to Ray, which must not be imported yet: it reads its environment only then.

    Args:
        address: of a cluster, as ``ray.init`` takes it; None starts one of this machine.
        num_cpus: of that one.

    Raises:
        ResourceError: there is no such cluster, or none can be started.
    """
    os.environ.update(_QUIET)
    if address is None:
        os.environ.update(_ALONE, RAY_AUTH_TOKEN=secrets.token_hex(32))
    import ray

    folder = None if address else _folder()
    try:
        with _own_handlers(), _without_stderr():
            _connect(address, num_cpus, folder)
        # a thread of Ray prints there that a process died
        with Path(os.devnull).open("w") as nothing, redirect_stdout(nothing):
            yield
    finally:
        with unbroken():
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _connect(address: str | None, num_cpus: int, folder: str | None) -> None:
    import ray

    own = {
        "num_cpus": num_cpus,
        "include_dashboard": False,
        "object_store_memory": _STORE_BYTES,
        "_temp_dir": folder,
    }
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            **({} if address else own),
        )
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        where = f"cannot connect to Ray at {address}" if address else "cannot start Ray here"
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ResourceError(
            f"{where}: {reason}",
            fix="check the address, and that all have the same versions of Ray and Python"
            if address
            else "make room in memory and in the temporary folder",
        ) from error


def _folder() -> str:
    """For Ray's sockets and logs; the path must be short."""
    usual = tempfile.gettempdir()
    return tempfile.mkdtemp(
        prefix="ew-", dir=usual if len(usual) <= _LONGEST_FOLDER else str(Path("/", "tmp"))
    )


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Ray's own processes are started without, and its library says nothing while it starts."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(stderr, 2)
        os.close(stderr)


@contextmanager
def _own_handlers() -> Iterator[None]:
    """Keep the handlers of signals that a library would put its own in the place of."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
