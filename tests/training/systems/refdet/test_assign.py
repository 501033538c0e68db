from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engineworks.training.systems.refdet.assign import Assignment, Targets, iou, pad, task_aligned

pytestmark = pytest.mark.train

SIZE = 64
PREDICTED = 24  # side of every predicted box in ``scene``


def anchors(strides: tuple[int, ...] = (8, 16)) -> Tensor:
    """Centres of the cells of a SIZE x SIZE image: (A, 2)."""
    grids = []
    for stride in strides:
        side = (torch.arange(SIZE // stride) + 0.5) * stride
        y, x = torch.meshgrid(side, side, indexing="ij")
        grids.append(torch.stack([x, y], dim=-1).flatten(0, 1))
    return torch.cat(grids)


def scene(seed: int, images: int = 3, classes: int = 4, most: int = 5) -> tuple[Tensor, ...]:
    """Random scores and boxes of all anchors, true boxes and classes, and valid classes."""
    rng = np.random.default_rng(seed)
    centres = anchors()
    num = len(centres)
    scores = torch.from_numpy(rng.uniform(0, 1, (images, num, classes)).astype(np.float32))
    away = rng.uniform(4, PREDICTED, (images, num, 4)).astype(np.float32)
    boxes = torch.cat([centres, centres], 1) + torch.from_numpy(away * [-1, -1, 1, 1]).float()
    true, labels = [], []
    for _ in range(images):
        count = rng.integers(0, most + 1)
        corner = rng.uniform(0, SIZE - 4, (count, 2))
        side = rng.uniform(2, 40, (count, 2))
        true.append(torch.from_numpy(np.concatenate([corner, corner + side], 1)).float())
        labels.append(torch.from_numpy(rng.integers(-1, classes, count)))
    valid = torch.from_numpy(rng.random((images, classes)) < 0.7)
    return scores, boxes, centres, true, labels, valid  # type: ignore[return-value]


def reference(
    scores: np.ndarray,
    boxes: np.ndarray,
    centres: np.ndarray,
    true: np.ndarray,
    labels: np.ndarray,
    *,
    top_k: int,
    alpha: float,
    beta: float,
) -> tuple[np.ndarray, np.ndarray]:
    """One image, box by box in float64: (A,) box or -1, and (A, C) soft targets."""

    def overlap(a: np.ndarray, b: np.ndarray) -> float:
        width = min(a[2], b[2]) - max(a[0], b[0])
        height = min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        return float(shared / (both - shared))

    ious = np.array([[overlap(p, t) for p in boxes] for t in true]).reshape(len(true), len(boxes))
    wanted: dict[int, list[int]] = {}
    for m, (x1, y1, x2, y2) in enumerate(true):
        inside = [a for a, (x, y) in enumerate(centres) if x1 < x < x2 and y1 < y < y2]
        if not inside:
            away = ((centres - [(x1 + x2) / 2, (y1 + y2) / 2]) ** 2).sum(1)
            inside = [int(away.argmin())]
        rank = sorted(inside, key=lambda a: -(scores[a, labels[m]] ** alpha * ious[m, a] ** beta))
        for a in rank[:top_k]:
            wanted.setdefault(a, []).append(m)
    box = np.full(len(boxes), -1)
    for a, rivals in wanted.items():
        box[a] = max(rivals, key=lambda m: ious[m, a])
    target = np.zeros(scores.shape)
    for m in range(len(true)):
        mine = np.flatnonzero(box == m)
        aligned = scores[mine, labels[m]] ** alpha * ious[m, mine] ** beta
        if len(mine) and aligned.max() > 0:
            target[mine, labels[m]] = aligned / aligned.max() * ious[m, mine].max()
    return box, target


def assign(seed: int, top_k: int = 10) -> tuple[Assignment, Targets, tuple[Tensor, ...]]:
    scores, boxes, centres, true, labels, valid = drawn = scene(seed)
    targets = pad(true, labels, valid)  # type: ignore[arg-type]
    found = task_aligned(scores, boxes, centres, targets, top_k=top_k, alpha=0.5, beta=6.0)
    return found, targets, drawn


class TestTaskAlignedAssignment:
    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 10_000), top_k=st.sampled_from([1, 3, 10]))
    def test_is_the_papers_image_by_image_and_box_by_box(self, seed: int, top_k: int) -> None:
        found, _, (scores, boxes, centres, true, labels, valid) = assign(seed, top_k)
        for b in range(len(scores)):
            kept = [m for m, c in enumerate(labels[b].tolist()) if c >= 0 and valid[b, c]]
            box, target = reference(
                scores[b].double().numpy(),
                boxes[b].double().numpy(),
                centres.double().numpy(),
                true[b].double().numpy()[kept],
                labels[b].numpy()[kept],
                top_k=top_k,
                alpha=0.5,
                beta=6.0,
            )
            assert found.positive_BA[b].tolist() == (box >= 0).tolist()
            rows = [kept[m] for m in box if m >= 0]
            assert found.box_BA[b][found.positive_BA[b]].tolist() == rows
            # a sixth power of an IoU that float32 knows to 6e-8
            np.testing.assert_allclose(found.scores_BAC[b].numpy(), target, rtol=1e-4, atol=1e-6)

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 10_000))
    def test_says_nothing_of_classes_that_are_not_valid(self, seed: int) -> None:
        found, _, drawn = assign(seed)
        valid = drawn[-1]
        assert (found.scores_BAC.amax(1)[~valid] == 0).all()

    @settings(deadline=None, max_examples=40)
    @given(seed=st.integers(0, 10_000))
    def test_the_best_anchor_of_a_box_is_to_say_its_own_iou(self, seed: int) -> None:
        found, targets, _ = assign(seed)
        for b, m in targets.real_BM.nonzero().tolist():
            mine = found.positive_BA[b] & (found.box_BA[b] == m)
            if mine.any():
                best = found.scores_BAC[b][mine].max()
                # one division and one product in float32
                torch.testing.assert_close(best, found.ious_BA[b][mine].max(), rtol=1e-6, atol=0)

    def test_padding_changes_nothing(self) -> None:
        scores, boxes, centres, true, labels, _ = scene(1)
        together = task_aligned(scores, boxes, centres, pad(true, labels))
        for b in range(len(scores)):
            alone = task_aligned(
                scores[b : b + 1], boxes[b : b + 1], centres, pad([true[b]], [labels[b]])
            )
            assert torch.equal(alone.positive_BA[0], together.positive_BA[b])
            assert torch.equal(alone.box_BA[0], together.box_BA[b])
            assert torch.equal(alone.scores_BAC[0], together.scores_BAC[b])

    def test_a_batch_without_any_box_is_background(self) -> None:
        scores, boxes, centres, *_ = scene(0)
        none = [torch.zeros(0, 4)] * len(scores)
        found = task_aligned(scores, boxes, centres, pad(none, [torch.zeros(0).long()] * 3))
        assert not found.positive_BA.any()
        assert found.scores_BAC.shape == scores.shape
        assert not found.scores_BAC.any()

    def test_a_box_smaller_than_a_cell_gets_the_nearest_anchor(self) -> None:
        centres = anchors()
        boxes = torch.cat([centres - 8, centres + 8], 1)[None]
        tiny = torch.tensor([[16.5, 16.5, 18.0, 18.0]])  # between the centres at 12 and 20
        scores = torch.full((1, len(centres), 1), 0.5)
        found = task_aligned(scores, boxes, centres, pad([tiny], [torch.zeros(1).long()]))
        assert found.positive_BA.sum() == 1
        assert centres[found.positive_BA[0]].tolist() == [[20.0, 20.0]]

    def test_an_anchor_that_two_boxes_want_learns_the_one_that_it_covers_better(self) -> None:
        centre = torch.tensor([[32.0, 32.0]])
        boxes = torch.tensor([[[20.0, 20.0, 44.0, 44.0]]])
        true = torch.tensor([[0.0, 0.0, 64.0, 64.0], [21.0, 21.0, 44.0, 44.0]])
        found = task_aligned(
            torch.full((1, 1, 2), 0.5), boxes, centre, pad([true], [torch.tensor([0, 1])])
        )
        assert found.box_BA.tolist() == [[1]]
        assert found.scores_BAC[0, 0, 0] == 0

    def test_takes_no_gradient(self) -> None:
        scores, boxes, centres, true, labels, _ = scene(2)
        found = task_aligned(
            scores.requires_grad_(), boxes.requires_grad_(), centres, pad(true, labels)
        )
        assert not found.scores_BAC.requires_grad


class TestIou:
    @settings(deadline=None)
    @given(seed=st.integers(0, 10_000))
    def test_is_shared_area_over_area_of_both(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        # corners on a grid: areas can be counted
        a, b = (np.concatenate([c, c + rng.integers(0, 6, 2)]) for c in rng.integers(0, 6, (2, 2)))
        cells = np.zeros((2, 12, 12), bool)
        for plane, (x1, y1, x2, y2) in zip(cells, (a, b), strict=True):
            plane[y1:y2, x1:x2] = True
        union = (cells[0] | cells[1]).sum()
        want = (cells[0] & cells[1]).sum() / union if union else 0.0
        got = iou(torch.from_numpy(a).float(), torch.from_numpy(b).float())
        assert float(got) == pytest.approx(want, rel=1e-6)  # one float32 division
