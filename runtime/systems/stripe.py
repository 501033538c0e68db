"""``stripe``: what does this capture show that two others of the same place do not?

One graph sees target and references as three planes of raw sensor values and gives a logit per
pixel. It is fully convolutional, so a strip passes as a whole, padded by reflection to the graph's
multiple; or, where it is too large for that, in tiles that are folded into the batch. Tiles start
on the graph's own grid of cells, so both ways see the same inputs: further from the borders of a
tile than the network looks, which is what the overlap is for, they differ by rounding alone.

Peaks of the map become candidates, and those with a score at or above the threshold defects.

Source: Background_Removal_Net (three-channel input, tiles, double detection, ranked candidates).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Self

import cv2
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from engineworks.runtime import datasets, draw, masks, planes, tiling
from engineworks.runtime.bundle import Bundle, Threshold
from engineworks.runtime.contract import Contract, Signature
from engineworks.runtime.datasets import StripeSample
from engineworks.runtime.errors import ImageError, InputError, NotFiniteError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.labels import Labelled
from engineworks.runtime.metrics import AnomalyMetrics, CandidateMetrics, false_reject_threshold
from engineworks.runtime.preprocess import PlanesSpec, apply
from engineworks.runtime.results import Candidate, DefectMap
from engineworks.runtime.systems.opened import OpenedSystem, in_turn
from engineworks.runtime.tensors import Array

NAME = "stripe"

# raw planes (B, 3, H, W) float32 -> logits (B, 1, H, W)
Run = Callable[[Array], Array]

_EVALUATION_BATCH = 4
_TILES_AT_ONCE = 32
_SCORE_SIDE, _SCORE_PIXELS = 5, 3  # a candidate's score: so many highest pixels of a square


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class InferenceConfig(_Part):
    """How a trained network is used.

    Attributes:
        tile: side in pixels of the tiles that images are cut into; null runs them whole.
        overlap: pixels that neighbouring tiles share at least.
        suppression: no two candidates lie closer together, in pixels (published: 20).
        max_candidates: of an image (published: 5).
        match_radius: pixels by which a candidate may miss a defect in an evaluation.
        false_candidates: per normal image that the threshold lets through, on average.
    """

    tile: int | None = Field(default=None, ge=16, le=1 << 16)
    overlap: int = Field(default=64, ge=0, le=1 << 16)
    suppression: float = Field(default=5.0, ge=0, le=1000)
    max_candidates: int = Field(default=50, ge=1, le=1_000_000)
    match_radius: float = Field(default=2.0, ge=0, le=1000)
    false_candidates: float = Field(default=0.1, ge=0, le=1e6)

    @model_validator(mode="after")
    def _overlap_within_a_tile(self) -> Self:
        if self.tile is not None and self.overlap >= self.tile:
            raise ValueError("overlap must be smaller than tile")
        return self


Value = Annotated[FiniteFloat, Field(ge=-1e30, le=1e30)]  # of a sensor


class Params(_Part):
    """What the bundle of a ``stripe`` system says beyond graph, preprocessing and threshold.

    Attributes:
        value_range: (low, high) of the sensor. The graph rescales by itself; this is for checking
            and drawing.
    """

    value_range: tuple[Value, Value]
    inference: InferenceConfig

    @model_validator(mode="after")
    def _a_range(self) -> Self:
        if not self.value_range[0] < self.value_range[1]:
            raise ValueError("value_range must rise")
        return self


def contract(bundle: Bundle) -> Contract:
    """What this system demands of its bundle."""
    bundle.params(Params)
    return Contract(
        preprocess=PlanesSpec,
        graphs={"segment": Signature({"planes": "B3HW"}, {"logits": "B1HW"})},
        sizes={},
        thresholds=("candidate",),
    )


# --- the mathematics -----------------------------------------------------------------------------


def defect_maps(
    run: Run,
    strips: Sequence[Array],
    spec: PlanesSpec,
    *,
    tile: int | None = None,
    overlap: int = 0,
) -> list[Array]:
    """Probability of a defect for each pixel, the same in validation, the gate and inference.

    Args:
        run: the network; called with float32 batches of one size, multiples of ``spec.multiple``.
        strips: (H, W, 3) planes each, of any sizes; equal ones share a batch.
        tile: side in pixels, rounded up to the multiple; None runs each image whole.
        overlap: pixels that neighbouring tiles share at least.

    Returns:
        (H, W) float32 in [0, 1] per image.

    Raises:
        InputError: an image that is no planes.
        NotFiniteError: the network's logits are not finite.
    """
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, strip in enumerate(strips):
        planes.check_planes(strip)
        groups[spec.padded(*strip.shape[:2])].append(i)
    maps: dict[int, Array] = {}
    for indices in groups.values():
        batch = apply(spec, [strips[i] for i in indices])
        if tile is None:
            logits_BHW = run(batch)[:, 0]
        else:
            logits_BHW = _run_tiles(run, batch, tile, overlap, spec.multiple)
        if not np.isfinite(logits_BHW).all():  # no comparison with a threshold would notice
            raise NotFiniteError(
                "the 'segment' graph gave values that are not finite",
                fix="run with --precision float, or export again",
            )
        for i, logits_HW in zip(indices, logits_BHW, strict=True):
            height, width = strips[i].shape[:2]
            maps[i] = _sigmoid(logits_HW[:height, :width])
    return [maps[i] for i in range(len(strips))]


def _run_tiles(run: Run, batch: Array, tile: int, overlap: int, multiple: int) -> Array:
    """Logits (B, H, W) by way of tiles that start on multiples of the graph's stride."""

    def along(length: int) -> tuple[int, tuple[int, ...]]:
        cells = length // multiple
        size = min(-(-tile // multiple), cells)
        shared = min(-(-overlap // multiple), size - 1)
        starts = tiling.overlapping(cells, size, shared)
        return size * multiple, tuple(start * multiple for start in starts)

    (height, rows), (width, columns) = along(batch.shape[2]), along(batch.shape[3])
    tiles = [
        piece
        for image_CHW in batch
        for piece in tiling.cut(image_CHW, rows, columns, (height, width))
    ]
    logits = np.concatenate(
        [
            run(np.stack(tiles[i : i + _TILES_AT_ONCE]))[:, 0]
            for i in range(0, len(tiles), _TILES_AT_ONCE)
        ]
    )
    by_image = logits.reshape(len(batch), -1, height, width)
    return np.stack([tiling.stitch(each, rows, columns) for each in by_image])


def _sigmoid(logits: Array) -> Array:
    small = np.exp(-np.abs(logits))
    return np.asarray(np.where(logits >= 0, 1, small) / (1 + small), np.float32)


def double_detection(planes_HWC: Array) -> Array:
    """What the target differs by from both references: of the two differences the smaller one.

    Returns:
        (H, W) float32, signed, in the sensor's unit: target - reference 1 or target - reference 2,
        whichever has the smaller magnitude.
    """
    target, first, second = planes_HWC.astype(np.float32).transpose(2, 0, 1)
    to_first, to_second = target - first, target - second
    return np.asarray(np.where(np.abs(to_first) <= np.abs(to_second), to_first, to_second))


def find_candidates(map_HW: Array, *, suppression: float, max_candidates: int) -> list[Candidate]:
    """Peaks of a map, greedily from the highest down.

    A peak is a pixel that none of its eight neighbours exceeds, and that is further than
    ``suppression`` pixels from every peak taken before it. Equal ones are taken in reading order.

    Args:
        map_HW: (H, W) float32.

    Returns:
        At least one and at most ``max_candidates``, by falling score: the mean of the three highest
        pixels in the 5 x 5 around the peak.
    """
    highest = cv2.dilate(map_HW, np.ones((3, 3), np.uint8))
    ys, xs = np.nonzero(map_HW >= highest)
    order = np.argsort(-map_HW[ys, xs], kind="stable")
    reach = int(suppression)
    offsets = np.arange(-reach, reach + 1)
    disk = np.hypot(offsets[:, None], offsets) <= suppression
    taken = np.zeros((map_HW.shape[0] + 2 * reach, map_HW.shape[1] + 2 * reach), bool)
    side = _SCORE_SIDE // 2
    found: list[Candidate] = []
    for y, x in zip(ys[order].tolist(), xs[order].tolist(), strict=True):
        if taken[y + reach, x + reach]:
            continue
        taken[y : y + 2 * reach + 1, x : x + 2 * reach + 1] |= disk
        around = map_HW[max(0, y - side) : y + side + 1, max(0, x - side) : x + side + 1]
        score = float(np.sort(around, axis=None)[-_SCORE_PIXELS:].mean(dtype=np.float64))
        found.append(Candidate(x=x, y=y, score=score))
        if len(found) == max_candidates:
            break
    return sorted(found, key=lambda candidate: -candidate.score)


def fit_threshold(maps: Iterable[Array], config: InferenceConfig) -> Threshold:
    """The threshold that normal images' candidates reach no more often than the budget says.

    Args:
        maps: of normal images, at least one, as ``defect_maps`` gives them.
    """
    scores: list[float] = []
    num_images = 0
    for map_HW in maps:
        num_images += 1
        scores += [candidate.score for candidate in _candidates(map_HW, config)]
    share = config.false_candidates * num_images / max(1, len(scores))
    value = false_reject_threshold(np.array(scores), min(share, np.nextafter(1, 0)))
    source = f"{config.false_candidates:g} false candidates per image on {num_images} normal images"
    return Threshold(value=value, source=source)


def _candidates(map_HW: Array, config: InferenceConfig) -> list[Candidate]:
    return find_candidates(
        map_HW, suppression=config.suppression, max_candidates=config.max_candidates
    )


def evaluate(
    run: Run,
    samples: Sequence[StripeSample],
    spec: PlanesSpec,
    config: InferenceConfig,
    *,
    threshold: float | None = None,
    check: Callable[[Array], None] = planes.check_planes,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Metrics of a network on labelled images; one ruler for validation and for the INT8 gate.

    Args:
        run: see ``defect_maps``.
        threshold: decision border for candidates, where there is one already.
        check: raises an InputError for an image that inference would refuse.

    Returns:
        The keys of ``runtime.metrics.AnomalyMetrics`` and ``CandidateMetrics``, and what the
        threshold decides of whole images, of defects and of candidates. Images that cannot be
        read, whose captures are displaced, or that ``check`` refuses, are in ``failures``, as in
        inference.

    Raises:
        ImageError: no image can be read, or a mask cannot.
        DatasetError: a mask of another shape than its image, or without a defect.
    """
    pixels, found = AnomalyMetrics(), CandidateMetrics(config.match_radius, threshold)
    failures: list[str] = []
    kinds: list[str] = []
    for start in range(0, len(samples), _EVALUATION_BATCH):
        part, strips = _readable(samples[start : start + _EVALUATION_BATCH], check, failures)
        kinds += [sample.defect for sample in part]
        maps = defect_maps(run, strips, spec, tile=config.tile, overlap=config.overlap)
        for sample, map_HW in zip(part, maps, strict=True):
            marked, size = sample.mask_path, (map_HW.shape[0], map_HW.shape[1])
            mask = None if marked is None else masks.read(marked, size)
            candidates = _candidates(map_HW, config)
            pixels.update(candidates[0].score, sample.label, map_HW, mask)
            found.update(candidates, sample.label, mask)
        if progress:
            progress(min(start + _EVALUATION_BATCH, len(samples)), len(samples))
    if failures and not kinds:
        raise ImageError(f"no image can be judged: {failures[0]}")
    judged = found.added_to(pixels.evaluation("candidate", threshold, kinds), kinds)
    return replace(judged, failures=tuple(failures))


def _readable(
    samples: Sequence[StripeSample], check: Callable[[Array], None], failures: list[str]
) -> tuple[list[StripeSample], list[Array]]:
    """Samples with their images; those that inference would leave out go to ``failures``."""
    kept: list[StripeSample] = []
    strips: list[Array] = []
    for sample in samples:
        try:
            strip = planes.read(sample.path)
            check(strip)
        except ImageError as error:
            failures.append(error.message)
        except InputError as error:
            failures.append(f"{sample.path}: {error.message}")
        else:
            kept.append(sample)
            strips.append(strip)
    return kept, strips


# --- the system ---------------------------------------------------------------------------------


class System(OpenedSystem):
    """An opened ``stripe`` bundle; see ``runtime.systems.System``."""

    reader = planes.PLANES

    @staticmethod
    def labelled(root: Path) -> Labelled:
        return datasets.strip_labels(root)

    def set_up(self) -> None:
        manifest = self.bundle.manifest
        self.params = self.bundle.params(Params)
        assert isinstance(manifest.preprocess, PlanesSpec)
        self.spec = manifest.preprocess
        self.threshold = manifest.thresholds["candidate"].value

    @in_turn
    def infer(self, images: Sequence[Array]) -> list[DefectMap]:
        """Look for what only the target shows.

        Args:
            images: (H, W, 3) uint8, uint16 or float32 planes each, of any sizes, in the sensor's
                own values.

        Returns:
            One result per image, at its size.

        Raises:
            InputError: an image that is no planes, or not of this sensor.
            NotFiniteError: the network's logits are not finite.
        """
        for image in images:
            self._check_values(image)
        config = self.params.inference
        maps = defect_maps(self._run, images, self.spec, tile=config.tile, overlap=config.overlap)
        return [
            DefectMap(map_HW, tuple(_candidates(map_HW, config)), self.threshold) for map_HW in maps
        ]

    def draw(self, image: Array, result: DefectMap) -> Array:
        """Seven pictures: planes, differences, double detection, and the map with its defects."""
        low, high = self.params.value_range
        grey = [
            draw.difference(plane - (low + high) / 2, (high - low) / 2) for plane in _split(image)
        ]
        target, first, second = _split(image)
        limit = (high - low) / 3  # a defect is far from spanning the sensor's range
        heat = draw.blend(grey[0], draw.heatmap(result.map_HW, 0, 1), 0.6)
        places = [(defect.x, defect.y) for defect in result.defects]
        parts = [
            ("target", grey[0]),
            ("reference 1", grey[1]),
            ("reference 2", grey[2]),
            ("target - 1", draw.difference(target - first, limit)),
            ("target - 2", draw.difference(target - second, limit)),
            ("in both", draw.difference(double_detection(image), limit)),
            (f"score {result.score:.2f}", draw.rings(heat, places, 8)),
        ]
        if image.shape[0] > image.shape[1]:
            return draw.panel(parts)
        return draw.grid([draw.panel([part]) for part in parts])

    def evaluate(
        self, data: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """Metrics and decisions on the split ``test`` of a folder.

        Args:
            data: see ``runtime.datasets.strips``.

        Returns:
            See ``evaluate``; what is said of pixels, defects and candidates only where every
            defective image has a mask.

        Raises:
            DatasetError: another layout, or no images.
            ImageError: an image or mask that cannot be read.
        """
        return evaluate(
            self._run,
            datasets.strips(data, "test"),
            self.spec,
            self.params.inference,
            threshold=self.threshold,
            check=self._check_values,
            progress=progress,
        )

    def _run(self, planes_BCHW: Array) -> Array:
        return self.engines["segment"].run({"planes": planes_BCHW})["logits"]

    def _check_values(self, image: Array) -> None:
        """Refuse an image whose mean no capture of this sensor can have."""
        planes.check_planes(image)
        low, high = self.params.value_range
        mean = float(image.mean(dtype=np.float64))
        if not low <= mean <= high:
            raise InputError(
                f"planes have a mean of {mean:g}, the sensor's range is {low:g} to {high:g}",
                fix="give the sensor's own values, or train with their value_range",
            )


def _split(planes_HWC: Array) -> tuple[Array, Array, Array]:
    target, first, second = planes_HWC.astype(np.float32).transpose(2, 0, 1)
    return target, first, second
