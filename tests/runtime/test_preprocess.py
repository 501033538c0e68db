from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from engineworks.runtime.errors import InputError
from engineworks.runtime.preprocess import (
    PlanesSpec,
    PreprocessSpec,
    apply,
    check_image,
    place,
    placement,
    restore,
)

Resize = Literal["squash", "crop", "letterbox"]
RESIZES: list[Resize] = ["squash", "crop", "letterbox"]
SIDE = st.integers(24, 90)


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth RGB picture."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def blob(height: int, width: int, x: float, y: float, sigma: float) -> np.ndarray:
    """A Gaussian hill around a point; pixel centres lie at integers + 0.5."""
    rows, columns = np.mgrid[:height, :width] + 0.5
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * sigma**2)).astype(np.float32)


def centroid(values: np.ndarray) -> tuple[float, float]:
    rows, columns = np.mgrid[: values.shape[0], : values.shape[1]] + 0.5
    total = values.sum(dtype=np.float64)
    return float((values * columns).sum() / total), float((values * rows).sum() / total)


class TestGeometry:
    @settings(deadline=None)
    @given(st.sampled_from(RESIZES), SIDE, SIDE, SIDE, SIDE)
    def test_a_point_goes_where_placement_says(
        self, resize: Resize, height: int, width: int, out_height: int, out_width: int
    ) -> None:
        spec = PreprocessSpec(
            size=(out_height, out_width), resize=resize, interpolation="bilinear", pad_value=0
        )
        affine = placement(spec, height, width)
        # four pixels wide at the network's size, so that shrinking does not lose it
        scale = min(affine[0, 0], affine[1, 1])
        hill = blob(height, width, width / 2 + 1, height / 2 - 1, 4 / max(scale, 1))

        placed = place(spec, np.round(255 * hill).astype(np.uint8))

        peak = np.argwhere(placed == placed.max()).mean(axis=0)[::-1] + 0.5
        want = affine @ [width / 2 + 1, height / 2 - 1, 1]
        # the highest pixel lies within one source or network pixel of the true peak
        assert np.abs(peak - want).max() <= 1 + max(affine[0, 0], affine[1, 1])

    @settings(deadline=None)
    @given(
        st.sampled_from(RESIZES),
        st.integers(48, 90),
        st.integers(48, 90),
        st.integers(40, 90),
        st.integers(40, 90),
        st.floats(0.25, 0.75),
        st.floats(0.25, 0.75),
    )
    def test_a_point_far_from_the_middle_goes_there_too_and_comes_back(
        self,
        resize: Resize,
        height: int,
        width: int,
        out_height: int,
        out_width: int,
        across: float,
        down: float,
    ) -> None:
        spec = PreprocessSpec(size=(out_height, out_width), resize=resize, pad_value=0)
        affine = placement(spec, height, width)
        x, y = across * width, down * height
        net_x, net_y = affine @ [x, y, 1]
        # the hill, three sigmas of it, must not be cut off by a crop
        assume(8 <= net_x <= out_width - 8)
        assume(8 <= net_y <= out_height - 8)
        sigma = 2 / max(affine[0, 0], affine[1, 1], 1)

        placed = place(spec, blob(height, width, x, y, sigma))
        back = restore(spec, blob(out_height, out_width, net_x, net_y, 2), height, width)

        # the middle of a hill is found far below a pixel, but it is cut into few pixels where one
        # side shrinks much: half a pixel on the side where it is seen
        assert centroid(placed) == pytest.approx((net_x, net_y), abs=0.5)
        assert centroid(back) == pytest.approx((x, y), abs=0.5)

    @settings(deadline=None)
    @given(st.sampled_from(RESIZES), SIDE, SIDE, SIDE, SIDE)
    def test_a_map_comes_back_to_where_it_was_seen(
        self, resize: Resize, height: int, width: int, out_height: int, out_width: int
    ) -> None:
        spec = PreprocessSpec(size=(out_height, out_width), resize=resize)
        affine = placement(spec, height, width)
        x, y = width / 2, height / 2
        net_x, net_y = affine @ [x, y, 1]
        sigma = min(out_height, out_width) / 16
        hill = blob(out_height, out_width, net_x, net_y, sigma)

        back = restore(spec, hill, height, width)

        assert back.shape == (height, width)
        assert back.dtype == np.float32
        found_x, found_y = centroid(np.where(back > 0.2, back, 0))
        # one pixel, and half a network pixel where one covers several of the image
        assert abs(found_x - x) <= 1 + 0.5 / affine[0, 0]
        assert abs(found_y - y) <= 1 + 0.5 / affine[1, 1]

    @pytest.mark.parametrize("resize", ["crop", "letterbox"])
    @pytest.mark.parametrize("scale", [2.0, 0.5, 3.0])
    def test_a_slope_comes_back_without_a_shift(self, resize: Resize, scale: float) -> None:
        """A map that says where its pixels' centres are, read off at those of the image."""
        height, width = 40, 60
        spec = PreprocessSpec(size=(int(40 * scale), int(60 * scale)), resize=resize)
        if resize == "crop":
            spec = spec.model_copy(update={"size": (int(40 * scale), int(40 * scale))})
        rows, columns = np.mgrid[: spec.size[0], : spec.size[1]] + 0.5
        affine = placement(spec, height, width)
        where_y, where_x = np.mgrid[:height, :width] + 0.5

        for own, centres, axis in ((columns, where_x, 0), (rows, where_y, 1)):
            back = restore(spec, own.astype(np.float32), height, width)

            want = affine[axis, axis] * centres + affine[axis, 2]
            inside = (want >= own.min()) & (want <= own.max())  # beyond, the edge is repeated
            assert inside.sum() > height * width / 2
            # OpenCV's maps are of 1/32 of a pixel; half a pixel forgotten is 1/4 or more
            assert np.abs(back - want)[inside].max() <= 1 / 32

    @pytest.mark.parametrize(("width", "first"), [(5, 0), (6, 1), (7, 1), (9, 2)])
    def test_a_crop_with_an_odd_surplus_leaves_the_larger_part_off_at_the_end(
        self, width: int, first: int
    ) -> None:
        image = np.tile(np.arange(width, dtype=np.uint8), (4, 1))
        spec = PreprocessSpec(size=(4, 4), resize="crop")

        assert place(spec, image)[0].tolist() == list(range(first, first + 4))
        assert place(spec, image.T.copy())[:, 0].tolist() == list(range(first, first + 4))
        assert placement(spec, 4, width)[0, 2] == -first

    @pytest.mark.parametrize(("width", "first"), [(5, 0), (6, 1), (7, 1), (9, 2)])
    def test_a_letterbox_with_an_odd_rest_pads_more_at_the_end(
        self, width: int, first: int
    ) -> None:
        spec = PreprocessSpec(size=(4, width), resize="letterbox", pad_value=7)

        placed = place(spec, np.full((4, 4), 9, np.uint8))

        want = [7] * first + [9] * 4 + [7] * (width - 4 - first)
        assert placed[0].tolist() == want

    @settings(deadline=None)
    @given(st.sampled_from(RESIZES), SIDE, SIDE, SIDE, SIDE)
    def test_an_image_always_gets_the_networks_size(
        self, resize: Resize, height: int, width: int, out_height: int, out_width: int
    ) -> None:
        spec = PreprocessSpec(size=(out_height, out_width), resize=resize)

        assert place(spec, drawn(height, width)).shape == (out_height, out_width, 3)
        assert place(spec, np.ones((height, width), np.uint8)).shape == (out_height, out_width)

    @settings(deadline=None)
    @given(st.sampled_from(["crop", "letterbox"]), SIDE, SIDE)
    def test_crop_and_letterbox_keep_the_aspect_ratio(
        self, resize: Resize, height: int, width: int
    ) -> None:
        affine = placement(PreprocessSpec(size=(64, 64), resize=resize), height, width)

        # both sides are rounded to whole pixels: half a pixel of the shorter one
        assert affine[0, 0] == pytest.approx(affine[1, 1], rel=0.5 / 16)

    def test_letterbox_pads_around_the_whole_image(self) -> None:
        spec = PreprocessSpec(size=(8, 8), resize="letterbox", pad_value=7)

        placed = place(spec, np.full((4, 8, 3), 200, np.uint8))

        assert (placed[2:6] == 200).all()
        assert (placed[:2] == 7).all()
        assert (placed[6:] == 7).all()

    def test_crop_takes_the_middle(self) -> None:
        image = np.zeros((4, 8), np.uint8)
        image[:, 2:6] = 9

        assert (place(PreprocessSpec(size=(4, 4), resize="crop"), image) == 9).all()

    def test_a_crop_does_not_make_a_line_of_pixels_into_gigabytes(self) -> None:
        line = np.zeros((1, 60_000, 3), np.uint8)

        with pytest.raises(InputError, match="1 x 60000, enlarged to 224 x 13440000") as caught:
            place(PreprocessSpec(size=(224, 224), resize="crop"), line)

        assert "ENGINEWORKS_MAX_PIXELS" in (caught.value.fix or "")
        assert place(PreprocessSpec(size=(224, 224), resize="letterbox"), line).shape[0] == 224

    def test_a_mask_gets_no_new_values_and_no_padding_value(self) -> None:
        mask = np.zeros((33, 57), np.uint8)
        mask[10:20, 10:30] = 255

        for resize in RESIZES:
            placed = place(PreprocessSpec(size=(40, 24), resize=resize), mask, nearest=True)
            assert set(np.unique(placed)) == {0, 255}


