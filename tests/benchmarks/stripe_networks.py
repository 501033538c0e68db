"""What networks of ``stripe`` reach after the same steps on the same drawn strips.

python -m tests.benchmarks.stripe_networks [--epochs 6] [--only NAME]...

The published U-Net takes a hundred times as long as the others: name those that you want.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import click
from accelerate.state import AcceleratorState

from engineworks.training.config import load_config
from engineworks.training.systems.stripe.sample import sample
from engineworks.training.train import train

# the published learning rate for the published nets: a higher one does not converge there
NETWORKS = {
    "plain 32 x 4, cells of 2": [],
    "plain 32 x 6, cells of 2": ["network.depth=6"],
    "plain 24 x 4, cells of 2": ["network.width=24"],
    "plain 16 x 4, cells of 2": ["network.width=16"],
    "plain 16 x 4, pixels": ["network.width=16", "network.cell=1"],
    "unet 8": ["network.name=unet", "network.width=8", "train.optimizer.lr=1e-3"],
    "unet 64 (published)": ["network.name=unet", "network.width=64", "train.optimizer.lr=1e-3"],
}
COLUMNS = ("pixel_ap", "recall_at_1_false", "image_auroc")


@click.command()
@click.option("--epochs", type=click.IntRange(min=1), default=6)
@click.option("--repeat", type=click.IntRange(min=1), default=8)
@click.option("--seed", type=int, default=0)
@click.option("--precision", default="bf16")
@click.option("--only", multiple=True, type=click.Choice(list(NETWORKS)))
def main(epochs: int, repeat: int, seed: int, precision: str, only: tuple[str, ...]) -> None:
    """Print a row per network."""
    shared = [
        f"train.epochs={epochs}",
        f"tiles.repeat={repeat}",
        f"train.seed={seed}",
        f"train.precision={precision}",
    ]
    click.echo(f"{'network':26} parameters  MAC/pixel  {'  '.join(COLUMNS)}  seconds")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        sample(data, num_test=60)
        for i, name in enumerate(only or NETWORKS):
            AcceleratorState._reset_state(reset_partial_state=True)
            start = time.perf_counter()
            config = load_config("stripe", None, [*shared, *NETWORKS[name]])
            results: Any = train(config, data, Path(folder) / str(i)).info.results
            seconds = time.perf_counter() - start
            network = results["network"]
            figures = "  ".join(f"{results['test'][key]:{len(key)}.4f}" for key in COLUMNS)
            click.echo(
                f"{name:26} {network['parameters']:10d}  "
                f"{network['multiply_adds_per_pixel']:9.0f}  {figures}  {seconds:7.0f}"
            )


if __name__ == "__main__":
    main()
