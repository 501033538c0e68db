from __future__ import annotations

import csv
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineworks.runtime import images
from engineworks.runtime.bundle import Bundle, GraphEntry, Manifest
from engineworks.runtime.errors import BundleError, EngineError, InputError
from engineworks.runtime.infer import infer
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.results import Embedding
from engineworks.runtime.sources import open_source
from engineworks.runtime.systems import open_system
from engineworks.runtime.systems.backbone import NAME, Params, System, embed, map_names
from engineworks.runtime.tensors import Array, TensorSpec
from engineworks.runtime.testing import (
    FunctionEngine,
    draw_flower,
    write_flowers,
    write_tiny_backbone_bundle,
)

SPEC = PreprocessSpec(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))


def bundle(params: dict[str, Any] | None = None) -> Bundle:
    """A bundle whose graph, with a token and two maps, stands in no file."""
    shapes: dict[str, tuple[int | str, ...]] = {
        "token": ("batch", 3),
        "stage0": ("batch", 3, 4, 4),
        "stage1": ("batch", 3, 2, 2),
    }
    entry = GraphEntry(
        inputs={"images": TensorSpec(dtype="float32", shape=("batch", 3, 8, 8))},
        outputs={name: TensorSpec(dtype="float32", shape=s) for name, s in shapes.items()},
        variants={"float": "features.onnx"},
    )
    manifest = Manifest(
        system=NAME,
        graphs={"features": entry},
        preprocess=SPEC,
        params=Params(name="net", stages=(0, 1)).model_dump(mode="json")
        if params is None
        else params,
    )
    return Bundle(root=Path("somewhere"), manifest=manifest)


def system(scale: float = 1.0) -> System:
    """Maps are means over squares of the image, the token is its first pixel."""
    made = bundle()
    entry = made.manifest.graphs["features"]

    def features(feeds: Any) -> dict[str, Array]:
        x = np.float32(scale) * feeds["images"]
        stages = {
            f"stage{i}": x.reshape(len(x), 3, side, 8 // side, side, 8 // side).mean((3, 5))
            for i, side in enumerate((4, 2))
        }
        return {"token": x[:, :, 0, 0], **stages}

    engine = FunctionEngine(features, entry.inputs, entry.outputs)
    return System(made, {"features": engine}, backend="function", precision="float")


def flat(red: int, green: int, blue: int) -> Array:
    return np.full((10, 12, 3), (red, green, blue), np.uint8)


class TestAnEmbedding:
    def test_is_the_token_and_the_means_of_the_maps_each_of_length_1(
        self, rng: np.random.Generator
    ) -> None:
        outputs = {
            "token": rng.normal(size=(2, 5)).astype(np.float32),
            "stage1": rng.normal(size=(2, 4, 3, 3)).astype(np.float32),
            "stage2": rng.normal(size=(2, 6, 2, 1)).astype(np.float32),
        }
        found = embed(outputs)
        for b in range(2):
            parts = [outputs["token"][b].astype(np.float64)]
            parts += [
                np.array([channel.astype(np.float64).mean() for channel in outputs[name][b]])
                for name in ("stage1", "stage2")
            ]
            want = np.concatenate([part / np.sqrt((part**2).sum()) for part in parts]) / np.sqrt(3)
            # one rounding to float32
            np.testing.assert_allclose(found[b], want, rtol=0, atol=1e-7)
        assert found.dtype == np.float32
        np.testing.assert_allclose((found.astype(float) ** 2).sum(1), 1, atol=1e-6)

    def test_of_nothing_but_zeros_is_zero(self) -> None:
        assert not embed({"map": np.zeros((1, 3, 2, 2), np.float32)}).any()

    def test_does_not_depend_on_the_scale_of_the_features(self) -> None:
        (one,) = system().infer([flat(9, 200, 100)])
        (other,) = system(scale=1000).infer([flat(9, 200, 100)])
        np.testing.assert_allclose(one.vector_F, other.vector_F, atol=1e-6)  # float32

    def test_to_no_picture_is_none(self) -> None:
        opened = system()
        assert opened.infer([]) == []
        assert opened.engines["features"].calls == []  # type: ignore[attr-defined]

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_that_is_not_finite_is_refused(self, bad: float) -> None:
        with (
            pytest.raises(EngineError, match=r"'features' graph .* not finite") as caught,
            np.errstate(invalid="ignore"),
        ):
            system(scale=bad).infer([flat(1, 2, 3)])
        assert "--precision float" in str(caught.value.fix)

    def test_goes_into_one_json_line(self) -> None:
        found = Embedding(np.array([0.6, -0.8], np.float32))
        assert json.loads(json.dumps(found.to_json())) == {"embedding": [0.6, -0.8]}
        assert found.summary() == "2 numbers: +0.600, -0.800, ..."

    def test_is_not_drawn(self) -> None:
        picture = flat(1, 2, 3)
        (found,) = system().infer([picture])
        np.testing.assert_array_equal(system().draw(picture, found), picture)


class TestABundle:
    def test_of_other_parameters_is_refused(self) -> None:
        with pytest.raises(BundleError, match="not those of 'backbone'"):
            System(bundle({"stages": [1]}), {}, backend="ort", precision="float")

    def test_tells_which_outputs_are_maps(self) -> None:
        assert map_names(bundle().manifest) == ["stage0", "stage1"]

    @pytest.mark.parametrize("precision", ["float", "int8"])
    @pytest.mark.parametrize("backend", ["ort", "openvino"])
    def test_finds_pictures_of_one_class_alike(
        self, backend: str, precision: str, tmp_path: Path
    ) -> None:
        made = write_tiny_backbone_bundle(tmp_path / "bundle", int8=True)
        data = write_flowers(tmp_path / "data", num_test=4)
        seen: list[tuple[int, int]] = []
        with closing(open_system(made, backend=backend, precision=precision)) as opened:
            found = opened.evaluate(data, progress=lambda done, of: seen.append((done, of))).metrics
        assert found == {"top1": 1.0}
        assert seen == [(8, 24), (16, 24), (24, 24)]

    def test_judges_only_where_a_class_has_two_pictures(self, tmp_path: Path) -> None:
        made = write_tiny_backbone_bundle(tmp_path / "bundle")
        data = write_flowers(tmp_path / "data", num_test=1)
        with (
            closing(open_system(made)) as opened,
            pytest.raises(InputError, match="of 6 pictures no two are of one class"),
        ):
            opened.evaluate(data)

    def test_gives_a_column_per_number(self, tmp_path: Path) -> None:
        made = write_tiny_backbone_bundle(tmp_path / "bundle")
        picture = draw_flower(np.random.default_rng(0), (64, 64), "red")
        images.write(tmp_path / "red.png", picture)
        with closing(open_system(made)) as opened:
            (want,) = opened.infer([picture])
            infer(opened, open_source(str(tmp_path / "red.png")), tmp_path / "out")
        with (tmp_path / "out" / "results.csv").open(newline="", encoding="utf-8") as file:
            (row,) = csv.DictReader(file)
        assert isinstance(want, Embedding)
        numbers = [float(row[f"embedding.{i}"]) for i in range(16)]
        np.testing.assert_allclose(numbers, want.vector_F, atol=1e-7)  # rounded to 7 places
