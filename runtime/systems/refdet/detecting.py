"""What a ``refdet`` bundle says of itself, how candidates become objects, and their judging."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from engineworks.runtime import boxes
from engineworks.runtime.errors import NotFiniteError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.metrics import DetectionMetrics, precision_20px, st_iou, success_auc
from engineworks.runtime.objects import Frame, LabelledFrame
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.tensors import Array

# images (B, 3, H, W) and prototypes (N, P), float32 -> boxes (B, M, 4) in pixels of the network's
# input, scores (B, M) in [0, 1], classes (B, M): base classes first, then the prototypes in order
Run = Callable[[Array, Array], tuple[Array, Array, Array]]

_EVALUATION_BATCH = 8
_EVALUATION_CONF = 0.001  # average precision is made of boxes that nobody would be shown as well


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class InferenceConfig(_Part):
    """How a trained network is used.

    Attributes:
        conf: a candidate needs this score to be an object.
        iou: largest overlap of two objects of a name.
        part: largest share of the smaller of two objects of a name that the other may cover; null:
            all of it. For objects of which a part alone is found as well.
        max_objects: of an image.
        max_evaluated: so many frames, evenly spread, are searched for each object in an evaluation,
            half of them with it as far as there are such; null takes all frames.
    """

    conf: float = Field(default=0.25, ge=0, le=1)
    iou: float = Field(default=0.45, ge=0, le=1)
    part: float | None = Field(default=None, ge=0, le=1)
    max_objects: int = Field(default=100, ge=1, le=1_000_000)
    max_evaluated: int | None = Field(default=None, ge=2, le=1 << 31)


class FollowParams(_Part):
    """How an object is looked for around its last place.

    Attributes:
        preprocess: of the pictures that ``follow`` takes.
        share: of such a picture's shorter side, that the object's longer side takes.
        every: each so many frames are searched whole, for objects that came in meanwhile.
        most: more objects than this are not followed: every frame is searched whole.
        nearness: of logits, that a candidate loses for a distance of its longer side.
        steadiness: of logits, that it loses for sides that are twice as long, or half.
        agility: share of a change of its size that is believed at once.
    """

    preprocess: PreprocessSpec
    share: float = Field(gt=0, le=1)
    every: int = Field(default=15, ge=1)
    most: int = Field(default=1, ge=1)
    nearness: float = Field(default=1.0, ge=0)
    steadiness: float = Field(default=1.0, ge=0)
    agility: float = Field(default=0.5, gt=0, le=1)


class Params(_Part):
    """What the bundle of a ``refdet`` system says beyond graphs, labels and preprocessing.

    Attributes:
        reference_preprocess: of the pictures that ``encode`` takes.
        widths: of the parts of a prototype, one per scale; of a template one.
        object_share: ``encode`` takes references with what is around them, and the object's box:
            share of the picture's shorter side that the object's longer side takes. null: it takes
            the object alone.
        learned: names of objects that training has shown.
        at_once: objects that ``detect`` is asked for at once where each is judged by itself: more
            than one where it gives candidates of each, whatever it finds of the others.
        follow: how the graph ``follow`` is used; null: there is none.
    """

    reference_preprocess: PreprocessSpec
    widths: tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...] = Field(min_length=1, max_length=64)
    object_share: float | None = Field(default=None, gt=0, le=1)
    inference: InferenceConfig = InferenceConfig()
    learned: tuple[str, ...] = ()
    at_once: int = Field(default=1, ge=1, le=1024)
    follow: FollowParams | None = None


# --- the mathematics -----------------------------------------------------------------------------


def select(
    boxes_M4: Array,
    scores_M: Array,
    classes_M: Array,
    config: InferenceConfig,
    unwanted: Sequence[int] = (),
) -> tuple[Array, Array, Array]:
    """The objects among the candidates of an image.

    Args:
        boxes_M4, scores_M, classes_M: one image's part of what the ``detect`` graph gives.
        unwanted: classes that are never found; a box of another one goes where one of these
            overlaps it by more than ``iou`` and scores as much.

    Returns:
        (K, 4), (K,), (K,): those that reach ``conf`` and survive suppression, by falling score.
    """
    is_unwanted = np.isin(classes_M, unwanted)
    likely = (scores_M >= config.conf) & ~is_unwanted
    found, scores, classes = boxes_M4[likely], scores_M[likely], classes_M[likely]
    if is_unwanted.any():
        same_KM = boxes.iou(found, boxes_M4[is_unwanted]) > config.iou
        right = ~(same_KM & (scores_M[is_unwanted] >= scores[:, None])).any(axis=1)
        found, scores, classes = found[right], scores[right], classes[right]
    kept = boxes.nms(
        found,
        scores,
        classes,
        limit=config.iou,
        max_boxes=config.max_objects,
        part=config.part,
    )
    return found[kept], scores[kept], classes[kept]


def detect(
    run: Run,
    images: Sequence[Array],
    prototypes_NP: Array,
    spec: PreprocessSpec,
    config: InferenceConfig,
    unwanted: Sequence[int] = (),
) -> list[tuple[Array, Array, Array]]:
    """Objects in images, the same in validation, the gate and inference.

    Args:
        images: (H, W, 3) uint8 RGB each, of any sizes, at least one.
        prototypes_NP: float32, N >= 1.
        unwanted: see ``select``.

    Returns:
        Per image boxes (K, 4) float32 in its pixels, none of them empty, scores (K,) and classes
        (K,), by falling score.

    Raises:
        InputError: an image of another dtype or layout.
        NotFiniteError: the network's boxes or scores are not finite.
    """
    sizes = [_size(image) for image in images]
    return _detect(run, apply(spec, images), sizes, prototypes_NP, spec, config, unwanted)


def candidates(
    run: Run, images_BCHW: Array, prototypes_NP: Array, graph: str = "detect"
) -> tuple[Array, Array, Array]:
    """What a graph answers, see ``Run``.

    Raises:
        NotFiniteError: its boxes or scores are not finite.
    """
    boxes_BM4, scores_BM, classes_BM = run(images_BCHW, prototypes_NP)
    if not (np.isfinite(boxes_BM4).all() and np.isfinite(scores_BM).all()):
        raise NotFiniteError(  # a NaN would pass for a low score
            f"the '{graph}' graph gave values that are not finite",
            fix="run with --precision float, or export again",
        )
    return boxes_BM4, scores_BM, classes_BM


def _detect(
    run: Run,
    images_BCHW: Array,
    sizes: Sequence[tuple[int, int]],
    prototypes_NP: Array,
    spec: PreprocessSpec,
    config: InferenceConfig,
    unwanted: Sequence[int] = (),
) -> list[tuple[Array, Array, Array]]:
    """The same for images that are network input already; ``sizes`` are theirs before that."""
    answers = []
    found_B = zip(*candidates(run, images_BCHW, prototypes_NP), strict=True)
    for (height, width), (found, scores, classes) in zip(sizes, found_B, strict=True):
        found, scores, classes = select(found, scores, classes, config, unwanted)
        found = boxes.to_image(found, spec, height, width)
        inside = boxes.areas(found) > 0
        answers.append((found[inside], scores[inside], classes[inside]))
    return answers


# --- judging -------------------------------------------------------------------------------------


def evaluate(
    run: Run,
    prototypes: Mapping[str, Array],
    frames: Sequence[LabelledFrame],
    read: Callable[[Frame], Array],
    spec: PreprocessSpec,
    config: InferenceConfig,
    *,
    labels: Sequence[str] = (),
    learned: Collection[str] = (),
    at_once: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Metrics of a network; one ruler for validation and for the INT8 gate.

    Frames are searched for each object by itself, and only its boxes count. Whether the references
    matter at all shows when the object is looked for with another one's prototype, the next in
    alphabetical order. Base classes that a frame shows are judged as they are found beside all
    objects at once.

    Args:
        run: the network.
        prototypes: object -> (P,) float32; each object is judged.
        frames: with all boxes of these objects.
        read: decodes a frame.
        labels: base classes, which are no prototypes.
        learned, at_once: see ``Params``.
        progress: called with (frames done, frames in all).

    Returns:
        map50, map50_95, peak_in_box and recall_fp1, see ``runtime.metrics.DetectionMetrics``;
        map50_present and map50_95_present, the same of the frames alone that show the object, as
        one-shot detection is judged in the literature (Michaelis et al., arXiv 1811.11507);
        map50_swapped, the same as map50 with the other prototype, where there are at least two
        objects; map50_seen, map50_novel, both with map50_95 as well, and map50_novel_to_seen, their
        ratio, where some of the objects were learned and some not; map50_base and map50_95_base, of
        the base classes, where a frame shows one; and, where frames are of videos, st_iou,
        success_auc and precision_20px, see ``runtime.metrics``:
        means over the objects of the videos, at ``config.conf``. Decisions: objects missed and
        boxes false, at ``config.conf``.
    """
    names = sorted(prototypes)
    other = dict(zip(names, [*names[1:], *names[:1]], strict=True))
    searched = {name: _chosen(frames, name, config.max_evaluated) for name in names}
    needed = {other[name]: searched[other[name]] | searched[name] for name in names}
    generous = config.model_copy(update={"conf": min(config.conf, _EVALUATION_CONF)})
    own, present, swapped, base = (DetectionMetrics() for _ in range(4))
    parts = {"seen": DetectionMetrics(), "novel": DetectionMetrics()}
    shown = sorted({name for frame in frames for name in frame.objects}.intersection(labels))
    everything_NP = np.stack([prototypes[name] for name in names])
    tubes: dict[tuple[str, str], _Tube] = defaultdict(_Tube)
    for start in range(0, len(frames), _EVALUATION_BATCH):
        stop = min(start + _EVALUATION_BATCH, len(frames))
        places = [i for i in range(start, stop) if any(i in each for each in needed.values())]
        pictures = [read(frames[i].frame) for i in places]
        batch = apply(spec, pictures)
        answers: dict[tuple[str, int], tuple[Array, Array]] = {}
        for first in range(0, len(names), at_once):
            asked = names[first : first + at_once]
            rows = [row for row, i in enumerate(places) if any(i in needed[n] for n in asked)]
            if not rows:
                continue
            sizes = [_size(pictures[row]) for row in rows]
            prototypes_NP = np.stack([prototypes[name] for name in asked])
            each = generous.model_copy(update={"max_objects": len(asked) * generous.max_objects})
            its = batch if len(rows) == len(batch) else batch[rows]  # the same array: seen once
            found = _detect(run, its, sizes, prototypes_NP, spec, each)
            for row, (boxes_K4, scores_K, classes_K) in zip(rows, found, strict=True):
                for kind, name in enumerate(asked, len(labels)):
                    of_it = classes_K == kind
                    answers[name, places[row]] = boxes_K4[of_it], scores_K[of_it]
        for i, name in product(places, names):
            if i not in searched[name]:
                continue
            truth_M4 = _truth(frames[i], name)
            own.update(i, name, *answers[name, i], truth_M4)
            if len(truth_M4):
                present.update(i, name, *answers[name, i], truth_M4)
            swapped.update(i, name, *answers[other[name], i], truth_M4)
            part = parts["seen" if name in learned else "novel"]
            part.update(i, name, *answers[name, i], truth_M4)
            if (video := frames[i].video) is not None:
                tubes[video, name].add(i, *answers[name, i], truth_M4, config.conf)
        if shown and places:
            sizes = [_size(picture) for picture in pictures]
            found = _detect(run, batch, sizes, everything_NP, spec, generous)
            for i, (boxes_K4, scores_K, classes_K) in zip(places, found, strict=True):
                for name in shown:
                    its = classes_K == labels.index(name)
                    base.update(i, name, boxes_K4[its], scores_K[its], _truth(frames[i], name))
        if progress:
            progress(stop, len(frames))
    judged = own.evaluation(config.conf)
    metrics = dict(judged.metrics)
    metrics |= {f"{key}_present": value for key, value in present.compute().items()}
    if len(names) > 1 and metrics:
        metrics["map50_swapped"] = swapped.compute()["map50"]
    divided = {name: part.compute() for name, part in parts.items()}
    if all(divided.values()):
        for part_name, found_there in divided.items():
            metrics |= {f"{key}_{part_name}": value for key, value in found_there.items()}
        if metrics["map50_seen"] > 0:
            metrics["map50_novel_to_seen"] = metrics["map50_novel"] / metrics["map50_seen"]
    metrics |= {f"{key}_base": value for key, value in base.compute().items()}
    if seen := [tube for tube in tubes.values() if tube.truth]:
        for key, measure in _OF_TUBES.items():
            metrics[key] = sum(measure(each.found, each.truth) for each in seen) / len(seen)
    return replace(judged, metrics=metrics)


