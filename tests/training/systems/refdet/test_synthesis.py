"""Objects that are pasted lie where their boxes say, and hide what is below them."""

from __future__ import annotations

import numpy as np
import pytest

from engineworks.runtime import images
from engineworks.runtime.frames import Frames
from engineworks.runtime.objects import Frame, LabelledFrame
from engineworks.training.systems.refdet.synthesis import Synthesis

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> list[LabelledFrame]:
    """A black frame without objects, and one of a white square, 40 pixels wide."""
    root = tmp_path_factory.mktemp("frames")
    images.write(root / "empty.png", np.zeros((120, 160, 3), np.uint8))
    white = np.zeros((120, 160, 3), np.uint8)
    white[30:70, 50:90] = 255
    images.write(root / "square.png", white)
    box = np.array([[50, 30, 90, 70]], np.float32)
    return [
        LabelledFrame(Frame(root / "empty.png"), np.empty((0, 4), np.float32), ()),
        LabelledFrame(Frame(root / "square.png"), box, ("square",)),
    ]


def test_what_is_pasted_lies_in_its_box(frames: list[LabelledFrame]) -> None:
    synthesis = Synthesis(frames, Frames(0))
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = synthesis.scene(rng)
        assert len(scene.objects) == len(scene.boxes_N4) >= 1
        assert set(scene.objects) == {"square"}
        outside = scene.image.max(axis=2) > 100
        for x1, y1, x2, y2 in scene.boxes_N4.astype(int).tolist():
            assert 0 <= x1 < x2 <= 160
            assert 0 <= y1 < y2 <= 120
            middle = scene.image[(y1 + y2) // 2, (x1 + x2) // 2]
            assert middle.min() > 150  # white, less what light takes
            outside[y1:y2, x1:x2] = False
        # what is hidden by more than 0.6 has no box any more; two fifths of its area may show
        assert outside.sum() <= 0.6 * 40 * 40 * 4


def test_frames_stay_as_they_are(frames: list[LabelledFrame]) -> None:
    kept = Frames(1 << 20)
    before = [kept.read(each.frame).copy() for each in frames]
    synthesis, rng = Synthesis(frames, kept), np.random.default_rng(1)
    for _ in range(10):
        synthesis.scene(rng)
    for each, was in zip(frames, before, strict=True):
        np.testing.assert_array_equal(kept.read(each.frame), was)


def test_without_objects_nothing_is_pasted(frames: list[LabelledFrame]) -> None:
    scene = Synthesis(frames[:1], Frames(0)).scene(np.random.default_rng(0))
    assert scene.objects == ()
    assert scene.image.max() == 0
