"""``paco``: which class is this, where classes look almost alike?

One graph gives logits and the embedding that they are made of. The softmax stands outside of it, in
float64: a graph in INT8 or bf16 would round the probabilities. So do temperature, prediction set
and the border of what is unknown, see ``runtime.confidence``: of float and of INT8 graphs each.
Graphs of 16 bits round the float ones, and take theirs.

Source: PaCo-2 (part contrast; nothing of it is left at inference).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from engineworks.runtime import datasets, draw
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.confidence import Confidence
from engineworks.runtime.contract import Contract, Signature
from engineworks.runtime.errors import DatasetError, NotFiniteError
from engineworks.runtime.evaluation import Evaluation, Rate
from engineworks.runtime.labels import Labelled
from engineworks.runtime.metrics import ClassificationMetrics, log_softmax
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.results import Classification
from engineworks.runtime.sources import PICTURES
from engineworks.runtime.systems.opened import OpenedSystem, in_turn
from engineworks.runtime.tensors import Array

NAME = "paco"

Fitted: TypeAlias = Literal["float", "int8"]  # precisions that have a confidence of their own

_EVALUATION_BATCH = 8
_FITTED_ON = (
    "has no split 'test' here: ece, coverage and set size flatter it, if its confidence was fitted "
    "on these pictures"
)


class Params(BaseModel):
    """What the bundle of a ``paco`` system says beyond graph, labels and preprocessing.

    Attributes:
        num_top: classes that a result lists, or all where there are fewer.
        confidence: of a precision, where it was fitted; the border of what is unknown is the
            threshold ``unknown-<precision>``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_top: int = Field(default=5, ge=1, le=1_000_000)
    confidence: dict[Fitted, Confidence] = Field(default={}, exclude_if=lambda value: not value)


def unknown_border(fitted: Fitted) -> str:
    """Name of the threshold of what is unknown."""
    return f"unknown-{fitted}"


def contract(bundle: Bundle) -> Contract:
    """What this system demands of its bundle."""
    params = bundle.params(Params)
    height, width = bundle.manifest.preprocess.size
    return Contract(
        preprocess=PreprocessSpec,
        graphs={"classify": Signature({"images": "B3HW"}, {"logits": "BC", "embedding": "BF"})},
        sizes={"H": height, "W": width, "C": len(bundle.manifest.labels)},
        thresholds=tuple(unknown_border(fitted) for fitted in params.confidence),
    )


