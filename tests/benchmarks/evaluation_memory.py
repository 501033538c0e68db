"""Peak memory of evaluations of a few and of many pictures.

python -m tests.benchmarks.evaluation_memory BUNDLE --data DIR [--data DIR ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import click

from engineworks.runtime.bench import peak_rss_bytes
from engineworks.runtime.bundle import read
from engineworks.runtime.systems import open_system


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--data", "sets", multiple=True, type=click.Path(path_type=Path), required=True)
@click.option("--backend", default="ort")
@click.option("--precision", default="int8")
@click.option("--inside", is_flag=True, hidden=True)
def main(bundle: Path, sets: tuple[Path, ...], backend: str, precision: str, inside: bool) -> None:
    """Print the peak of a fresh process for each labelled set, and what it measured."""
    if not inside:
        for data in sets:
            words = [bundle, "--data", data, "--backend", backend, "--precision", precision]
            command = [sys.executable, "-m", __spec__.name, *map(str, words), "--inside"]
            subprocess.run(command, check=True)
        return
    with closing(open_system(read(bundle), backend=backend, precision=precision)) as system:
        opened = peak_rss_bytes()
        judged = system.evaluate(sets[0])
    click.echo(
        f"{judged.num_pictures} pictures: peak {peak_rss_bytes() / 2**20:.0f} MiB, "
        f"{opened / 2**20:.0f} before; {json.dumps(judged.metrics)}"
    )


if __name__ == "__main__":
    main()
