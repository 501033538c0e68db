"""Greedy k-centre selection: few rows that leave no row far from its nearest chosen one.

Source: Gonzalez, "Clustering to minimize the maximum intercluster distance", 1985 (the greedy rule,
a 2-approximation of the smallest covering radius); Roth et al., "Towards Total Recall in Industrial
Anomaly Detection" (PatchCore), 2022 (its use for memory banks).

The plain rule needs one pass over all rows per pick. Here a pass serves many picks and the result
is the same: rows far from every centre are set apart (the *front*), the greedy rule runs inside the
front alone until its largest distance falls to the largest outside it, and then one matrix product
brings all rows up to date. No outside row could have been picked meanwhile, since distances only
shrink. Rows are read in order, in chunks, so they may be memory-mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engineworks.runtime.errors import BankError
from engineworks.runtime.tensors import Array

_CHUNK_BYTES = 64 << 20
_FRONT_BYTES = 16 << 20
# |x|² - 2xc + |c|² in float32 cannot tell a squared distance below this share of |x|² from zero;
# without a floor, copies of a chosen row would be chosen for their rounding errors
_MOST_TIED = 16  # more rows than this, equally far up to rounding, are taken as they come
_LIKELY_NEAREST = 4
_ROUNDING = 1e-6

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Coreset:
    """A selection and how well it covers.

    Attributes:
        indices: (M,) int64 rows in the order in which they were picked.
        radii: (M,) float32: distance of each picked row to the centres before it (the first is
            infinite unless there were centres before).
        radius: largest distance of any row to its nearest centre; 0 where all rows lie on one, to
            a thousandth of their distance from the mean row.
    """

    indices: Array
    radii: Array
    radius: float


def projection(width: int, target: int, seed: int) -> Array:
    """A random matrix that keeps distances roughly: (width, target) float32.

    Source: Johnson and Lindenstrauss, 1984; Gaussian entries of variance 1 / target.
    """
    rng = np.random.default_rng(seed)
    return np.asarray(rng.standard_normal((width, target)) / np.sqrt(target), np.float32)


def greedy_k_centre(
    rows_ND: Array,
    num: int,
    *,
    first: int | None = None,
    centres_MD: Array | None = None,
    min_radius: float = 0.0,
    progress: Progress | None = None,
) -> Coreset:
    """Pick rows, each the farthest from all centres so far.

    Args:
        rows_ND: (N, D) float32, may be a ``numpy.memmap``.
        num: how many rows to pick; at most N are.
        first: index of the first pick; needed unless ``centres_MD`` is given.
        centres_MD: (M, D) float32 centres that are there already (a bank that grows).
        min_radius: stop as soon as no row is farther than this from its nearest centre.
        progress: called with (picked, num).

    Returns:
        The picks in order; fewer than ``num`` where every row already lies on a centre or within
        ``min_radius`` of one.

    Raises:
        BankError: no rows, a non-finite value, or neither ``first`` nor ``centres_MD``.
    """
    if rows_ND.ndim != 2 or len(rows_ND) == 0:
        raise BankError(f"a coreset needs (N, D) rows, got shape {rows_ND.shape}")
    if first is None and centres_MD is None:
        raise BankError("greedy k-centre needs a first row or existing centres")
    count, width = rows_ND.shape
    num = min(num, count)
    chunk = max(1, _CHUNK_BYTES // (4 * width))
    # distances do not change when the origin moves, but |x|² - 2xc + |c|² loses fewer digits
    # around the mean
    with np.errstate(invalid="ignore", over="ignore"):  # refused right below
        origin = np.mean(rows_ND[: 4 * chunk], axis=0, dtype=np.float64).astype(np.float32)
        squared_N = np.concatenate(
            [
                np.einsum("nd,nd->n", part, part)
                for part in (rows_ND[i : i + chunk] - origin for i in range(0, count, chunk))
            ]
        )
    if not np.isfinite(squared_N).all():
        raise BankError(
            "the feature rows hold values that are not finite",
            fix="check the backbone's weights and the images",
        )
    floor_N = _ROUNDING * squared_N
    nearest_N = np.full(count, np.inf, np.float32)
    picked: list[int] = []
    radii: list[float] = []

    def absorb(centres: Array) -> None:
        """Bring ``nearest_N`` up to date with new centres: one pass over all rows."""
        centres = centres - origin
        norms = np.einsum("md,md->m", centres, centres)
        step = max(1, min(chunk, (8 << 20) // (4 * len(centres))))
        for start in range(0, count, step):
            product = (rows_ND[start : start + step] - origin) @ centres.T
            product *= -2
            product += norms
            distance = product.min(axis=1)
            distance += squared_N[start : start + step]
            distance[distance <= floor_N[start : start + step]] = 0
            part = nearest_N[start : start + step]
            np.minimum(part, distance, out=part)

    num_old = 0 if centres_MD is None else len(centres_MD)
    centres = np.empty((num_old + num, width), np.float32)  # relative to the origin
    if centres_MD is not None and num_old:
        centres[:num_old] = centres_MD - origin
        for start in range(0, len(centres_MD), 1024):
            absorb(np.asarray(centres_MD[start : start + 1024], np.float32))
    elif first is not None:
        picked, radii = [int(first)], [float("inf")]
        centres[0] = rows_ND[first] - origin
        absorb(rows_ND[first : first + 1])
        nearest_N[first] = 0

    limit = min_radius * min_radius
    front_size = max(64, _FRONT_BYTES // (4 * width))
    while len(picked) < num and nearest_N.max() > limit:
        if front_size < count:
            front = np.argpartition(nearest_N, count - front_size)[count - front_size :]
            outside = float(np.partition(nearest_N, count - front_size - 1)[count - front_size - 1])
        else:
            front, outside = np.arange(count), -1.0
        front.sort()  # equal distances: the lowest row first, as argmax over all rows would
        rows = rows_ND[front] - origin
        squared, floor = squared_N[front], floor_N[front]
        nearest = nearest_N[front].copy()
        batch: list[int] = []
        while len(picked) < num:
            best = int(nearest.argmax())
            level = nearest[best] - 2 * floor[best]
            close = np.flatnonzero(nearest >= level)[:_MOST_TIED]
            if len(close) > 1:
                best = int(close[_farthest(rows[close], centres[: num_old + len(picked)])])
            if nearest[best] <= limit or (batch and nearest[best] <= outside):
                break
            batch.append(int(front[best]))
            centres[num_old + len(picked)] = rows[best]
            picked.append(batch[-1])
            radii.append(float(np.sqrt(nearest[best])))
            distance = squared - 2 * (rows @ rows[best]) + squared[best]
            distance[distance <= floor] = 0
            np.minimum(nearest, distance, out=nearest)
            nearest[best] = 0
        absorb(rows_ND[np.array(batch)])
        nearest_N[batch] = 0
        if progress:
            progress(len(picked), num)
    return Coreset(
        indices=np.array(picked, np.int64),
        radii=np.array(radii, np.float32),
        radius=float(np.sqrt(max(float(nearest_N.max()), 0.0))),
    )


def _farthest(rows_ND: Array, centres_MD: Array) -> int:
    """Which of a few rows, equally far up to rounding, is the farthest; the first of equal ones.

    The product picks each row's likely nearest centres; these are measured by differences.
    """
    likely = np.argsort(
        np.einsum("md,md->m", centres_MD, centres_MD) - 2 * (rows_ND @ centres_MD.T), axis=1
    )[:, :_LIKELY_NEAREST]
    differences = rows_ND[:, None] - centres_MD[likely]
    return int(np.linalg.norm(differences, axis=2).min(axis=1).argmax())
