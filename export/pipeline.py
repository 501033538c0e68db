"""A run, a bundle or SYSTEM:NAME -> a bundle with what was asked for: all stages, in their order.

A stage takes the ``Job`` further. Plans come last: the gate may put nodes back to float, and a plan
is built of what is left. Torch ends with the first stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engineworks.export import deploy, gate, int8, verdict
from engineworks.export.config import ExportConfig
from engineworks.export.job import Job, Progress, Say
from engineworks.runtime.bundle import MANIFEST_NAME, Bundle, check_out, read, write
from engineworks.runtime.claims import claim
from engineworks.runtime.doctor import need
from engineworks.runtime.errors import UsageError
from engineworks.runtime.files import scratch
from engineworks.runtime.systems import bring_references
from engineworks.training.systems import UNTRAINED


@dataclass(frozen=True)
class Stage:
    """One step of an export.

    Attributes:
        name: for people.
        wanted: whether a configuration asks for it.
        run: takes the job further.
    """

    name: str
    wanted: Callable[[ExportConfig], object]
    run: Callable[[Job], None]


def trace(job: Job) -> None:
    """Open the bundle that is there, or make a float one.

    Raises:
        UsageError: there is nothing at the source, or options that are not for it.
        BackendError: no torch, and the source is no bundle.
        BundleError, RunError, ConfigError, WeightsError, ExportError, ParityError: see
            ``runtime.bundle.read`` and ``export.trace``.
    """
    source, config = job.source, job.config
    if isinstance(source, Path) and (source / MANIFEST_NAME).is_file():
        source = read(source)
    named, _, name = str(source).partition(":")
    _check_options(source, config, named)
    if isinstance(source, Bundle):
        if not config.changes:
            raise UsageError(
                "a bundle is exported already",
                fix="add --int8 --samples DIR, --half fp16 or --plan float",
            )
        job.take(source)
        return
    if named not in UNTRAINED and not source.is_dir():
        raise UsageError(
            f"there is no run or bundle at {source}",
            fix="give the folder that train or export wrote; weights of other programs go into a "
            f"training, or into {' or '.join(UNTRAINED)}:NAME --weights FILE.safetensors"
            if source.is_file()
            else None,
        )
    need("torch", "train")
    from engineworks.export import trace as tracing  # torch, which no other stage needs

    target = job.room("float")
    if named in UNTRAINED:
        made = tracing.trace_named(named, name, config.options, target, progress=job.progress)
    else:
        made = tracing.trace(
            source, target, weights=_epoch(config), data=config.data, progress=job.progress
        )
    job.take(made)


def _check_options(source: Path | Bundle, config: ExportConfig, named: str) -> None:
    """Refuse options that mean nothing for what is exported."""
    if named in UNTRAINED:
        fitting = {*config.options}
    else:
        fitting = set() if isinstance(source, Bundle) else {"weights", "data"}
    given = [*config.options, *(["data"] if config.data is not None else [])]
    if unfit := [option for option in given if option not in fitting]:
        names = " or ".join(f"{system}:NAME" for system in UNTRAINED)
        names = {"data": "a run", "weights": f"a run or {names}"}.get(unfit[0], names)
        options = ", ".join(f"--{option}" for option in unfit)
        raise UsageError(f"{options} is for {names} alone", fix="leave it out")


def _epoch(config: ExportConfig) -> Literal["best", "last"] | None:
    """Whose weights of a run are asked for."""
    match config.options.get("weights"):
        case None | "best" | "last" as which:
            return which
        case other:
            raise UsageError(
                f"a run has its best and its last weights, not '{other}'",
                fix="pass --weights best or --weights last",
            )


def references(job: Job) -> None:
    """Let the bundle look for other objects where nothing else is asked for."""
    assert job.config.references is not None
    job.take(bring_references(job.bundle, job.config.references, job.room("prompted")))


STAGES: tuple[Stage, ...] = (
    Stage("trace", lambda config: True, trace),
    Stage("references", lambda config: config.references, references),
    Stage("shapes of plans", lambda config: config.plans, deploy.settle),
    Stage("calibrate", lambda config: config.int8, int8.calibrate),
    Stage("sensitivity", lambda config: config.int8 and config.sensitivity, int8.sensitivity),
    Stage("quantize", lambda config: config.int8, int8.quantize_graphs),
    Stage("gate", lambda config: config.int8 and config.evaluation, gate.hold),
    Stage("verdict", lambda config: config.int8, verdict.verdict),
    Stage("16 bits", lambda config: config.half_types, deploy.halves),
    Stage("plans", lambda config: config.plans, deploy.plans),
)


def export(
    source: Path | Bundle,
    out: Path,
    config: ExportConfig | None = None,
    *,
    exist_ok: bool = False,
    say: Say = lambda _line: None,
    progress: Progress = lambda _what, _done, _of: None,
) -> Bundle:
    """Write ``out``: what ``source`` holds, with what is asked for.

    Args:
        source: a run, a bundle, or SYSTEM:NAME.
        config: what is asked for; None: the float bundle.
        exist_ok: replace a bundle that is already there.
        say: called with a line of text per step.
        progress: called with (what, done, of).

    Returns:
        The bundle, written at once and whole.

    Raises:
        UsageError: see ``ExportConfig.check``, ``trace`` and ``deploy.settle``.
        BundleError: ``out`` is in the way.
        InUseError: another process writes there.
        GateError: with ``fail_on_drop``, a metric dropped by more than allowed or could not be
            judged; ``out`` is written all the same.
        EngineworksError: see the stages.
    """
    config = config or ExportConfig()
    config.check()
    with claim(out), scratch(out.parent) as folder:
        check_out(out, replace=exist_ok)
        job = Job(source, config, folder, say=say, progress=progress)
        for stage in STAGES:
            if stage.wanted(config):
                stage.run(job)
        made = write(out, job.manifest, job.files, replace=exist_ok)
    if config.fail_on_drop:
        gate.check(made.manifest.reports["gate"], out)
    return made