class TestResizing:
    def test_area_averages_where_it_shrinks(self) -> None:
        image = drawn(64, 96)

        placed = place(PreprocessSpec(size=(16, 24)), image)

        want = image.reshape(16, 4, 24, 4, 3).mean(axis=(1, 3))
        # rounded to whole grey levels
        assert np.abs(placed - want).max() <= 0.5

    @pytest.mark.parametrize("size", [(48, 40), (41, 37)])
    def test_area_is_bilinear_where_it_grows(self, size: tuple[int, int]) -> None:
        image = drawn(20, 24)

        area = place(PreprocessSpec(size=size, interpolation="area"), image)

        bilinear = place(PreprocessSpec(size=size, interpolation="bilinear"), image)
        np.testing.assert_array_equal(area, bilinear)

    def test_area_averages_one_axis_while_the_other_grows(self) -> None:
        stripes = np.tile(np.array([0, 200], np.uint8), (8, 32))  # 8 rows, 64 columns

        placed = place(PreprocessSpec(size=(16, 16)), stripes)

        assert (placed == 100).all()

    def test_an_image_of_the_networks_size_is_not_touched(self) -> None:
        image = drawn(24, 32)

        for resize in RESIZES:
            np.testing.assert_array_equal(
                place(PreprocessSpec(size=(24, 32), resize=resize), image), image
            )


