"""What the operating system refuses, as errors with the path, the reason and a way out.

The command line shows every error that nobody explained better as one of these; nowhere else need
an error of the system be caught just to be said more nicely.
"""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback

from engineworks import __version__
from engineworks.runtime.errors import EngineworksError, ResourceError, UnexpectedError
from engineworks.runtime.texts import hide_secrets

_WAYS_OUT = {
    errno.ENOSPC: "make room on the disk, or choose a place on another one",
    errno.EDQUOT: "make room within your quota, or choose another place",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another file system",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "give this user the right to it, or choose another place",
    errno.EPERM: "give this user the right to it, or choose another place",
    errno.ENOENT: "check the path: it, or a folder on the way, is not there",
    errno.ENOTDIR: "choose another place: a part of the path is a file",
    errno.EISDIR: "give the path of a file: this is a folder",
    errno.EEXIST: "choose another name, or remove what is there",
    errno.ENOTEMPTY: "choose another name, or empty the folder",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the link: it leads in a circle",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs: the system has no more open files to give",
    errno.EBUSY: "choose another place: this one is in use, or where a disk is mounted",
    errno.EXDEV: "choose a place on one file system",
    errno.EIO: "check the disk, and copy what is on it",
    errno.ENOMEM: "give the process more memory",
    errno.EAGAIN: "raise the limit of processes and threads (ulimit -u)",
    errno.ENODEV: "check the device",
    errno.ENXIO: "check the device",
    errno.ETIMEDOUT: "check the network",
    errno.ECONNREFUSED: "check the address, and that something listens there",
}
_NO_MEMORY = "give it smaller pictures or a smaller --batch, or more memory"


_CUT = 300  # letters of an unexpected message; all of it is in the log


def explain(error: Exception) -> EngineworksError:
    """The error that a user is to see in the place of any other.

    What nobody foresaw is logged: the answer names the file.
    """
    if isinstance(error, EngineworksError):
        return error
    # torch's error of a full GPU is no MemoryError, only named like one
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        detail = f": {error}" if str(error) else ""
        return ResourceError(f"there is not enough memory{detail}", fix=_NO_MEMORY)
    if isinstance(error, OSError):
        return _of_system(error)
    return _unexpected(error)


def _of_system(error: OSError) -> ResourceError:
    reason = error.strerror or str(error) or type(error).__name__
    places = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where = " and ".join(places)
    fix = _WAYS_OUT.get(error.errno or 0)
    if error.errno == errno.ENOENT and "temporary directory" in reason:
        fix = "set TMPDIR to a folder that can be written to"
    return ResourceError(f"{where}: {reason}" if where else reason, fix=fix)


def _unexpected(error: Exception) -> UnexpectedError:
    lines = traceback.format_exception(error)
    what = f"{type(error).__name__}: {error}".split("\n")[0][:_CUT]
    try:
        descriptor, path = tempfile.mkstemp(prefix="engineworks-error-", suffix=".log", text=True)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"engineworks {__version__}, Python {sys.version}\n")
            file.writelines(map(hide_secrets, lines))
    except OSError as refused:  # no place for a log: the innermost line must do
        frame = traceback.extract_tb(error.__traceback__)[-1]
        path = (
            f"{frame.filename}, line {frame.lineno} (no log could be written: {refused.strerror})"
        )
    return UnexpectedError(
        f"unexpected {what}; details: {path}",
        fix="report it to those who gave you engineworks, with the command and that file",
    )
