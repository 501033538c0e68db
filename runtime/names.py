"""Names of files made of what data say: no name becomes a path, none is taken for another."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

_MAX_BYTES = 100  # of 255 that file systems take: prefix, number and suffix come to it
_FORBIDDEN = frozenset('<>:"/\\|?*')
_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(10))}
)


def file_name(text: str) -> str:
    """A part of a file's name for a text of any kind, such as a class's name.

    Letters of all scripts, digits, spaces and most signs stay. What a file system may refuse or
    read as a path becomes ``_``, what is too long is cut; then a hash of the text is appended, so
    that two texts keep two names.

    Returns:
        Neither empty nor hidden, at most 100 bytes of UTF-8.
    """
    safe = "".join("_" if _is_unsafe(sign) else sign for sign in text).rstrip(". ")
    if not safe or safe[0] in ".- " or safe.partition(".")[0].strip().lower() in _DEVICES:
        safe = f"_{safe}"
    if safe == text and len(safe.encode()) <= _MAX_BYTES:
        return safe
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    kept = safe.encode("utf-8", "ignore")[: _MAX_BYTES - 9].decode("utf-8", "ignore")
    return f"{kept}-{digest}"


def _is_unsafe(sign: str) -> bool:
    return sign in _FORBIDDEN or not sign.isprintable()


def overlay_names(paths: Sequence[Path]) -> dict[Path, Path]:
    """A file name for each picture's overlay: its path below the common folder, never one twice.

    Names that differ in nothing but case count as one: some file systems do not tell them apart.

    Returns:
        picture -> relative PNG path.
    """
    if not paths:
        return {}
    # `..` in a list's entries must not lead out of the folder of overlays
    places = {path: Path(os.path.abspath(path)) for path in paths}  # noqa: PTH100
    base = Path(os.path.commonpath([place.parent for place in places.values()]))
    wanted = {path: place.relative_to(base) for path, place in places.items()}
    names: dict[Path, Path] = {}
    taken = {_folded(folder) for name in wanted.values() for folder in name.parents}
    for path, name in wanted.items():
        # a.jpg beside a.png: keep the suffix in the name, and count where that is taken as well
        candidates = chain(
            (name.with_suffix(".png"), name.with_name(f"{name.name}.png")),
            (name.with_name(f"{name.name}.{i}.png") for i in count(2)),
        )
        names[path] = next(each for each in candidates if _folded(each) not in taken)
        taken.add(_folded(names[path]))
    return names


def _folded(path: Path) -> str:
    return str(path).casefold()
