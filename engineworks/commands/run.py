"""``infer``, ``eval`` and ``refs``: a bundle at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    from engineworks.runtime.cameras import Camera
    from engineworks.runtime.infer import Summary
    from engineworks.runtime.outbox import Outbox
    from engineworks.runtime.systems import System


@click.command()
@click.argument("bundle", type=PATH)
@click.option(
    "--source",
    "sources",
    required=True,
    multiple=True,
    help="File, folder, glob, list.txt, video, 0, rtsp://..., or a list of cameras.yaml. May be "
    "given several times: all are read at once, each into its own folder of OUT.",
)
@OUT
@engine_options
@prompt_options
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option("--jsonl", is_flag=True, help="Write results.jsonl, one line per image.")
@click.option("--coco", is_flag=True, help="Write coco.json, boxes with scores.")
@click.option("--no-track", is_flag=True, help="Do not number the objects of a video.")
@click.option(
    "--no-follow", is_flag=True, help="Search every frame of a video whole, nothing is followed."
)
@click.option(
    "--save-overlays", "overlays", is_flag=True, help="Write pictures (a video: annotated)."
)
@click.option("--report", type=PATH, help="Also write one HTML page, with pictures if saved.")
@click.option("--post", metavar="URL", help="Send results there as they come, as JSON.")
@click.option(
    "--mqtt", metavar="mqtt://HOST/TOPIC", help="Send results to a broker as they come, as JSON."
)
@click.option(
    "--keep",
    metavar="doubtful:SIZE",
    help="Keep pictures near the border, or unlike the calibration's, in OUT/doubtful: 500MB.",
)
@click.option("--frame-step", type=click.IntRange(min=1), default=1, help="Every n-th frame.")
@EXIST_OK
@click.pass_context
def infer(
    context: click.Context,
    /,
    bundle: Path,
    sources: tuple[str, ...],
    out: Path,
    open_bundle: OpenBundle,
    prepare: Prepare,
    no_track: bool,
    no_follow: bool,
    report: Path | None,
    post: str | None,
    mqtt: str | None,
    keep: str | None,
    frame_step: int,
    exist_ok: bool,
    **wanted: Any,
) -> None:
    """Run a BUNDLE on images or video, without PyTorch."""
    from engineworks.runtime.cameras import open_cameras
    from engineworks.runtime.doubtful import FOLDER_NAME, Doubtful, limit_of
    from engineworks.runtime.infer import Summary
    from engineworks.runtime.infer import infer as run_infer
    from engineworks.runtime.outputs import is_free
    from engineworks.runtime.systems import Promptable
    from engineworks.runtime.verdict import unjudged

    if not exist_ok and not is_free(out):
        raise UsageError(f"{out} is not empty", fix="choose another --out, or pass --exist-ok")
    tell = say(context)
    limit_bytes = None if keep is None else limit_of(keep)
    summary, stopped = Summary(), None
    outboxes = _outboxes(out, post, mqtt, tell)
    with open_bundle(bundle) as system:
        cameras = open_cameras(sources, system.reader, step=frame_step)
        prepare(system)
        kept = [] if limit_bytes is None else [Doubtful(system, out / FOLDER_NAME, limit_bytes)]
        tell(f"{system.backend}, {system.precision}")
        if note := unjudged(system.bundle.manifest, system.precision):
            warn(note)
        try:
            with Progress(context) as show:
                run_infer(
                    system,
                    cameras,
                    out,
                    sinks=[*outboxes, *kept],
                    track=isinstance(system, Promptable) and not no_track,
                    follow=not no_follow,
                    progress=partial(show, "inference"),
                    say=tell,
                    summary=summary,
                    **wanted,
                )
        except Stopped as signal:
            stopped = signal
    if report is not None:
        _write_reports(report, system, cameras, out, summary)
    for name, message in summary.failures:
        warn(f"skipped {name}: {message}")
    echo(
        f"{summary.num_done} done, {summary.num_failed} failed, "
        f"{summary.images_per_second:.1f} images/s, results in {out}"
    )
    for doubtful in kept:
        echo(f"{doubtful.num_kept} doubtful pictures in {out / FOLDER_NAME}")
    for outbox in outboxes:
        if outbox.num_waiting or outbox.num_lost:
            warn(f"{outbox.num_waiting} results are not sent yet, {outbox.num_lost} are lost")
    if stopped is not None:
        raise stopped
    if summary.num_failed or any(box.num_waiting or box.num_lost for box in outboxes):
        context.exit(1)


def _outboxes(
    out: Path, post: str | None, mqtt: str | None, tell: Callable[[str], None]
) -> list[Outbox]:
    """Where results are sent, each with its queue in the folder of results."""
    from engineworks.runtime.outbox import Outbox

    boxes: list[Outbox] = []
    if post is not None:
        from engineworks.runtime.webhook import Webhook

        boxes.append(Outbox(out / "outbox-post", Webhook(post), say=tell))
    if mqtt is not None:
        from engineworks.runtime.mqtt import Mqtt

        boxes.append(Outbox(out / "outbox-mqtt", Mqtt(mqtt), say=tell))
    return boxes


def _write_reports(
    report: Path, system: System, cameras: Sequence[Camera], out: Path, summary: Summary
) -> None:
    """A page of each source: of named ones ``<report>-<name>.html``."""
    for camera in cameras:
        page = report.with_stem(f"{report.stem}-{camera.name}") if camera.name else report
        _write_report(page, system, camera, out / camera.name, summary)


def _write_report(
    report: Path, system: System, camera: Camera, out: Path, summary: Summary
) -> None:
    from engineworks.runtime.pages import of_inference
    from engineworks.runtime.verdict import unjudged

    note = unjudged(system.bundle.manifest, system.precision)
    facts = {
        "source": hide_secrets(camera.text),
        "bundle": system.bundle.root,
        "digest": system.bundle.manifest.digest,
        "backend": f"{system.backend}, {system.precision}",
        **({"accuracy": note} if note else {}),
        "done": summary.counters[camera.name].num_done,
        "failed": summary.counters[camera.name].num_failed,
        "images per second": f"{summary.images_per_second:.1f}",
    }
    of_camera = f"{camera.name}: " if camera.name else ""
    failures = [
        (name.removeprefix(of_camera), message)
        for name, message in summary.failures
        if name.startswith(of_camera)
    ]
    of_inference(system.bundle, out, facts, failures=failures).write(report)


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
