"""The loop, with a small gradient-trained system that exists only here."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from engineworks.runtime.errors import BackendError, ConfigError, InUseError, RunError
from engineworks.training import checkpoint
from engineworks.training.config import TrainConfig, dump
from engineworks.training.data import loader
from engineworks.training.run import open_run, reserve
from engineworks.training.train import conclude, train
from tests.campaign.faults import other_process
from tests.training.toy import (
    Points,
    ToyTask,
    config,
    rows,
)

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("toy")]


def test_a_profile_says_where_the_time_went(tmp_path: Path) -> None:
    run = train(config(), tmp_path, tmp_path / "run", profile=True)
    profile: Any = run.info.results["profile"]
    assert {"data", "backward", "optimizer", "evaluation", "checkpoint", "other"} == set(profile)
    assert sum(row["share"] for row in profile.values()) == pytest.approx(1)


def test_a_failed_run_leaves_no_thread_behind(tmp_path: Path, toy: type[ToyTask]) -> None:
    before = threading.active_count()
    toy.stop_at = 2
    with pytest.raises(KeyboardInterrupt):
        train(config(), tmp_path, tmp_path / "run")
    assert threading.active_count() == before


class TestTheBestEpoch:
    @pytest.fixture
    def errors(self, monkeypatch: pytest.MonkeyPatch, toy: type[ToyTask]) -> Any:
        """Lets the metrics of the epochs be what a test says."""

        def arrange(*values: float, **others: Sequence[float]) -> None:
            told = [
                dict(zip(("error", *others), row, strict=True))
                for row in zip(values, *others.values(), strict=True)
            ]
            each = iter(told)
            monkeypatch.setattr(toy, "evaluate", lambda self, model: next(each))

        return arrange

    @pytest.mark.parametrize(
        ("error", "nll", "best"),
        [
            ([2, 1, 3], [0, 0, 0], 2),
            ([1, 1, 1], [5, 4, 6], 2),  # a tie goes to the lower loss
            ([1, 1, 2], [4, 4, 3], 2),  # then to the later epoch
            ([1, 1, 1], [4, 4, 4], 3),
            ([2, 2, 1], [0, 0, 9], 3),
        ],
    )
    def test_is_chosen_by_one_criterion_after_the_other(
        self,
        error: list[float],
        nll: list[float],
        best: int,
        tmp_path: Path,
        errors: Any,
        monkeypatch: pytest.MonkeyPatch,
        toy: type[ToyTask],
    ) -> None:
        monkeypatch.setattr(toy, "best", (("error", "min"), ("nll", "min")))
        errors(*error, nll=nll)
        run = train(config(), tmp_path, tmp_path / "run")
        assert checkpoint.load(run.root / checkpoint.NAME)["best_epoch"] == best
        is_last = run.weights("best").read_bytes() == run.weights("last").read_bytes()
        assert is_last == (best == 3)

    def test_is_the_last_where_nothing_chooses(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: type[ToyTask]
    ) -> None:
        monkeypatch.setattr(toy, "best", ())
        run = train(config(), tmp_path, tmp_path / "run")
        assert run.weights("best").read_bytes() == run.weights("last").read_bytes()

    def test_ends_a_run_that_waited_for_a_better_one_long_enough(
        self, tmp_path: Path, errors: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO")
        errors(3.0, 1.0, 2.0, 2.0, 9.0, 9.0)
        run = train(config(epochs=9, patience=2), tmp_path, tmp_path / "run")
        assert (run.info.status, run.info.epoch) == ("finished", 4)
        assert "no epoch was better than 2" in caplog.text
        more = train(config(epochs=9, patience=3), tmp_path, tmp_path / "run", resume=True)
        assert (more.info.status, more.info.epoch) == ("finished", 5)

    def test_is_needed_by_patience(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toy: type[ToyTask]
    ) -> None:
        monkeypatch.setattr(toy, "best", ())
        with pytest.raises(ConfigError, match=r"train\.patience"):
            train(config(patience=2), tmp_path, tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_can_give_way_to_the_last(self, tmp_path: Path, errors: Any) -> None:
        errors(3.0, 1.0, 2.0)
        run = train(config(), tmp_path, tmp_path / "run")
        last = conclude(run.root, tmp_path, "last")
        assert open_run(run.root) == last
        assert (last.info.status, last.info.weights) == ("finished", "last")
        assert last.weights() == last.weights("last") != run.weights()
        assert last.info.results != run.info.results
        assert conclude(run.root, tmp_path, "best").info == run.info

    def test_is_made_ready_for_export_after_a_kill(
        self, tmp_path: Path, toy: type[ToyTask]
    ) -> None:
        toy.stop_at = 4
        with pytest.raises(KeyboardInterrupt):
            train(config(), tmp_path, tmp_path / "run")
        with pytest.raises(RunError, match="has no best"):
            conclude(tmp_path / "run", tmp_path)
        toy.stop_at = 8
        with pytest.raises(KeyboardInterrupt):
            train(config(), tmp_path, tmp_path / "run", resume=True)
        toy.stop_at = None
        assert conclude(tmp_path / "run", tmp_path).info.status == "stopped"
        (tmp_path / "labels.txt").write_text("another")
        with pytest.raises(RunError, match="labels_sha256"):
            conclude(tmp_path / "run", tmp_path)


class TestARun:
    def test_leaves_its_configuration_metrics_events_weights_and_record(
        self, tmp_path: Path
    ) -> None:
        run = train(config(), tmp_path, tmp_path / "run")
        assert open_run(run.root) == run
        assert run.config == config()
        record = json.loads((run.root / "run.json").read_text())
        assert record["status"] == "finished"
        assert record["versions"]["torch"] == metadata.version("torch")
        assert [row["epoch"] for row in rows(run.root)] == ["1", "2", "3"]
        assert {"loss", "bias", "error", "lr"} <= set(rows(run.root)[0])
        assert list(run.root.glob("events.out.tfevents.*"))
        assert run.info.step == 3 * 6  # 22 points in batches of 4

    def test_learns(self, tmp_path: Path) -> None:
        run = train(config(epochs=30, batch_size=11), tmp_path, tmp_path / "run")
        losses = [float(row["loss"]) for row in rows(run.root)]
        assert losses[-1] < 0.5 * losses[0]

    def test_keeps_the_weights_of_its_best_epoch(
        self, tmp_path: Path, toy: type[ToyTask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        errors = iter([2.0, 1.0, 3.0])
        monkeypatch.setattr(toy, "evaluate", lambda self, model: {"error": next(errors)})
        run = train(config(), tmp_path, tmp_path / "run")
        assert run.weights("best").read_bytes() != run.weights("last").read_bytes()

    def test_accumulates_batches_into_steps(self, tmp_path: Path) -> None:
        run = train(config(accumulate=4), tmp_path, tmp_path / "run")
        assert run.info.step == 3 * 2  # 6 batches: a step of four and one of the last two

    def test_stops_when_its_loss_is_not_a_number(self, tmp_path: Path, toy: type[ToyTask]) -> None:
        toy.bad_from = 7
        with pytest.raises(RunError, match="'loss' is nan"):
            train(config(), tmp_path, tmp_path / "run")
        assert len(rows(tmp_path / "run")) == 1

    def test_tells_of_each_epoch_in_a_line(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", "engineworks.training")
        train(config(), tmp_path, tmp_path / "run")
        told = [record.getMessage() for record in caplog.records]
        assert len(told) == 3
        for epoch, line in enumerate(told, 1):
            assert re.match(rf"epoch {epoch}/3, \d+ s: loss [\d.e+-]+, bias .*, error ", line)
        assert told[0].endswith(", the best so far")

    def test_reports_its_progress(self, tmp_path: Path) -> None:
        seen: list[tuple[str, int, int]] = []
        train(config(epochs=1), tmp_path, tmp_path / "run", progress=lambda *at: seen.append(at))
        assert seen == [("epoch 1/1", i, 6) for i in range(1, 7)]

    def test_on_an_absent_device_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(BackendError, match="no CUDA device"):
            train(config(device="cuda"), tmp_path, tmp_path / "run")
        with pytest.raises(ConfigError, match="fp16"):
            train(config(precision="fp16"), tmp_path, tmp_path / "run")


class TestARunFolder:
    def test_that_exists_is_not_touched(self, tmp_path: Path) -> None:
        train(config(), tmp_path, tmp_path / "run")
        with pytest.raises(RunError, match="already exists"):
            train(config(), tmp_path, tmp_path / "run")

    def test_is_replaced_when_that_is_allowed(self, tmp_path: Path) -> None:
        train(config(), tmp_path, tmp_path / "run")
        (tmp_path / "run" / "left.json").write_text("stale")
        run = train(config(epochs=1), tmp_path, tmp_path / "run", exist_ok=True)
        assert run.info.epoch == 1
        assert not (run.root / "left.json").exists()

    def test_with_other_files_is_never_replaced(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(RunError, match="not a training run"):
            train(config(), tmp_path, tmp_path, exist_ok=True)

    def test_is_numbered_where_none_is_given(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "bottle").mkdir()
        first = train(config(epochs=1), Path("bottle"))
        second = train(config(epochs=1), Path("bottle"))
        assert (first.root, second.root) == (Path("runs/toy/train1"), Path("runs/toy/train2"))

    def test_number_follows_the_highest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name in ("train1", "train10", "train2b", "trainy3"):
            (tmp_path / "runs" / "x" / name).mkdir(parents=True)
            (tmp_path / "runs" / "x" / name / "run.json").touch()
        with reserve(None, "x") as root:
            assert root == Path("runs/x/train11")

    def test_number_is_given_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        first = tmp_path / "runs" / "toy" / "train1"
        first.mkdir(parents=True)
        with other_process(first):
            assert train(config(epochs=1), tmp_path).root == Path("runs/toy/train2")

    def test_of_another_process_is_refused_with_its_number(self, tmp_path: Path) -> None:
        train(config(), tmp_path, tmp_path / "run")
        with other_process(tmp_path / "run") as pid:
            for options in ({"resume": True}, {"exist_ok": True}, {}):
                with pytest.raises(InUseError, match=f"process {pid} "):
                    train(config(), tmp_path, tmp_path / "run", **options)

    def test_that_nothing_came_of_is_not_left(
        self, tmp_path: Path, toy: type[ToyTask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_arguments: object, **_options: object) -> None:
            raise ConfigError("no")

        monkeypatch.setattr(toy, "__init__", fail)
        with pytest.raises(ConfigError):
            train(config(), tmp_path, tmp_path / "new" / "run")
        assert not (tmp_path / "new").exists()

    def test_with_a_file_of_the_user_is_never_replaced(self, tmp_path: Path) -> None:
        train(config(), tmp_path, tmp_path / "run")
        (tmp_path / "run" / "notes.txt").write_text("mine")
        with pytest.raises(RunError, match=r"did not write: notes\.txt"):
            train(config(), tmp_path, tmp_path / "run", exist_ok=True)
        assert (tmp_path / "run" / "run.json").exists()
        assert (tmp_path / "run" / "weights" / "best.safetensors").exists()

    def test_of_a_run_that_was_killed_before_it_began_is_no_obstacle(self, tmp_path: Path) -> None:
        root = tmp_path / "run"
        (root / "weights").mkdir(parents=True)
        (root / "config.yaml").write_text(dump(config(epochs=1)))
        (root / ".engineworks-0123456789abcdef.tmp").touch()
        train(config(epochs=1), tmp_path, root)
        assert not list(root.rglob(".*"))

    def test_keeps_what_is_worked_with_until_it_has_finished(self, tmp_path: Path) -> None:
        root = tmp_path / "run"
        train(config(epochs=1), tmp_path, root)
        assert not (root / "rows.work").exists()
        (root / "rows.work").touch()  # as a kill right after the record leaves it
        train(config(epochs=1), tmp_path, root, resume=True)
        assert not (root / "rows.work").exists()


class TestTheLoader:
    def test_gives_the_same_samples_with_and_without_workers(self) -> None:
        batches = [
            [batch["x"] for batch in loader(Points(), TrainConfig(workers=n), shuffle=True)]
            for n in (0, 2)
        ]
        for alone, together in zip(*batches, strict=True):
            assert torch.equal(alone, together)

    def test_changes_order_and_augmentation_with_the_epoch(self) -> None:
        batches = loader(Points(), TrainConfig(batch_size=22), shuffle=True)
        first = next(iter(batches))
        batches.sampler.set_epoch(1)
        second = next(iter(batches))
        assert not torch.equal(first["y"], second["y"])
        assert not torch.equal(first["x"].sort(0).values, second["x"].sort(0).values)
        assert torch.equal(first["y"].sort().values, second["y"].sort().values)


def test_a_checkpoint_of_a_run_holds_no_pickle(tmp_path: Path) -> None:
    run = train(config(epochs=1), tmp_path, tmp_path / "run")
    path = checkpoint.latest(run.root)
    assert path is not None
    assert set(checkpoint.load(path)) >= {"model", "optimizer", "scheduler", "position", "rng"}
