"""Focal loss on one logit per pixel.

Source: Lin et al., "Focal Loss for Dense Object Detection", 2017.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from engineworks.training import ranks
from engineworks.training.systems.stripe.config import LossConfig


def focal(logits_B1HW: Tensor, mask_B1HW: Tensor, config: LossConfig) -> Tensor:
    """``-alpha_t (1 - p_t)^gamma log p_t``, mean over all pixels.

    alpha is the weight of the defective pixels (p_t = p), 1 - alpha that of the others
    (p_t = 1 - p). Computed from logits in float32: log p_t never leaves the numbers' range, and
    no pixel is clamped out of the gradient.

    Args:
        mask_B1HW: bool, true where defective.
    """
    signed = torch.where(mask_B1HW, logits_B1HW, -logits_B1HW).float()
    loss = -F.logsigmoid(signed)
    if config.gamma:
        loss = loss * torch.sigmoid(-signed) ** config.gamma
    if config.alpha is not None:
        loss = loss * torch.where(mask_B1HW, config.alpha, 1 - config.alpha)
    return ranks.mean_loss(loss)
