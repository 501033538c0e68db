"""``refdet``: where in this image are the objects of which these are pictures?

Two graphs. ``encode`` turns a reference, a picture of an object, into a row; the mean of an
object's rows is its prototype. ``detect`` takes frames together with the prototypes of the objects
that are looked for, the prompt, so that it can be changed at any time. It gives its best candidates
as boxes and scores; non-maximum suppression stands outside of it.

Source: prototypes of Snell et al., "Prototypical Networks for Few-shot Learning", 2017, averaged
for each scale of a feature pyramid.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from engineworks.runtime import boxes, draw, files
from engineworks.runtime.bundle import Bundle, write
from engineworks.runtime.contract import Contract, Signature
from engineworks.runtime.errors import (
    DatasetError,
    EngineError,
    InputError,
    NotFiniteError,
)
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.frames import Frames
from engineworks.runtime.labels import Labelled
from engineworks.runtime.metrics import DetectionMetrics, st_iou
from engineworks.runtime.objects import Frame, LabelledFrame, object_labels, read_objects
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.references import (
    Prototypes,
    References,
    average,
    decode_references,
    read_references,
    save_references,
)
from engineworks.runtime.results import Detection, Detections
from engineworks.runtime.sources import PICTURES
from engineworks.runtime.systems.opened import OpenedSystem
from engineworks.runtime.tensors import Array

NAME = "refdet"

# images (B, 3, H, W) and prototypes (N, P), float32 -> boxes (B, M, 4) in pixels of the network's
# input, scores (B, M) in [0, 1], classes (B, M): base classes first, then the prototypes in order
Run = Callable[[Array, Array], tuple[Array, Array, Array]]

_ENCODE_BATCH = 4
_EVALUATION_BATCH = 8
_EVALUATION_CACHE_BYTES = 32 << 20  # of decoded frames: each is judged once, references share some
_EVALUATION_CONF = 0.001  # average precision is made of boxes that nobody would be shown as well


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class InferenceConfig(_Part):
    """How a trained network is used.

    Attributes:
        conf: a candidate needs this score to be an object.
        iou: largest overlap of two objects of a name.
        max_objects: of an image.
        max_evaluated: so many frames, evenly spread, are searched for each object in an evaluation,
            half of them with it as far as there are such; null takes all frames.
    """

    conf: float = Field(default=0.25, ge=0, le=1)
    iou: float = Field(default=0.45, ge=0, le=1)
    max_objects: int = Field(default=100, ge=1, le=1_000_000)
    max_evaluated: int | None = Field(default=None, ge=2, le=1 << 31)


class Params(_Part):
    """What the bundle of a ``refdet`` system says beyond graphs, labels and preprocessing.

    Attributes:
        reference_preprocess: of the pictures that ``encode`` takes.
        widths: of the parts of a prototype, one per scale.
    """

    reference_preprocess: PreprocessSpec
    widths: tuple[Annotated[int, Field(ge=1, le=1 << 20)], ...] = Field(min_length=1, max_length=64)
    inference: InferenceConfig = InferenceConfig()


def contract(bundle: Bundle) -> Contract:
    """What this system demands of its bundle."""
    params = bundle.params(Params)
    height, width = bundle.manifest.preprocess.size
    rows, columns = params.reference_preprocess.size
    return Contract(
        preprocess=PreprocessSpec,
        graphs={
            "encode": Signature({"images": "R3hw"}, {"prototypes": "RP"}),
            "detect": Signature(
                {"images": "B3HW", "prototypes": "NP"},
                {"boxes": "BM4", "scores": "BM", "classes": "BM"},
                integers=frozenset({"classes"}),
            ),
        },
        sizes={"H": height, "W": width, "h": rows, "w": columns, "P": sum(params.widths), "4": 4},
        assets=("references",),
    )


# --- the mathematics -----------------------------------------------------------------------------


def select(
    boxes_M4: Array, scores_M: Array, classes_M: Array, config: InferenceConfig
) -> tuple[Array, Array, Array]:
    """The objects among the candidates of an image.

    Args:
        boxes_M4, scores_M, classes_M: one image's part of what the ``detect`` graph gives.

    Returns:
        (K, 4), (K,), (K,): those that reach ``conf`` and survive suppression, by falling score.
    """
    likely = scores_M >= config.conf
    found, scores, classes = boxes_M4[likely], scores_M[likely], classes_M[likely]
    kept = boxes.nms(found, scores, classes, limit=config.iou, max_boxes=config.max_objects)
    return found[kept], scores[kept], classes[kept]


def detect(
    run: Run,
    images: Sequence[Array],
    prototypes_NP: Array,
    spec: PreprocessSpec,
    config: InferenceConfig,
) -> list[tuple[Array, Array, Array]]:
    """Objects in images, the same in validation, the gate and inference.

    Args:
        images: (H, W, 3) uint8 RGB each, of any sizes, at least one.
        prototypes_NP: float32, N >= 1.

    Returns:
        Per image boxes (K, 4) float32 in its pixels, none of them empty, scores (K,) and classes
        (K,), by falling score.

    Raises:
        InputError: an image of another dtype or layout.
        NotFiniteError: the network's boxes or scores are not finite.
    """
    sizes = [_size(image) for image in images]
    return _detect(run, apply(spec, images), sizes, prototypes_NP, spec, config)


def _detect(
    run: Run,
    images_BCHW: Array,
    sizes: Sequence[tuple[int, int]],
    prototypes_NP: Array,
    spec: PreprocessSpec,
    config: InferenceConfig,
) -> list[tuple[Array, Array, Array]]:
    """The same for images that are network input already; ``sizes`` are theirs before that."""
    boxes_BM4, scores_BM, classes_BM = run(images_BCHW, prototypes_NP)
    if not (np.isfinite(boxes_BM4).all() and np.isfinite(scores_BM).all()):
        raise NotFiniteError(  # a NaN would pass for a low score
            "the 'detect' graph gave values that are not finite",
            fix="run with --precision float, or export again",
        )
    answers = []
    candidates = zip(boxes_BM4, scores_BM, classes_BM, strict=True)
    for (height, width), (found, scores, classes) in zip(sizes, candidates, strict=True):
        found, scores, classes = select(found, scores, classes, config)
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
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Metrics of a network; one ruler for validation and for the INT8 gate.

    Frames are searched for one object at a time, and only its boxes count. Whether the references
    matter at all shows when the object is looked for with another one's prototype, the next in
    alphabetical order. Base classes that a frame shows are judged as they are found beside all
    objects at once.

    Args:
        run: the network.
        prototypes: object -> (P,) float32; each object is judged.
        frames: with all boxes of these objects.
        read: decodes a frame.
        labels: base classes, which are no prototypes.
        progress: called with (frames done, frames in all).

    Returns:
        map50 and map50_95, see ``runtime.metrics.DetectionMetrics``; map50_swapped, the same as
        map50 with the other prototype, where there are at least two objects; map50_base and
        map50_95_base, of the base classes, where a frame shows one; and, where frames are of
        videos, st_iou: the mean of ``runtime.metrics.st_iou`` over the objects of the videos,
        at ``config.conf``. Decisions: objects missed and boxes false, at ``config.conf``.
    """
    names = sorted(prototypes)
    other = dict(zip(names, [*names[1:], *names[:1]], strict=True))
    searched = {name: _chosen(frames, name, config.max_evaluated) for name in names}
    needed = {other[name]: searched[other[name]] | searched[name] for name in names}
    generous = config.model_copy(update={"conf": min(config.conf, _EVALUATION_CONF)})
    own, swapped, base = DetectionMetrics(), DetectionMetrics(), DetectionMetrics()
    shown = sorted({name for frame in frames for name in frame.objects}.intersection(labels))
    everything_NP = np.stack([prototypes[name] for name in names])
    tubes: dict[tuple[str, str], _Tube] = defaultdict(_Tube)
    for start in range(0, len(frames), _EVALUATION_BATCH):
        stop = min(start + _EVALUATION_BATCH, len(frames))
        places = [i for i in range(start, stop) if any(i in each for each in needed.values())]
        pictures = [read(frames[i].frame) for i in places]
        batch = apply(spec, pictures)
        answers: dict[tuple[str, int], tuple[Array, Array]] = {}
        for name in names:
            rows = [row for row, i in enumerate(places) if i in needed[name]]
            if not rows:
                continue
            sizes = [_size(pictures[row]) for row in rows]
            found = _detect(run, batch[rows], sizes, prototypes[name][None], spec, generous)
            for row, (boxes_K4, scores_K, classes_K) in zip(rows, found, strict=True):
                asked = classes_K == len(labels)
                answers[name, places[row]] = boxes_K4[asked], scores_K[asked]
        for i, name in product(places, names):
            if i not in searched[name]:
                continue
            truth_M4 = _truth(frames[i], name)
            own.update(i, name, *answers[name, i], truth_M4)
            swapped.update(i, name, *answers[other[name], i], truth_M4)
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
    if len(names) > 1 and metrics:
        metrics["map50_swapped"] = swapped.compute()["map50"]
    metrics |= {f"{key}_base": value for key, value in base.compute().items()}
    if overlaps := [st_iou(tube.found, tube.truth) for tube in tubes.values() if tube.truth]:
        metrics["st_iou"] = sum(overlaps) / len(overlaps)
    return replace(judged, metrics=metrics)


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


