"""``noising``: is anything in this image unlike the normal parts, and where?

An image becomes (N, D) patch features; a memory bank holds features of normal patches. Three more
signals join a patch's distance to the bank, all in closed form, from the K nearest rows m_k at
distances d_k (u_k = (x - m_k) / d_k is the direction away from row k):

* *influence* g = |mean_k u_k|: how strongly each feature dimension changes the mean distance (its
  gradient). Its mean is small where the neighbours surround the patch, and large where the patch
  stands outside of them.
* *concentration* log(D sum g^4 / (sum g^2)^2): 0 where all dimensions carry g alike, log D where
  one does (minus the logarithm of the participation ratio).
* *response*: the proposed noise has the standard deviation sigma_i = lo + (hi - lo)
  sigmoid(z_i + w delta), with z the influence standardised over the patch's dimensions and delta
  the standardised mean distance; the response is what that noise is expected to add to the mean
  distance, mean_k sum_i sigma_i^2 (1 - u_ki^2) / (2 d_k) to second order, and never more than the
  noise's own length sqrt(sum_i sigma_i^2).

Each signal is standardised with its mean and spread over training patches that were searched
without the rows of their own image, so a score depends on nothing but the image and the bundle.

Or a trained *discriminator* stands in the place of the bank: one graph gives each patch a score,
standardised over training images that it was not trained on. What a bundle holds decides.

Source: "Propose Noising" (patch influence and noise proposal), with PatchCore's bank (Roth et al.,
"Towards Total Recall in Industrial Anomaly Detection", 2022).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from runtime import datasets, draw, images
from runtime.bank import Bank
from runtime.bundle import Bundle, Threshold, write
from runtime.coreset import Progress, greedy_k_centre, projection
from runtime.engines import Engine
from runtime.errors import BundleError, EngineError, InputError
from runtime.metrics import AnomalyMetrics, false_reject_threshold
from runtime.preprocess import PreprocessSpec, apply, place, restore
from runtime.results import AnomalyMap
from runtime.search import FastSearch
from runtime.sources import PICTURES, open_source
from runtime.systems import choose, open_engines
from runtime.tensors import Array
from runtime.threads import available_threads, in_parts

NAME = "noising"
SIGNALS = ("distance", "influence", "concentration", "response")
FEATURES = "features"  # the graph of a bundle with a bank
DISCRIMINATE = "discriminate"  # the graph of a bundle without one

_TILE = 128  # patches whose neighbours fit into a core's cache together
_EVALUATION_BATCH = 8


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FitConfig(_Part):
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
    weights: dict[str, float] = {
        "distance": 1.0,
        "influence": 1.0,
        "concentration": 0.0,
        "response": 0.0,
    }
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


class Statistics(_Part):
    """Mean and standard deviation over held-out training patches."""

    mean: float
    std: float = Field(gt=0)


class Params(_Part):
    """What the bundle of a ``noising`` system says beyond graphs, bank and preprocessing."""

    grid: tuple[int, int]
    k: int
    noise_range: tuple[float, float]
    distance_weight: float
    weights: dict[str, float]
    smoothing: float
    mean_distance: Statistics
    signals: dict[str, Statistics]
    score_std: float = Field(gt=0)


class DiscriminatorParams(_Part):
    """What the bundle of a discriminator says beyond its graph and preprocessing.

    Attributes:
        scores: of the graph's scores, over the patches of held-out training images.
    """

    grid: tuple[int, int]
    smoothing: float
    scores: Statistics

    def standardise(self, scores_N: Array) -> Array:
        """The graph's scores as standard deviations above a normal patch: (N,) float32."""
        centred = scores_N - np.float32(self.scores.mean)
        return np.asarray(centred / np.float32(self.scores.std), np.float32)


@dataclass(frozen=True)
class Fitted:
    """A bank with everything that turns its distances into scores."""

    bank: Bank
    params: Params
    thresholds: dict[str, Threshold]
    report: dict[str, Any]


