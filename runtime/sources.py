"""What ``--source`` may be: a picture, folder, glob, list, video, webcam or stream."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engineworks.runtime import folders
from engineworks.runtime.errors import InputError
from engineworks.runtime.folders import Tally
from engineworks.runtime.images import SUFFIXES, decode, read
from engineworks.runtime.tensors import Array
from engineworks.runtime.texts import hide_secrets

VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
_SCHEMES = ("rtsp://", "rtsps://", "http://", "https://", "udp://", "tcp://")


@dataclass(frozen=True)
class Reader:
    """How files become the images of a system.

    Attributes:
        read: decodes the image that a path names; raises an ImageError.
        suffixes: of files that it can read.
        is_image: False for a file that is only a part of the image that another one names.
        files: all files of the image that a path names; raises an ImageError where one is missing.
        takes_video: whether a video's frames are images of the system as well.
        decode: likewise the content of a file that is an image by itself, and what errors call it.
    """

    read: Callable[[Path], Array]
    suffixes: frozenset[str] = SUFFIXES
    is_image: Callable[[Path], bool] = lambda _: True
    files: Callable[[Path], tuple[Path, ...]] = lambda path: (path,)
    takes_video: bool = True
    decode: Callable[[bytes, str], Array] = decode

    def find(self, files: Iterable[Path], left_out: Tally) -> list[Path]:
        """The files that name images; those of other suffixes go to ``left_out``."""
        return [p for p in folders.of_suffix(files, left_out, self.suffixes) if self.is_image(p)]

    def below(self, root: Path, *, tell: bool = True) -> list[Path]:
        """All files of a folder, and of those below it, that name images; sorted.

        Args:
            tell: what is left out.
        """
        left_out = Tally()
        found = self.find(folders.below(root, left_out), left_out)
        if tell:
            folders.tell(root, left_out)
        return found


PICTURES = Reader(read)


@dataclass(frozen=True)
class Source:
    """Where images come from.

    Attributes:
        kind: ``images`` (files in order), ``video`` (one file) or ``stream`` (live: frames may be
            dropped).
        paths: the picture files, or the video file; empty for a stream.
        address: what the stream decoder opens; for ``video`` and ``stream``. It may hold a
            password: nobody is shown it.
        reader: of the files, for ``images``.
    """

    kind: Literal["images", "video", "stream"]
    paths: tuple[Path, ...] = ()
    address: str = field(default="", repr=False)
    reader: Reader = PICTURES

    @property
    def name(self) -> str:
        """The address without its secrets, to be shown and written."""
        return hide_secrets(self.address)

    @property
    def num_images(self) -> int | None:
        """How many pictures it holds; None for a video (its file may say) and for a stream."""
        return len(self.paths) if self.kind == "images" else None


def open_source(text: str, reader: Reader = PICTURES) -> Source:
    """Tell what the user means.

    Args:
        text: a picture, a folder (read recursively, sorted, by the rule of ``runtime.folders``), a
            glob (by the same rule), a ``.txt`` list with one path per line (relative to the list;
            order kept, ``#`` starts a comment line), a video file, a webcam's number, or an address
            such as ``rtsp://...``. A folder that is named like a webcam is meant by ``./0``.
        reader: of the system that the images are for.

    Raises:
        InputError: nothing there, or nothing that can be read as pictures or video.
    """
    if text.isdecimal() or text.lower().startswith(_SCHEMES):
        return _moving(Source("stream", address=text), reader)
    path = Path(text)
    if not text:
        raise InputError("the source is empty", fix="give a file, folder, glob, list or address")
    if path.is_dir():
        left_out = Tally()
        return _images(folders.below(path, left_out), text, reader, left_out)
    if path.is_file():
        suffix = path.suffix.lower()
        if suffix == ".txt":
            return _listed(path, reader)
        if suffix in VIDEO_SUFFIXES:
            return _moving(Source("video", (path,), str(path)), reader)
        if suffix in reader.suffixes:
            return Source("images", (path,), reader=reader)
        raise InputError(
            f"{text} is neither a picture nor a video by its suffix",
            fix=f"known are {', '.join(sorted(reader.suffixes | VIDEO_SUFFIXES))} and .txt lists",
        )
    if glob.has_magic(text):
        left_out = Tally()
        return _images(_matches(text, left_out), text, reader, left_out)
    raise InputError(f"there is nothing at {text}", fix="check the path, or quote the glob")


def _moving(source: Source, reader: Reader) -> Source:
    if not reader.takes_video:
        raise InputError(
            f"the frames of {source.name} are no images of this system",
            fix="give files that hold a target and its references",
        )
    return source


def _matches(pattern: str, left_out: Tally) -> list[Path]:
    """The files that a glob finds, sorted; each once, also where links form a loop."""
    # Path.glob refuses absolute patterns
    found = [Path(p) for p in glob.glob(pattern, recursive=True)]  # noqa: PTH207
    asked = Path(pattern).parts
    files: dict[Path, Path] = {}
    for path in sorted(found, key=lambda path: (len(path.parts), path)):
        if any(folders.is_litter(part) for part in path.parts if part not in asked):
            left_out.add("hidden", path)
        elif path.is_file():
            itself = path.parent.resolve() / path.name
            if itself in files:
                left_out.add("found again through a link", path)
            files.setdefault(itself, path)
    return sorted(files.values())


def _images(files: list[Path], text: str, reader: Reader, left_out: Tally) -> Source:
    pictures = tuple(reader.find(files, left_out))
    folders.tell(text, left_out)
    if not pictures:
        videos = [p for p in files if p.suffix.lower() in VIDEO_SUFFIXES]
        raise InputError(
            f"no pictures in {text}",
            fix=f"give one video at a time, e.g. {videos[0]}"
            if videos
            else f"known suffixes are {', '.join(sorted(reader.suffixes))}",
        )
    return Source("images", pictures, reader=reader)


def _listed(path: Path, reader: Reader) -> Source:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text in UTF-8", fix="save the list as UTF-8") from error
    # no file can have a zero byte in its name: this one will be missing, and the others read
    lines = [line.strip().replace("\0", "\N{REPLACEMENT CHARACTER}") for line in text.splitlines()]
    files = tuple(path.parent / line for line in lines if line and not line.startswith("#"))
    if not files:
        raise InputError(f"{path} lists no pictures", fix="write one path per line")
    return Source("images", files, reader=reader)
