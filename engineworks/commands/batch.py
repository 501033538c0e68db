"""``batch``: a bundle on a folder that outgrows a machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from engineworks.commands.options import (
    BACKEND,
    CONF,
    HOST_CODE,
    IOU,
    OUT,
    PATH,
    PRECISION,
    REFS,
    SIGNED,
)
from engineworks.commands.printing import Progress, echo, say, warn
from engineworks.runtime.signals import Stopped

_COUNT = click.IntRange(min=1)


@click.command()
@click.argument("bundle", type=PATH)
@click.option("--source", required=True, help="File, folder, glob or list.txt.")
@OUT
@click.option("--actors", type=_COUNT, default=1, show_default=True, help="Processes at work.")
@click.option(
    "--threads", type=_COUNT, default=1, show_default=True, help="CPU threads of each of them."
)
@BACKEND
@PRECISION
@HOST_CODE
@SIGNED
@REFS
@CONF
@IOU
@click.option("--batch", type=_COUNT, default=8, show_default=True, help="Pictures per call.")
@click.option("--block", type=_COUNT, default=256, show_default=True, help="Pictures per file.")
@click.option("--maps", is_flag=True, help="Also write the maps of scores.")
@click.option(
    "--address",
    metavar="HOST:PORT",
    help="Of a cluster of Ray that sees the same files [one of this machine, for this job].",
)
@click.pass_context
def batch(
    context: click.Context,
    /,
    bundle: Path,
    source: str,
    out: Path,
    actors: int,
    block: int,
    address: str | None,
    **options: Any,
) -> None:
    """Run a BUNDLE on many pictures, in processes of Ray; the answers are parquet files.

    Each file in OUT is there whole or not at all. The same command again does those that are
    missing; with another bundle, other settings or other pictures it is refused.
    """
    from engineworks.runtime.doctor import need

    need("ray", "ray")
    from engineworks.batch.job import Summary, run
    from engineworks.batch.mapper import Mapper

    summary, stopped = Summary(), None
    try:
        with Progress(context) as show:
            run(
                partial(Mapper, bundle, **options),
                source,
                out,
                actors=actors,
                block=block,
                address=address,
                progress=partial(show, "batch"),
                say=say(context),
                summary=summary,
            )
    except Stopped as signal:
        stopped = signal
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
