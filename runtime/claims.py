"""One process at a time: a folder that is being written belongs to one, others are told to whom.

Nothing of a claim is on the disk, so nothing of it stays: the kernel forgets it with the process,
also after SIGKILL.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from engineworks.runtime.errors import InUseError

_CREDENTIALS = struct.Struct("3i")  # of SO_PEERCRED: process, user, group
_POLL_S = 0.02
_UNSEEN_S = 0.5

_held: dict[str, int] = {}  # claims of this process, and how often each was made
close_in_children: set[int] = set()  # descriptors that hold a lock


def _forget() -> None:
    """A child after a fork holds nothing: a lock would outlive the process that it belongs to."""
    for descriptor in close_in_children:
        os.close(descriptor)
    close_in_children.clear()
    _held.clear()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def claim(path: Path, *, wait_s: float = 0.0) -> Iterator[None]:
    """Keep other processes from writing to a folder, which need not exist yet.

    Two guards make a claim: the folder itself is locked, which holds for all that see the same
    folder; and a socket in Linux' abstract namespace holds for its path, also before there is a
    folder, and tells whose it is. Claims of one process may be nested.

    Args:
        wait_s: how long to wait for another process to end.

    Raises:
        InUseError: another process has it.
    """
    place = real(path)
    key = str(place)
    descriptors = [] if key in _held else _take(place, time.monotonic() + wait_s)
    _held[key] = _held.get(key, 0) + 1
    close_in_children.update(descriptors)
    try:
        yield
    finally:
        if key in _held:  # not in a child that was forked meanwhile
            _held[key] -= 1
            if not _held[key]:
                del _held[key]
        for descriptor in descriptors:
            if descriptor in close_in_children:
                close_in_children.discard(descriptor)
                os.close(descriptor)


def _take(place: Path, until: float) -> list[int]:
    """The descriptors that hold a claim."""
    while (taken := _try_to_take(place)) is None:
        holder = _holder(place)
        # one that cannot be seen may be about to end, or to listen
        if time.monotonic() >= until + (0 if holder else _UNSEEN_S):
            raise InUseError(
                f"{place} is being written by {holder or 'a process of another container'}",
                fix="wait until that process has ended, or choose another place",
            )
        time.sleep(_POLL_S)
    return taken


def _try_to_take(place: Path) -> list[int] | None:
    taken: list[int] = []
    done = False
    try:
        done = _bind(place, taken) and _lock(place, taken)
    finally:
        if not done:
            for descriptor in taken:
                os.close(descriptor)
    return taken if done else None


def _bind(place: Path, taken: list[int]) -> bool:
    if sys.platform != "linux":
        return True
    guard = socket.socket(socket.AF_UNIX)
    try:
        guard.bind(_address(place))
        guard.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return False
        raise
    finally:
        taken.append(guard.detach())
    return True


def _lock(place: Path, taken: list[int]) -> bool:
    """Lock a folder where there is one."""
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return True
    taken.append(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    with suppress(FileNotFoundError):  # exchanged meanwhile
        return os.path.samestat(os.fstat(descriptor), place.stat())
    return False


def _address(place: Path) -> bytes:
    return b"\0engineworks-" + hashlib.sha256(os.fsencode(place)).hexdigest()[:32].encode()


def _holder(place: Path) -> str | None:
    """The process that has a claim, by name and number; None where it cannot be seen from here."""
    if sys.platform == "linux":
        with socket.socket(socket.AF_UNIX) as asking, suppress(OSError):
            asking.setblocking(False)
            asking.connect(_address(place))
            peer = asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, _user, _group = _CREDENTIALS.unpack(peer)
            if pid:
                return f"process {pid} ({_name(pid)})"
    return None


def _name(pid: int) -> str:
    """A process by its command: program and verb, for options may hold secrets."""
    command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    words = [word for word in command[1:] if re.fullmatch(r"[\w./-]{1,80}", word)]
    words = [Path(word).name for word in words if not word.startswith("-")]
    return " ".join(words[:2]) or Path(command[0]).name


def real(path: Path) -> Path:
    """An absolute path without links; parts that are missing stay."""
    # Path.resolve ends in RuntimeError where links are a circle
    return Path(os.path.realpath(path))
