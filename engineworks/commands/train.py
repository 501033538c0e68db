"""``train``: a folder of data becomes a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from engineworks.commands.options import EXIST_OK, FOLDER, PATH
from engineworks.commands.printing import Progress, echo, hide_messages, print_results
from engineworks.runtime.errors import UsageError
from engineworks.runtime.refusals import explain
from engineworks.runtime.signals import Stopped


@click.command()
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
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    help="Train in so many processes of this machine: CPUs, or a GPU each [1].",
)
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
    processes: int | None,
    exist_ok: bool,
) -> None:
    """Train SYSTEM on a folder of data.

    Ctrl-C keeps the run: what is done can be exported, and --resume goes on. With --resume, --set
    may change train.epochs and train.patience.

    Several processes share each batch, on one machine by --processes, on several by torchrun or the
    variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT of a cluster. A run becomes
    the same with any number of them, up to rounding and what is drawn at random.
    """
    from engineworks.runtime.doctor import need

    need("torch", "train")
    from engineworks.training.config import changed, load_config
    from engineworks.training.processes import check_alone, follow_launcher, launch, place
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
    here = place()
    if processes not in (None, 1, here.size):
        check_alone(here, processes)
        launch(processes)
        return
    from engineworks.training.train import (
        train as train_run,  # torch takes seconds, a misspelt key needs none
    )

    follow_launcher()
    if not here.is_main:
        hide_messages()
    with _told_once(context), Progress(context) as progress:
        run = train_run(
            merged, data, out, resume=resume, exist_ok=exist_ok, profile=profile, progress=progress
        )
    if here.is_main:
        print_results(run.info.results)
        echo(run.root)


@contextmanager
def _told_once(context: click.Context) -> Iterator[None]:
    """What ends one of several processes is told by one of them."""
    from engineworks.training.processes import tells_launcher

    try:
        yield
    except (Stopped, Exception) as error:
        told = error if isinstance(error, Stopped) else explain(error)
        if not tells_launcher(told):
            raise
        context.exit(told.exit_code)
