"""The whole way of ``paco``: drawn pictures -> run, with a small random net."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from engineworks.runtime import datasets, images
from engineworks.runtime.confidence import Confidence
from engineworks.runtime.errors import ConfigError, DatasetError, RunError, WeightsError
from engineworks.training.config import SystemConfig, load_config
from engineworks.training.run import Run
from engineworks.training.systems.paco.model import PacoTraining
from engineworks.training.systems.paco.task import Probe, Task, build_model
from engineworks.training.task import Position
from engineworks.training.train import train

pytestmark = pytest.mark.train

ROOT = Path(__file__).parents[4]
SETTINGS = [
    "backbone.name=resnet10t",
    "backbone.weights=none",
    "preprocess.size=[64, 64]",
    "parts.window=1",
    "parts.width=8",
    "num_overlays=4",
    "loss.warmup_epochs=0.5",
    "train.device=cpu",
    "train.epochs=2",
    "train.batch_size=4",
    "train.optimizer.lr=1e-3",
]


def config(*overrides: str) -> SystemConfig:
    return load_config("paco", None, [*SETTINGS, *overrides])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of one colour each, 4 + 2 + 2 pictures."""
    folder = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(0)
    for split, num in {"train": 4, "val": 2, "test": 2}.items():
        for i, name in enumerate(("red", "green", "blue")):
            for k in range(num):
                pixels = rng.integers(0, 60, (70, 80, 3)).astype(np.uint8)
                pixels[20:50, 20:60, i] += 150
                path = folder / split / name / f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                images.write(path, pixels)
    return folder


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(config(), drawn, tmp_path_factory.mktemp("runs") / "run")


class TestARun:
    def test_says_how_good_it_is_on_val_and_keeps_the_best_epoch(self, run: Run) -> None:
        judged: Any = run.info.results["val"]
        assert set(judged) == {"top1", "balanced_accuracy", "ece", "nll"}
        with (run.root / "metrics.csv").open() as file:
            head = file.readline()
        assert {"loss", "ce", "pac", "soc", "active", "accuracy", "top1"} <= set(
            head.strip().split(",")
        )
        assert set(run.info.results["classes"]) == {"red", "green", "blue"}  # type: ignore[arg-type]

    def test_holds_the_labels_in_the_order_of_the_logits(self, run: Run) -> None:
        labels = json.loads((run.root / "labels.json").read_text())
        assert labels == ["blue", "green", "red"]

    def test_holds_how_sure_it_may_be_of_the_pictures_that_judged_it(self, run: Run) -> None:
        known = json.loads((run.root / "confidence.json").read_text())

        confidence = Confidence.model_validate(known["confidence"])
        assert confidence.num_pictures == 6
        assert (confidence.coverage, confidence.budget) == (0.9, 0.05)
        assert confidence.limit == 0  # six pictures cannot promise nine of ten
        assert known["unknown"]["held_out"]["count"] == 6

    def test_shows_what_it_confuses_and_what_it_looks_at(self, run: Run) -> None:
        assert images.read(run.root / "confusion.png").size
        overlays = sorted(path.name for path in (run.root / "parts").iterdir())
        # one of each class before the second of any
        assert [name.partition("_")[0] for name in overlays].count("blue") == 2
        assert len(overlays) == 4
        assert images.read(run.root / "parts" / overlays[0]).shape == (64, 64, 3)

    def test_was_judged_as_the_runtime_judges(self, run: Run, drawn: Path) -> None:
        model, _ = build_model(run.config, 3, weights=False)  # type: ignore[arg-type]
        from engineworks.training.backbones import read_weights

        model.load_state_dict(read_weights(run.weights()))
        model.eval()
        folder = datasets.class_folder(drawn, "val")
        from engineworks.training.data import preprocess

        right = 0
        for sample in folder.samples:
            batch = preprocess(run.config.preprocess, [datasets.read(sample)])  # type: ignore[attr-defined]
            right += int(model.net(batch)[0].argmax()) == sample.label
        judged: Any = run.info.results["val"]
        assert judged["top1"] == right / len(folder.samples)


