"""The one training loop: a configuration and a folder of data become a run.

Read ``train``, ``_train`` and ``_Loop`` from top to bottom: they are in the order in which things
happen. What moves the parameters is in ``training.learner``, what a checkpoint keeps in
``training.state``.
"""

from __future__ import annotations

import importlib
import logging
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from pydantic import JsonValue
from safetensors.torch import save as to_bytes
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from engineworks.runtime import files, labels, signals
from engineworks.runtime.errors import BackendError, ConfigError, RunError
from engineworks.runtime.folders import Tally
from engineworks.runtime.labels import Labelled
from engineworks.runtime.signals import Stopped, stoppable, unbroken
from engineworks.runtime.survey import survey
from engineworks.training import checkpoint, ranks
from engineworks.training.allocator import keep_freed_memory
from engineworks.training.backbones import read_weights
from engineworks.training.config import SystemConfig, TrainConfig
from engineworks.training.data import labels_fingerprint
from engineworks.training.learner import Learner
from engineworks.training.processes import untold
from engineworks.training.profiler import Profiler, section
from engineworks.training.run import (
    Run,
    RunInfo,
    Weights,
    check_place,
    clear,
    open_run,
    remove,
    reserve,
    to_go_on,
    write_history,
)
from engineworks.training.state import State
from engineworks.training.systems import system_package
from engineworks.training.task import Progress, Task

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

    A signal to end (Ctrl-C, SIGTERM, SIGHUP) waits for the end of a step and keeps the run: a
    checkpoint is written and, where an epoch is done, all that an export needs. A second Ctrl-C
    leaves out the latter. What is logged at INFO is a line per epoch.

    Where the environment tells of several processes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT),
    they train together, each its part of every batch; see ``training.ranks``.

    Args:
        data: folder in the system's layout.
        out: run folder; None takes the next free ``runs/<system>/trainN``.
        resume: go on where the run in ``out`` stopped, to exactly what it would have become. Its
            ``train.epochs`` and ``train.patience`` may be others; the learning rate follows the
            schedule of the new number from there on. A run that has nothing left to do is
            returned as it is.
        exist_ok: replace a run that is already in ``out``.
        profile: add to the results what each section of a step costs; see ``training.profiler``.
        progress: called with (what, done, of).

    Raises:
        RunError: ``out`` is in the way, cannot be resumed, or the loss is not a number any more.
        InUseError: another process trains there.
        DatasetError, WeightsError: from the task.
        ConfigError: ``train.patience`` without data that choose the best epoch.
        BackendError: the device asked for is not there, or other processes are not.
        RankError: another process of this training has ended.
        Stopped: by a signal; a ``KeyboardInterrupt``.
    """
    if resume and out is not None:
        open_run(out)  # refuses a wrong path before a folder is made there
    with ranks.joined(config.train.device), stoppable(), ExitStack() as stack:
        accelerator = _accelerator(config.train)
        progress = progress if progress is not None and ranks.is_main() else _silent
        root = _place(config, out, stack)
        before = None
        if not resume:
            if ranks.is_main():
                check_place(root, config, exist_ok=exist_ok)
        elif (before := open_run(root)).info.status == "finished" and before.config == config:
            if ranks.is_main():
                _log.warning("run %s is already finished: nothing to resume", root)
                remove(root, _task(config).working)
            return before
        else:
            before = to_go_on(before, config, ranks.size())
        return _train(config, data, root, before, accelerator, profile, progress)


def _place(config: SystemConfig, out: Path | None, stack: ExitStack) -> Path:
    """The folder of a run, which the main process reserves.

    Raises:
        InUseError: another process trains there.
        RunError: this machine does not see it.
    """
    if ranks.is_main():
        root = stack.enter_context(reserve(out, config.system))
        ranks.tell(str(root.absolute()))
        return root
    root = Path(ranks.tell(""))
    if not root.is_dir():
        raise RunError(
            f"{socket.gethostname()} does not see the folder {root}",
            fix="train into a folder that all machines share",
        )
    return root


def conclude(
    root: Path, data: Path, weights: Weights = "best", *, progress: Progress | None = None
) -> Run:
    """Make what an export needs of a run as it is, with its best or its last weights.

    For a run that was killed, or where other weights are wanted than those that training
    concluded with; the record then names these.

    Args:
        data: what the run was trained on.
        progress: called with (what, done, of).

    Raises:
        RunError: no run, none of these data, or one that has not done an epoch.
        InUseError: another process trains there.
    """
    before = open_run(root)
    before.weights(weights)
    accelerator = _accelerator(before.config.train)
    with stoppable(), reserve(root, before.config.system):
        task: Task = _task(before.config)(before.config, data, root, weights=False)
        _check_same_data(before, data, _summary(task))
        task.model.to(accelerator.device)
        status: Literal["stopped", "finished"] = (
            "finished" if before.info.status == "finished" else "stopped"
        )
        # what is killed on the way must not look like what it was before
        begun = before.updated(status="running", results={})
        return _conclude(begun, task, progress or _silent, status=status, weights=weights)


def _train(
    config: SystemConfig,
    data: Path,
    root: Path,
    before: Run | None,
    accelerator: Accelerator,
    profile: bool,
    progress: Progress,
) -> Run:
    """Train in a folder that belongs to this process, on from ``before`` or from the beginning."""
    saved = None if before is None else checkpoint.latest(root)
    content = None if saved is None else checkpoint.load(saved)
    keep_freed_memory()
    set_seed(config.train.seed)
    # built first: a wrong path or weights file must leave no folder, and a replaced run whole
    task: Task = _task(config)(config, data, root, weights=content is None)
    _check_labels(task.dataset, data)
    _check_patience(config.train, task)
    run = _open_record(config, data, root, before, task, accelerator)
    if not ranks.is_main():  # built alike, from here on the ranks draw their own numbers
        set_seed(ranks.own_seed(config.train.seed))
    learner = Learner(task, config.train, accelerator)
    state = State(learner.parts, task.best or ())
    if content is not None:
        state.restore(content, accelerator.device)
        learner.follow_schedule()
    loop = _Loop(run, task, learner, state, progress)
    with ExitStack() as stack:
        profiler = stack.enter_context(Profiler()) if profile else None
        loop.log_to(stack)
        if ranks.size() > 1:  # they stop together, and nowhere else
            stack.enter_context(unbroken())
        try:
            while not loop.is_done():
                loop.epoch()
        except Stopped:
            loop.keep()
            raise
        signals.asked()
    extra = {} if profiler is None else {"profile": cast(JsonValue, profiler.shares())}
    ranks.by_main(lambda: loop.finish(extra))
    return loop.run if ranks.is_main() else open_run(root)


class _Loop:
    """The epochs of a run.

    Attributes:
        run: its record, as far as it got.
    """

    def __init__(
        self,
        run: Run,
        task: Task,
        learner: Learner,
        state: State,
        progress: Progress,
    ) -> None:
        self.run = run
        self._task = task
        self._learner = learner
        self._state = state
        self._progress = progress
        self._settings = run.config.train
        self._writer: SummaryWriter | None = None  # of the main process

    def log_to(self, stack: ExitStack) -> None:
        """Open TensorBoard's log; its thread ends with the stack, also where training fails."""
        if ranks.is_main():
            purge = self._state.position.epoch or None
            self._writer = SummaryWriter(str(self.run.root), purge_step=purge)
            stack.callback(self._writer.close)

    def is_done(self) -> bool:
        """Whether all epochs are done, or ``patience`` is used up: the same in every process."""
        position, patience = self._state.position, self._settings.patience
        stale = self._state.is_stale(patience)
        done = position.epoch >= self._settings.epochs
        if stale and not done and ranks.is_main():
            _log.info("no epoch was better than %d: patience is used up", self._state.best)
        return ranks.tell(done or stale)

    def epoch(self) -> None:
        """What an epoch still has to do; a signal to end waits for the end of a step."""
        learner, state, started = self._learner, self._state, time.monotonic()
        name = f"epoch {state.position.epoch + 1}/{self._settings.epochs}"
        self._learn(name)
        row = {**state.means(), "epoch": state.position.epoch + 1.0}
        if learner.rate is not None:
            row["lr"] = learner.rate
        judged = learner.judged()

        def judge() -> None:
            with torch.no_grad(), section("evaluation"):
                row.update(self._task.evaluate(judged))
            with unbroken():
                state.close_epoch(row)
                self._write_epoch(judged)
            told = _told(row, best=bool(state.criteria) and state.is_best)
            _log.info("%s, %.0f s%s", name, time.monotonic() - started, told)

        state.collect(closing=True)
        ranks.by_main(judge)
        if not ranks.is_main():
            state.close_epoch()

    def _learn(self, name: str) -> None:
        """The batches that an epoch still has."""
        learner, state = self._learner, self._state
        with ExitStack() as step:
            for batch in learner.batches(state.position):
                step.enter_context(unbroken())
                losses = learner.learn(batch, state.position)
                state.add(losses, stepped=learner.stepped)
                if learner.stepped:
                    self._save_between()
                    step.close()
                    ranks.stop_together()
                self._progress(name, state.position.batch, learner.num_batches)

    def keep(self) -> None:
        """After a signal to end: what it takes to go on, and what an export needs."""
        self._state.collect()
        ranks.by_main(self._keep)

    def finish(self, extra: Mapping[str, JsonValue]) -> None:
        """The task's last step, and the record of all."""
        self.run = _conclude(self.run, self._task, self._progress, status="finished", extra=extra)
        remove(self.run.root, self._task.working)

    def _keep(self) -> None:
        done, root = self._state.position.epoch, self.run.root
        with unbroken():
            self._save()
        if not done:
            _log.warning("no epoch is done: run %s can be resumed, not exported", root)
            return
        _log.warning(
            "%d of %d epochs are done: preparing their export; Ctrl-C again leaves that out",
            done,
            self._settings.epochs,
        )
        self.run = _conclude(self.run, self._task, self._progress, status="stopped")
        _log.warning("run %s can be exported, and resumed", root)

    def _save_between(self) -> None:
        every = self._settings.checkpoint_steps
        if every and self._state.position.step % every == 0:
            self._state.collect()
            if ranks.is_main():
                self._state.save(self.run.root / checkpoint.NAME)

    def _save(self) -> None:
        """Checkpoint and record."""
        position = self._state.position
        self._state.save(self.run.root / checkpoint.NAME)
        self.run = self.run.updated(epoch=position.epoch, step=position.step)

    def _write_epoch(self, judged: nn.Module) -> None:
        """The row of the last epoch, its weights, and all that it takes to go on from here."""
        state, root = self._state, self.run.root
        write_history(root, state.history)
        assert self._writer is not None
        for name, value in state.history[-1].items():
            self._writer.add_scalar(name, value, state.position.epoch)
        weights = to_bytes({k: v.cpu().contiguous() for k, v in judged.state_dict().items()})
        files.write(root / "weights" / "last.safetensors", weights)
        if state.is_best:
            files.write(root / "weights" / "best.safetensors", weights)
        self._save()


