"""``infer``, ``eval`` and ``refs``: a bundle at work."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engineworks.commands.options import (
    EXIST_OK,
    FOLDER,
    JSON,
    OUT,
    PATH,
    OpenBundle,
    Prepare,
    engine_options,
    prompt_options,
    there,
)
from engineworks.commands.printing import (
    Progress,
    echo,
    print_decisions,
    print_table,
    say,
    warn,
    write_json,
)
from engineworks.runtime.errors import UsageError
from engineworks.runtime.signals import Stopped
from engineworks.runtime.texts import hide_secrets

if TYPE_CHECKING:
    from engineworks.runtime.infer import Summary
    from engineworks.runtime.systems import System


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--source", required=True, help="File, folder, glob, list.txt, video, 0, rtsp://...")
@OUT
@engine_options
@prompt_options
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--jsonl", is_flag=True, help="Write results.jsonl, one line per image.")
@click.option("--coco", is_flag=True, help="Write coco.json, boxes with scores.")
@click.option("--no-track", is_flag=True, help="Do not number the objects of a video.")
@click.option(
    "--save-overlays", "overlays", is_flag=True, help="Write pictures (a video: annotated)."
)
@click.option("--report", type=PATH, help="Also write one HTML page, with pictures if saved.")
@click.option("--frame-step", type=click.IntRange(min=1), default=1, help="Every n-th frame.")
@EXIST_OK
@click.pass_context
def infer(
    context: click.Context,
    /,
    bundle: Path,
    source: str,
    out: Path,
    open_bundle: OpenBundle,
    prepare: Prepare,
    no_track: bool,
    report: Path | None,
    exist_ok: bool,
    **wanted: Any,
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
    tell = say(context)
    summary, stopped = Summary(), None
    with open_bundle(bundle) as system:
        opened = open_source(source, system.reader)
        prepare(system)
        tell(f"{system.backend}, {system.precision}")
        if note := unjudged(system.bundle.manifest, system.precision):
            warn(note)
        try:
            with Progress(context) as show:
                run_infer(
                    system,
                    opened,
                    out,
                    track=isinstance(system, Promptable) and not no_track,
                    progress=partial(show, "inference"),
                    say=tell,
                    summary=summary,
                    **wanted,
                )
        except Stopped as signal:
            stopped = signal
    if report is not None:
        _write_report(report, system, source, out, summary)
    for name, message in summary.failures:
        warn(f"skipped {name}: {message}")
    echo(
        f"{summary.num_done} done, {summary.num_failed} failed, "
        f"{summary.images_per_second:.1f} images/s, results in {out}"
    )
    if stopped is not None:
        raise stopped
    if summary.num_failed:
        context.exit(1)


def _write_report(report: Path, system: System, source: str, out: Path, summary: Summary) -> None:
    from engineworks.runtime.pages import of_inference
    from engineworks.runtime.verdict import unjudged

    note = unjudged(system.bundle.manifest, system.precision)
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
    of_inference(system.bundle, out, facts, failures=summary.failures).write(report)


@click.command(name="eval")
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
    with open_bundle(bundle) as system, Progress(context) as show:
        prepare(system)
        judged = system.evaluate(data, progress=partial(show, "evaluation"))
    print_table(
        f"{bundle} on {data}: {system.backend}, {system.precision}, {judged.num_pictures} pictures",
        ("metric", "value"),
        [(name, f"{value:.4f}") for name, value in judged.metrics.items()]
        or [("none", "these labels allow no metric")],
    )
    print_decisions(judged.decisions)
    for message in judged.failures:
        warn(f"left out: {message}")
    if json_file:
        content = {"backend": system.backend, "precision": system.precision, **judged.to_json()}
        write_json(json_file, content)
    if judged.failures:
        context.exit(1)


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--refs",
    type=PATH,
    required=True,
    multiple=True,
    callback=there,
    metavar="WHAT",
    help="Pictures of objects; see `infer`.",
)
@click.option("--out", type=PATH, required=True, help="File to write, FILE.npz.")
@engine_options
@EXIST_OK
def refs(
    bundle: Path, refs: tuple[Path, ...], out: Path, open_bundle: OpenBundle, exist_ok: bool
) -> None:
    """Keep what BUNDLE makes of reference pictures, for --refs FILE.npz."""
    from engineworks.runtime.references import read_references
    from engineworks.runtime.systems import Promptable

    if out.exists() and not exist_ok:
        raise UsageError(f"{out} exists", fix="choose another --out, or pass --exist-ok")
    with open_bundle(bundle) as system:
        if not isinstance(system, Promptable):
            raise UsageError(f"{bundle} is of a system that is not told what to look for")
        prototypes = system.encode(read_references(*refs))
        prototypes.save(out)
    echo(f"{', '.join(prototypes.names)} in {out}")
