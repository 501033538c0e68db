"""Which sources are read together, and how each of them is: by ``--source``, or by a YAML list.

- name: left
  source: rtsp://camera-1/stream     # whatever --source takes
- name: door
  source: recordings/door.mp4
  frame_step: 5
  keep: newest                       # all | newest
  buffer: 1                          # frames
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from engineworks.runtime.errors import ConfigError, InputError
from engineworks.runtime.names import file_name
from engineworks.runtime.sources import PICTURES, Reader, Source, open_source

_SUFFIXES = (".yaml", ".yml")
# of files that stand beside the folders of the sources
_TAKEN = re.compile(r"overlays|doubtful|outbox.*|earlier-\d+", re.IGNORECASE)

Keep = Literal["all", "newest"]


@dataclass(frozen=True)
class Camera:
    """One of the sources of a run.

    Attributes:
        name: of its folder of results; empty where there is no other source.
        step: only every n-th frame of a video or stream.
        keep: where frames come faster than answers: ``all`` has the source wait, ``newest`` drops
            older frames; None: ``newest`` of a stream, ``all`` of files.
        buffer: frames that may wait for an answer; None: as many as fit the batch, of a stream 1.
        text: the source as it was given; it may hold a password.
    """

    name: str
    source: Source
    step: int = 1
    keep: Keep | None = None
    buffer: int | None = None
    text: str = field(default="", repr=False)

    @property
    def drops(self) -> bool:
        """Whether frames are dropped where they come too fast."""
        return self.source.kind == "stream" if self.keep is None else self.keep == "newest"


class _Entry(BaseModel):
    """Of a list in YAML."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=60)
    source: str
    frame_step: int | None = Field(default=None, ge=1)
    keep: Keep | None = None
    buffer: int | None = Field(default=None, ge=1, le=10_000)

    @field_validator("source", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value  # of a webcam


def open_cameras(texts: Sequence[str], reader: Reader = PICTURES, *, step: int = 1) -> list[Camera]:
    """The sources that are meant by one ``--source`` or several.

    Args:
        texts: each as ``sources.open_source`` takes it, or a YAML list of cameras.
        reader: of the system that the images are for.
        step: where a list does not say another one.

    Returns:
        At least one; the only one has no name, unless it stands in a list.

    Raises:
        InputError: nothing there, or nothing that can be read as pictures or video.
        ConfigError: a list that is none, or two cameras of a name.
    """
    listed = [_listed(Path(text)) if text.lower().endswith(_SUFFIXES) else None for text in texts]
    if len(texts) == 1 and listed[0] is None:
        return [Camera("", open_source(texts[0], reader), step, text=texts[0])]
    found: list[Camera] = []
    for text, entries in zip(texts, listed, strict=True):
        if entries is None:
            source = open_source(text, reader)
            found.append(Camera(_free_name(source, text, found), source, step, text=text))
            continue
        for entry in entries:
            given = _relative(entry.source, Path(text))
            found.append(
                Camera(
                    entry.name,
                    open_source(given, reader),
                    entry.frame_step or step,
                    keep=entry.keep,
                    buffer=entry.buffer,
                    text=given,
                )
            )
    _check_names([camera.name for camera in found])
    return found


def _listed(path: Path) -> list[_Entry]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = yaml.safe_load(text)
        if not isinstance(entries, list) or not entries:
            raise ConfigError(f"{path} is no list of cameras", fix="begin each with `- name: ...`")
        return [_Entry.model_validate(entry) for entry in entries]
    except FileNotFoundError as error:
        raise InputError(f"there is nothing at {path}", fix="check the path") from error
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        what = str(error).replace("\n", " ")
        raise ConfigError(f"{path} is no YAML: {what}", fix="write a list of cameras") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"{path}: {where}: {first['msg']}",
            fix="of a camera: name and source, and frame_step, keep and buffer where wanted",
        ) from error


def _relative(text: str, listed_in: Path) -> str:
    """A path in a list is relative to the list."""
    beside = listed_in.parent / text
    return text if text.isdecimal() or "://" in text else str(beside)


def _free_name(source: Source, text: str, others: Sequence[Camera]) -> str:
    """A name for a source that was given none."""
    if source.kind == "stream":
        wanted = (
            f"camera-{text}" if text.isdecimal() else urlsplit(source.name).hostname or "stream"
        )
    else:
        wanted = Path(text).stem or Path(text).resolve().name
    wanted = file_name(re.sub(r"[*?\[\]]+", "", wanted) or "pictures")
    taken = {camera.name.casefold() for camera in others}
    names = (wanted if i == 1 else f"{wanted}-{i}" for i in count(1))
    return next(
        name for name in names if name.casefold() not in taken and not _TAKEN.fullmatch(name)
    )


def _check_names(names: Sequence[str]) -> None:
    for i, name in enumerate(names):
        if file_name(name) != name or _TAKEN.fullmatch(name):
            raise ConfigError(
                f"'{name}' cannot be the name of a folder of results", fix="take letters and digits"
            )
        if name.casefold() in {other.casefold() for other in names[:i]}:
            raise ConfigError(f"two sources are called '{name}'", fix="give each its own name")
