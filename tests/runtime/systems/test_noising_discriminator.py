from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engineworks.runtime import bundle as bundles
from engineworks.runtime import preprocess
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.errors import BundleError, EngineError
from engineworks.runtime.systems import extend, noising
from engineworks.runtime.systems.noising.fit import FitConfig, calibrate
from engineworks.runtime.systems.noising.signals import (
    Statistics,
    anomaly_map,
)
from engineworks.runtime.tensors import Array, TensorSpec
from engineworks.runtime.testing import (
    FunctionEngine,
    write_parts,
    write_tiny_noising_bundle,
)
from tests.runtime.systems.noising_opened import open_noising, pictures


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("noising") / "bundle")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


class TestTheUnitOfADiscriminator:
    grid = (4, 6)

    def scores(self, num: int = 40) -> Array:
        rng = np.random.default_rng(0)
        return (rng.standard_normal((num, 24)) * 3 - 7).astype(np.float32)

    def test_is_the_spread_of_held_out_patches(self) -> None:
        scores = self.scores()
        params, _ = calibrate(scores, self.grid, (32, 48), FitConfig())
        exact = scores.astype(np.float64)
        assert params.scores.mean == pytest.approx(exact.mean(), rel=1e-12)
        assert params.scores.std == pytest.approx(exact.std(), rel=1e-12)
        want = (exact[0] - exact.mean()) / exact.std()
        # float32
        np.testing.assert_allclose(params.standardise(scores[0]), want, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("budget", [0.0, 0.1])
    def test_has_thresholds_that_keep_the_budget(self, budget: float) -> None:
        scores = self.scores()
        config = FitConfig(false_reject=budget, smoothing=2.0, image_score="patch", rule="rank")
        params, thresholds = calibrate(scores, self.grid, (32, 48), config)
        standard = [params.standardise(scores_N) for scores_N in scores]
        rejected = sum(s.max() >= thresholds["image"].value for s in standard)
        assert rejected == budget * len(scores)
        maps = [anomaly_map(s, self.grid, (32, 48), 2.0) for s in standard]
        assert sum(m.max() >= thresholds["pixel"].value for m in maps) == budget * len(scores)
        assert "40 held-out training pictures" in thresholds["image"].source

    def test_of_scores_that_are_all_alike_is_not_nothing(self) -> None:
        params, thresholds = calibrate(
            np.zeros((3, 24), np.float32), self.grid, (32, 48), FitConfig()
        )
        assert params.scores.std > 0 and thresholds["image"].value > 0


def brightness_graph() -> onnx.ModelProto:
    """images (batch, 3, 64, 64) -> scores (batch, 64): twice a patch's mean colours."""
    weight = numpy_helper.from_array(np.full((1, 3, 8, 8), 2 / 64, np.float32), "weight")
    shape = numpy_helper.from_array(np.array([0, -1], np.int64), "shape")
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["map"], strides=[8, 8], name="conv"),
        helper.make_node("Reshape", ["map", "shape"], ["scores"], name="flatten"),
    ]
    images_info = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 64, 64])
    scores_info = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 64])
    graph = helper.make_graph(nodes, "brightness", [images_info], [scores_info], [weight, shape])
    opset = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opset, ir_version=10)


@pytest.fixture(scope="module")
def bankless(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose discriminator takes what is bright for a defect."""
    work = tmp_path_factory.mktemp("bankless")
    onnx.save(brightness_graph(), work / "discriminate.onnx")
    params = noising.DiscriminatorParams(
        grid=(8, 8), smoothing=2.0, scores=Statistics(mean=1.5, std=0.25)
    )
    specs = {
        "inputs": {"images": TensorSpec(dtype="float32", shape=("batch", 3, 64, 64))},
        "outputs": {"scores": TensorSpec(dtype="float32", shape=("batch", 64))},
    }
    manifest = bundles.Manifest(
        system=noising.NAME,
        graphs={
            "discriminate": bundles.GraphEntry(**specs, variants={"float": "discriminate.onnx"})
        },
        preprocess=preprocess.PreprocessSpec(size=(64, 64)),
        thresholds={
            "image": bundles.Threshold(value=2.0, source="drawn"),
            "pixel": bundles.Threshold(value=1.0, source="drawn"),
        },
        params=params.model_dump(mode="json"),
    )
    return bundles.write(
        work / "bundle", manifest, {"discriminate.onnx": work / "discriminate.onnx"}
    )


class TestASystemWithADiscriminator:
    @pytest.mark.parametrize("backend", ["openvino", "ort"])
    def test_answers_with_the_graphs_scores_in_its_unit(
        self, bankless: Bundle, backend: str
    ) -> None:
        pictures_of_both = pictures(3)
        batch = preprocess.apply(bankless.manifest.preprocess, pictures_of_both)
        patches = batch.astype(np.float64).reshape(3, 3, 8, 8, 8, 8).mean(axis=(3, 5))
        with closing(open_noising(bankless, backend=backend, threads=1)) as system:
            results = system.infer(pictures_of_both)
            assert system.infer([]) == []
        for patch_C88, result in zip(patches, results, strict=True):
            want = (2 * patch_C88.sum(axis=0).ravel() - 1.5) / 0.25
            # float32 sums of 192 products
            assert result.score == pytest.approx(want.max(), rel=1e-4, abs=1e-4)
            want_map = anomaly_map(want, (8, 8), (64, 64), 2.0)
            np.testing.assert_allclose(result.map_HW, want_map, rtol=1e-4, atol=1e-4)
            assert result.influence_HW is None
            assert (result.threshold, result.pixel_threshold) == (2.0, 1.0)
            assert result.is_anomalous == (result.score >= 2.0)

    def test_is_judged_and_drawn_as_any_other(self, bankless: Bundle, parts: Path) -> None:
        (image,) = pictures(1)
        with closing(open_noising(bankless, backend="ort", threads=1)) as system:
            (result,) = system.infer([image])
            assert system.draw(image, result).dtype == np.uint8
            assert 0 <= system.evaluate(parts).metrics["image_auroc"] <= 1

    def test_refuses_scores_that_are_not_finite(self, bankless: Bundle) -> None:
        entry = bankless.manifest.graphs["discriminate"]
        engine = FunctionEngine(
            lambda feeds: {"scores": np.full((len(feeds["images"]), 64), np.nan, np.float32)},
            entry.inputs,
            entry.outputs,
        )
        system = open_noising(bankless, backend="ort", engines={"discriminate": engine})
        with pytest.raises(EngineError, match="'discriminate'"):
            system.infer(pictures(1))

    def test_has_no_bank_that_could_be_extended(
        self, bankless: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(BundleError, match="has no bank") as caught:
            extend(bankless, parts / "train/good", tmp_path / "out", max_rows=5)
        assert "judge=bank" in str(caught.value.fix)
        assert not (tmp_path / "out").exists()

    def test_with_parameters_of_a_bank_is_refused(self, bankless: Bundle, tiny: Bundle) -> None:
        mixed = bankless.manifest.model_copy(update={"params": tiny.manifest.params})
        with pytest.raises(BundleError, match="parameters"):
            open_noising(replace(bankless, manifest=mixed), backend="ort")
