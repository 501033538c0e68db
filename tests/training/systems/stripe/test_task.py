"""How ``stripe`` is trained: drawn strips -> run, with a tiny net."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from sklearn.metrics import average_precision_score

from engineworks.runtime import datasets, images, planes
from engineworks.runtime.errors import DatasetError
from engineworks.runtime.preprocess import PlanesSpec
from engineworks.runtime.systems.stripe import Params
from engineworks.training.backbones import read_weights
from engineworks.training.config import SystemConfig, load_config
from engineworks.training.run import Run
from engineworks.training.systems.stripe.sample import sample
from engineworks.training.systems.stripe.task import Task, build_model
from engineworks.training.train import train

pytestmark = pytest.mark.train

SETTINGS = [
    "network.width=8",
    "network.depth=2",
    "tiles.size=32",
    "tiles.jitter=4",
    "defects.num=[3, 4]",
    "train.device=cpu",
    "train.epochs=2",
    "train.batch_size=8",
    "train.optimizer.lr=1e-2",
]


def config(*overrides: str) -> SystemConfig:
    return load_config("stripe", None, [*SETTINGS, *overrides])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "data"
    sample(folder, size=(97, 64), num_train=4, num_test=6)
    return folder


@pytest.fixture(scope="module")
def validated(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the test strips as a validation set."""
    folder = tmp_path_factory.mktemp("drawn") / "data"
    shutil.copytree(drawn, folder)
    (folder / "test").rename(folder / "valid")
    return folder


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(config(), drawn, tmp_path_factory.mktemp("runs") / "run")


