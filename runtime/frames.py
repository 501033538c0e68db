"""Labelled frames and references to pixels, through a cache of bounded size."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

from engineworks.runtime import images
from engineworks.runtime.objects import Frame, Reference, coco_references
from engineworks.runtime.references import Picture, View, alone
from engineworks.runtime.tensors import Array
from engineworks.runtime.video import VideoFile

_MAX_OPEN = 8  # decoders of videos; where the frames of the others lie is still known


class Frames:
    """Decodes frames, and keeps the least recently used ones as far as they fit.

    One decoder per video stays open, so that frames in order cost no seeking. Not for several
    threads at once.

    Attributes:
        num_hits, num_misses: reads that the cache could and could not answer.
    """

    def __init__(self, max_bytes: int) -> None:
        """Open nothing yet.

        Args:
            max_bytes: of all frames that are kept.
        """
        self.max_bytes = max_bytes
        self.num_hits = self.num_misses = 0
        self._kept: OrderedDict[Frame, Array] = OrderedDict()
        self._num_bytes = 0
        self._videos: dict[Path, VideoFile] = {}
        self._open: OrderedDict[Path, VideoFile] = OrderedDict()

    def read(self, frame: Frame) -> Array:
        """(H, W, 3) uint8 RGB; not to be written to.

        Raises:
            ImageError, VideoError: it cannot be read.
        """
        if frame in self._kept:
            self.num_hits += 1
            self._kept.move_to_end(frame)
            return self._kept[frame]
        self.num_misses += 1
        image = self._decode(frame)
        image.flags.writeable = False
        if image.nbytes <= self.max_bytes:
            self._kept[frame] = image
            self._num_bytes += image.nbytes
            while self._num_bytes > self.max_bytes:
                self._num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return image

    def reference(self, reference: Reference) -> Array:
        """(H, W, 3) uint8 RGB: the picture, or its box with a little around it.

        Raises:
            ImageError, VideoError: see ``read``.
        """
        return alone(self.view(reference))

    def view(self, reference: Reference) -> Picture:
        """The picture; where a box of it is the object, all that is around it as well.

        Raises:
            ImageError, VideoError: see ``read``.
        """
        image = self.read(reference.frame)
        return image if reference.box is None else View(image, reference.box)

    def close(self) -> None:
        """Release all decoders; closing twice is allowed."""
        while self._open:
            self._open.popitem()[1].close()

    def __getstate__(self) -> dict[str, int]:
        return {"max_bytes": self.max_bytes}  # another process opens and keeps its own

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["max_bytes"])  # type: ignore[misc]

    def _decode(self, frame: Frame) -> Array:
        if frame.index is None:
            return images.read(frame.path)
        if frame.path not in self._videos:
            self._videos[frame.path] = VideoFile(frame.path)
        video = self._open[frame.path] = self._videos[frame.path]
        self._open.move_to_end(frame.path)
        if len(self._open) > _MAX_OPEN:
            self._open.popitem(last=False)[1].close()
        return video.read(frame.index)


def read_coco_references(path: Path) -> dict[str, list[Picture]]:
    """The pictures of what a COCO file names or shows; see ``runtime.objects.coco_references``.

    Raises:
        InputError, DatasetError, ImageError: as there, or a picture that cannot be read.
    """
    frames = Frames(0)
    found = coco_references(path)
    return {name: [frames.view(each) for each in references] for name, references in found.items()}
