from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime.boxes import iou
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.errors import (
    DatasetError,
    InputError,
)
from engineworks.runtime.metrics import st_iou
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.systems import (
    Promptable,
    open_system,
    prompt,
)
from engineworks.runtime.systems.refdet.detecting import InferenceConfig, evaluate
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import (
    write_references,
    write_scenes,
    write_tiny_refdet_bundle,
)
from engineworks.runtime.video import VideoWriter

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
SPEC = PreprocessSpec(size=(40, 60), resize="letterbox", mean=ZERO, std=ONE, pad_value=0)


EVERYWHERE = {"map50": 1, "map50_95": 1, "peak_in_box": 1, "recall_fp1": 1}
ALL = {**EVERYWHERE, "map50_present": 1, "map50_95_present": 1}


def grey(height: int = 40, width: int = 60) -> Array:
    return np.full((height, width, 3), 90, np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_refdet_bundle(tmp_path_factory.mktemp("refdet") / "bundle", int8=True)


@dataclass(frozen=True)
class Labelled:
    """What the data layer says about a frame; the frame itself is its number."""

    frame: int
    boxes_N4: Array
    objects: tuple[str, ...]
    video: str | None = None


PROTOTYPES = {name: np.array([k, 0, 0], np.float32) for k, name in enumerate("abc")}


Found = Mapping[tuple[int, str], Sequence[tuple[Sequence[float], float]]]


def judge(
    frames: Sequence[Labelled],
    found: Found,
    *,
    config: InferenceConfig | None = None,
    names: Sequence[str] = "abc",
    labels: Sequence[str] = (),
    learned: Sequence[str] = (),
    seen: list[tuple[int, str]] | None = None,
) -> dict[str, float]:
    """Judge a network that gives, for a frame and a prompt, what ``found`` says.

    A frame is told by its grey level. Each answer ends with the first base class, all over it.
    """

    def run(images_BCHW: Array, prototypes_NP: Array) -> tuple[Array, Array, Array]:
        name = "abc"[int(prototypes_NP[0, 0])]
        boxes, scores = np.zeros((len(images_BCHW), 9, 4)), np.zeros((len(images_BCHW), 9))
        classes = np.full((len(images_BCHW), 9), len(labels))
        for i, image in enumerate(images_BCHW):
            frame = round(float(image[0, 0, 0]) * 255)
            if seen is not None:
                seen.append((frame, name))
            for k, (box, score) in enumerate(found.get((frame, name), ())):
                boxes[i, k], scores[i, k] = box, score
            if labels:
                boxes[i, 8], scores[i, 8], classes[i, 8] = (0, 0, 60, 40), 0.99, 0
        return boxes.astype(np.float32), scores.astype(np.float32), classes

    return evaluate(
        run,
        {name: PROTOTYPES[name] for name in names},
        frames,  # type: ignore[arg-type]
        lambda frame: np.full((40, 60, 3), frame, np.uint8),
        SPEC,
        config or InferenceConfig(),
        labels=labels,
        learned=learned,
    ).metrics


def boxed(*boxes: Sequence[float]) -> Array:
    return np.array(boxes, np.float32).reshape(-1, 4)


BOX, AWAY = (10.0, 10.0, 30.0, 30.0), (35.0, 5.0, 55.0, 25.0)


class TestJudging:
    @pytest.mark.parametrize("labels", [(), ("x", "y")])
    def test_of_a_network_that_is_right_gives_one_and_of_the_wrong_reference_nothing(
        self, labels: tuple[str, ...]
    ) -> None:
        frames = [Labelled(i, boxed(BOX, AWAY), ("a", "b")) for i in range(11)]
        found: Found = {
            **{(i, "a"): [(BOX, 0.9)] for i in range(11)},
            **{(i, "b"): [(AWAY, 0.9)] for i in range(11)},
        }

        metrics = judge(frames, found, names="ab", labels=labels)

        assert metrics == {**ALL, "map50_swapped": 0}

    def test_of_base_classes_is_of_those_that_a_frame_shows(self) -> None:
        everywhere = (0.0, 0.0, 60.0, 40.0)
        frames = [Labelled(i, boxed(BOX, everywhere), ("a", "x")) for i in range(3)]
        found: Found = {(i, "a"): [(BOX, 0.9)] for i in range(3)}

        right = judge(frames, found, names="a", labels=("x", "unseen"))
        assert right == {**ALL, "map50_base": 1, "map50_95_base": 1}

        # what the network calls x is all over the frame, and y is never found
        more = [Labelled(9, boxed(BOX), ("y",)), *frames]
        half = judge(more, found, names="a", labels=("x", "y"))
        # of four answers at one score three are right, the wrong one first: precision 3/4
        assert half["map50_base"] == pytest.approx(3 / 4 / 2)

    def test_shows_a_network_that_ignores_the_reference(self) -> None:
        frames = [Labelled(i, boxed(BOX, AWAY), ("a", "b")) for i in range(4)]
        both = [(BOX, 0.9), (AWAY, 0.8)]
        found: Found = {(i, name): both for i in range(4) for name in "ab"}

        metrics = judge(frames, found, names="ab")

        # for `b` the wrong box always scores higher: precision 1/2 at all recalls
        assert metrics["map50"] == metrics["map50_swapped"] == pytest.approx((1 + 0.5) / 2)

    def test_of_frames_with_the_object_alone_counts_nothing_that_is_found_elsewhere(self) -> None:
        frames = [Labelled(0, boxed(BOX), ("a",)), Labelled(1, boxed(BOX), ("b",))]
        found: Found = {
            (0, "a"): [(BOX, 0.5)],
            (1, "a"): [(AWAY, 0.9)],
            (0, "b"): [(AWAY, 0.9)],
            (1, "b"): [(BOX, 0.5)],
        }

        metrics = judge(frames, found, names="ab")

        assert metrics["map50"] == metrics["map50_95"] == pytest.approx(1 / 2)
        assert metrics["map50_present"] == metrics["map50_95_present"] == 1

    def test_tells_objects_that_were_learned_from_those_that_were_not(self) -> None:
        frames = [Labelled(i, boxed(BOX, AWAY), ("a", "b")) for i in range(4)]
        found: Found = {
            **{(i, "a"): [(BOX, 0.9)] for i in range(4)},
            **{(i, "b"): [(BOX, 0.9), (AWAY, 0.8)] for i in range(4)},
        }

        metrics = judge(frames, found, names="ab", learned=("a", "c"))

        assert metrics["map50_seen"] == 1
        assert metrics["map50_novel"] == pytest.approx(0.5)
        assert metrics["map50_novel_to_seen"] == pytest.approx(0.5)
        assert "map50_novel" not in judge(frames, found, names="ab", learned=("a", "b"))
        assert "map50_novel" not in judge(frames, found, names="ab")

    def test_of_several_objects_at_once_is_that_of_each_by_itself(self) -> None:
        frames = [Labelled(i, boxed(BOX, AWAY), ("a", "b")) for i in range(3)]
        places = {"a": [(BOX, 0.9)], "b": [(BOX, 0.7), (AWAY, 0.6)]}
        asked: list[int] = []

        def run(images_BCHW: Array, prototypes_NP: Array) -> tuple[Array, Array, Array]:
            asked.append(len(prototypes_NP))
            rows = [
                (box, score, n)
                for n, row in enumerate(prototypes_NP)
                for box, score in places["abc"[int(row[0])]]
            ]
            boxes, scores, classes = (np.array(each) for each in zip(*rows, strict=True))
            num = len(images_BCHW)
            return (
                np.tile(boxes.astype(np.float32), (num, 1, 1)),
                np.tile(scores.astype(np.float32), (num, 1)),
                np.tile(classes, (num, 1)),
            )

        def judged(at_once: int) -> dict[str, float]:
            return dict(
                evaluate(
                    run,
                    {name: PROTOTYPES[name] for name in "ab"},
                    frames,  # type: ignore[arg-type]
                    lambda frame: np.full((40, 60, 3), frame, np.uint8),  # type: ignore[arg-type,return-value]
                    SPEC,
                    InferenceConfig(max_objects=2),
                    at_once=at_once,
                ).metrics
            )

        assert judged(2) == judged(1)
        assert asked == [2, 1, 1]
        assert judged(2)["map50"] == pytest.approx(0.75)

    def test_counts_what_is_found_where_the_object_is_not(self) -> None:
        frames = [Labelled(0, boxed(BOX), ("a",)), Labelled(1, boxed(), ())]
        quiet: Found = {(0, "a"): [(BOX, 0.8)]}
        assert judge(frames, quiet, names="a") == ALL
        loud: Found = {**quiet, (1, "a"): [(BOX, 0.9)]}
        assert judge(frames, loud, names="a")["map50"] == pytest.approx(0.5)

    def test_lets_boxes_below_the_deployed_score_into_the_average_precision(self) -> None:
        frames = [Labelled(0, boxed(BOX), ("a",))]
        config = InferenceConfig(conf=0.9)
        assert judge(frames, {(0, "a"): [(BOX, 0.1)]}, config=config, names="a")["map50"] == 1

    def test_over_a_video_is_the_overlap_in_space_and_time(self) -> None:
        half = (10.0, 10.0, 30.0, 20.0)
        frames = [
            Labelled(0, boxed(BOX), ("a",), "one"),  # found
            Labelled(1, boxed(BOX), ("a",), "one"),  # half of it found, after a wrong box
            Labelled(2, boxed(BOX), ("a",), "one"),  # found, but not surely enough
            Labelled(3, boxed(), (), "one"),  # found where it is not
            Labelled(4, boxed(), (), "one"),  # rightly not found
            Labelled(5, boxed(BOX), ("a",), "two"),  # found
            Labelled(6, boxed(), (), None),  # no video
        ]
        found: Found = {
            (0, "a"): [(BOX, 0.9)],
            (1, "a"): [(half, 0.9), (AWAY, 0.8)],
            (2, "a"): [(BOX, 0.2)],
            (3, "a"): [(BOX, 0.9)],
            (5, "a"): [(BOX, 0.9)],
            (6, "a"): [(BOX, 0.9)],
        }

        metrics = judge(frames, found, names="a")

        assert metrics["st_iou"] == pytest.approx(((1 + 0.5 + 0 + 0) / 4 + 1) / 2)

    def test_leaves_an_object_out_that_a_video_never_shows(self) -> None:
        frames = [Labelled(0, boxed(BOX), ("a",), "one"), Labelled(1, boxed(BOX), ("b",), "two")]
        found: Found = {(0, "a"): [(BOX, 0.9)], (1, "b"): [(BOX, 0.9)], (1, "a"): [(AWAY, 0.9)]}
        assert judge(frames, found, names="ab")["st_iou"] == 1

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 2**32 - 1), st.sampled_from([None, 2, 3, 5, 9, 40]))
    def test_takes_frames_with_and_without_the_object_evenly(
        self, seed: int, limit: int | None
    ) -> None:
        rng = np.random.default_rng(seed)
        shown = [tuple("abc"[: rng.integers(0, 4)]) for _ in range(20)]
        frames = [Labelled(i, boxed(*[BOX] * len(each)), each) for i, each in enumerate(shown)]
        seen: list[tuple[int, str]] = []

        judge(frames, {}, config=InferenceConfig(max_evaluated=limit), seen=seen)

        assert len(seen) == len(set(seen))  # nothing runs twice
        for name in "abc":
            mine = [i for i, each in enumerate(shown) if name in each]
            looked = {i for i, asked in seen if asked == name}
            wanted = min(limit or 20, 20)
            # its own frames, and those of the object that it stands in for
            assert wanted <= len(looked) <= 2 * wanted
            assert len(looked & set(mine)) >= min(len(mine), wanted // 2)

    def test_tells_how_far_it_is(self) -> None:
        frames = [Labelled(i, boxed(), ()) for i in range(11)]
        shown: list[tuple[int, int]] = []
        evaluate(
            lambda images, _: (
                np.zeros((len(images), 1, 4), np.float32),
                np.zeros((len(images), 1), np.float32),
                np.zeros((len(images), 1), np.int64),
            ),
            {"a": PROTOTYPES["a"]},
            frames,  # type: ignore[arg-type]
            lambda _: grey(),
            SPEC,
            InferenceConfig(),
            progress=lambda done, total: shown.append((done, total)),
        )
        assert shown == [(8, 11), (11, 11)]


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_the_overlap_in_space_and_time_is_that_of_a_plain_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)

    def tube() -> dict[int, Array]:
        corner = rng.uniform(0, 50, (8, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(5, 40, (8, 2))], axis=1)
        return {i: boxes[i] for i in range(8) if rng.uniform() < 0.7}

    found, truth = tube(), {i: box[None] for i, box in tube().items()}
    total, num = 0.0, 0
    for i in range(8):
        num += i in found or i in truth
        if i in found and i in truth:
            total += float(iou(found[i][None], truth[i])[0, 0])
    if num:
        assert st_iou(found, truth) == pytest.approx(total / num)  # float64
    else:
        with pytest.raises(InputError, match="no box in any frame"):
            st_iou(found, truth)


