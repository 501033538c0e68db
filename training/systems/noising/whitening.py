"""Distances that count each direction by how much normal patches vary along it.

A few directions hold most of what normal patches differ by, and the distance to the nearest row is
then theirs alone. Whitening stretches the others.

Source: Mahalanobis, "On the generalised distance in statistics", 1936; per patch of a picture in
Defard et al., "PaDiM", 2021. Here one covariance serves all places, and a bank is kept.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from engineworks.runtime.tensors import Array

# of the mean variance, added to each: without it a direction in which few patches differ by little
# would count more than all others
_SHRINKAGE = 0.1


def whitening(patches: Iterable[Array], strength: float) -> Array:
    """The matrix that a row of features is multiplied with.

    Args:
        patches: (n, D) float32 of normal pictures, one after the other.
        strength: 0 leaves distances as they are; 1 makes the variances of all directions alike, up
            to the shrinkage; between them, powers of that.

    Returns:
        (D, D) float32, symmetric. The sum of all variances stays.
    """
    num, sum_D, products_DD = 0, 0.0, 0.0
    for rows_ND in patches:
        rows_ND = rows_ND.astype(np.float64)
        num += len(rows_ND)
        sum_D = sum_D + rows_ND.sum(axis=0)
        products_DD = products_DD + rows_ND.T @ rows_ND
    mean_D = sum_D / num
    variances_D, directions_DD = np.linalg.eigh(products_DD / num - np.outer(mean_D, mean_D))
    variances_D = np.maximum(variances_D, 0)
    total = variances_D.sum()
    if total <= 0:  # pictures without anything in them
        return np.eye(len(variances_D), dtype=np.float32)
    scale_D = (variances_D + _SHRINKAGE * variances_D.mean()) ** (-strength / 2)
    scale_D *= np.sqrt(total / (np.square(scale_D) * variances_D).sum())
    return np.asarray((directions_DD * scale_D) @ directions_DD.T, np.float32)
