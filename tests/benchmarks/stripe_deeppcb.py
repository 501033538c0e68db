"""Real defects found by a net that has seen painted ones only: DeepPCB's boards and templates.

python -m tests.benchmarks.stripe_deeppcb DATA [--epochs 4]

The template of a board stands for both references, the second displaced by up to a pixel along each
axis. Trained on templates alone, with spots painted onto them; judged by the boxes of the test
boards: how many hold a candidate while there is at most one false candidate per board.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np

from engineworks.runtime import images, planes
from engineworks.runtime.tensors import Array
from engineworks.training.config import load_config
from engineworks.training.train import train

# black and white boards: spots as wide as real defects, saturated, and edges that move by a pixel
SETTINGS = (
    "network.depth=6",
    "tiles.jitter=32",
    "defects.margin=8",
    "defects.amplitude=[1.0, 3.0]",
    "defects.kernels=[{size: [5, 5], sigma: [1.5, 1.5]}, {size: [9, 9], sigma: [2.5, 2.5]},"
    " {size: [7, 13], sigma: [1.5, 3.5]}, {size: [13, 7], sigma: [3.5, 1.5]}]",
    "disturbances.shift=1.5",
    "disturbances.spread=0.75",
    "disturbances.whole_pixels=true",
    "disturbances.lines=0.0",
    "inference.suppression=15.0",
    "train.precision=bf16",
)


def captures(target: Array, template: Array, rng: np.random.Generator) -> Array:
    """(H, W, 3): a board, its template, and the template displaced."""
    down, across = rng.integers(-1, 2, 2).tolist()
    matrix = np.array([[1, 0, across], [0, 1, down]], np.float32)
    moved = cv2.warpAffine(
        template, matrix, template.shape[::-1], borderMode=cv2.BORDER_REFLECT_101
    )
    return np.stack([target, template, moved], axis=-1)


def convert(source: Path, out: Path) -> None:
    """Write the boards as ``runtime.datasets.strips`` takes them; boxes become masks."""
    rng = np.random.default_rng(0)
    for split in ("trainval", "test"):
        told = json.loads((source / f"annotations_{split}.json").read_text(encoding="utf-8"))
        boxes = defaultdict(list)
        for annotation in told["annotations"]:
            boxes[annotation["image_id"]].append(annotation["bbox"])
        for image in told["images"]:
            name = Path(image["file_name"]).stem
            template = images.read(source / image["template"])[..., 0]
            if split == "trainval":
                path = out / "train/good" / f"{name}.npy"
                planes.write(path, captures(template, template, rng))
                continue
            board = images.read(source / "images" / image["file_name"])[..., 0]
            planes.write(out / "test/defect" / f"{name}.npy", captures(board, template, rng))
            mask = np.zeros(board.shape, np.uint8)
            for x, y, width, height in boxes[image["id"]]:
                mask[y : y + height, x : x + width] = 255
            images.write(out / "ground_truth/defect" / f"{name}_mask.png", mask)


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--epochs", type=click.IntRange(min=1), default=4)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
def main(data: Path, epochs: int, overrides: tuple[str, ...]) -> None:
    """Print the recall of the real boxes."""
    with tempfile.TemporaryDirectory() as folder:
        convert(data, Path(folder) / "data")
        start = time.perf_counter()
        config = load_config("stripe", None, [*SETTINGS, f"train.epochs={epochs}", *overrides])
        run = train(config, Path(folder) / "data", Path(folder) / "run")
        results: Any = run.info.results["test"]
        click.echo(f"{run.info.step} steps, {time.perf_counter() - start:.0f} s")
        for key in ("recall_at_1_false", "recall_at_150", "recall_at_500", "recall"):
            click.echo(f"{key:20} {results[key]:.4f}")
        click.echo(f"{'false_per_image':20} {results['false_per_image']:.4f}")


if __name__ == "__main__":
    main()