class TestEvaluatingAFolder:
    """With the tiny bundle, whose own references are blue and red."""

    @pytest.mark.parametrize("backend", ["ort", "openvino"])
    @pytest.mark.parametrize("precision", ["float", "int8"])
    def test_knows_its_objects_by_its_references(
        self, tiny: Bundle, tmp_path: Path, backend: str, precision: str
    ) -> None:
        data = write_scenes(tmp_path, size=(80, 120), names=("blue", "green", "white"))
        with closing(open_system(tiny, backend=backend, precision=precision)) as opened:
            found = opened.evaluate(data).metrics
            names = opened.names() if isinstance(opened, Promptable) else ()

        assert found["map50"] == found["map50_95"] == 1
        assert found["map50_swapped"] <= 0.2
        assert "st_iou" not in found
        assert names == ("blue", "red")  # what it looks for is as before

    def test_knows_them_by_the_prompt_where_there_is_one(
        self, tiny: Bundle, tmp_path: Path
    ) -> None:
        data = write_scenes(tmp_path / "data", names=("blue", "green"))
        wrong = tmp_path / "wrong"
        for name, other in (("blue", "yellow"), ("green", "violet")):
            write_references(tmp_path / "other", [other])
            (wrong / name).parent.mkdir(exist_ok=True)
            (tmp_path / "other" / other).rename(wrong / name)
        with closing(open_system(tiny, backend="ort", threads=1)) as opened:
            prompt(opened, data / "references")
            assert opened.evaluate(data).metrics["map50"] == 1
            prompt(opened, wrong)
            assert opened.evaluate(data).metrics["map50"] == 0

    def test_needs_a_reference_of_every_object(self, tiny: Bundle, tmp_path: Path) -> None:
        data = write_scenes(tmp_path, names=("blue", "green"))
        with closing(open_system(tiny, backend="ort", threads=1)) as opened:
            prompt(opened, data / "references" / "blue")
            with pytest.raises(DatasetError, match="object 'green'") as caught:
                opened.evaluate(data)
        assert "blue, green" in str(caught.value.fix)

    def test_of_videos_tells_the_overlap_in_space_and_time(
        self, tiny: Bundle, tmp_path: Path
    ) -> None:
        """A square of three cells that walks a cell per frame; half of the labels are 8 px low."""
        listed = []
        for name, colour in (("red", (255, 50, 50)), ("white", (255, 255, 255))):
            folder = tmp_path / "samples" / name
            folder.mkdir(parents=True)
            write_references(folder, [name])
            (folder / name).rename(folder / "object_images")
            boxes = []
            with VideoWriter(folder / "film.mp4", Fraction(10)) as writer:
                for i in range(8):
                    frame = np.full((64, 96, 3), 128, np.uint8)
                    frame[8:32, 8 * i : 8 * i + 24] = colour
                    writer.write(frame, i / 10)
                    y = 8 if i % 2 else 16
                    boxes.append({"frame": i, "x1": 8 * i, "y1": y, "x2": 8 * i + 24, "y2": y + 24})
            listed.append({"video_id": name, "annotations": [{"bboxes": boxes}]})
        (tmp_path / "annotations.json").write_text(json.dumps(listed))
        with closing(open_system(tiny, backend="ort", threads=1)) as opened:
            found = opened.evaluate(tmp_path).metrics

        assert found["st_iou"] == pytest.approx((1 + 1 / 2) / 2)  # 16 of 32 rows are shared
        assert "map50_swapped" not in found  # one of the two objects is for the test

    def test_that_has_no_such_layout_is_refused(self, tiny: Bundle, tmp_path: Path) -> None:
        with (
            closing(open_system(tiny, backend="ort", threads=1)) as opened,
            pytest.raises(DatasetError, match="annotations_test"),
        ):
            opened.evaluate(tmp_path)
