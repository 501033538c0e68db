"""``stripe``: maps whole and in tiles, double detection, candidates, threshold, the bundle."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engineworks.runtime import datasets, images, planes
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.errors import (
    BundleError,
    DatasetError,
    EngineError,
    ImageError,
    InputError,
)
from engineworks.runtime.preprocess import PlanesSpec
from engineworks.runtime.results import Candidate, DefectMap
from engineworks.runtime.systems import open_system
from engineworks.runtime.systems.stripe import (
    InferenceConfig,
    Params,
    System,
    defect_maps,
    double_detection,
    evaluate,
    find_candidates,
    fit_threshold,
)
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import (
    FunctionEngine,
    draw_strip,
    write_strips,
    write_tiny_stripe_bundle,
)
from engineworks.runtime.tiling import boundaries, overlapping

CELL = 2
REACH = 3 * CELL + 1  # of ``blurring``: three cells to each side, and the rest of its own cell
SPEC = PlanesSpec(size=(96, 64), multiple=CELL)


def blurring(planes_BCHW: Array) -> Array:
    """A network on cells of 2 x 2: three 3 x 3 means with zeros around, and each pixel's own sum.

    What it answers depends on where the cells begin and on how far the input reaches.
    """
    batch, _, height, width = planes_BCHW.shape
    assert height % CELL == 0
    assert width % CELL == 0
    summed = planes_BCHW.sum(axis=1, dtype=np.float64)
    cells = summed.reshape(batch, height // CELL, CELL, width // CELL, CELL).mean(axis=(2, 4))
    for _ in range(3):
        padded = np.pad(cells, ((0, 0), (1, 1), (1, 1)))
        cells = sum(
            padded[:, y : y + cells.shape[1], x : x + cells.shape[2]]
            for y in range(3)
            for x in range(3)
        ) / np.float64(9)
    spread = cells.repeat(CELL, axis=1).repeat(CELL, axis=2)
    return ((spread + 0.1 * summed) / 100 - 4)[:, None].astype(np.float32)


def drawn(height: int, width: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class TestMaps:
    def test_are_the_sigmoid_of_the_logits_at_the_image_s_size(self) -> None:
        image = drawn(31, 45)
        padded = np.pad(image, ((0, 1), (0, 1), (0, 0)), "reflect").astype(np.float32)
        logits = blurring(padded.transpose(2, 0, 1)[None])[0, 0, :31, :45].astype(np.float64)

        (found,) = defect_maps(blurring, [image], SPEC)

        assert found.dtype == np.float32
        # float32 arithmetic of the sigmoid
        assert found == pytest.approx(1 / (1 + np.exp(-logits)), rel=1e-6)

    @pytest.mark.parametrize("logit", [-1000.0, 1000.0])
    def test_of_extreme_logits_do_not_overflow(self, logit: float) -> None:
        (found,) = defect_maps(lambda x: np.full_like(x[:, :1], logit), [drawn(8, 8)], SPEC)
        assert (found == (logit > 0)).all()

    def test_do_not_depend_on_the_other_images_of_a_batch(self) -> None:
        strips = [drawn(40, 60, 0), drawn(33, 20, 1), drawn(40, 60, 2), drawn(39, 59, 3)]

        together = defect_maps(blurring, strips, SPEC)

        for strip, found in zip(strips, together, strict=True):
            assert found.shape == strip.shape[:2]
            assert (found == defect_maps(blurring, [strip], SPEC)[0]).all()

    def test_images_of_one_padded_size_share_a_batch(self) -> None:
        sizes: list[tuple[int, ...]] = []

        def run(batch: Array) -> Array:
            sizes.append(batch.shape)
            return blurring(batch)

        defect_maps(run, [drawn(40, 60), drawn(33, 20), drawn(39, 59)], SPEC)

        assert sizes == [(2, 3, 40, 60), (1, 3, 34, 20)]

    def test_tiles_of_all_images_are_folded_into_the_batch(self) -> None:
        sizes: list[tuple[int, ...]] = []

        def run(batch: Array) -> Array:
            sizes.append(batch.shape)
            return blurring(batch)

        defect_maps(run, [drawn(200, 64)] * 10, SPEC, tile=64, overlap=16)

        # 200 pixels take four tiles of 64 that share 16
        assert [size[0] for size in sizes] == [32, 8]
        assert {size[1:] for size in sizes} == {(3, 64, 64)}

    @settings(max_examples=25, deadline=None)
    @given(
        height=st.integers(1, 300),
        width=st.integers(1, 120),
        tile=st.integers(24, 96),
        extra=st.integers(0, 8),
    )
    def test_whole_and_tiled_are_equal_where_tiles_overlap_by_twice_the_reach(
        self, height: int, width: int, tile: int, extra: int
    ) -> None:
        image = drawn(height, width)

        (whole,) = defect_maps(blurring, [image], SPEC)
        overlap = min(2 * REACH + extra, tile - 1)
        (tiled,) = defect_maps(blurring, [image], SPEC, tile=tile, overlap=overlap)

        # the sums of float64 are the same ones
        assert tiled == pytest.approx(whole, abs=1e-7)

    @pytest.mark.parametrize("size", [(128, 128), (976, 176), (2000, 700)])
    def test_with_less_overlap_they_are_equal_further_than_the_reach_from_the_seams(
        self, size: tuple[int, int]
    ) -> None:
        image = drawn(*size)

        (whole,) = defect_maps(blurring, [image], SPEC)
        (tiled,) = defect_maps(blurring, [image], SPEC, tile=48, overlap=4)

        differs = ~np.isclose(whole, tiled, atol=1e-6)
        assert differs.any()
        for axis, length in enumerate(size):
            starts = [CELL * s for s in overlapping(length // CELL, 48 // CELL, 4 // CELL)]
            seams = np.array(boundaries(starts, 48)[1:-1])
            distance = np.abs(np.arange(length) + 0.5 - seams[:, None]).min(axis=0)
            shape = (-1, 1) if axis == 0 else (1, -1)
            differs &= (distance >= REACH).reshape(shape)
        assert not differs.any()

    def test_that_are_not_finite_are_refused(self) -> None:
        with pytest.raises(EngineError, match="not finite") as caught:
            defect_maps(lambda x: np.full_like(x[:, :1], np.nan), [drawn(8, 8)], SPEC)
        assert caught.value.fix

    def test_of_no_images_are_none(self) -> None:
        assert defect_maps(blurring, [], SPEC) == []


class TestDoubleDetection:
    @given(
        hnp.arrays(
            st.sampled_from([np.uint8, np.uint16]),
            st.tuples(st.integers(1, 5), st.integers(1, 5), st.just(3)),
        )
    )
    def test_takes_the_difference_of_the_smaller_magnitude(self, image: Array) -> None:
        found = double_detection(image)

        assert found.dtype == np.float32
        for (y, x), value in np.ndenumerate(found):
            target, first, second = map(float, image[y, x])
            assert abs(value) == min(abs(target - first), abs(target - second))
            assert value in (target - first, target - second)

    @pytest.mark.data
    def test_gives_the_published_values(self, shared: Path) -> None:
        fixture = np.load(shared / "fixtures/stripe_double_detection.npz")
        found = double_detection(
            np.stack([fixture[name] for name in ("target", "ref1", "ref2")], axis=-1)
        )
        # float32 differences of the same numbers
        assert found == pytest.approx(fixture["head_signed_smaller_abs"], abs=1e-5)
        assert np.abs(found) == pytest.approx(fixture["v1_min_abs"], abs=1e-5)


class TestCandidates:
    @settings(max_examples=60)
    @given(
        levels=hnp.arrays(
            np.int8, st.tuples(st.integers(1, 14), st.integers(1, 14)), elements=st.integers(0, 4)
        ),
        suppression=st.sampled_from([0, 1, 1.5, 3]),
        max_candidates=st.integers(1, 6),
    )
    def test_are_taken_greedily_from_the_highest_peak_down(
        self, levels: Array, suppression: float, max_candidates: int
    ) -> None:
        scores = (levels / 4).astype(np.float32)
        height, width = scores.shape
        peaks = [
            (y, x)
            for y in range(height)
            for x in range(width)
            if scores[y, x] == scores[max(0, y - 1) : y + 2, max(0, x - 1) : x + 2].max()
        ]
        peaks.sort(key=lambda place: -scores[place])
        want: list[tuple[int, int]] = []
        for y, x in peaks:
            if len(want) < max_candidates and all(
                (y - v) ** 2 + (x - u) ** 2 > suppression**2 for v, u in want
            ):
                want.append((y, x))

        found = find_candidates(scores, suppression=suppression, max_candidates=max_candidates)

        assert {(c.y, c.x) for c in found} == set(want)
        assert [c.score for c in found] == sorted((c.score for c in found), reverse=True)
        for c in found:
            around = scores[max(0, c.y - 2) : c.y + 3, max(0, c.x - 2) : c.x + 3]
            assert c.score == np.sort(around.ravel())[-3:].astype(np.float64).mean()

    def test_of_a_flat_map_are_spread_over_it(self) -> None:
        found = find_candidates(np.zeros((40, 40), np.float32), suppression=9, max_candidates=100)
        assert 9 <= len(found) <= 25
        assert found[0] == Candidate(x=0, y=0, score=0.0)


class TestThreshold:
    @staticmethod
    def maps(rng: np.random.Generator, num: int) -> list[Array]:
        return [rng.random((40, 30)).astype(np.float32) for _ in range(num)]

    @pytest.mark.parametrize("budget", [0.0, 0.25, 2.0])
    def test_lets_as_many_candidates_through_as_the_budget_says(
        self, rng: np.random.Generator, budget: float
    ) -> None:
        config = InferenceConfig(false_candidates=budget)
        maps = self.maps(rng, 8)

        threshold = fit_threshold(maps, config)

        found = [
            candidate.score
            for each in maps
            for candidate in find_candidates(each, suppression=5, max_candidates=50)
        ]
        assert sum(score >= threshold.value for score in found) == budget * 8
        assert "on 8 normal images" in threshold.source

    def test_of_a_budget_beyond_all_candidates_is_below_nearly_all(
        self, rng: np.random.Generator
    ) -> None:
        config = InferenceConfig(false_candidates=1000, max_candidates=10)
        assert fit_threshold(self.maps(rng, 2), config).value < 0.9

    def test_needs_normal_images(self) -> None:
        with pytest.raises(InputError, match="normal scores"):
            fit_threshold([], InferenceConfig())


class TestInferenceConfig:
    def test_refuses_tiles_that_overlap_whole(self) -> None:
        with pytest.raises(ValueError, match="overlap must be smaller"):
            InferenceConfig(tile=64, overlap=64)


# --- the opened bundle --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_stripe_bundle(tmp_path_factory.mktemp("tiny") / "bundle", int8=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_strips(tmp_path_factory.mktemp("data"))


def opened(bundle: Bundle, run: Callable[[Mapping[str, Array]], Mapping[str, Array]]) -> System:
    """A system whose graph is a function."""
    graph = bundle.manifest.graphs["segment"]
    engine = FunctionEngine(run, graph.inputs, graph.outputs)
    return System(bundle, {"segment": engine}, backend="function", precision="float")


class TestSystem:
    @pytest.mark.parametrize("backend", ["ort", "openvino"])
    @pytest.mark.parametrize("precision", ["float", "int8"])
    def test_finds_what_only_the_target_shows(
        self, tiny: Bundle, rng: np.random.Generator, backend: str, precision: str
    ) -> None:
        system = open_system(tiny, backend=backend, precision=precision, threads=1)
        strips = [draw_strip(rng, (120, 90), defective=i % 2 == 1) for i in range(6)]

        results = system.infer([strip for strip, _ in strips])

        for result, (strip, mask) in zip(results, strips, strict=True):
            assert isinstance(result, DefectMap)
            assert result.map_HW.shape == strip.shape[:2]
            assert result.is_defective == mask.any()
            if mask.any():
                (defect,) = result.defects
                assert mask[defect.y, defect.x]
        system.close()
        system.close()

    @pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
    def test_takes_every_type_of_planes_in_the_sensor_s_values(
        self, tiny: Bundle, dtype: str
    ) -> None:
        system = open_system(tiny, backend="ort", precision="float", threads=1)
        strip, mask = draw_strip(np.random.default_rng(3), (97, 65), defective=True, dtype=dtype)

        (result,) = system.infer([strip])

        assert isinstance(result, DefectMap)
        assert mask[result.candidates[0].y, result.candidates[0].x]
        assert system.infer([]) == []
        system.close()

    def test_feeds_its_graph_raw_values_in_multiples_of_its_stride(self, tiny: Bundle) -> None:
        system = opened(tiny, lambda feeds: {"logits": feeds["planes"][:, :1] * 0})
        image = np.full((31, 45, 3), 200, np.uint8)

        system.infer([image, image])

        engine = system.engines["segment"]
        assert isinstance(engine, FunctionEngine)
        (feeds,) = engine.calls
        assert feeds["planes"].shape == (2, 3, 32, 46)
        assert (feeds["planes"] == 200).all()

    def test_in_tiles_answers_as_whole(self, tmp_path: Path, data: Path) -> None:
        config = InferenceConfig(tile=32, overlap=8)
        bundle = write_tiny_stripe_bundle(tmp_path / "tiled", inference=config)
        whole = write_tiny_stripe_bundle(tmp_path / "whole")
        strips = [planes.read(sample.path) for sample in datasets.strips(data, "test")]

        answers = []
        for each in (bundle, whole):
            system = open_system(each, backend="ort", precision="float", threads=1)
            answers.append(system.infer(strips))
            system.close()

        for tiled, one in zip(*answers, strict=True):
            assert isinstance(tiled, DefectMap)
            assert isinstance(one, DefectMap)
            # the graph looks one pixel far; ONNX Runtime adds up in another order for other shapes
            assert tiled.map_HW == pytest.approx(one.map_HW, abs=1e-4)

    def test_refuses_values_of_another_sensor(self, tiny: Bundle) -> None:
        system = opened(tiny, lambda feeds: {"logits": feeds["planes"][:, :1]})
        with pytest.raises(InputError, match="range is 0 to 255") as caught:
            system.infer([np.full((8, 8, 3), 4000, np.uint16)])
        assert "value_range" in (caught.value.fix or "")

    @pytest.mark.parametrize(
        "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)]
    )
    def test_refuses_what_is_no_planes(self, tiny: Bundle, image: Array) -> None:
        system = opened(tiny, lambda feeds: {"logits": feeds["planes"][:, :1]})
        with pytest.raises(InputError):
            system.infer([image])

    def test_draws_seven_titled_pictures(self, tiny: Bundle, rng: np.random.Generator) -> None:
        system = open_system(tiny, backend="ort", precision="float", threads=1)
        strip, _ = draw_strip(rng, (240, 90), defective=True)
        (result,) = system.infer([strip])

        drawn_ = system.draw(strip, result)
        bare = system.draw(strip, dataclasses.replace(result, threshold=1.1))

        assert drawn_.dtype == np.uint8
        assert drawn_.shape[2] == 3
        # as square as seven cells of 90 x (240 and a title) allow, all in one picture
        assert drawn_.shape[0] * drawn_.shape[1] >= 7 * 240 * 90
        assert drawn_.shape == bare.shape
        assert (drawn_ != bare).any()  # the rings, and nothing else
        system.close()

    def test_refuses_parameters_of_another_system(self, tiny: Bundle) -> None:
        manifest = tiny.manifest.model_copy(update={"params": {"k": 3}})
        with pytest.raises(BundleError, match="not those of 'stripe'"):
            opened(Bundle(tiny.root, manifest), lambda feeds: {})

    def test_its_parameters_come_back_from_json(self) -> None:
        params = Params(value_range=(0.0, 4095.0), inference=InferenceConfig(tile=128))
        assert Params.model_validate_json(json.dumps(params.model_dump(mode="json"))) == params


class TestImagesThatInferenceLeavesOut:
    def test_are_told_and_the_others_judged(self, tmp_path: Path) -> None:
        data = write_strips(tmp_path / "data")
        samples = datasets.strips(data, "test")
        (samples[1].path).write_bytes(b"no picture")

        found = evaluate(lambda x: x[:, :1] * 0 - 9, samples, SPEC, InferenceConfig())

        assert found.num_pictures == len(samples) - 1
        assert len(found.failures) == 1 and str(samples[1].path) in found.failures[0]

    def test_are_those_of_another_sensor_too(self, tiny: Bundle, tmp_path: Path) -> None:
        data = write_strips(tmp_path / "data")
        path = datasets.strips(data, "test")[1].path
        planes.write(path, np.full_like(planes.read(path), 60_000, np.uint16))

        with closing(opened(tiny, lambda feeds: {"logits": feeds["planes"][:, :1] * 0})) as system:
            found = system.evaluate(data)

        assert [f"{path}: planes have a mean of 60000" in each for each in found.failures] == [True]

    def test_are_an_error_where_there_are_no_others(self, tmp_path: Path) -> None:
        data = write_strips(tmp_path / "data")
        samples = datasets.strips(data, "test")
        for sample in samples:
            sample.path.write_bytes(b"no picture")
        with pytest.raises(ImageError, match="no image can be judged"):
            evaluate(lambda x: x[:, :1] * 0 - 9, samples, SPEC, InferenceConfig())


class TestEvaluate:
    def test_a_graph_that_finds_everything_is_perfect(self, tiny: Bundle, data: Path) -> None:
        system = open_system(tiny, backend="ort", precision="float", threads=1)
        seen: list[tuple[int, int]] = []

        metrics = system.evaluate(data, progress=lambda done, of: seen.append((done, of))).metrics

        for key in ("image_auroc", "recall_at_1_false", "recall_at_30", "recall"):
            assert metrics[key] == 1
        # all nine pixels of a spot lie above all others
        assert metrics["pixel_ap"] == pytest.approx(1, abs=1e-9)
        assert metrics["false_per_image"] == 0
        assert seen == [(4, 8), (8, 8)]
        system.close()

    def test_a_blind_graph_is_as_good_as_chance(self, data: Path) -> None:
        samples = datasets.strips(data, "test")
        found = evaluate(lambda x: x[:, :1] * 0 - 9, samples, SPEC, InferenceConfig()).metrics
        assert found["image_auroc"] == 0.5
        assert found["pixel_auroc"] == 0.5
        assert "recall" not in found  # no threshold was given

    def test_without_masks_only_images_are_judged(self, tmp_path: Path, tiny: Bundle) -> None:
        root = write_strips(tmp_path, num_good=2, num_defective=2)
        for mask in (root / "ground_truth" / "spot").iterdir():
            mask.unlink()
        system = open_system(tiny, backend="ort", precision="float", threads=1)
        metrics = system.evaluate(root).metrics
        assert metrics["image_auroc"] == 1
        assert not [key for key in metrics if "pixel" in key or "recall" in key]
        system.close()

    def test_a_mask_of_another_size_is_refused(self, tmp_path: Path, tiny: Bundle) -> None:
        root = write_strips(tmp_path, num_good=1, num_defective=1)
        images.write(root / "ground_truth/spot/000_mask.png", np.full((9, 9), 255, np.uint8))
        system = open_system(tiny, backend="ort", precision="float", threads=1)
        with pytest.raises(DatasetError, match="another shape"):
            system.evaluate(root)
        system.close()

    def test_a_folder_without_a_test_set_is_refused(self, tmp_path: Path, tiny: Bundle) -> None:
        system = opened(tiny, lambda feeds: {})
        with pytest.raises(DatasetError, match="no images for 'test'"):
            system.evaluate(tmp_path)


def test_captures_in_three_folders_are_judged_alike(tmp_path: Path, tiny: Bundle) -> None:
    one = write_strips(tmp_path / "one", num_good=2, num_defective=2)
    three = tmp_path / "three"
    for path in sorted(one.rglob("*.png")):
        relative = path.relative_to(one)
        if relative.parts[0] == "ground_truth":
            images.write(three / relative, images.read_mask(path))
            continue
        for i, name in enumerate(("target", "ref1", "ref2")):
            plane = np.ascontiguousarray(planes.read(path)[..., i])
            images.write(three / relative.parent / name / relative.name, plane)
    system = open_system(tiny, backend="ort", precision="float", threads=1)
    assert system.evaluate(three).metrics == system.evaluate(one).metrics
    system.close()
