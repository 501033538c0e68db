"""Scores to probabilities: what share of the boxes of a score are right, on objects not learned.

    p = sigmoid(scale * logit + shift)

Source: Platt, "Probabilistic Outputs for Support Vector Machines", 1999.
"""

from __future__ import annotations

import numpy as np

from engineworks.runtime.tensors import Array

_FEWEST = 10  # right boxes, and wrong ones, without which nothing is fitted
_STEPS = 50
_PRIOR = 1e-3  # of a quadratic penalty, so that what is told apart without error stays finite


def fitted(scores_D: Array, right_D: Array) -> tuple[float, float] | None:
    """Scale and shift of the largest likelihood; None where there is too little to fit.

    Args:
        scores_D: in (0, 1).
        right_D: bool, of the same length.
    """
    if min(right_D.sum(), (~right_D).sum()) < _FEWEST:
        return None
    sure_D = np.clip(scores_D.astype(np.float64), 1e-6, 1 - 1e-6)
    design_D2 = np.stack([np.log(sure_D / (1 - sure_D)), np.ones(len(sure_D))], axis=1)
    factors_2 = np.array([1.0, 0.0])
    for _ in range(_STEPS):  # Newton's
        share_D = 1 / (1 + np.exp(-design_D2 @ factors_2))
        slope_2 = design_D2.T @ (share_D - right_D) + _PRIOR * (factors_2 - [1.0, 0.0])
        weights_D = share_D * (1 - share_D)
        curvature_22 = (design_D2 * weights_D[:, None]).T @ design_D2 + _PRIOR * np.eye(2)
        step_2 = np.linalg.solve(curvature_22, slope_2)
        factors_2 -= step_2
        if np.abs(step_2).max() < 1e-9:
            break
    scale, shift = factors_2.tolist()
    return (scale, shift) if scale > 0 else None  # what rises must stay so
