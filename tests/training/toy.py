"""A task that trains in a moment: the loop is tested on it."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engineworks.runtime.labels import Item, Labelled
from engineworks.training import ranks
from engineworks.training.config import SystemConfig, validate
from engineworks.training.data import loader
from engineworks.training.systems import TASKS
from engineworks.training.task import Criterion


class Points:
    """Points with a little augmentation: the loop must reproduce it after a resume."""

    def __len__(self) -> int:
        return 22

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        x = np.random.default_rng(index).standard_normal(4).astype(np.float32)
        noise = rng.normal(0, 0.1, 4).astype(np.float32) + torch.randn(4).numpy() * 0.1
        return {"x": x + noise, "y": np.float32(x.sum())}


class ToyConfig(SystemConfig):
    system: str = "toy"


class ToyTask:
    """Fits a sum; ``stop_at`` plays the power cut."""

    written = ("left.json",)
    working = ("*.work",)
    best: tuple[Criterion, ...] = (("error", "min"), ("loss", "min"))
    stop_at: int | None = None
    bad_from: int | None = None
    dropout = 0.2

    def __init__(self, config: ToyConfig, data: Path, root: Path, *, weights: bool = True) -> None:
        self.config = config
        # dropout draws from the global generator: its state must survive a resume
        self.model = nn.Sequential(
            nn.Linear(4, 8), nn.Dropout(self.dropout), nn.BatchNorm1d(8), nn.Linear(8, 1)
        )
        said = data / "labels.txt"
        label = said.read_text() if said.exists() else ""
        self.dataset = Labelled(
            {"train": (Item("a", (said,), partial(np.zeros, (2, 2, 3)), label),)}
        )
        self.data_summary = {"folder": data.name, "sha256": "0" * 64}
        self.provenance = {"weights": "random"}
        self.batches = 0

    def loader(self) -> Any:
        return loader(Points(), self.config.train, shuffle=True, part=ranks.part())

    def step(self, model: nn.Module, batch: Any, position: Any) -> dict[str, Tensor]:
        if self.batches == self.stop_at:
            raise KeyboardInterrupt
        self.batches += 1
        loss = ranks.mean_loss((model(batch["x"])[:, 0] - batch["y"]).square())
        if self.bad_from is not None and position.step >= self.bad_from:
            loss = loss * float("nan")
        return {"loss": loss, "bias": self.model[0].bias.abs().sum()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        x = torch.eye(4)
        return {"error": float((model(x)[:, 0] - 1).abs().mean())}

    def finish(self, run: Any, model: nn.Module, progress: Any) -> dict[str, Any]:
        assert run.info.status == "running"
        (run.root / "rows.work").touch()
        return {"weight": float(model[0].weight.sum())}


def known(put: Callable[[dict[str, Any], str, Any], None]) -> type[ToyTask]:
    """The system "toy" with a task of its own, put where the loop looks for it."""
    task = type("Task", (ToyTask,), {})
    package, config_module, task_module = (ModuleType(n) for n in ("toy", "toy.config", "toy.task"))
    config_module.TaskConfig = ToyConfig  # type: ignore[attr-defined]
    task_module.Task = task  # type: ignore[attr-defined]
    for module in (package, config_module, task_module):
        put(sys.modules, module.__name__, module)
    put(TASKS, "toy", "toy")
    return task


def config(**changes: Any) -> ToyConfig:
    settings = {"epochs": 3, "batch_size": 4, "device": "cpu", "optimizer": {"lr": 0.05}}
    return validate(ToyConfig, {"train": {**settings, **changes}})


def rows(root: Path) -> list[dict[str, str]]:
    with (root / "metrics.csv").open() as file:
        return list(csv.DictReader(file))
