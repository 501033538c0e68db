"""``sample`` and ``check``: data sets that are drawn, and those that are there."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path

import click

from engineworks.commands.options import FOLDER, OUT, PATH
from engineworks.commands.printing import Progress, echo, print_table
from engineworks.runtime.claims import claim
from engineworks.runtime.errors import UsageError


@click.command()
@click.argument("system")
@OUT
@click.option("--seed", type=int, default=0, show_default=True)
def sample(system: str, out: Path, seed: int) -> None:
    """Draw a small labelled data set for SYSTEM."""
    from engineworks.training.systems import system_package

    package = system_package(system)  # refuses a misspelt name
    draw = importlib.import_module(f"{package}.sample")
    out.mkdir(parents=True, exist_ok=True)
    with claim(out):
        if any(out.iterdir()):
            raise UsageError(f"{out} is not empty", fix="choose another --out, or delete it")
        draw.sample(out, seed=seed)
    echo(out)


@click.command()
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
    with Progress(context) as show:
        found = survey(labelled, quick=quick, progress=partial(show, "reading"))
    print_table(str(data), HEADER, found.rows)
    for heading, tally in findings(found).items():
        click.secho(heading, bold=True)
        for line in lines(tally):
            echo(f"  {line}")
    for fix in dict.fromkeys(found.faults.fixes.values()):
        echo(f"  fix: {fix}")
    if report is not None:
        echo(page(f"{system}: {data.resolve().name}", found, labelled).write(report))
    if found.faults:
        context.exit(1)