# --- the mathematics -----------------------------------------------------------------------------


def influence(queries_ND: Array, neighbours_NKD: Array, distances_NK: Array) -> Array:
    """|d/dx of the mean distance to the neighbours|, in closed form.

    Args:
        queries_ND: (N, D) patches.
        neighbours_NKD: (N, K, D) their nearest rows.
        distances_NK: (N, K) Euclidean distances to them; a neighbour at distance 0 has no direction
            and adds nothing.

    Returns:
        (N, D), of the inputs' float dtype, in [0, 1].
    """
    return _influence(queries_ND[:, None] - neighbours_NKD, distances_NK)


def _influence(differences_NKD: Array, distances_NK: Array) -> Array:
    """The same from x - m_k."""
    weights = _reciprocal(distances_NK) / distances_NK.shape[1]
    return np.asarray(np.abs(np.matmul(weights[:, None], differences_NKD)[:, 0]))


def _reciprocal(distances: Array) -> Array:
    return np.divide(1, distances, out=np.zeros_like(distances), where=distances > 0)


def noise_std(
    influence_ND: Array,
    mean_distance_N: Array,
    *,
    statistics: Statistics,
    noise_range: tuple[float, float],
    distance_weight: float,
) -> Array:
    """Standard deviation of the proposed noise, per patch and dimension.

    Args:
        influence_ND: (N, D) as ``influence`` gives it.
        mean_distance_N: (N,) mean distance to the K neighbours.
        statistics: of the mean distance, over held-out training patches.

    Returns:
        (N, D) in ``noise_range``.
    """
    low, high = noise_range
    spread = influence_ND.std(axis=1, ddof=1, keepdims=True)
    z_ND = (influence_ND - influence_ND.mean(axis=1, keepdims=True)) / (spread + 1e-8)
    delta_N = (mean_distance_N - statistics.mean) / statistics.std
    drive = z_ND + (distance_weight * delta_N)[:, None]
    # 0.5 (1 + tanh(x / 2)) is the sigmoid without an overflow
    sigmoid = 0.5 * (1 + np.tanh(0.5 * drive))
    return np.asarray(low + (high - low) * sigmoid, influence_ND.dtype)


def response(differences_NKD: Array, distances_NK: Array, noise_std_ND: Array) -> Array:
    """Expected growth of the mean distance under the proposed noise.

    Args:
        differences_NKD: (N, K, D) x - m_k.
        distances_NK: (N, K) their lengths.
        noise_std_ND: (N, D) standard deviation of independent noise.

    Returns:
        (N,): mean over k of min(sum_i sigma_i^2 (1 - u_ki^2) / (2 d_k), sqrt(sum_i sigma_i^2)).
    """
    variance_ND = np.square(noise_std_ND)
    total_N = variance_ND.sum(axis=1)
    reciprocal = _reciprocal(distances_NK)
    along_NK = np.matmul(np.square(differences_NKD), variance_ND[..., None])[..., 0]
    second_order = 0.5 * (total_N[:, None] - along_NK * reciprocal**2) * reciprocal
    limit_N1 = np.sqrt(total_N)[:, None]
    growth = np.where(distances_NK > 0, np.minimum(second_order, limit_N1), limit_N1)
    return np.asarray(growth.mean(axis=1))


def concentration(influence_ND: Array) -> Array:
    """Minus the logarithm of the participation ratio of g^2: (N,) in [0, log D]."""
    square = np.square(influence_ND)
    total = square.sum(axis=1, keepdims=True)
    # shares first: the fourth power of a small influence would vanish
    share_ND = np.divide(square, total, out=np.zeros_like(square), where=total > 0)
    ratio = influence_ND.shape[1] * np.square(share_ND).sum(axis=1)
    return np.asarray(np.log(np.maximum(ratio, 1.0)))


