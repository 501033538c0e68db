"""Metrics of embeddings: whether the most similar picture is of the same class."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engineworks.runtime.errors import InputError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.evidence import Shares
from engineworks.runtime.spool import Spool
from engineworks.runtime.tensors import Array

_ROWS_AT_ONCE = 1024  # and columns, of a matrix of similarities


def leave_one_out(vectors: Spool, labels_N: Array) -> Evaluation:
    """``top1``: share of pictures whose most similar other picture is of their class.

    Of equally similar ones the first counts. A picture that is alone in its class is only there to
    be taken for another. A resample asks other pictures, and compares them with the same ones.
    Memory does not grow with the number of pictures.

    Args:
        vectors: (B, F) float rows of length 1, N in all.
        labels_N: class of each.

    Raises:
        InputError: no class has two pictures.
    """
    _, which_N, sizes = np.unique(labels_N, return_inverse=True, return_counts=True)
    asked_N = sizes[which_N] > 1
    if not asked_N.any():
        raise InputError(
            f"of {len(labels_N)} pictures no two are of one class",
            fix="give at least two pictures of a class",
        )
    right_N = np.zeros(len(labels_N), np.int64)
    for start, rows_RF in _blocks(vectors):
        asked = np.flatnonzero(asked_N[start : start + len(rows_RF)])
        nearest = _nearest_others(rows_RF[asked], start + asked, vectors)
        right_N[start + asked] = labels_N[nearest] == labels_N[start + asked]
    return Evaluation(
        {"top1": int(right_N.sum()) / int(asked_N.sum())},
        evidence=(Shares("top1", right_N, asked_N.astype(np.int64)),),
        groups_I=np.zeros(len(labels_N), np.int64),
    )


def _nearest_others(rows_RF: Array, places_R: Array, vectors: Spool) -> Array:
    """(R,) place of the row that is most similar to each, itself left out."""
    best_R, nearest_R = np.full(len(rows_RF), -np.inf), np.zeros(len(rows_RF), np.int64)
    for start, others_CF in _blocks(vectors):
        similarity_RC = rows_RF @ others_CF.T
        own = np.flatnonzero((places_R >= start) & (places_R < start + len(others_CF)))
        similarity_RC[own, places_R[own] - start] = -np.inf  # nobody is compared with itself
        found_R = similarity_RC.argmax(axis=1)
        highest_R = similarity_RC[np.arange(len(rows_RF)), found_R]
        better = highest_R > best_R
        best_R[better], nearest_R[better] = highest_R[better], start + found_R[better]
    return nearest_R


def _blocks(vectors: Spool) -> Iterator[tuple[int, Array]]:
    """Rows, many at once, and the place of the first."""
    start = 0
    waiting: list[Array] = []
    for i in range(len(vectors)):
        waiting.append(vectors[i])
        num = sum(len(each) for each in waiting)
        if num >= _ROWS_AT_ONCE or i == len(vectors) - 1:
            yield start, np.concatenate(waiting)
            start, waiting = start + num, []
