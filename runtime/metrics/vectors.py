"""Metrics of embeddings: whether the most similar picture is of the same class."""

from __future__ import annotations

import numpy as np

from engineworks.runtime.errors import InputError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.evidence import Shares
from engineworks.runtime.tensors import Array

_ROWS_AT_ONCE = 1024  # of a matrix of similarities


def leave_one_out(vectors_NF: Array, labels_N: Array) -> Evaluation:
    """``top1``: share of pictures whose most similar other picture is of their class.

    Of equally similar ones the first counts. A picture that is alone in its class is only there to
    be taken for another. A resample asks other pictures, and compares them with the same ones.

    Args:
        vectors_NF: float, of length 1.
        labels_N: class of each.

    Raises:
        InputError: no class has two pictures.
    """
    _, which_N, sizes = np.unique(labels_N, return_inverse=True, return_counts=True)
    asked = np.flatnonzero(sizes[which_N] > 1)
    if not len(asked):
        raise InputError(
            f"of {len(labels_N)} pictures no two are of one class",
            fix="give at least two pictures of a class",
        )
    right_N = np.zeros(len(labels_N), np.int64)
    for start in range(0, len(asked), _ROWS_AT_ONCE):
        rows = asked[start : start + _ROWS_AT_ONCE]
        similarity = vectors_NF[rows] @ vectors_NF.T
        similarity[np.arange(len(rows)), rows] = -np.inf  # nobody is compared with itself
        right_N[rows] = labels_N[similarity.argmax(axis=1)] == labels_N[rows]
    return Evaluation(
        {"top1": int(right_N.sum()) / len(asked)},
        evidence=(Shares("top1", right_N, (sizes[which_N] > 1).astype(np.int64)),),
        groups_I=np.zeros(len(labels_N), np.int64),
    )