def patch_signals(
    bank: Bank,
    queries_ND: Array,
    distances_NK: Array,
    indices_NK: Array,
    *,
    names: Sequence[str],
    mean_distance: Statistics | None,
    noise_range: tuple[float, float],
    distance_weight: float,
    threads: int | None = None,
) -> dict[str, Array]:
    """The named signals of each patch, not standardised.

    Args:
        bank: rows that ``indices_NK`` points to.
        queries_ND: (N, D) float32 patches.
        distances_NK, indices_NK: their K nearest rows, ascending.
        names: of ``SIGNALS``; only what they need is computed.
        mean_distance: statistics for the noise proposal; needed for ``response``.
        threads: None takes all cores that this process may use.

    Returns:
        name -> (N,) float32.
    """
    signals = {name: np.empty(len(queries_ND), np.float32) for name in names}

    def fill(part: slice) -> None:
        differences = np.take(bank.rows_MD, indices_NK[part], axis=0)
        np.subtract(queries_ND[part, None], differences, out=differences)
        g_ND = _influence(differences, distances_NK[part])
        if "influence" in signals:
            signals["influence"][part] = g_ND.mean(axis=1)
        if "concentration" in signals:
            signals["concentration"][part] = concentration(g_ND)
        if "response" in signals:
            assert mean_distance is not None
            std_ND = noise_std(
                g_ND,
                distances_NK[part].mean(axis=1),
                statistics=mean_distance,
                noise_range=noise_range,
                distance_weight=distance_weight,
            )
            signals["response"][part] = response(differences, distances_NK[part], std_ND)

    def fill_tiles(part: slice) -> None:
        for start in range(part.start, part.stop, _TILE):
            fill(slice(start, min(start + _TILE, part.stop)))

    if "distance" in signals:
        signals["distance"][:] = distances_NK[:, 0]
    if set(names) - {"distance"}:
        in_parts(fill_tiles, len(queries_ND), threads or available_threads())
    return signals


def combine(
    signals: Mapping[str, Array], statistics: Mapping[str, Statistics], weights: Mapping[str, float]
) -> Array:
    """Weighted sum of the standardised signals: (N,) float32."""
    return np.asarray(
        sum(
            weight * (signals[name] - statistics[name].mean) / statistics[name].std
            for name, weight in weights.items()
            if weight
        ),
        np.float32,
    )


def anomaly_map(
    scores_N: Array, grid: tuple[int, int], size: tuple[int, int], smoothing: float
) -> Array:
    """Patch values as a picture: bilinear to ``size`` (height, width), then a Gaussian.

    Args:
        scores_N: (h * w,) float32 in row-major order.
        smoothing: sigma in pixels; 0 leaves the map as it is.

    Returns:
        (height, width) float32.
    """
    height, width = size
    upsampled = cv2.resize(
        scores_N.reshape(grid).astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR
    )
    if smoothing:
        upsampled = cv2.GaussianBlur(upsampled, (0, 0), smoothing, borderType=cv2.BORDER_REFLECT)
    return np.asarray(upsampled)