_OF_TUBES = {"st_iou": st_iou, "success_auc": success_auc, "precision_20px": precision_20px}


class _Tube:
    """An object in a video: frame -> its best box, and frame -> its true ones."""

    def __init__(self) -> None:
        self.found: dict[int, Array] = {}
        self.truth: dict[int, Array] = {}

    def add(
        self, frame: int, boxes_K4: Array, scores_K: Array, truth_M4: Array, conf: float
    ) -> None:
        if len(scores_K) and scores_K[0] >= conf:
            self.found[frame] = boxes_K4[0]
        if len(truth_M4):
            self.truth[frame] = truth_M4


def _chosen(frames: Sequence[LabelledFrame], name: str, limit: int | None) -> set[int]:
    """Places of the frames that are searched for an object; see ``InferenceConfig``."""
    with_it = [i for i, frame in enumerate(frames) if name in frame.objects]
    without = sorted(set(range(len(frames))) - set(with_it))
    if limit is None or limit >= len(frames):
        return {*with_it, *without}
    num_with = min(len(with_it), max(limit // 2, limit - len(without)))
    return {*_spread(with_it, num_with), *_spread(without, limit - num_with)}


def _spread(places: Sequence[int], num: int) -> list[int]:
    return [places[i * len(places) // num] for i in range(num)]


def _truth(frame: LabelledFrame, name: str) -> Array:
    return np.asarray(frame.boxes_N4[[each == name for each in frame.objects]])


def _size(image: Array) -> tuple[int, int]:
    return image.shape[0], image.shape[1]
