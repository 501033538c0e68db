from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from engineworks.export.legality import check_legal
from engineworks.runtime import datasets
from engineworks.runtime.bundle import read
from engineworks.runtime.engines import Engine, open_engine
from engineworks.runtime.errors import EngineError, InputError
from engineworks.runtime.images import read as read_image
from engineworks.runtime.images import read_mask
from engineworks.runtime.references import read_references
from engineworks.runtime.systems import Promptable, open_system
from engineworks.runtime.tensors import TensorSpec
from engineworks.runtime.testing import (
    FunctionEngine,
    draw_flower,
    draw_part,
    draw_scene,
    tiny_classifier,
    tiny_detect,
    tiny_encode,
    tiny_features,
    write_flowers,
    write_parts,
    write_scenes,
    write_tiny_noising_bundle,
    write_tiny_paco_bundle,
    write_tiny_refdet_bundle,
)

X = TensorSpec(dtype="float32", shape=("batch", 3))


def doubling() -> FunctionEngine:
    return FunctionEngine(lambda feeds: {"y": 2 * feeds["x"]}, inputs={"x": X}, outputs={"y": X})


class TestAFunctionEngine:
    def test_is_an_engine_that_answers_with_the_function(self) -> None:
        engine: Engine = doubling()

        answer = engine.run({"x": np.ones((2, 3), np.float32)})

        np.testing.assert_array_equal(answer["y"], np.full((2, 3), 2, np.float32))

    def test_remembers_its_feeds_as_they_were(self) -> None:
        engine = doubling()
        feed = np.ones((1, 3), np.float32)

        engine.run({"x": feed})
        feed[:] = 7
        engine.run({"x": feed})

        assert [call["x"][0, 0] for call in engine.calls] == [1, 7]

    def test_hands_out_what_belongs_to_the_caller(self) -> None:
        kept = np.zeros((1, 3), np.float32)
        engine = FunctionEngine(lambda _feeds: {"y": kept}, inputs={"x": X}, outputs={"y": X})

        engine.run({"x": kept})["y"][:] = 5

        assert not kept.any()

    @pytest.mark.parametrize(
        "feeds",
        [
            {},
            {"x": np.ones((2, 3), np.float64)},
            {"x": np.ones((2, 4), np.float32)},
            {"x": np.ones((2, 3), np.float32), "z": np.ones(1)},
        ],
        ids=["missing", "dtype", "shape", "unknown"],
    )
    def test_refuses_feeds_as_a_real_one_does(self, feeds: dict[str, np.ndarray]) -> None:
        engine = doubling()

        with pytest.raises(InputError):
            engine.run(feeds)
        assert engine.calls == []

    def test_refuses_an_answer_that_does_not_fit_its_outputs(self) -> None:
        engine = FunctionEngine(
            lambda feeds: {"y": feeds["x"][:, :2]}, inputs={"x": X}, outputs={"y": X}
        )

        with pytest.raises(InputError, match=r"\(1, 2\)"):
            engine.run({"x": np.ones((1, 3), np.float32)})

    def test_takes_no_stream(self) -> None:
        with pytest.raises(EngineError, match="no CUDA stream"):
            doubling().run({"x": np.ones((1, 3), np.float32)}, stream=1)

    def test_closed_twice_is_closed(self) -> None:
        engine = doubling()
        engine.close()
        engine.close()

        with pytest.raises(EngineError, match="closed"):
            engine.run({"x": np.ones((1, 3), np.float32)})


class TestDrawnParts:
    @pytest.mark.parametrize("size", [(64, 64), (48, 96)])
    def test_differ_from_good_ones_where_they_are_marked(self, size: tuple[int, int]) -> None:
        good, unmarked = draw_part(np.random.default_rng(3), size, defective=False)
        bad, marked = draw_part(np.random.default_rng(3), size, defective=True)

        assert good.shape == bad.shape == (*size, 3)
        assert good.dtype == bad.dtype == np.uint8
        assert not unmarked.any()
        assert 0 < marked.sum() < 0.2 * marked.size
        # a bright yellow on grey: the red channel stands far from every good pixel
        assert bad[marked][:, 0].min() > good[..., 0].max()

    def test_make_a_folder_that_the_reader_of_data_sets_knows(self, tmp_path: Path) -> None:
        root = write_parts(tmp_path / "parts", num_train=3, num_good=2, num_defective=2)

        train, test = datasets.mvtec(root, "train"), datasets.mvtec(root, "test")

        assert [sample.label for sample in train] == [0, 0, 0]
        assert [(sample.defect, sample.label) for sample in test] == [
            *[("good", 0)] * 2,
            *[("scratch", 1)] * 2,
        ]
        assert test[-1].mask_path is not None
        mask = read_mask(test[-1].mask_path)
        assert mask.shape == read_image(test[-1].path).shape[:2]
        assert set(np.unique(mask)) == {0, 255}

    def test_are_the_same_for_the_same_seed(self, tmp_path: Path) -> None:
        first = write_parts(tmp_path / "a", seed=5) / "test" / "scratch" / "001.png"
        second = write_parts(tmp_path / "b", seed=5) / "test" / "scratch" / "001.png"
        other = write_parts(tmp_path / "c", seed=6) / "test" / "scratch" / "001.png"

        assert first.read_bytes() == second.read_bytes() != other.read_bytes()


