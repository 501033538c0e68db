from __future__ import annotations

import json
import signal
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from engineworks.runtime.errors import RunError
from engineworks.runtime.signals import Stopped
from engineworks.training import checkpoint
from engineworks.training.run import open_run
from engineworks.training.train import train
from tests.training.toy import (
    Points,
    ToyConfig,
    ToyTask,
    config,
    rows,
)

VARIANTS: dict[str, dict[str, Any]] = {
    "adamw, cosine": {},
    "sgd, warm-up, clipping": {
        "optimizer": {"name": "sgd", "lr": 0.01, "warmup_epochs": 0.5, "clip_norm": 0.5}
    },
    "accumulation over an uneven epoch": {"accumulate": 4},
    "moving average": {"ema_decay": 0.9},
    "bfloat16": {"precision": "bf16"},
}

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("toy")]


class TestAResumedRun:
    @pytest.mark.parametrize("name", VARIANTS)
    @pytest.mark.parametrize("stop_at", [2, 8, 14])
    def test_becomes_exactly_what_the_uninterrupted_one_became(
        self, name: str, stop_at: int, tmp_path: Path, toy: type[ToyTask]
    ) -> None:
        chosen = config(checkpoint_steps=1, **VARIANTS[name])
        whole = train(chosen, tmp_path, tmp_path / "whole")
        toy.stop_at = stop_at
        with pytest.raises(KeyboardInterrupt):
            train(chosen, tmp_path, tmp_path / "cut")
        toy.stop_at = None
        torch.manual_seed(999)  # whatever else the process drew must not matter
        cut = train(chosen, tmp_path, tmp_path / "cut", resume=True)
        assert cut.info.results == whole.info.results
        assert cut.info.step == whole.info.step
        assert rows(cut.root) == rows(whole.root)
        for which in ("best", "last"):
            assert cut.weights(which).read_bytes() == whole.weights(which).read_bytes()  # type: ignore[arg-type]

    def test_starts_again_where_there_was_no_checkpoint_yet(
        self, tmp_path: Path, toy: type[ToyTask]
    ) -> None:
        whole = train(config(), tmp_path, tmp_path / "whole")
        toy.stop_at = 3
        with pytest.raises(KeyboardInterrupt):
            train(config(), tmp_path, tmp_path / "cut")
        toy.stop_at = None
        assert train(config(), tmp_path, tmp_path / "cut", resume=True).info.results == (
            whole.info.results
        )

    def test_that_is_finished_says_so_and_is_returned(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        first = train(config(), tmp_path, tmp_path / "run")
        again = train(config(), tmp_path, tmp_path / "run", resume=True)
        assert again == first
        assert "already finished" in caplog.text

    def test_is_refused_with_another_configuration(self, tmp_path: Path) -> None:
        train(config(), tmp_path, tmp_path / "run")
        with pytest.raises(RunError, match="another configuration"):
            train(config(epochs=4, batch_size=2), tmp_path, tmp_path / "run", resume=True)

    def test_is_refused_with_other_labels_but_not_in_another_place(
        self, tmp_path: Path, toy: type[ToyTask]
    ) -> None:
        first, other = tmp_path / "data", tmp_path / "renamed"
        first.mkdir()
        toy.stop_at = 3
        with pytest.raises(KeyboardInterrupt):
            train(config(), first, tmp_path / "run")
        first.rename(other)
        (other / "labels.txt").write_text("another")
        with pytest.raises(RunError, match=r"not those.*: labels_sha256"):
            train(config(), other, tmp_path / "run", resume=True)
        (other / "labels.txt").unlink()
        toy.stop_at = None
        assert train(config(), other, tmp_path / "run", resume=True).info.status == "finished"

    def test_that_began_before_labels_were_recorded_goes_on(
        self, tmp_path: Path, toy: type[ToyTask]
    ) -> None:
        toy.stop_at = 3
        with pytest.raises(KeyboardInterrupt):
            train(config(), tmp_path, tmp_path / "run")
        record = json.loads((tmp_path / "run" / "run.json").read_text())
        del record["data"]["labels_sha256"]
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        toy.stop_at = None
        assert train(config(), tmp_path, tmp_path / "run", resume=True).info.status == "finished"

    def test_needs_a_run(self, tmp_path: Path) -> None:
        with pytest.raises(RunError, match=r"no training run"):
            train(config(), tmp_path, tmp_path / "nothing", resume=True)

    def test_of_an_older_version_knows_its_best_epoch(
        self, tmp_path: Path, toy: type[ToyTask], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        errors = iter([3.0, 1.0, 1.0, 2.0])
        monkeypatch.setattr(toy, "evaluate", lambda self, model: {"error": next(errors)})
        monkeypatch.setattr(toy, "best", (("error", "min"),))
        root = tmp_path / "run"
        train(config(epochs=3, **CONSTANT), tmp_path, root)
        path = root / checkpoint.NAME
        content = checkpoint.load(path)
        assert content.pop("best_epoch") == 3
        checkpoint.save(path, content | {"best": 1.0})  # that of the first of equal ones
        train(config(epochs=4, patience=2, **CONSTANT), tmp_path, root, resume=True)
        assert checkpoint.load(path)["best_epoch"] == 2


CONSTANT = {"optimizer": {"lr": 0.05, "schedule": "constant"}}


class TestARunThatGetsMoreEpochs:
    @pytest.mark.parametrize("ema_decay", [None, 0.9])
    def test_becomes_what_it_would_have_become_with_them(
        self, tmp_path: Path, ema_decay: float | None
    ) -> None:
        more = config(epochs=4, ema_decay=ema_decay, **CONSTANT)
        whole = train(more, tmp_path, tmp_path / "whole")
        root = tmp_path / "run"
        train(config(epochs=2, ema_decay=ema_decay, **CONSTANT), tmp_path, root)
        raised = train(more, tmp_path, root, resume=True)
        assert open_run(root) == raised
        assert raised.info == whole.info
        assert raised.config.train.epochs == 4
        assert rows(root) == rows(whole.root)
        for which in ("best", "last"):
            assert raised.weights(which).read_bytes() == whole.weights(which).read_bytes()  # type: ignore[arg-type]

    def test_follows_the_schedule_of_the_new_number(self, tmp_path: Path) -> None:
        whole = train(config(epochs=4), tmp_path, tmp_path / "whole")
        train(config(epochs=2), tmp_path, tmp_path / "run")
        train(config(epochs=4), tmp_path, tmp_path / "run", resume=True)
        want, got = ([row["lr"] for row in rows(tmp_path / n)] for n in ("whole", "run"))
        assert got[2:] == want[2:]
        assert float(got[1]) == 0.0
        content = checkpoint.load(whole.root / checkpoint.NAME)
        assert content["scheduler"]["last_epoch"] == 4 * 6

    def test_may_end_where_it_is(self, tmp_path: Path, toy: type[ToyTask]) -> None:
        toy.stop_at = 8
        with pytest.raises(KeyboardInterrupt):
            train(config(epochs=9), tmp_path, tmp_path / "run")
        with pytest.raises(RunError, match=r"done 1 epochs, more than train\.epochs = 0"):
            short = config(epochs=1).train.model_copy(update={"epochs": 0})
            train(ToyConfig(train=short), tmp_path, tmp_path / "run", resume=True)
        run = train(config(epochs=1), tmp_path, tmp_path / "run", resume=True)
        assert (run.info.status, run.info.epoch) == ("finished", 1)


class TestASignalToEnd:
    @pytest.fixture
    def stopped_in(self, monkeypatch: pytest.MonkeyPatch, toy: type[ToyTask]) -> Any:
        """Has a signal come while a method works for the n-th time; see how a run takes it."""

        def arrange(method: str, at: int, owner: Any = toy) -> None:
            calls = count(1)
            work = getattr(owner, method)

            def interrupted(*arguments: Any, **options: Any) -> Any:
                done = work(*arguments, **options)
                if next(calls) == at:
                    signal.raise_signal(signal.SIGTERM)
                return done

            monkeypatch.setattr(owner, method, interrupted)

        return arrange

    @pytest.mark.parametrize("accumulate", [1, 4])
    @pytest.mark.parametrize(
        ("where", "at"), [("step", 8), ("get", 34), ("evaluate", 2), ("finish", 1)]
    )
    def test_keeps_the_run_to_be_exported_and_resumed(
        self,
        where: str,
        at: int,
        accumulate: int,
        tmp_path: Path,
        stopped_in: Any,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        chosen = config(accumulate=accumulate)
        whole = train(chosen, tmp_path, tmp_path / "whole")
        stopped_in(where, at, *([Points] if where == "get" else []))
        with pytest.raises(Stopped):
            train(chosen, tmp_path, tmp_path / "cut")
        cut = open_run(tmp_path / "cut")
        if where == "finish":
            assert cut.info.status == "running"
        else:
            assert (cut.info.status, cut.info.epoch) == ("stopped", 1)
            assert cut.info.results
            assert "can be exported, and resumed" in caplog.text
            assert cut.weights().read_bytes() == cut.weights("last").read_bytes()
            position = checkpoint.load(cut.root / checkpoint.NAME)["position"]
            # at once between steps, with the next batch being loaded; else at the step's end
            want = {1: {"step": 2, "get": 1}, 4: {"step": 4, "get": 4}}[accumulate]
            assert position["batch"] == (want | {"evaluate": 6})[where]
        torch.manual_seed(999)
        cut = train(chosen, tmp_path, cut.root, resume=True)
        assert cut.info == whole.info
        assert rows(cut.root) == rows(whole.root)
        for which in ("best", "last"):
            assert cut.weights(which).read_bytes() == whole.weights(which).read_bytes()  # type: ignore[arg-type]

    def test_in_the_first_epoch_leaves_a_run_to_resume(
        self, tmp_path: Path, stopped_in: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        stopped_in("step", 2)
        with pytest.raises(Stopped):
            train(config(), tmp_path, tmp_path / "run")
        assert "no epoch is done" in caplog.text
        assert open_run(tmp_path / "run").info.status == "running"
        assert checkpoint.load(tmp_path / "run" / checkpoint.NAME)["position"]["batch"] == 2

    def test_that_comes_twice_leaves_out_what_an_export_needs(
        self, tmp_path: Path, stopped_in: Any, monkeypatch: pytest.MonkeyPatch, toy: type[ToyTask]
    ) -> None:
        stopped_in("step", 8)
        finish = toy.finish

        def impatient(*arguments: Any) -> dict[str, Any]:
            signal.raise_signal(signal.SIGINT)
            return finish(*arguments)

        monkeypatch.setattr(toy, "finish", impatient)
        with pytest.raises(Stopped):
            train(config(), tmp_path, tmp_path / "run")
        assert open_run(tmp_path / "run").info.status == "running"
        assert checkpoint.load(tmp_path / "run" / checkpoint.NAME)["position"]["batch"] == 2

    def test_keeps_what_is_worked_with(self, tmp_path: Path, stopped_in: Any) -> None:
        stopped_in("step", 8)
        with pytest.raises(Stopped):
            train(config(), tmp_path, tmp_path / "run")
        assert (tmp_path / "run" / "rows.work").exists()
