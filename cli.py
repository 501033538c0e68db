"""The command line: parse, call one function, print its answer.

Heavy imports live inside the commands, so that ``--help`` is instant and ``infer`` loads no torch.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from engineworks.runtime.claims import claim
from engineworks.runtime.errors import BackendError, UsageError
from engineworks.runtime.refusals import explain
from engineworks.runtime.signals import Stopped, stoppable
from engineworks.runtime.texts import hide_secrets, shown

if TYPE_CHECKING:
    from engineworks.runtime.bench import Row
    from engineworks.runtime.bundle import Bundle
    from engineworks.runtime.evaluation import Decisions
    from engineworks.runtime.plans import PlanConfig
    from engineworks.runtime.systems import System
    from engineworks.training.config import BackboneConfig

    OpenBundle = Callable[[Path], closing[System]]
    Prepare = Callable[[System], None]

LINE_EVERY_S = 60.0  # of what takes longer, where stderr is no terminal
PATH = click.Path(path_type=Path)
FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)
OUT = click.option("--out", type=PATH, required=True, help="Folder to write.")
EXIST_OK = click.option("--exist-ok", is_flag=True, help="Replace what --out already holds.")
BACKEND = click.option(
    "--backend",
    type=click.Choice(["auto", "ort", "openvino", "tensorrt", "ort-cuda", "ort-tensorrt"]),
    default="auto",
    show_default=True,
    help="What runs the graphs; one that is not installed is an error.",
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(["auto", "int8", "int8-bf16", "float", "fp16", "bf16"]),
    default="auto",
    show_default=True,
    help="auto takes what the bundle's verdict ships.",
)
THREADS = click.option("--threads", type=click.IntRange(min=1), help="CPU threads [all cores].")
HOST_CODE = click.option(
    "--allow-host-code",
    "host_code",
    is_flag=True,
    help="Let a version-compatible plan bring program code: only one that you built yourself.",
)
SIGNED = click.option(
    "--require-signature",
    "signers",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    metavar="KEY",
    help="Refuse a bundle that this public key has not signed; of several one is enough.",
)
REFS = click.option(
    "--refs",
    type=click.Path(path_type=Path, exists=True),
    help="What to look for: DIR/<object>/*.png, pictures of one object, or a file of `refs`.",
)
JSON = click.option("--json", "json_file", type=PATH, help="Also write the figures here.")


def engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of what runs a bundle; the command gets them as ``open_bundle``."""

    @BACKEND
    @PRECISION
    @THREADS
    @HOST_CODE
    @SIGNED
    @wraps(command)
    def with_engines(
        *arguments: Any,
        backend: str,
        precision: str,
        threads: int | None,
        host_code: bool,
        signers: tuple[Path, ...],
        **options: Any,
    ) -> None:
        def open_bundle(bundle: Path) -> closing[System]:
            from engineworks.runtime.systems import open_system

            return closing(
                open_system(
                    _read_bundle(bundle, signers),
                    backend=backend,
                    precision=precision,
                    threads=threads,
                    host_code=host_code,
                )
            )

        command(*arguments, open_bundle=open_bundle, **options)

    return with_engines


def prompt_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of what to look for; the command gets them as ``prepare``."""
    share = click.FloatRange(0, 1)

    @REFS
    @click.option("--conf", type=share, help="Score that an object needs [the bundle's].")
    @click.option("--iou", type=share, help="Largest overlap of two of a name [the bundle's].")
    @wraps(command)
    def with_prompt(
        *arguments: Any, refs: Path | None, conf: float | None, iou: float | None, **options: Any
    ) -> None:
        def prepare(system: System) -> None:
            from engineworks.runtime.systems import prompt

            prompt(system, refs, conf=conf, iou=iou)

        command(*arguments, prepare=prepare, **options)

    return with_prompt


def plan_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of plans; the command gets ``plans``, ``plan`` and ``timing_cache``."""

    @click.option("--plan", "names", default="", metavar="LIST", help="float,fp16,bf16,int8.")
    @click.option(
        "--profile",
        "profiles",
        multiple=True,
        metavar="AXIS=MIN:OPT:MAX,...",
        help="Sizes of the free axes; may be given several times [batch=1:8:32].",
    )
    @click.option("--workspace", type=click.IntRange(min=1), help="MiB of GPU memory [all].")
    @click.option("--optimization", type=click.IntRange(0, 5), default=3, show_default=True)
    @click.option("--no-tf32", is_flag=True, help="Keep all bits of float32 products.")
    @click.option("--terse", is_flag=True, help="Leave what layers are like out of the plan.")
    @click.option("--version-compatible", is_flag=True, help="Also for later TensorRTs.")
    @click.option(
        "--hardware-compatible",
        "hardware",
        type=click.Choice(["none", "same-compute-capability", "ampere-plus"]),
        default="none",
        show_default=True,
        help="Also for other GPUs.",
    )
    @click.option("--weight-streaming", is_flag=True, help="Weights may stay in host memory.")
    @click.option("--timing-cache", type=PATH, help="Folder that keeps timings of kernels.")
    @wraps(command)
    def with_plans(
        *arguments: Any,
        names: str,
        profiles: tuple[str, ...],
        workspace: int | None,
        optimization: int,
        no_tf32: bool,
        terse: bool,
        version_compatible: bool,
        hardware: Literal["none", "same-compute-capability", "ampere-plus"],
        weight_streaming: bool,
        timing_cache: Path | None,
        **options: Any,
    ) -> None:
        from engineworks.runtime.plans import PlanConfig, parse_profile

        plan = PlanConfig(
            profiles=tuple(parse_profile(profile) for profile in profiles),
            workspace_mib=workspace,
            optimization_level=optimization,
            tf32=not no_tf32,
            detailed=not terse,
            version_compatible=version_compatible,
            hardware=hardware,
            weight_streaming=weight_streaming,
        )
        plans = _names(names)
        if not plans and (plan != PlanConfig() or timing_cache):
            raise UsageError("options of plans have no meaning without --plan", fix="add --plan")
        command(*arguments, plans=plans, plan=plan, timing_cache=timing_cache, **options)

    return with_plans


