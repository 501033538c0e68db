"""Which anchors learn which box: the best ten by how well they already do both of their tasks.

Source: Feng et al., "TOOD: Task-aligned One-stage Object Detection", 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny  # 0 / _TINY is 0


@dataclass(frozen=True)
class Targets:
    """The boxes of B images, padded to M >= 1 rows.

    Attributes:
        boxes_BM4: xyxy in pixels of the network's input, float32; a row that is padding is 0.
        classes_BM: column of each box's class, int64.
        real_BM: bool, false for padding.
    """

    boxes_BM4: Tensor
    classes_BM: Tensor
    real_BM: Tensor


@dataclass(frozen=True)
class Assignment:
    """What each of A anchors is to say.

    Attributes:
        box_BA: row of its box in ``Targets``; 0 where it has none.
        positive_BA: bool, whether it has one.
        scores_BAC: what its class scores are to be, in [0, 1]: at the column of its box's class how
            good it is among the anchors of this box, times the best one's IoU; 0 elsewhere.
        ious_BA: IoU of its prediction with its box; 0 where it has none.
    """

    box_BA: Tensor
    positive_BA: Tensor
    scores_BAC: Tensor
    ious_BA: Tensor


def pad(
    boxes: Sequence[Tensor], classes: Sequence[Tensor], valid_BC: Tensor | None = None
) -> Targets:
    """Boxes of each image in one tensor.

    Args:
        boxes: (M_b, 4) each.
        classes: (M_b,) each; a box of class -1 is left out: it is background.
        valid_BC: bool; boxes of a class that is not valid in their image are left out as well.
    """
    most = max(1, *(len(each) for each in boxes))  # at least one row: there is always one to gather
    boxes_BM4 = boxes[0].new_zeros(len(boxes), most, 4)
    classes_BM = classes[0].new_full((len(boxes), most), -1)
    for b, (boxes_M4, classes_M) in enumerate(zip(boxes, classes, strict=True)):
        boxes_BM4[b, : len(boxes_M4)] = boxes_M4
        classes_BM[b, : len(classes_M)] = classes_M
    real_BM = classes_BM >= 0
    classes_BM = classes_BM.clamp_min(0)
    if valid_BC is not None:
        real_BM = real_BM & valid_BC.gather(1, classes_BM)
    return Targets(boxes_BM4 * real_BM[..., None], classes_BM, real_BM)


def iou(a_X4: Tensor, b_X4: Tensor) -> Tensor:
    """Intersection over union of boxes xyxy, pair by pair; leading axes are broadcast.

    0 where both are empty.
    """
    inner = torch.minimum(a_X4[..., 2:], b_X4[..., 2:]) - torch.maximum(
        a_X4[..., :2], b_X4[..., :2]
    )
    intersection = inner.clamp_min(0).prod(-1)
    union = (a_X4[..., 2:] - a_X4[..., :2]).prod(-1) + (b_X4[..., 2:] - b_X4[..., :2]).prod(-1)
    return intersection / (union - intersection).clamp_min(_TINY)


@torch.no_grad()
def task_aligned(
    scores_BAC: Tensor,
    boxes_BA4: Tensor,
    anchors_A2: Tensor,
    targets: Targets,
    *,
    top_k: int = 10,
    alpha: float = 1.0,
    beta: float = 6.0,
) -> Assignment:
    """Give every box its ``top_k`` anchors, of all scales.

    An anchor is a candidate where its centre lies inside the box; where none does (a box smaller
    than a cell), the nearest one is. Candidates are ranked by ``score ** alpha * IoU ** beta``.
    One that two boxes want goes to the box with which its IoU is larger. A box that so loses all
    its anchors stays without.

    Args:
        scores_BAC: predicted, in [0, 1].
        boxes_BA4: predicted, xyxy in pixels.
        anchors_A2: centres (x, y) in pixels.
    """
    num_anchors, num_classes = scores_BAC.shape[1:]
    num_boxes = targets.real_BM.shape[1]
    inside_BMA = _candidates(anchors_A2, targets)
    ious_BMA = iou(boxes_BA4[:, None].float(), targets.boxes_BM4[:, :, None]) * inside_BMA
    columns_BMA = targets.classes_BM[..., None].expand(-1, -1, num_anchors)
    scores_BMA = scores_BAC.float().transpose(1, 2).gather(1, columns_BMA)
    aligned_BMA = scores_BMA.pow(alpha) * ious_BMA.pow(beta)

    # candidates before all others, also those whose alignment is still 0
    ranked_BMA = torch.where(inside_BMA, aligned_BMA, -1.0)
    best = ranked_BMA.topk(min(top_k, num_anchors), dim=-1)
    chosen_BMA = torch.zeros_like(inside_BMA).scatter(-1, best.indices, best.values >= 0)

    box_BA = torch.where(chosen_BMA, ious_BMA, -1.0).argmax(1)
    chosen_BMA &= box_BA[:, None] == torch.arange(num_boxes, device=box_BA.device)[:, None]
    positive_BA = chosen_BMA.any(1)
    box_BA = box_BA * positive_BA

    aligned_BMA = aligned_BMA * chosen_BMA
    ious_BMA = ious_BMA * chosen_BMA
    best_iou_BM1 = ious_BMA.amax(-1, keepdim=True)
    best_aligned_BM1 = aligned_BMA.amax(-1, keepdim=True)
    target_BA = (aligned_BMA / best_aligned_BM1.clamp_min(_TINY) * best_iou_BM1).sum(1)
    class_BA = targets.classes_BM.gather(1, box_BA)
    scores = target_BA.new_zeros(*target_BA.shape, num_classes)
    scores.scatter_(-1, class_BA[..., None], target_BA[..., None])
    return Assignment(box_BA, positive_BA, scores, ious_BMA.sum(1))


def _candidates(anchors_A2: Tensor, targets: Targets) -> Tensor:
    """(B, M, A) bool: centre inside the box, or the nearest of all where none is inside."""
    boxes_BM14 = targets.boxes_BM4[:, :, None]
    inside_BMA = ((anchors_A2 > boxes_BM14[..., :2]) & (anchors_A2 < boxes_BM14[..., 2:])).all(-1)
    centres_BM12 = (boxes_BM14[..., :2] + boxes_BM14[..., 2:]) / 2
    nearest_BM1 = (anchors_A2 - centres_BM12).square().sum(-1).argmin(-1, keepdim=True)
    missed_BM1 = ~inside_BMA.any(-1, keepdim=True)
    inside_BMA = inside_BMA.scatter(
        -1, nearest_BM1, inside_BMA.gather(-1, nearest_BM1) | missed_BM1
    )
    return inside_BMA & targets.real_BM[..., None]
