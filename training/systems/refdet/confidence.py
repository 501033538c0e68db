"""Scores to probabilities: what share of the boxes of a score are right, on objects not learned.

    p = sigmoid(scale * logit + shift)

Source: Platt, "Probabilistic Outputs for Support Vector Machines", 1999.
"""

from __future__ import annotations

import numpy as np

from engineworks.runtime.tensors import Array

_FEWEST = 10  # right boxes, and wrong ones, without which nothing is fitted
_STEPS = 50
_CLOSE = 1e-9  # largest change with which it ends
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
    start_2 = np.array([1.0, 0.0])

    def lack(factors_2: Array) -> float:
        logits_D = design_D2 @ factors_2
        likely = float((np.logaddexp(0, logits_D) - right_D * logits_D).sum())
        return likely + 0.5 * _PRIOR * float(((factors_2 - start_2) ** 2).sum())

    factors_2 = start_2
    for _ in range(_STEPS):  # Newton's, shortened where it goes too far
        share_D = np.exp(-np.logaddexp(0, -design_D2 @ factors_2))
        slope_2 = design_D2.T @ (share_D - right_D) + _PRIOR * (factors_2 - start_2)
        weights_D = share_D * (1 - share_D)
        curvature_22 = (design_D2 * weights_D[:, None]).T @ design_D2 + _PRIOR * np.eye(2)
        step_2 = np.linalg.solve(curvature_22, slope_2)
        while np.abs(step_2).max() >= _CLOSE and lack(factors_2 - step_2) > lack(factors_2):
            step_2 = step_2 / 2
        factors_2 = factors_2 - step_2
        if np.abs(step_2).max() < _CLOSE:
            break
    scale, shift = factors_2.tolist()
    return (scale, shift) if scale > 0 else None  # what rises must stay so
