"""``paco`` from a run to a bundle and to its rival, with a small random net."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from accelerate.state import AcceleratorState

from engineworks.export.systems.paco import RECIPE
from engineworks.export.trace import trace
from engineworks.runtime import datasets
from engineworks.runtime.bundle import Bundle, read
from engineworks.runtime.errors import BundleError, RunError
from engineworks.runtime.preprocess import apply
from engineworks.runtime.systems import open_engines, open_system
from engineworks.runtime.systems.paco import Params, System
from engineworks.runtime.testing import write_flowers
from engineworks.training.backbones import read_weights
from engineworks.training.config import load_config
from engineworks.training.run import Run, open_run
from engineworks.training.systems.paco import eager
from engineworks.training.train import train

pytestmark = pytest.mark.train

SETTINGS = [
    "backbone.name=resnet10t",
    "backbone.weights=none",
    "preprocess.size=[64, 64]",
    "parts.width=8",
    "num_overlays=0",
    "train.device=cpu",
    "train.epochs=1",
    "train.batch_size=6",
]


def make(folder: Path, flowers: Path, *overrides: str) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(load_config("paco", None, [*SETTINGS, *overrides]), flowers, folder)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flowers(tmp_path_factory.mktemp("flowers") / "data", num_train=2, num_test=2)


@pytest.fixture(scope="module")
def run(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("runs") / "run", flowers, "parts.refresh=2")


@pytest.fixture(scope="module")
def bundle(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return trace(run.root, tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="module")
def pictures(flowers: Path) -> list[np.ndarray]:
    return [datasets.read(s) for s in datasets.class_folder(flowers, "test").samples[::3]]


class TestTheBundle:
    def test_answers_as_torch_does(
        self, run: Run, bundle: Bundle, pictures: list[np.ndarray]
    ) -> None:
        assert read(bundle.root) == bundle
        parity = bundle.manifest.reports["parity"]["torch-float"]["classify"]
        assert set(parity) == {"logits", "embedding"}
        assert all(output["max_rel"] < RECIPE.tolerance for output in parity.values())
        batch = apply(bundle.manifest.preprocess, pictures)
        with torch.no_grad():
            wants = eager.trained_net(run)(torch.from_numpy(batch))
        engine = open_engines(bundle, "ort", "float", threads=1)["classify"]
        found = engine.run({"images": batch})
        engine.close()
        for name, want in zip(("logits", "embedding"), wants, strict=True):
            # float32 sums in another order
            assert np.abs(found[name] - want.numpy()).max() < 1e-4 * want.abs().max()

    def test_has_one_static_graph_without_what_trained_it(self, bundle: Bundle) -> None:
        (graph,) = bundle.manifest.graphs.values()
        assert graph.inputs["images"].shape == ("batch", 3, 64, 64)
        assert graph.outputs["logits"].shape == ("batch", 6)
        assert graph.outputs["embedding"].shape == ("batch", 512)
        model = onnx.load(bundle.path("classify.onnx"))
        ops = {node.op_type for node in model.graph.node}
        assert not ops & {"Shape", "BatchNormalization", "Identity", "Softmax", "If", "TopK"}
        assert not [t.name for t in model.graph.initializer if "reduction" in t.name]

    def test_names_the_classes_in_the_order_of_the_logits(self, run: Run, bundle: Bundle) -> None:
        labels = ("blue", "green", "red", "violet", "white", "yellow")
        assert bundle.manifest.labels == labels
        assert bundle.manifest.gate == {"top1": 0.005}
        assert bundle.manifest.params == {"num_top": 5}
        assert (bundle.manifest.assets, bundle.manifest.thresholds) == ({}, {})

    def test_judges_as_training_did(self, run: Run, bundle: Bundle, flowers: Path) -> None:
        """Without ``val`` a run is judged on ``test``, as a bundle is."""
        system = System(
            bundle, open_engines(bundle, "ort", "float"), backend="ort", precision="float"
        )
        found = system.evaluate(flowers).metrics
        system.close()

        want = run.info.results["test"]
        assert isinstance(want, dict)
        # float32 kernels of two libraries
        assert found == pytest.approx(want, rel=1e-3, abs=1e-4)

    def test_of_a_frozen_run_is_the_same_kind(self, flowers: Path, tmp_path: Path) -> None:
        frozen = make(tmp_path / "run", flowers, "frozen=true")

        made = trace(frozen.root, tmp_path / "bundle")

        assert made.manifest.graphs["classify"].outputs["logits"].shape == ("batch", 6)

    def test_of_a_run_that_val_judged_knows_how_sure_it_may_be(
        self, flowers: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(flowers, tmp_path / "data")
        write_flowers(tmp_path / "more", num_train=0, num_test=3, seed=7)
        shutil.move(tmp_path / "more" / "test", tmp_path / "data" / "val")
        settings = ("frozen=true", "confidence.coverage=0.8", "confidence.budget=0.1")
        made = trace(make(tmp_path / "run", tmp_path / "data", *settings).root, tmp_path / "bundle")

        (known,) = made.params(Params).confidence.values()
        assert (known.num_pictures, known.coverage, known.budget) == (18, 0.8, 0.1)
        border = made.manifest.thresholds["unknown-float"]
        assert border.held_out is not None and border.held_out.count == 18
        with closing(open_system(made, backend="ort", precision="float")) as system:
            found = system.evaluate(tmp_path / "data").metrics
            fitted = system.fit_confidence(tmp_path / "data").params(Params).confidence["float"]
        assert {"ece", "ece_uncalibrated", "coverage", "set_size"} <= set(found)
        # logits of ONNX Runtime and of torch: float32 kernels of two libraries
        assert fitted.temperature == pytest.approx(known.temperature, rel=1e-3)
        assert fitted.limit == pytest.approx(known.limit, rel=1e-3)

    def test_of_a_run_without_labels_is_refused(self, run: Run, tmp_path: Path) -> None:
        shutil.copytree(run.root, tmp_path / "run")
        (tmp_path / "run" / "labels.json").unlink()
        with pytest.raises(RunError, match=r"labels\.json cannot be read"):
            trace(tmp_path / "run", tmp_path / "bundle")

    def test_with_a_label_too_few_is_refused_when_it_is_opened(
        self, run: Run, tmp_path: Path
    ) -> None:
        shutil.copytree(run.root, tmp_path / "run")
        (tmp_path / "run" / "labels.json").write_text(json.dumps(["a", "b"]))
        made = trace(tmp_path / "run", tmp_path / "bundle")
        with pytest.raises(BundleError, match=r"logits.*6"):
            open_system(made, backend="ort", precision="float")


class TestTheRival:
    def test_gives_the_answers_of_the_bundle(
        self,
        run: Run,
        bundle: Bundle,
        pictures: list[np.ndarray],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("shutil.which", lambda _name: None)
        system = System(
            bundle, open_engines(bundle, "ort", "float"), backend="ort", precision="float"
        )
        wants = system.infer(pictures)
        system.close()

        found = eager.contenders(run.root, bundle, threads=1, say=lambda _line: None)

        assert [(c.name, c.precision) for c in found] == [
            ("eager channels_last", "float"),
            ("eager channels_last", "bf16"),
        ]
        # float32 in another order; bfloat16 has 8 bits
        for contender, tolerance in zip(found, (1e-4, 0.05), strict=True):
            for got, want in zip(contender.path(pictures), wants, strict=True):
                assert got.label == bundle.manifest.labels[got.index]
                assert len(got.top) == 5
                assert got.probability == pytest.approx(want.probability, abs=tolerance)
                scale = np.abs(want.embedding_F).max()
                assert np.abs(got.embedding_F - want.embedding_F).max() < 2 * tolerance * scale

    def test_of_another_systems_run_is_refused(
        self, run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(eager, "open_run", lambda _root: Run(run.root, None, run.info))
        with pytest.raises(RunError, match="the bundle is of 'paco'"):
            eager.contenders(run.root, bundle, threads=1, say=lambda _line: None)


def test_the_net_alone_is_loaded_however_it_was_trained(run: Run) -> None:
    opened = open_run(run.root)
    backbone = opened.config.backbone.model_copy(update={"compile": True, "checkpointing": True})
    faster = opened.config.model_copy(update={"backbone": backbone})

    net = eager.trained_net(Run(opened.root, faster, opened.info))

    assert not net.training
    assert not [m for m in net.modules() if getattr(m, "grad_checkpointing", False)]
    assert not [m for m in net.modules() if m._compiled_call_impl is not None]
    saved = read_weights(opened.weights())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, saved[f"net.{name}"])
