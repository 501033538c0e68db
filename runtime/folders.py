"""What of a folder is data: one rule for every reader, and what was left out by it.

Left out are names that begin with a dot (editors' folders, AppleDouble ``._x.png``), those that
operating systems leave behind (``Thumbs.db``), and what is no file that the reader knows. Links are
followed; a folder that was met already is not entered again, so that links may form a loop.
Suffixes count in upper and in lower case. A folder that is asked for by name is read whatever it is
called.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable
from pathlib import Path

from engineworks.runtime.images import SUFFIXES

# of operating systems, in lower case
_LITTER = frozenset(
    {"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"}
)
_NUM_NAMED = 3

_log = logging.getLogger(__name__)


class Tally:
    """Names by kind, told in one line with their counts and the first of them."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self.names)

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def add(self, kind: str, name: str | Path) -> None:
        self.names.setdefault(kind, []).append(str(name))

    def merge(self, other: Tally) -> None:
        for kind, names in other.names.items():
            self.names.setdefault(kind, []).extend(names)

    def describe(self) -> str:
        """``.jfif: 2 (a.jfif, b.jfif); hidden: 1 (.cache)``."""
        return "; ".join(
            f"{kind}: {len(names)} ({', '.join(names[:_NUM_NAMED])}"
            f"{', ...' if len(names) > _NUM_NAMED else ''})"
            for kind, names in self.names.items()
        )


def is_litter(name: str) -> bool:
    """Whether a file or folder is hidden, or one of those that operating systems leave behind."""
    return name.startswith(".") or name.lower() in _LITTER


def entries(folder: Path, left_out: Tally | None = None) -> tuple[list[Path], list[Path]]:
    """The files and the folders in a folder, sorted; links stand for what they lead to.

    Args:
        left_out: gets what is neither, or hidden.

    Raises:
        OSError: the folder cannot be read.
    """
    files, folders = [], []
    left_out = Tally() if left_out is None else left_out
    with os.scandir(folder) as found:
        for entry in sorted(found, key=lambda entry: entry.name):
            if is_litter(entry.name):
                left_out.add("hidden", entry.name)
            elif entry.is_dir():
                folders.append(folder / entry.name)
            elif entry.is_file():
                files.append(folder / entry.name)
            else:
                left_out.add("broken link" if entry.is_symlink() else "no file", entry.name)
    return files, folders


def below(root: Path, left_out: Tally | None = None) -> list[Path]:
    """All files of a folder and of those below it, sorted; no folder is read twice.

    Args:
        left_out: see ``entries``.
    """
    left_out = Tally() if left_out is None else left_out
    found: list[Path] = []
    seen = {_identity(root)}
    linked: list[Path] = []  # entered last: a folder keeps its own name where there is a choice
    waiting = [root]
    while waiting:
        files, inner = entries(waiting.pop(), left_out)
        found += files
        for folder in inner:
            if folder.is_symlink():
                linked.append(folder)
            else:
                seen.add(_identity(folder))
                waiting.append(folder)
        while linked and not waiting:
            folder = linked.pop(0)
            if _identity(folder) in seen:
                left_out.add("link to a folder that is read already", folder.relative_to(root))
            else:
                seen.add(_identity(folder))
                waiting.append(folder)
    return sorted(found)


def of_suffix(
    files: Iterable[Path], left_out: Tally, suffixes: Collection[str] = SUFFIXES
) -> list[Path]:
    """Those of the files that have one of the suffixes (in lower case)."""
    found = []
    for path in files:
        suffix = path.suffix.lower()
        if suffix in suffixes:
            found.append(path)
        else:
            left_out.add(suffix or "without suffix", path.name)
    return found


def tell(place: Path | str, left_out: Tally) -> None:
    """Log one line of what was left out, if anything was."""
    if left_out:
        _log.warning("%s: left out: %s", place, left_out.describe())


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
