"""What the options of part contrast change: metrics, and how far the short cuts are from exact.

    python -m tests.benchmarks.paco_mining --run RUN --data DIR [--batches 20]

Parts of a trained net, two views of real pictures, batch by batch; no gradient, running covariances
filled by a first pass over the same batches.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import click
import torch
from torch import Tensor

from engineworks.training.backbones import read_weights
from engineworks.training.run import open_run
from engineworks.training.systems.paco.config import LossConfig, TaskConfig
from engineworks.training.systems.paco.loss import PartLoss
from engineworks.training.systems.paco.model import PacoTraining
from engineworks.training.systems.paco.task import Task

EXACT = LossConfig(matching_warmup_epochs=0)
OPTIONS = {
    "ours (global metric, exact)": {},
    "top-M 64": {"top_m": 64},
    "top-M 32": {"top_m": 32},
    "top-M 8": {"top_m": 8},
    "pool of 4 pictures": {"pool_cap": 4},
    "pool of 1 picture (published)": {"pool_cap": 1},
    "hardest negatives": {"mining": "hardest"},
    "metric of the class": {"metric": "class"},
    "metric of the batch": {"metric": "batch"},
    "Euclid": {"metric": "euclid"},
    "metric of the pair, shrunk": {"metric": "pair"},
    "metric of the pair, ridge 1e-2, raw (published)": {
        "metric": "pair",
        "shrinkage": None,
        "ridge": 1e-2,
        "normalise": False,
        "matching": "cosine",
    },
}


@torch.no_grad()
def parts_of(model: PacoTraining, batch: dict[str, Tensor]) -> Tensor:
    """(2, B, K, d)."""
    assert model.reduction is not None
    maps = model.net.features(batch["views"].transpose(0, 1).flatten(0, 1))
    windows = model.sampler.windows(model.sampler.peaks(maps), maps)
    parts = model.reduction(model.sampler.parts(maps, windows))
    return parts.view(2, -1, *parts.shape[1:])


@click.command()
@click.option("--run", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--batches", default=20)
def main(run: Path, data: Path, batches: int) -> None:
    opened = open_run(run)
    assert isinstance(opened.config, TaskConfig)
    task = Task(opened.config, data, run, weights=False)
    model = task.model
    assert isinstance(model, PacoTraining)
    model.load_state_dict(read_weights(opened.weights()))
    model.eval()
    found = [(parts_of(model, b), b["label"]) for b in islice(task.loader(), batches)]
    shape = tuple(found[0][0].shape)
    print(f"{len(found)} batches of parts {shape}: mean PaC, share of active triplets")
    for name, changes in OPTIONS.items():
        config = EXACT.model_copy(update=changes)
        criterion = PartLoss(config, len(task.labels), shape[-1]).train()
        with torch.no_grad():
            for parts, labels in found:
                criterion(parts, labels, 0)
            criterion.eval()
            terms = [criterion(parts, labels, 0) for parts, labels in found]
        pac, active = (sum(float(t[key]) for t in terms) / len(terms) for key in ("pac", "active"))
        print(f"{name:50s} {pac:8.4f}  {active:6.1%}")


if __name__ == "__main__":
    main()
