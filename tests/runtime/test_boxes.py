from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime.boxes import areas, clip, covered, iou, nms, to_image, to_network
from engineworks.runtime.preprocess import PreprocessSpec, apply, place
from engineworks.runtime.tensors import Array

coordinates = st.floats(-50, 400, width=32)


@st.composite
def boxes(draw: st.DrawFn, *, most: int = 12) -> Array:
    """Some of them empty, some equal to others."""
    few = st.integers(0, 6).map(float)  # so that corners coincide
    box = st.tuples(*[coordinates | few] * 4)
    found = draw(st.lists(box, max_size=most))
    return np.array(found, np.float64).reshape(-1, 4)


def plain_iou(one: Array, other: Array) -> float:
    """Reference: one pair of boxes."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)

    shared = area(
        max(one[0], other[0]), max(one[1], other[1]), min(one[2], other[2]), min(one[3], other[3])
    )
    union = area(*one) + area(*other) - shared
    return shared / union if union > 0 else 0.0


def plain_nms(found: Array, scores: Array, classes: Array, limit: float, most: int) -> list[int]:
    """Reference: take the best box that is left, and drop what it suppresses."""
    left = sorted(range(len(found)), key=lambda i: (-scores[i], i))
    kept: list[int] = []
    while left and len(kept) < most:
        best = left.pop(0)
        kept.append(best)
        left = [
            i
            for i in left
            if classes[i] != classes[best] or plain_iou(found[best], found[i]) <= limit
        ]
    return kept


class TestOverlap:
    @given(boxes(), boxes())
    def test_is_that_of_each_pair(self, some: Array, others: Array) -> None:
        found = iou(some, others)

        assert found.shape == (len(some), len(others))
        want = [[plain_iou(one, other) for other in others] for one in some]
        # both in float64; a sliver's union is a difference of areas up to 2e5
        np.testing.assert_allclose(found, np.reshape(want, found.shape), rtol=1e-9, atol=1e-9)

    @given(boxes())
    def test_with_itself_is_one_unless_the_box_is_empty(self, some: Array) -> None:
        found = np.diag(iou(some, some))
        # float64; the union of a box with itself is twice its area less its area
        np.testing.assert_allclose(found, areas(some) > 0, rtol=1e-12)

    def test_of_halves_is_a_third(self) -> None:
        one = np.array([[0, 0, 2, 2]], np.float32)
        assert iou(one, np.array([[1, 0, 3, 2]], np.float32)) == pytest.approx(1 / 3)
        assert iou(one, np.array([[2, 0, 4, 2]], np.float32)) == 0


class TestCovered:
    @given(boxes(), boxes())
    def test_is_the_intersection_over_the_smaller(self, some: Array, others: Array) -> None:
        overlap = iou(some, others)
        own, foreign = areas(some)[:, None], areas(others)
        shared = overlap * (own + foreign) / (1 + overlap)
        smaller = np.minimum(own, foreign)
        want = np.divide(shared, smaller, out=np.zeros_like(shared), where=smaller > 0)
        # float64; areas up to 2e5 and slivers
        np.testing.assert_allclose(covered(some, others), want, rtol=1e-6, atol=1e-6)

    def test_of_a_box_inside_is_one(self) -> None:
        one, inside = np.array([[0.0, 0, 9, 9]]), np.array([[2.0, 2, 4, 5]])
        assert covered(one, inside) == covered(inside, one) == 1


class TestSuppression:
    @settings(max_examples=200)
    @given(
        boxes(most=30),
        st.data(),
        st.sampled_from([0.0, 0.3, 0.45, 1.0]),
        st.integers(1, 40),
    )
    def test_keeps_what_a_plain_loop_keeps(
        self, found: Array, data: st.DataObject, limit: float, most: int
    ) -> None:
        num = len(found)
        ties = st.sampled_from([0.1, 0.5, 0.5, 0.9]) | st.floats(0, 1, width=32)
        scores = np.array(data.draw(st.lists(ties, min_size=num, max_size=num)))
        kinds = data.draw(st.lists(st.integers(0, 2), min_size=num, max_size=num))
        classes = np.array(kinds, np.int64)

        kept = nms(found, scores, classes, limit=limit, max_boxes=most)

        assert kept.tolist() == plain_nms(found, scores, classes, limit, most)

    def test_of_crowded_boxes_agrees_with_the_plain_loop_as_well(
        self, rng: np.random.Generator
    ) -> None:
        corner = rng.uniform(0, 60, (300, 2))
        found = np.concatenate([corner, corner + rng.uniform(10, 40, (300, 2))], axis=1)
        scores, classes = rng.uniform(size=300), rng.integers(0, 3, 300)

        kept = nms(found, scores, classes, limit=0.45, max_boxes=300)

        assert 10 < len(kept) < 200
        assert kept.tolist() == plain_nms(found, scores, classes, 0.45, 300)

    def test_leaves_out_parts_and_what_holds_more(self) -> None:
        whole, inside = [0, 0, 10, 10], [1, 1, 5, 6]  # all of 20 of 100
        around, beside = [0, 0, 10, 40], [8, 0, 18, 10]  # a quarter; a fifth of either
        found = np.array([whole, inside, around, beside], np.float64)
        scores, classes = np.array([0.9, 0.8, 0.7, 0.6]), np.zeros(4, int)

        def kept(part: float | None) -> list[int]:
            return nms(found, scores, classes, limit=0.45, max_boxes=9, part=part).tolist()

        assert kept(None) == [0, 1, 2, 3]
        assert kept(0.7) == [0, 3]
        assert kept(0.1) == [0]
        other = np.array([0, 1, 2, 0])
        assert nms(found, scores, other, limit=0.45, max_boxes=9, part=0.1).tolist() == [0, 1, 2]

    def test_does_not_reach_over_classes(self) -> None:
        same = np.array([[0, 0, 9, 9]] * 3, np.float32)
        scores = np.array([0.5, 0.9, 0.8], np.float32)

        kept = nms(same, scores, np.array([0, 1, 1]), limit=0.5, max_boxes=9)

        assert kept.tolist() == [1, 0]

    def test_of_nothing_keeps_nothing(self) -> None:
        none = nms(np.empty((0, 4)), np.empty(0), np.empty(0, int), limit=0.5, max_boxes=9)
        assert none.tolist() == []


class TestTheWayToTheNetwork:
    @given(
        st.tuples(st.integers(1, 700), st.integers(1, 700)),
        st.tuples(st.integers(16, 640), st.integers(16, 640)),
        st.sampled_from(["letterbox", "squash"]),
        st.data(),
    )
    def test_and_back_gives_the_box_that_was_put_in(
        self, size: tuple[int, int], network: tuple[int, int], resize: str, data: st.DataObject
    ) -> None:
        spec = PreprocessSpec(size=network, resize=resize)  # type: ignore[arg-type]
        height, width = size
        across = st.lists(st.floats(0, width, width=32), min_size=2, max_size=2).map(sorted)
        down = st.lists(st.floats(0, height, width=32), min_size=2, max_size=2).map(sorted)
        (x1, x2), (y1, y2) = data.draw(across), data.draw(down)
        box = np.array([[x1, y1, x2, y2]], np.float32)

        there = to_network(box, spec, height, width)
        back = to_image(there, spec, height, width)

        # a coordinate of the network is rounded to float32: 640 x 2^-24 pixels, enlarged on the
        # way back by no more than the scale
        np.testing.assert_allclose(back, box, atol=1e-4 * max(1, max(size) / min(network)))
        assert (there >= -1e-3).all()
        assert (there <= np.array([network[1], network[0]] * 2) + 1e-3).all()

    def test_moves_a_box_with_the_pixels_that_it_encloses(self, rng: np.random.Generator) -> None:
        """A white box, letterboxed: its white area is where the moved box says."""
        for _ in range(20):
            height, width = (int(n) for n in rng.integers(40, 300, 2))
            x1, y1 = int(rng.integers(0, width - 20)), int(rng.integers(0, height - 20))
            x2, y2 = int(rng.integers(x1 + 10, width)), int(rng.integers(y1 + 10, height))
            image = np.zeros((height, width), np.uint8)
            image[y1:y2, x1:x2] = 255
            spec = PreprocessSpec(size=(96, 160), resize="letterbox", pad_value=0)

            white = place(spec, image) > 127
            moved = to_network(np.array([[x1, y1, x2, y2]], np.float32), spec, height, width)[0]

            ys, xs = np.nonzero(white)
            seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            # half grey is where the border is; whole pixels know it to half of one
            np.testing.assert_allclose(moved, seen, atol=0.51)

    def test_a_box_in_the_padding_is_empty_on_the_image(self) -> None:
        spec = PreprocessSpec(size=(64, 64), resize="letterbox")  # 16 rows above and below
        found = to_image(np.array([[8, 2, 40, 12], [8, 10, 40, 32]], np.float32), spec, 32, 64)

        assert areas(found).tolist() == [0, 32 * 16]
        assert found[1].tolist() == [8, 0, 40, 16]

    def test_clips_to_the_image(self) -> None:
        found = clip(np.array([[-3, 5, 70, 90]]), 60, 50)
        assert found.dtype == np.float32
        assert found.tolist() == [[0, 5, 50, 60]]

    @pytest.mark.data
    def test_is_the_published_letterbox(self, shared: Path) -> None:
        known = np.load(shared / "fixtures" / "refdet_letterbox.npz")
        image, side = known["image"], int(known["size"])
        spec = PreprocessSpec(size=(side, side), resize="letterbox", interpolation="bilinear")

        found = to_network(known["boxes_in"], spec, *image.shape[:2])

        ratio, (left, top) = known["ratio"], known["pad"]
        assert np.array_equal(place(spec, image), known["out"])
        # the published one keeps the ratio of the longer side for both, here the height is rounded:
        # 26 rows for 26.31, so a row is off by up to 1.2 %; its shift is whole pixels in both
        np.testing.assert_allclose(found[:, ::2], known["boxes"][:, ::2], atol=1e-4)
        np.testing.assert_allclose(found[:, 1::2], known["boxes"][:, 1::2], atol=0.32)
        back = to_image(found, spec, *image.shape[:2])
        np.testing.assert_allclose(back, known["boxes_in"], atol=1e-4)  # float32
        assert (left, top) == (0, 19)
        assert ratio[0] == ratio[1]


def test_an_image_that_fits_is_not_moved() -> None:
    spec = PreprocessSpec(size=(30, 40), resize="letterbox", mean=(0, 0, 0), std=(1, 1, 1))
    box = np.array([[3, 4, 20, 25]], np.float32)

    assert np.array_equal(to_network(box, spec, 30, 40), box)
    image = np.zeros((30, 40, 3), np.uint8)
    image[4:25, 3:20] = 255
    assert apply(spec, [image])[0, 0, 4:25, 3:20].min() == 1