def net_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options of ``backbone:NAME``; the command gets those that were given as ``net``."""

    @click.option("--weights", metavar="WHERE", help="hub, none or FILE.safetensors [hub].")
    @click.option("--stages", metavar="LIST", help="Maps, e.g. 2,3 [the last of the whole net].")
    @click.option("--norm", is_flag=True, default=None, help="Blocks behind the net's last norm.")
    @click.option("--size", metavar="H,W", help="Of its images in pixels [its own].")
    @click.option("--args", "arguments", metavar="YAML", help="Of timm, e.g. {pad_type: same}.")
    @wraps(command)
    def with_net(
        *positional: Any,
        weights: str | None,
        stages: str | None,
        norm: bool | None,
        size: str | None,
        arguments: str | None,
        **options: Any,
    ) -> None:
        net = {"weights": weights, "stages": stages, "norm": norm, "size": size, "args": arguments}
        given = {name: value for name, value in net.items() if value is not None}
        command(*positional, net=given, **options)

    return with_net


class Cli(click.Group):
    """Turns errors and signals into a message and an exit code; no traceback reaches a user."""

    def invoke(self, context: click.Context) -> Any:
        try:
            with stoppable():
                return super().invoke(context)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Stopped as stopped:
            _echo(f"{stopped}", fg="yellow", err=True)
            context.exit(stopped.exit_code)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # click ends quietly where nobody reads on
            explained = explain(error)
            _echo(f"error: {explained}", fg="red", err=True)
            _drop_unwritten()
            context.exit(explained.exit_code)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="engineworks")
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
@click.pass_context
def main(context: click.Context, quiet: bool) -> None:
    """Train small-data vision systems, export INT8 bundles, run them without PyTorch."""
    context.obj = {"quiet": quiet}
    _show_messages(quiet=quiet)


@main.command()
@click.argument("system")
@OUT
@click.option("--seed", type=int, default=0, show_default=True)
def sample(system: str, out: Path, seed: int) -> None:
    """Draw a small labelled data set for SYSTEM."""
    import importlib

    from engineworks.training.systems import system_package

    package = system_package(system)  # refuses a misspelt name
    draw = importlib.import_module(f"{package}.sample")
    out.mkdir(parents=True, exist_ok=True)
    with claim(out):
        if any(out.iterdir()):
            raise UsageError(f"{out} is not empty", fix="choose another --out, or delete it")
        draw.sample(out, seed=seed)
    _echo(out)


@main.command()
@click.argument("system")
@click.option("--data", type=FOLDER, required=True, help="Folder of labelled data.")
@click.option("--quick", is_flag=True, help="Decode masks alone, as `train` does.")
@click.option("--report", type=PATH, help="Also write one HTML page, with labels drawn in.")
@click.pass_context
def check(
    context: click.Context, system: str, data: Path, quick: bool, report: Path | None
) -> None:
    """Look through the labelled data of SYSTEM: what is there, and what is wrong with it.

    Exit 1 where training would be wrong.
    """
    from engineworks.runtime.survey import HEADER, findings, lines, page, survey
    from engineworks.runtime.systems import labelled_of

    labelled = labelled_of(system)(data)
    with _Progress(context) as show:
        found = survey(labelled, quick=quick, progress=partial(show, "reading"))
    _print_table(str(data), HEADER, found.rows)
    for heading, tally in findings(found).items():
        click.secho(heading, bold=True)
        for line in lines(tally):
            _echo(f"  {line}")
    for fix in dict.fromkeys(found.faults.fixes.values()):
        _echo(f"  fix: {fix}")
    if report is not None:
        _echo(page(f"{system}: {data.resolve().name}", found, labelled).write(report))
    if found.faults:
        context.exit(1)


@main.command()
@click.argument("system")
@click.option("--data", type=FOLDER, required=True, help="Folder of training data.")
@click.option("--out", type=PATH, help="Run folder [runs/SYSTEM/trainN].")
@click.option(
    "--config",
    type=PATH,
    help="YAML file over the system's defaults, or the name of a shipped one.",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting.")
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--profile", is_flag=True, help="Print where the time of a step went.")
@EXIST_OK
@click.pass_context
def train(
    context: click.Context,
    system: str,
    data: Path,
    out: Path | None,
    config: Path | None,
    overrides: tuple[str, ...],
    resume: bool,
    profile: bool,
    exist_ok: bool,
) -> None:
    """Train SYSTEM on a folder of data.

    Ctrl-C keeps the run: what is done can be exported, and --resume goes on. With --resume, --set
    may change train.epochs and train.patience.
    """
    _need("torch", "train")
    from engineworks.training.config import changed, load_config
    from engineworks.training.run import open_run

    if resume and out is not None and not config:
        merged = changed(open_run(out).config, overrides)
        if merged.system != system:
            raise UsageError(
                f"{out} is a run of '{merged.system}', not of '{system}'",
                fix=f"give train {merged.system} --resume, or another --out",
            )
    else:
        merged = load_config(system, config, overrides)
    from engineworks.training.train import (
        train as train_run,  # torch takes seconds, a misspelt key needs none
    )

    with _Progress(context) as progress:
        run = train_run(
            merged, data, out, resume=resume, exist_ok=exist_ok, profile=profile, progress=progress
        )
    _print_results(run.info.results)
    _echo(run.root)


@main.command()
@click.argument("source", type=PATH)
@OUT
@EXIST_OK
@click.option("--int8", is_flag=True, help="Add INT8 graphs; needs --samples.")
@click.option("--samples", type=FOLDER, help="Images that the system will meet, for calibration.")
@click.option(
    "--refs",
    type=click.Path(path_type=Path, exists=True),
    help="Pictures of what the bundle looks for unasked: DIR/<object>/*.png, or of one object.",
)
@click.option("--num-samples", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--method",
    type=click.Choice(["auto", "minmax", "percentile", "entropy", "mse"]),
    default="auto",
    show_default=True,
    help="Ranges; auto takes the method with the smallest output error.",
)
@click.option("--percentile", type=float, default=99.99, show_default=True)
@click.option("--eval", "evaluation", type=FOLDER, help="Labelled data for the accuracy gate.")
@click.option("--unjudged", is_flag=True, help="Ship INT8 without --eval to judge it.")
@click.option("--fail-on-drop", is_flag=True, help="Exit 1 where the gate fails or cannot judge.")
@click.option("--sensitivity", is_flag=True, help="Cost of each node; worst back to float.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of samples.")
@click.option("--half", default="", metavar="LIST", help="Mixed 16-bit graphs: fp16,bf16.")
@net_options
@plan_options
@THREADS
@click.pass_context
def export(
    context: click.Context,
    source: Path,
    out: Path,
    exist_ok: bool,
    int8: bool,
    samples: Path | None,
    refs: Path | None,
    num_samples: int,
    method: str,
    percentile: float,
    evaluation: Path | None,
    unjudged: bool,
    fail_on_drop: bool,
    sensitivity: bool,
    seed: int,
    half: str,
    net: dict[str, Any],
    plans: tuple[str, ...],
    plan: PlanConfig,
    timing_cache: Path | None,
    threads: int | None,
) -> None:
    """Turn a training RUN into a bundle; a BUNDLE into one with INT8, 16 bits or plans.

    backbone:NAME is a net of timm alone, for --set backbone.engine=BUNDLE and for embeddings.
    Plans are TensorRT's, and only for the machine that builds them. With --refs its objects are
    what the bundle looks for where nothing else is asked for.
    """
    from engineworks.runtime import bundle as bundles
    from engineworks.runtime import files

    if int8 and samples is None:
        raise UsageError("--int8 needs sample images", fix="pass --samples DIR")
    halves = _names(half)
    deployed = bool(halves or plans)
    given = {"--eval": evaluation, "--unjudged": unjudged, "--fail-on-drop": fail_on_drop}
    if not deployed:
        given["--samples"] = samples
    if not int8 and (unused := [name for name, value in given.items() if value]):
        raise UsageError(f"{', '.join(unused)} has no meaning without --int8", fix="add --int8")
    kind, _, backbone = str(source).partition(":")
    wanted = _backbone(backbone, net) if kind == "backbone" else None
    if wanted is None and net:
        options = ", ".join(f"--{name}" for name in net)
        raise UsageError(f"{options} is for backbone:NAME alone", fix="leave it out")
    if wanted is None and not source.is_dir():
        raise UsageError(
            f"there is no run or bundle at {source}",
            fix="give the folder that train or export wrote; weights of other programs go into a "
            "training, or into backbone:NAME --weights FILE.safetensors"
            if source.is_file()
            else None,
        )
    from_bundle = (source / bundles.MANIFEST_NAME).is_file()
    say = _say(context)
    with claim(out), files.scratch(out.parent) as scratch:
        bundles.check_out(out, replace=exist_ok)
        if from_bundle:
            floats = bundles.read(source)
        else:
            _need("torch", "train")
            from engineworks.export.trace import trace, trace_backbone

            unchanged = refs is None and not int8 and not deployed
            target = out if unchanged else scratch / "float"
            if wanted is None:
                floats = trace(source, target, exist_ok=exist_ok)
            else:
                floats = trace_backbone(wanted[0], target, size=wanted[1], exist_ok=exist_ok)
        if refs is not None:
            from engineworks.runtime.systems import bring_references

            target = scratch / "prompted" if int8 or deployed else out
            floats = bring_references(floats, refs, target, exist_ok=exist_ok)
        if int8:
            from engineworks.export.build import BuildConfig, build

            config = BuildConfig(
                samples=samples,
                num_samples=num_samples,
                seed=seed,
                method=method,
                percentile=percentile,
                evaluation=evaluation,
                unjudged=unjudged,
                sensitivity=sensitivity,
                fail_on_drop=fail_on_drop,
                threads=threads,
            )
            target = scratch / "int8" if deployed else out
            floats = build(floats, target, config, exist_ok=exist_ok, say=say)
        if deployed:
            from engineworks.export.deploy import DeployConfig, deploy

            with _Progress(context) as progress:
                deploy(
                    floats,
                    out,
                    DeployConfig(
                        halves=halves,
                        plans=plans,
                        plan=plan,
                        timing_cache=timing_cache,
                        samples=samples,
                        threads=threads,
                    ),
                    exist_ok=exist_ok,
                    say=say,
                    progress=progress,
                )
        elif from_bundle and not int8 and refs is None:
            raise UsageError(
                "a bundle is exported already",
                fix="add --int8 --samples DIR, --half fp16 or --plan float",
            )
    reports = bundles.load_manifest(out).reports
    _print_parity(reports)
    _print_gate(reports.get("gate", {}))
    _echo(out)


@main.command()
@click.argument("bundle", type=PATH)
@click.option("--source", required=True, help="File, folder, glob, list.txt, video, 0, rtsp://...")
@OUT
@engine_options
@prompt_options
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--jsonl", is_flag=True, help="Write results.jsonl, one line per image.")
@click.option("--coco", is_flag=True, help="Write coco.json, boxes with scores.")
@click.option("--no-track", is_flag=True, help="Do not number the objects of a video.")
@click.option("--save-overlays", is_flag=True, help="Write pictures (a video: annotated).")
@click.option("--report", type=PATH, help="Also write one HTML page, with pictures if saved.")
@click.option("--frame-step", type=click.IntRange(min=1), default=1, help="Every n-th frame.")
@EXIST_OK
@click.pass_context
def infer(
    context: click.Context,
    bundle: Path,
    source: str,
    out: Path,
    open_bundle: OpenBundle,
    prepare: Prepare,
    batch: int,
    jsonl: bool,
    coco: bool,
    no_track: bool,
    save_overlays: bool,
    report: Path | None,
    frame_step: int,
    exist_ok: bool,
) -> None:
    """Run a BUNDLE on images or video, without PyTorch."""
    from engineworks.runtime.infer import Summary
    from engineworks.runtime.infer import infer as run_infer
    from engineworks.runtime.outputs import is_free
    from engineworks.runtime.sources import open_source
    from engineworks.runtime.systems import Promptable
    from engineworks.runtime.verdict import unjudged

    if not exist_ok and not is_free(out):
        raise UsageError(f"{out} is not empty", fix="choose another --out, or pass --exist-ok")
    say = _say(context)
    summary, stopped = Summary(), None
    with open_bundle(bundle) as system:
        opened = open_source(source, system.reader)
        prepare(system)
        say(f"{system.backend}, {system.precision}")
        if note := unjudged(system.bundle.manifest, system.precision):
            _warn(note)
        try:
            with _Progress(context) as show:
                run_infer(
                    system,
                    opened,
                    out,
                    batch=batch,
                    jsonl=jsonl,
                    overlays=save_overlays,
                    coco=coco,
                    track=isinstance(system, Promptable) and not no_track,
                    frame_step=frame_step,
                    progress=partial(show, "inference"),
                    say=say,
                    summary=summary,
                )
        except Stopped as signal:
            stopped = signal
    if report is not None:
        from engineworks.runtime.report import of_inference

        facts = {
            "source": hide_secrets(source),
            "bundle": system.bundle.root,
            "digest": system.bundle.manifest.digest,
            "backend": f"{system.backend}, {system.precision}",
            **({"accuracy": note} if note else {}),
            "done": summary.num_done,
            "failed": summary.num_failed,
            "images per second": f"{summary.images_per_second:.1f}",
        }
        of_inference(system.bundle, out, facts).write(report)
    for name, message in summary.failures:
        _warn(f"skipped {name}: {message}")
    _echo(
        f"{summary.num_done} done, {summary.num_failed} failed, "
        f"{summary.images_per_second:.1f} images/s, results in {out}"
    )
    if stopped is not None:
        raise stopped
    if summary.num_failed:
        context.exit(1)


@main.command(name="eval")
@click.argument("bundle", type=PATH)
@click.option("--data", type=FOLDER, required=True, help="Labelled folder.")
@engine_options
@prompt_options
@JSON
@click.pass_context
def evaluate(
    context: click.Context,
    bundle: Path,
    data: Path,
    open_bundle: OpenBundle,
    prepare: Prepare,
    json_file: Path | None,
) -> None:
    """The task's metrics of a BUNDLE on labelled data, and what its border decides there."""
    with open_bundle(bundle) as system, _Progress(context) as show:
        prepare(system)
        judged = system.evaluate(data, progress=partial(show, "evaluation"))
    _print_table(
        f"{bundle} on {data}: {system.backend}, {system.precision}, {judged.num_pictures} pictures",
        ("metric", "value"),
        [(name, f"{value:.4f}") for name, value in judged.metrics.items()]
        or [("none", "these labels allow no metric")],
    )
    _print_decisions(judged.decisions)
    for message in judged.failures:
        _warn(f"left out: {message}")
    if json_file:
        content = {"backend": system.backend, "precision": system.precision, **judged.to_json()}
        _write_json(json_file, content)
    if judged.failures:
        context.exit(1)


