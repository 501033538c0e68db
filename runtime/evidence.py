"""What each picture brought to a metric: enough to tell the metric of any resample of the pictures.

A metric of a few hundred pictures is uncertain, and so is its drop from float to INT8. The paired
bootstrap says by how much: both are measured on the same resamples, so what is hard for both
cancels. Evidence is small (no maps, no pictures), and resampling it costs a product of counts with
it, where measuring anew would sort millions of pixels a thousand times.

Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993: percentile intervals.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from engineworks.runtime.pixels import Pixels
from engineworks.runtime.spool import Spool
from engineworks.runtime.tensors import Array

ROUNDS = 1000  # resamples of a bootstrap
PIXEL_BINS = 1024
_SAMPLED = 1 << 16  # pixels of either kind, for the bins' borders
IOUS = np.linspace(0.5, 0.95, 10)  # of COCO's average precision
_RECALLS = np.linspace(0, 1, 101)  # where it looks
_ROUNDS_AT_ONCE = 100
_COUNTS_AT_ONCE = 100_000  # of pictures in resamples; a picture brings up to 100 boxes
_PICTURES_AT_ONCE = 256
_PERCENTILES = (2.5, 97.5)
_SAME = 1e-9  # numbers that differ by less differ by rounding


class Evidence(Protocol):
    """What each of I pictures brought to some metrics."""

    def resampled(self, counts_RI: Array) -> dict[str, Array]:
        """The metrics of R resamples of the pictures.

        Args:
            counts_RI: (R, I) int64: how often each resample has each picture.

        Returns:
            name -> (R,) float64; NaN where a resample does not allow the metric.
        """
        ...


# --- the paired bootstrap ------------------------------------------------------------------------


@dataclass(frozen=True)
class Drop:
    """By how much a metric is lower for one system than for another, on the same pictures.

    Attributes:
        value: of all pictures, exact; positive where the second is worse.
        num_pictures: in all.
        interval: (low, high), 95 %, of the paired bootstrap; None where no evidence tells of the
            metric. Where all resamples give the same, they say nothing: then, by the rule of three,
            what was not seen in n pictures may still happen to 3 / n of them.
        unseen: the interval is that of the rule of three.
    """

    value: float
    num_pictures: int
    interval: tuple[float, float] | None = None
    unseen: bool = False

    def exceeds(self, allowed: float) -> bool:
        """Whether it is more than what is allowed; differences of float64 are not exact."""
        return self.value > allowed + _SAME

    def settled(self, allowed: float) -> bool:
        """Whether the interval, where there is one, lies on one side of what is allowed."""
        return self.interval is None or self.interval[1] <= allowed or self.interval[0] > allowed

    def needed(self, allowed: float) -> int | None:
        """About how many pictures like these would settle it; None where no number would.

        An interval shrinks with the root of the number of pictures, one of the rule of three with
        the number itself.
        """
        gap = abs(allowed - self.value)
        if self.interval is None or gap <= _SAME:
            return None
        low, high = self.interval
        ratio = (self.value - low if self.exceeds(allowed) else high - self.value) / gap
        return math.ceil(self.num_pictures * (ratio if self.unseen else ratio**2))


def paired_drops(
    exact: Mapping[str, float],
    before: Sequence[Evidence],
    after: Sequence[Evidence],
    groups_I: Array,
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> dict[str, Drop]:
    """Each drop with its interval.

    What binning costs is taken off: resamples are moved by the difference between the exact drop
    and that of the evidence on all pictures.

    Args:
        exact: drop of each metric.
        before, after: of two systems, of the same pictures in the same order.
        groups_I: see ``resamples``.
    """
    everyone = np.ones((1, len(groups_I)), np.int64)
    shift = {n: exact[n] - v for n, v in _lost(before, after, everyone).items() if n in exact}
    drawn: dict[str, list[Array]] = {name: [] for name in shift}
    for counts_RI in resamples(groups_I, rounds=rounds, seed=seed) if shift else ():
        for part_RI in np.array_split(counts_RI, -(-counts_RI.size // _COUNTS_AT_ONCE)):
            for name, values in _lost(before, after, part_RI).items():
                if name in shift:
                    drawn[name].append(values + shift[name])
    drops = {name: Drop(value, len(groups_I)) for name, value in exact.items()}
    for name, parts in drawn.items():
        values = np.concatenate(parts)
        drops[name] = _with_interval(drops[name], values[np.isfinite(values)], groups_I)
    return drops


def _lost(
    before: Sequence[Evidence], after: Sequence[Evidence], counts_RI: Array
) -> dict[str, Array]:
    better, worse = (
        {name: v for each in side for name, v in each.resampled(counts_RI).items()}
        for side in (before, after)
    )
    return {name: better[name] - worse[name] for name in better if name in worse}


def _with_interval(drop: Drop, drawn: Array, groups_I: Array) -> Drop:
    if not len(drawn):
        return drop
    if np.ptp(drawn) > _SAME:
        low, high = np.percentile(drawn, _PERCENTILES).tolist()
        return replace(drop, interval=(low, high))
    reach = 3 / int(np.unique(groups_I, return_counts=True)[1].min())
    return replace(drop, interval=(drop.value - reach, drop.value + reach), unseen=True)


def resamples(groups_I: Array, *, rounds: int = ROUNDS, seed: int = 0) -> Iterator[Array]:
    """Counts of pictures, (R, I) int64 each, ``rounds`` rows in all.

    Args:
        groups_I: pictures of one number are drawn among themselves, so every resample has as many
            of each group as there are: how many are defective was chosen by whoever made the set.
    """
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(groups_I == group) for group in np.unique(groups_I)]
    for start in range(0, rounds, _ROUNDS_AT_ONCE):
        counts_RI = np.zeros((min(_ROUNDS_AT_ONCE, rounds - start), len(groups_I)), np.int64)
        for chosen in groups:
            shares = np.full(len(chosen), 1 / len(chosen))
            counts_RI[:, chosen] = rng.multinomial(len(chosen), shares, len(counts_RI))
        yield counts_RI


# --- evidence ------------------------------------------------------------------------------------


class Shares:
    """Of a metric that is a share: so many of so many, per picture."""

    def __init__(self, name: str, hits_I: Array, of_I: Array) -> None:
        self._name, self._hits_I, self._of_I = name, hits_I, of_I

    def resampled(self, counts_RI: Array) -> dict[str, Array]:
        return {self._name: _ratio(counts_RI @ self._hits_I, counts_RI @ self._of_I)}


class Ranking:
    """Of ``<prefix>_auroc`` and ``<prefix>_ap`` of the pictures' scores; exact.

    Args:
        scores_I: one per picture.
        labels_I: bool.
    """

    def __init__(self, prefix: str, scores_I: Array, labels_I: Array) -> None:
        self._prefix = prefix
        self._order = np.argsort(scores_I, kind="stable")
        ascending = scores_I[self._order]
        self._starts = np.flatnonzero(np.diff(ascending, prepend=-np.inf))
        self._labels_I = labels_I[self._order].astype(np.int64)

    def resampled(self, counts_RI: Array) -> dict[str, Array]:
        counts = counts_RI[:, self._order]
        positives = np.add.reduceat(counts * self._labels_I, self._starts, axis=1)
        negatives = np.add.reduceat(counts * (1 - self._labels_I), self._starts, axis=1)
        return _curves(self._prefix, positives, negatives)


class PixelRanking:
    """Of ``<prefix>_auroc`` and ``<prefix>_ap`` of all pixels: a histogram per picture.

    Half of the common bins hold equal shares of the defective pixels, half of the normal ones, and
    scores within a bin count as equal. With B bins that moves an AUROC by about 1 / B at most; on
    167 pictures of pills it moved one by 6e-7, and an average precision by 4e-4.

    Args:
        pixels: of the pictures in their order, both defective and normal ones.
    """

    def __init__(self, prefix: str, pixels: Pixels, *, bins: int = PIXEL_BINS) -> None:
        self._prefix = prefix
        places = np.linspace(0, 1, bins // 2)
        quantiles = [
            scores[(places * (len(scores) - 1)).astype(int)] for scores in pixels.sample(_SAMPLED)
        ]
        edges = np.unique(np.concatenate(quantiles))[1:]  # lower ends of all bins but the lowest
        self._histograms = Spool()  # (2, B) of each picture: defective and normal pixels
        for map_HW, mask_HW in pixels:
            both = (_histogram(map_HW[mask_HW], edges), _histogram(map_HW[~mask_HW], edges))
            self._histograms.append(np.stack(both))

    def resampled(self, counts_RI: Array) -> dict[str, Array]:
        num_bins = self._histograms[0].shape[1]
        total_2RB = np.zeros((2, len(counts_RI), num_bins))
        for start in range(0, len(self._histograms), _PICTURES_AT_ONCE):
            places = range(start, min(start + _PICTURES_AT_ONCE, len(self._histograms)))
            histograms_I2B = np.stack([self._histograms[i] for i in places])
            # products of integers have no fast kernel; these are exact
            counts = counts_RI[:, places.start : places.stop].astype(np.float64)
            total_2RB += counts @ histograms_I2B.transpose(1, 0, 2).astype(np.float64)
        return _curves(self._prefix, total_2RB[0], total_2RB[1])


class CandidateRanking:
    """Of ``recall_at_1_false``: the scores of candidates, each with its picture.

    Args:
        regions_I: regions of ground truth per picture.
        hits, false: (score, picture) of candidates that find a region, and of those that do not.
    """

    def __init__(
        self,
        regions_I: Array,
        hits: Sequence[tuple[float, int]],
        false: Sequence[tuple[float, int]],
    ) -> None:
        self._regions_I = regions_I
        self._hit_scores, self._hit_pictures = _falling(hits)
        self._false_scores, self._false_pictures = _falling(false)

    def resampled(self, counts_RI: Array) -> dict[str, Array]:
        budget_R1 = counts_RI.sum(axis=1, keepdims=True)  # a false candidate per picture
        within_RF = np.cumsum(counts_RI[:, self._false_pictures], axis=1) <= budget_R1
        # the score of the first false candidate that is one too many
        limits = np.append(self._false_scores, -np.inf)[within_RF.sum(axis=1)]
        above_RH = self._hit_scores > limits[:, None]
        found_R = (counts_RI[:, self._hit_pictures] * above_RH).sum(axis=1)
        return {"recall_at_1_false": _ratio(found_R, counts_RI @ self._regions_I)}


@dataclass(frozen=True)
class Found:
    """What was found of one class.

    Attributes:
        scores_D, pictures_D: of each box found, by falling score.
        right_TD: bool: whether it matches a true box at each of ``IOUS``.
        truth_I: true boxes per picture.
    """

    scores_D: Array
    pictures_D: Array
    right_TD: Array
    truth_I: Array


class BoxRanking:
    """Of ``map50`` and ``map50_95``: per class every box found, and where it is right; exact.

    Attributes:
        classes: those that have a true box.
    """

    def __init__(self, classes: Sequence[Found]) -> None:
        self.classes = [found for found in classes if found.truth_I.any()]

    def resampled(self, counts_RI: Array) -> dict[str, Array]:
        if not self.classes:
            return {}
        precision_CTR = np.stack([_average_precision(found, counts_RI) for found in self.classes])
        occurs = np.isfinite(precision_CTR)
        total_TR, num_TR = np.where(occurs, precision_CTR, 0).sum(axis=0), occurs.sum(axis=0)
        each_TR = _ratio(total_TR, num_TR)
        return {"map50": each_TR[0], "map50_95": each_TR.mean(axis=0)}


def _average_precision(found: Found, counts_RI: Array) -> Array:
    """(T, R) average precision of a class by COCO's rule; NaN where it does not occur."""
    truth_R = counts_RI @ found.truth_I
    last = np.flatnonzero(found.right_TD.any(axis=0))[-1:].sum() + 1  # nothing is right behind it
    weights_RD = counts_RI[:, found.pictures_D[:last]]
    all_RD = np.cumsum(weights_RD, axis=1)
    # in whole numbers, and each row above all others, so that one sorted list holds all rows
    rows_R1 = np.arange(len(counts_RI))[:, None]
    apart_R1 = rows_R1 * (truth_R.max() + 2)
    needed_RN = _needed(truth_R) + apart_R1
    result = np.zeros((len(found.right_TD), len(counts_RI)))
    for t, right_D in enumerate(found.right_TD[:, :last]):
        places = np.flatnonzero(right_D)
        if len(places):
            hits_RS = np.cumsum(weights_RD[:, places], axis=1)
            precision_RS = _ratio(hits_RS, all_RD[:, places], nothing=0.0)
            best_RS = np.maximum.accumulate(precision_RS[:, ::-1], axis=1)[:, ::-1]
            first = np.searchsorted((hits_RS + apart_R1).ravel(), needed_RN.ravel())
            first_RN = first.reshape(needed_RN.shape) - rows_R1 * len(places)
            padded = np.pad(best_RS, ((0, 0), (0, 1)))
            result[t] = np.take_along_axis(padded, first_RN, axis=1).mean(axis=1)
    return np.where(truth_R > 0, result, np.nan)