def metrics(run: Run) -> list[dict[str, str]]:
    with (run.root / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


class TestARun:
    def test_holds_what_the_bundle_needs(self, run: Run) -> None:
        params = Params.model_validate_json((run.root / "params.json").read_text())
        assert params.value_range == (0.0, 255.0)
        spec = PlanesSpec.model_validate_json((run.root / "preprocess.json").read_text())
        assert spec == PlanesSpec(size=(97, 64), multiple=2)
        thresholds = json.loads((run.root / "thresholds.json").read_text())
        assert 0 <= thresholds["candidate"]["value"] <= 1
        assert "4 normal images" in thresholds["candidate"]["source"]

    def test_says_how_good_it_is_and_what_it_costs(self, run: Run) -> None:
        results: Any = run.info.results
        assert {"pixel_ap", "recall_at_1_false", "recall", "false_per_image"} <= set(
            results["test"]
        )
        # the mix of each pixel; 4 x 4 and twice 3 x 3 for a cell of 4, then a logit for each
        per_cell = 4 * 9 + 3 * 8 * 16 + 2 * 8 * 8 * 9 + 8 * 4 * 9
        assert results["network"]["multiply_adds_per_pixel"] == per_cell / 4
        assert results["data"] == {"strips": 4, "packed_bytes": 4 * 3 * 97 * 64}

    def test_holds_painted_tiles_to_calibrate_on(self, run: Run) -> None:
        painted = [planes.read(path) for path in sorted((run.root / "painted").iterdir())]
        assert len(painted) == 32
        assert {(tile.shape, tile.dtype.name) for tile in painted} == {((32, 32, 3), "uint8")}

    def test_leaves_no_packed_strips_behind(self, run: Run) -> None:
        assert not list(run.root.glob("strips-*"))

    def test_learns(self, run: Run) -> None:
        first, *_, last = metrics(run)
        assert float(last["loss"]) < 0.7 * float(first["loss"])

    def test_was_judged_by_the_whole_strips_of_the_files(self, run: Run, drawn: Path) -> None:
        model, _ = build_model(run.config)  # type: ignore[arg-type]
        model.load_state_dict(read_weights(run.weights()))
        model.eval()
        labels, scores = [], []
        for made in datasets.strips(drawn, "test"):
            strip = planes.read(made.path).astype(np.float32)
            mask = None if made.mask_path is None else images.read_mask(made.mask_path)
            labels.append(np.zeros((97, 64)) if mask is None else mask > 0)
            below = np.concatenate([strip, strip[-2:-1]])  # to 98 rows: mirrored about the last
            with torch.no_grad():
                logits = model(torch.from_numpy(below.transpose(2, 0, 1))[None])
            scores.append(logits[0, 0, :97].sigmoid().numpy())
        want = average_precision_score(np.ravel(labels), np.ravel(scores))
        judged: Any = run.info.results["test"]
        # the same scores but for float32 sums in another order, which may swap near ties
        assert judged["pixel_ap"] == pytest.approx(want, abs=1e-3)
        assert float(metrics(run)[-1]["pixel_ap"]) == judged["pixel_ap"]

    def test_records_data_and_weights(self, run: Run) -> None:
        assert run.info.data["num_train"] == 4
        assert run.info.data["judged_by"] == "test"
        assert run.info.provenance == {"network": "plain", "weights": "random, seed 0"}

    def test_that_was_stopped_goes_on_to_the_same_weights(
        self, run: Run, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Task, "finish", stop)
            with pytest.raises(KeyboardInterrupt):
                train(config(), drawn, tmp_path / "cut")
        assert list((tmp_path / "cut").glob("strips-*.planes"))
        cut = train(config(), drawn, tmp_path / "cut", resume=True)
        assert cut.info.results == run.info.results
        assert cut.weights().read_bytes() == run.weights().read_bytes()
        assert not list(cut.root.glob("strips-*"))


def test_a_validation_set_chooses_the_epoch_and_the_threshold(
    validated: Path, tmp_path: Path
) -> None:
    task = Task(config(), validated, tmp_path / "none")  # type: ignore[arg-type]
    assert task.best == (("pixel_ap", "max"), ("loss", "min"))
    made = train(config("train.epochs=1"), validated, tmp_path / "run")
    source = json.loads((made.root / "thresholds.json").read_text())["candidate"]["source"]
    assert "3 normal images" in source


def test_a_test_set_chooses_nothing(drawn: Path, tmp_path: Path) -> None:
    assert Task(config(), drawn, tmp_path / "none").best == ()  # type: ignore[arg-type]


def test_good_strips_alone_are_enough(drawn: Path, tmp_path: Path) -> None:
    shutil.copytree(drawn / "train", tmp_path / "data/train")
    made = train(config("train.epochs=1"), tmp_path / "data", tmp_path / "run")
    assert set(made.info.results) == {"network", "data"}
    assert (made.root / "thresholds.json").is_file()


def test_a_cache_keeps_the_packed_strips_for_the_next_run(drawn: Path, tmp_path: Path) -> None:
    settings = ["train.epochs=1", f"tiles.cache={tmp_path / 'cache'}"]
    train(config(*settings), drawn, tmp_path / "a")
    (packed,) = (tmp_path / "cache").glob("*.planes")
    before = packed.stat()
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config(*settings), drawn, tmp_path / "b")
    assert packed.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize(("dtype", "high"), [("uint16", 4095.0), ("float32", 1.0)])
def test_other_sensors_are_trained_on_in_their_own_values(
    tmp_path: Path, dtype: str, high: float
) -> None:
    rng = np.random.default_rng(0)
    for i in range(2):
        strip = (rng.random((40, 40, 3)) * high).astype(dtype)
        planes.write(tmp_path / f"data/train/good/{i}.npy", strip)
    settings = ["train.epochs=1", f"value_range=[0.0, {high}]"]
    made = train(config(*settings), tmp_path / "data", tmp_path / "run")
    assert np.isfinite(float(metrics(made)[0]["loss"]))


def test_the_published_network_can_be_trained(drawn: Path, tmp_path: Path) -> None:
    made = train(
        config("network.name=unet", "network.width=4", "train.epochs=1"), drawn, tmp_path / "run"
    )
    spec = PlanesSpec.model_validate_json((made.root / "preprocess.json").read_text())
    assert spec.multiple == 32


def test_another_folder_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="train"):
        train(config(), tmp_path, tmp_path / "run")
    assert not (tmp_path / "run").exists()