def _conclude(
    run: Run,
    task: Task,
    progress: Progress,
    *,
    status: Literal["stopped", "finished"],
    weights: Weights = "best",
    extra: Mapping[str, JsonValue] | None = None,
) -> Run:
    """The task's last step, with the weights that are chosen, and the record of it."""
    run = Run(run.root, run.config, run.info.model_copy(update={"weights": weights}))
    task.model.load_state_dict(read_weights(run.weights()))
    with torch.no_grad():
        results = task.finish(run, task.model.eval(), progress)
    return run.updated(status=status, results={**results, **(extra or {})})


def _open_record(
    config: SystemConfig,
    data: Path,
    root: Path,
    before: Run | None,
    task: Task,
    accelerator: Accelerator,
) -> Run:
    """The record of a run that goes on with the same data, or begins in an empty folder."""
    summary = _summary(task)
    if before is not None:
        _check_same_data(before, data, summary)
        run = before
    else:
        run = Run(root, config, _described(config, task, accelerator, summary))
    ranks.wait()  # nobody reads what was there any more
    if ranks.is_main():
        if before is None:
            clear(root, (*task.written, *task.working))
            (root / "weights").mkdir()
        run.save()
    ranks.wait()
    return run


def _task(config: SystemConfig) -> Any:
    """The class of a system's task."""
    return importlib.import_module(f"{system_package(config.system)}.{config.task_module}").Task