def test_with_a_test_folder_alone_the_last_epoch_is_kept(drawn: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(drawn, data)
    shutil.rmtree(data / "val")
    task = Task(config(), data, tmp_path)  # type: ignore[arg-type]
    assert task.best == ()
    assert task.judged_by == "test"
    assert Task(config(), drawn, tmp_path).best == (("top1", "max"), ("nll", "min"))  # type: ignore[arg-type]


def test_lambda_and_eta_grow_over_the_warm_up(drawn: Path, tmp_path: Path) -> None:
    task = Task(config("loss.warmup_epochs=2"), drawn, tmp_path)  # type: ignore[arg-type]
    # 12 pictures, 3 batches of an epoch
    shares = [task._ramp(Position(e, b)) for e, b in [(0, 0), (0, 1), (1, 0), (1, 2), (2, 0)]]
    assert shares == pytest.approx([0, 1 / 6, 0.5, 5 / 6, 1])


@pytest.mark.parametrize(
    "changes",
    [
        ["loss.metric=class", "parts.refresh=2"],
        ["train.ema_decay=0.9", "train.precision=bf16"],
        ["loss.pac=0", "loss.soc=0"],
        ["frozen=true"],
    ],
    ids=" ".join,
)
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(
    changes: list[str], drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = config("train.checkpoint_steps=1", *changes)
    whole = train(chosen, drawn, tmp_path / "whole")
    step, count = Task.step, 0

    def stops(self: Task, *args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:  # in the middle of the second epoch
            raise KeyboardInterrupt
        return step(self, *args)

    AcceleratorState._reset_state(reset_partial_state=True)
    with monkeypatch.context() as patch:
        patch.setattr(Task, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            train(chosen, drawn, tmp_path / "cut")
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(999)
    cut = train(chosen, drawn, tmp_path / "cut", resume=True)
    # the same operations on the same numbers, in one thread: not a bit differs
    assert (cut.root / "metrics.csv").read_text() == (whole.root / "metrics.csv").read_text()
    assert cut.info.results == whole.info.results


@pytest.mark.slow
def test_a_killed_process_can_be_resumed(drawn: Path, tmp_path: Path) -> None:
    def command(out: str, *more: str) -> list[str]:
        line = [sys.executable, "cli.py", "train", "paco", "--data", str(drawn)]
        line += ["--out", str(tmp_path / out), *more]
        return line

    more = ("train.epochs=4", "train.checkpoint_steps=1")
    settings = [part for each in (*SETTINGS, *more) for part in ("--set", each)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("cut", *settings),
        cwd=ROOT,
        env=one_thread,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    metrics = tmp_path / "cut" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -9
    again = command("cut", "--resume")
    subprocess.run(again, cwd=ROOT, env=one_thread, check=True, capture_output=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    train(config(*more), drawn, tmp_path / "whole")
    assert metrics.read_text() == (tmp_path / "whole" / "metrics.csv").read_text()


class TestTheFrozenMode:
    def test_trains_the_classifier_alone_on_features_of_the_untouched_net(
        self, drawn: Path, tmp_path: Path
    ) -> None:
        chosen = config("frozen=true", "train.epochs=20", "train.optimizer.lr=1e-2")
        done = train(chosen, drawn, tmp_path / "run")
        model, _ = build_model(chosen, 3, weights=False)  # type: ignore[arg-type]
        from engineworks.training.backbones import read_weights

        model.load_state_dict(read_weights(done.weights("last")))
        fresh, _ = build_model(chosen, 3)  # type: ignore[arg-type]
        assert isinstance(model, Probe)
        for key, value in fresh.net.backbone.state_dict().items():
            torch.testing.assert_close(model.net.backbone.state_dict()[key], value, rtol=0, atol=0)
        judged: Any = done.info.results["val"]
        assert judged["top1"] == 1  # colours are told apart by any features

    def test_has_the_same_net_inside_as_the_other_mode(self) -> None:
        probe, _ = build_model(config("frozen=true"), 3)  # type: ignore[arg-type]
        whole, _ = build_model(config(), 3)  # type: ignore[arg-type]
        assert isinstance(whole, PacoTraining)
        assert probe.net.state_dict().keys() == whole.net.state_dict().keys()


@pytest.fixture(scope="module")
def probe(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A classifier alone."""
    AcceleratorState._reset_state(reset_partial_state=True)
    chosen = config("frozen=true", "train.epochs=20", "train.optimizer.lr=1e-2")
    return train(chosen, drawn, tmp_path_factory.mktemp("probe") / "run")


class TestAWarmStart:
    def test_begins_where_the_other_run_ended(self, drawn: Path, probe: Run) -> None:
        # the seed would give another random net, and the weights that it names are not there
        chosen = config(
            f"warm_start={probe.root}", "train.seed=7", "backbone.weights=/missing.safetensors"
        )
        task = Task(chosen, drawn, drawn)  # type: ignore[arg-type]
        from engineworks.training.systems.paco.task import trained_weights

        own = task.model.net.state_dict()
        for name, value in trained_weights(probe).items():
            torch.testing.assert_close(own[name], value, rtol=0, atol=0)
        with torch.no_grad():
            assert task.evaluate(task.model.eval())["top1"] == 1  # without a step of its own
        assert task.provenance["warm_start"] == "run"
        assert task.provenance["weights"] == probe.info.provenance["weights"]

    def test_is_not_needed_any_more_when_a_run_goes_on(
        self, drawn: Path, probe: Run, tmp_path: Path
    ) -> None:
        there = tmp_path / "probe"
        shutil.copytree(probe.root, there)
        begun = train(config(f"warm_start={there}", "train.epochs=1"), drawn, tmp_path / "run")
        shutil.rmtree(there)
        Task(begun.config, drawn, begun.root, weights=False)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (["backbone.name=resnet18"], "backbone.name = resnet10t"),
            (["backbone.args={output_stride: 16}"], "backbone.args"),
        ],
    )
    def test_of_another_net_is_refused(
        self, drawn: Path, probe: Run, changed: list[str], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            Task(config(f"warm_start={probe.root}", *changed), drawn, drawn)  # type: ignore[arg-type]

    def test_of_other_classes_is_refused(self, drawn: Path, probe: Run, tmp_path: Path) -> None:
        shutil.copytree(drawn, tmp_path / "data")
        for split in ("train", "val", "test"):
            (tmp_path / "data" / split / "red").rename(tmp_path / "data" / split / "rosa")
        with pytest.raises(ConfigError, match="other classes apart: red, rosa"):
            Task(config(f"warm_start={probe.root}"), tmp_path / "data", tmp_path)  # type: ignore[arg-type]

    def test_of_no_run_is_refused(self, drawn: Path, tmp_path: Path) -> None:
        with pytest.raises(RunError, match="no training run"):
            Task(config(f"warm_start={tmp_path}"), drawn, tmp_path)  # type: ignore[arg-type]


class TestWhatCannotBeTrained:
    def test_one_class_alone(self, drawn: Path, tmp_path: Path) -> None:
        shutil.copytree(drawn / "train" / "red", tmp_path / "train" / "red")
        with pytest.raises(DatasetError, match="one class"):
            Task(config(), tmp_path, tmp_path)  # type: ignore[arg-type]

    def test_a_missing_weights_file(self, drawn: Path, tmp_path: Path) -> None:
        with pytest.raises(WeightsError, match="no weights file"):
            Task(config("backbone.weights=missing.safetensors"), drawn, tmp_path)  # type: ignore[arg-type]