class TestApplying:
    @settings(deadline=None, max_examples=40)
    @given(st.sampled_from(RESIZES), SIDE, SIDE, st.integers(0, 1000))
    def test_normalises_the_placed_picture(
        self, resize: Resize, height: int, width: int, seed: int
    ) -> None:
        spec = PreprocessSpec(size=(31, 29), resize=resize)
        image = drawn(height, width, seed)

        batch = apply(spec, [image])

        pixels = place(spec, image).astype(np.float64)
        want = ((pixels / 255 - spec.mean) / spec.std).transpose(2, 0, 1)
        assert batch.shape == (1, 3, 31, 29)
        assert batch.dtype == np.float32
        # float32 has 6e-8: product and sum of terms up to 4.4, which may cancel near zero
        np.testing.assert_allclose(batch[0], want, rtol=1e-6, atol=1e-6)

    def test_does_not_depend_on_the_rest_of_the_batch(self) -> None:
        spec = PreprocessSpec(size=(24, 24), resize="letterbox")
        images = [drawn(30, 41, 1), drawn(24, 24, 2), drawn(77, 25, 3)]

        together = apply(spec, images)

        for image, planes in zip(images, together, strict=True):
            np.testing.assert_array_equal(apply(spec, [image])[0], planes)

    def test_of_no_images_is_an_empty_batch(self) -> None:
        assert apply(PreprocessSpec(size=(8, 9)), []).shape == (0, 3, 8, 9)

    def test_takes_one_channel_where_the_spec_has_one(self) -> None:
        spec = PreprocessSpec(size=(8, 8), mean=(0.5,), std=(0.25,))
        image = drawn(16, 16)[..., :1]

        batch = apply(spec, [image])

        want = (image.reshape(8, 2, 8, 2).mean(axis=(1, 3)) / 255 - 0.5) / 0.25
        assert batch.shape == (1, 1, 8, 8)
        # the average is rounded to a whole grey level: 0.5 / 255 / 0.25
        assert np.abs(batch[0, 0] - want).max() <= 0.5 / 255 / 0.25 + 1e-6


