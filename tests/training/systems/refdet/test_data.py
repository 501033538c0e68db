from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engineworks.runtime import images
from engineworks.runtime.objects import ObjectData, read_objects
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.tensors import Array
from engineworks.training.config import Config, TrainConfig
from engineworks.training.data import loader
from engineworks.training.systems.refdet import data
from engineworks.training.systems.refdet.config import (
    AugmentConfig,
    EncoderConfig,
    EpisodesConfig,
    StageConfig,
    TaskConfig,
)
from engineworks.training.systems.refdet.data import Episodes, num_episodes

pytestmark = pytest.mark.train

STILL = AugmentConfig(
    turn=0, affine=0, light=0, colour=0, blur=0, noise=0, erase=0, variants=1, reference_crop=1
)
SPEC = PreprocessSpec(size=(64, 96), resize="letterbox")
LEVELS = {"ash": 40, "elm": 90, "fir": 140, "oak": 190, "yew": 240}  # objects, and how bright


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frames of 48 x 64 with one or two squares, and references of one grey."""
    root = tmp_path_factory.mktemp("objects")
    rng = np.random.default_rng(0)
    names = list(LEVELS)
    annotations = list[dict[str, Any]]()
    for i in range(24):
        frame = np.zeros((48, 64, 3), np.uint8)
        for left, name in zip((4, 36), rng.permutation(names)[: 1 + i % 2], strict=False):
            x, y = left + int(rng.integers(8)), int(rng.integers(30))
            frame[y : y + 16, x : x + 16] = LEVELS[str(name)]
            category = names.index(str(name))
            annotations.append({"image_id": i, "category_id": category, "bbox": [x, y, 16, 16]})
        images.write(root / "images" / f"{i}.png", frame)
    for name, level in LEVELS.items():
        for i in range(3):  # told apart by one row
            picture = np.full((20, 20, 3), level, np.uint8)
            picture[5 * i] = 255
            images.write(root / "references" / name / f"{i}.png", picture)
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 64, "height": 48} for i in range(24)
        ],
        "categories": [{"id": i, "name": name} for i, name in enumerate(names)],
        "annotations": annotations,
    }
    (root / "annotations_train.json").write_text(json.dumps(content), encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def objects(folder: Path) -> ObjectData:
    return read_objects(folder, "train")


def config(*, base: bool = False, workers: int = 0, **sections: Config) -> TaskConfig:
    plain = TaskConfig(
        preprocess=SPEC,
        reference_preprocess=PreprocessSpec(size=(32, 32)),
        encoder=EncoderConfig(name="resnet10t", weights="none"),
        stages=(StageConfig(name="only"),),
        train=TrainConfig(batch_size=4, workers=workers),
        episodes=EpisodesConfig(num=6, objects=4, shots=2),
        base=base,
    )
    return plain.model_copy(update=sections)


def episode(objects: ObjectData, settings: TaskConfig, seed: int = 0) -> dict[str, Any]:
    return Episodes(objects, settings).get(0, np.random.default_rng(seed))


def flat(batch: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Everything that an episode holds, lists one by one."""
    for key, value in batch.items():
        if isinstance(value, list):
            yield from ((f"{key}{i}", each) for i, each in enumerate(value))
        else:
            yield key, value


class TestTheNumberOfEpisodes:
    @pytest.mark.parametrize(
        ("frames", "batch_size", "coverage", "expected"),
        [(100, 8, 1.0, 13), (100, 8, 2.0, 26), (3, 8, 1.0, 10), (10**6, 8, 1.0, 1000)],
    )
    def test_shows_every_frame_so_often_from_10_to_1000(
        self, frames: int, batch_size: int, coverage: float, expected: int
    ) -> None:
        assert num_episodes(frames, batch_size, coverage) == expected

    @pytest.mark.data
    def test_is_the_published_one(self, shared: Path) -> None:
        known = np.load(shared / "fixtures" / "refdet_episodes.npz")
        rows = known["rows_classes_frames_way_query_aug_coverage"]
        for (_, frames, ways, queries, views, coverage), expected in zip(
            rows, known["n_episodes"], strict=True
        ):
            assert num_episodes(int(frames * views), int(ways * queries), coverage) == expected

    def test_may_be_set(self, objects: ObjectData) -> None:
        assert len(Episodes(objects, config())) == 6
        computed = config(episodes=EpisodesConfig(coverage=3.0))
        assert len(Episodes(objects, computed)) == 18  # 24 frames, 4 at a time, three times


