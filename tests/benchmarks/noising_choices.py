r"""What the defaults of ``noising`` were chosen by, on several sets and seeds at once.

    python -m tests.benchmarks.noising_choices layers|features|rows|borders --weights FILE \
        --set DIR:SIZE [--set DIR:SIZE ...] [--seeds 3]

``layers``: which of the net's maps, from all normal pictures and from eight; ``features``: what a
patch of the second and the third is; ``rows``: how many the bank has, and what share of the patches
scores a picture; ``borders``: rules from held-out scores to a border, beside the border that would
reject 5 % of the good test pictures. Maps of the net are computed once per set; the bank is the
product's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from engineworks.runtime import datasets, images
from engineworks.runtime.bank import Bank
from engineworks.runtime.borders import HeldOut, border
from engineworks.runtime.coreset import greedy_k_centre
from engineworks.runtime.metrics import AnomalyMetrics
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.systems.noising import target_mask
from engineworks.runtime.systems.noising.signals import anomaly_map, image_score
from engineworks.runtime.tensors import Array
from engineworks.training import backbones
from engineworks.training.config import BackboneConfig
from engineworks.training.systems.noising.model import (
    PatchFeatures,
    neighbourhood_mean,
    roots,
    side_by_side,
)

ROWS = (500, 1000, 2000, 4000)
DEFAULT_ROWS = 2000
SAMPLED = 50_000
TOPS = (0.0, 0.005, 0.01, 0.02, 0.03)  # 0: the highest patch alone
SMOOTHING = 4.0
FOLDS = 5
FEW = 8
STAGES = (1, 2, 3)


def _reflected(maps_BCHW: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(maps_BCHW, (1, 1, 1, 1), mode="reflect"), 3, 1)


def _unit(maps_BCHW: Tensor) -> Tensor:
    return maps_BCHW / (maps_BCHW.norm(dim=1, keepdim=True) + 1e-6)


def _square_root(maps_BCHW: Tensor) -> Tensor:
    return maps_BCHW.clamp_min(0).sqrt()


def _zeros(maps_BCHW: Tensor) -> Tensor:
    return neighbourhood_mean(maps_BCHW, zeros=True)


def _inside(maps_BCHW: Tensor) -> Tensor:
    return neighbourhood_mean(maps_BCHW, zeros=False)


Change = Callable[[Tensor], Tensor]
Variant = Callable[[Sequence[Tensor]], Tensor]


def _own(*changes: Change) -> Variant:
    """Each map by itself, then side by side."""

    def of(maps: Sequence[Tensor]) -> Tensor:
        for change in changes:
            maps = [change(m) for m in maps]
        return side_by_side(maps)

    return of


def _deeper(of: Variant) -> Variant:
    """Of all maps but the first."""
    return lambda maps: of(maps[1:])


def _layers(stages: Sequence[int], deep: float = 1.0) -> Variant:
    """These maps in patches of the second, as the product has them."""

    def of(maps: Sequence[Tensor]) -> Tensor:
        chosen = [maps[STAGES.index(s)] for s in stages]
        channels = [m.shape[1] for m in chosen]
        patches = list(stages).index(2)
        return PatchFeatures(nn.Identity(), channels, patches=patches, deep=deep).pooled(chosen)

    return of


LAYERS: dict[str, Variant] = {
    "2, 3": _layers((2, 3)),
    "2, 3 x 0.5": _layers((2, 3), 0.5),
    "2": _layers((2,)),
    "1, 2": _layers((1, 2)),
    "1, 2, 3": _layers((1, 2, 3)),
    "1, 2, 3 x 0.7": _layers((1, 2, 3), 0.7),
    "1, 2, 3 x 0.5": _layers((1, 2, 3), 0.5),
}
DEFAULT = LAYERS["1, 2, 3 x 0.7"]
VARIANTS: dict[str, Variant] = {
    "part inside, maps together": lambda maps: _inside(side_by_side(maps)),
    "zeros, maps together": lambda maps: _zeros(side_by_side(maps)),
    "part inside, each map": _own(_inside),
    "reflection, each map": _own(_reflected),
    "no mean": _own(),
    "zeros, each map": _own(_zeros),
    "zeros, unit length": _own(_zeros, _unit),
    "zeros, square roots": _own(_zeros, _square_root),
    "zeros, square roots of unit sum": _own(_zeros, _square_root, _unit),
    "zeros, roots": _own(_zeros, roots),
}


@dataclass(frozen=True)
class Data:
    """The net's maps of a set, and what is known of its test pictures."""

    name: str
    size: tuple[int, int]
    train: list[Tensor]
    test: list[Tensor]
    labels: Array
    masks: list[Array | None]

    def rows(self, variant: Variant) -> tuple[Array, Array, tuple[int, int]]:
        """Features of training and test pictures, (I, N, D), and their grid."""
        found = [variant(maps) for maps in (self.train, self.test)]
        h, w = found[0].shape[2:]
        train, test = (f.flatten(2).transpose(1, 2).contiguous().numpy() for f in found)
        return train, test, (h, w)