@main.command()
@click.argument("bundle", type=PATH, required=False)
@click.option("--run", type=FOLDER, help="Its training run: adds eager PyTorch rows.")
@click.option("--eval", "evaluation", type=FOLDER, help="Labelled data: accuracy beside speed.")
@click.option("--source", help="Images to time on [noise].")
@prompt_options
@BACKEND
@click.option("--batch", "batches", default="1", show_default=True, help="Sizes, e.g. 1,8.")
@THREADS
@HOST_CODE
@SIGNED
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Per row.")
@JSON
@click.option(
    "--compare",
    nargs=2,
    type=PATH,
    metavar="A.json B.json",
    help="Time nothing: set two such reports side by side.",
)
@click.pass_context
def bench(
    context: click.Context,
    bundle: Path | None,
    run: Path | None,
    evaluation: Path | None,
    source: str | None,
    prepare: Prepare,
    backend: str,
    batches: str,
    threads: int | None,
    host_code: bool,
    signers: tuple[Path, ...],
    seconds: float,
    json_file: Path | None,
    compare: tuple[Path, Path] | None,
) -> None:
    """Time a BUNDLE on every backend and precision, against eager PyTorch with --run."""
    if compare is not None:
        from engineworks.runtime.compare import compare as compare_reports
        from engineworks.runtime.compare import render as render_comparison

        _echo(render_comparison(compare_reports(*compare)))
        return
    if bundle is None:
        raise UsageError("bench needs a bundle", fix="name one, or pass --compare A.json B.json")
    from engineworks.runtime import contenders
    from engineworks.runtime.bench import environment, render
    from engineworks.runtime.threads import available_threads

    try:
        sizes = [int(size) for size in batches.split(",")]
    except ValueError as error:
        raise UsageError(f"--batch takes sizes such as 1,8, got {batches!r}") from error
    if min(sizes) < 1:
        raise UsageError(f"--batch takes sizes of at least 1, got {batches!r}")
    if run is not None:
        _need("torch", "train")
    threads = threads or available_threads()
    opened = _read_bundle(bundle, signers)
    images = contenders.images_for(opened, source)
    say = _say(context)
    rows: list[Row] = contenders.measure(
        opened,
        images,
        run=run,
        backend=backend,
        batches=sizes,
        threads=threads,
        seconds=seconds,
        evaluation=evaluation,
        prepare=prepare,
        host_code=host_code,
        say=say,
    )
    _echo(render(rows))
    if json_file:
        content = {
            "environment": environment(threads=threads),
            "bundle": str(bundle),
            "bundle_digest": opened.manifest.digest,
            "inputs": contenders.describe_images(images),
            "rows": [row.to_json() for row in rows],
        }
        _write_json(json_file, content)


