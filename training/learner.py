"""Learner: a task's model, its batches, and what moves its parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from engineworks.training import ranks
from engineworks.training.config import OptimizerConfig, TrainConfig
from engineworks.training.data import iterate
from engineworks.training.norms import share_statistics
from engineworks.training.profiler import section
from engineworks.training.task import Paced, Position, Task


class Learner:
    """Takes one batch after the other. Where no parameter wants a gradient, nothing moves.

    With several ranks each takes its part of a batch, and all move alike.

    Attributes:
        num_batches: of an epoch.
        parts: name -> what a checkpoint must keep: model, optimizer, schedule, average, scaler.
    """

    def __init__(self, task: Task, settings: TrainConfig, accelerator: Accelerator) -> None:
        self._task = task
        self._accelerator = accelerator
        self._clip_norm = settings.optimizer.clip_norm
        self._parameters = [p for p in task.model.parameters() if p.requires_grad]
        if self._parameters and ranks.size() > 1:
            share_statistics(task.model)
        self._model = accelerator.prepare(task.model)  # first: a loader may ask it for features
        self._loader = accelerator.prepare(task.loader())
        self.num_batches = len(self._loader)
        self._optimizer = self._scheduler = self._average = None
        if self._parameters:
            paced = task if isinstance(task, Paced) else None
            groups = paced.groups() if paced else [(self._parameters, 1.0)]
            self._optimizer = accelerator.prepare(_optimizer(groups, settings.optimizer))
            steps_per_epoch = math.ceil(self.num_batches / settings.accumulate)
            self._scheduler = _scheduler(
                self._optimizer.optimizer, settings, steps_per_epoch, paced
            )
            if settings.ema_decay is not None:
                average = get_ema_multi_avg_fn(settings.ema_decay)  # type: ignore[no-untyped-call]
                self._average = AveragedModel(task.model, multi_avg_fn=average, use_buffers=True)
        parts: dict[str, Any] = {
            "model": task.model,
            "optimizer": self._optimizer,
            "scheduler": self._scheduler,
            "ema": self._average,
            "scaler": accelerator.scaler,
        }
        self.parts = {name: part for name, part in parts.items() if part is not None}

    def follow_schedule(self) -> None:
        """Take the rates of this configuration's schedule, also where a checkpoint had others."""
        if self._scheduler is not None:
            schedule = self._scheduler
            groups = schedule.optimizer.param_groups
            for group, rate, factor in zip(
                groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
            ):
                group["lr"] = rate * factor(schedule.last_epoch)

    def batches(self, position: Position) -> Iterator[Any]:
        """Those that an epoch still has; loading them is booked under ``data``."""
        self._model.train(self._optimizer is not None)
        loader = self._loader
        if position.batch:
            loader = self._accelerator.skip_first_batches(loader, position.batch)
        loader.set_epoch(position.epoch)
        if self._optimizer is not None:
            ranks.align(self._task.model)  # buffers that each computes may come to differ in a bit
        return _timed(loader)

    def learn(self, batch: Any, position: Position) -> Mapping[str, Tensor]:
        """Losses of a batch. Parameters move with the last batch of a step, see ``stepped``."""
        learns = self._optimizer is not None
        with self._accelerator.accumulate(self._model), torch.set_grad_enabled(learns):
            losses = self._task.step(self._model, batch, position)
            if learns:
                self._move(losses["loss"])
        if self.stepped:
            if self._scheduler is not None and not self._accelerator.optimizer_step_was_skipped:
                self._scheduler.step()
            if self._average is not None:
                self._average.update_parameters(self._task.model)
        return losses

    @property
    def stepped(self) -> bool:
        """Whether the last batch ended a step: no gradient waits for further ones."""
        return bool(self._accelerator.sync_gradients)

    @property
    def rate(self) -> float | None:
        """Learning rate of the first group, where anything learns."""
        return None if self._scheduler is None else float(self._scheduler.get_last_lr()[0])

    def judged(self) -> nn.Module:
        """The model that is judged and kept, in eval mode: the average, where there is one."""
        self._model.eval()
        kept: nn.Module = self._task.model if self._average is None else self._average.module
        return kept.eval()

    def _move(self, loss: Tensor) -> None:
        assert self._optimizer is not None
        with section("backward"):
            self._accelerator.backward(loss)
        if self._accelerator.sync_gradients:
            ranks.average_gradients(self._parameters)
        with section("optimizer"):
            if self._accelerator.sync_gradients and self._clip_norm is not None:
                self._accelerator.clip_grad_norm_(self._parameters, self._clip_norm)
            self._optimizer.step()
            self._optimizer.zero_grad()


def _timed(batches: Iterable[Any]) -> Iterator[Any]:
    iterator = iterate(batches)
    while True:
        with section("data"):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def _optimizer(
    groups: Sequence[tuple[Sequence[nn.Parameter], float]], settings: OptimizerConfig
) -> Optimizer:
    """Of groups of parameters, each with its factor of the learning rate."""
    rated = [{"params": list(group), "lr": settings.lr * factor} for group, factor in groups]
    if settings.name == "adamw":
        return AdamW(rated, weight_decay=settings.weight_decay)
    return SGD(
        rated,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        nesterov=settings.momentum > 0,
    )


def _scheduler(
    optimizer: Optimizer, settings: TrainConfig, steps_per_epoch: int, paced: Paced | None
) -> LambdaLR:
    """Linear warm-up, then constant or half a cosine down to zero, times the task's pace."""
    total = steps_per_epoch * settings.epochs
    warmup = settings.optimizer.warmup_epochs * steps_per_epoch

    def factor(step: int) -> float:
        pace = paced.pace(step // steps_per_epoch) if paced else 1.0
        if step < warmup:
            return pace * (step + 1) / (warmup + 1)
        if settings.optimizer.schedule == "constant":
            return pace
        return pace * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))

    return LambdaLR(optimizer, factor)