class TestWhatIsNoImage:
    @pytest.mark.parametrize(
        "image",
        [
            np.zeros((4, 4, 3), np.float32),
            np.zeros((4, 4), np.uint8),
            np.zeros((4, 4, 4), np.uint8),
            np.zeros((3, 4, 4), np.uint8),
        ],
        ids=["float", "grey", "alpha", "planes first"],
    )
    def test_is_refused_with_its_shape_and_dtype(self, image: np.ndarray) -> None:
        with pytest.raises(InputError, match="must be") as error:
            apply(PreprocessSpec(size=(4, 4)), [image])

        assert str(image.shape) in error.value.message
        assert str(image.dtype) in error.value.message

    @pytest.mark.parametrize("shape", [(0, 4, 3), (4, 0, 3)])
    def test_without_pixels_is_refused(self, shape: tuple[int, int, int]) -> None:
        with pytest.raises(InputError, match="no pixels"):
            check_image(np.zeros(shape, np.uint8))


class TestASpec:
    @pytest.mark.parametrize(
        "wrong",
        [
            {"size": (0, 8)},
            {"size": (8, -1)},
            {"std": (0.2, 0.0, 0.2)},
            {"mean": (0.5,)},
            {"mean": (), "std": ()},
            {"pad_value": 256},
            {"resize": "stretch"},
            {"colour": "bgr"},
        ],
        ids=str,
    )
    def test_that_makes_no_sense_is_refused(self, wrong: dict[str, object]) -> None:
        with pytest.raises(ValidationError):
            PreprocessSpec.model_validate({"size": (8, 8), **wrong})

    def test_comes_back_from_json(self) -> None:
        spec = PreprocessSpec(size=(8, 9), resize="crop", interpolation="cubic", pad_value=0)

        assert PreprocessSpec.model_validate_json(spec.model_dump_json()) == spec


class TestPlanes:
    @settings(max_examples=50)
    @given(
        height=st.integers(1, 50),
        width=st.integers(1, 50),
        multiple=st.integers(1, 40),
        dtype=st.sampled_from(["uint8", "uint16", "float32"]),
    )
    def test_keep_their_values_and_are_padded_by_reflection(
        self, height: int, width: int, multiple: int, dtype: str
    ) -> None:
        image = np.random.default_rng(0).uniform(0, 250, (height, width, 3)).astype(dtype)
        spec = PlanesSpec(size=(8, 8), multiple=multiple)

        batch = apply(spec, [image])

        assert batch.dtype == np.float32
        assert batch.shape[2:] == spec.padded(height, width)
        assert all(side % multiple == 0 for side in batch.shape[2:])
        assert batch.shape[2] - height < multiple
        assert batch.shape[3] - width < multiple
        pad = [(0, new - old) for new, old in zip(batch.shape[2:], image.shape[:2], strict=True)]
        assert (batch[0] == np.pad(image, [*pad, (0, 0)], "reflect").transpose(2, 0, 1)).all()

    def test_smaller_ones_are_padded_to_the_largest(self) -> None:
        spec = PlanesSpec(size=(8, 8), multiple=4)
        images = [np.ones((5, 9, 3), np.uint8), np.ones((7, 3, 3), np.uint8)]

        assert apply(spec, images).shape == (2, 3, 8, 12)

    def test_that_are_none_are_refused(self) -> None:
        with pytest.raises(InputError, match="planes must be"):
            apply(PlanesSpec(size=(8, 8), multiple=4), [np.ones((5, 9), np.uint8)])

    def test_spec_is_told_from_that_of_pictures(self) -> None:
        either: TypeAdapter[PreprocessSpec | PlanesSpec] = TypeAdapter(PreprocessSpec | PlanesSpec)
        for spec in (PlanesSpec(size=(8, 9), multiple=2), PreprocessSpec(size=(8, 9))):
            assert either.validate_json(spec.model_dump_json()) == spec
