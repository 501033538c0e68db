from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime.tensors import Array
from engineworks.training.systems.stripe.config import (
    DefectsConfig,
    DisturbanceConfig,
    KernelConfig,
)
from engineworks.training.systems.stripe.defects import (
    Defect,
    Disturbances,
    allocate,
    displace,
    kernel,
    paint,
    plan,
    taps,
)

KERNELS = [kernel(k) for k in DefectsConfig().kernels]
BYTES = (0.0, 255.0)


def spot(**changes: object) -> Defect:
    fields: dict[str, object] = {
        "kernel": 0,
        "top": 10,
        "left": 20,
        "amplitude": 0.25,
        "scales": (1.0, 0.0, 0.0),
        "wanted": True,
    }
    return Defect(**fields | changes)  # type: ignore[arg-type]


def painted(defects: list[Defect], level: float = 100) -> tuple[Array, Array]:
    planes, mask = np.full((3, 40, 50), level, np.float32), np.zeros((40, 50), bool)
    paint(planes, mask, defects, KERNELS, BYTES)
    return planes, mask


class TestAKernel:
    @settings(deadline=None)
    @given(
        half=st.tuples(st.integers(0, 6), st.integers(0, 6)),
        sigma=st.tuples(st.floats(0.3, 9), st.floats(0.3, 9)),
    )
    def test_is_a_gaussian_with_a_peak_of_one(
        self, half: tuple[int, int], sigma: tuple[float, float]
    ) -> None:
        size = (2 * half[0] + 1, 2 * half[1] + 1)
        made = kernel(KernelConfig(size=size, sigma=sigma))
        for y, x in itertools.product(range(size[0]), range(size[1])):
            v, u = y - half[0], x - half[1]
            want = math.exp(-(v * v / (2 * sigma[0] ** 2) + u * u / (2 * sigma[1] ** 2)))
            # rounded to float32 once
            assert made.values_HW[y, x] == pytest.approx(want, rel=1e-6, abs=1e-30)
            assert made.mask_HW[y, x] == (want > 0.1)

    def test_of_the_defaults_marks_its_whole_box(self) -> None:
        assert [int(k.mask_HW.sum()) for k in KERNELS] == [9, 15]

    def test_is_longest_where_its_sigma_is(self) -> None:
        wide = KERNELS[1].values_HW
        assert wide.shape == (3, 5)
        assert wide[1, 3] > wide[2, 2]  # a step across falls off less than a step down

    @pytest.mark.data
    def test_is_the_published_one_but_for_its_sigmas_axes(self, shared: Path) -> None:
        fixture = np.load(shared / "fixtures/stripe_gaussian_defects.npz")
        for i in range(4):
            size = tuple(fixture[f"{i}_size_hw"].tolist())
            across, down = np.broadcast_to(fixture[f"{i}_sigma"], 2).tolist()
            made = kernel(KernelConfig(size=size, sigma=(down, across)))
            # rounded to float32 once
            np.testing.assert_allclose(made.values_HW, fixture[f"{i}_kernel"], rtol=1e-6)
            assert made.mask_HW.sum() == fixture[f"{i}_mask_pixels"]
        # the default for 3 x 5 has the two numbers the right way round
        swapped = fixture["2_kernel"]
        assert np.abs(KERNELS[1].values_HW - swapped).max() > 0.1


