"""``stripe`` from a run to a bundle and to its rivals, with a small random net."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from accelerate.state import AcceleratorState

from engineworks.export.systems.stripe import RECIPE
from engineworks.export.trace import trace
from engineworks.runtime import datasets, planes
from engineworks.runtime.bundle import Bundle, read
from engineworks.runtime.errors import RunError
from engineworks.runtime.preprocess import PlanesSpec, apply
from engineworks.runtime.systems import open_engines
from engineworks.runtime.systems.stripe import System
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import write_strips
from engineworks.training.config import load_config
from engineworks.training.run import Run
from engineworks.training.systems.stripe import eager
from engineworks.training.systems.stripe.eager import PublishedWindow
from engineworks.training.train import train

pytestmark = pytest.mark.train

SETTINGS = [
    "network.width=8",
    "network.depth=2",
    "tiles.size=32",
    "tiles.jitter=4",
    "defects.num=[3, 4]",
    "train.device=cpu",
    "train.epochs=1",
    "train.batch_size=8",
]


def make(folder: Path, data: Path, *overrides: str) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(load_config("stripe", None, [*SETTINGS, *overrides]), data, folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strips") / "data"
    return write_strips(folder, size=(129, 130), num_train=2, num_good=2, num_defective=2)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("runs") / "run", data)


@pytest.fixture(scope="module")
def bundle(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return trace(run.root, tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="module")
def strips(data: Path) -> list[Array]:
    return [planes.read(sample.path) for sample in datasets.strips(data, "test")]


def opened(bundle: Bundle) -> System:
    engines = open_engines(bundle, "ort", "float", threads=1)
    return System(bundle, engines, backend="ort", precision="float")


class TestTheBundle:
    def test_answers_as_torch_does_for_every_batch_and_size(
        self, run: Run, bundle: Bundle, rng: np.random.Generator
    ) -> None:
        assert read(bundle.root) == bundle
        net = eager.trained_net(run)
        engine = open_engines(bundle, "ort", "float", threads=1)["segment"]
        for batch, height, width in ((1, 128, 176), (3, 64, 32), (2, 2, 2)):
            raw = rng.uniform(0, 255, (batch, 3, height, width)).astype(np.float32)
            with torch.no_grad():
                want = net(torch.from_numpy(raw)).numpy()
            found = engine.run({"planes": raw})["logits"]
            assert found.shape == (batch, 1, height, width)
            # float32 sums in another order
            assert np.abs(found - want).max() < 1e-4 * np.abs(want).max()
        engine.close()

    def test_has_one_graph_of_free_size_that_rescales_by_itself(self, bundle: Bundle) -> None:
        (graph,) = bundle.manifest.graphs.values()
        assert graph.inputs["planes"].shape == ("batch", 3, "height", "width")
        # the exporter may derive the size from the input's: it is no fixed number
        assert graph.outputs["logits"].shape[:2] == ("batch", 1)
        assert all(isinstance(axis, str) for axis in graph.outputs["logits"].shape[2:])
        ops = {node.op_type for node in onnx.load(bundle.path("segment.onnx")).graph.node}
        assert not ops & {"Shape", "BatchNormalization", "Identity", "Sigmoid", "If"}
        assert graph.keep_float["nodes"] == sorted(RECIPE.keep_float.nodes)

    def test_says_what_training_found_and_what_the_graph_can_take(
        self, run: Run, bundle: Bundle
    ) -> None:
        manifest = bundle.manifest
        assert manifest.preprocess == PlanesSpec(size=(129, 130), multiple=2)
        assert manifest.params["value_range"] == [0.0, 255.0]
        assert set(manifest.thresholds) == {"candidate"}
        assert set(manifest.gate) == {"pixel_ap", "recall_at_1_false"}
        assert manifest.assets == {}

    def test_judges_as_training_did(self, run: Run, bundle: Bundle, data: Path) -> None:
        """Without ``valid`` a run is judged on ``test``, as a bundle is."""
        system = opened(bundle)
        found = system.evaluate(data).metrics
        system.close()

        want = run.info.results["test"]
        assert isinstance(want, dict)
        assert set(found) == set(want)
        # float32 kernels of two libraries, and an untrained net's many nearly equal scores
        assert found["pixel_ap"] == pytest.approx(want["pixel_ap"], rel=0.01)

    def test_knows_a_sensor_of_another_range(self, tmp_path: Path) -> None:
        root = write_strips(tmp_path / "data", size=(64, 64), num_train=2)
        for path in root.rglob("*/*/*.png"):
            if "ground_truth" not in path.parts:
                planes.write(path, planes.read(path).astype(np.uint16) * 16)
        run = make(tmp_path / "run", root, "value_range=[0.0, 4095.0]")

        system = opened(trace(run.root, tmp_path / "bundle"))
        (result,) = system.infer([planes.read(root / "test" / "good" / "000.png")])

        assert system.params.value_range == (0.0, 4095.0)
        assert result.map_HW.shape == (64, 64)
        system.close()

    def test_of_a_run_without_its_threshold_is_refused(self, run: Run, tmp_path: Path) -> None:
        shutil.copytree(run.root, tmp_path / "run")
        (tmp_path / "run" / "thresholds.json").unlink()
        with pytest.raises(RunError, match=r"thresholds\.json cannot be read"):
            trace(tmp_path / "run", tmp_path / "bundle")


class TestTheRivals:
    def test_give_the_answers_of_the_bundle(
        self, run: Run, bundle: Bundle, strips: list[Array], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.which", lambda _name: None)
        monkeypatch.setattr(eager, "_PUBLISHED", run.config.network)  # a quick one in its place
        system = opened(bundle)
        wants = system.infer(strips)
        system.close()

        published, floats, halves = eager.contenders(
            run.root, bundle, threads=1, say=lambda _line: None
        )

        assert [c.label for c in (published, floats, halves)] == [
            "published, tile by tile float",
            "eager channels_last float",
            "eager channels_last bf16",
        ]
        # float32 in another order; bfloat16 has 8 bits
        for contender, tolerance in ((floats, 1e-4), (halves, 0.05)):
            for got, want in zip(contender.path(strips), wants, strict=True):
                assert got.threshold == want.threshold
                assert np.abs(got.map_HW - want.map_HW).max() < tolerance
        batch = apply(bundle.manifest.preprocess, strips)
        assert floats.network(batch).shape == (4, 1, 130, 130)

    def test_the_published_way_covers_a_strip_tile_by_tile(
        self, bundle: Bundle, strips: list[Array]
    ) -> None:
        sizes: list[tuple[int, ...]] = []

        def network(tile: torch.Tensor) -> torch.Tensor:
            sizes.append(tuple(tile.shape))
            return (tile[:, :1] - 100) / 10

        published = PublishedWindow(network, bundle)
        results = published.infer(strips)

        assert sizes == [(1, 3, 128, 128)] * 4 * len(strips)
        for result, strip in zip(results, strips, strict=True):
            want = 1 / (1 + np.exp(-(strip[..., 0].astype(np.float64) - 100) / 10))
            # float32 arithmetic
            assert result.map_HW == pytest.approx(want, abs=1e-6)
            assert result.score == result.map_HW.max()

    def test_have_no_published_row_for_strips_smaller_than_its_tile(
        self, run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.which", lambda _name: None)
        spec = PlanesSpec(size=(96, 200), multiple=2)
        small = Bundle(bundle.root, bundle.manifest.model_copy(update={"preprocess": spec}))
        said: list[str] = []
        found = eager.contenders(run.root, small, threads=1, say=said.append)
        assert len(found) == 2
        assert "at least 128 pixels" in said[-1]

    def test_of_another_systems_run_are_refused(
        self, run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(eager, "open_run", lambda _root: Run(run.root, None, run.info))
        with pytest.raises(RunError, match="the bundle is of 'stripe'"):
            eager.contenders(run.root, bundle, threads=1, say=lambda _line: None)


@pytest.mark.slow
def test_the_published_network_is_exported_as_well(data: Path, tmp_path: Path) -> None:
    run = make(tmp_path / "run", data, "network.name=unet-se", "network.width=2")

    made = trace(run.root, tmp_path / "bundle")

    assert made.manifest.preprocess == PlanesSpec(size=(129, 130), multiple=32)
    parity = made.manifest.reports["parity"]["torch-float"]["segment"]["logits"]
    assert parity["max_rel"] < RECIPE.tolerance
    system = opened(made)
    (result,) = system.infer([np.full((50, 70, 3), 90, np.uint8)])
    assert result.map_HW.shape == (50, 70)
    system.close()
