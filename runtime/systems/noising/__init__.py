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

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np

from engineworks.runtime import datasets, draw, images, masks, npy
from engineworks.runtime.bank import Bank
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.contract import Contract, Signature
from engineworks.runtime.errors import BundleError, InputError, NotFiniteError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.labels import Labelled
from engineworks.runtime.metrics import AnomalyMetrics
from engineworks.runtime.preprocess import PreprocessSpec, apply, check_image, place, restore
from engineworks.runtime.results import AnomalyMap
from engineworks.runtime.search import FastSearch
from engineworks.runtime.sources import PICTURES
from engineworks.runtime.systems.noising.extend import extend
from engineworks.runtime.systems.noising.foreground import Foreground
from engineworks.runtime.systems.noising.layers import LayerBank, Layers, LayerSearch
from engineworks.runtime.systems.noising.params import DiscriminatorParams, Params
from engineworks.runtime.systems.noising.signals import image_score
from engineworks.runtime.systems.noising.tiles import Layout, Tiles, picture_map
from engineworks.runtime.systems.opened import OpenedSystem, in_turn
from engineworks.runtime.tensors import Array

NAME = "noising"
FEATURES = "features"  # the graph of a bundle with a bank
DISCRIMINATE = "discriminate"  # the graph of a bundle without one

# of each patch of an image, (N,): score, and influence where it counts, in standard deviations
Judged: TypeAlias = tuple[Array, Array | None]

_EVALUATION_BATCH = 8
_TILED_PIXELS = 1 << 19  # of the tiles that the network sees at once


def contract(bundle: Bundle) -> Contract:
    """What this system demands of its bundle."""
    judged = DISCRIMINATE in bundle.manifest.graphs
    layers: Layers | None = None
    if judged:
        rows, columns = bundle.params(DiscriminatorParams).grid
        graphs = {DISCRIMINATE: Signature({"images": "B3HW"}, {"scores": "BN"})}
    else:
        params = bundle.params(Params)
        rows, columns = params.grid
        graphs = {FEATURES: Signature({"images": "B3HW"}, {"features": "BND"})}
        layers = params.layers
        _check_tiles(bundle, params)
    height, width = bundle.manifest.preprocess.size
    sizes = {"H": height, "W": width, "N": rows * columns}
    return Contract(
        preprocess=PreprocessSpec,
        graphs=graphs,
        sizes=sizes if layers is None else sizes | {"D": sum(layers.widths)},
        thresholds=("image", "pixel"),
        assets=() if judged else _assets(bundle.params(Params)),
    )


def _check_tiles(bundle: Bundle, params: Params) -> None:
    """Refuse tiles that do not fit what else the bundle says."""
    if params.tiles is None:
        return
    window = None if params.layers is None else params.layers.window
    fault = ""
    if window is not None or params.foreground is not None:
        fault = "tiles go with no window of places and no foreground"
    try:
        params.tiles.check(bundle.manifest.preprocess.size)
    except InputError as error:
        fault = str(error)
    if fault:
        raise BundleError(f"bundle {bundle.root}: {fault}", fix="export the bundle again")


def _assets(params: Params) -> tuple[str, ...]:
    return ("bank",) if params.foreground is None else ("bank", "foreground")


class _BankJudge:
    """Patch scores from features and their nearest rows in the bank."""

    graph, output = FEATURES, "features"

    def __init__(self, bundle: Bundle, *, backend: str, threads: int | None) -> None:
        self.params = bundle.params(Params)
        self.tiles = self.params.tiles
        bank = Bank.decode(bundle.asset_content("bank"), str(bundle.asset("bank")))
        self.bank = self.params.bank(bank)
        self.search: FastSearch | LayerSearch
        if isinstance(self.bank, LayerBank):
            self.search = LayerSearch(self.bank, backend=backend, threads=threads)
        else:
            k = self.params.neighbours
            self.search = FastSearch(self.bank, k, backend=backend, threads=threads)
        self._foreground = _foreground(bundle, self.params, self.bank.width)
        self._threads = threads

    def scores(self, features_BND: Array) -> list[Judged]:
        """Of each image; the patches of all images are searched together where places do not count.

        Args:
            features_BND: (B, N, D) float32.
        """
        batch, patches, width = features_BND.shape
        together = isinstance(self.search, FastSearch)
        parts = features_BND.reshape(1 if together else batch, -1, width)
        judged = [
            (
                scores_N[start : start + patches],
                None if influence_N is None else influence_N[start : start + patches],
            )
            for scores_N, influence_N in map(self._of_patches, parts)
            for start in range(0, len(scores_N), patches)
        ]
        if self._foreground is None:
            return judged
        grid = self.params.grid
        return [
            (self._foreground.judge(scores_N, features_ND, grid), influence_N)
            for (scores_N, influence_N), features_ND in zip(judged, features_BND, strict=True)
        ]

    def _of_patches(self, features_ND: Array) -> Judged:
        found = self.search.search(features_ND)
        return self.params.judge(self.bank, features_ND, *found, threads=self._threads)

    def close(self) -> None:
        self.search.close()


def _foreground(bundle: Bundle, params: Params, width: int) -> Foreground | None:
    """What tells part from ground, where the bundle has it.

    Raises:
        BundleError: its direction is not one of the features.
    """
    if params.foreground is None:
        return None
    asset = bundle.asset("foreground")
    direction_D = npy.decode(bundle.asset_content("foreground"), str(asset))
    if direction_D.shape != (width,) or direction_D.dtype != np.float32:
        raise BundleError(
            f"{asset} is {direction_D.dtype} {direction_D.shape}, not float32 ({width},)",
            fix="export the bundle again",
        )
    return Foreground(direction_D, params.foreground)


