"""``export``: a run becomes a bundle, a bundle one with INT8, 16 bits or plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from engineworks.commands.options import (
    EXIST_OK,
    FOLDER,
    OUT,
    PATH,
    THREADS,
    names_of,
    net_options,
    plan_options,
)
from engineworks.commands.printing import Progress, echo, print_gate, print_parity, say


@click.command()
@click.argument("source", type=PATH)
@OUT
@EXIST_OK
@click.option(
    "--data",
    type=FOLDER,
    help="What RUN was trained on: to export it with its other weights, or as a kill left it.",
)
@click.option("--int8", is_flag=True, help="Add INT8 graphs; needs --samples.")
@click.option("--samples", type=FOLDER, help="Images that the system will meet, for calibration.")
@click.option(
    "--refs",
    "references",
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
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="For timing float against INT8, per backend.",
)
@click.option("--sensitivity", is_flag=True, help="Cost of each node; worst back to float.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of samples.")
@click.option(
    "--half",
    "halves",
    default="",
    callback=names_of,
    metavar="LIST",
    help="Mixed 16-bit graphs: fp16,bf16.",
)
@click.option("--triton", type=PATH, help="Also write a model repository of Triton here.")
@net_options
@plan_options
@THREADS
@click.pass_context
def export(
    context: click.Context,
    /,
    source: Path,
    out: Path,
    triton: Path | None,
    exist_ok: bool,
    **wanted: Any,
) -> None:
    """Turn a training RUN into a bundle; a BUNDLE into one with INT8, 16 bits or plans.

    A run that was stopped is exported as far as it got; --weights last takes its last epoch in the
    place of its best one.

    backbone:NAME is a net of timm alone, for --set backbone.engine=BUNDLE and for embeddings.
    Plans are TensorRT's, and only for the machine that builds them. With --refs its objects are
    what the bundle looks for where nothing else is asked for.
    """
    from engineworks.export.config import ExportConfig
    from engineworks.export.pipeline import export as run_export

    with Progress(context) as progress:
        made = run_export(
            source,
            out,
            ExportConfig(**wanted),
            exist_ok=exist_ok,
            say=say(context),
            progress=progress,
        )
    reports = made.manifest.reports
    print_parity(reports)
    print_gate(reports.get("gate", {}))
    echo(out)
    if triton is not None:
        from engineworks.runtime.serving.triton import write_repository

        write_repository(made, triton, out.resolve().name, exist_ok=exist_ok)
        echo(triton)
