"""The one place where files are written: each appears whole or not at all.

A new file has no name until it is whole and on the disk; then it takes the place of the old one in
one step. A folder is put together beside its place and exchanged with the old one, so that one of
both stands at every moment. Where the file system has no exchange, a journal says what is under
way, and the next command finishes it.

What a process that died has left over (a name that ``is_temporary``, and no lock on it) is removed
by the next one that writes there; what belongs to a living one is left alone.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import IO, Self

from engineworks.runtime.claims import close_in_children, real

_TEMPORARY = re.compile(r"\.engineworks-[0-9a-f]{16}\.tmp")
_JOURNAL, _NEW, _OLD = "journal", "new", "old"  # of a replacement without exchange
_NOREPLACE, _EXCHANGE = 1, 2  # flags of renameat2(2)
_AT_FDCWD = -100
# what a file system answers that lacks an operation
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EISDIR}


# --- one file ------------------------------------------------------------------------------------


def write(path: Path, content: str | bytes, *, replace: bool = True, durable: bool = True) -> None:
    """Write a file in one step; folders on the way are made.

    What is no regular file (``/dev/null``, a pipe, ``/dev/stdout``) is written into and never
    replaced; a link stays, and the file that it leads to is replaced.

    Args:
        replace: also in the place of a file that is there.
        durable: it is on the disk before it has its name. Without, a power cut may lose it; that
            is for what can be made again.

    Raises:
        FileExistsError: without ``replace``, where there is something.
        OSError: the system refuses; the file that was there is still there.
    """
    data = content.encode() if isinstance(content, str) else content
    with naming(path):
        target = _replaceable(path)
        if target is None:
            _write_into(path, data)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        if durable:
            sweep(target.parent)
        with NewFile(target.parent) as new:
            new.file.write(data)
            new.place(target, replace=replace, durable=durable)


class NewFile:
    """A file that has no name yet; without ``place`` nothing of it stays.

    Attributes:
        file: open for writing.
        path: under which other code may open it meanwhile.
    """

    def __init__(self, folder: Path) -> None:
        """Open it in the file system of ``folder``.

        Raises:
            OSError: the folder is missing or may not be written to.
        """
        self._folder = folder
        self._temporary: Path | None = None
        descriptor = _open_unnamed(folder)
        if descriptor is None:
            self._temporary, descriptor = _open_named(folder)
        self.file: IO[bytes] = os.fdopen(descriptor, "wb")
        self.path = self._temporary or Path(f"/proc/self/fd/{descriptor}")

    def place(self, target: Path, *, replace: bool = True, durable: bool = True) -> None:
        """Give it its name, in the place of a file that has it; the mode of that one is kept.

        Raises:
            FileExistsError: without ``replace``, where there is something.
        """
        self.file.flush()
        descriptor = self.file.fileno()
        with suppress(FileNotFoundError):
            os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
        if durable:
            os.fsync(descriptor)
        if self._temporary is None and not replace:
            _link(descriptor, target)
        else:
            if self._temporary is None:
                temporary = _temporary_name(target.parent)
                _link(descriptor, temporary)
                self._temporary = temporary
            if replace:
                self._temporary.replace(target)
            else:
                _rename_new(self._temporary, target)
            self._temporary = None
        if durable:
            sync(target.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk has been told of, or is of no interest any more
            self.file.close()


def _open_unnamed(folder: Path) -> int | None:
    """A file without a name, or None where the file system has none."""
    if not hasattr(os, "O_TMPFILE") or not Path("/proc/self/fd").is_dir():
        return None
    try:
        descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _link(descriptor: int, target: Path) -> None:
    """Give an unnamed file a name that must be free."""
    # a folder's descriptor makes it linkat(2), which follows the link in /proc to the file
    os.link(f"/proc/self/fd/{descriptor}", target, src_dir_fd=descriptor)


def _open_named(folder: Path) -> tuple[Path, int]:
    """A file under a temporary name, locked as long as it is open."""
    while True:
        path = _temporary_name(folder)
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:  # nobody took it for a leftover before it was locked
            return path, descriptor
        os.close(descriptor)


def _replaceable(path: Path) -> Path | None:
    """The regular or missing file that ``path`` leads to; None for what only can be written into.

    Raises:
        OSError: a folder, a circle of links, a name that cannot be.
    """
    for _ in range(40):  # as many links as Linux follows
        if real(path.parent).is_relative_to("/proc"):
            return None
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return path
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return path if stat.S_ISREG(mode) else None


def _own_descriptor(path: Path) -> int | None:
    """The number of an open file of this process that a path such as ``/dev/fd/1`` stands for."""
    if path.name.isdecimal() and real(path.parent) == Path(f"/proc/{os.getpid()}/fd"):
        return int(path.name)
    return None


def _write_into(path: Path, data: bytes) -> None:
    for _ in range(40):
        number = _own_descriptor(path)
        if number is not None or not path.is_symlink():
            break
        path = path.parent / path.readlink()
    if number is None:
        with path.open("wb", buffering=0) as file:
            _write_all(file.fileno(), data)
        return
    # opened anew it would begin at its first byte again
    sys.stdout.flush()
    _write_all(number, data)


def _write_all(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def allocate(path: Path, size_bytes: int) -> None:
    """Make a file of zeros whose room on the disk is taken, to be written through memory.

    Raises:
        OSError: there is no such room; then there is no file.
    """
    with naming(path), path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        except OSError:
            path.unlink()
            raise


class Lines:
    """A text file that grows line by line under its own name, whole lines only.

    What was added stands in the file at once: the end of the process, however sudden, loses
    nothing of it. ``sync`` puts it on the disk, where a power cut loses nothing either.
    """

    def __init__(self, path: Path) -> None:
        """Make the file.

        Raises:
            FileExistsError: there is something of that name.
        """
        self.path = path
        with naming(path):
            flags = os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_WRONLY
            self._descriptor = os.open(path, flags, 0o666)
        self._size = 0

    def add(self, text: str) -> None:
        """Append whole lines; where the disk is full, none of them.

        Args:
            text: ends in a line break; file names need not be UTF-8, their bytes pass through.
        """
        data = text.encode("utf-8", "surrogateescape")
        with naming(self.path):
            try:
                _write_all(self._descriptor, data)
            except OSError:
                os.ftruncate(self._descriptor, self._size)
                raise
        self._size += len(data)

    def sync(self) -> None:
        """Put it on the disk.

        Raises:
            FileNotFoundError: somebody removed it: nobody would find what is written.
        """
        with naming(self.path):
            os.fsync(self._descriptor)
            if not os.fstat(self._descriptor).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "removed while it was being written")

    def close(self) -> None:
        """Put it on the disk and close it; see ``sync``."""
        try:
            self.sync()
        finally:
            os.close(self._descriptor)


def cut_to_whole_lines(path: Path) -> None:
    """Remove the beginning of a line at the end of a file whose writer was killed while writing."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        while size:
            begin = max(0, size - 65536)
            file.seek(begin)
            if (at := file.read(size - begin).rfind(b"\n")) >= 0:
                size = begin + at + 1
                break
            size = begin
        file.truncate(size)