class TestTheAllocation:
    def test_is_that_of_the_rule(self) -> None:
        config = DefectsConfig(absent=0, shared_scale=(1, 1))
        rng = np.random.default_rng(0)
        tiles = [allocate(rng, config) for _ in range(4000)]
        # 4,000 tosses of a coin: three standard deviations are 0.024
        assert np.mean([not tile for tile in tiles]) == pytest.approx(0.5, abs=0.024)
        sizes = set()
        for tile in filter(None, tiles):
            wanted = [scales for scales, wanted in tile if wanted]
            rest = [scales for scales, wanted in tile if not wanted]
            sizes.add(len(tile))
            assert all(scales == (1, 0, 0) for scales in wanted)
            assert 1 <= len(wanted) <= (1 if len(tile) == 3 else 2)
            third = len(rest) // 3
            assert rest.count((1, 1, 0)) == rest.count((1, 0, 1)) == third
            assert rest.count((1, 1, 1)) == len(rest) - 2 * third
        assert sizes == set(range(3, 9))

    @pytest.mark.data
    def test_leaves_as_many_tiles_with_something_to_find_as_published(self, shared: Path) -> None:
        stats = json.loads((shared / "fixtures/stripe_allocation_stats.json").read_text())["v1"]
        rng = np.random.default_rng(0)
        marked = []
        for _ in range(2000):
            mask = np.zeros((128, 128), bool)
            planned = plan(rng, DefectsConfig(), KERNELS, 128, 128)
            paint(np.zeros((3, 128, 128), np.float32), mask, planned, KERNELS, BYTES)
            marked.append(int(mask.sum()))
        share = np.mean([num > 0 for num in marked])
        # 2,000 and 4,000 tosses of a coin: three standard deviations of the difference are 0.042
        assert share == pytest.approx(stats["fraction_with_gt"], abs=0.042)
        mean = np.mean([num for num in marked if num])
        # one or two spots of 9 or 15: deviation 7.6 on about 1,000 tiles, three of it are 0.9
        assert mean == pytest.approx(stats["mean_gt_pixels_when_any"], abs=0.9)

    def test_of_a_single_shared_spot_takes_either_reference(self) -> None:
        config = DefectsConfig(clean=0, num=(2, 2), absent=0, shared_scale=(1, 1))
        rng = np.random.default_rng(0)
        shown = {allocate(rng, config)[1][0] for _ in range(50)}
        assert shown == {(1, 1, 0), (1, 0, 1)}

    def test_can_leave_spots_to_the_references_alone(self) -> None:
        rng = np.random.default_rng(0)
        tile = allocate(rng, DefectsConfig(clean=0, absent=1))
        assert all(scales[0] == float(wanted) for scales, wanted in tile)
        assert all(sum(scales) for scales, _ in tile)

    def test_shows_shared_spots_as_strongly_as_told(self) -> None:
        rng = np.random.default_rng(0)
        config = DefectsConfig(clean=0, absent=0, shared_scale=(0.6, 1.4))
        tiles = [allocate(rng, config) for _ in range(200)]
        scales = np.array([s[1:] for tile in tiles for s, wanted in tile if not wanted])
        shown = scales[scales > 0]
        assert 0.6 <= shown.min() < 0.62
        assert 1.38 < shown.max() <= 1.4

    def test_can_leak_what_is_wanted_into_one_reference(self) -> None:
        rng = np.random.default_rng(0)
        for _ in range(20):
            for scales, wanted in allocate(rng, DefectsConfig(clean=0, leak=1)):
                if wanted:
                    assert scales[0] == 1
                    assert min(scales[1:]) == 0
                    assert 0.2 <= max(scales[1:]) <= 0.5


class TestAPlan:
    @settings(deadline=None, max_examples=80)
    @given(
        seed=st.integers(0, 9999),
        size=st.tuples(st.integers(16, 90), st.integers(16, 90)),
        margin=st.integers(0, 7),
        spacing=st.integers(0, 4),
    )
    def test_keeps_its_spots_inside_and_apart(
        self, seed: int, size: tuple[int, int], margin: int, spacing: int
    ) -> None:
        config = DefectsConfig(clean=0, margin=margin, spacing=spacing)
        planned = plan(np.random.default_rng(seed), config, KERNELS, *size)
        drawn = np.zeros(size, int)
        for defect in planned:
            rows, columns = KERNELS[defect.kernel].values_HW.shape
            centre = defect.top + rows // 2, defect.left + columns // 2
            assert all(margin <= at < side - margin for at, side in zip(centre, size, strict=True))
            around = drawn[
                max(0, defect.top - spacing) : defect.top + rows + spacing,
                max(0, defect.left - spacing) : defect.left + columns + spacing,
            ]
            assert not around.any()
            drawn[defect.top : defect.top + rows, defect.left : defect.left + columns] = 1
        assert drawn.sum() == sum(KERNELS[d.kernel].values_HW.size for d in planned)

    def test_of_a_tile_of_usual_size_has_room_for_all(self) -> None:
        config = DefectsConfig(clean=0, num=(8, 8))
        assert all(
            len(plan(np.random.default_rng(seed), config, KERNELS, 128, 128)) == 8
            for seed in range(50)
        )

    def test_uses_every_kernel_sign_and_amplitude(self) -> None:
        rng = np.random.default_rng(0)
        planned = [
            defect for _ in range(100) for defect in plan(rng, DefectsConfig(), KERNELS, 128, 128)
        ]
        assert {defect.kernel for defect in planned} == {0, 1}
        assert {np.sign(defect.amplitude) for defect in planned} == {-1, 1}
        sizes = [abs(defect.amplitude) for defect in planned]
        assert 0.235 <= min(sizes) < 0.24
        assert 0.31 < max(sizes) <= 0.315