def _summary(task: Task) -> dict[str, JsonValue]:
    """What a record says of the data."""
    return {**task.data_summary, "labels_sha256": labels_fingerprint(task.dataset)}


def _check_same_data(run: Run, data: Path, summary: Mapping[str, JsonValue]) -> None:
    """Their place may change; older runs recorded less.

    Raises:
        RunError: it is not what the run was trained on.
    """
    before = run.info.data
    unlike = [key for key in before if key != "folder" and before[key] != summary.get(key)]
    if unlike:
        raise RunError(
            f"the data in {data} are not those that run {run.root} was trained on: "
            f"{', '.join(unlike)}",
            fix="give the same data again, or train into a new folder",
        )


def _check_patience(settings: TrainConfig, task: Task) -> None:
    if settings.patience is not None and not task.best:
        raise ConfigError(
            "train.patience waits for a better epoch, and these data do not say which is better",
            fix="add the split that chooses the best epoch (see docs/data.md), or set it to null",
        )


def _told(row: Mapping[str, float], *, best: bool) -> str:
    """What a line on an epoch says of it, if anything."""
    told = [f"{name} {value:.4g}" for name, value in row.items() if name != "epoch"]
    return f": {', '.join([*told, *(['the best so far'] if best else [])])}" if told else ""


def _silent(_what: str, _done: int, _of: int) -> None:
    """No progress is asked for."""


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
    with untold():  # the ranks speak by ``training.ranks``, each has an accelerator of its own
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


def _described(
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
        processes=ranks.size(),
    )