# --- a whole folder ------------------------------------------------------------------------------


class NewFolder:
    """A folder that is put together beside its place and gets it in one step.

    Its files have no names before that; without ``place`` nothing of it stays.
    """

    def __init__(self, parent: Path) -> None:
        """Begin one in ``parent``, which is made; what dead processes left there is removed."""
        self._parent = parent
        self._files: dict[str, NewFile] = {}
        with naming(parent):
            parent.mkdir(parents=True, exist_ok=True)
            sweep(parent)

    def copy(self, name: str, source: Path) -> Path:
        """Add a copy of a file; the path under which it may be read until it has its place."""
        with naming(self._parent / name), source.open("rb") as file:
            new = self._files[name] = NewFile(self._parent)
            shutil.copyfileobj(file, new.file, 1 << 20)
            new.file.flush()
            os.fsync(new.file.fileno())
        return new.path

    def write(self, name: str, content: str) -> None:
        """Add a file."""
        with naming(self._parent / name):
            new = self._files[name] = NewFile(self._parent)
            new.file.write(content.encode())
            new.file.flush()
            os.fsync(new.file.fileno())

    def place(self, out: Path, *, replace: bool) -> None:
        """Give the folder its name.

        Args:
            replace: in the place of the folder that has it, which is deleted.

        Raises:
            FileExistsError: without ``replace``, where there is something; it is left alone.
        """
        with naming(out), _temporary_folder(self._parent) as staging:
            inner = {staging / PurePosixPath(name).parent for name in self._files}
            for folder in inner:
                folder.mkdir(parents=True, exist_ok=True)
            for name, new in self._files.items():
                new.place(staging / PurePosixPath(name), replace=False, durable=False)
            for folder in {staging, *inner}:
                sync(folder)
            if replace and out.exists():
                _replace_folder(staging, out)
            else:
                _rename_new(staging, out)
            sync(out.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        for new in self._files.values():
            new.__exit__()


def _replace_folder(staging: Path, out: Path) -> None:
    """Put ``staging`` in the place of ``out``; what was there ends up in ``staging``'s place."""
    if _rename_with_flag(staging, out, _EXCHANGE):
        return
    with _temporary_folder(out.parent) as journal:
        staging.rename(journal / _NEW)
        write(journal / _JOURNAL, out.name)
        sync(journal)
        out.rename(journal / _OLD)
        try:
            (journal / _NEW).rename(out)
        except BaseException:
            (journal / _OLD).rename(out)
            raise


def recover(out: Path) -> bool:
    """Finish the replacement of a folder whose writer died between its two steps.

    Returns:
        Whether there is one under way or was: then ``out`` is there, or soon will be.
    """
    if out.exists() or not out.parent.is_dir():
        return False
    found = False
    for journal in out.parent.glob(".engineworks-*.tmp"):
        with suppress(OSError):
            if (journal / _JOURNAL).read_text() == out.name:
                found = True
                _remove_dead(journal)
    return found


def _finish(journal: Path) -> None:
    """What the writer of a journal would have done next; it is dead."""
    new = journal / _NEW
    if (journal / _OLD).exists() and new.exists():
        out = journal.parent / (journal / _JOURNAL).read_text()
        if not out.exists():
            new.rename(out)
            sync(out.parent)


def _rename_new(source: Path, target: Path) -> None:
    """Rename to a name that must be free.

    Raises:
        FileExistsError: it is not.
    """
    if _rename_with_flag(source, target, _NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def _rename_with_flag(source: Path, target: Path, flag: int) -> bool:
    """renameat2(2); False where the system or the file system has no such flag."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    code = call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag)
    if code == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(target))


# --- leftovers -----------------------------------------------------------------------------------


def is_temporary(name: str) -> bool:
    """Whether a file name is one of those that stand for something unfinished."""
    return _TEMPORARY.fullmatch(name) is not None


def sweep(folder: Path, *, deep: bool = False) -> None:
    """Remove what dead processes of this user left unfinished.

    Args:
        deep: in the folders below as well.
    """
    with suppress(FileNotFoundError, PermissionError):
        entries = list(os.scandir(folder))
        for entry in entries:
            if is_temporary(entry.name):
                with suppress(OSError):  # a living process has renamed it, or it is another user's
                    _remove_dead(Path(entry.path))
            elif deep and entry.is_dir(follow_symlinks=False):
                sweep(Path(entry.path), deep=True)


def _remove_dead(path: Path) -> None:
    """Remove a leftover, unless its writer lives."""
    if path.lstat().st_uid != os.geteuid():
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            _finish(path)
            shutil.rmtree(path)
        else:
            path.unlink()
    finally:
        os.close(descriptor)


def _temporary_name(folder: Path) -> Path:
    return folder / f".engineworks-{secrets.token_hex(8)}.tmp"


@contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    """A folder under a temporary name, locked; what it holds at the end is removed."""
    while True:
        path = _temporary_name(parent)
        path.mkdir()
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # taken for a leftover before it was locked
            continue
        except BaseException:
            path.rmdir()
            raise
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if path.exists():
            break
        os.close(descriptor)
    close_in_children.add(descriptor)
    try:
        yield path
    finally:
        if descriptor in close_in_children:  # not in a child that was forked meanwhile
            try:
                if path.exists():
                    shutil.rmtree(path)
            finally:
                close_in_children.discard(descriptor)
                os.close(descriptor)


@contextmanager
def scratch(near: Path) -> Iterator[Path]:
    """A folder for intermediate files, removed at the end, or by the next command.

    Args:
        near: a folder that will be written to anyway, for systems without a temporary folder.
    """
    try:
        parent = Path(tempfile.gettempdir())
    except FileNotFoundError:
        parent = near
    with naming(parent):
        parent.mkdir(parents=True, exist_ok=True)
        sweep(parent)
        with _temporary_folder(parent) as folder:
            yield folder


# --- the system's ways ---------------------------------------------------------------------------


def sync(folder: Path) -> None:
    """Put the names in a folder on the disk, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Have errors of the system name what the user knows: ``path``, and no temporary name."""
    try:
        yield
    except OSError as error:
        known = str(error.filename or "")
        own = ".engineworks-" in known or known.startswith("/proc/self/fd/")
        if error.errno is not None and (own or not known):
            error.filename = str(path)
            if error.filename2 is not None:
                del error.filename2  # set to None, it would be shown
        raise