class TestPainting:
    def test_adds_the_kernel_to_the_planes_that_show_it(self) -> None:
        planes, mask = painted([spot(scales=(1.0, 0.0, 0.5))])
        want = np.zeros((3, 40, 50))
        want[0, 10:13, 20:23] = want[2, 10:13, 20:23] = KERNELS[0].values_HW * 0.25 * 255
        want[2] /= 2
        # float32 sums near 100
        np.testing.assert_allclose(planes, 100 + want, atol=2e-5)
        assert mask.sum() == 9
        assert mask[10:13, 20:23].all()

    def test_marks_only_what_is_to_be_found(self) -> None:
        assert not painted([spot(wanted=False)])[1].any()

    @pytest.mark.parametrize(
        ("level", "amplitude", "sign"),
        [(250, 0.25, -1), (5, -0.25, 1), (128, -0.25, -1), (128, 0.25, 1)],
    )
    def test_turns_a_spot_that_the_range_would_swallow(
        self, level: float, amplitude: float, sign: int
    ) -> None:
        planes, _ = painted([spot(amplitude=amplitude, scales=(1.0, 1.0, 0.0))], level)
        change = (planes - level).sum(axis=(1, 2))
        assert np.sign(change).tolist() == [sign, sign, 0]

    @pytest.mark.data
    def test_is_the_published_sum(self, shared: Path) -> None:
        fixture = np.load(shared / "fixtures/stripe_apply.npz")
        for sign, name in ((1, "plus80"), (-1, "minus80")):
            planes = np.repeat(fixture["bg"][None], 3, axis=0).astype(np.float32)
            mask = np.zeros((7, 7), bool)
            defect = spot(top=2, left=2, amplitude=sign * 80 / 255)
            paint(planes, mask, [defect], KERNELS, BYTES)
            # float32 sums near 200
            np.testing.assert_allclose(np.clip(planes[0], *BYTES), fixture[name], atol=1e-4)


class TestADisplacement:
    @settings(deadline=None, max_examples=60)
    @given(shift=st.floats(-3, 3), slope=st.floats(-2, 2), bend=st.floats(-0.05, 0.05))
    def test_is_exact_for_parabolas(self, shift: float, slope: float, bend: float) -> None:
        x = np.arange(60, dtype=np.float64)
        row = 50 + slope * x + bend * x**2
        plane = np.tile(row, (20, 1)).astype(np.float32)
        displace(plane, np.array([0.0, shift]))
        moved = x - shift
        want = 50 + slope * moved + bend * moved**2
        # Catmull-Rom reproduces polynomials up to degree 2; float32 values near 200
        np.testing.assert_allclose(plane[7, 6:-6], want[6:-6], rtol=0, atol=5e-4)

    def test_by_whole_pixels_is_a_copy(self) -> None:
        plane = np.random.default_rng(0).uniform(0, 255, (12, 15)).astype(np.float32)
        moved = plane.copy()
        displace(moved, np.array([2.0, -1.0]))
        assert (moved[2:, :-1] == plane[:-2, 1:]).all()

    @given(shifts=st.lists(st.floats(-8, 8), min_size=1, max_size=3))
    def test_keeps_the_brightness(self, shifts: list[float]) -> None:
        # weights that sum to one, in float64
        np.testing.assert_allclose(taps(np.array(shifts)).sum(axis=1), 1, atol=1e-12)


