"""How sure a classifier may be: probabilities that hold, sets that hold the class, and an unknown.

All of it is fitted on labelled pictures that training did not learn from, and for each precision by
itself, since INT8 moves the logits.

- Temperature: logits are divided by the number that makes the right classes most probable. It
  changes no ranking, only how sure the answers are. Source: Guo et al., "On Calibration of Modern
  Neural Networks", 2017.
- Prediction sets: all classes at least as probable as a limit that the right class of a stated
  share of pictures reaches, whatever the classifier: split conformal prediction. Source: Sadinle,
  Lei and Wasserman, "Least Ambiguous Set-Valued Classifiers With Bounded Error Levels", 2019;
  Angelopoulos and Bates, "A Gentle Introduction to Conformal Prediction", 2021.
- Unknown: a picture of a class that was never shown leaves several classes a little probable. Its
  score is the generalised entropy of the largest probabilities, which a faint second and third
  class move more than the first one's lack of a hundredth. Source: Liu, Lochman and Zach, "GEN:
  Pushing the Limits of Softmax-Based Out-of-Distribution Detection", 2023. Bundles of before have
  the surprise at the most probable class, -ln p. Source: Hendrycks and Gimpel, "A Baseline for
  Detecting Misclassified and Out-of-Distribution Examples in Neural Networks", 2017.
"""

from __future__ import annotations

import math
from typing import Literal, Self, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from engineworks.runtime.borders import HeldOut, border
from engineworks.runtime.bundle import Threshold
from engineworks.runtime.errors import InputError
from engineworks.runtime.metrics import log_softmax
from engineworks.runtime.tensors import Array

COVERAGE = 0.9
BUDGET = 0.05
GAMMA = 0.1  # exponent of the generalised entropy, as published
LARGEST = 10  # probabilities that it looks at; published: a tenth of 1,000 classes
_HALVINGS = 60  # of the temperature's logarithm
_COLDEST, _HOTTEST = 1e-3, 1e3
Novelty: TypeAlias = Literal["entropy", "surprise"]


class Confidence(BaseModel):
    """What one precision of a classifier needs to say how sure it is.

    Attributes:
        num_pictures: that it was fitted on.
        temperature: that logits are divided by.
        coverage: share of pictures whose class is meant to be in their prediction set.
        limit: probability from which a class is in the set; 0 takes all classes, where so few
            pictures cannot promise that coverage.
        budget: share of pictures of known classes that may be called unknown.
        novelty: score whose border tells what is unknown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_pictures: int = Field(ge=1)
    temperature: FiniteFloat = Field(ge=_COLDEST, le=_HOTTEST)
    coverage: FiniteFloat = Field(gt=0, lt=1)
    limit: FiniteFloat = Field(ge=0, le=1)
    budget: FiniteFloat = Field(gt=0, lt=1)
    novelty: Novelty = "surprise"  # of bundles that do not say

    @classmethod
    def fit(
        cls,
        logits_NC: Array,
        labels_N: Array,
        *,
        coverage: float = COVERAGE,
        budget: float = BUDGET,
    ) -> tuple[Self, Threshold]:
        """From pictures that training did not learn from.

        Args:
            logits_NC: (N, C) finite float, C >= 2.
            labels_N: (N,) int: index of the right class.

        Returns:
            The confidence, and the border of ``unlikeness`` from which a picture is unknown.

        Raises:
            InputError: no pictures, or a coverage or budget outside of (0, 1).
        """
        if not len(labels_N):
            raise InputError("confidence needs labelled pictures, and there are none")
        if not (0 < coverage < 1 and 0 < budget < 1):
            raise InputError(
                f"coverage and budget are shares above 0 and below 1, got {coverage} and {budget}",
                fix=f"take e.g. {COVERAGE} and {BUDGET}",
            )
        temperature = fit_temperature(logits_NC, labels_N)
        log_NC = log_softmax(logits_NC.astype(np.float64) / temperature)
        right_N = np.exp(log_NC[np.arange(len(labels_N)), labels_N])
        held_out = HeldOut.of(generalised_entropy(log_NC))
        unknown = Threshold(
            value=border(held_out, budget),
            source=f"false-reject budget {budget:g} on {len(labels_N)} validation pictures",
            held_out=held_out,
        )
        limit = conformal_limit(right_N, coverage)
        fitted = cls(
            num_pictures=len(labels_N),
            temperature=temperature,
            coverage=coverage,
            limit=limit,
            budget=budget,
            novelty="entropy",
        )
        return fitted, unknown

    def log_probabilities(self, logits: Array) -> Array:
        """(..., C) float64 natural logarithms of calibrated probabilities."""
        return log_softmax(logits.astype(np.float64) / self.temperature)

    def unlikeness(self, log: Array) -> Array:
        """How little pictures are like those of the known classes, as ``novelty`` says.

        Args:
            log: (..., C) natural logarithms of calibrated probabilities.

        Returns:
            (...) float64, >= 0.
        """
        return generalised_entropy(log) if self.novelty == "entropy" else -log.max(axis=-1)


def generalised_entropy(log: Array) -> Array:
    """The sum of p^gamma (1 - p)^gamma over the ten largest probabilities.

    Args:
        log: (..., C) natural logarithms of probabilities.

    Returns:
        (...) float64 >= 0; 0 where one class is certain.
    """
    largest = np.exp(np.sort(log, axis=-1)[..., -LARGEST:])
    return np.asarray(((largest * np.maximum(1 - largest, 0)) ** GAMMA).sum(axis=-1))


def fit_temperature(logits_NC: Array, labels_N: Array) -> float:
    """The temperature that makes the right classes most probable, in [0.001, 1000].

    As if one of N + 2 pictures were of any other class: N right answers do not prove a classifier
    that never errs. Source of that: Platt, "Probabilistic Outputs for Support Vector Machines",
    1999.

    Args:
        logits_NC: (N, C) finite float, C >= 2.
        labels_N: (N,) int: index of the right class.
    """
    count, num_classes = logits_NC.shape
    logits_NC = logits_NC.astype(np.float64)
    doubt = 1 / (count + 2)
    wanted_NC = np.full(logits_NC.shape, doubt / (num_classes - 1))
    wanted_NC[np.arange(count), labels_N] = 1 - doubt
    wanted = float((wanted_NC * logits_NC).sum())
    low, high = math.log(_COLDEST), math.log(_HOTTEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        probability_NC = np.exp(log_softmax(logits_NC / math.exp(middle)))
        # the likelihood is concave in 1 / T, so its slope has one zero
        if (probability_NC * logits_NC).sum() > wanted:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def conformal_limit(right_N: Array, coverage: float) -> float:
    """The probability that the right class of a further picture reaches with chance ``coverage``.

    The chance is over calibration and further pictures alike, drawn from one source: for given
    calibration pictures the share varies by about sqrt(coverage (1 - coverage) / N).

    Args:
        right_N: (N,) probability of the right class of each calibration picture.

    Returns:
        The ceil((N + 1) coverage)-th largest of them; 0 where that is more than N.
    """
    rank = math.ceil((len(right_N) + 1) * coverage)
    return 0.0 if rank > len(right_N) else float(np.sort(right_N)[len(right_N) - rank])
