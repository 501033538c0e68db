"""Metrics of a classifier: how often it is right, and whether it knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np

from engineworks.runtime.errors import InputError
from engineworks.runtime.evaluation import Decisions, Evaluation, Rate, warned
from engineworks.runtime.evidence import Shares
from engineworks.runtime.tensors import Array

TOP = 5
ECE_BINS = 15
SURE = 0.9  # probability from which a classifier's errors are counted apart


class ClassificationMetrics:
    """Collects logits image by image; then the metrics of a classifier in one go.

    Keys of ``compute``, all in [0, 1] but nll:

    * top1, top5: share of images whose class is the most probable one, or among the five most
      probable; of equal logits the first counts as larger. top5 only with more than 5 classes.
    * balanced_accuracy: mean over the classes that occur of the share found of each.
    * ece: expected calibration error: how far the probability of the most probable class is from
      the share of images where it is the right one, in 15 bins of equal width, mean over images.
    * nll: mean of the negative logarithm of the right class's probability, in nats.

    Attributes:
        confusion: (C, C) int64 counts so far: row the class, column the most probable one.

    Source of ece: Guo et al., "On Calibration of Modern Neural Networks", 2017.
    """

    def __init__(self, num_classes: int) -> None:
        self.confusion: Array = np.zeros((num_classes, num_classes), np.int64)
        self._num_in_top = 0
        self._nll = 0.0
        self._gaps = np.zeros(ECE_BINS)  # sum of (right - probability) per bin
        self._answers: list[tuple[int, bool, float]] = []  # label, whether right, probability

    @classmethod
    def of(cls, logits_NC: Array, label_N: Array) -> Self:
        """Of all images at once: (N, C) float, C >= 1, and (N,) int; see ``update``."""
        metrics = cls(logits_NC.shape[1])
        for logits_C, label in zip(logits_NC, label_N.tolist(), strict=True):
            metrics.update(logits_C, label)
        return metrics

    def update(self, logits_C: Array, label: int) -> None:
        """Add one image.

        Args:
            logits_C: (C,) float; logarithms of probabilities are logits as well.
            label: index of its class.

        Raises:
            InputError: logits that are not finite or not C, or a label that is none of C.
        """
        num_classes = len(self.confusion)
        if logits_C.shape != (num_classes,) or not 0 <= label < num_classes:
            raise InputError(
                f"logits of shape {logits_C.shape} and label {label} do not fit "
                f"{num_classes} classes"
            )
        if not np.isfinite(logits_C).all():
            raise InputError(
                "an image has logits that are not finite",
                fix="look for NaN in the graph's outputs: compare float and INT8",
            )
        log_C = log_softmax(logits_C)
        order = np.argsort(-log_C, kind="stable")
        best = int(order[0])
        probability = float(np.exp(log_C[best]))
        self.confusion[label, best] += 1
        self._answers.append((label, best == label, probability))
        self._num_in_top += int(label in order[:TOP])
        self._nll -= float(log_C[label])
        # a bin holds its upper end: (0, 1/15], (1/15, 2/15], ...
        self._gaps[int(np.ceil(probability * ECE_BINS)) - 1] += (best == label) - probability

    def compute(self) -> dict[str, float]:
        """All metrics; none before the first image."""
        total = int(self.confusion.sum())
        if not total:
            return {}
        right, occurs = np.diag(self.confusion), self.confusion.sum(axis=1)
        found = {"top1": float(right.sum() / total)}
        if len(self.confusion) > TOP:
            found["top5"] = self._num_in_top / total
        recall = right[occurs > 0] / occurs[occurs > 0]
        return found | {
            "balanced_accuracy": float(recall.mean()),
            "ece": float(np.abs(self._gaps).sum() / total),
            "nll": self._nll / total,
        }

    def evaluation(self, labels: Sequence[str]) -> Evaluation:
        """Metrics, errors at the classifier's own confidence, and evidence of top1.

        Args:
            labels: name of each class.
        """
        label_I, right_I, probability_I = (
            np.array([answer[i] for answer in self._answers], kind)
            for i, kind in enumerate((np.int64, bool, np.float64))
        )
        sure_I = probability_I >= SURE
        rates = {
            name: Rate.counted(int((~right_I & of).sum()), int(of.sum()))
            for name, of in (
                ("errors", np.ones(len(label_I), bool)),
                (f"errors of those at {SURE} or more", sure_I),
                (f"errors of those below {SURE}", ~sure_I),
            )
        }
        of_sure = rates[f"errors of those at {SURE} or more"]
        warnings = warned(rates, {"errors": "gets {} of {} labelled pictures wrong"})
        if of_sure.low > 1 - SURE:
            told = f"answers that it is {100 * SURE:.0f} % sure of"
            warnings = (*warnings, f"is wrong in {of_sure.fraction} {told}")
        decided = Decisions(
            border="confidence",
            value=SURE,
            source="the most probable class",
            rates=rates,
            kinds={
                name: {"errors": Rate.counted(int((~right_I & of).sum()), int(of.sum()))}
                for i, name in enumerate(labels)
                for of in [label_I == i]
                if of.any()
            },
            warnings=warnings,
        )
        ones_I = np.ones(len(label_I), np.int64)
        return Evaluation(
            self.compute(),
            (decided,),
            (Shares("top1", right_I.astype(np.int64), ones_I),),
            np.zeros(len(label_I), np.int64),
        )


def log_softmax(logits: Array) -> Array:
    """Logarithm of the softmax over the last axis, in float64 and without overflow."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))