class TestTheTinyBundle:
    def test_is_a_bundle_that_every_backend_runs_and_that_finds_defects(
        self, tmp_path: Path
    ) -> None:
        made = write_tiny_noising_bundle(tmp_path / "tiny", int8=True)
        parts = write_parts(tmp_path / "parts")

        assert read(tmp_path / "tiny") == made
        for backend in ("ort", "openvino"):
            for precision in ("float", "int8"):
                system = open_system(made, backend=backend, precision=precision, threads=1)
                found = system.evaluate(parts).metrics
                system.close()
                assert found["image_auroc"] == 1.0
                assert found["pixel_auroc"] > 0.97

    def test_may_be_oblong_and_float_only(self, tmp_path: Path) -> None:
        made = write_tiny_noising_bundle(tmp_path / "tiny", size=(48, 96))

        assert set(made.manifest.graphs["features"].variants) == {"float"}
        system = open_system(made, backend="ort", threads=1)
        (result,) = system.infer([np.zeros((10, 20, 3), np.uint8)])
        assert result.map_HW.shape == (48, 96)
        system.close()

    def test_is_the_same_every_time(self, tmp_path: Path) -> None:
        first = write_tiny_noising_bundle(tmp_path / "a", int8=True)
        second = write_tiny_noising_bundle(tmp_path / "b", int8=True)

        assert first.manifest.digest == second.manifest.digest


class TestTheTinyGraph:
    def test_in_int8_is_legal(self) -> None:
        check_legal(tiny_features(zero_point=0))

    @pytest.mark.parametrize("backend", ["ort", "openvino"])
    def test_in_int8_is_close_to_float(self, backend: str, rng: np.random.Generator) -> None:
        feeds = {"images": rng.uniform(-2, 2, (2, 3, 64, 64)).astype(np.float32)}
        answers = []
        for zero_point in (None, 0 if backend == "openvino" else 128):
            model = tiny_features(zero_point=zero_point).SerializeToString()
            precision = "float" if zero_point is None else "int8"
            engine = open_engine(model, backend, precision=precision, threads=1)
            answers.append(engine.run(feeds)["features"])
            engine.close()

        want, got = answers
        assert want.shape == (2, 64, 16)
        # two layers with steps of 1/127 of ranges about twice as wide as needed
        assert np.abs(got - want).max() < 0.05 * np.abs(want).max()
        assert np.abs(got - want).max() > 0

    def test_has_a_free_batch_and_a_fixed_size(self) -> None:
        (value,) = tiny_features((48, 96)).graph.input

        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        assert axes == ["batch", 3, 48, 96]
        onnx.checker.check_model(tiny_features((48, 96)), full_check=True)


class TestDrawnFlowers:
    def test_make_a_folder_that_the_reader_of_data_sets_knows(self, tmp_path: Path) -> None:
        root = write_flowers(tmp_path / "flowers", num_train=3, num_test=2)

        train, test = datasets.class_folder(root, "train"), datasets.class_folder(root, "test")

        assert train.labels == ("blue", "green", "red", "violet", "white", "yellow")
        assert [sample.label for sample in train.samples] == [i for i in range(6) for _ in range(3)]
        assert [sample.label for sample in test.samples] == [i for i in range(6) for _ in range(2)]

    @pytest.mark.parametrize("size", [(64, 64), (48, 96)])
    def test_have_the_colour_of_their_label(self, size: tuple[int, int]) -> None:
        red = draw_flower(np.random.default_rng(3), size, "red")
        green = draw_flower(np.random.default_rng(3), size, "green")

        assert red.shape == (*size, 3)
        assert red.dtype == np.uint8
        petals = red[..., 0] > 150
        assert 0.1 < petals.mean() < 0.6
        assert (red[petals][:, 0] > red[petals][:, 1]).all()
        assert (green[petals][:, 0] < green[petals][:, 1]).all()


