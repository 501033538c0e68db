"""The images of ``noising``: normal ones to learn from, labelled ones to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from engineworks.runtime import headers, images
from engineworks.runtime.datasets import MvtecSample
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.systems.noising.tiles import Layout, Tiles
from engineworks.runtime.tensors import Array
from engineworks.training.data import WHOLE, preprocess
from engineworks.training.ranks import Part
from engineworks.training.systems.noising.config import AugmentConfig, CopiesConfig


class Images:
    """Pictures as network input, whole or tile by tile, each followed by its changed copies where
    those are wanted.

    Attributes:
        layouts: of each picture's tiles; None where it is whole.
        pictures_I: (I,) int64, ascending: which picture each image shows.
        copies_I: (I,) bool: which images are of changed copies.
    """

    def __init__(
        self,
        samples: Sequence[MvtecSample],
        spec: PreprocessSpec,
        copies: CopiesConfig | None = None,
        tiles: Tiles | None = None,
    ) -> None:
        self.samples = samples
        self.spec = spec
        self.copies = copies
        self.layouts = [
            None if tiles is None else Layout.of(_size(sample.path), spec.size, tiles)
            for sample in samples
        ]
        tiles_P = np.array([1 if layout is None else len(layout) for layout in self.layouts], int)
        each_P = tiles_P * (1 + (copies.num if copies else 0))
        self.pictures_I = np.repeat(np.arange(len(samples)), each_P)
        nth_I = np.arange(len(self.pictures_I)) - np.repeat(np.cumsum(each_P) - each_P, each_P)
        copy_I, self._tile_I = np.divmod(nth_I, np.repeat(tiles_P, each_P))
        self.copies_I = copy_I > 0
        self._last: tuple[int, Array] | None = None

    def __len__(self) -> int:
        return len(self.pictures_I)

    def tiles_of(self, picture: int) -> range:
        """The images that show a picture as it is."""
        first = int(np.searchsorted(self.pictures_I, picture))
        layout = self.layouts[picture]
        return range(first, first + (1 if layout is None else len(layout)))

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``images`` (3, height, width) float32 and ``index``; only copies are random."""
        picture = int(self.pictures_I[index])
        image = self._read(picture)
        if self.copies is not None and self.copies_I[index]:
            image = augment(image, self.copies, rng)
        if (layout := self.layouts[picture]) is not None:
            image = layout.cut(image)[self._tile_I[index]]
        return {"images": preprocess(self.spec, [image])[0], "index": index}

    def _read(self, picture: int) -> Array:
        """A picture; the last one is kept, for its other tiles and copies."""
        if self._last is None or self._last[0] != picture:
            self._last = picture, images.read(self.samples[picture].path)
        return self._last[1]


def _size(path: Path) -> tuple[int, int]:
    """(height, width) of a picture, from its header where that says it."""
    header = headers.read(path)
    if header is not None:
        return header.size
    height, width = images.read(path).shape[:2]
    return height, width


class Patches:
    """Batches of normal patches, drawn from features that were computed once."""

    def __init__(
        self,
        features_IND: Array,
        images: Array,
        *,
        steps: int,
        patches: int,
        part: Part = WHOLE,
    ) -> None:
        self.part = part
        self.features_IND = features_IND
        self.images = images
        self.steps = steps
        self.patches = patches

    def __len__(self) -> int:
        return self.steps

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``rows`` (patches, D) float32; this rank's part of them."""
        chosen = self.images[rng.integers(len(self.images), size=self.patches)]
        places = rng.integers(self.features_IND.shape[1], size=self.patches)
        own = self.part.of(self.patches, "patches")
        return {"rows": self.features_IND[chosen[own], places[own]]}


class Augmented:
    """Batches of normal pictures, each changed anew."""

    def __init__(
        self,
        samples: Sequence[MvtecSample],
        spec: PreprocessSpec,
        config: AugmentConfig,
        *,
        steps: int,
        batch_size: int,
        part: Part = WHOLE,
    ) -> None:
        self.part = part
        self.samples = samples
        self.spec = spec
        self.config = config
        self.steps = steps
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.steps

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``images`` (batch_size, 3, height, width) float32; this rank's part of them."""
        chosen = rng.integers(len(self.samples), size=self.batch_size)
        pictures = [images.read(self.samples[i].path) for i in chosen]
        changed = [augment(picture, self.config, rng) for picture in pictures]
        return {"images": preprocess(self.spec, changed[self.part.of(len(changed))])}


def augment(image: Array, config: AugmentConfig, rng: np.random.Generator) -> Array:
    """A picture as it might have been taken as well: (H, W, 3) uint8 RGB, of the same size."""
    if config.flip:
        image = image[:: rng.choice((1, -1)), :: rng.choice((1, -1))]
    if config.rotation:
        height, width = image.shape[:2]
        angle = rng.uniform(-config.rotation, config.rotation)
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle, 1.0)
        image = cv2.warpAffine(
            np.ascontiguousarray(image), turn, (width, height), borderMode=cv2.BORDER_REFLECT_101
        )
    if config.brightness:
        factor = rng.uniform(1 - config.brightness, 1 + config.brightness)
        image = np.rint(np.clip(image * np.float32(factor), 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(image)
