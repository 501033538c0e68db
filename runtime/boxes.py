"""Boxes: overlap, non-maximum suppression, and the way between an image and the network's input.

A box is x1, y1, x2, y2 in pixels, pixel centres at integers + 0.5: a box around the pixels of
columns a to b has x1 = a and x2 = b + 1. One with x2 <= x1 or y2 <= y1 is empty.
"""

from __future__ import annotations

import numpy as np

from engineworks.runtime.preprocess import PreprocessSpec, placement
from engineworks.runtime.tensors import Array


def iou(boxes_N4: Array, others_K4: Array) -> Array:
    """Intersection over union of each box with each other one.

    Args:
        boxes_N4, others_K4: of any float dtype.

    Returns:
        (N, K) of that dtype in [0, 1]; an empty box has 0 with all, itself included.
    """
    # axis by axis: a product over a last axis of two takes longer than all the rest
    shared_NK = _shared(boxes_N4, others_K4, 0)
    shared_NK *= _shared(boxes_N4, others_K4, 1)
    union_NK = areas(boxes_N4)[:, None] + areas(others_K4) - shared_NK
    overlap_NK = np.zeros_like(shared_NK)
    np.divide(shared_NK, union_NK, out=overlap_NK, where=union_NK > 0)
    return np.asarray(overlap_NK)


def covered(boxes_N4: Array, others_K4: Array) -> Array:
    """Intersection of each box with each other one over the area of the smaller of the two.

    Args:
        boxes_N4, others_K4: of any float dtype.

    Returns:
        (N, K) of that dtype in [0, 1]; an empty box has 0 with all.
    """
    shared_NK = _shared(boxes_N4, others_K4, 0)
    shared_NK *= _shared(boxes_N4, others_K4, 1)
    smaller_NK = np.minimum(areas(boxes_N4)[:, None], areas(others_K4))
    share_NK = np.zeros_like(shared_NK)
    np.divide(shared_NK, smaller_NK, out=share_NK, where=smaller_NK > 0)
    return np.asarray(share_NK)


def _shared(boxes_N4: Array, others_K4: Array, axis: int) -> Array:
    """(N, K) length that two boxes share along x (0) or y (1)."""
    low = np.maximum(boxes_N4[:, None, axis], others_K4[:, axis])
    high = np.minimum(boxes_N4[:, None, axis + 2], others_K4[:, axis + 2])
    high -= low
    return np.asarray(high.clip(0, out=high))


def areas(boxes_N4: Array) -> Array:
    """(N,) area of each box, 0 of an empty one."""
    return np.asarray((boxes_N4[:, 2:] - boxes_N4[:, :2]).clip(0).prod(axis=1))


def nms(
    boxes_N4: Array,
    scores_N: Array,
    classes_N: Array,
    *,
    limit: float,
    max_boxes: int,
    part: float | None = None,
) -> Array:
    """Greedy non-maximum suppression within each class, from the highest score down.

    A box is left out where a box of its class that was kept overlaps it by more than ``limit``. Of
    equal scores the first box comes first.

    Args:
        boxes_N4: in one unit.
        scores_N: finite.
        classes_N: int; boxes of different classes never suppress each other.
        limit: largest IoU of two boxes of a class that are both kept.
        max_boxes: so many are kept at most, of all classes together.
        part: a box is left out, too, where it and one that was kept share more than so much of the
            smaller of them: a part of an object, or more than it.

    Returns:
        (K,) int indices of the boxes kept, by falling score.
    """
    order = np.argsort(-scores_N, kind="stable")
    boxes, classes = boxes_N4[order], classes_N[order]
    rivals_NN = iou(boxes, boxes) > limit
    if part is not None:
        rivals_NN |= covered(boxes, boxes) > part
    rivals_NN &= classes[:, None] == classes
    alive = np.ones(len(order), bool)
    kept: list[int] = []
    for i in range(len(order)):
        if alive[i]:
            kept.append(i)
            if len(kept) == max_boxes:
                break
            alive &= ~rivals_NN[i]
    return np.asarray(order[kept])


def to_network(boxes_N4: Array, spec: PreprocessSpec, height: int, width: int) -> Array:
    """Boxes of an image of (height, width) where ``runtime.preprocess.place`` puts them.

    Returns:
        (N, 4) float32 pixels of the network's input. A centre crop may leave them outside of it.
    """
    scale, shift = _affine(spec, height, width)
    return np.asarray(boxes_N4 * scale + shift, np.float32)


def to_image(boxes_N4: Array, spec: PreprocessSpec, height: int, width: int) -> Array:
    """Boxes of the network's input on the image of (height, width) that it was made of.

    Returns:
        (N, 4) float32 pixels of the image, clipped to it; one that lies in the padding is empty.
    """
    scale, shift = _affine(spec, height, width)
    return clip((boxes_N4 - shift) / scale, height, width)


def clip(boxes_N4: Array, height: int, width: int) -> Array:
    """(N, 4) float32: the part of each box that lies in an image of (height, width)."""
    return np.asarray(np.clip(boxes_N4, 0, (width, height, width, height)), np.float32)


def _affine(spec: PreprocessSpec, height: int, width: int) -> tuple[Array, Array]:
    """Factors and offsets of x1, y1, x2, y2, both (4,) float64."""
    affine = placement(spec, height, width)
    return np.tile(np.diag(affine), 2), np.tile(affine[:, 2], 2)
