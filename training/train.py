"""The one training loop: a configuration and a folder of data become a run.

Read ``train`` and ``_train`` from top to bottom: they are in the order in which things happen.
"""

from __future__ import annotations

import csv
import importlib
import io
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from pydantic import JsonValue
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.tensorboard import SummaryWriter

from engineworks.runtime import files, labels
from engineworks.runtime.errors import BackendError, ConfigError, RunError
from engineworks.runtime.folders import Tally
from engineworks.runtime.labels import Labelled
from engineworks.runtime.survey import survey
from engineworks.training import checkpoint
from engineworks.training.allocator import keep_freed_memory
from engineworks.training.config import OptimizerConfig, SystemConfig, TrainConfig, dump, read_text
from engineworks.training.data import iterate, labels_fingerprint
from engineworks.training.profiler import Profiler, section
from engineworks.training.run import (
    CONFIG_NAME,
    Run,
    RunInfo,
    clear,
    is_run,
    open_run,
    remove,
    reserve,
)
from engineworks.training.systems import system_package
from engineworks.training.task import Paced, Position, Progress, Task

_log = logging.getLogger(__name__)
_PACKAGES = ("engineworks", "torch", "timm", "accelerate", "numpy")


def train(
    config: SystemConfig,
    data: Path,
    out: Path | None = None,
    *,
    resume: bool = False,
    exist_ok: bool = False,
    profile: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train a system.

    Args:
        data: folder in the system's layout.
        out: run folder; None takes the next free ``runs/<system>/trainN``.
        resume: go on where the run in ``out`` stopped, to exactly what it would have become; a
            finished run is returned as it is.
        exist_ok: replace a run that is already in ``out``.
        profile: add to the results what each section of a step costs; see ``training.profiler``.
        progress: called with (what, done, of).

    Raises:
        RunError: ``out`` is in the way, cannot be resumed, or the loss is not a number any more.
        InUseError: another process trains there.
        DatasetError, WeightsError: from the task.
        BackendError: the device asked for is not there.
    """
    if resume and out is not None:
        open_run(out)  # refuses a wrong path before a folder is made there
    accelerator = _accelerator(config.train)
    with ExitStack() as stack:
        chosen: list[Path | None] = [None]
        if accelerator.is_main_process:
            chosen = [stack.enter_context(reserve(out, config.system))]
        (root,) = broadcast_object_list(chosen)
        assert root is not None
        before = _before(root, config, resume=resume, exist_ok=exist_ok)
        if before is None or before.info.status != "finished":
            return _train(config, data, root, before, accelerator, profile, progress)
        _log.warning("run %s is already finished: nothing to resume", root)
        remove(root, _task(config).working)
        return before


def _task(config: SystemConfig) -> Any:
    """The class of a system's task."""
    return importlib.import_module(f"{system_package(config.system)}.task").Task


def _train(
    config: SystemConfig,
    data: Path,
    root: Path,
    before: Run | None,
    accelerator: Accelerator,
    profile: bool,
    progress: Progress | None,
) -> Run:
    """Train in a folder that belongs to this process, on from ``before`` or from the beginning."""
    report: Progress = progress or (lambda what, done, of: None)
    settings = config.train
    state = _state(root) if before is not None else None
    keep_freed_memory()
    set_seed(settings.seed)
    main = accelerator.is_main_process
    # built first: a wrong path or weights file must leave no folder, and a replaced run whole
    task: Task = _task(config)(config, data, root, weights=state is None)
    _check_labels(task.dataset, data)
    if before is None and main:
        clear(root, (*task.written, *task.working))
        (root / "weights").mkdir()
    accelerator.wait_for_everyone()
    summary = {**task.data_summary, "labels_sha256": labels_fingerprint(task.dataset)}
    if before is None:
        run = Run(root, config, _record(config, task, accelerator, summary))
        if main:
            run.save()
    else:
        run = before
        if unlike := _unlike(run.info.data, summary):
            raise RunError(
                f"the data in {data} are not those that run {root} was trained on: "
                f"{', '.join(unlike)}",
                fix="give the same data to --resume, or train into a new folder",
            )

    parameters = [p for p in task.model.parameters() if p.requires_grad]
    model, loader = accelerator.prepare(task.model, task.loader())
    steps_per_epoch = math.ceil(len(loader) / settings.accumulate)
    optimizer = scheduler = ema = None
    if parameters:
        paced = task if isinstance(task, Paced) else None
        groups = paced.groups() if paced else [(parameters, 1.0)]
        optimizer = accelerator.prepare(_optimizer(groups, settings.optimizer))
        scheduler = _scheduler(optimizer.optimizer, settings, steps_per_epoch, paced)
        if settings.ema_decay is not None:
            average = get_ema_multi_avg_fn(settings.ema_decay)  # type: ignore[no-untyped-call]
            ema = AveragedModel(task.model, multi_avg_fn=average, use_buffers=True)
    parts: dict[str, Any] = {
        "model": task.model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "ema": ema,
        "scaler": accelerator.scaler,
    }
    parts = {name: part for name, part in parts.items() if part is not None}

    position, history, totals = Position(), list[dict[str, float]](), dict[str, Tensor]()
    best: float | None = None
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        position = Position(**state["position"])
        history, totals, best = state["history"], state["totals"], state["best"]
        totals = {name: value.to(accelerator.device) for name, value in totals.items()}
        checkpoint.set_rng_state(state["rng"])

    def save_checkpoint() -> None:
        content = {name: part.state_dict() for name, part in parts.items()}
        content |= {"position": vars(position), "history": history, "totals": totals}
        content |= {"best": best, "rng": checkpoint.rng_state()}
        with section("checkpoint"):
            checkpoint.save(root / checkpoint.NAME, content)

    clip_norm = settings.optimizer.clip_norm
    profiler = Profiler() if profile else None
    with ExitStack() as stack:
        if profiler is not None:
            stack.enter_context(profiler)
        writer = SummaryWriter(str(root), purge_step=position.epoch or None) if main else None
        if writer is not None:  # its thread ends with it, also where training fails
            stack.callback(writer.close)
        for epoch in range(position.epoch, settings.epochs):
            model.train(optimizer is not None)
            batches = (
                accelerator.skip_first_batches(loader, position.batch) if position.batch else loader
            )
            batches.set_epoch(epoch)
            for batch in _timed(batches):
                with accelerator.accumulate(model), torch.set_grad_enabled(optimizer is not None):
                    losses = task.step(model, batch, position)
                    if optimizer is not None and scheduler is not None:
                        with section("backward"):
                            accelerator.backward(losses["loss"])
                        with section("optimizer"):
                            if accelerator.sync_gradients and clip_norm is not None:
                                accelerator.clip_grad_norm_(parameters, clip_norm)
                            optimizer.step()
                            optimizer.zero_grad()
                for name, loss in losses.items():
                    totals[name] = totals.get(name, 0) + loss.detach().double()
                position = replace(position, batch=position.batch + 1)
                if accelerator.sync_gradients:
                    position = replace(position, step=position.step + 1)
                    if scheduler is not None and not accelerator.optimizer_step_was_skipped:
                        scheduler.step()
                    if ema is not None:
                        ema.update_parameters(task.model)
                    every = settings.checkpoint_steps
                    if every is not None and position.step % every == 0 and main:
                        save_checkpoint()
                report(f"epoch {epoch + 1}/{settings.epochs}", position.batch, len(loader))

            row = _means(totals, position.batch, accelerator) | {"epoch": epoch + 1.0}
            if scheduler is not None:
                row["lr"] = float(scheduler.get_last_lr()[0])
            model.eval()
            position, totals = Position(epoch=epoch + 1, step=position.step), {}
            if main and writer is not None:
                kept: nn.Module = task.model if ema is None else ema.module
                with torch.no_grad(), section("evaluation"):
                    row |= task.evaluate(kept.eval())
                history.append(row)
                files.write(root / "metrics.csv", _table(history))
                for name, value in row.items():
                    writer.add_scalar(name, value, epoch + 1)
                weights = to_bytes({k: v.cpu().contiguous() for k, v in kept.state_dict().items()})
                files.write(root / "weights" / "last.safetensors", weights)
                if task.best is None or _better(row[task.best[0]], best, task.best[1]):
                    best = row[task.best[0]] if task.best else None
                    files.write(root / "weights" / "best.safetensors", weights)
                save_checkpoint()
                run = run.updated(epoch=position.epoch, step=position.step)
            accelerator.wait_for_everyone()

    if main:
        with torch.no_grad():
            results = task.finish(run, task.model.eval(), report)
        if profiler is not None:
            results |= {"profile": cast(JsonValue, profiler.shares())}
        run = run.updated(status="finished", results=results)
        remove(root, task.working)
    accelerator.wait_for_everyone()
    return run


def _timed(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, with the time that they take to come under ``data``."""
    iterator = iterate(batches)
    while True:
        with section("data"):
            batch = next(iterator, None)
        if batch is None:
            return
        yield batch


def _before(root: Path, config: SystemConfig, *, resume: bool, exist_ok: bool) -> Run | None:
    """The run to go on with, or None to begin; refuses what may not be touched."""
    if resume:
        run = open_run(root)
        if run.config != config:
            raise RunError(
                f"run {root} was started with another configuration",
                fix="resume without --config and --set, or train into a new folder",
            )
        return run
    if is_run(root) and not exist_ok:
        raise RunError(
            f"run {root} already exists",
            fix="choose another --out, go on with --resume, or replace it with --exist-ok",
        )
    if not is_run(root) and not _is_beginning(root, config):
        raise RunError(
            f"{root} holds files that are not a training run's", fix="choose another --out"
        )
    return None


def _is_beginning(root: Path, config: SystemConfig) -> bool:
    """Whether a folder is empty, or what a run leaves that is killed before it has a record."""
    for path in root.iterdir():
        if path.name == CONFIG_NAME and path.is_file():
            if read_text(path) != dump(config):
                return False
        elif path.name != "weights" or not path.is_dir() or any(path.iterdir()):
            return False
    return True


def _state(root: Path) -> dict[str, Any] | None:
    path = checkpoint.latest(root)
    return None if path is None else checkpoint.load(path)


def _accelerator(settings: TrainConfig) -> Accelerator:
    """Device, arithmetic and accumulation.

    Raises:
        BackendError: CUDA was asked for and is not there.
        ConfigError: fp16 without CUDA.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "train.device is cuda, and torch sees no CUDA device",
            fix="use --set train.device=cpu (or auto), or check the driver with `cli.py doctor`",
        )
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    if settings.precision == "fp16" and on_cpu:
        raise ConfigError(
            "train.precision is fp16, which needs a CUDA device", fix="use bf16 or fp32"
        )
    return Accelerator(
        cpu=on_cpu,
        mixed_precision="no" if settings.precision == "fp32" else settings.precision,
        gradient_accumulation_steps=settings.accumulate,
    )


def _check_labels(labelled: Labelled, data: Path) -> None:
    """The quick half of ``runtime.survey``.

    Raises:
        DatasetError: training would be wrong.
    """
    found = survey(labelled, quick=True)
    own = Tally()  # the reader has told its notes
    own.names = {
        k: names for k, names in found.notes.names.items() if k not in labelled.notes.names
    }
    labels.tell(data, found.left_out, own)
    found.faults.check(data)


def _unlike(before: Mapping[str, JsonValue], now: Mapping[str, JsonValue]) -> list[str]:
    """What of the data has changed; their place may, and older runs recorded less."""
    return [key for key in before if key != "folder" and before[key] != now.get(key)]


def _record(
    config: SystemConfig, task: Task, accelerator: Accelerator, data: dict[str, JsonValue]
) -> RunInfo:
    return RunInfo(
        system=config.system,
        seed=config.train.seed,
        device=str(accelerator.device),
        precision=config.train.precision,
        versions={package: metadata.version(package) for package in _PACKAGES},
        data=data,
        provenance=task.provenance,
    )


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


def _means(totals: Mapping[str, Tensor], count: int, accelerator: Accelerator) -> dict[str, float]:
    """Mean losses of an epoch over its batches and all processes.

    Raises:
        RunError: one is not finite.
    """
    means = {n: float(accelerator.reduce(t / count, "mean")) for n, t in totals.items()}
    for name, mean in means.items():
        if not math.isfinite(mean):
            raise RunError(
                f"the training loss '{name}' is {mean}",
                fix="lower train.optimizer.lr, set train.optimizer.clip_norm, or use fp32",
            )
    return means


def _better(value: float, best: float | None, mode: str) -> bool:
    return best is None or (value > best if mode == "max" else value < best)


def _table(history: list[dict[str, float]]) -> str:
    names = ["epoch", *sorted({name for row in history for name in row} - {"epoch"})]
    text = io.StringIO()
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(row | {"epoch": int(row["epoch"])} for row in history)
    return text.getvalue()
