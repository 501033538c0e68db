"""Run: the folder that training leaves behind.

config.yaml              the merged configuration
run.json                 who made it, from what, how far it got, what came out
metrics.csv              a row per epoch
events.out.tfevents.*    the same for TensorBoard
checkpoint.safetensors   everything needed to go on
weights/{best,last}.safetensors   the model alone
...                      what the system adds, e.g. bank.faiss
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from engineworks.runtime import files
from engineworks.runtime.claims import claim
from engineworks.runtime.errors import InUseError, RunError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.files import is_temporary, sweep
from engineworks.training.config import SystemConfig, dump, parse, read_text, schema_of

CONFIG_NAME = "config.yaml"
INFO_NAME = "run.json"
Weights: TypeAlias = Literal["best", "last"]
# what --resume may change: it says when a run ends, not how it is trained
_ENDS = ("epochs", "patience")
# of every run; what a system adds, its task says
_WRITTEN = (
    CONFIG_NAME,
    INFO_NAME,
    "metrics.csv",
    "events.out.tfevents.*",
    "checkpoint.safetensors",
    "weights",
)


class RunInfo(BaseModel):
    """The record of a run.

    Attributes:
        status: ``finished`` only after the task's last step; ``stopped``: by a signal, before its
            last epoch, but with all that an export needs of the epochs that are done.
        weights: those that an export takes, and that ``results`` are about.
        data: what it was trained on: folder's name, counts, hash.
        provenance: where the starting weights came from.
        processes: how many trained together; older runs do not say.
        epoch, step: epochs and optimizer steps done.
        results: what the task found out, e.g. the ablation.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    system: str
    status: Literal["running", "stopped", "finished"] = "running"
    weights: Weights = "best"
    seed: int
    device: str
    precision: str
    versions: dict[str, str]
    data: dict[str, JsonValue]
    provenance: dict[str, JsonValue]
    processes: int = 1
    epoch: int = 0
    step: int = 0
    results: dict[str, JsonValue] = {}


@dataclass(frozen=True)
class Run:
    """A run folder with its configuration and its record."""

    root: Path
    config: SystemConfig
    info: RunInfo

    def weights(self, which: Weights | None = None) -> Path:
        """The model's weights after the best epoch, or after the last one.

        Args:
            which: None takes those that the record names.

        Raises:
            RunError: the run has not written them yet.
        """
        which = which or self.info.weights
        path = self.root / "weights" / f"{which}.safetensors"
        if not path.is_file():
            raise RunError(f"run {self.root} has no {path.name}", fix="train on with --resume")
        return path

    def updated(self, **changes: Any) -> Run:
        """The same run with other fields of its record, written to disk."""
        run = Run(self.root, self.config, self.info.model_copy(update=changes))
        run.save()
        return run

    def save(self) -> None:
        """Write configuration and record."""
        files.write(self.root / CONFIG_NAME, dump(self.config))
        content = json.dumps(self.info.model_dump(mode="json"), indent=2, allow_nan=False)
        files.write(self.root / INFO_NAME, content + "\n")


def write_history(root: Path, history: Sequence[Mapping[str, float]]) -> None:
    """metrics.csv of a run: its epochs, and all that any of them tells."""
    names = ["epoch", *sorted({name for row in history for name in row} - {"epoch"})]
    text = io.StringIO()
    table = csv.DictWriter(text, names, lineterminator="\n")
    table.writeheader()
    table.writerows(dict(row) | {"epoch": int(row["epoch"])} for row in history)
    files.write(root / "metrics.csv", text.getvalue())


def read_history(root: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv, an epoch each; none where no epoch is done.

    Raises:
        RunError: it is damaged.
    """
    path = root / "metrics.csv"
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [
                {name: value or "" for name, value in row.items() if name}
                for row in csv.DictReader(file)
            ]
    except (csv.Error, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {error}", fix="copy the run again") from error


def judged(split: str, evaluation: Evaluation) -> dict[str, JsonValue]:
    """What a record keeps of an evaluation: metrics by the split's name, and ``decisions``."""
    content = evaluation.to_json()
    return {split: content["metrics"], "decisions": content["decisions"]}


def is_run(root: Path) -> bool:
    """Whether a folder was written by training."""
    return (root / INFO_NAME).is_file()


def open_run(root: Path) -> Run:
    """Read a run folder.

    Raises:
        RunError: it is none, or its record is damaged.
        ConfigError: its configuration is not one of this version.
    """
    if not is_run(root):
        raise RunError(
            f"{root} is no training run: it has no {INFO_NAME}",
            fix="give the folder that `cli.py train ... --out` wrote",
        )
    try:
        info = RunInfo.model_validate_json((root / INFO_NAME).read_text(encoding="utf-8"))
    except (ValidationError, UnicodeDecodeError) as error:
        raise RunError(
            f"{root / INFO_NAME} is damaged or of another version",
            fix="train again into a new folder",
        ) from error
    # not merged with today's defaults: the run had what stands in its file
    config = parse(read_text(root / CONFIG_NAME), schema_of(info.system), str(root / CONFIG_NAME))
    return Run(root, config, info)


def read_json(run: Path, name: str) -> Any:
    """What a task wrote into its run as ``<name>.json``.

    Raises:
        RunError: it is not there, or damaged.
    """
    path = run / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error})", fix="copy the run again, or train anew"
        ) from error


