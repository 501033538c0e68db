"""What a falling threshold finds: AUROC, average precision, largest F1 and per-region overlap.

Everywhere a score at or above a threshold means "positive", and equal scores are never told apart:
curves have one point per distinct score of a positive. Between two of them only negatives are
added: no F1, precision at new recall, or region's overlap changes for the better there, so these
points carry all curves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from engineworks.runtime.pixels import Pixels, count_above
from engineworks.runtime.tensors import Array

_POSITIVES_AT_ONCE = 4 << 20

# thresholds (T,) -> negatives above each, and at or above each
CountAbove: TypeAlias = Callable[[Array], tuple[Array, Array]]
# thresholds from the highest down, positives at or above each, sum of their shares, and what
# ``CountAbove`` says; all of the whole set, not of the stretch alone
_Stretch: TypeAlias = tuple[Array, Array, Array, Array, Array]


class Curve:
    """All measures of a set of scores, read off in one walk from the highest threshold down.

    Attributes:
        num_positives, num_negatives: of the set.
        auroc: chance that a positive scores above a negative, a tie counting half.
        average_precision: mean of the precision over the positives found.
        f1max, threshold: the largest F1, and the highest threshold that reaches it.
        aupro: see ``runtime.metrics.aupro``; 0 where no regions are known.
    """

    def __init__(
        self,
        stretches: Iterator[_Stretch],
        num_positives: int,
        num_negatives: int,
        *,
        num_regions: int = 0,
        limit: float = 1.0,
    ) -> None:
        self.num_positives, self.num_negatives = num_positives, num_negatives
        self.f1max, self.threshold = -1.0, np.nan
        self._limit, self._num_regions = limit, num_regions
        self._twice_won, self._precision, self._area = 0, 0.0, 0.0
        self._rate, self._overlap = 0.0, 0.0  # of the point that the walk has come to
        hits = 0
        for thresholds_T, hits_T, found_T, above_T, reached_T in stretches:
            gained_T = np.diff(hits_T, prepend=hits)
            hits = int(hits_T[-1])
            # in whole numbers: a pair that is won counts 2, a tie 1
            self._twice_won += int((gained_T * (2 * num_negatives - reached_T - above_T)).sum())
            self._precision += float(gained_T @ (hits_T / (hits_T + reached_T)))
            f1_T = 2 * hits_T / (hits_T + reached_T + num_positives)
            best = int(np.argmax(f1_T))
            if f1_T[best] > self.f1max:
                self.f1max, self.threshold = float(f1_T[best]), float(thresholds_T[best])
            if num_regions and num_negatives:
                self._walk(above_T / num_negatives, reached_T / num_negatives, found_T)
        if num_regions and num_negatives:
            self._walk(np.ones(1), np.ones(1), np.full(1, self._overlap * num_regions))

    @property
    def auroc(self) -> float:
        return self._twice_won / (2 * self.num_positives * self.num_negatives)

    @property
    def average_precision(self) -> float:
        return self._precision / self.num_positives

    @property
    def aupro(self) -> float:
        return self._area / self._limit

    def ranking(self, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}_auroc": self.auroc,
            f"{prefix}_ap": self.average_precision,
            f"{prefix}_f1max": self.f1max,
            f"{prefix}_f1max_threshold": self.threshold,
        }

    def _walk(self, above_T: Array, reached_T: Array, found_T: Array) -> None:
        """Add the area under the overlap, up to the limit of the false positive rate."""
        if self._rate >= self._limit:
            return
        overlap_T = found_T / self._num_regions
        before_T = np.concatenate([[self._overlap], overlap_T[:-1]])
        # per score two points: what was found just above it at the rate there, then all of it
        rate = np.concatenate([[self._rate], np.stack([above_T, reached_T], axis=1).ravel()])
        overlap = np.concatenate([[self._overlap], np.stack([before_T, overlap_T], axis=1).ravel()])
        if rate[-1] > self._limit:
            at_limit = np.interp(self._limit, rate, overlap)
            inside = rate <= self._limit
            rate = np.append(rate[inside], self._limit)
            overlap = np.append(overlap[inside], at_limit)
        self._area += float(np.trapezoid(overlap, rate))
        self._rate, self._overlap = float(rate[-1]), float(overlap[-1])


def of_scores(positives_P: Array, negatives_N: Array) -> Curve:
    """The curve of scores that are in memory."""

    def walk() -> Iterator[_Stretch]:
        if len(positives_P):
            yield _stretch(
                positives_P,
                np.ones(len(positives_P)),
                lambda thresholds_T: count_above(negatives_N, thresholds_T),
            )

    return Curve(walk(), len(positives_P), len(negatives_N))


def of_pixels(pixels: Pixels, *, limit: float) -> Curve:
    """The curve of all pixels, in as many stretches as memory asks for.

    Args:
        limit: of the false positive rate, for ``aupro``.
    """

    def walk() -> Iterator[_Stretch]:
        hits, found = 0, 0.0
        for low, high in _ranges(pixels):
            scores_P, shares_P = pixels.positives(low, high)
            if len(scores_P):
                yield (part := _stretch(scores_P, shares_P, pixels.normal_above, hits, found))
                hits, found = int(part[1][-1]), float(part[2][-1])

    return Curve(
        walk(),
        pixels.num_positives,
        pixels.num_negatives,
        num_regions=pixels.num_regions,
        limit=limit,
    )


def _ranges(pixels: Pixels) -> list[tuple[float, float]]:
    """Ranges of scores, from the highest down, with no more defective pixels each than is wise."""
    num = -(-pixels.num_positives // _POSITIVES_AT_ONCE)
    edges = [np.inf, -np.inf]
    if num > 1:
        sample, _ = pixels.sample(1 << 16)
        inner = sample[np.linspace(0, len(sample) - 1, num + 1).astype(int)[1:-1]]
        edges = [np.inf, *np.unique(inner)[::-1].tolist(), -np.inf]
    return list(zip(edges[1:], edges[:-1], strict=True))


def _stretch(
    scores_P: Array, shares_P: Array, above: CountAbove, hits: int = 0, found: float = 0.0
) -> _Stretch:
    """Points of a stretch, after ``hits`` positives whose shares have the sum ``found``."""
    order = np.argsort(-scores_P)
    descending = scores_P[order]
    last = np.flatnonzero(np.diff(descending, append=-np.inf))
    thresholds_T = descending[last]
    above_T, reached_T = above(thresholds_T)
    return (
        thresholds_T,
        hits + last + 1,
        found + np.cumsum(shares_P[order])[last],
        above_T,
        reached_T,
    )