# --- the system ---------------------------------------------------------------------------------


def bring_references(
    bundle: Bundle, pictures: Path, out: Path, *, exist_ok: bool = False
) -> Bundle:
    """Write a bundle that looks for other objects where nothing else is asked for.

    Args:
        pictures: see ``runtime.references.read_references``.

    Raises:
        InputError, ImageError: no references there, or a picture that cannot be read.
        BundleError: ``out`` exists.
    """
    manifest = bundle.manifest
    references = read_references(pictures)
    name = manifest.assets["references"]
    with files.scratch(out.parent) as scratch:
        brought = scratch / Path(name).name
        save_references(brought, references, bundle.params(Params).reference_preprocess)
        content = {each: bundle.path(each) for each in manifest.files} | {name: brought}
        return write(out, manifest, content, replace=exist_ok)


class System(OpenedSystem):
    """An opened ``refdet`` bundle; see ``runtime.systems.System`` and ``Promptable``."""

    reader = PICTURES

    @staticmethod
    def labelled(root: Path) -> Labelled:
        return object_labels(root)

    bring_references = staticmethod(bring_references)

    def set_up(self) -> None:
        manifest, params = self.bundle.manifest, self.bundle.params(Params)
        assert isinstance(manifest.preprocess, PreprocessSpec)
        self.spec = manifest.preprocess
        self.reference_spec = params.reference_preprocess
        self.widths = params.widths
        self.config = params.inference
        self.labels = manifest.labels
        # whatever its precision, a prototype is that of the float graph
        self.encoder = manifest.files[manifest.graphs["encode"].variants["float"]].sha256
        self._prompt: Prototypes | None = None
        self._default: Prototypes | None = None  # the bundle's own, once they are needed

    def encode(self, references: References) -> Prototypes:
        """Turn pictures of objects into their prototypes.

        Args:
            references: name -> (H, W, 3) uint8 RGB pictures of any sizes, at least one.

        Raises:
            InputError: no object, an object without a picture, or what is no picture.
            NotFiniteError: the network's rows are not finite.
        """
        if empty := [name for name, pictures in references.items() if not len(pictures)]:
            raise InputError(
                f"there is no picture of '{empty[0]}'", fix="give at least one for each object"
            )
        pictures = [picture for found in references.values() for picture in found]
        rows = [np.empty((0, sum(self.widths)), np.float32)]
        for start in range(0, len(pictures), _ENCODE_BATCH):
            part = apply(self.reference_spec, pictures[start : start + _ENCODE_BATCH])
            rows.append(self.engines["encode"].run({"images": part})["prototypes"])
        rows_RP = np.concatenate(rows)
        if not np.isfinite(rows_RP).all():
            raise NotFiniteError(
                "the 'encode' graph gave values that are not finite",
                fix="run with --precision float, or export again",
            )
        ends = np.cumsum([len(found) for found in references.values()])[:-1]
        parts = np.split(rows_RP, ends) if references else []
        averages = [average(rows_KP, self.widths) for rows_KP in parts]
        return Prototypes(
            tuple(references), np.reshape(averages, (-1, rows_RP.shape[1])), self.encoder
        )

    def prompt(self, prototypes: Prototypes) -> None:
        """Look for these objects from now on; what ran before does not matter.

        May be called while another thread is in ``infer``: that call ends with the old ones.

        Raises:
            InputError: no prototype, or those of another encoder.
        """
        if prototypes.encoder != self.encoder:
            raise InputError(
                f"the prototypes of {', '.join(prototypes.names)} were made by another encoder "
                f"({prototypes.encoder[:12]}) than that of bundle {self.bundle.root} "
                f"({self.encoder[:12]})",
                fix="make them again: `cli.py refs BUNDLE --refs DIR --out FILE`",
            )
        if not prototypes.names or prototypes.rows_NP.shape[1] != sum(self.widths):
            raise InputError(
                f"prototypes of shape {prototypes.rows_NP.shape} cannot be looked for, the graph "
                f"takes one or more of {sum(self.widths)} values",
                fix="give references of at least one object",
            )
        self._prompt = prototypes

    def configure(self, *, conf: float | None = None, iou: float | None = None) -> None:
        """Change what ``InferenceConfig`` calls so; None leaves it.

        Raises:
            InputError: a value outside of [0, 1].
        """
        changes = {"conf": conf, "iou": iou}
        given = {name: value for name, value in changes.items() if value is not None}
        if wrong := {name: value for name, value in given.items() if not 0 <= value <= 1}:
            raise InputError(f"conf and iou are shares in [0, 1], got {wrong}")
        self.config = self.config.model_copy(update=given)

    def names(self) -> tuple[str, ...]:
        """What is looked for: name of each class."""
        return (*self.labels, *self._prompted().names)

    def feeds(self, images_BCHW: Array) -> dict[str, dict[str, Array]]:
        """What the graphs that run for every batch of frames are fed."""
        rows_NP = self._prompted().rows_NP
        return {"detect": {"images": images_BCHW, "prototypes": rows_NP}}

    def infer(self, images: Sequence[Array]) -> list[Detections]:
        """Look for objects of the base classes, and for those of the prompt.

        Without a prompt these are the objects of the references in the bundle.

        Args:
            images: (H, W, 3) uint8 RGB each, of any sizes.

        Raises:
            InputError: an image of another dtype or layout.
            NotFiniteError: the network's boxes or scores are not finite.
        """
        if not images:
            return []
        prompt = self._prompted()
        names = (*self.labels, *prompt.names)
        answers = detect(self._run, images, prompt.rows_NP, self.spec, self.config)
        return [
            Detections(
                tuple(
                    Detection(names[kind], score, (x1, y1, x2, y2))
                    for (x1, y1, x2, y2), score, kind in zip(
                        boxes_K4.tolist(), scores_K.tolist(), classes_K.tolist(), strict=True
                    )
                )
            )
            for boxes_K4, scores_K, classes_K in answers
        ]

    def draw(self, image: Array, result: Detections) -> Array:
        """The image with a named box around each object."""
        return draw.boxes(
            image,
            [
                draw.Box(
                    found.box, found.name, f"{_number(found.track)}{found.name} {found.score:.2f}"
                )
                for found in result.objects
            ],
        )

    def evaluate(
        self, data: Path, *, progress: Callable[[int, int], None] | None = None
    ) -> Evaluation:
        """Metrics and decisions on the split ``test`` of a folder, one object at a time.

        Its objects are known by the folder's own references, or by the prompt where there is one.

        Args:
            data: see ``runtime.objects.read_objects``.

        Returns:
            See ``evaluate``.

        Raises:
            DatasetError: another layout, or an object that the prompt does not hold.
            ImageError, VideoError: a picture or video that cannot be read.
        """
        found = read_objects(data, "test")
        with closing(Frames(_EVALUATION_CACHE_BYTES)) as frames:
            prompt = self._prompt or self.encode(
                {
                    name: [frames.reference(each) for each in references]
                    for name, references in found.references.items()
                }
            )
            rows = dict(zip(prompt.names, prompt.rows_NP, strict=True))
            if missing := sorted(set(found.references) - set(rows)):
                raise DatasetError(
                    f"{data} has an object '{missing[0]}', of which there is no reference",
                    fix=f"name the references like the objects: {', '.join(found.references)}",
                )
            return evaluate(
                self._run,
                {name: rows[name] for name in found.references},
                found.frames,
                frames.read,
                self.spec,
                self.config,
                labels=self.labels,
                progress=progress,
            )

    def _run(self, images_BCHW: Array, prototypes_NP: Array) -> tuple[Array, Array, Array]:
        answer = self.engines["detect"].run({"images": images_BCHW, "prototypes": prototypes_NP})
        classes, num_names = answer["classes"], len(self.labels) + len(prototypes_NP)
        if classes.size and not 0 <= classes.min() <= classes.max() < num_names:
            raise EngineError(
                f"the 'detect' graph found classes {classes.min()} to {classes.max()}, there are "
                f"{num_names}",
                fix="export the bundle again",
            )
        return answer["boxes"], answer["scores"], classes

    def _prompted(self) -> Prototypes:
        """What is looked for; the bundle's own references are encoded when they are needed."""
        if self._prompt is not None:
            return self._prompt
        if self._default is None:
            content = self.bundle.asset_content("references")
            references = decode_references(content, str(self.bundle.asset("references")))
            self._default = self.encode(references)
        return self._default


def _number(track: int | None) -> str:
    return "" if track is None else f"#{track} "
