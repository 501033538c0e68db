"""``report``: a run or a bundle as a page."""

from __future__ import annotations

from pathlib import Path

import click

from engineworks.commands.options import PATH
from engineworks.commands.printing import echo
from engineworks.runtime.errors import UsageError


@click.command()
@click.argument("folder", type=PATH, metavar="RUN|BUNDLE")
@click.option("--out", type=PATH, required=True, help="File to write, PAGE.html.")
@click.option("--bench", "bench_file", type=PATH, help="Of a bundle: what `bench --json` wrote.")
def report(folder: Path, out: Path, bench_file: Path | None) -> None:
    """What a training or an export found out, as one page that opens offline."""
    from engineworks.runtime.bundle import MANIFEST_NAME, read
    from engineworks.runtime.compare import read as read_timings
    from engineworks.runtime.pages import of_bundle, of_training
    from engineworks.training.run import INFO_NAME, is_run, open_run, read_history

    if is_run(folder):
        if bench_file is not None:
            raise UsageError("--bench is of a bundle", fix="leave it out, or give the bundle")
        run = open_run(folder)
        told = run.info.model_dump(mode="json")
        results = told.pop("results")
        facts = {name: value for name, value in told.items() if not isinstance(value, dict)}
        name = f"{run.info.system}: {folder.resolve().name}"
        page = of_training(name, facts, results, read_history(folder))
    elif (folder / MANIFEST_NAME).is_file():
        page = of_bundle(read(folder), None if bench_file is None else read_timings(bench_file))
    else:
        raise UsageError(
            f"there is no {INFO_NAME} and no {MANIFEST_NAME} in {folder}",
            fix="give what train or export wrote",
        )
    page.write(out)
    echo(out)
