"""Normal images -> memory bank, statistics, thresholds; and what each signal earns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from pydantic import Field, field_validator, model_validator

from engineworks.runtime.bank import Bank
from engineworks.runtime.borders import HeldOut, border
from engineworks.runtime.bundle import Threshold
from engineworks.runtime.coreset import greedy_k_centre, projection
from engineworks.runtime.errors import InputError
from engineworks.runtime.evaluation import Rate
from engineworks.runtime.metrics import false_reject_threshold
from engineworks.runtime.systems.noising.foreground import Foreground
from engineworks.runtime.systems.noising.layers import LayerBank, Layers, window_rows
from engineworks.runtime.systems.noising.params import DiscriminatorParams, Params
from engineworks.runtime.systems.noising.signals import (
    SIGNALS,
    ImageScore,
    Part,
    Statistics,
    anomaly_map,
    combine,
    image_score,
    patch_signals,
)
from engineworks.runtime.tensors import Array

# (what is being done, so many done, of so many)
Progress: TypeAlias = Callable[[str, int, int], None]


class FitConfig(Part):
    """How the bank and its statistics are made from the features of normal images.

    Attributes:
        k: neighbours of a patch for all signals but the distance (published: 9).
        coreset_ratio: share of all patches kept in the bank (published: 0.01).
        max_rows: the bank never has more rows than this.
        projection: width of a random projection in which the coreset is searched; None searches in
            the features themselves (exact).
        sampled: the rows are chosen among so many patches, drawn at random; None: among all. A
            coreset takes what is far from everything: of all patches, it takes every odd one.
        max_patches: a coreset is taken of at most so many patches at once; more images are reduced
            group by group and their coresets again.
        noise_range: (lo, hi) of the proposed noise's standard deviation (published: 0.01, 0.5).
        distance_weight: w of the noise proposal (published: 1).
        weights: share of each standardised signal in the patch score.
        smoothing: sigma in pixels of the Gaussian over the anomaly map (published: 4).
        image_score: ``top``: the mean of the highest patches; ``patch``: the highest alone.
        top: share of the patches that counts as the highest.
        folds: every picture is scored by the bank of all parts but its own, of so many.
        statistics_images: of so many of them the statistics of the signals are taken.
        rule: of the borders, from the scores of all pictures by banks without them: ``quantile``,
            see ``runtime.borders``; ``rank``: what at most the budget's share of them reaches.
        false_reject: the budget: share of normal pictures that the borders may reject.
        layers: one bank per layer, searched by cosines, and the mean of what they say (RAD, arXiv
            2601.22763); the distance alone counts then.
        window: of these, only rows of patches at most so many rows and columns away are searched;
            needs as many rows as there are patches. None: all rows.
        foreground: patches of the ground that parts lie on count as normal; for parts that leave
            the border of the picture free, see ``foreground``.
        clean: share of the pictures taken as contamination: those that stand out most are left out
            of bank and borders.
    """

    k: int = Field(default=9, ge=1)
    coreset_ratio: float = Field(default=0.1, gt=0, le=1)
    max_rows: int = Field(default=2000, ge=1)
    projection: int | None = Field(default=None, ge=8)
    sampled: int | None = Field(default=50_000, ge=1024)
    max_patches: int = Field(default=1_000_000, ge=1024)
    noise_range: tuple[float, float] = (0.01, 0.5)
    distance_weight: float = 1.0
    weights: dict[str, float] = Field(
        default={"distance": 1.0, "influence": 0.0, "concentration": 0.0, "response": 0.0}
    )
    smoothing: float = Field(default=4.0, ge=0)
    image_score: ImageScore = "top"
    top: float = Field(default=0.01, gt=0, le=1)
    folds: int = Field(default=5, ge=2)
    statistics_images: int = Field(default=64, ge=2)
    rule: Literal["quantile", "rank"] = "quantile"
    false_reject: float = Field(default=0.015, ge=0, lt=1)
    clean: float = Field(default=0.0, ge=0, lt=0.5)
    layers: bool = False
    window: int | None = Field(default=None, ge=0)
    foreground: bool = False

    @field_validator("weights")
    @classmethod
    def _known_signals(cls, weights: dict[str, float]) -> dict[str, float]:
        if set(weights) != set(SIGNALS):
            raise ValueError(f"weights must name exactly {', '.join(SIGNALS)}")
        if not any(weights.values()):
            raise ValueError("at least one signal needs a weight")
        return weights

    @model_validator(mode="after")
    def _has_a_budget(self) -> Self:
        if self.rule == "quantile" and not self.false_reject:
            raise ValueError("rule=quantile needs a false_reject above 0; rule=rank does not")
        return self

    @model_validator(mode="after")
    def _fits_layers(self) -> Self:
        if self.window is not None and not self.layers:
            raise ValueError("a window is for one bank per layer: set layers to true")
        if self.layers and any(self.weights[name] for name in SIGNALS if name != "distance"):
            raise ValueError("with one bank per layer only the distance may have a weight")
        return self


@dataclass(frozen=True)
class Fitted:
    """A bank with everything that turns its distances into scores.

    Attributes:
        outstanding: pictures whose score by a bank without them reaches the border, with that
            score, highest first.
        left_out: the same of pictures taken as contamination (``FitConfig.clean``).
        foreground: what tells part from ground, where that was asked for.
    """

    bank: Bank
    params: Params
    thresholds: dict[str, Threshold]
    report: dict[str, Any]
    outstanding: dict[int, float]
    left_out: dict[int, float]
    foreground: Foreground | None = None


def fit(
    features_IND: Array,
    grid: tuple[int, int],
    image_size: tuple[int, int],
    config: FitConfig,
    *,
    seed: int,
    widths: Sequence[int] = (),
    pictures_I: Array | None = None,
    copies_I: Array | None = None,
    progress: Progress | None = None,
) -> Fitted:
    """Bank, statistics and thresholds from the features of normal pictures.

    Args:
        features_IND: (I, N, D) float32, N = h * w patches of each image; may be memory-mapped.
        grid: (h, w).
        image_size: (height, width) of the network input, the size of the anomaly maps.
        seed: of the first coreset row, the projection, the folds and the choice of pictures for
            statistics.
        widths: of the layers in a row of features, for ``FitConfig.layers``.
        pictures_I: (I,) 0, 1, ... in ascending order: which picture each image shows, whole or a
            tile of it. A picture's score is the highest of its images'. None: each image is one.
        copies_I: (I,) bool: which images are of changed copies; they join the bank and are not
            scored. None: none is.
        progress: called with (what, done, of) for rows of each bank and for the pictures held out.

    Raises:
        InputError: no images, or features that do not fit the grid.
        BankError: features that are not finite.
    """
    num_images, num_patches, _ = features_IND.shape
    if num_images == 0:
        raise InputError("noising needs normal images, got none", fix="add normal pictures")
    if num_patches != grid[0] * grid[1]:
        raise InputError(f"{num_patches} patches do not fit a grid of {grid}")
    pictures_I = np.arange(num_images) if pictures_I is None else np.asarray(pictures_I)
    layers = Layers(widths=tuple(widths), window=config.window) if config.layers else None
    shown = _Shown(pictures_I, np.zeros(num_images, bool) if copies_I is None else copies_I)
    report_to = progress or (lambda what, done, of: None)
    fitting = _Fitting(features_IND, shown, grid, image_size, config, layers, seed, report_to)
    pictures = np.unique(pictures_I)
    judged = fitting.hold_out(pictures)
    ranked = _ranked(pictures, judged.scores_P2[:, 0])
    left_out = dict(list(ranked.items())[: round(config.clean * len(pictures))])
    if left_out:
        pictures = np.setdiff1d(pictures, list(left_out))
        judged = fitting.hold_out(pictures)
        ranked = _ranked(pictures, judged.scores_P2[:, 0])
    bank, radius = fitting.bank(pictures)
    # few or equal patches leave fewer rows: what every bank can answer is the system's K
    params = judged.params.model_copy(update={"k": min(judged.params.k, len(bank))})
    thresholds = _thresholds(judged.scores_P2, config)
    image = thresholds["image"].value
    outstanding = {picture: score for picture, score in ranked.items() if score >= image}
    above = Rate.counted(len(outstanding), len(pictures))
    report = {
        "num_images": len(pictures),
        "num_patches": len(shown.all_of(pictures)) * num_patches,
        "bank_rows": len(bank),
        "covering_radius": radius,
        "k": params.k,
        "held_out_above_border": str(above),
        "border": f"rests on {len(pictures)} picture{'s' * (len(pictures) > 1)}: of good parts up "
        f"to {above.high:.0%} may lie above it",
    }
    return Fitted(
        bank=bank,
        params=params,
        thresholds=thresholds,
        report=report,
        outstanding=outstanding,
        left_out=left_out,
        foreground=fitting.foreground,
    )


def _ranked(pictures: Array, scores_P: Array) -> dict[int, float]:
    """Pictures and their scores, the highest first."""
    order = np.argsort(-scores_P, kind="stable")
    return dict(zip(pictures[order].tolist(), scores_P[order].tolist(), strict=True))


@dataclass(frozen=True)
class _Shown:
    """What the images show: see ``fit``."""

    pictures_I: Array
    copies_I: Array

    def all_of(self, pictures: Array) -> Array:
        """The images of some pictures, copies included."""
        return np.flatnonzero(np.isin(self.pictures_I, pictures))

    def as_they_are(self, pictures: Array) -> Array:
        """The images of some pictures without those of copies."""
        return np.flatnonzero(np.isin(self.pictures_I, pictures) & ~self.copies_I)


@dataclass(frozen=True)
class _Judged:
    """What banks without a picture say of each: score and highest pixel, and the units of both."""

    params: Params
    scores_P2: Array


@dataclass(frozen=True)
class _Fold:
    """A bank, the images of some features (I, N, D) that it does not know, and their pictures."""

    bank: Bank
    features_IND: Array
    images: Array
    pictures: Array


class _Fitting:
    """The features of all images, and banks of some of the pictures."""

    def __init__(
        self,
        features_IND: Array,
        shown: _Shown,
        grid: tuple[int, int],
        image_size: tuple[int, int],
        config: FitConfig,
        layers: Layers | None,
        seed: int,
        progress: Progress,
    ) -> None:
        self.features_IND = features_IND
        self.shown = shown
        self.grid = grid
        self.image_size = image_size
        self.config = config
        self.layers = layers
        self.rng = np.random.default_rng(seed)
        width = features_IND.shape[2]
        target = config.projection or width
        self.space = projection(width, target, seed) if target < width else None
        self.progress = progress
        self.foreground: Foreground | None = None
        if config.foreground:
            self.foreground = Foreground.learn(features_IND, grid, self.rng)

    def bank(self, pictures: Array) -> tuple[Bank, float]:
        """The bank of some pictures and their copies, and its covering radius."""
        return self._bank_of_images(self.shown.all_of(pictures))

    def _bank_of_images(self, images: Array) -> tuple[Bank, float]:
        config = self.config
        if config.window is None:
            rows_MD, radius = _coreset(
                self.features_IND, images, config, self.rng, self.space, self.progress
            )
        else:
            num = _num_rows(config, len(images) * self.features_IND.shape[1])
            rows_MD, radius = window_rows(self.features_IND, images, num, self.rng)
        return self._searched(rows_MD, self.grid), radius

    def _searched(self, rows_MD: Array, grid: tuple[int, int]) -> Bank:
        return Bank(rows_MD) if self.layers is None else LayerBank(rows_MD, self.layers, grid)

    def hold_out(self, pictures: Array) -> _Judged:
        """Score each picture with the bank of the other folds.

        A bank of all without the rows of a picture would not do: those rows stood for patches of
        others, too, and where they stood alone the picture would find nothing near.
        """
        config = self.config
        grid, size = self.grid, self.image_size
        parts = self._parted(pictures)
        if len(pictures) > 1:
            folds = [self._fold(pictures, part) for part in parts]
        elif len(tiles := self.shown.as_they_are(pictures)) > 1:
            folds = self._of_tiles(tiles)
        else:
            grid, size, folds = self._quarters(int(tiles[0]))
        k = min(config.k, *(len(fold.bank) for fold in folds))
        params = self._statistics(folds, k, grid)
        scores_P2 = np.full((len(pictures), 2), -np.inf, np.float32)
        done, total = 0, sum(len(fold.images) for fold in folds)
        for fold in folds:
            for i, picture in zip(fold.images, fold.pictures, strict=True):
                features_ND = fold.features_IND[i]
                found = fold.bank.search(features_ND, params.neighbours)
                scores_N, _ = params.judge(fold.bank, features_ND, *found)
                if self.foreground is not None:
                    scores_N = self.foreground.judge(scores_N, features_ND, grid)
                highest = np.array(_highest(params, scores_N, grid, size), np.float32)
                at = np.searchsorted(pictures, picture)
                scores_P2[at] = np.maximum(scores_P2[at], highest)
                done += 1
                self.progress("held-out images", done, total)
        return _Judged(params, scores_P2)

    def _fold(self, pictures: Array, part: Array) -> _Fold:
        """The bank of all pictures but a part, and the images of that part as they are."""
        bank, _ = self.bank(np.setdiff1d(pictures, part))
        images = self.shown.as_they_are(part)
        return _Fold(bank, self.features_IND, images, self.shown.pictures_I[images])

    def _of_tiles(self, tiles: Array) -> list[_Fold]:
        """One picture alone, of several tiles: they stand for pictures.

        What neighbours share is known to some of the banks; it is a strip along their borders.
        """
        folds = []
        for part in self._parted(tiles):
            bank, _ = self._bank_of_images(np.setdiff1d(tiles, part))
            folds.append(_Fold(bank, self.features_IND, part, self.shown.pictures_I[part]))
        return folds

    def _parted(self, things: Array) -> list[Array]:
        """Random parts of about equal size, each ascending; at most one per thing."""
        order = self.rng.permutation(len(things))
        parts = np.array_split(order, min(self.config.folds, len(things)))
        return [things[np.sort(part)] for part in parts]

    def _quarters(self, image: int) -> tuple[tuple[int, int], tuple[int, int], list[_Fold]]:
        """One image alone: its quarters stand for pictures. Grid and image size of a quarter."""
        rows, columns = (side // 2 for side in self.grid)
        height, width = (side // 2 for side in self.image_size)
        whole_hwD = self.features_IND[image].reshape(*self.grid, -1)
        if not rows or not columns:
            raise InputError(
                f"one picture of {self.grid[0]} x {self.grid[1]} patches says nothing of others",
                fix="add normal pictures, or take a larger preprocess.size",
            )
        quarters = [
            whole_hwD[y : y + rows, x : x + columns].reshape(rows * columns, -1)
            for y in (0, self.grid[0] - rows)
            for x in (0, self.grid[1] - columns)
        ]
        folds = []
        for i in range(len(quarters)):
            # place by place, as a window wants them
            others_PD = np.stack(quarters[:i] + quarters[i + 1 :], axis=1)
            rows_MD = others_PD.reshape(-1, others_PD.shape[-1])
            bank = self._searched(rows_MD, (rows, columns))
            picture = self.shown.pictures_I[[image]]
            folds.append(_Fold(bank, np.stack(quarters), np.array([i]), picture))
        return (rows, columns), (height, width), folds

    def _statistics(self, folds: Sequence[_Fold], k: int, grid: tuple[int, int]) -> Params:
        """Mean and spread of each signal over the patches of some held-out images."""
        config = self.config
        known = [(fold.bank, fold.features_IND[i]) for fold in folds for i in fold.images]
        chosen = np.sort(self.rng.permutation(len(known))[: config.statistics_images])
        found = [(*known[i], *known[i][0].search(known[i][1], k)) for i in chosen]
        mean_distance = _statistics(np.stack([d.mean(axis=1) for _, _, d, _ in found]))
        names = SIGNALS if self.layers is None else SIGNALS[:1]
        per_image = [
            patch_signals(
                bank,
                features_ND,
                distances,
                indices,
                names=names,
                mean_distance=mean_distance,
                noise_range=config.noise_range,
                distance_weight=config.distance_weight,
            )
            for bank, features_ND, distances, indices in found
        ]
        statistics = {name: _statistics(np.stack([s[name] for s in per_image])) for name in names}
        scores = np.stack([combine(s, statistics, config.weights) for s in per_image])
        return Params(
            grid=self.grid,
            k=k,
            noise_range=config.noise_range,
            distance_weight=config.distance_weight,
            weights=dict(config.weights),
            smoothing=config.smoothing,
            image_score=config.image_score,
            top=config.top,
            mean_distance=mean_distance,
            signals={name: statistics.get(name, Statistics(mean=0, std=1)) for name in SIGNALS},
            score_std=max(float(scores.std()), 1e-12),
            layers=self.layers,
            foreground=None if self.foreground is None else self.foreground.border,
        )


def hold_out(num_images: int, config: FitConfig, *, seed: int) -> tuple[Array, Array]:
    """Sorted indices of the images that a discriminator learns from, and of those it never sees.

    Raises:
        InputError: fewer than two images.
    """
    if num_images < 2:
        raise InputError(
            f"a discriminator needs at least two normal images, got {num_images}",
            fix="one part of them is held out for its borders: add images, or take judge=bank",
        )
    order = np.random.default_rng(seed).permutation(num_images)
    held_out = np.sort(np.array_split(order, min(config.folds, num_images))[0])
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
        grid=grid,
        smoothing=config.smoothing,
        image_score=config.image_score,
        top=config.top,
        scores=_statistics(scores_IN),
    )
    standardised = [params.standardise(scores_N) for scores_N in scores_IN]
    held_out = [_highest(params, scores_N, grid, image_size) for scores_N in standardised]
    return params, _thresholds(np.array(held_out, np.float32), config)


def _highest(
    params: Params | DiscriminatorParams,
    scores_N: Array,
    grid: tuple[int, int],
    image_size: tuple[int, int],
) -> tuple[float, float]:
    """What an image's borders are held against: its score, and its highest pixel."""
    map_HW = anomaly_map(scores_N, grid, image_size, params.smoothing)
    return image_score(params.image_score, scores_N, params.top), float(map_HW.max())