class System(OpenedSystem):
    """An opened ``paco`` bundle; see ``runtime.systems.System``."""

    reader = PICTURES
    confidence: Confidence | None = None  # of the precision that runs

    @staticmethod
    def labelled(root: Path) -> Labelled:
        return datasets.class_labels(root)

    def set_up(self) -> None:
        manifest = self.bundle.manifest
        self.params = self.bundle.params(Params)
        self.spec = manifest.preprocess
        self.labels = manifest.labels
        self._fitted: Fitted = "int8" if self.precision.startswith("int8") else "float"
        self.confidence = self.params.confidence.get(self._fitted)

    @in_turn
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
            for log_C, embedding_F in zip(self._log(logits_BC), embedding_BF, strict=True)
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
            The keys of ``runtime.metrics.ClassificationMetrics``; where the bundle has a
            confidence also ece_uncalibrated, what ece is without it; coverage, the share of images
            whose class is in their prediction set; and set_size, the mean number of classes there.

        Raises:
            DatasetError: another layout, or a class that the bundle does not know.
            ImageError: a picture that cannot be read.
        """
        split: datasets.Split = "test" if "test" in datasets.class_splits(data) else "val"
        logits_IC, label_I = self._logits(data, split, progress)
        log_IC = self._log(logits_IC)
        judged = ClassificationMetrics.of(log_IC, label_I).evaluation(self.labels)
        if self.confidence is None:
            return judged
        in_set_IC = np.exp(log_IC) >= self.confidence.limit
        called_I = self.confidence.unlikeness(log_IC) >= self._border()
        rate = Rate.counted(int(called_I.sum()), len(label_I))
        first, *others = judged.decisions
        warnings = first.warnings if split == "test" else (*first.warnings, _FITTED_ON)
        rates = {**first.rates, "called unknown": rate}
        first = first.model_copy(update={"rates": rates, "warnings": warnings})
        metrics = {
            "ece_uncalibrated": ClassificationMetrics.of(logits_IC, label_I).compute()["ece"],
            "coverage": float(in_set_IC[np.arange(len(label_I)), label_I].mean()),
            "set_size": float(in_set_IC.sum(axis=1).mean()),
        }
        return replace(judged, metrics=judged.metrics | metrics, decisions=(first, *others))

    def fit_confidence(self, data: Path | None) -> Bundle:
        """See ``runtime.systems.Confident``; fitted on the split ``val``.

        Raises:
            DatasetError, ImageError: as ``evaluate``.
        """
        manifest = self.bundle.manifest
        known, thresholds = dict(self.params.confidence), dict(manifest.thresholds)
        before = known.pop(self._fitted, None) or next(iter(known.values()), None)
        thresholds.pop(unknown_border(self._fitted), None)
        if data is not None and _validates(data):
            asked = {} if before is None else before.model_dump(include={"coverage", "budget"})
            fitted, border = Confidence.fit(*self._logits(data, "val", None), **asked)
            known[self._fitted], thresholds[unknown_border(self._fitted)] = fitted, border
        params = self.params.model_copy(update={"confidence": known})
        changed = {"params": params.model_dump(mode="json"), "thresholds": thresholds}
        return replace(self.bundle, manifest=manifest.model_copy(update=changed))

    def _run(self, images: Sequence[Array]) -> tuple[Array, Array]:
        """Logits (B, C) and embedding (B, F), both float32."""
        answer = self.engines["classify"].run({"images": apply(self.spec, images)})
        if not np.isfinite(answer["logits"]).all():  # any order of NaN would pass for an answer
            raise NotFiniteError(
                "the 'classify' graph gave values that are not finite",
                fix="run with --precision float, or export again",
            )
        return answer["logits"], answer["embedding"]

    def _logits(
        self, data: Path, split: datasets.Split, progress: Callable[[int, int], None] | None
    ) -> tuple[Array, Array]:
        """Logits (I, C) of all pictures of a split, and the place of each one's class (I,)."""
        samples = datasets.class_folder(data, split).samples
        index = {label: i for i, label in enumerate(self.labels)}
        if unknown := sorted({sample.class_name for sample in samples} - set(index)):
            raise DatasetError(
                f"{data} has pictures of the class '{unknown[0]}', which bundle "
                f"{self.bundle.root} does not know",
                fix="rename the class to one of the bundle's labels, or leave it out",
            )
        found = []
        for start in range(0, len(samples), _EVALUATION_BATCH):
            part = samples[start : start + _EVALUATION_BATCH]
            found.append(self._run([datasets.read(sample) for sample in part])[0])
            if progress:
                progress(start + len(part), len(samples))
        return np.concatenate(found), np.array([index[sample.class_name] for sample in samples])

    def _log(self, logits: Array) -> Array:
        """Logarithms of the probabilities, calibrated where that was fitted."""
        if self.confidence is None:
            return log_softmax(logits)
        return self.confidence.log_probabilities(logits)

    def _border(self) -> float:
        return self.bundle.manifest.thresholds[unknown_border(self._fitted)].value

    def _result(self, log_C: Array, embedding_F: Array) -> Classification:
        order = np.argsort(-log_C, kind="stable").tolist()
        ranked = [(self.labels[i], float(np.exp(log_C[i]))) for i in order]
        label, probability = ranked[0]
        result = Classification(
            label=label,
            index=order[0],
            probability=probability,
            top=tuple(ranked[: self.params.num_top]),
            embedding_F=embedding_F,
        )
        if self.confidence is None:
            return result
        limit = self.confidence.limit
        return replace(
            result,
            prediction_set=tuple(label for label, p in ranked if p >= limit),
            is_unknown=bool(self.confidence.unlikeness(log_C) >= self._border()),
        )


def _validates(data: Path) -> bool:
    """Whether data have pictures that are for validation alone.

    A folder without splits has the same ones for both, and what is fitted on them they cannot
    judge.
    """
    splits = datasets.class_splits(data)
    if "val" not in splits or "test" not in splits:
        return "val" in splits
    val, test = (datasets.class_folder(data, split).samples for split in ("val", "test"))
    return val != test
