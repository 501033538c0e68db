"""Normal images -> memory bank, statistics, thresholds; and what each signal earns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from runtime.bank import Bank
from runtime.bundle import Threshold
from runtime.coreset import Progress, greedy_k_centre, projection
from runtime.errors import InputError
from runtime.metrics import AnomalyMetrics, false_reject_threshold
from runtime.systems.noising.params import DiscriminatorParams, Params
from runtime.systems.noising.signals import (
    SIGNALS,
    Part,
    Statistics,
    anomaly_map,
    combine,
    patch_signals,
)
from runtime.tensors import Array


class FitConfig(Part):
    """How the bank and its statistics are made from the features of normal images.

    Attributes:
        k: neighbours of a patch (published: 9).
        coreset_ratio: share of all patches kept in the bank (published: 0.01).
        max_rows: the bank never has more rows than this.
        projection: width of a random projection in which the coreset is searched; None searches in
            the features themselves (exact).
        max_patches: a coreset is taken of at most so many patches at once; more images are reduced
            group by group and their coresets again.
        noise_range: (lo, hi) of the proposed noise's standard deviation (published: 0.01, 0.5).
        distance_weight: w of the noise proposal (published: 1).
        weights: share of each standardised signal in the patch score.
        smoothing: sigma in pixels of the Gaussian over the anomaly map (published: 4).
        folds: statistics and thresholds come from images scored by banks without them; a bank does
            without one part in so many.
        statistics_images: so many images are scored for statistics and thresholds; the fewer of
            all images they are, the fewer banks are needed.
        false_reject: share of normal images that the thresholds may reject.
    """

    k: int = Field(default=9, ge=1)
    coreset_ratio: float = Field(default=0.1, gt=0, le=1)
    max_rows: int = Field(default=6000, ge=1)
    projection: int | None = Field(default=None, ge=8)
    max_patches: int = Field(default=1_000_000, ge=1024)
    noise_range: tuple[float, float] = (0.01, 0.5)
    distance_weight: float = 1.0
    weights: dict[str, float] = Field(
        default={"distance": 1.0, "influence": 1.0, "concentration": 0.0, "response": 0.0}
    )
    smoothing: float = Field(default=4.0, ge=0)
    folds: int = Field(default=5, ge=2)
    statistics_images: int = Field(default=64, ge=2)
    false_reject: float = Field(default=0.01, ge=0, lt=1)

    @field_validator("weights")
    @classmethod
    def _known_signals(cls, weights: dict[str, float]) -> dict[str, float]:
        if set(weights) != set(SIGNALS):
            raise ValueError(f"weights must name exactly {', '.join(SIGNALS)}")
        if not any(weights.values()):
            raise ValueError("at least one signal needs a weight")
        return weights


@dataclass(frozen=True)
class Fitted:
    """A bank with everything that turns its distances into scores."""

    bank: Bank
    params: Params
    thresholds: dict[str, Threshold]
    report: dict[str, Any]


def fit(
    features_IND: Array,
    grid: tuple[int, int],
    image_size: tuple[int, int],
    config: FitConfig,
    *,
    seed: int,
    progress: Progress | None = None,
) -> Fitted:
    """Bank, statistics and thresholds from the features of normal images.

    Args:
        features_IND: (I, N, D) float32, N = h * w patches of each image; may be memory-mapped.
        grid: (h, w).
        image_size: (height, width) of the network input, the size of the anomaly maps.
        seed: of the first coreset row, the projection and the choice of images for statistics.
        progress: called with (rows picked, rows wanted).

    Raises:
        InputError: fewer than two images, or features that do not fit the grid.
        BankError: features that are not finite.
    """
    num_images, num_patches, width = features_IND.shape
    _check_count(num_images)
    if num_patches != grid[0] * grid[1]:
        raise InputError(f"{num_patches} patches do not fit a grid of {grid}")
    rng = np.random.default_rng(seed)
    space = None if config.projection is None else projection(width, config.projection, seed)

    def coreset(images: Array) -> tuple[Bank, float]:
        rows_MD, radius = _coreset(features_IND, images, config, rng, space, progress)
        return Bank(rows_MD), radius

    everyone = np.arange(num_images)
    bank, radius = coreset(everyone)
    folds = [
        (images, coreset(np.setdiff1d(everyone, images))[0])
        for images in _folds(num_images, config, rng)
    ]
    # few or equal patches leave fewer rows: what every bank can answer is the system's K
    k = min(config.k, len(bank), *(len(others) for _, others in folds))
    found = [
        (others, features_IND[i], *others.search(features_IND[i], k))
        for images, others in folds
        for i in images
    ]
    mean_distance = _statistics(np.stack([d.mean(axis=1) for _, _, d, _ in found]))
    per_image = [
        patch_signals(
            others,
            features_ND,
            distances,
            indices,
            names=SIGNALS,
            mean_distance=mean_distance,
            noise_range=config.noise_range,
            distance_weight=config.distance_weight,
        )
        for others, features_ND, distances, indices in found
    ]
    statistics = {name: _statistics(np.stack([s[name] for s in per_image])) for name in SIGNALS}
    scores = np.stack([combine(s, statistics, config.weights) for s in per_image])
    score_std = max(float(scores.std()), 1e-12)
    params = Params(
        grid=grid,
        k=k,
        noise_range=config.noise_range,
        distance_weight=config.distance_weight,
        weights=dict(config.weights),
        smoothing=config.smoothing,
        mean_distance=mean_distance,
        signals=statistics,
        score_std=score_std,
    )
    thresholds = _thresholds(scores / score_std, grid, image_size, config)
    report = {
        "num_images": num_images,
        "num_patches": num_images * num_patches,
        "bank_rows": len(bank),
        "covering_radius": radius,
        "k": k,
    }
    return Fitted(bank=bank, params=params, thresholds=thresholds, report=report)


def hold_out(num_images: int, config: FitConfig, *, seed: int) -> tuple[Array, Array]:
    """Sorted indices of the images that a discriminator learns from, and of those it never sees.

    Raises:
        InputError: fewer than two images.
    """
    _check_count(num_images)
    held_out = _folds(num_images, config, np.random.default_rng(seed))[0]
    return np.setdiff1d(np.arange(num_images), held_out), held_out


def calibrate(
    scores_IN: Array, grid: tuple[int, int], image_size: tuple[int, int], config: FitConfig
) -> tuple[DiscriminatorParams, dict[str, Threshold]]:
    """Unit and thresholds of a discriminator from its scores of held-out normal images.

    Args:
        scores_IN: (I, N) float32, N = h * w patches of each image.
        grid: (h, w).
        image_size: (height, width) of the anomaly maps.
    """
    params = DiscriminatorParams(
        grid=grid, smoothing=config.smoothing, scores=_statistics(scores_IN)
    )
    standardised = np.stack([params.standardise(scores_N) for scores_N in scores_IN])
    return params, _thresholds(standardised, grid, image_size, config)


def _thresholds(
    scores_IN: Array, grid: tuple[int, int], image_size: tuple[int, int], config: FitConfig
) -> dict[str, Threshold]:
    """What at most the budget's share of held-out images reaches: by patch and by pixel."""
    maps = [anomaly_map(scores_N, grid, image_size, config.smoothing) for scores_N in scores_IN]
    source = (
        f"false-reject budget {config.false_reject} on {len(scores_IN)} held-out training images"
    )
    return {
        "image": Threshold(
            value=false_reject_threshold(scores_IN.max(axis=1), config.false_reject),
            source=source,
        ),
        "pixel": Threshold(
            value=false_reject_threshold(np.array([m.max() for m in maps]), config.false_reject),
            source=source + ", highest pixel of each",
        ),
    }


