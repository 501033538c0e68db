"""State: where a run stands, and how it is taken up again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engineworks.runtime.errors import RunError
from engineworks.training import checkpoint, ranks
from engineworks.training.profiler import section
from engineworks.training.task import Criterion, Position


@dataclass
class State:
    """All that changes while a run is trained: what a checkpoint keeps.

    Attributes:
        parts: name -> what has a state of its own: model, optimizer, schedule, average, scaler.
        criteria: what chooses the best epoch, see ``Task.best``.
        position: epochs, batches of the current one and optimizer steps that are done.
        totals: name -> sum of a loss over the batches of the current epoch, () float64.
        history: a row per epoch: mean losses, learning rate and metrics.
        best: the epoch, from 1, whose weights are weights/best; 0 before there is one.
        of_ranks: what is each rank's own, see ``collect``; empty for a process that is alone.
    """

    parts: Mapping[str, Any]
    criteria: Sequence[Criterion]
    position: Position = field(default_factory=Position)
    totals: dict[str, Tensor] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    best: int = 0
    of_ranks: Sequence[bytes] = ()

    def collect(self, *, closing: bool = False) -> None:
        """Let the main process have what its next checkpoint needs of the others; called by all.

        Args:
            closing: that checkpoint is written with the epoch closed, whose losses are none then.
        """
        if ranks.size() > 1:
            own = {"rng": checkpoint.rng_state(), "totals": {} if closing else self.totals}
            self.of_ranks = ranks.each(checkpoint.dumps(own))

    def save(self, path: Path) -> None:
        """Write a checkpoint, in one step."""
        content = {name: part.state_dict() for name, part in self.parts.items()}
        content |= {"position": vars(self.position), "history": self.history}
        content |= {"totals": self.totals, "best_epoch": self.best, "rng": checkpoint.rng_state()}
        if self.of_ranks:
            rows = [torch.frombuffer(bytearray(each), dtype=torch.uint8) for each in self.of_ranks]
            content["ranks"] = rows
        with section("checkpoint"):
            checkpoint.save(path, content)

    def restore(self, content: Mapping[str, Any], device: torch.device) -> None:
        """Become what ``save`` wrote, and put the generators of this process back.

        Args:
            content: from ``checkpoint.load``.
            device: where the losses are summed up.
        """
        for name, part in self.parts.items():
            part.load_state_dict(content[name])
        self.position = Position(**content["position"])
        own = content
        if not ranks.is_main():
            own = checkpoint.loads(content["ranks"][ranks.here().rank].numpy().tobytes())
        self.totals = {name: value.to(device) for name, value in own["totals"].items()}
        self.history = content["history"]
        # older checkpoints kept the metric's value, of the first epoch that reached it
        self.best = content["best_epoch"] if "best_epoch" in content else self._first_best()
        checkpoint.set_rng_state(own["rng"])

    def add(self, losses: Mapping[str, Tensor], *, stepped: bool) -> None:
        """Count a batch, and the optimizer step that it ended."""
        for name, loss in losses.items():
            self.totals[name] = self.totals.get(name, 0) + loss.detach().double()
        epoch, batch, step = vars(self.position).values()
        self.position = Position(epoch, batch + 1, step + stepped)

    def means(self) -> dict[str, float]:
        """Mean losses of the epoch over its batches and all ranks.

        Raises:
            RunError: one is not finite.
        """
        count = self.position.batch
        means = {n: float(ranks.mean(total / count)) for n, total in self.totals.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise RunError(
                    f"the training loss '{name}' is {mean}",
                    fix="lower train.optimizer.lr, set train.optimizer.clip_norm, or use fp32",
                )
        return means

    def close_epoch(self, row: Mapping[str, float] | None = None) -> None:
        """Go on to the next epoch.

        Args:
            row: of the history, in the process that keeps it.
        """
        self.position = Position(self.position.epoch + 1, 0, self.position.step)
        self.totals = {}
        if row is not None:
            self.history.append(dict(row))
            if not self.best or self._rank(self.position.epoch) >= self._rank(self.best):
                self.best = self.position.epoch

    @property
    def is_best(self) -> bool:
        """Whether no epoch was better than the last one."""
        return self.best == self.position.epoch

    def is_stale(self, patience: int | None) -> bool:
        """Whether the best epoch is so many epochs ago."""
        return patience is not None and self.position.epoch - self.best >= patience

    def _rank(self, epoch: int) -> tuple[float, ...]:
        """What an epoch is compared by, the larger the better; equal ones go to the later."""
        row = self.history[epoch - 1]
        return tuple(row[name] if mode == "max" else -row[name] for name, mode in self.criteria)

    def _first_best(self) -> int:
        if not self.criteria:
            return len(self.history)
        values = [self._rank(epoch + 1)[0] for epoch in range(len(self.history))]
        return values.index(max(values)) + 1 if values else 0