# --- fitting ------------------------------------------------------------------------------------


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
) -> dict[str, dict[str, float]]:
    """What each signal earns: the task's metrics for the distance alone and with each addition.

    Args:
        labelled: (features (N, D), label 0 or 1, mask (height, width) bool or None) per image.

    Returns:
        name of the combination -> metrics; ``shipped`` is the bundle's own weights.
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
    return {name: metric.compute() for name, metric in metrics.items()}


# --- the system ---------------------------------------------------------------------------------


class _BankJudge:
    """Patch scores from features and their nearest rows in the bank."""

    graph, output = FEATURES, "features"

    def __init__(self, bundle: Bundle, *, backend: str, threads: int | None) -> None:
        self.params = bundle.params(Params)
        self.bank = Bank.load(bundle.asset("bank"))
        self.search = FastSearch(self.bank, self.params.k, backend=backend, threads=threads)
        self._threads = threads
        # the influence map is part of the answer even where its weight is 0
        self._names = [n for n in SIGNALS if self.params.weights[n] or n == "influence"]

    def scores(self, features_ND: Array) -> tuple[Array, Array | None]:
        """Of each patch, (N,): score and influence, in standard deviations."""
        params = self.params
        distances, indices = self.search.search(features_ND)
        signals = patch_signals(
            self.bank,
            features_ND,
            distances,
            indices,
            names=self._names,
            mean_distance=params.mean_distance,
            noise_range=params.noise_range,
            distance_weight=params.distance_weight,
            threads=self._threads,
        )
        scores = combine(signals, params.signals, params.weights) / np.float32(params.score_std)
        statistics = params.signals["influence"]
        return scores, (signals["influence"] - statistics.mean) / statistics.std

    def close(self) -> None:
        self.search.close()


class _DiscriminatorJudge:
    """Patch scores as the graph gives them, in a common unit."""

    graph, output = DISCRIMINATE, "scores"

    def __init__(self, bundle: Bundle) -> None:
        self.params = bundle.params(DiscriminatorParams)

    def scores(self, scores_N: Array) -> tuple[Array, Array | None]:
        """Of each patch, (N,): score in standard deviations; there is no influence."""
        return self.params.standardise(scores_N), None

    def close(self) -> None:
        pass


class System:
    """An opened ``noising`` bundle; see ``runtime.systems.System``.

    Attributes:
        judge: by a bank, or by a discriminator where the bundle has that graph.
    """

    reader = PICTURES

    def __init__(
        self,
        bundle: Bundle,
        engines: Mapping[str, Engine],
        *,
        backend: str,
        precision: str,
        threads: int | None = None,
    ) -> None:
        manifest = bundle.manifest
        self.bundle = bundle
        self.engines = engines
        self.backend = backend
        self.precision = precision
        assert isinstance(manifest.preprocess, PreprocessSpec)
        self.spec = manifest.preprocess
        self.judge = (
            _DiscriminatorJudge(bundle)
            if DISCRIMINATE in manifest.graphs
            else _BankJudge(bundle, backend=backend, threads=threads)
        )
        self.params = self.judge.params

    def infer(self, images: Sequence[Array]) -> list[AnomalyMap]:
        """Score images.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.

        Returns:
            One result per image; maps are at the network's input size.

        Raises:
            InputError: an image of another dtype or layout.
            EngineError: the network's answer is not finite.
        """
        if not images:
            return []
        batch = apply(self.spec, images)
        answers = self.engines[self.judge.graph].run({"images": batch})[self.judge.output]
        return [self.score(answer) for answer in answers]

    def score(self, answer: Array) -> AnomalyMap:
        """Score what the graph says of one image: features (N, D), or scores (N,), float32.

        Raises:
            EngineError: values that are not finite.
        """
        thresholds, size = self.bundle.manifest.thresholds, self.spec.size
        if not np.isfinite(answer).all():  # no comparison with a threshold would notice
            raise EngineError(
                f"the '{self.judge.graph}' graph gave values that are not finite",
                fix="run with --precision float, or export again",
            )
        scores, influence = self.judge.scores(answer)
        grid, smoothing = self.params.grid, self.params.smoothing
        return AnomalyMap(
            score=float(scores.max()),
            threshold=thresholds["image"].value,
            pixel_threshold=thresholds["pixel"].value,
            map_HW=anomaly_map(scores, grid, size, smoothing),
            influence_HW=None if influence is None else anomaly_map(influence, grid, size, 0),
        )

    def draw(self, image: Array, result: AnomalyMap) -> Array:
        """Image, anomaly map and marked area side by side: (H', W', 3) uint8 RGB."""
        height, width = image.shape[:2]
        scored = restore(self.spec, result.map_HW, height, width)
        # zero is an average normal patch; the border of "anomalous" sits at two thirds of the scale
        heat = draw.heatmap(scored, 0.0, 1.5 * max(result.pixel_threshold, 1e-6))
        marked = draw.contour(image, scored >= result.pixel_threshold)
        verdict = "anomalous" if result.is_anomalous else "normal"
        return draw.panel(
            [
                ("input", image),
                (f"map, score {result.score:.2f}", draw.blend(image, heat, 0.5)),
                (f"{verdict} (border {result.threshold:.2f})", marked),
            ]
        )

    def evaluate(
        self, data: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Image and pixel metrics on the labelled test images of a folder.

        Args:
            data: an MVTec-style folder, see ``runtime.datasets.mvtec``.

        Returns:
            The keys of ``runtime.metrics.AnomalyMetrics``; pixel metrics only where every
            defective image has a mask.

        Raises:
            DatasetError: another layout, or no labelled images.
            ImageError: a picture that cannot be read.
        """
        samples = datasets.mvtec(data, "test")
        metrics = AnomalyMetrics()
        for start in range(0, len(samples), _EVALUATION_BATCH):
            part = samples[start : start + _EVALUATION_BATCH]
            results = self.infer([images.read(sample.path) for sample in part])
            for sample, result in zip(part, results, strict=True):
                metrics.update(
                    result.score, sample.label, result.map_HW, target_mask(sample, self.spec)
                )
            if progress:
                progress(start + len(part), len(samples))
        return metrics.compute()

    def close(self) -> None:
        """Release the engines; closing twice is allowed."""
        self.judge.close()
        for engine in self.engines.values():
            engine.close()


