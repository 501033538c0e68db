"""How ``refdet`` is trained: coloured squares -> run, with tiny nets."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from engineworks.runtime.references import load_references
from engineworks.runtime.testing import write_scenes
from engineworks.training.backbones import read_weights
from engineworks.training.config import load_config, validate
from engineworks.training.run import Run
from engineworks.training.systems.refdet.config import TaskConfig
from engineworks.training.systems.refdet.model import Detect
from engineworks.training.systems.refdet.task import Task, build_model
from engineworks.training.task import Paced, Position
from engineworks.training.train import train

pytestmark = pytest.mark.train

SETTINGS: dict[str, Any] = {
    "system": "refdet",
    "preprocess": {"size": [64, 96], "resize": "letterbox"},
    "reference_preprocess": {"size": [32, 32], "resize": "letterbox"},
    "encoder": {"name": "test_resnet", "weights": "none", "train_blocks": "all"},
    "detector": {"scales": [3, 4], "width": 0.125, "reg_max": 4},
    "episodes": {"objects": 3, "shots": 2, "num": 3},
    "augment": {"recolour": 0.0},
    "stages": [{"name": "all", "weights": {"prototype": 1.0, "supervised": 1.0}}],
    "train": {"device": "cpu", "epochs": 2, "batch_size": 2},
}


def config(**sections: Any) -> TaskConfig:
    """The settings with some sections' values replaced."""
    tree = json.loads(json.dumps(SETTINGS))
    for name, value in sections.items():
        if isinstance(value, dict) and isinstance(tree.get(name), dict):
            tree[name] |= value
        else:
            tree[name] = value
    return validate(TaskConfig, tree)


FROZEN = {"encoder": {"train_blocks": 0}, "augment": {"variants": 1}}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(config(base=True), drawn, tmp_path_factory.mktemp("runs") / "run")