class TestDisturbances:
    def test_of_zero_change_nothing(self) -> None:
        config = DisturbanceConfig(gain=0, offset=0, noise=0, shift=0, spread=0, lines=0)
        planes = np.random.default_rng(0).uniform(0, 255, (3, 30, 40)).astype(np.float32)
        before = planes.copy()
        Disturbances(config, BYTES).apply(np.random.default_rng(1), planes)
        assert (planes == before).all()

    def test_stay_within_their_amounts(self) -> None:
        config = DisturbanceConfig(gain=0.1, offset=0.05, noise=0, shift=0, spread=0, lines=0)
        disturbances, seen = Disturbances(config, BYTES), []
        for seed in range(200):
            planes = np.stack([np.full((8, 8), level, np.float32) for level in (0, 127.5, 255)])
            disturbances.apply(np.random.default_rng(seed), planes)
            seen.append(planes[:, 0, 0] - [0, 127.5, 255])
        middle = np.abs(np.array(seen)[:, 1])
        ends = np.abs(np.array(seen)[:, [0, 2]])
        # offset alone in the middle of the range; a tenth of half the range more at its ends
        assert 0.04 * 255 < middle.max() <= 0.05 * 255 + 1e-3
        assert 0.08 * 255 < ends.max() <= 0.1 * 255 + 1e-3

    def test_noise_is_normal_and_each_planes_own(self) -> None:
        config = DisturbanceConfig(gain=0, offset=0, noise=0.02, shift=0, spread=0, lines=0)
        disturbances = Disturbances(config, BYTES)
        sigmas = []
        for seed in range(40):
            planes = np.full((3, 64, 64), 100, np.float32)
            disturbances.apply(np.random.default_rng(seed), planes)
            noise = planes - 100
            sigmas += noise.std(axis=(1, 2)).tolist()
            # 4,096 independent values: five standard errors
            assert np.abs(np.corrcoef(noise.reshape(3, -1))[np.triu_indices(3, 1)]).max() < 0.08
        assert min(sigmas) < 0.1 * 0.02 * 255
        assert 0.9 * 0.02 * 255 < max(sigmas) < 1.05 * 0.02 * 255

    def test_displace_references_and_never_the_target(self) -> None:
        x = np.arange(40, dtype=np.float32)
        before = np.add.outer(2 * x, 3 * x)
        for shift, spread in ((1, 0), (0, 1), (1, 1)):
            config = DisturbanceConfig(
                gain=0, offset=0, noise=0, shift=shift, spread=spread, lines=0
            )
            planes = np.stack([before] * 3)
            Disturbances(config, BYTES).apply(np.random.default_rng(0), planes)
            assert (planes[0] == before).all()
            inner = planes[1:, 5:-5, 5:-5] - before[5:-5, 5:-5]
            # a ramp moves to a ramp: the same difference everywhere, 2 and 3 for each pixel
            assert np.ptp(inner, axis=(1, 2)).max() < 1e-3
            assert 0 < np.abs(inner).max() <= 5 * (shift + spread)
            assert (spread == 0) == bool((planes[1] == planes[2]).all())

    def test_displace_by_whole_pixels_where_told(self) -> None:
        config = DisturbanceConfig(
            gain=0, offset=0, noise=0, shift=2, spread=1, lines=0, whole_pixels=True
        )
        rng = np.random.default_rng(0)
        for seed in range(20):
            planes = np.repeat(rng.choice((0.0, 255.0), (1, 20, 20)), 3, axis=0)
            planes = planes.astype(np.float32)
            Disturbances(config, BYTES).apply(np.random.default_rng(seed), planes)
            assert set(np.unique(planes)) == {0, 255}

    def test_draw_lines_along_one_axis_of_one_plane(self) -> None:
        config = DisturbanceConfig(gain=0, offset=0, noise=0, shift=0, spread=0, lines=1)
        disturbances, planes_hit = Disturbances(config, BYTES), set()
        for seed in range(60):
            planes = np.full((3, 50, 60), 100, np.float32)
            disturbances.apply(np.random.default_rng(seed), planes)
            changed = planes != 100
            (plane,) = np.flatnonzero(changed.any(axis=(1, 2)))
            planes_hit.add(int(plane))
            rows, columns = np.nonzero(changed[plane])
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert changed.sum() == height * width
            assert min(height, width) <= 3
            amount = np.unique(np.abs(planes[changed] - 100))
            assert 0.05 * 255 - 1e-3 <= amount[0] <= 0.2 * 255 + 1e-3
        assert planes_hit == {0, 1, 2}
