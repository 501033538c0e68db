"""The images of ``noising``: normal ones to remember, labelled ones to judge by."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime import images
from runtime.datasets import MvtecSample
from runtime.preprocess import PreprocessSpec
from training.data import preprocess


class Images:
    """Pictures as network input, with the place of each in the list."""

    def __init__(self, samples: list[MvtecSample], spec: PreprocessSpec) -> None:
        self.samples = samples
        self.spec = spec

    def __len__(self) -> int:
        return len(self.samples)

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """``images`` (3, height, width) float32 and ``index``; nothing is random."""
        image = images.read(self.samples[index].path)
        return {"images": preprocess(self.spec, [image])[0], "index": index}