class TestAnEpisode:
    def test_holds_what_a_step_needs(self, objects: ObjectData) -> None:
        batch = episode(objects, config())
        assert batch["images"].shape == (4, 3, 64, 96) and batch["images"].dtype == np.float32
        assert batch["pictures"].shape == (8, 3, 32, 32) and batch["pictures"].dtype == np.float32
        assert batch["object_of_picture"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert batch["prompted"].shape == (4, 4) and batch["prompted"].dtype == bool
        for found, wanted, base in zip(
            batch["boxes"], batch["objects"], batch["base"], strict=True
        ):
            assert found.dtype == np.float32 and found.shape == (len(wanted), 4)
            assert wanted.dtype == base.dtype == np.int64
            assert len(wanted) == len(base) and (base == -1).all()

    @pytest.mark.parametrize("workers", [1, 2])
    def test_is_the_same_whoever_loads_it_and_wherever_training_took_up(
        self, objects: ObjectData, workers: int
    ) -> None:
        def epoch(workers: int, number: int) -> list[dict[str, Any]]:
            settings = config(workers=workers, episodes=EpisodesConfig(num=3))
            batches: Any = loader(
                Episodes(objects, settings), settings.train, shuffle=False, batched=True
            )
            batches.sampler.set_epoch(number)
            return list(batches)

        for alone, shared in zip(epoch(0, 5), epoch(workers, 5), strict=True):
            for (key, one), (other_key, other) in zip(flat(alone), flat(shared), strict=True):
                assert key == other_key
                assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert not torch.equal(epoch(0, 4)[0]["images"], epoch(0, 5)[0]["images"])

    @pytest.mark.parametrize("seed", range(5))
    def test_names_each_box_by_the_column_of_the_object_that_is_in_it(
        self, objects: ObjectData, seed: int
    ) -> None:
        batch = episode(objects, config(base=True, augment=STILL), seed)
        grey = batch["images"].mean(axis=1)
        levels = {
            round(float(batch["pictures"][i].mean(axis=0)[20, 20]), 2): int(column)
            for i, column in enumerate(batch["object_of_picture"])
        }
        level_of = apply(SPEC, [np.full((64, 96, 3), v, np.uint8) for v in LEVELS.values()])
        for i, (boxes_M4, columns) in enumerate(zip(batch["boxes"], batch["objects"], strict=True)):
            assert len(boxes_M4)
            for box, column, base in zip(boxes_M4, columns, batch["base"][i], strict=True):
                x, y = (box[:2] + box[2:]) / 2
                level = round(float(grey[i, int(y), int(x)]), 2)
                assert levels.get(level, -1) == column
                # base classes stand in the order of the alphabet, and so do the levels
                assert round(float(level_of[base, :, 0, 0].mean()), 2) == level

    def test_has_all_objects_of_its_frames_among_those_it_may_look_for(
        self, objects: ObjectData
    ) -> None:
        settings = config(augment=STILL, episodes=EpisodesConfig(objects=5))
        for seed in range(10):
            batch = episode(objects, settings, seed)
            assert min(int(each.min()) for each in batch["objects"]) >= 0
            assert len(batch["prompted"][0]) == 5

    def test_may_be_of_few_objects_as_published(self, objects: ObjectData) -> None:
        settings = config(augment=STILL, episodes=EpisodesConfig(ways=2, objects=2, shots=3))
        batch = episode(objects, settings)
        assert batch["object_of_picture"].tolist() == [0, 0, 0, 1, 1, 1]
        shown = [set(each.tolist()) for each in batch["objects"]]
        assert sum(0 in each for each in shown) >= 2 and sum(1 in each for each in shown) >= 2

    @pytest.mark.parametrize("share", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
    def test_searches_every_frame_for_something(
        self, objects: ObjectData, share: tuple[float, float]
    ) -> None:
        settings = config(
            augment=STILL, episodes=EpisodesConfig(objects=5, prompted=share, positive=1)
        )
        for seed in range(10):
            batch = episode(objects, settings, seed)
            for prompted, columns in zip(batch["prompted"], batch["objects"], strict=True):
                assert prompted[columns].any()
                assert prompted.sum() == {0.0: 1, 1.0: 5}.get(share[0], prompted.sum())

    def test_has_frames_that_show_nothing_of_what_is_searched_for(
        self, objects: ObjectData
    ) -> None:
        settings = config(
            augment=STILL, episodes=EpisodesConfig(objects=5, prompted=(0, 0.3), positive=0.5)
        )
        batches = [episode(objects, settings, seed) for seed in range(20)]
        empty = [
            not prompted[columns].any()
            for batch in batches
            for prompted, columns in zip(batch["prompted"], batch["objects"], strict=True)
        ]
        assert 0.1 < np.mean(empty) < 0.6

    def test_without_changes_holds_the_frames_as_inference_would_see_them(
        self, objects: ObjectData
    ) -> None:
        episodes = Episodes(objects, config(augment=STILL))
        known = apply(SPEC, [images.read(each.frame.path) for each in objects.frames])
        for image in episodes.get(0, np.random.default_rng(1))["images"]:
            assert (known == image).all(axis=(1, 2, 3)).any()

    def test_leaves_what_is_kept_in_memory_as_it_was(self, objects: ObjectData) -> None:
        episodes = Episodes(objects, config())
        kept = [episodes.frames.read(each.frame).copy() for each in objects.frames]
        for seed in range(20):
            episodes.get(0, np.random.default_rng(seed))
        for each, before in zip(objects.frames, kept, strict=True):
            assert np.array_equal(episodes.frames.read(each.frame), before)
        assert episodes.frames.num_misses == len(objects.frames) + 3 * len(LEVELS)


class TestReferences:
    def test_come_again_to_the_bit(self, objects: ObjectData) -> None:
        """So that a cache by content finds what a frozen encoder made of them."""
        augment = AugmentConfig(variants=2, recolour=0.5, recolours=2)
        episodes = Episodes(objects, config(augment=augment))
        seen = {
            picture.tobytes()
            for seed in range(120)
            for picture in episodes.get(0, np.random.default_rng(seed))["pictures"]
        }
        # of 960: 15 pictures in 2 variants, in their own colours and in 2 others; some are alike
        assert 45 < len(seen) <= 15 * 2 * 3

    def test_change_their_colours_as_the_frames_of_the_episode_do(
        self, objects: ObjectData
    ) -> None:
        settings = config(
            augment=STILL.model_copy(update={"recolour": 1.0}), episodes=EpisodesConfig(objects=5)
        )
        colours = set()
        for seed in range(8):
            batch = episode(objects, settings, seed)
            for i, columns in enumerate(batch["objects"]):
                x1, y1, x2, y2 = batch["boxes"][i][0]
                in_frame = batch["images"][i, :, int(y1 + y2) // 2, int(x1 + x2) // 2]
                in_picture = batch["pictures"][3 * columns[0], :, 20, 20]
                # both were rounded to 8 bits behind the same matrix
                assert in_frame == pytest.approx(in_picture, abs=1e-6)
                colours.add(tuple(in_frame.round(2)))
        assert len(colours) > 10

    @pytest.mark.parametrize("number", range(4))
    def test_keep_middle_grey_whatever_the_colours_become(self, number: int) -> None:
        grey = np.full((1, 1, 3), 127.5, np.float32)
        # float32 sums of products of about 100
        assert cv2.transform(grey, data.recolouring(3, number)) == pytest.approx(grey, abs=1e-3)

    def test_lose_their_colours_as_often_as_is_asked_for(self) -> None:
        shown = np.random.default_rng(0).uniform(0, 255, (8, 1, 3)).astype(np.float32)
        spread = [
            np.ptp(cv2.transform(shown, data.recolouring(3, i, grey=0.25)), axis=2).max()
            for i in range(400)
        ]
        # float32 sums of products of about 100; 400 draws of 1/4: 3 standard deviations are 0.065
        assert np.mean(np.array(spread) < 1e-3) == pytest.approx(0.25, abs=0.065)
        # a mixture of the channels tells colours apart still
        grey = data.recolouring(3, int(np.argmin(spread)), grey=0.25)
        assert np.ptp(cv2.transform(shown, grey)) > 50


class TestColours:
    @given(st.floats(-np.pi, np.pi), st.floats(0, 2), st.floats(0, 255))
    def test_greys_stay_whatever_hue_and_saturation_become(
        self, hue: float, saturation: float, level: float
    ) -> None:
        # float64 sums of three products of at most 510
        assert data.chroma(hue, saturation) @ np.full(3, level) == pytest.approx(level, abs=1e-9)

    @given(
        st.floats(-np.pi, np.pi),
        st.floats(0, 2),
        st.tuples(*[st.floats(0, 255)] * 3),
    )
    def test_are_turned_by_the_hue_and_moved_by_the_saturation(
        self, hue: float, saturation: float, colour: tuple[float, float, float]
    ) -> None:
        # in a plane at right angles to the greys, seen from white
        plane = np.array([[2, -1, -1], [0, np.sqrt(3), -np.sqrt(3)]]) / np.sqrt(6)
        before, after = (
            complex(*(plane @ each)) for each in (colour, data.chroma(hue, saturation) @ colour)
        )
        assert after == pytest.approx(saturation * np.exp(1j * hue) * before, abs=1e-9)  # float64

    def test_a_third_of_a_circle_makes_green_of_red(self) -> None:
        made = data.chroma(2 * np.pi / 3, 1) @ [200, 0, 0]
        assert made == pytest.approx([0, 200, 0], abs=1e-9)  # float64

    def test_are_left_alone_unless_asked_for(self, rng: np.random.Generator) -> None:
        image = rng.integers(0, 256, (8, 8, 3), np.uint8)
        assert np.array_equal(data.shaded(image, STILL, rng), image)
        vivid = STILL.model_copy(update={"hue": 180.0, "saturation": 1.0})
        assert not np.array_equal(data.shaded(image, vivid, rng), image)


# --- geometry ------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(20, 60), st.integers(20, 60))


def square(height: int, width: int, place: tuple[float, float]) -> tuple[Array, Array]:
    """An image with one white square, and its box."""
    y, x = int(place[0] * (height - 9)), int(place[1] * (width - 9))
    image = np.zeros((height, width, 3), np.uint8)
    image[y : y + 9, x : x + 9] = 255
    return image, np.array([[x, y, x + 9, y + 9]], np.float32)


def bounds(image: Array) -> tuple[float, float, float, float]:
    """Box around what is at least half white."""
    rows, columns = np.nonzero(image[..., 0] > 127)
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


PLACES = st.tuples(st.floats(0, 1), st.floats(0, 1))


class TestGeometry:
    @given(size=SIZES, place=PLACES, quarters=st.integers(0, 3), mirrored=st.booleans())
    @settings(max_examples=50, deadline=None)
    def test_a_box_turns_and_is_mirrored_with_its_square(
        self, size: tuple[int, int], place: tuple[float, float], quarters: int, mirrored: bool
    ) -> None:
        image, box = square(*size, place)
        after, moved = data.turned(image, box, quarters=quarters, mirrored=mirrored)
        expected = np.rot90(image, quarters)
        assert np.array_equal(after, expected[:, ::-1] if mirrored else expected)
        assert bounds(after) == tuple(moved[0])

    @given(
        place=PLACES,
        degrees=st.floats(-180, 180),
        scale=st.floats(0.5, 2),
        shift=st.tuples(st.floats(-10, 10), st.floats(-10, 10)),
    )
    @settings(max_examples=50, deadline=None)
    def test_a_box_moves_with_its_square_under_any_affine_map(
        self,
        place: tuple[float, float],
        degrees: float,
        scale: float,
        shift: tuple[float, float],
    ) -> None:
        image, box = square(80, 80, place)
        matrix = cv2.getRotationMatrix2D((40, 40), degrees, scale)
        matrix[:, 2] += shift
        black = SPEC.model_copy(update={"pad_value": 0})
        after, moved = data.warped(image, box, matrix, (80, 80), black)
        corners = np.array([[x, y, 1] for x in box[0, [0, 2]] for y in box[0, [1, 3]]], np.float64)
        by_hand = corners @ matrix.T
        # coordinates of up to 200 in float32
        assert moved[0] == pytest.approx([*by_hand.min(axis=0), *by_hand.max(axis=0)], abs=1e-3)
        assume((moved[0, :2] >= 0).all() and (moved[0, 2:] <= 80).all())
        # a corner's pixels are less than half white: each loses up to one, and half of another
        assert bounds(after) == pytest.approx(moved[0], abs=1.5)

    @given(size=SIZES, place=PLACES)
    @settings(max_examples=30, deadline=None)
    def test_a_frame_that_lies_on_its_side_is_fitted_whole(
        self, size: tuple[int, int], place: tuple[float, float]
    ) -> None:
        image, box = square(size[1], size[0], place)
        black = SPEC.model_copy(update={"pad_value": 0})
        after, moved = data.fitted(image, box, *size, black)
        assert after.shape == (*size, 3)
        scale = min(size[0] / size[1], size[1] / size[0])
        assert moved[0, 2:] - moved[0, :2] == pytest.approx(9 * scale, abs=1e-3)  # as above
        if scale > 0.5:  # smaller squares hardly reach half of the white
            assert bounds(after) == pytest.approx(moved[0], abs=1)

    @given(seed=st.integers(0, 2**32 - 1), place=PLACES)
    @settings(max_examples=60, deadline=None)
    def test_every_box_that_stays_holds_its_square(
        self, seed: int, place: tuple[float, float]
    ) -> None:
        image, box = square(64, 96, place)
        plain = AugmentConfig(
            turn=0.7, affine=0.7, degrees=180, light=0, colour=0, blur=0, noise=0, erase=0
        )
        black = SPEC.model_copy(update={"pad_value": 0})
        after, moved, kept = data.change(image, box, black, plain, np.random.default_rng(seed))
        assert after.shape == (64, 96, 3) and after.dtype == np.uint8
        assert len(moved) == kept.sum()
        if not kept[0]:
            return
        assert (moved[0] >= 0).all() and (moved[0] <= [96, 64, 96, 64]).all()
        if (after[..., 0] > 127).any():
            left, top, right, bottom = bounds(after)
            slack = 1.0  # each of up to two interpolations spreads white over half a pixel
            assert left >= moved[0, 0] - slack and top >= moved[0, 1] - slack
            assert right <= moved[0, 2] + slack and bottom <= moved[0, 3] + slack

    @pytest.mark.parametrize(
        ("box", "stays"),
        [
            ((10, 10, 20, 20), True),
            ((-85, 10, 10, 20), True),  # 10 of 95 columns
            ((-95, 10, 9, 20), False),  # less than a tenth of it
            ((95, 10, 105, 10.9), False),  # 0.9 square pixels
            ((100, 10, 110, 20), False),
        ],
    )
    def test_a_box_of_which_hardly_anything_is_left_is_dropped(
        self, box: tuple[float, ...], stays: bool
    ) -> None:
        image = np.zeros((64, 96, 3), np.uint8)
        boxes_N4 = np.array([box], np.float32)
        rng = np.random.default_rng(0)
        _, left, kept = data.change(image, boxes_N4, SPEC, STILL, rng)
        assert kept.tolist() == [stays]
        assert len(left) == stays

    def test_a_frame_without_boxes_may_be_changed_too(self) -> None:
        image = np.zeros((64, 96, 3), np.uint8)
        always = AugmentConfig(turn=1, affine=1, blur=1, noise=1, erase=1)
        for seed in range(8):
            rng = np.random.default_rng(seed)
            _, left, kept = data.change(image, np.zeros((0, 4), np.float32), SPEC, always, rng)
            assert left.shape == (0, 4) and kept.shape == (0,)


class TestLight:
    def test_noise_keeps_the_mean_and_never_wraps_around(self) -> None:
        always = STILL.model_copy(update={"noise": 1.0})
        none = np.zeros((0, 4), np.float32)
        for level in (0, 128, 255):
            image = np.full((64, 96, 3), level, np.uint8)
            noisy, _, _ = data.change(image, none, SPEC, always, np.random.default_rng(0))
            distance = np.abs(noisy.astype(int) - level)
            assert 0 < distance.max() < 70  # 18432 values of at most 10 standard deviations of 10
            if level == 128:
                # the mean of as many values, with a standard deviation of 10 / sqrt(18432) at most
                assert noisy.mean() == pytest.approx(128, abs=0.5)

    def test_one_rectangle_is_erased_and_no_more(self) -> None:
        image = np.full((64, 96, 3), 7, np.uint8)
        for seed in range(10):
            erased = data.erased(image, np.random.default_rng(seed), 114)
            rows, columns = np.nonzero(erased[..., 0] == 114)
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert len(rows) == height * width
            assert height <= 64 / 5 and width <= 96 / 5
        assert (image == 7).all()