class TestTheTinyClassifier:
    def test_is_a_bundle_that_every_backend_runs_and_that_knows_flowers(
        self, tmp_path: Path
    ) -> None:
        made = write_tiny_paco_bundle(tmp_path / "tiny", int8=True)
        flowers = write_flowers(tmp_path / "flowers")

        assert read(tmp_path / "tiny") == made
        for backend in ("ort", "openvino"):
            for precision in ("float", "int8"):
                system = open_system(made, backend=backend, precision=precision, threads=1)
                found = system.evaluate(flowers).metrics
                system.close()
                assert found["top1"] == 1.0

    def test_may_be_oblong_and_float_only(self, tmp_path: Path) -> None:
        made = write_tiny_paco_bundle(tmp_path / "tiny", size=(48, 96))

        assert set(made.manifest.graphs["classify"].variants) == {"float"}
        system = open_system(made, backend="ort", threads=1)
        (result,) = system.infer([np.zeros((10, 20, 3), np.uint8)])
        assert result.to_json()["label"] in made.manifest.labels
        system.close()

    def test_is_the_same_every_time(self, tmp_path: Path) -> None:
        first = write_tiny_paco_bundle(tmp_path / "a", int8=True)
        second = write_tiny_paco_bundle(tmp_path / "b", int8=True)

        assert first.manifest.digest == second.manifest.digest

    def test_in_int8_is_legal(self) -> None:
        weight = np.random.default_rng(0).normal(size=(3, 16))

        check_legal(tiny_classifier((64, 64), weight, np.zeros(3), zero_point=0))


class TestDrawnScenes:
    @pytest.mark.parametrize("size", [(64, 96), (96, 144), (128, 128)])
    def test_show_each_object_in_its_box_and_apart(self, size: tuple[int, int]) -> None:
        rng = np.random.default_rng(3)
        for _ in range(10):
            image, boxes = draw_scene(rng, size, ["red", "green", "white"])
            assert image.shape == (*size, 3)
            means = []
            grey = np.ones(size, bool)
            for x1, y1, x2, y2 in np.rint(boxes).astype(int):
                means.append(image[y1:y2, x1:x2].mean(axis=(0, 1)))
                assert grey[y1:y2, x1:x2].all()  # nothing else is there
                grey[y1:y2, x1:x2] = False
            red, green, white = means
            assert red[0] > 240 > 60 > red[1]
            assert green[1] > 220 > 60 > green[0]
            assert white.min() > 240
            assert abs(image[grey].mean() - 128) < 2

    def test_make_a_folder_in_cocos_form_with_references(self, tmp_path: Path) -> None:
        root = write_scenes(tmp_path / "scenes", num_train=3, num_test=2)

        content = json.loads((root / "annotations_test.json").read_text())
        assert [each["name"] for each in content["categories"]] == ["blue", "red", "yellow"]
        assert [each["file_name"] for each in content["images"]] == ["test_000.png", "test_001.png"]
        for found in content["annotations"]:
            file = content["images"][found["image_id"] - 1]["file_name"]
            x, y, width, height = (round(n) for n in found["bbox"])
            inside = read_image(root / "images" / file)[y : y + height, x : x + width]
            assert inside.mean(axis=(0, 1)).max() > 240
        assert len(json.loads((root / "annotations_train.json").read_text())["images"]) == 3
        references = read_references(root / "references")
        assert {name: len(each) for name, each in references.items()} == dict.fromkeys(
            ("blue", "red", "yellow"), 2
        )


class TestTheTinyDetector:
    def test_is_a_bundle_that_every_backend_runs_and_that_finds_squares(
        self, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        made = write_tiny_refdet_bundle(tmp_path / "tiny", int8=True, names=("white", "red"))
        image, boxes = draw_scene(rng, (64, 96), ["red", "green", "white"])

        assert read(tmp_path / "tiny") == made
        for backend in ("ort", "openvino"):
            for precision in ("float", "int8"):
                system = open_system(made, backend=backend, precision=precision, threads=1)
                assert isinstance(system, Promptable)
                (result,) = system.infer([image])
                system.close()
                assert {found.name: found.box for found in result.objects} == {
                    "red": tuple(boxes[0]),
                    "white": tuple(boxes[2]),
                }

    def test_is_the_same_every_time(self, tmp_path: Path) -> None:
        first = write_tiny_refdet_bundle(tmp_path / "a", int8=True)
        second = write_tiny_refdet_bundle(tmp_path / "b", int8=True)

        assert first.manifest.digest == second.manifest.digest

    def test_in_int8_is_legal(self) -> None:
        check_legal(tiny_encode(zero_point=0))
        check_legal(tiny_detect(zero_point=0))

    def test_has_a_free_batch_and_a_free_number_of_objects(self) -> None:
        values = tiny_detect((48, 96)).graph.input
        axes = [
            [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            for value in values
        ]
        assert axes == [["batch", 3, 48, 96], ["objects", 6]]
        onnx.checker.check_model(tiny_detect((48, 96)), full_check=True)
