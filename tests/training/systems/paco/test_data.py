from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from engineworks.runtime import images
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.training.config import TrainConfig
from engineworks.training.systems.paco import data
from engineworks.training.systems.paco.config import ViewsConfig
from engineworks.training.systems.paco.data import (
    OPERATIONS,
    Pictures,
    Views,
    crop_box,
    occlude,
    shuffle,
)

PLAIN = ViewsConfig(crop_area=(1.0, 1.0), flip=0, operations=0, occlusion=0, shuffle=0)
RESIZES: list[Literal["squash", "crop", "letterbox"]] = ["squash", "crop", "letterbox"]
SEED = st.integers(0, 2**32 - 1)


@dataclass(frozen=True)
class Drawn:
    """A sample that carries its pixels."""

    label: int
    pixels: np.ndarray


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth RGB picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def noisy(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def hill(height: int, width: int, x: float, y: float, sigma: float) -> np.ndarray:
    """A white Gaussian spot on black; pixel centres lie at integers + 0.5."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    spot = 255 * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2))
    return np.repeat(np.round(spot).astype(np.uint8)[..., None], 3, axis=2)


def unscaled(size: tuple[int, int], **options: Any) -> PreprocessSpec:
    """Network input = pixel / 255."""
    return PreprocessSpec(size=size, mean=(0.0,) * 3, std=(1.0,) * 3, **options)


def views_of(
    pixels: np.ndarray, spec: PreprocessSpec, config: ViewsConfig, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Both views (2, H, W, 3) in 0 ... 255 and their affine maps (2, 2, 3)."""
    sample = Views([Drawn(0, pixels)], spec, config, read=lambda s: s.pixels).get(
        0, np.random.default_rng(seed)
    )
    assert sample["views"].dtype == sample["affine"].dtype == np.float32
    assert sample["views"].shape == (2, 3, *spec.size)
    return 255 * sample["views"].transpose(0, 2, 3, 1), sample["affine"]


class TestTheAffineMap:
    @settings(deadline=None, max_examples=60)
    @given(
        st.integers(50, 200),
        st.integers(50, 200),
        st.sampled_from([(48, 64), (64, 48), (56, 56)]),
        st.floats(0.2, 0.8),
        st.floats(0.2, 0.8),
        SEED,
    )
    def test_says_where_a_marked_point_lands(
        self, height: int, width: int, size: tuple[int, int], x: float, y: float, seed: int
    ) -> None:
        sigma = max(height, width) / 40
        config = ViewsConfig(operations=3, occlusion=0, shuffle=0)
        marked = hill(height, width, x * width, y * height, sigma)

        seen, affine = views_of(marked, unscaled(size), config, seed)

        extent = np.array([size[1], size[0]])
        inside = False
        for view, map_23 in zip(seen, affine, strict=True):
            want = map_23 @ [x, y, 1]
            if ((want < 0.15) | (want > 0.85)).any():
                continue  # cut by the border
            weight = view.mean(axis=2)
            weight = np.clip(weight - (weight.max() + np.median(weight)) / 2, 0, None)
            edges = (weight[0], weight[-1], weight[:, 0], weight[:, -1])
            if any(edge.any() for edge in edges):
                continue  # seen again in what an operation reflected at its border
            inside = True
            rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
            got = np.array([(weight * columns).sum(), (weight * rows).sum()]) / weight.sum()
            # half a pixel of rounding in the shrunk picture's size and in every resampling
            np.testing.assert_allclose(got, want * extent, atol=1.0)
        assume(inside)

    @pytest.mark.parametrize("seed", range(8))
    def test_turns_the_picture_into_the_view(self, seed: int) -> None:
        self.check_whole_view(picture(180, 240, seed), seed)

    @pytest.mark.data
    def test_turns_a_photograph_into_the_view(self, shared: Path) -> None:
        files = sorted((shared / "data/flower17/train").rglob("*.jpg"))[::200]
        assert files
        for seed, file in enumerate(files):
            smooth = cv2.GaussianBlur(images.read(file), (0, 0), 4)
            self.check_whole_view(smooth, seed)

    def check_whole_view(self, pixels: np.ndarray, seed: int) -> None:
        config = ViewsConfig(operations=0, occlusion=0, shuffle=0)
        seen, affine = views_of(pixels, unscaled((112, 96)), config, seed)
        to_pixels = np.diag([96.0, 112.0, 1.0])
        from_pixels = np.diag([1 / pixels.shape[1], 1 / pixels.shape[0], 1])
        for view, map_23 in zip(seen, affine, strict=True):
            whole = to_pixels @ np.vstack([map_23, [0, 0, 1]]) @ from_pixels
            whole[:2, 2] += whole[:2, :2].sum(axis=1) / 2 - 0.5  # OpenCV's pixel centres
            want = cv2.warpAffine(
                pixels,
                whole[:2],
                (96, 112),
                flags=cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
            # the pictures are smooth: averaging and interpolating differ by a few levels
            assert np.abs(view - want).mean() < 1.5

    def test_includes_the_rotation(self) -> None:
        turned = data.rotation(90, 40, 60)
        # the middle stays, and what lay right of it lies above it
        np.testing.assert_allclose(turned @ [30, 20, 1], [30, 20, 1], atol=1e-12)  # float64
        np.testing.assert_allclose(turned @ [40, 20, 1], [30, 10, 1], atol=1e-12)


class TestTwoViews:
    def test_are_the_picture_itself_when_nothing_is_random(self) -> None:
        pixels = noisy(32, 40)
        spec = PreprocessSpec(size=(32, 40))
        sample = Views([Drawn(3, pixels)], spec, PLAIN, read=lambda s: s.pixels).get(
            0, np.random.default_rng(0)
        )
        want = apply(spec, [pixels])[0]
        assert (sample["views"] == want).all()
        assert (sample["affine"] == np.eye(3)[:2]).all()
        assert (sample["label"], sample["index"]) == (3, 0)

    @pytest.mark.parametrize("resize", RESIZES)
    def test_take_only_their_normalisation_from_the_specification(
        self, resize: Literal["squash", "crop", "letterbox"]
    ) -> None:
        pixels = noisy(60, 30)
        want = views_of(pixels, unscaled((24, 24)), ViewsConfig(), seed=1)[0]
        got = views_of(
            pixels, unscaled((24, 24), resize=resize, interpolation="cubic"), ViewsConfig(), seed=1
        )[0]
        assert (got == want).all()

    def test_are_mirrored_always_or_never(self) -> None:
        pixels = noisy(24, 24)
        flipped, affine = views_of(
            pixels, unscaled((24, 24)), PLAIN.model_copy(update={"flip": 1.0})
        )
        np.testing.assert_allclose(flipped[0], pixels[:, ::-1], atol=1e-4)  # float32 / 255 * 255
        assert (affine == [[-1, 0, 1], [0, 1, 0]]).all()

    def test_are_shrunk_without_aliasing(self) -> None:
        stripes = np.zeros((64, 64, 3), np.uint8)
        stripes[::4] = 200  # one row in four: a view of a quarter of the height averages them
        seen, _ = views_of(stripes, unscaled((16, 64), interpolation="bilinear"), PLAIN)
        np.testing.assert_allclose(seen, 50, atol=1e-4)  # float32 / 255 * 255

    def test_differ_from_each_other(self) -> None:
        seen, _ = views_of(picture(64, 64), unscaled((48, 48)), ViewsConfig())
        assert np.abs(seen[0] - seen[1]).mean() > 5

    @pytest.mark.parametrize("name", ["occlusion", "shuffle"])
    def test_only_the_second_is_hidden(self, name: str) -> None:
        pixels = noisy(96, 96)
        config = PLAIN.model_copy(update={name: 1.0})
        seen, _ = views_of(pixels, unscaled((96, 96)), config)
        np.testing.assert_allclose(seen[0], pixels, atol=1e-4)  # float32 / 255 * 255
        assert np.abs(seen[1] - pixels).max() > 1

    @settings(deadline=None, max_examples=30)
    @given(SEED, st.sampled_from([(1, 1), (2, 300), (3000, 40), (40, 3000), (17, 5), (500, 500)]))
    def test_of_any_size_stay_in_range_and_leave_the_picture_alone(
        self, seed: int, size: tuple[int, int]
    ) -> None:
        pixels = noisy(*size)
        before = pixels.copy()
        config = ViewsConfig(operations=4, occlusion=1, shuffle=1, crop_area=(0.2, 1.0))
        seen, affine = views_of(pixels, unscaled((40, 33)), config, seed)
        assert seen.min() >= 0
        assert seen.max() <= 255 * (1 + 1e-6)  # float32
        assert np.isfinite(affine).all()
        assert (pixels == before).all()

    @settings(deadline=None, max_examples=30)
    @given(SEED)
    def test_follow_from_the_generator_alone(self, seed: int) -> None:
        samples = [Drawn(0, picture(50, 60, i)) for i in range(3)]
        spec, config = unscaled((32, 32)), ViewsConfig()
        fresh = Views(samples, spec, config, read=lambda s: s.pixels)
        used = Views(samples, spec, config, read=lambda s: s.pixels)
        for i in (2, 1, 2, 0):
            used.get(i, np.random.default_rng(i))
        once, again = (v.get(1, np.random.default_rng(seed)) for v in (fresh, used))
        assert (once["views"] == again["views"]).all()
        assert (once["affine"] == again["affine"]).all()


class TestTheCache:
    @staticmethod
    def reader(reads: list[int]) -> Callable[[Drawn], np.ndarray]:
        def read(sample: Drawn) -> np.ndarray:
            reads.append(sample.label)
            return sample.pixels

        return read

    def samples(self) -> list[Drawn]:
        return [Drawn(i, noisy(90, 120, i)) for i in range(4)]

    # a shrunk picture of 57 x 76 (40 / sqrt(1/2), rounded up) takes 12,996 bytes
    @pytest.mark.parametrize(
        ("cache_bytes", "num_reads"), [(0, 12), (12_995, 12), (2 * 12_996, 8), (2**20, 4)]
    )
    def test_spares_decoding_and_changes_nothing(self, cache_bytes: int, num_reads: int) -> None:
        reads: list[int] = []
        config = ViewsConfig(cache_bytes=cache_bytes)
        views = Views(self.samples(), unscaled((40, 32)), config, read=self.reader(reads))
        plain = Views(
            self.samples(),
            unscaled((40, 32)),
            ViewsConfig(cache_bytes=0),
            read=lambda s: s.pixels,
        )
        for epoch in range(3):
            for i in range(4):
                got, want = (v.get(i, np.random.default_rng((epoch, i))) for v in (views, plain))
                assert (got["views"] == want["views"]).all()
        assert len(reads) == num_reads

    def test_holds_pictures_in_the_detail_that_crops_need(self) -> None:
        assert data.shrink(noisy(90, 120), 56.5).shape == (57, 76, 3)
        assert data.shrink(noisy(120, 30), 56.5).shape == (120, 30, 3)
        assert data.shrink(noisy(1, 1), 0.1).shape == (1, 1, 3)

    def test_shrinks_by_averaging(self) -> None:
        stripes = np.zeros((64, 64, 3), np.uint8)
        stripes[:, ::2] = 200
        assert (data.shrink(stripes, 32) == 100).all()


class TestACrop:
    @settings(max_examples=200)
    @given(
        SEED,
        st.integers(1, 400),
        st.integers(1, 400),
        st.tuples(st.floats(0.05, 1), st.floats(0.05, 1)).map(sorted),
        st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(sorted),
    )
    def test_lies_in_the_picture_and_has_the_share_and_ratio_that_were_asked_for(
        self, seed: int, height: int, width: int, area: list[float], ratio: list[float]
    ) -> None:
        config = ViewsConfig(crop_area=(area[0], area[1]), crop_ratio=(ratio[0], ratio[1]))
        left, top, w, h = crop_box(np.random.default_rng(seed), height, width, config)
        assert left >= 0 <= top
        assert w >= 1 <= h
        assert left + w <= width
        assert top + h <= height
        # each side is rounded to a pixel; a side that would vanish stays one pixel
        low, high = (max(w, 1.5) - 0.5) / (h + 0.5), (w + 0.5) / max(h - 0.5, 0.5)
        if min(w, h) > 1:
            assert low <= ratio[1] * (1 + 1e-9)
            assert high >= ratio[0] * (1 - 1e-9)
            assert (w - 0.5) * (h - 0.5) <= area[1] * height * width * (1 + 1e-9)
        fits = ratio[0] <= width / height <= ratio[1]  # then even the whole picture is a crop
        if fits:
            assert (w + 0.5) * (h + 0.5) >= area[0] * height * width * (1 - 1e-9)

    def test_of_a_long_picture_is_the_largest_of_the_nearest_ratio(
        self, rng: np.random.Generator
    ) -> None:
        boxes = np.array([crop_box(rng, 40, 3000, ViewsConfig()) for _ in range(200)])
        assert (boxes[:, 2] == round(40 * 4 / 3)).all()
        assert (boxes[:, 3] == 40).all()
        assert np.ptp(boxes[:, 0]) > 2000  # anywhere along it

    def test_has_any_share_of_the_area_alike(self, rng: np.random.Generator) -> None:
        config = ViewsConfig(crop_area=(0.4, 0.8), crop_ratio=(0.9, 1.1))
        boxes = np.array([crop_box(rng, 1000, 1000, config) for _ in range(4000)])
        shares = boxes[:, 2] * boxes[:, 3] / 1e6
        # quantiles of 4,000 uniform draws: standard error 0.2 / sqrt(4000) = 0.003
        np.testing.assert_allclose(
            np.quantile(shares, [0, 0.25, 0.5, 0.75, 1]), [0.4, 0.5, 0.6, 0.7, 0.8], atol=0.015
        )


class TestAnOperation:
    @pytest.mark.parametrize(("operation", "reach"), OPERATIONS)
    def test_of_strength_0_changes_nothing_and_never_its_input(
        self, operation: Callable[[np.ndarray, float], np.ndarray], reach: float
    ) -> None:
        pixels = noisy(30, 41)
        before = pixels.copy()
        assert (operation(pixels, 0.0) == pixels).all()
        for strength in (-reach, reach):
            changed = operation(pixels, strength)
            assert changed.dtype == np.uint8
            assert changed.shape == pixels.shape
            assert (changed != pixels).any()
        assert (pixels == before).all()

    @pytest.mark.parametrize("strength", [-0.25, 0.1, 0.25])
    def test_brightness_scales_values(self, strength: float) -> None:
        pixels = noisy(9, 7)
        want = np.clip(np.round(pixels * (1 + strength)), 0, 255)
        assert (data.brightness(pixels, strength) == want).all()

    @pytest.mark.parametrize("strength", [-0.25, 0.1, 0.25])
    def test_contrast_scales_about_the_mean_luminance(self, strength: float) -> None:
        pixels = noisy(9, 7)
        mean = (pixels.astype(float) @ [0.299, 0.587, 0.114]).mean()
        want = np.clip(mean + (1 + strength) * (pixels - mean), 0, 255)
        # rounded to a level
        assert np.abs(data.contrast(pixels, strength) - want).max() <= 0.5 + 1e-6

    @pytest.mark.parametrize("strength", [-0.25, 0.1, 0.25])
    def test_saturation_scales_about_grey(self, strength: float) -> None:
        pixels = noisy(9, 7)
        grey = pixels.astype(float) @ [0.299, 0.587, 0.114]
        want = np.clip(grey[..., None] + (1 + strength) * (pixels - grey[..., None]), 0, 255)
        # rounded to a level, on a grey that is rounded to a level
        assert np.abs(data.saturation(pixels, strength) - want).max() <= 0.5 + 0.5 * 0.25 + 0.01

    @pytest.mark.parametrize("turn", [-0.1, 0.03, 0.1])
    def test_hue_turns_the_colour_plane(self, turn: float) -> None:
        # not so colourful that a value would be clipped
        pixels = (noisy(9, 7) // 4 + 96).astype(np.uint8)
        want = np.empty(pixels.shape)
        for place in np.ndindex(pixels.shape[:2]):
            y, i, q = colorsys.rgb_to_yiq(*(pixels[place] / 255.0))
            turned = (i + 1j * q) * np.exp(2j * np.pi * turn)
            want[place] = colorsys.yiq_to_rgb(y, turned.real, turned.imag)
        got = data.hue(pixels, turn)
        # colorsys has the standard's matrix with two digits: off by some per cent of the colour
        assert np.abs(got - 255 * want).max() <= 2
        luminance = (got - pixels.astype(float)) @ [0.299, 0.587, 0.114]
        assert np.abs(luminance).max() <= 1  # each channel is rounded to a level

    def test_hue_leaves_grey_alone(self) -> None:
        grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        # OpenCV's coefficients have ten bits behind the point
        assert np.abs(data.hue(grey, 0.1).astype(int) - grey).max() <= 1

    @pytest.mark.parametrize("strength", [-0.5, 0.2, 0.5])
    def test_sharpness_scales_about_the_smoothed_image(self, strength: float) -> None:
        pixels = noisy(9, 7)
        got = data.sharpness(pixels, strength)
        values = pixels.astype(float)
        for row in range(1, 8):
            for column in range(1, 6):
                around = values[row - 1 : row + 2, column - 1 : column + 2].sum(axis=(0, 1))
                smooth = (around + 4 * values[row, column]) / 13
                want = np.clip(smooth + (1 + strength) * (values[row, column] - smooth), 0, 255)
                # rounded to a level; the filter counts in float32
                assert np.abs(got[row, column] - want).max() <= 0.5 + 1e-3

    @pytest.mark.parametrize("quarters", [1, 2, 3])
    def test_rotation_turns_counter_clockwise_about_the_middle(self, quarters: int) -> None:
        pixels = noisy(15, 15)
        assert (data.rotate(pixels, 90.0 * quarters) == np.rot90(pixels, quarters)).all()


class TestHiding:
    @settings(deadline=None, max_examples=30)
    @given(SEED, st.integers(1, 90), st.integers(1, 90))
    def test_a_square_of_a_quarter_of_the_side_becomes_the_mean(
        self, seed: int, height: int, width: int
    ) -> None:
        pixels = noisy(height, width, seed % 7)
        before = pixels.copy()
        covered = occlude(pixels, np.random.default_rng(seed))
        assert (pixels == before).all()
        side = -(-min(height, width) // 4)
        mean = np.round(before.mean(axis=(0, 1)))
        is_mean = (covered == mean).all(axis=2)
        changed = (covered != before).any(axis=2)
        assert is_mean[changed].all()
        assert changed.sum() <= side**2 <= is_mean.sum()

    @settings(deadline=None, max_examples=30)
    @given(SEED, st.integers(1, 100), st.integers(1, 100))
    def test_pairs_of_patches_change_places(self, seed: int, height: int, width: int) -> None:
        pixels = noisy(height, width)  # noise: no two patches are alike
        before = pixels.copy()
        mixed = shuffle(pixels, np.random.default_rng(seed))
        assert (pixels == before).all()
        rows, columns = height // 16, width // 16
        came_from = {}
        patches = {
            (r, c): before[16 * r : 16 * r + 16, 16 * c : 16 * c + 16].tobytes()
            for r in range(rows)
            for c in range(columns)
        }
        for (r, c), old in patches.items():
            new = mixed[16 * r : 16 * r + 16, 16 * c : 16 * c + 16].tobytes()
            if new != old:
                came_from[r, c] = next(p for p, content in patches.items() if content == new)
        assert len(came_from) == 2 * min(4, rows * columns // 2)
        assert all(came_from[there] == here for here, there in came_from.items())
        # and nothing else moved
        assert (mixed != before).any(axis=2).sum() <= 256 * len(came_from)


class TestPictures:
    def test_are_what_inference_sees(self) -> None:
        pixels = noisy(50, 70)
        spec = PreprocessSpec(size=(32, 32), resize="crop")
        got = Pictures([Drawn(5, pixels)], spec, read=lambda s: s.pixels).get(
            0, np.random.default_rng(0)
        )
        assert (got["images"] == apply(spec, [pixels])[0]).all()
        assert (got["label"], got["index"]) == (5, 0)


@pytest.mark.train
class TestInBatches:
    def test_views_do_not_depend_on_the_number_of_workers(self) -> None:
        from engineworks.training.data import loader

        samples = [Drawn(i % 3, picture(40, 50, i)) for i in range(7)]
        views = Views(samples, unscaled((24, 32)), ViewsConfig(), read=read_drawn)
        batches: dict[int, list[Any]] = {}
        for workers in (0, 2):
            config = TrainConfig(seed=4, batch_size=3, workers=workers)
            loading = loader(views, config, shuffle=True)
            batches[workers] = []
            for epoch in range(2):
                loading.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
                batches[workers] += list(loading)
        assert [tuple(b["views"].shape) for b in batches[0][:3]] == [
            (3, 2, 3, 24, 32),
            (3, 2, 3, 24, 32),
            (1, 2, 3, 24, 32),
        ]
        for ours, theirs in zip(batches[0], batches[2], strict=True):
            for key in ("views", "label", "index", "affine"):
                assert ours[key].equal(theirs[key])
        first, second = (batches[0][i]["views"] for i in (0, 3))
        assert not first.equal(second)  # another epoch, other views


def read_drawn(sample: Drawn) -> np.ndarray:
    return sample.pixels
