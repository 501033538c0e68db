"""Where inference leaves its results: what tables, COCO's file and overlays have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

from engineworks.runtime.systems import Result
from engineworks.runtime.tensors import Array


@dataclass(frozen=True)
class Item:
    """A decoded picture, or the message why there is none.

    Attributes:
        name: path of the picture, or name of the video or stream.
        image: (H, W, 3), as the system's reader gives it.
        index, time_s: of a frame: its number, and seconds since the start.
        camera: name of its source, where there are several.
        arrived_s: when it was decoded, of ``time.monotonic``.
    """

    name: str
    image: Array | None = None
    error: str | None = None
    index: int | None = None
    time_s: float | None = None
    camera: str = ""
    arrived_s: float | None = None

    def arrived(self, now_s: float) -> Item:
        """The same, decoded at that time."""
        return replace(self, arrived_s=now_s)


class Sink(Protocol):
    """Takes results one by one, in the order of the source; open between enter and exit.

    What it was given is kept, whatever ends the process.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object, /
    ) -> None: ...

    def add(self, item: Item, image: Array, result: Result) -> str | None:
        """Keep one result.

        Args:
            image: that of ``item``.

        Returns:
            None, or why the result cannot be used; then nothing of it is kept.
        """
        ...

    def failed(self, item: Item, error: str) -> None:
        """Note that there is no result for a picture."""
        ...
