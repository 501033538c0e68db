"""The images of ``noising``: normal ones to learn from, labelled ones to judge by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from runtime import images
from runtime.datasets import MvtecSample
from runtime.preprocess import PreprocessSpec
from runtime.tensors import Array
from training.data import preprocess
from training.systems.noising.config import AugmentConfig, CopiesConfig


class Images:
    """Pictures as network input, each followed by its changed copies where those are wanted."""

    def __init__(
        self,
        samples: Sequence[MvtecSample],
        spec: PreprocessSpec,
        copies: CopiesConfig | None = None,
    ) -> None:
        self.samples = samples
        self.spec = spec
        self.copies = copies
        self.each = 1 + (copies.num if copies else 0)

    def __len__(self) -> int:
        return self.each * len(self.samples)

    @property
    def pictures_I(self) -> Array:
        """Which picture each image shows: (I,) int64, ascending."""
        return np.arange(len(self)) // self.each

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``images`` (3, height, width) float32 and ``index``; only copies are random."""
        picture, copy = divmod(index, self.each)
        image = images.read(self.samples[picture].path)
        if self.copies is not None and copy:
            image = augment(image, self.copies, rng)
        return {"images": preprocess(self.spec, [image])[0], "index": index}


class Patches:
    """Batches of normal patches, drawn from features that were computed once."""

    def __init__(self, features_IND: Array, images: Array, *, steps: int, patches: int) -> None:
        self.features_IND = features_IND
        self.images = images
        self.steps = steps
        self.patches = patches

    def __len__(self) -> int:
        return self.steps

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``rows`` (patches, D) float32."""
        chosen = self.images[rng.integers(len(self.images), size=self.patches)]
        places = rng.integers(self.features_IND.shape[1], size=self.patches)
        return {"rows": self.features_IND[chosen, places]}


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
    ) -> None:
        self.samples = samples
        self.spec = spec
        self.config = config
        self.steps = steps
        self.batch_size = batch_size

    def __len__(self) -> int:
        return self.steps

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``images`` (batch_size, 3, height, width) float32."""
        chosen = rng.integers(len(self.samples), size=self.batch_size)
        pictures = [images.read(self.samples[i].path) for i in chosen]
        changed = [augment(picture, self.config, rng) for picture in pictures]
        return {"images": preprocess(self.spec, changed)}


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
