"""How sure a classifier may be: probabilities that hold, sets that hold the class, and an unknown.

All of it is fitted on labelled pictures that training did not learn from, and for each precision by
itself, since INT8 moves the logits.

- Temperature: logits are divided by the number that makes the right classes most probable. It
  changes no ranking, only how sure the answers are. Source: Guo et al., "On Calibration of Modern
  Neural Networks", 2017.
- Equal chances: some answers are wrong without any sign of it. Where further pictures bear it out,
  every class gets an equal share of a small part of the probability. Source: Zhang, Kailkhura and
  Han, "Mix-n-Match: Ensemble and Compositional Methods for Uncertainty Calibration", 2020.
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
_SECTIONS = 16  # golden ones of a range of it
_GOLDEN = (math.sqrt(5) - 1) / 2
_RANGE = (-1.5, 0.5)  # of it, about that of a temperature alone: equal chances make it colder
_EQUAL = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16)  # shares of equal chances that are tried
_FOLDS = 5  # that are left out in turn
_CONVINCED = 0.5  # standard errors of a gain, from which it is believed
_COLDEST, _HOTTEST = 1e-3, 1e3
Novelty: TypeAlias = Literal["entropy", "surprise"]


class Confidence(BaseModel):
    """What one precision of a classifier needs to say how sure it is.

    Attributes:
        num_pictures: that it was fitted on.
        temperature: that logits are divided by.
        equal: share of a probability that all classes have alike.
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
    equal: FiniteFloat = Field(default=0.0, ge=0, lt=1)  # likewise

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
        temperature, equal = fit_probabilities(logits_NC, labels_N)
        log_NC = log_probabilities(logits_NC, temperature, equal)
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
            equal=equal,
        )
        return fitted, unknown

    def log_probabilities(self, logits: Array) -> Array:
        """(..., C) float64 natural logarithms of calibrated probabilities."""
        return log_probabilities(logits, self.temperature, self.equal)

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


def log_probabilities(logits: Array, temperature: float, equal: float) -> Array:
    """(..., C) float64 natural logarithms of probabilities; see ``Confidence``."""
    log = log_softmax(logits.astype(np.float64) / temperature)
    if not equal:
        return log
    return np.logaddexp(math.log1p(-equal) + log, math.log(equal / log.shape[-1]))


def fit_probabilities(logits_NC: Array, labels_N: Array) -> tuple[float, float]:
    """The temperature, and the share of equal chances.

    Pictures are left out in turn, and a share is taken for what it makes of those. One that gains
    little, for the noise of that gain, is not: two numbers fit chance better than one.

    Args:
        logits_NC: (N, C) finite float, C >= 2.
        labels_N: (N,) int: index of the right class.
    """
    alone = fit_temperature(logits_NC, labels_N)
    fold_N = _folds(labels_N)
    if len(np.unique(fold_N)) < _FOLDS:
        return alone, 0.0
    right_SN = np.empty((len(_EQUAL), len(labels_N)))
    for fold in range(_FOLDS):
        out_N = fold_N == fold
        seen = logits_NC[~out_N], labels_N[~out_N]
        about = fit_temperature(*seen)
        for share, right_N in zip(_EQUAL, right_SN, strict=True):
            heat = _temperature(*seen, share, about)
            log_MC = log_probabilities(logits_NC[out_N], heat, share)
            right_N[out_N] = log_MC[np.arange(out_N.sum()), labels_N[out_N]]
    best = int(right_SN.mean(axis=1).argmax())
    gain_N = right_SN[best] - right_SN[0]
    if gain_N.mean() <= _CONVINCED * gain_N.std() / math.sqrt(len(gain_N)):
        return alone, 0.0
    return _temperature(logits_NC, labels_N, _EQUAL[best], alone), _EQUAL[best]


def _folds(labels_N: Array) -> Array:
    """(N,) int: which fold each picture is in; the pictures of a class are in all of them."""
    fold_N = np.empty(len(labels_N), int)
    for label in np.unique(labels_N):
        (of,) = np.nonzero(labels_N == label)
        fold_N[of] = (np.arange(len(of)) + label) % _FOLDS
    return fold_N


def _temperature(logits_NC: Array, labels_N: Array, equal: float, alone: float) -> float:
    """The likeliest temperature beside a share of equal chances.

    Args:
        alone: what ``fit_temperature`` finds.
    """
    if not equal:
        return alone
    wanted_NC = _wanted(logits_NC.shape, labels_N)

    def lack(heat: float) -> float:
        return -float((wanted_NC * log_probabilities(logits_NC, math.exp(heat), equal)).sum())

    low, high = (math.log(alone) + bound for bound in _RANGE)
    first, second = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    lacks = lack(first), lack(second)
    for _ in range(_SECTIONS):
        if lacks[0] < lacks[1]:
            high, second = second, first
            first = high - _GOLDEN * (high - low)
            lacks = lack(first), lacks[0]
        else:
            low, first = first, second
            second = low + _GOLDEN * (high - low)
            lacks = lacks[1], lack(second)
    return min(max(math.exp((low + high) / 2), _COLDEST), _HOTTEST)


def _wanted(shape: tuple[int, ...], labels_N: Array) -> Array:
    """(N, C): 1 for the right classes, but as if one of N + 2 pictures were of any other."""
    count, num_classes = shape
    doubt = 1 / (count + 2)
    wanted_NC = np.full(shape, doubt / (num_classes - 1))
    wanted_NC[np.arange(count), labels_N] = 1 - doubt
    return wanted_NC


def fit_temperature(logits_NC: Array, labels_N: Array) -> float:
    """The temperature that makes the right classes most probable, in [0.001, 1000].

    As if one of N + 2 pictures were of any other class: N right answers do not prove a classifier
    that never errs. Source of that: Platt, "Probabilistic Outputs for Support Vector Machines",
    1999.

    Args:
        logits_NC: (N, C) finite float, C >= 2.
        labels_N: (N,) int: index of the right class.
    """
    logits_NC = logits_NC.astype(np.float64)
    wanted = float((_wanted(logits_NC.shape, labels_N) * logits_NC).sum())
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
