"""Which epoch of a run becomes a bundle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from engineworks.export.config import ExportConfig
from engineworks.export.pipeline import export
from engineworks.export.trace import trace
from engineworks.runtime.bundle import Bundle, sha256_file
from engineworks.runtime.errors import RunError, UsageError
from engineworks.runtime.testing import write_flowers
from engineworks.training.backbones import read_weights
from engineworks.training.config import load_config
from engineworks.training.run import Run, open_run
from engineworks.training.train import train

pytestmark = pytest.mark.train

SETTINGS = [
    "backbone.name=resnet10t",
    "backbone.weights=none",
    "preprocess.size=[64, 64]",
    "frozen=true",
    "train.device=cpu",
    "train.batch_size=6",
]


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flowers(tmp_path_factory.mktemp("flowers") / "data", num_train=2, num_test=2)


@pytest.fixture(scope="module")
def trained(flowers: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    root = tmp_path_factory.mktemp("runs") / "run"
    run = train(load_config("paco", None, [*SETTINGS, "train.epochs=1"]), flowers, root)
    # the best epoch shall not be the last one, and never answer the first class
    best = {name: tensor.clone() for name, tensor in read_weights(run.weights()).items()}
    best["net.classifier.bias"] = torch.tensor([-1e3, *[0.0] * 5])
    save_file(best, run.weights("best"))
    return run


@pytest.fixture
def run(trained: Run, tmp_path: Path) -> Run:
    return open_run(Path(shutil.copytree(trained.root, tmp_path / "run")))


def bias(bundle: Bundle) -> float:
    """Of the first class, as the graph has it."""
    onnx = pytest.importorskip("onnx")
    (graph,) = bundle.manifest.graphs.values()
    model = onnx.load(bundle.path(graph.variants["float"]))
    (found,) = [
        onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.dims == [6]
    ]
    return float(found[0])


def test_is_the_best_one_unless_told_otherwise(run: Run, tmp_path: Path) -> None:
    assert bias(trace(run.root, tmp_path / "bundle")) == -1e3
    assert bias(trace(run.root, tmp_path / "again", weights="best")) == -1e3


def test_is_asked_for_like_any_option_of_an_export(run: Run, flowers: Path, tmp_path: Path) -> None:
    last = ExportConfig(options={"weights": "last"}, data=flowers)
    assert bias(export(run.root, tmp_path / "bundle", last)) > -1
    with pytest.raises(UsageError, match="best and its last weights, not 'none'"):
        export(run.root, tmp_path / "another", ExportConfig(options={"weights": "none"}))
    with pytest.raises(UsageError, match="--stages is for backbone:NAME alone"):
        export(run.root, tmp_path / "another", ExportConfig(options={"stages": "1"}))
    for config in (last, ExportConfig(data=flowers)):
        with pytest.raises(UsageError, match="is for a run"):
            export(tmp_path / "bundle", tmp_path / "another", config)


def test_is_the_last_one_where_the_data_are_there_to_judge_it(
    run: Run, flowers: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="its best weights") as refused:
        trace(run.root, tmp_path / "bundle", weights="last")
    assert "--data" in str(refused.value.fix)
    assert not (tmp_path / "bundle").exists()

    made = trace(run.root, tmp_path / "bundle", weights="last", data=flowers)

    assert bias(made) > -1
    assert made.manifest.provenance["run"]["weights"] == "last"
    now = open_run(run.root)
    assert (now.info.status, now.info.weights) == ("finished", "last")
    assert bias(trace(run.root, tmp_path / "again")) == bias(made)


def test_needs_no_data_where_the_last_one_is_the_best(run: Run, tmp_path: Path) -> None:
    shutil.copyfile(run.weights("last"), run.weights("best"))
    before = sha256_file(run.root / "run.json")
    assert bias(trace(run.root, tmp_path / "bundle", weights="last")) > -1
    assert sha256_file(run.root / "run.json") == before


def test_of_a_run_that_was_killed_needs_the_data(run: Run, flowers: Path, tmp_path: Path) -> None:
    run.updated(status="running", results={})
    (run.root / "labels.json").unlink()
    with pytest.raises(RunError, match="not finished"):
        trace(run.root, tmp_path / "bundle")

    made = trace(run.root, tmp_path / "bundle", data=flowers)

    assert bias(made) == -1e3
    assert open_run(run.root).info.status == "stopped"


def test_of_a_run_that_was_stopped_needs_nothing(run: Run, tmp_path: Path) -> None:
    run.updated(status="stopped")
    assert bias(trace(run.root, tmp_path / "bundle")) == -1e3
