"""``backbone``: what does a frozen net say of this picture, as one vector?

The bundle of a net alone, made by ``cli.py export backbone:NAME``. One graph gives its feature
maps, and the class token where it has one. Training uses these in the place of the eager net; here
they become a vector by which pictures can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from engineworks.runtime import datasets
from engineworks.runtime.bundle import Bundle, Manifest, Name
from engineworks.runtime.contract import Contract, Signature
from engineworks.runtime.errors import NotFiniteError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.labels import Labelled
from engineworks.runtime.metrics import leave_one_out
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.results import Embedding
from engineworks.runtime.sources import PICTURES
from engineworks.runtime.spool import Spool
from engineworks.runtime.systems.opened import OpenedSystem, in_turn
from engineworks.runtime.tensors import Array

NAME = "backbone"
GRAPH = "features"
TOKEN = "token"  # the output that is no map
WEIGHTS = "weights"  # asset: the same net's tensors, for training to save and export

_EVALUATION_BATCH = 8


class Params(BaseModel):
    """What the bundle of a ``backbone`` says beyond graph and preprocessing.

    Attributes:
        name: timm's.
        stages: of the maps; None: the last map of the whole net.
        args: of ``timm.create_model``.
        norm: whether its stages also pass the net's last norm.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Name
    stages: tuple[int, ...] | None = None
    args: dict[str, Any] = {}
    norm: bool = False


def contract(bundle: Bundle) -> Contract:
    """What this system demands of its bundle."""
    bundle.params(Params)
    manifest = bundle.manifest
    outputs = manifest.graphs[GRAPH].outputs if GRAPH in manifest.graphs else {}
    axes = {name: "BC" if name == TOKEN else "BChw" for name in outputs}
    height, width = manifest.preprocess.size
    return Contract(
        preprocess=PreprocessSpec,
        graphs={GRAPH: Signature({"images": "B3HW"}, axes)},
        sizes={"H": height, "W": width},
    )


def map_names(manifest: Manifest) -> list[str]:
    """The outputs that are maps, the finest first."""
    return [name for name in manifest.graphs[GRAPH].outputs if name != TOKEN]


def embed(outputs: Mapping[str, Array]) -> Array:
    """(B, F) float32 of length 1: the token and the mean of each map, each of length 1 before.

    Args:
        outputs: of the graph: maps (B, C, h, w), and perhaps the token (B, C).
    """
    parts = [
        _unit(values if name == TOKEN else values.mean(axis=(2, 3), dtype=np.float64))
        for name, values in outputs.items()
    ]
    whole_BF: Array = np.concatenate(parts, axis=1) / np.sqrt(len(parts))
    return whole_BF.astype(np.float32)


def _unit(rows_BF: Array) -> Array:
    length_B1 = np.linalg.norm(rows_BF.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(rows_BF / np.maximum(length_B1, np.finfo(np.float32).tiny))


class System(OpenedSystem):
    """An opened ``backbone`` bundle; see ``runtime.systems.System``."""

    reader = PICTURES

    @staticmethod
    def labelled(root: Path) -> Labelled:
        return datasets.class_labels(root)

    def set_up(self) -> None:
        self.params = self.bundle.params(Params)
        self.spec = self.bundle.manifest.preprocess

    @in_turn
    def infer(self, images: Sequence[Array]) -> list[Embedding]:
        """Describe images.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.

        Raises:
            InputError: an image of another dtype or layout.
            NotFiniteError: the network's features are not finite.
        """
        return [Embedding(vector_F) for vector_F in self._embed(images)] if images else []

    def draw(self, image: Array, result: Embedding) -> Array:
        """The image as it is: a vector has no place on it."""
        return image

    def evaluate(
        self, data: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """How often the most similar other picture is of the same class.

        Args:
            data: a folder or parquet file, see ``runtime.datasets.class_folder``; its split
                ``test``, or ``val`` where there is no other.

        Returns:
            ``top1``, see ``runtime.metrics.leave_one_out``; a vector decides nothing.

        Raises:
            DatasetError: another layout.
            ImageError: a picture that cannot be read.
            InputError: no class has two pictures.
        """
        split: datasets.Split = "test" if "test" in datasets.class_splits(data) else "val"
        samples = datasets.class_folder(data, split).samples
        vectors = Spool()
        for start in range(0, len(samples), _EVALUATION_BATCH):
            part = samples[start : start + _EVALUATION_BATCH]
            vectors.append(self._embed([datasets.read(sample) for sample in part]))
            if progress:
                progress(start + len(part), len(samples))
        labels_N = np.array([sample.label for sample in samples])
        return leave_one_out(vectors, labels_N)

    def _embed(self, images: Sequence[Array]) -> Array:
        vectors_BF = embed(self.engines[GRAPH].run({"images": apply(self.spec, images)}))
        if not np.isfinite(vectors_BF).all():
            raise NotFiniteError(
                f"the '{GRAPH}' graph gave values that are not finite",
                fix="run with --precision float, or export again",
            )
        return vectors_BF
