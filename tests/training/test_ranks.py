"""Several processes that train together, with the small system of these tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engineworks.runtime.errors import RunError
from engineworks.training import checkpoint
from engineworks.training.run import open_run
from engineworks.training.train import train
from tests.training.fleet import together, train_toy
from tests.training.toy import config, rows

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("toy")]

# Adam makes steps of what rounding leaves where a norm follows a bias
SGD = {"name": "sgd", "lr": 0.01}
VARIANTS: dict[str, dict[str, Any]] = {
    "parts of two, and of one": {"optimizer": SGD},
    "unlike parts, accumulation, clipping, average": {
        "accumulate": 2,
        "ema_decay": 0.9,
        "batch_size": 5,
        "optimizer": {**SGD, "clip_norm": 0.5},
    },
}


def numbers(root: Path) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items()} for row in rows(root)]


class TestARunOfTwo:
    @pytest.mark.parametrize("name", VARIANTS)
    def test_becomes_what_a_run_of_one_becomes(self, name: str, tmp_path: Path, toy: Any) -> None:
        toy.dropout = 0.0
        one = train(config(**VARIANTS[name]), tmp_path, tmp_path / "one")
        first, second = together(train_toy, tmp_path / "two", VARIANTS[name])
        assert first == second
        assert (first["processes"], one.info.processes) == (2, 1)
        assert (first["step"], first["status"]) == (one.info.step, "finished")
        # float32 of sums in another order
        for mine, theirs in zip(numbers(one.root), numbers(tmp_path / "two"), strict=True):
            assert theirs == pytest.approx(mine, rel=1e-4)
        want, got = (
            load_file(run / "weights" / "last.safetensors") for run in (one.root, tmp_path / "two")
        )
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

    def test_goes_on_after_one_has_failed(self, tmp_path: Path) -> None:
        changes = {"checkpoint_steps": 1}
        whole, _ = together(train_toy, tmp_path / "whole", changes, dropout=0.2)
        found = together(train_toy, tmp_path / "cut", changes, dropout=0.2, at=8, event="fails")
        lost = ("RankError", "another process of this training has ended")
        assert found[1] == ("RunError", "the disk is gone")
        assert (found[0][0], found[0][1].split("\n")[0]) == lost
        cut, _ = together(train_toy, tmp_path / "cut", changes, dropout=0.2, resume=True)
        assert cut == whole
        assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
        for which in ("best", "last"):
            files = [tmp_path / n / "weights" / f"{which}.safetensors" for n in ("cut", "whole")]
            assert files[0].read_bytes() == files[1].read_bytes()

    def test_stops_together_where_one_is_told_to(self, tmp_path: Path) -> None:
        whole, _ = together(train_toy, tmp_path / "whole", {}, dropout=0.2)
        found = together(train_toy, tmp_path / "cut", {}, dropout=0.2, at=8, event="is told to end")
        assert found == [("Stopped", "stopped by SIGTERM")] * 2
        stopped = open_run(tmp_path / "cut")
        assert (stopped.info.status, stopped.info.epoch, stopped.info.step) == ("stopped", 1, 9)
        with pytest.raises(RunError, match="was trained by 2 processes"):
            train_toy_alone(tmp_path / "cut")
        cut, _ = together(train_toy, tmp_path / "cut", {}, dropout=0.2, resume=True)
        assert cut == whole
        assert rows(tmp_path / "cut") == rows(tmp_path / "whole")

    def test_draws_numbers_of_its_own_in_each(self, tmp_path: Path) -> None:
        together(train_toy, tmp_path / "run", {"epochs": 1})
        content = checkpoint.load(tmp_path / "run" / checkpoint.NAME)
        states = [checkpoint.loads(each.numpy().tobytes())["rng"] for each in content["ranks"]]
        assert not torch.equal(states[0]["torch"], states[1]["torch"])

    def test_needs_samples_for_all(self, tmp_path: Path) -> None:
        found = together(train_toy, tmp_path / "run", {"batch_size": 7, "epochs": 1})
        assert [error for error, _ in found] == ["ConfigError"] * 2
        assert "1 of 22 samples" in found[0][1]
        assert "train.batch_size to 6 or 8" in found[0][1]


def train_toy_alone(root: Path) -> None:
    train(config(), root.parent, root, resume=True)