def to_go_on(run: Run, config: SystemConfig, processes: int) -> Run:
    """The run as --resume takes it up, with this configuration; nothing is written.

    Args:
        processes: how many go on with it.

    Raises:
        RunError: the configuration is another one in more than when training ends, or it ends
            before what is done; or the processes are not as many as those that began.
    """
    if run.info.processes != processes:
        raise RunError(
            f"run {run.root} was trained by {run.info.processes} processes, and cannot go on "
            f"with {processes}",
            fix=f"resume it with --processes {run.info.processes}, or train into a new folder",
        )
    ends = {name: getattr(config.train, name) for name in _ENDS}
    train = run.config.train.model_copy(update=ends)
    if run.config.model_copy(update={"train": train}) != config:
        raise RunError(
            f"run {run.root} was started with another configuration",
            fix=f"change no more than {' and '.join(f'train.{name}' for name in _ENDS)} with "
            "--resume, or train into a new folder",
        )
    if config.train.epochs < run.info.epoch:
        raise RunError(
            f"run {run.root} has done {run.info.epoch} epochs, more than train.epochs = "
            f"{config.train.epochs}",
            fix=f"set train.epochs to {run.info.epoch} to end there, or to more",
        )
    info = run.info.model_copy(update={"status": "running", "weights": "best", "results": {}})
    return Run(run.root, config, info)


def check_place(root: Path, config: SystemConfig, *, exist_ok: bool) -> None:
    """Refuse to begin a run in a folder that may not be touched.

    Raises:
        RunError: there is a run already, or something else.
    """
    if is_run(root) and not exist_ok:
        raise RunError(
            f"run {root} already exists",
            fix="choose another --out, go on with --resume, or replace it with --exist-ok",
        )
    if not is_run(root) and not _is_beginning(root, config):
        raise RunError(
            f"{root} holds files that are not a training run's", fix="choose another --out"
        )


def _is_beginning(root: Path, config: SystemConfig) -> bool:
    """Whether a folder is empty, or what a run leaves that is killed before it has a record."""
    for path in root.iterdir():
        if path.name == CONFIG_NAME and path.is_file():
            if read_text(path) != dump(config):
                return False
        elif path.name != "weights" or not path.is_dir() or any(path.iterdir()):
            return False
    return True


@contextmanager
def reserve(out: Path | None, system: str) -> Iterator[Path]:
    """A run's folder that belongs to this process until the end of the block.

    It is made where it is missing, and removed again where nothing was written into it. What a
    process that was killed left unfinished in it is removed.

    Args:
        out: the folder; None takes the next free ``runs/<system>/trainN``.

    Raises:
        InUseError: another process trains there.
    """
    made: list[Path] = []
    try:
        with ExitStack() as claims:
            if out is None:
                root = _next_free(Path("runs") / system, made, claims)
            else:
                root = out
                _make(root, made)
                claims.enter_context(claim(root))
            sweep(root, deep=True)
            yield root
    finally:
        for folder in made:
            with suppress(OSError):  # not empty: something came of it
                folder.rmdir()


def _next_free(parent: Path, made: list[Path], claims: ExitStack) -> Path:
    """<parent>/train1, 2, ...: behind the last one, or in its place where nothing came of it."""
    taken = [
        int(match[1])
        for path in parent.glob("train*")
        if (match := re.fullmatch(r"train(\d+)", path.name))
    ]
    number = max(taken, default=1)
    while True:
        root = parent / f"train{number}"
        _make(root, made)
        with suppress(InUseError):
            claims.enter_context(claim(root))
            if not any(root.iterdir()):
                return root
        number += 1


def _make(root: Path, made: list[Path]) -> None:
    """Make a folder and those on the way; ``made`` gets them, the innermost first."""
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]
    root.mkdir(parents=True, exist_ok=True)
    made.extend(missing)


def clear(root: Path, written: Sequence[str]) -> None:
    """Remove what training wrote into a run's folder, to begin anew; nothing else.

    Args:
        written: patterns of what the system writes beyond what every run has.

    Raises:
        RunError: there is something else in the folder.
    """
    known = (*_WRITTEN, *written)
    entries = [path for path in root.iterdir() if not is_temporary(path.name)]
    strange = [path.name for path in entries if not any(map(path.match, known))]
    if strange:
        raise RunError(
            f"{root} holds what training did not write: {', '.join(sorted(strange))}",
            fix="move it elsewhere, or choose another --out",
        )
    # the record last: what is left of a run that is killed here can be replaced again
    remove(root, [name for name in known if name != INFO_NAME])
    (root / INFO_NAME).unlink(missing_ok=True)


def remove(root: Path, patterns: Iterable[str]) -> None:
    """Remove the files and folders of a run that have such names."""
    for path in {path for pattern in patterns for path in root.glob(pattern)}:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