def _needed(truth_R: Array) -> Array:
    """(R, 101) how many hits each recall takes, the recall of none included."""
    totals, which_R = np.unique(truth_R, return_inverse=True)
    rows = [np.searchsorted(np.arange(total + 1) / max(total, 1), _RECALLS) for total in totals]
    return np.stack(rows)[which_R]


def _curves(prefix: str, positives_RB: Array, negatives_RB: Array) -> dict[str, Array]:
    """AUROC and average precision of R histograms over ascending bins of equal scores."""
    num_positives = positives_RB.sum(axis=1)
    num_negatives = negatives_RB.sum(axis=1)
    below_RB = np.cumsum(negatives_RB, axis=1) - negatives_RB / 2  # a tie counts half
    won = (positives_RB * below_RB).sum(axis=1)
    hits_RB = np.cumsum(positives_RB[:, ::-1], axis=1)
    reached_RB = np.cumsum(negatives_RB[:, ::-1], axis=1)
    precision_RB = _ratio(hits_RB, hits_RB + reached_RB, nothing=0.0)
    mean = (positives_RB[:, ::-1] * precision_RB).sum(axis=1)
    return {
        f"{prefix}_auroc": _ratio(won, num_positives * num_negatives),
        f"{prefix}_ap": np.where(num_negatives > 0, _ratio(mean, num_positives), np.nan),
    }


def _histogram(scores: Array, edges: Array) -> Array:
    ends = np.searchsorted(np.sort(scores), edges)
    return np.diff(ends, prepend=0, append=len(scores)).astype(np.int32)


def _falling(scored: Sequence[tuple[float, int]]) -> tuple[Array, Array]:
    """Scores from the highest down, and the picture of each."""
    scores = np.array([score for score, _ in scored], np.float64)
    pictures = np.array([picture for _, picture in scored], np.int64)
    order = np.argsort(-scores, kind="stable")
    return scores[order], pictures[order]


def _ratio(part: Array, whole: Array, *, nothing: float = np.nan) -> Array:
    ratio = np.full(np.broadcast(part, whole).shape, nothing)
    return np.asarray(np.divide(part, whole, out=ratio, where=whole > 0))
