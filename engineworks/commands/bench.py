"""``bench``: how fast a bundle is, and against what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from engineworks.commands.options import (
    BACKEND,
    FOLDER,
    HOST_CODE,
    JSON,
    PATH,
    SIGNED,
    THREADS,
    prompt_options,
    read_bundle,
)
from engineworks.commands.printing import echo, say, write_json
from engineworks.runtime.errors import UsageError


def _sizes(_context: object, _option: object, text: str) -> list[int]:
    """``1,8`` -> sizes of batches; as click calls it."""
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--batch takes sizes such as 1,8, got {text!r}") from error
    if min(sizes) < 1:
        raise UsageError(f"--batch takes sizes of at least 1, got {text!r}")
    return sizes


@click.command()
@click.argument("bundle", type=PATH, required=False)
@click.option("--run", type=FOLDER, help="Its training run: adds eager PyTorch rows.")
@click.option("--eval", "evaluation", type=FOLDER, help="Labelled data: accuracy beside speed.")
@click.option("--source", help="Images to time on [noise].")
@prompt_options
@BACKEND
@click.option(
    "--batch", "batches", default="1", callback=_sizes, show_default=True, help="Sizes, e.g. 1,8."
)
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
    /,
    bundle: Path | None,
    run: Path | None,
    source: str | None,
    threads: int | None,
    signers: tuple[Path, ...],
    json_file: Path | None,
    compare: tuple[Path, Path] | None,
    **wanted: Any,
) -> None:
    """Time a BUNDLE on every backend and precision, against eager PyTorch with --run."""
    if compare is not None:
        from engineworks.runtime.compare import compare as compare_reports
        from engineworks.runtime.compare import render as render_comparison

        echo(render_comparison(compare_reports(*compare)))
        return
    if bundle is None:
        raise UsageError("bench needs a bundle", fix="name one, or pass --compare A.json B.json")
    from engineworks.runtime import contenders
    from engineworks.runtime.bench import environment, render
    from engineworks.runtime.doctor import need
    from engineworks.runtime.threads import available_threads

    threads = threads or available_threads()
    opened = read_bundle(bundle, signers)
    images = contenders.images_for(opened, source)
    tell = say(context)
    eager: list[contenders.Contender] = []
    if run is not None:
        need("torch", "train")
        from engineworks.training.eager import of_run

        eager = of_run(run, opened, threads=threads, say=tell)
    rows = contenders.measure(opened, images, eager=eager, threads=threads, say=tell, **wanted)
    echo(render(rows, opened.manifest.gate))
    if json_file:
        content = {
            "environment": environment(threads=threads),
            "bundle": str(bundle),
            "bundle_digest": opened.manifest.digest,
            "inputs": contenders.describe_images(images),
            "rows": [row.to_json() for row in rows],
        }
        write_json(json_file, content)