def _thresholds(scores_P2: Array, config: FitConfig) -> dict[str, Threshold]:
    """The borders of image and pixel, from what ``_highest`` says of held-out pictures."""
    budget = config.false_reject
    source = f"false-reject budget {budget:g} on {len(scores_P2)} held-out training pictures"
    thresholds = {}
    for name, scores_P in zip(("image", "pixel"), scores_P2.T, strict=True):
        held_out = HeldOut.of(scores_P)
        by_rank = config.rule == "rank"
        thresholds[name] = Threshold(
            value=false_reject_threshold(scores_P, budget) if by_rank else border(held_out, budget),
            source=source,
            held_out=held_out,
        )
    return thresholds


def _coreset(
    features_IND: Array,
    images: Array,
    config: FitConfig,
    rng: np.random.Generator,
    space: Array | None,
    progress: Progress,
) -> tuple[Array, float]:
    """The rows of a bank of some images, (M, D), and their radius: how far the patches that they
    were chosen among lie from them at most.

    Args:
        images: sorted indices.
        space: projection in which the rows are chosen.
    """
    num_patches, width = features_IND.shape[1:]
    num = _num_rows(config, len(images) * num_patches)

    def reduce(rows_ND: Array) -> tuple[Array, float]:
        first = int(rng.integers(len(rows_ND)))
        searched = rows_ND if space is None else rows_ND @ space
        picks = greedy_k_centre(
            searched, num, first=first, progress=lambda done, of: progress("coreset", done, of)
        )
        return rows_ND[picks.indices], picks.radius

    def patches(part: Array) -> Array:
        # a range stays in its file; others are copied
        whole = part[-1] - part[0] == len(part) - 1
        chosen = features_IND[part[0] : part[-1] + 1] if whole else features_IND[part]
        return chosen.reshape(-1, width)

    total = len(images) * num_patches
    if config.sampled is not None and config.sampled < total:
        chosen = np.sort(rng.choice(total, config.sampled, replace=False, shuffle=False))
        return reduce(features_IND[images[chosen // num_patches], chosen % num_patches])
    size = max(1, config.max_patches // num_patches)
    parts = [images[i : i + size] for i in range(0, len(images), size)]
    kept, radii = zip(*(reduce(patches(part)) for part in parts), strict=True)
    if len(parts) == 1:
        return kept[0], radii[0]
    rows_MD, radius = reduce(np.concatenate(kept))
    # a patch is within its group's radius of a candidate, and that one within `radius` of the bank
    return rows_MD, radius + max(radii)


def _num_rows(config: FitConfig, num_patches: int) -> int:
    """How many rows a bank of so many patches has."""
    return max(1, min(config.max_rows, int(num_patches * config.coreset_ratio)))


def _statistics(values: Array) -> Statistics:
    return Statistics(
        mean=float(values.mean(dtype=np.float64)),
        # features that never vary (a blank training set) leave nothing to standardise
        std=max(float(values.std(dtype=np.float64)), 1e-12),
    )
