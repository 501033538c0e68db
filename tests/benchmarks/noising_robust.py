r"""``noising`` with few normal pictures, with contaminated ones, and in another light: image AUROC.

    python -m tests.benchmarks.noising_robust PART --data DIR --weights FILE \
        [--seeds 3] [--set key=value ...]

PART: ``few``: 8 normal pictures against all, with and without turned copies. ``contaminated``: a
fifth of the defective test pictures lies among the normal ones; the rest is judged, with and
without ``fit.clean``. ``light``: test pictures darker and brighter, with and without copies of that
kind. One line of JSON per arm and seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from engineworks.runtime import datasets, images
from engineworks.runtime.curves import of_scores
from engineworks.runtime.datasets import MvtecSample
from engineworks.runtime.preprocess import apply
from engineworks.runtime.systems.noising.fit import Fitted, fit
from engineworks.runtime.systems.noising.signals import image_score
from engineworks.runtime.tensors import Array
from engineworks.training.config import load_config
from engineworks.training.systems.noising.config import CopiesConfig, TaskConfig
from engineworks.training.systems.noising.data import Images
from engineworks.training.systems.noising.model import PatchFeatures
from engineworks.training.systems.noising.task import build_model

FEW = 8
SHARE = 0.2
LIGHTS = (0.7, 1.3)
BATCH = 8


class Bench:
    """A feature net, and data to fit and judge banks with."""

    def __init__(self, data: Path, config: TaskConfig) -> None:
        model, _ = build_model(config)
        assert isinstance(model, PatchFeatures)
        self.config, self.net = config, model
        self.grid = model.grid(*config.preprocess.size)
        self.normal = datasets.mvtec(data, "train")
        self.labelled = datasets.mvtec(data, "test")
        self.labels = np.array([sample.label for sample in self.labelled], bool)

    def features(self, batches: Iterator[Array]) -> Array:
        """(I, N, D) float32 of prepared batches."""
        with torch.inference_mode():
            return np.concatenate([self.net(torch.from_numpy(b)).numpy() for b in batches])

    def of_pictures(self, samples: Sequence[MvtecSample], light: float = 1.0) -> Array:
        """Features of pictures, all of their values times ``light``."""

        def batches() -> Iterator[Array]:
            for start in range(0, len(samples), BATCH):
                pictures = [images.read(s.path) for s in samples[start : start + BATCH]]
                lit = [np.rint(np.clip(p * np.float32(light), 0, 255)) for p in pictures]
                yield apply(self.config.preprocess, [p.astype(np.uint8) for p in lit])

        return self.features(batches())

    def with_copies(self, samples: Sequence[MvtecSample], copies: CopiesConfig, seed: int) -> Any:
        """Features of pictures and of their changed copies, and which picture each shows."""
        source = Images(samples, self.config.preprocess, copies)

        def batches() -> Iterator[Array]:
            for start in range(0, len(source), BATCH):
                part = range(start, min(start + BATCH, len(source)))
                got = [source.get(i, np.random.default_rng((seed, 0, i)))["images"] for i in part]
                yield np.stack([np.asarray(image) for image in got])

        return self.features(batches()), source.pictures_I

    def fit(self, features_IND: Array, seed: int, pictures_I: Any = None, **changed: Any) -> Fitted:
        config = self.config.fit.model_copy(update=changed)
        size = self.config.preprocess.size
        return fit(features_IND, self.grid, size, config, seed=seed, pictures_I=pictures_I)

    def scores(self, fitted: Fitted, features_IND: Array) -> Array:
        """(I,) image scores."""
        params, found = fitted.params, []
        for features_ND in features_IND:
            nearest = fitted.bank.search(features_ND, params.neighbours)
            scores_N, _ = params.judge(fitted.bank, features_ND, *nearest)
            found.append(image_score(params.image_score, scores_N, params.top))
        return np.array(found)


def auroc(scores: Array, labels: Array) -> float:
    return of_scores(scores[labels], scores[~labels]).ranking("image")["image_auroc"]


def say(**line: Any) -> None:
    click.echo(json.dumps(line))


def few(bench: Bench, seeds: int) -> None:
    """8 normal pictures against all."""
    test = bench.of_pictures(bench.labelled)
    arms = {"none": None, "rotation 10": (10.0, 4), "rotation 180": (180.0, 8)}
    for seed in range(seeds):
        chosen = np.random.default_rng(seed).permutation(len(bench.normal))[:FEW]
        pictures = [bench.normal[i] for i in np.sort(chosen)]
        for name, arm in arms.items():
            copies = arm and CopiesConfig(rotation=arm[0], num=arm[1])
            features, shown = (
                bench.with_copies(pictures, copies, seed)
                if copies
                else (bench.of_pictures(pictures), None)
            )
            fitted = bench.fit(features, seed, shown)
            scores = bench.scores(fitted, test)
            rejected = scores >= fitted.thresholds["image"].value
            say(
                pictures=FEW,
                copies=name,
                seed=seed,
                image_auroc=auroc(scores, bench.labels),
                false_rejects=float(rejected[~bench.labels].mean()),
                misses=float((~rejected[bench.labels]).mean()),
            )
    scores = bench.scores(bench.fit(bench.of_pictures(bench.normal), 0), test)
    say(pictures=len(bench.normal), seed=0, image_auroc=auroc(scores, bench.labels))


def contaminated(bench: Bench, seeds: int) -> None:
    """A fifth of the defective pictures among the normal ones."""
    normal, test = bench.of_pictures(bench.normal), bench.of_pictures(bench.labelled)
    clean_scores = bench.scores(bench.fit(normal, 0), test)
    defective = np.flatnonzero(bench.labels)
    for seed in range(seeds):
        mixed = np.random.default_rng(seed).permutation(defective)[: round(SHARE * len(defective))]
        rest = np.setdiff1d(np.arange(len(test)), mixed)
        features = np.concatenate([normal, test[mixed]])
        fitted = bench.fit(features, seed, clean=len(mixed) / len(features))
        labels = bench.labels[rest]
        left_out = sum(picture >= len(normal) for picture in fitted.left_out)
        say(
            seed=seed,
            mixed=len(mixed),
            of_them_left_out=left_out,
            clean_training=auroc(clean_scores[rest], labels),
            cleaned=auroc(bench.scores(fitted, test[rest]), labels),
        )


def light(bench: Bench, seeds: int) -> None:
    """Test pictures in another light."""
    tests = {value: bench.of_pictures(bench.labelled, value) for value in (1.0, *LIGHTS)}
    copies = CopiesConfig(brightness=0.3)
    for seed in range(seeds):
        for name in ("none", "brightness"):
            features, shown = (
                bench.with_copies(bench.normal, copies, seed)
                if name == "brightness"
                else (bench.of_pictures(bench.normal), None)
            )
            fitted = bench.fit(features, seed, shown)
            for value, test in tests.items():
                scores = bench.scores(fitted, test)
                rejected = scores >= fitted.thresholds["image"].value
                say(
                    copies=name,
                    light=value,
                    seed=seed,
                    image_auroc=auroc(scores, bench.labels),
                    false_rejects=float(rejected[~bench.labels].mean()),
                )


PARTS = {"few": few, "contaminated": contaminated, "light": light}


@click.command()
@click.argument("part", type=click.Choice(list(PARTS)))
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--weights", required=True)
@click.option("--seeds", default=3)
@click.option("--set", "settings", multiple=True)
def main(part: str, data: Path, weights: str, seeds: int, settings: tuple[str, ...]) -> None:
    config = load_config("noising", None, [f"backbone.weights={weights}", *settings])
    assert isinstance(config, TaskConfig)
    PARTS[part](Bench(data, config), seeds)


if __name__ == "__main__":
    main()
