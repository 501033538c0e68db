"""``refdet``: where in this image are the objects of which these are pictures?

Two graphs. ``encode`` turns a reference, a picture of an object, into a row; the mean of an
object's rows is its prototype. ``detect`` takes frames together with the prototypes of the objects
that are looked for, the prompt, so that it can be changed at any time. It gives its best candidates
as boxes and scores; non-maximum suppression stands outside of it.

Source: prototypes of Snell et al., "Prototypical Networks for Few-shot Learning", 2017, averaged
for each scale of a feature pyramid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

from engineworks.runtime import draw, files
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
from engineworks.runtime.objects import object_labels, read_objects
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.references import (
    NOT,
    Picture,
    Prototypes,
    References,
    View,
    alone,
    average,
    centred,
    decode_references,
    mean_template,
    read_references,
    save_references,
)
from engineworks.runtime.results import Detection, Detections
from engineworks.runtime.sources import PICTURES
from engineworks.runtime.systems.opened import OpenedSystem, in_turn
from engineworks.runtime.systems.refdet.detecting import Params, detect, evaluate
from engineworks.runtime.systems.refdet.following import Follower
from engineworks.runtime.tensors import Array

NAME = "refdet"

_ENCODE_BATCH = 4
_SHOWN, _SHOWN_SIDE = 64, 320  # references on a sheet, and their longer side in pixels
_EVALUATION_CACHE_BYTES = 32 << 20  # of decoded frames: each is judged once, references share some


def contract(bundle: Bundle) -> Contract:
    """What this system demands of its bundle."""
    params = bundle.params(Params)
    height, width = bundle.manifest.preprocess.size
    rows, columns = params.reference_preprocess.size
    encoded = {"images": "R3hw"}
    if params.object_share is not None:
        encoded["boxes"] = "R4"
    sizes = {"H": height, "W": width, "h": rows, "w": columns, "P": sum(params.widths), "4": 4}
    answers = {"boxes": "BM4", "scores": "BM", "classes": "BM"}
    integers = frozenset({"classes"})
    graphs = {
        "encode": Signature(encoded, {"prototypes": "RP"}),
        "detect": Signature({"images": "B3HW", "prototypes": "NP"}, answers, integers),
    }
    if params.follow is not None:
        sizes["Y"], sizes["X"] = params.follow.preprocess.size
        answers = {"boxes": "BL4", "scores": "BL", "classes": "BL"}
        graphs["follow"] = Signature({"images": "B3YX", "prototypes": "NP"}, answers, integers)
    return Contract(
        preprocess=PreprocessSpec,
        graphs=graphs,
        sizes=sizes,
        assets=("references",),
    )


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
    params = bundle.params(Params)
    references = read_references(pictures)
    name = manifest.assets["references"]
    with files.scratch(out.parent) as scratch:
        brought = scratch / Path(name).name
        spec, share = params.reference_preprocess, params.object_share
        save_references(brought, references, spec, share)
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
        self.object_share = params.object_share
        self.widths = params.widths
        self.config = params.inference
        self.learned = frozenset(params.learned)
        self.at_once = params.at_once
        self.following = params.follow
        self.labels = manifest.labels
        # whatever its precision, a prototype is that of the float graph
        self.encoder = manifest.files[manifest.graphs["encode"].variants["float"]].sha256
        self._prompt: Prototypes | None = None
        self._default: Prototypes | None = None  # the bundle's own, once they are needed

    def encode(self, references: References) -> Prototypes:
        """Turn pictures of objects into their prototypes.

        Args:
            references: name -> pictures of any sizes, at least one: of the object alone, (H, W, 3)
                uint8 RGB, or views of it among other things.

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
            feeds = self._references(pictures[start : start + _ENCODE_BATCH])
            rows.append(self.engines["encode"].run(feeds)["prototypes"])
        rows_RP = np.concatenate(rows)
        if not np.isfinite(rows_RP).all():
            raise NotFiniteError(
                "the 'encode' graph gave values that are not finite",
                fix="run with --precision float, or export again",
            )
        ends = np.cumsum([len(found) for found in references.values()])[:-1]
        parts = np.split(rows_RP, ends) if references else []
        averages = [
            average(rows_KP, self.widths) if self.object_share is None else mean_template(rows_KP)
            for rows_KP in parts
        ]
        return Prototypes(
            tuple(references),
            np.reshape(averages, (-1, rows_RP.shape[1])),
            self.encoder,
            pictures=references,
        )

    def _references(self, pictures: Sequence[Picture]) -> dict[str, Array]:
        """What ``encode`` is fed."""
        if self.object_share is None:
            return {"images": apply(self.reference_spec, [alone(each) for each in pictures])}
        views = [centred(self.reference_spec, self.object_share, each) for each in pictures]
        return {
            "images": apply(self.reference_spec, [view.image for view in views]),
            "boxes": np.array([view.box for view in views], np.float32),
        }

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
        if all(name.startswith(NOT) for name in prototypes.names) and prototypes.names:
            raise InputError(
                f"there is nothing to look for but {', '.join(prototypes.names)}",
                fix=f"give references of an object as well: names with '{NOT}' are what it is not",
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

    @in_turn
    def infer(self, images: Sequence[Array]) -> list[Detections]:
        """Look for objects of the base classes, and for those of the prompt.

        Without a prompt these are the objects of the references in the bundle. Those whose names
        begin with ``not-`` are never found: what resembles them more than what is looked for is
        none of it.

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
        unwanted = [i for i, name in enumerate(names) if name.startswith(NOT)]
        answers = detect(self._run, images, prompt.rows_NP, self.spec, self.config, unwanted)
        return [
            Detections(
                tuple(
                    Detection(names[kind], score, (x1, y1, x2, y2))
                    for (x1, y1, x2, y2), score, kind in zip(
                        boxes_K4.tolist(), scores_K.tolist(), classes_K.tolist(), strict=True
                    )
                ),
                border=self.config.conf,
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

    def draw_references(self) -> Array | None:
        """A sheet of the pictures that objects are known by, with their boxes; None where it is a
        file that tells of them.
        """
        drawn = []
        for name, pictures in self._prompted().pictures.items():
            for picture in pictures:
                image, box = (
                    (picture.image, picture.box)
                    if isinstance(picture, View)
                    else (picture, (0.0, 0.0, float(picture.shape[1]), float(picture.shape[0])))
                )
                drawn.append(
                    draw.thumbnail(draw.boxes(image, [draw.Box(box, name, name)]), _SHOWN_SIDE)
                )
        return draw.grid(drawn[:_SHOWN]) if drawn else None

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
                    name: [frames.view(each) for each in references]
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
                learned=self.learned,
                at_once=self.at_once,
                progress=progress,
            )

    def follower(self) -> Follower | None:
        """What goes through one video with the present prompt; None: this bundle cannot follow."""
        if self.following is None:
            return None
        prompt = self._prompted()
        unwanted = [i for i, name in enumerate(prompt.names) if name.startswith(NOT)]
        return Follower(
            lambda image: self.infer([image])[0],
            partial(self._run, graph="follow"),
            prompt.names,
            prompt.rows_NP,
            unwanted,
            self.following,
            self.config,
        )

    def rehearse(self, images: Sequence[Array]) -> None:
        """Look for what is asked for around the middle of each image."""
        if self.following is None:
            return
        spec, share = self.following.preprocess, self.following.share
        rows_NP = self._prompted().rows_NP
        for image in images:
            height, width = image.shape[:2]
            middle = (width / 4, height / 4, 3 * width / 4, 3 * height / 4)
            view = centred(spec, share, View(image, middle))
            self._run(apply(spec, [view.image]), rows_NP, graph="follow")

    def _run(
        self, images_BCHW: Array, prototypes_NP: Array, graph: str = "detect"
    ) -> tuple[Array, Array, Array]:
        answer = self.engines[graph].run({"images": images_BCHW, "prototypes": prototypes_NP})
        classes, num_names = answer["classes"], len(self.labels) + len(prototypes_NP)
        if classes.size and not 0 <= classes.min() <= classes.max() < num_names:
            raise EngineError(
                f"the '{graph}' graph found classes {classes.min()} to {classes.max()}, there are "
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