def load(root: Path, side: int, weights: Path) -> Data:
    spec = PreprocessSpec(size=(side, side), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    config = BackboneConfig(name="resnet18", stages=STAGES, weights=str(weights))
    net = backbones.create(config, seed=0, weights=True, size=spec.size).net.eval()

    def maps(samples: Sequence[datasets.MvtecSample]) -> list[Tensor]:
        batches = []
        for start in range(0, len(samples), 8):
            pictures = [images.read(s.path) for s in samples[start : start + 8]]
            with torch.no_grad():
                batches.append(net(torch.from_numpy(apply(spec, pictures))))
        return [torch.cat(stage) for stage in zip(*batches, strict=True)]

    test = datasets.mvtec(root, "test")
    return Data(
        name=root.name,
        size=spec.size,
        train=maps(datasets.mvtec(root, "train")),
        test=maps(test),
        labels=np.array([s.label for s in test]),
        masks=[target_mask(s, spec) for s in test],
    )


def coreset(train_IND: Array, rows: int, seed: int) -> Array:
    """As the product takes it: (M, D), in the order in which they were picked."""
    patches = train_IND.reshape(-1, train_IND.shape[-1])
    num = min(rows, len(patches) // 10)
    rng = np.random.default_rng(seed)
    if len(patches) > SAMPLED:
        patches = patches[np.sort(rng.choice(len(patches), SAMPLED, replace=False))]
    picks = greedy_k_centre(patches, num, first=int(rng.integers(len(patches))))
    return patches[picks.indices]


def distances(rows_MD: Array, features_IND: Array) -> Array:
    """Of each patch to its nearest row: (I, N)."""
    bank = Bank(rows_MD)
    return np.stack([bank.search(features_ND, 1)[0][:, 0] for features_ND in features_IND])


def scores(distances_IN: Array, top: float) -> Array:
    which = "top" if top else "patch"
    return np.array([image_score(which, d, top) for d in distances_IN])


def pixel_auroc(data: Data, distances_IN: Array, grid: tuple[int, int]) -> float:
    metrics = AnomalyMetrics()
    for d, label, mask in zip(distances_IN, data.labels, data.masks, strict=True):
        metrics.update(0.0, int(label), anomaly_map(d, grid, data.size, SMOOTHING), mask)
    return metrics.compute()["pixel_auroc"]


def mean(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} +- {spread:.4f}"


def features(sets: Sequence[Data], seeds: int) -> None:
    for variant, of in VARIANTS.items():
        for data in sets:
            train, test, grid = data.rows(_deeper(of))
            ring = np.ones(grid, bool)
            ring[1:-1, 1:-1] = False
            highest, top, pixel, outermost = [], [], [], []
            for seed in range(seeds):
                found = distances(coreset(train, DEFAULT_ROWS, seed), test)
                highest.append(roc_auc_score(data.labels, scores(found, 0.0)))
                top.append(roc_auc_score(data.labels, scores(found, 0.01)))
                pixel.append(pixel_auroc(data, found, grid))
                outermost.append(ring.ravel()[found[data.labels == 0].argmax(axis=1)].mean())
            print(
                f"{variant:32s} {data.name:14s} highest {mean(highest)}  top 1 % {mean(top)}  "
                f"pixel {mean(pixel)}  highest on the ring {np.mean(outermost):.2f}",
                flush=True,
            )


def layers(sets: Sequence[Data], seeds: int) -> None:
    for data in sets:
        for variant, of in LAYERS.items():
            train, test, grid = data.rows(of)
            every, pixel, few = [], [], []
            for seed in range(seeds):
                found = distances(coreset(train, DEFAULT_ROWS, seed), test)
                every.append(float(roc_auc_score(data.labels, scores(found, 0.01))))
                pixel.append(pixel_auroc(data, found, grid))
                eight = np.random.default_rng(seed).permutation(len(train))[:FEW]
                found = distances(coreset(train[np.sort(eight)], DEFAULT_ROWS, seed), test)
                few.append(float(roc_auc_score(data.labels, scores(found, 0.01))))
            print(
                f"{data.name:14s} {variant:14s} image {mean(every)}  pixel {mean(pixel)}  "
                f"image, {FEW} pictures {mean(few)}",
                flush=True,
            )


def rows(sets: Sequence[Data], seeds: int) -> None:
    for data in sets:
        train, test, _ = data.rows(DEFAULT)
        picked = [coreset(train, max(ROWS), seed) for seed in range(seeds)]
        for count in ROWS:
            found = [distances(bank[:count], test) for bank in picked]
            line = [
                mean([float(roc_auc_score(data.labels, scores(f, top))) for f in found])
                for top in TOPS
            ]
            print(f"{data.name:14s} rows {count:5d}  " + "  ".join(line), flush=True)


def borders(sets: Sequence[Data], seeds: int) -> None:
    rules: dict[str, Callable[[Array], float]] = {
        "highest": lambda held: float(held.max()),
        "99 % quantile": lambda held: float(np.quantile(held, 0.99)),
        "95 % quantile x 1.42": lambda held: 1.42 * float(np.quantile(held, 0.95)),
        "engineworks.runtime.borders, 1 %": lambda held: border(HeldOut.of(held), 0.01),
        "engineworks.runtime.borders, 1.5 %": lambda held: border(HeldOut.of(held), 0.015),
        "engineworks.runtime.borders, 2.5 %": lambda held: border(HeldOut.of(held), 0.025),
        "engineworks.runtime.borders, 5 %": lambda held: border(HeldOut.of(held), 0.05),
    }
    for data in sets:
        train, test, _ = data.rows(DEFAULT)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in rules}
        for seed in range(seeds):
            order = np.random.default_rng(seed).permutation(len(train))
            held = np.empty(len(train))
            for fold in np.array_split(order, FOLDS):
                others = np.delete(train, fold, axis=0)
                bank = coreset(others, DEFAULT_ROWS, seed)
                held[fold] = scores(distances(bank, train[fold]), 0.01)
            judged = scores(distances(coreset(train, DEFAULT_ROWS, seed), test), 0.01)
            good, bad = np.sort(judged[data.labels == 0])[::-1], judged[data.labels == 1]
            least = np.mean(bad <= good[int(0.05 * len(good))])
            for name, rule in rules.items():
                at = rule(held)
                found[name].append((np.mean(good >= at), np.mean(bad < at) - least))
        for name, pairs in found.items():
            rejects, misses = np.mean(pairs, axis=0)
            print(
                f"{data.name:14s} {name:24s} false rejects {100 * rejects:5.1f} %, "
                f"misses {100 * misses:+6.1f} points from those of 5 % false rejects",
                flush=True,
            )


@click.command()
@click.argument("table", type=click.Choice(["layers", "features", "rows", "borders"]))
@click.option("--weights", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--set", "sets", multiple=True, required=True, metavar="DIR:SIZE")
@click.option("--seeds", default=3)
def main(table: str, weights: Path, sets: tuple[str, ...], seeds: int) -> None:
    loaded = []
    for one in sets:
        folder, _, side = one.rpartition(":")
        loaded.append(load(Path(folder), int(side), weights))
    tables = {"layers": layers, "features": features, "rows": rows, "borders": borders}
    tables[table](loaded, seeds)


if __name__ == "__main__":
    main()