@main.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--refs",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="DIR/<object>/*.png, or pictures of one object.",
)
@click.option("--out", type=PATH, required=True, help="File to write, FILE.npz.")
@engine_options
@EXIST_OK
def refs(bundle: Path, refs: Path, out: Path, open_bundle: OpenBundle, exist_ok: bool) -> None:
    """Keep what BUNDLE makes of reference pictures, for --refs FILE.npz."""
    from engineworks.runtime.references import read_references
    from engineworks.runtime.systems import Promptable

    if out.exists() and not exist_ok:
        raise UsageError(f"{out} exists", fix="choose another --out, or pass --exist-ok")
    with open_bundle(bundle) as system:
        if not isinstance(system, Promptable):
            raise UsageError(f"{bundle} is of a system that is not told what to look for")
        prototypes = system.encode(read_references(refs))
        prototypes.save(out)
    _echo(f"{', '.join(prototypes.names)} in {out}")


@main.command()
def doctor() -> None:
    """Versions, processor, and which backends can be used here."""
    from engineworks.runtime.doctor import examine

    problems = 0
    for finding in examine():
        colour = {"ok": "green", "missing": "yellow", "problem": "red"}[finding.level]
        click.echo(f"{click.style(finding.level.ljust(8), fg=colour)}{finding.text}")
        if finding.fix:
            _echo(f"        {finding.fix}")
        problems += finding.level == "problem"
    if problems:
        sys.exit(1)


@main.group()
def bundle() -> None:
    """Look at a bundle, check it, sign it, move its thresholds."""


@bundle.command()
@click.argument("folder", type=PATH)
def show(folder: Path) -> None:
    """What a bundle is, after checking all of it."""
    from engineworks.runtime.bundle import read

    manifest = read(folder).manifest
    _echo(f"{manifest.system}, schema {manifest.schema_version}, {manifest.digest[:12]}")
    for name, graph in manifest.graphs.items():
        tensors = [f"{n} {spec.describe()}" for n, spec in graph.inputs.items()]
        _echo(f"graph {name}: {', '.join(tensors)}; {', '.join(graph.variants)}")
    for name, threshold in manifest.thresholds.items():
        _echo(f"threshold {name}: {threshold.value:.4f} ({threshold.source})")
    _print_gate(manifest.reports.get("gate", {}))
    if verdict := manifest.reports.get("verdict"):
        from engineworks.runtime.verdict import describe

        for line in describe(verdict):
            _echo(line)


@bundle.command(name="set-threshold")
@click.argument("folder", type=PATH)
@click.argument("name")
@click.argument("value", required=False)
@click.option(
    "--budget",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of good pictures that may be rejected: the border comes from held-out scores.",
)
def set_threshold(folder: Path, name: str, value: str | None, budget: float | None) -> None:
    """Move a decision border without exporting again.

    VALUE is a number, or the name of another threshold of the bundle, such as image_f1max; in its
    place --budget needs neither a number nor pictures.
    """
    from engineworks.runtime import bundle as bundles

    if (value is None) == (budget is None):
        raise UsageError("set-threshold takes a VALUE or --budget", fix="give one of the two")
    opened = bundles.read(folder)
    if budget is not None:
        moved = bundles.set_budget(opened, name, budget)
        _echo(f"{name} = {moved.manifest.thresholds[name].value:g}")
        return
    assert value is not None
    known = opened.manifest.thresholds
    try:
        number = known[value].value if value in known else float(value)
    except ValueError as error:
        raise UsageError(
            f"'{value}' is neither a number nor a threshold of {folder}",
            fix=f"give a number or one of {', '.join(sorted(known))}",
        ) from error
    bundles.set_threshold(opened, name, number)
    _echo(f"{name} = {number:g}")


@bundle.command()
@click.argument("key", type=PATH)
def keygen(key: Path) -> None:
    """Make a pair of keys to sign with: KEY, which stays with you, and KEY.pub for everybody."""
    from engineworks.runtime.signing import make_keys

    public = key.with_name(f"{key.name}.pub")
    make_keys(key, public)
    _echo(f"{key}\n{public}")


@bundle.command(name="sign")
@click.argument("folder", type=PATH)
@click.option("--key", type=PATH, required=True, help="Private key: Ed25519, PEM or OpenSSH.")
def sign_bundle(folder: Path, key: Path) -> None:
    """Sign a bundle, after checking all of it."""
    from engineworks.runtime.bundle import read
    from engineworks.runtime.signing import sign

    opened = read(folder)
    sign(opened, key, password=lambda: click.prompt("password of the key", hide_input=True))
    _echo(f"signed {folder}, {opened.manifest.digest[:12]}")


@bundle.command(name="verify")
@click.argument("folder", type=PATH)
@click.option("--key", "keys", type=PATH, multiple=True, help="Public key that must have signed.")
def verify_bundle(folder: Path, keys: tuple[Path, ...]) -> None:
    """Check all of a bundle and, with --key, who signed it."""
    opened = _read_bundle(folder, keys)
    _echo(f"{folder}, {opened.manifest.digest[:12]}: whole{', and signed' if keys else ''}")


@bundle.command()
@click.argument("folder", type=PATH)
@click.option("--out", type=PATH, help="File to write [standard output].")
def sbom(folder: Path, out: Path | None) -> None:
    """What made a bundle, as a bill of materials (CycloneDX)."""
    from engineworks.runtime.bundle import read
    from engineworks.runtime.sbom import describe

    bill = describe(read(folder))
    if out is None:
        _echo(json.dumps(bill, indent=2))
    else:
        _write_json(out, bill)


@main.group()
def bank() -> None:
    """Change the memory bank of a trained bundle."""


@bank.command()
@click.argument("source", type=PATH)
@click.option("--images", type=FOLDER, required=True, help="New normal images.")
@OUT
@click.option("--max-rows", type=click.IntRange(min=1), default=1000, show_default=True)
@EXIST_OK
@BACKEND
@THREADS
def add(
    source: Path,
    images: Path,
    out: Path,
    max_rows: int,
    exist_ok: bool,
    backend: str,
    threads: int | None,
) -> None:
    """Extend the bank of bundle SOURCE with new normal images."""
    from engineworks.runtime.bundle import read
    from engineworks.runtime.systems import extend

    with claim(out):  # before it is read: it may be the bundle that is extended
        count = extend(
            read(source),
            images,
            out,
            max_rows=max_rows,
            backend=backend,
            threads=threads,
            exist_ok=exist_ok,
        )
    _echo(f"{count} rows added, {out}")


def _backbone(name: str, given: dict[str, Any]) -> tuple[BackboneConfig, tuple[int, int] | None]:
    """What ``backbone:NAME`` and its options mean: the net, and the size of its images."""
    from engineworks.training.config import BackboneConfig, read_yaml, validate

    tree: dict[str, Any] = {"name": name, **given}
    size = None
    try:
        if "stages" in tree:
            tree["stages"] = [int(stage) for stage in given["stages"].split(",")]
        if text := tree.pop("size", None):
            height, width = (int(side) for side in text.split(","))
            size = height, width
        if "args" in tree:
            tree["args"] = read_yaml(given["args"], "--args")
    except ValueError as error:
        raise UsageError(
            f"--stages, --size or --args of {name} cannot be read: {error}",
            fix="write e.g. --stages 2,3 --size 256,256 --args '{pad_type: same}'",
        ) from error
    return validate(BackboneConfig, tree), size


def _drop_unwritten() -> None:
    """Forget what standard output could not take: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _names(text: str) -> tuple[str, ...]:
    """``a,b`` -> names, each once."""
    return tuple(dict.fromkeys(filter(None, text.split(","))))


def _read_bundle(folder: Path, signers: Sequence[Path] = ()) -> Bundle:
    """A checked bundle, signed by one of these keys where there are any."""
    from engineworks.runtime.bundle import read

    opened = read(folder)
    if signers:
        from engineworks.runtime.signing import check_signature

        check_signature(opened, signers)
    return opened


def _need(package: str, extra: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise BackendError(
            f"this command needs '{package}', which is not installed",
            fix=f'pip install "engineworks[{extra}]"',
        )


def _echo(text: object, *, err: bool = False, fg: str | None = None) -> None:
    """Print lines that may hold names and labels: no terminal shall obey them."""
    click.secho(shown(str(text)), err=err, fg=fg)


def _say(context: click.Context) -> Callable[[str], None]:
    quiet = context.find_root().obj["quiet"]
    return (lambda _text: None) if quiet else (lambda text: _echo(text, err=True))


class _Messages(logging.Handler):
    """Shows on stderr what packages log: news; warnings, each once and also with --quiet."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(logging.WARNING if quiet else logging.INFO)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno < logging.WARNING:
            _echo(message, err=True)
        elif message not in self._shown:
            self._shown.add(message)
            _echo(message, fg="yellow", err=True)


def _show_messages(*, quiet: bool) -> None:
    logger = logging.getLogger("engineworks")
    logger.handlers = [handler := _Messages(quiet=quiet)]
    logger.setLevel(handler.level)


class _Progress:
    """Progress on stderr: bars; where it is no terminal, a line a minute; with --quiet nothing."""

    def __init__(self, context: click.Context) -> None:
        self._quiet = context.find_root().obj["quiet"]
        self._show = sys.stderr.isatty() and not self._quiet

    def __enter__(self) -> Callable[[str, int, int], None]:
        if self._quiet:
            return lambda _label, _done, _total: None
        if not self._show:
            return self._lines()
        from rich.console import Console
        from rich.progress import Progress, TaskID

        self._bar = Progress(console=Console(stderr=True, force_terminal=True), transient=True)
        self._bar.start()
        tasks: dict[str, TaskID] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = self._bar.add_task(label)
            self._bar.update(tasks[label], completed=done, total=total or None)

        return show

    def __exit__(self, *_error: object) -> None:
        if self._show:
            self._bar.stop()

    @staticmethod
    def _lines() -> Callable[[str, int, int], None]:
        told = time.monotonic()

        def show(label: str, done: int, total: int) -> None:
            nonlocal told
            if (now := time.monotonic()) - told >= LINE_EVERY_S:
                told = now
                _echo(f"{label}: {done}{f' of {total}' if total else ''}", err=True)

        return show


def _write_json(path: Path, content: dict[str, Any]) -> None:
    from engineworks.runtime import files

    files.write(path, json.dumps(content, indent=2) + "\n")


def _print_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=any(header))
    for name in header:
        # a narrow terminal must not cut names off
        table.add_column(Text(shown(name)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(part)) for part in row))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(Text(shown(title)), table, sep="\n")


def _print_decisions(decisions: Sequence[Decisions | dict[str, Any]], of: str = "") -> None:
    """What borders decide on labelled data, and what nobody would want of the one that ships.

    Args:
        decisions: as they were made, or as JSON has them.
        of: the precision that made them, where there are several.
    """
    from engineworks.runtime.evaluation import Decisions, table

    made = [Decisions.model_validate(each) for each in decisions]
    if not made:
        return
    header, rows = table(made)
    of = f"{of} " if of else ""
    _print_table(f"{of}decisions, with 95 % intervals (Wilson)", header, rows)
    for warning in made[0].warnings:
        _warn(f"warning: {of}{warning}")


def _print_gate(gate: dict[str, Any]) -> None:
    """What the precisions of an export decided; gates of older exports do not tell."""
    for precision, decisions in gate.get("decisions", {}).items():
        _print_decisions(decisions, precision)


def _warn(text: str) -> None:
    _echo(text, fg="yellow", err=True)


def _print_parity(reports: dict[str, Any]) -> None:
    """How far each stage is from the one before, per graph output."""
    stages = {"torch to ONNX": reports.get("parity", {}).get("torch-float", {})}
    for kind, graphs in reports.get("parity_half", {}).items():
        stages[f"float to {kind}"] = graphs
    for backend, graphs in reports.get("parity_int8", {}).items():
        stages[f"float to INT8, {backend}"] = graphs
    rows = [
        (
            stage,
            f"{graph}.{output}",
            *(f"{parity.get(key, math.nan):.2e}" for key in ("max_rel", "mean_rel")),
            *(f"{parity.get(key, math.nan):.6f}" for key in ("cosine", "cosine_worst1pct")),
        )
        for stage, graphs in stages.items()
        for graph, outputs in graphs.items()
        for output, parity in outputs.items()
    ]
    header = ("parity", "output", "max rel", "mean rel", "cosine", "cosine, worst 1 %")
    _print_table("same feeds through both", header, rows)


def _print_results(results: dict[str, Any]) -> None:
    """What a run found out: each part a table whose longer side runs down, or a list of values."""
    for name, part in results.items():
        if isinstance(part, list):
            _print_decisions(part)
            continue
        rows = part if all(isinstance(row, dict) for row in part.values()) else {"": part}
        across = list(dict.fromkeys(column for row in rows.values() for column in row))
        down = list(rows)
        cells = [[_text(row.get(column)) for column in across] for row in rows.values()]
        if len(across) > len(down):
            across, down, cells = down, across, [list(line) for line in zip(*cells, strict=True)]
        _print_table(
            name,
            ("", *across),
            [(key, *line) for key, line in zip(down, cells, strict=True)],
        )


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