def metrics(run: Run) -> list[dict[str, str]]:
    with (run.root / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def one_step(task: Task, epoch: int = 0) -> dict[str, Any]:
    batch = next(iter(task.loader()))
    return dict(task.step(task.model.train(), batch, Position(epoch=epoch)))


def parameters(task: Task) -> Iterator[tuple[str, str, torch.nn.Parameter]]:
    """(part, name, parameter) of the whole net."""
    for name, parameter in task.model.net.named_parameters():
        part = name.split(".")[1] if name.startswith("detector.") else "encoder"
        yield part, name, parameter


class TestARun:
    def test_holds_what_the_bundle_needs(self, run: Run) -> None:
        assert json.loads((run.root / "labels.json").read_text()) == ["blue", "red", "yellow"]
        found = load_references(run.root / "references.npz")
        assert sorted(found) == ["blue", "red", "yellow"]
        assert all(picture.shape == (32, 32, 3) for each in found.values() for picture in each)

    def test_logs_every_loss_and_every_metric(self, run: Run) -> None:
        (first, _) = metrics(run)
        losses = {"loss", "box", "dfl", "cls", "prototype", "supervised"}
        assert losses | {"base_box", "base_dfl", "base_cls"} <= set(first)
        assert {"map50", "map50_95", "map50_swapped"} <= set(first)

    def test_says_what_it_is_made_of(self, run: Run) -> None:
        parts: Any = run.info.results["parameters"]
        assert parts["all"] == sum(
            p.numel() for p in build_model(config(base=True), 3)[0].net.parameters()
        )
        assert run.info.data["num_objects"] == 3
        assert run.info.provenance["weights"] == "random, seed 0"

    def test_is_judged_by_the_test_but_not_chosen_by_it(self, run: Run) -> None:
        assert run.info.data["judged_by"] == "test"
        best, last = (read_weights(run.weights(which)) for which in ("best", "last"))
        assert all(torch.equal(value, last[name]) for name, value in best.items())
        judged: Any = run.info.results["test"]
        assert judged["map50"] == pytest.approx(float(metrics(run)[-1]["map50"]))

    def test_sees_a_frame_once_whatever_is_looked_for(
        self, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = Task(config(), drawn, tmp_path)
        before = task.evaluate(task.model)
        seen: list[int] = []
        see = Detect.see

        def counted(self: Detect, frames_BCHW: torch.Tensor) -> list[torch.Tensor]:
            seen.append(len(frames_BCHW))
            return see(self, frames_BCHW)

        monkeypatch.setattr(Detect, "see", counted)
        assert task.evaluate(task.model) == before
        assert task.judged is not None
        assert sum(seen) == len(task.judged.frames)
        assert len(task.judged.references) > 1

    def test_becomes_the_same_when_it_is_resumed(self, drawn: Path, tmp_path: Path) -> None:
        settings = config(**FROZEN)
        whole = train(settings, drawn, tmp_path / "whole")

        class StoppedError(Exception):
            pass

        def stop(what: str, done: int, of: int) -> None:
            if what == "epoch 2/2" and done == 1:
                raise StoppedError

        AcceleratorState._reset_state(reset_partial_state=True)
        with pytest.raises(StoppedError):
            train(settings, drawn, tmp_path / "parts", progress=stop)
        AcceleratorState._reset_state(reset_partial_state=True)
        resumed = train(settings, drawn, tmp_path / "parts", resume=True)
        a, b = (read_weights(each.weights("last")) for each in (whole, resumed))
        assert all(torch.equal(value, b[name]) for name, value in a.items())

    def test_is_judged_by_val_where_there_is_one_and_keeps_its_best_epoch(
        self, drawn: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "data"
        shutil.copytree(drawn, folder)
        (folder / "annotations_test.json").rename(folder / "annotations_val.json")
        task = Task(config(), folder, tmp_path / "run")
        assert task.judged_by == "val"
        assert task.best == (("map50", "max"), ("loss", "min"))

    def test_never_sees_what_is_held_out_and_is_judged_by_it(
        self, drawn: Path, tmp_path: Path
    ) -> None:
        task = Task(config(hold_out=["red"]), drawn, tmp_path / "run")
        assert sorted(task.training.references) == ["blue", "yellow"]
        assert all("red" not in frame.objects for frame in task.training.frames)
        assert task.judged is not None
        assert list(task.judged.references) == ["red"]


class TestAFrozenEncoder:
    def test_encodes_a_variant_of_a_reference_once(self, drawn: Path, tmp_path: Path) -> None:
        run = train(config(**FROZEN), drawn, tmp_path / "run")
        found: Any = run.info.results["encoder_cache"]
        # 2 epochs of 3 episodes with 3 objects in 2 pictures each, of which there are 6 in all
        assert found["hits"] + found["misses"] == 2 * 3 * 3 * 2
        assert found["misses"] <= 6

    def test_gives_the_same_losses_kept_as_computed(self, drawn: Path, tmp_path: Path) -> None:
        losses = []
        for cache_bytes in (0, 2**20):
            task = Task(
                config(
                    encoder=FROZEN["encoder"] | {"cache_bytes": cache_bytes},
                    augment={"variants": 1},
                ),
                drawn,
                tmp_path / "run",
            )
            one_step(task)
            torch.manual_seed(0)
            losses.append(one_step(task)["loss"])
        assert torch.equal(*losses)

    def test_has_projections_that_learn(self, drawn: Path, tmp_path: Path) -> None:
        task = Task(config(**FROZEN), drawn, tmp_path / "run")
        one_step(task)["loss"].backward()
        for part, name, parameter in parameters(task):
            frozen = part == "encoder" and "projections" not in name
            assert (parameter.grad is None) == frozen, name


class TestStages:
    STAGES = (
        {"name": "base", "weights": {}},
        {
            "name": "episodic",
            "start": 1,
            "lr": 0.5,
            "frozen": ["encoder", "backbone"],
            "weights": {"prototype": 1.0, "supervised": 0.6, "proposals": 0.4, "triplet": 0.2},
        },
    )

    def test_say_which_losses_there_are(self, drawn: Path, tmp_path: Path) -> None:
        task = Task(config(stages=self.STAGES), drawn, tmp_path / "run")
        plain = {"loss", "box", "dfl", "cls"}
        assert set(one_step(task)) == plain
        contrast = {"prototype", "supervised", "proposals", "triplet"}
        for epoch in (1, 7):
            assert set(one_step(task, epoch)) == plain | contrast

    def test_sum_what_they_weigh(self, drawn: Path, tmp_path: Path) -> None:
        task = Task(config(stages=self.STAGES), drawn, tmp_path / "run")
        losses = one_step(task, 1)
        weights = dict(task.weights(1))
        want = sum(weights[name] * loss for name, loss in losses.items() if name != "loss")
        torch.testing.assert_close(losses["loss"], want)  # a sum of seven float32

    def test_freeze_parts_and_let_them_go_again(self, drawn: Path, tmp_path: Path) -> None:
        stages = (*self.STAGES, {"name": "fine-tune", "start": 2, "weights": {}})
        task = Task(config(stages=stages), drawn, tmp_path / "run")
        for epoch, frozen in ((1, {"encoder", "backbone"}), (2, set())):
            before = {k: v.clone() for k, v in task.model.net.named_buffers()}
            one_step(task, epoch)["loss"].backward()
            for part, name, parameter in parameters(task):
                assert (parameter.grad is None) == (part in frozen), name
            for name, value in task.model.net.named_buffers():
                if name.endswith("running_mean"):
                    still = any(part in name for part in frozen)
                    assert torch.equal(value, before[name]) == still, name

    def test_lower_the_contrast_after_an_epoch(self, drawn: Path, tmp_path: Path) -> None:
        loss = {"contrastive_until": 3, "contrastive_factor": 0.25}
        task = Task(config(stages=self.STAGES, loss=loss), drawn, tmp_path / "run")
        assert task.weights(2).supervised == 0.6
        assert task.weights(3).supervised == pytest.approx(0.15)
        assert task.weights(3).box == task.weights(2).box

    def test_set_the_pace_in_the_one_loop(self, drawn: Path, tmp_path: Path) -> None:
        settings = config(
            stages=[{"name": "a"}, {"name": "b", "start": 1, "lr": 0.5}],
            rates={"backbone": 3.0},  # whose rate is the one that is logged
            train=SETTINGS["train"] | {"optimizer": {"lr": 1e-3, "schedule": "constant"}},
        )
        run = train(settings, drawn, tmp_path / "run")
        # the rate after an epoch's last step is that of the next one; beyond the last one as well
        assert [float(row["lr"]) for row in metrics(run)] == pytest.approx([1.5e-3, 1.5e-3])


class TestRates:
    def test_every_parameter_has_one(self, drawn: Path, tmp_path: Path) -> None:
        rates = {"encoder": 0.1, "backbone": 1.0, "fusion": 2.0, "head": 3.0}
        task = Task(config(rates=rates), drawn, tmp_path / "run")
        assert isinstance(task, Paced)
        factor = {id(p): f for group, f in task.groups() for p in group}
        assert len(factor) == sum(len(group) for group, _ in task.groups())
        for part, name, parameter in parameters(task):
            want = rates["head" if "projections" in name else part]
            assert factor[id(parameter)] == want, name

    def test_none_where_nothing_learns(self, drawn: Path, tmp_path: Path) -> None:
        task = Task(config(**FROZEN), drawn, tmp_path / "run")
        learning = {id(p) for group, _ in task.groups() for p in group}
        assert learning == {id(p) for p in task.model.parameters() if p.requires_grad}


def test_the_small_configuration_stands_on_the_default_one() -> None:
    small = load_config("refdet", Path("small"))
    assert isinstance(small, TaskConfig)
    # nothing that only good weights can do: no download, and all of it learns
    assert small.encoder.weights == "none"
    assert small.encoder.train_blocks == "all"
    assert len(small.stages) == 1


class TestJudging:
    def test_looks_with_the_mean_of_all_references(self, drawn: Path, tmp_path: Path) -> None:
        task = Task(config(), drawn, tmp_path / "run")
        net = task.model.net.eval()
        assert task.judged is not None
        row = task._prototype(net, task.judged, "red")
        parts = np.split(row, np.cumsum(net.detector.widths)[:-1])
        # brought to unit length in float32
        assert [float(np.linalg.norm(part)) for part in parts] == pytest.approx([1, 1], abs=1e-6)

    def test_says_what_it_says_in_training_of_one_object(self, drawn: Path, tmp_path: Path) -> None:
        """Twice the same numbers: an evaluation leaves nothing behind."""
        task = Task(config(), drawn, tmp_path / "run")
        model = task.model.eval()
        assert task.evaluate(model) == task.evaluate(model)
