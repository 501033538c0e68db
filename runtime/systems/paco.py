"""``paco``: which class is this, where classes look almost alike?

One graph gives logits and the embedding that they are made of. The softmax stands outside of it, in
float64: a graph in INT8 or bf16 would round the probabilities.

Source: PaCo-2 (part contrast; nothing of it is left at inference).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from engineworks.runtime import datasets, draw
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.contract import Contract, Signature
from engineworks.runtime.errors import DatasetError, NotFiniteError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.labels import Labelled
from engineworks.runtime.metrics import ClassificationMetrics, log_softmax
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.results import Classification
from engineworks.runtime.sources import PICTURES
from engineworks.runtime.systems.opened import OpenedSystem
from engineworks.runtime.tensors import Array

NAME = "paco"

_EVALUATION_BATCH = 8


class Params(BaseModel):
    """What the bundle of a ``paco`` system says beyond graph, labels and preprocessing.

    Attributes:
        num_top: classes that a result lists, or all where there are fewer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_top: int = Field(default=5, ge=1, le=1_000_000)


def contract(bundle: Bundle) -> Contract:
    """What this system demands of its bundle."""
    bundle.params(Params)
    height, width = bundle.manifest.preprocess.size
    return Contract(
        preprocess=PreprocessSpec,
        graphs={"classify": Signature({"images": "B3HW"}, {"logits": "BC", "embedding": "BF"})},
        sizes={"H": height, "W": width, "C": len(bundle.manifest.labels)},
    )


class System(OpenedSystem):
    """An opened ``paco`` bundle; see ``runtime.systems.System``."""

    reader = PICTURES

    @staticmethod
    def labelled(root: Path) -> Labelled:
        return datasets.class_labels(root)

    def set_up(self) -> None:
        manifest = self.bundle.manifest
        self.params = self.bundle.params(Params)
        self.spec = manifest.preprocess
        self.labels = manifest.labels

    def infer(self, images: Sequence[Array]) -> list[Classification]:
        """Classify images.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.

        Raises:
            InputError: an image of another dtype or layout.
            NotFiniteError: the network's logits are not finite.
        """
        if not images:
            return []
        logits_BC, embedding_BF = self._run(images)
        return [
            self._result(log_C, embedding_F)
            for log_C, embedding_F in zip(log_softmax(logits_BC), embedding_BF, strict=True)
        ]

    def draw(self, image: Array, result: Classification) -> Array:
        """The image beside a bar for each of the most probable classes: (H', W', 3) uint8 RGB."""
        return draw.ranking(image, result.label, result.top)

    def evaluate(
        self, data: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """The classifier's metrics and errors on the split ``test``, or else on ``val``.

        Args:
            data: a folder or parquet file, see ``runtime.datasets.class_folder``. Its classes are
                the bundle's by name, in whichever order; some may be missing.

        Returns:
            The keys of ``runtime.metrics.ClassificationMetrics``.

        Raises:
            DatasetError: another layout, or a class that the bundle does not know.
            ImageError: a picture that cannot be read.
        """
        split: datasets.Split = "test" if "test" in datasets.class_splits(data) else "val"
        samples = datasets.class_folder(data, split).samples
        index = {label: i for i, label in enumerate(self.labels)}
        if unknown := sorted({sample.class_name for sample in samples} - set(index)):
            raise DatasetError(
                f"{data} has pictures of the class '{unknown[0]}', which bundle "
                f"{self.bundle.root} does not know",
                fix="rename the class to one of the bundle's labels, or leave it out",
            )
        metrics = ClassificationMetrics(len(self.labels))
        for start in range(0, len(samples), _EVALUATION_BATCH):
            part = samples[start : start + _EVALUATION_BATCH]
            logits_BC, _ = self._run([datasets.read(sample) for sample in part])
            for sample, logits_C in zip(part, logits_BC, strict=True):
                metrics.update(logits_C, index[sample.class_name])
            if progress:
                progress(start + len(part), len(samples))
        return metrics.evaluation(self.labels)

    def _run(self, images: Sequence[Array]) -> tuple[Array, Array]:
        """Logits (B, C) and embedding (B, F), both float32."""
        answer = self.engines["classify"].run({"images": apply(self.spec, images)})
        if not np.isfinite(answer["logits"]).all():  # any order of NaN would pass for an answer
            raise NotFiniteError(
                "the 'classify' graph gave values that are not finite",
                fix="run with --precision float, or export again",
            )
        return answer["logits"], answer["embedding"]

    def _result(self, log_C: Array, embedding_F: Array) -> Classification:
        order = np.argsort(-log_C, kind="stable")[: self.params.num_top].tolist()
        top = tuple((self.labels[i], float(np.exp(log_C[i]))) for i in order)
        label, probability = top[0]
        return Classification(
            label=label, index=order[0], probability=probability, top=top, embedding_F=embedding_F
        )