class _DiscriminatorJudge:
    """Patch scores as the graph gives them, in a common unit."""

    graph, output = DISCRIMINATE, "scores"
    tiles: Tiles | None = None

    def __init__(self, bundle: Bundle) -> None:
        self.params = bundle.params(DiscriminatorParams)

    def scores(self, scores_BN: Array) -> list[Judged]:
        """Of each image; there is no influence."""
        return [(self.params.standardise(scores_N), None) for scores_N in scores_BN]

    def close(self) -> None:
        pass


class System(OpenedSystem):
    """An opened ``noising`` bundle; see ``runtime.systems.System``.

    Attributes:
        judge: by a bank, or by a discriminator where the bundle has that graph.
    """

    reader = PICTURES

    @staticmethod
    def labelled(root: Path) -> Labelled:
        return datasets.mvtec_labels(root)

    extend = staticmethod(extend)

    def set_up(self) -> None:
        manifest = self.bundle.manifest
        assert isinstance(manifest.preprocess, PreprocessSpec)
        self.spec = manifest.preprocess
        self.judge = (
            _DiscriminatorJudge(self.bundle)
            if DISCRIMINATE in manifest.graphs
            else _BankJudge(self.bundle, backend=self.backend, threads=self.threads)
        )
        self.params = self.judge.params

    @in_turn
    def infer(self, images: Sequence[Array]) -> list[AnomalyMap]:
        """Score images.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.

        Returns:
            One result per image; maps are at the network's input size, or, of a bundle with
            tiles, at the picture's own. Beyond such a map, memory does not grow with the picture.

        Raises:
            InputError: an image of another dtype or layout.
            NotFiniteError: the network's answer is not finite.
        """
        if not images:
            return []
        if self.judge.tiles is not None:
            return [self._in_tiles(image, self.judge.tiles) for image in images]
        return [self._result([each], None) for each in self._judged(self._answers(images))]

    def score(self, answer: Array) -> AnomalyMap:
        """Score what the graph says of one image: features (N, D), or scores (N,), float32.

        Raises:
            NotFiniteError: values that are not finite.
        """
        return self._result(self._judged(answer[None]), None)

    def _in_tiles(self, image: Array, tiles: Tiles) -> AnomalyMap:
        """One image at its own resolution, a few tiles at a time."""
        check_image(image)
        height, width = self.spec.size
        layout = Layout.of((image.shape[0], image.shape[1]), (height, width), tiles)
        pieces, at_once = layout.cut(image), max(1, _TILED_PIXELS // (height * width))
        judged = [
            each
            for start in range(0, len(pieces), at_once)
            for each in self._judged(self._answers(pieces[start : start + at_once]))
        ]
        return self._result(judged, layout)

    def _answers(self, images: Sequence[Array]) -> Array:
        """What the graph says of each image."""
        feeds = {"images": apply(self.spec, images)}
        return self.engines[self.judge.graph].run(feeds)[self.judge.output]

    def _judged(self, answers: Array) -> list[Judged]:
        """Of each image, from what the graph says of them."""
        if not np.isfinite(answers).all():  # no comparison with a threshold would notice
            raise NotFiniteError(
                f"the '{self.judge.graph}' graph gave values that are not finite",
                fix="run with --precision float, or export again",
            )
        return self.judge.scores(answers)

    def _result(self, judged: Sequence[Judged], layout: Layout | None) -> AnomalyMap:
        """One picture's result from the patches of its tiles, or of the one image that it is."""
        params, size = self.params, self.spec.size
        thresholds = self.bundle.manifest.thresholds
        scores = [scores_N for scores_N, _ in judged]
        influence = [influence_N for _, influence_N in judged if influence_N is not None]
        return AnomalyMap(
            score=max(image_score(params.image_score, each, params.top) for each in scores),
            threshold=thresholds["image"].value,
            pixel_threshold=thresholds["pixel"].value,
            map_HW=picture_map(scores, params.grid, size, params.smoothing, layout),
            influence_HW=(
                picture_map(influence, params.grid, size, 0, layout) if influence else None
            ),
        )

    def draw(self, image: Array, result: AnomalyMap) -> Array:
        """Image, anomaly map and marked area side by side: (H', W', 3) uint8 RGB."""
        height, width = image.shape[:2]
        tiled = self.judge.tiles is not None
        scored = result.map_HW if tiled else restore(self.spec, result.map_HW, height, width)
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
    ) -> Evaluation:
        """Metrics of images and pixels, and what the border decides, on a folder's test images.

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
        tiled = self.judge.tiles is not None
        batch = 1 if tiled else _EVALUATION_BATCH
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            results = self.infer([images.read(sample.path) for sample in part])
            for sample, result in zip(part, results, strict=True):
                mask = target_mask(sample, self.spec, result.map_HW.shape if tiled else None)
                metrics.update(result.score, sample.label, result.map_HW, mask)
            if progress:
                progress(start + len(part), len(samples))
        border = self.bundle.manifest.thresholds["image"].value
        return metrics.evaluation("image", border, [sample.defect for sample in samples])

    def release(self) -> None:
        self.judge.close()
        super().release()


def target_mask(
    sample: datasets.MvtecSample, spec: PreprocessSpec, size: tuple[int, ...] | None = None
) -> Array | None:
    """Ground truth of a test image at the network's size: (height, width) bool.

    Args:
        size: (height, width) of the picture, where tiles keep it at that.

    A normal image has an empty mask; a defective one without a mask file has none (None).
    """
    if sample.mask_path is None:
        return None if sample.label else np.zeros(size or spec.size, bool)
    if size is not None:
        return masks.read(sample.mask_path, (size[0], size[1]))
    mask_HW = masks.read(sample.mask_path).astype(np.uint8)
    return np.asarray(place(spec, mask_HW, nearest=True) > 0)