def target_mask(sample: datasets.MvtecSample, spec: PreprocessSpec) -> Array | None:
    """Ground truth of a test image at the network's size: (height, width) bool.

    A normal image has an empty mask; a defective one without a mask file has none (None).
    """
    if sample.mask_path is None:
        return None if sample.label else np.zeros(spec.size, bool)
    return np.asarray(place(spec, images.read_mask(sample.mask_path), nearest=True) > 0)


def extend(
    bundle: Bundle,
    folder: Path,
    out: Path,
    *,
    max_rows: int,
    backend: str = "auto",
    threads: int | None = None,
    exist_ok: bool = False,
) -> int:
    """Write a bundle whose bank also knows new normal images.

    The rows farthest from the bank are added, greedily; statistics and thresholds stay, so scores
    of old and new images remain comparable.

    Args:
        folder: normal images, read recursively.
        max_rows: at most so many rows are added.

    Returns:
        Number of rows added.

    Raises:
        InputError: no pictures, or one that cannot be read.
        BundleError: another system's bundle, one without a bank, or ``out`` exists.
    """
    if bundle.manifest.system != NAME:
        raise BundleError(f"bundle {bundle.root} holds '{bundle.manifest.system}', not '{NAME}'")
    if DISCRIMINATE in bundle.manifest.graphs:
        raise BundleError(
            f"bundle {bundle.root} has no bank: a discriminator judges",
            fix="train again with the new images, or with --set judge=bank",
        )
    source = open_source(str(folder))
    if source.kind != "images":
        raise InputError(f"{folder} holds no pictures", fix="give a folder of normal pictures")
    # float features: the bank must serve every precision
    backend, _ = choose(bundle, backend, "float")
    engines = open_engines(bundle, backend, "float", threads=threads)
    spec = bundle.manifest.preprocess
    with closing(engines["features"]) as engine:
        features = [
            engine.run({"images": apply(spec, [images.read(path)])})["features"][0]
            for path in source.paths
        ]
    old = Bank.load(bundle.asset("bank"))
    new = old.extended(np.concatenate(features), max_rows)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "bank.faiss"
        new.save(path)
        files = {name: bundle.path(name) for name in bundle.manifest.files}
        files[bundle.manifest.assets["bank"]] = path
        write(out, bundle.manifest, files, replace=exist_ok)
    return len(new) - len(old)
