"""Following an object from frame to frame, with a net that is a function."""

from __future__ import annotations

import numpy as np
import pytest

from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.results import Detection, Detections
from engineworks.runtime.systems.refdet.detecting import FollowParams, InferenceConfig
from engineworks.runtime.systems.refdet.following import Follower
from engineworks.runtime.tensors import Array

SPEC = PreprocessSpec(size=(64, 64), resize="letterbox", mean=(0.0,) * 3, std=(1.0,) * 3)
PARAMS = FollowParams(preprocess=SPEC, share=0.4, every=8, nearness=1.0, agility=1.0)
SIDE = 20


def frame(*places: tuple[int, int], side: int = SIDE) -> Array:
    """A dark frame with white squares that begin at (x, y)."""
    image = np.full((120, 160, 3), 20, np.uint8)
    for x, y in places:
        image[y : y + side, x : x + side] = 255
    return image


class World:
    """A full search that sees white squares of any place, and a local one that sees one in its
    picture; both say so exactly.
    """

    def __init__(self) -> None:
        self.searched = 0
        self.score = 0.9

    def search(self, image: Array) -> Detections:
        self.searched += 1
        box = _white(image[..., 0] > 200)
        return Detections(() if box is None else (Detection("it", 0.8, box),))

    def local(self, images_BCHW: Array, prototypes_NP: Array) -> tuple[Array, Array, Array]:
        box = _white(images_BCHW[0, 0] > 0.7)
        boxes = np.zeros((1, 2, 4), np.float32)
        scores = np.zeros((1, 2), np.float32)
        if box is not None:
            boxes[0, 0], scores[0, 0] = box, self.score
        return boxes, scores, np.zeros((1, 2), np.int64)

    def follower(self, params: FollowParams = PARAMS) -> Follower:
        config = InferenceConfig(conf=0.5)
        rows = np.ones((1, 3), np.float32)
        return Follower(self.search, self.local, ["it"], rows, [], params, config)


def _white(mask: Array) -> tuple[float, float, float, float] | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    return float(columns[0]), float(rows[0]), columns[-1] + 1.0, rows[-1] + 1.0


def test_what_moves_is_followed_without_searching_whole_frames() -> None:
    world = World()
    follower = world.follower()
    for i in range(8):
        (found,) = follower.infer([frame((20 + 5 * i, 40 + 3 * i))])
        (it,) = found.objects
        # a pixel of the small picture is 20 / (0.4 * 64) pixels of the frame, on either side
        assert it.box == pytest.approx((20 + 5 * i, 40 + 3 * i, 40 + 5 * i, 60 + 3 * i), abs=2)
    assert (world.searched, follower.num_searched, follower.num_followed) == (1, 1, 7)


def test_each_so_many_frames_are_searched_whole() -> None:
    world = World()
    world.follower().infer([frame((30, 30))] * 17)
    assert world.searched == 3


def test_its_size_is_followed() -> None:
    follower = World().follower()
    for side in (20, 24, 29, 35, 42):
        (found,) = follower.infer([frame((40, 40), side=side)])
    x1, _, x2, _ = found.objects[0].box
    assert x2 - x1 == pytest.approx(42, abs=4)


def test_a_change_of_size_is_believed_by_a_part() -> None:
    follower = World().follower(PARAMS.model_copy(update={"agility": 0.5}))
    follower.infer([frame((40, 40), side=16)])
    (found,) = follower.infer([frame((40, 40), side=25)])
    x1, _, x2, _ = found.objects[0].box
    assert x2 - x1 == pytest.approx(20, abs=1.5)  # the geometric mean


def test_what_is_lost_is_looked_for_in_the_same_frame() -> None:
    world = World()
    follower = world.follower()
    follower.infer([frame((10, 10))])
    (found,) = follower.infer([frame((130, 90))])  # far beside the small picture
    assert found.objects[0].box == (130, 90, 150, 110)
    assert world.searched == 2


def test_what_is_unlikely_is_lost() -> None:
    world = World()
    follower = world.follower()
    follower.infer([frame((10, 10))])
    world.score = 0.4
    follower.infer([frame((10, 10))])
    assert world.searched == 2


def test_while_nothing_is_there_every_frame_is_searched() -> None:
    world = World()
    follower = world.follower()
    for _ in range(5):
        (found,) = follower.infer([frame()])
        assert not found.objects
    assert world.searched == 5


def test_more_objects_than_it_may_follow_are_searched_for() -> None:
    world = World()

    def search(image: Array) -> Detections:
        world.searched += 1
        return Detections(tuple(Detection("it", 0.8, (x, 10.0, x + 20, 30)) for x in (10.0, 90.0)))

    config = InferenceConfig(conf=0.5)
    rows = np.ones((1, 3), np.float32)
    follower = Follower(search, world.local, ["it"], rows, [], PARAMS, config)
    follower.infer([frame((10, 10), (90, 10))] * 4)
    assert world.searched == 4


def test_of_two_places_the_nearer_is_taken() -> None:
    def local(images_BCHW: Array, prototypes_NP: Array) -> tuple[Array, Array, Array]:
        near, far = (20, 20, 45, 45), (38, 38, 63, 63)
        boxes = np.array([[far, near]], np.float32)
        return boxes, np.array([[0.85, 0.8]], np.float32), np.zeros((1, 2), np.int64)

    world = World()
    config = InferenceConfig(conf=0.5)
    rows = np.ones((1, 3), np.float32)
    follower = Follower(world.search, local, ["it"], rows, [], PARAMS, config)
    follower.infer([frame((60, 40))])
    (found,) = follower.infer([frame((60, 40))])
    assert found.objects[0].score == pytest.approx(0.8)


def test_what_resembles_something_unwanted_more_is_lost() -> None:
    def local(images_BCHW: Array, prototypes_NP: Array) -> tuple[Array, Array, Array]:
        assert prototypes_NP[:, 0].tolist() == [1, 7]
        boxes = np.tile(np.array([20, 20, 45, 45], np.float32), (1, 2, 1))
        return boxes, np.array([[0.8, 0.9]], np.float32), np.array([[0, 1]])

    world = World()
    config = InferenceConfig(conf=0.5)
    rows = np.array([[1, 0, 0], [7, 0, 0]], np.float32)
    follower = Follower(world.search, local, ["it", "not-it"], rows, [1], PARAMS, config)
    follower.infer([frame((60, 40))] * 2)
    assert world.searched == 2