def _check_count(num_images: int) -> None:
    if num_images < 2:
        raise InputError(
            f"noising needs at least two normal images, got {num_images}",
            fix="its statistics score each image against the others: add images",
        )


def _folds(num_images: int, config: FitConfig, rng: np.random.Generator) -> list[Array]:
    """Disjoint sets of images, each to be scored with a bank of all others; sorted indices.

    The coreset of all, without the rows of an image, would not do: those rows stood for patches of
    others, too, and where they stood alone the image would find nothing near.
    """
    count = min(config.statistics_images, num_images)
    largest = -(-num_images // config.folds)
    held_out = rng.permutation(num_images)[:count]
    return [np.sort(part) for part in np.array_split(held_out, -(-count // largest))]


def _coreset(
    features_IND: Array,
    images: Array,
    config: FitConfig,
    rng: np.random.Generator,
    space: Array | None,
    progress: Progress | None,
) -> tuple[Array, float]:
    """The rows of a bank of some images, (M, D), and their covering radius.

    Args:
        images: sorted indices.
        space: projection in which the rows are chosen.
    """
    num_patches, width = features_IND.shape[1:]
    num = max(1, min(config.max_rows, int(len(images) * num_patches * config.coreset_ratio)))

    def reduce(rows_ND: Array) -> tuple[Array, float]:
        first = int(rng.integers(len(rows_ND)))
        searched = rows_ND if space is None else rows_ND @ space
        picks = greedy_k_centre(searched, num, first=first, progress=progress)
        return rows_ND[picks.indices], picks.radius

    def patches(part: Array) -> Array:
        # a range stays in its file; others are copied
        whole = part[-1] - part[0] == len(part) - 1
        chosen = features_IND[part[0] : part[-1] + 1] if whole else features_IND[part]
        return chosen.reshape(-1, width)

    size = max(1, config.max_patches // num_patches)
    parts = [images[i : i + size] for i in range(0, len(images), size)]
    kept, radii = zip(*(reduce(patches(part)) for part in parts), strict=True)
    if len(parts) == 1:
        return kept[0], radii[0]
    rows_MD, radius = reduce(np.concatenate(kept))
    # a patch is within its group's radius of a candidate, and that one within `radius` of the bank
    return rows_MD, radius + max(radii)


def _statistics(values: Array) -> Statistics:
    return Statistics(
        mean=float(values.mean(dtype=np.float64)),
        # features that never vary (a blank training set) leave nothing to standardise
        std=max(float(values.std(dtype=np.float64)), 1e-12),
    )


def ablation(
    bank: Bank,
    params: Params,
    image_size: tuple[int, int],
    labelled: Iterable[tuple[Array, int, Array | None]],
) -> dict[str, AnomalyMetrics]:
    """What each signal earns: the task's metrics for the distance alone and with each addition.

    Args:
        labelled: (features (N, D), label 0 or 1, mask (height, width) bool or None) per image.

    Returns:
        name of the combination -> its metrics; ``shipped`` is the bundle's own weights.
    """
    alone = dict.fromkeys(SIGNALS, 0.0)
    combinations = {
        "distance": alone | {"distance": 1.0},
        **{
            f"distance + {name}": alone | {"distance": 1.0, name: 1.0}
            for name in SIGNALS
            if name != "distance"
        },
        "all equal": dict.fromkeys(SIGNALS, 1.0),
        "shipped": params.weights,
    }
    metrics = {name: AnomalyMetrics() for name in combinations}
    for features_ND, label, mask in labelled:
        distances, indices = bank.search(features_ND, params.k)
        signals = patch_signals(
            bank,
            features_ND,
            distances,
            indices,
            names=SIGNALS,
            mean_distance=params.mean_distance,
            noise_range=params.noise_range,
            distance_weight=params.distance_weight,
        )
        for name, weights in combinations.items():
            scores = combine(signals, params.signals, weights) / np.float32(params.score_std)
            scored = anomaly_map(scores, params.grid, image_size, params.smoothing)
            metrics[name].update(float(scores.max()), label, scored, mask)
    return metrics
