"""Test doubles for this project's tests and for its users': an engine made of a function, and a
small bundle of real graphs that every command takes. Nothing here needs PyTorch or a download.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engineworks.runtime import images, planes
from engineworks.runtime.bundle import Bundle, GraphEntry, Manifest, Threshold, write
from engineworks.runtime.engines import BACKENDS, open_engine
from engineworks.runtime.errors import BackendError, EngineError
from engineworks.runtime.files import scratch
from engineworks.runtime.preprocess import PlanesSpec, PreprocessSpec, apply
from engineworks.runtime.references import save_references
from engineworks.runtime.systems import backbone, noising, paco, refdet, stripe
from engineworks.runtime.systems.noising.fit import FitConfig, fit
from engineworks.runtime.tensors import Array, Feeds, TensorSpec, check_feeds, check_host

_STRIDE = 8  # pixels of the input per patch of the tiny graph
_WIDTH = 16  # of its features
_COLOURS = {
    "blue": (0.2, 0.3, 1.0),
    "green": (0.2, 0.9, 0.2),
    "red": (1.0, 0.2, 0.2),
    "violet": (0.7, 0.2, 0.9),
    "white": (1.0, 1.0, 1.0),
    "yellow": (1.0, 0.9, 0.1),
}
_RIDGE = 0.1
_GREY = 128  # ground of a drawn scene
_OBJECT = 3  # side of an object in it, in cells; the scene has 8 rows of 12 cells
_REFERENCE = 32  # side of the pictures that the tiny encoder takes
_NUM_CANDIDATES = 16
_SENSOR = (0.0, 255.0)  # value range of drawn strips
_IMAGE_AMAX, _HIDDEN_AMAX = 3.0, 8.0  # more than drawn images reach, for the INT8 graphs


@dataclass
class FunctionEngine:
    """An engine over a Python function.

    Attributes:
        function: called with the feeds; returns the outputs by name.
        inputs, outputs: specs; both directions are checked against them.
        calls: the feeds of every run so far.
    """

    function: Callable[[Mapping[str, Array]], Mapping[str, Array]]
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    backend: str = "function"
    calls: list[dict[str, Array]] = field(default_factory=list)
    closed: bool = False

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        """See ``runtime.engines.Engine.run``.

        Raises:
            InputError: feeds, or what the function returns, do not fit the specs.
            EngineError: the engine is closed, or was given a stream or device arrays.
        """
        if self.closed:
            raise EngineError("this engine is closed", fix="open it again")
        check_host(feeds, stream, self.backend)
        check_feeds(self.inputs, feeds)
        host = {name: np.array(feed) for name, feed in feeds.items()}
        self.calls.append(host)
        answer = {name: np.array(output) for name, output in self.function(host).items()}
        check_feeds(self.outputs, answer)
        return answer

    def close(self) -> None:
        self.closed = True


def draw_part(
    rng: np.random.Generator, size: tuple[int, int], *, defective: bool
) -> tuple[Array, Array]:
    """A picture of a grey ring on a dark ground, and where it is defective.

    Args:
        size: (height, width) in pixels, at least 32 each.
        defective: a bright scratch crosses it.

    Returns:
        (H, W, 3) uint8 RGB, and a (H, W) bool mask.
    """
    height, width = size
    canvas = np.full((height, width, 3), 60, np.uint8)
    radius = min(size) // 3
    centre = (
        width // 2 + int(rng.integers(-2, 3)),
        height // 2 + int(rng.integers(-2, 3)),
    )
    cv2.circle(canvas, centre, radius, (120, 125, 130), max(2, radius // 3), cv2.LINE_AA)
    marked = np.zeros((height, width), np.uint8)
    if defective:
        angle, length = rng.uniform(0, np.pi), 0.7 * radius
        reach = np.array([np.cos(angle), np.sin(angle)]) * length
        ends = [tuple(int(v) for v in np.round(centre + sign * reach)) for sign in (-1, 1)]
        cv2.line(marked, ends[0], ends[1], 1, max(2, radius // 4))
        canvas[marked > 0] = (250, 240, 60)
    noisy = canvas + rng.normal(0, 3, canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), marked.astype(bool)


def write_parts(
    root: Path,
    *,
    size: tuple[int, int] = (64, 64),
    num_train: int = 8,
    num_good: int = 4,
    num_defective: int = 4,
    seed: int = 0,
) -> Path:
    """An MVTec-style folder of ``draw_part`` pictures, masks included; returns ``root``."""
    rng = np.random.default_rng(seed)
    counts = {"train/good": num_train, "test/good": num_good, "test/scratch": num_defective}
    for folder, count in counts.items():
        for i in range(count):
            image, mask = draw_part(rng, size, defective=folder.endswith("scratch"))
            images.write(root / folder / f"{i:03d}.png", image)
            if mask.any():
                name = f"{i:03d}_mask.png"
                images.write(root / "ground_truth/scratch" / name, mask.astype(np.uint8) * 255)
    return root


def draw_flower(rng: np.random.Generator, size: tuple[int, int], label: str) -> Array:
    """A picture of five petals of one colour on a dark meadow.

    Args:
        size: (height, width) in pixels, at least 32 each.
        label: the colour: blue, green, red, violet, white or yellow.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = size
    red, green, blue = (int(220 * share) for share in _COLOURS[label])
    canvas = np.full((height, width, 3), (40, 60, 30), np.uint8)
    radius, turn = min(size) / 6, rng.uniform(0, 2 * np.pi)
    centre = np.array([width / 2, height / 2]) + rng.uniform(-2, 2, 2)
    for angle in turn + np.arange(5) * (2 * np.pi / 5):
        petal = centre + 1.2 * radius * np.array([np.cos(angle), np.sin(angle)])
        place = (round(petal[0]), round(petal[1]))
        cv2.circle(canvas, place, round(radius), (red, green, blue), cv2.FILLED, cv2.LINE_AA)
    noisy = canvas + rng.normal(0, 5, canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def write_flowers(
    root: Path,
    *,
    size: tuple[int, int] = (64, 64),
    num_train: int = 4,
    num_test: int = 2,
    seed: int = 0,
) -> Path:
    """A folder of ``draw_flower`` pictures by class, in train and test; returns ``root``."""
    rng = np.random.default_rng(seed)
    for split, count in {"train": num_train, "test": num_test}.items():
        for label in _COLOURS:
            for i in range(count):
                path = root / split / label / f"{i:03d}.png"
                images.write(path, draw_flower(rng, size, label))
    return root


def draw_strip(
    rng: np.random.Generator, size: tuple[int, int], *, defective: bool, dtype: str = "uint8"
) -> tuple[Array, Array]:
    """Three captures of one piece of stripes, with a spot that the target shares with a reference.

    Args:
        size: (height, width) in pixels, at least 32 each.
        defective: a second spot is in the target alone.

    Returns:
        (H, W, 3) planes of ``dtype``, in 0 ... 255, and a (H, W) bool mask of the second spot.
    """
    height, width = size
    stripes = 110 + 40 * np.sin(np.arange(width) * (2 * np.pi / 11) + rng.uniform(0, 2 * np.pi))
    planes_HWC = np.broadcast_to(stripes[:, None], (height, width, 3)) + rng.normal(
        0, 3, (height, width, 3)
    )
    spot = np.exp(-(np.square(np.mgrid[-1:2, -1:2]).sum(axis=0)) / (2 * 1.3**2))
    shared = int(rng.integers(4, width // 2 - 4)), int(rng.integers(4, height - 4))
    alone = int(rng.integers(width // 2 + 4, width - 4)), int(rng.integers(4, height - 4))
    marked = np.zeros((height, width), bool)
    x, y = shared
    for plane in (0, int(rng.integers(1, 3))):
        planes_HWC[y - 1 : y + 2, x - 1 : x + 2, plane] += 80 * spot
    if defective:
        x, y = alone
        planes_HWC[y - 1 : y + 2, x - 1 : x + 2, 0] += 80 * spot
        marked[y - 1 : y + 2, x - 1 : x + 2] = True
    return np.clip(planes_HWC, *_SENSOR).astype(dtype), marked


def write_strips(
    root: Path,
    *,
    size: tuple[int, int] = (96, 64),
    num_train: int = 4,
    num_good: int = 4,
    num_defective: int = 4,
    seed: int = 0,
) -> Path:
    """A folder of ``draw_strip`` planes, masks included; returns ``root``."""
    rng = np.random.default_rng(seed)
    counts = {"train/good": num_train, "test/good": num_good, "test/spot": num_defective}
    for folder, count in counts.items():
        for i in range(count):
            strip, mask = draw_strip(rng, size, defective=folder.endswith("spot"))
            planes.write(root / folder / f"{i:03d}.png", strip)
            if mask.any():
                path = root / "ground_truth/spot" / f"{i:03d}_mask.png"
                images.write(path, mask.astype(np.uint8) * 255)
    return root


def draw_scene(
    rng: np.random.Generator, size: tuple[int, int], names: Sequence[str]
) -> tuple[Array, Array]:
    """A picture of coloured squares on grey, which do not touch each other.

    Args:
        size: (height, width) in pixels, multiples of 8 and 12; best as 2 to 3.
        names: their colours, at most six: blue, green, red, violet, white or yellow.

    Returns:
        (H, W, 3) uint8 RGB, and (N, 4) float32 boxes in pixels.
    """
    height, width = size
    cell = np.array([width / 12, height / 8])
    places = [(column, row) for row in (0, 4) for column in (0, 4, 8)]
    chosen = [places[i] for i in rng.permutation(len(places))[: len(names)]]
    corners = (chosen + rng.integers(0, 2, (len(names), 2))).reshape(-1, 2)
    found = np.concatenate([corners * cell, (corners + _OBJECT) * cell], axis=1)
    canvas = np.full((height, width, 3), float(_GREY))
    for name, box in zip(names, found, strict=True):
        x1, y1, x2, y2 = np.rint(box).astype(int)
        canvas[y1:y2, x1:x2] = 255 * np.array(_COLOURS[name])
    noisy = canvas + rng.normal(0, 5, canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8), found.astype(np.float32)


def draw_reference(rng: np.random.Generator, size: tuple[int, int], name: str) -> Array:
    """A picture of one of the squares of ``draw_scene``: (H, W, 3) uint8 RGB."""
    height, width = size
    canvas = np.full((height, width, 3), float(_GREY))
    inner = (slice(height // 4, -height // 4), slice(width // 4, -width // 4))
    canvas[inner] = 255 * np.array(_COLOURS[name])
    noisy = canvas + rng.normal(0, 5, canvas.shape)
    return np.clip(noisy, 0, 255).astype(np.uint8)


def write_references(
    root: Path, names: Sequence[str], *, size: tuple[int, int] = (48, 40), num: int = 2
) -> Path:
    """A folder of ``draw_reference`` pictures per object; returns ``root``."""
    rng = np.random.default_rng(2)
    for name in names:
        for i in range(num):
            images.write(root / name / f"{i}.png", draw_reference(rng, size, name))
    return root


def write_scenes(
    root: Path,
    *,
    size: tuple[int, int] = (64, 96),
    names: Sequence[str] = ("blue", "red", "yellow"),
    num_train: int = 4,
    num_test: int = 4,
    seed: int = 0,
) -> Path:
    """A folder of ``draw_scene`` pictures, their boxes in COCO's form, and references.

    The n-th picture lacks the n-th object, counted in a circle; returns ``root``.
    """
    rng = np.random.default_rng(seed)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    for split, count in {"train": num_train, "test": num_test}.items():
        listed: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(count):
            shown = [name for k, name in enumerate(names) if k != i % len(names)]
            image, found = draw_scene(rng, size, shown)
            file = f"{split}_{i:03d}.png"
            images.write(root / "images" / file, image)
            listed.append({"id": i + 1, "file_name": file, "width": size[1], "height": size[0]})
            for name, (x1, y1, x2, y2) in zip(shown, found.tolist(), strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": i + 1,
                        "category_id": names.index(name) + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        content = {"images": listed, "categories": categories, "annotations": annotations}
        path = root / f"annotations_{split}.json"
        path.write_text(json.dumps(content), encoding="utf-8")
    write_references(root / "references", names)
    return root


def write_tiny_noising_bundle(
    folder: Path,
    *,
    size: tuple[int, int] = (64, 64),
    int8: bool = False,
    graph: onnx.ModelProto | None = None,
    gate: Mapping[str, float] | None = None,
) -> Bundle:
    """A ``noising`` bundle fitted to drawn parts: real graph, bank, statistics, thresholds.

    It tells ``draw_part``'s defective pictures from its good ones.

    Args:
        folder: to make.
        size: (height, width) of the network input, multiples of 8.
        int8: add the variants ``int8`` and ``int8-u8``, with fixed ranges.
        graph: float graph to take in the place of ``tiny_features``; images (batch, 3, H, W) ->
            features (batch, H / 8 * W / 8, D).
        gate: allowed drops; those of the real system where not given.

    Raises:
        BackendError: neither ONNX Runtime nor OpenVINO is installed.
    """
    spec = PreprocessSpec(size=size)
    grid = (size[0] // _STRIDE, size[1] // _STRIDE)
    graphs = {"float": graph or tiny_features(size)}
    if int8:
        graphs["int8"] = tiny_features(size, zero_point=0)
        graphs["int8-u8"] = tiny_features(size, zero_point=128)
    # every signal that is cheap, so that all of the way to a score is walked
    weights = {"distance": 1.0, "influence": 1.0, "concentration": 0.0, "response": 0.0}
    rng = np.random.default_rng(1)
    pictures = [draw_part(rng, size, defective=False)[0] for _ in range(12)]
    with scratch(folder.parent) as work:
        files, entry = _save_graph("features", graphs, work)
        features = _run(work / "features.onnx", apply(spec, pictures))["features"]
        config = FitConfig(
            k=3,
            coreset_ratio=0.3,
            weights=weights,
            smoothing=2.0,
            image_score="patch",
            rule="rank",
            false_reject=0.0,
        )
        fitted = fit(features, grid, size, config, seed=0)
        files["bank.faiss"] = work / "bank.faiss"
        fitted.bank.save(work / "bank.faiss")
        manifest = Manifest(
            system=noising.NAME,
            graphs={"features": entry},
            preprocess=spec,
            thresholds=fitted.thresholds,
            params=fitted.params.model_dump(mode="json"),
            assets={"bank": "bank.faiss"},
            gate={"image_auroc": 0.005, "pixel_auroc": 0.005} if gate is None else dict(gate),
            provenance={"made_by": "engineworks.runtime.testing"},
        )
        return write(folder, manifest, files)


def write_tiny_paco_bundle(
    folder: Path,
    *,
    size: tuple[int, int] = (64, 64),
    int8: bool = False,
    gate: Mapping[str, float] | None = None,
) -> Bundle:
    """A ``paco`` bundle that tells ``draw_flower``'s colours apart, on a real graph.

    Args:
        folder: to make.
        size: (height, width) of the network input, multiples of 4.
        int8: add the variants ``int8`` and ``int8-u8``, with fixed ranges.
        gate: allowed drops; those of the real system where not given.

    Raises:
        BackendError: neither ONNX Runtime nor OpenVINO is installed.
    """
    spec = PreprocessSpec(size=size)
    rng = np.random.default_rng(1)
    labels = tuple(_COLOURS)
    pictures = [draw_flower(rng, size, label) for label in labels for _ in range(8)]
    wanted = np.eye(len(labels)).repeat(8, axis=0)
    zero_points = {"float": None, "int8": 0, "int8-u8": 128} if int8 else {"float": None}
    with scratch(folder.parent) as work:
        # trained by ridge regression on one where the class is right, else zero; then made
        # confident. The ridge keeps the weights small, and so what INT8 does to the answers.
        blank = tiny_classifier(size, np.zeros((len(labels), _WIDTH)), np.zeros(len(labels)))
        _save_graph("blank", {"float": blank}, work)
        embedding = _run(work / "blank.onnx", apply(spec, pictures))["embedding"]
        rows = np.concatenate([embedding, np.ones((len(pictures), 1))], axis=1)
        gram = rows.T @ rows + _RIDGE * np.eye(rows.shape[1])
        solution = 10 * np.linalg.solve(gram, rows.T @ wanted).T
        graphs = {
            variant: tiny_classifier(size, solution[:, :-1], solution[:, -1], zero_point=zero_point)
            for variant, zero_point in zero_points.items()
        }
        files, entry = _save_graph("classify", graphs, work)
        manifest = Manifest(
            system=paco.NAME,
            graphs={"classify": entry},
            preprocess=spec,
            labels=labels,
            params=paco.Params(num_top=3).model_dump(mode="json"),
            gate={"top1": 0.005} if gate is None else dict(gate),
            provenance={"made_by": "engineworks.runtime.testing"},
        )
        return write(folder, manifest, files)


def write_tiny_backbone_bundle(
    folder: Path, *, size: tuple[int, int] = (64, 64), int8: bool = False
) -> Bundle:
    """A ``backbone`` bundle whose vectors are alike for ``draw_flower``'s pictures of one colour.

    It has no weights beside its graph, so that training cannot use it.

    Args:
        folder: to make.
        size: (height, width) of the network input, multiples of 8.
        int8: add the variants ``int8`` and ``int8-u8``, with fixed ranges.
    """
    zero_points = {"float": None, "int8": 0, "int8-u8": 128} if int8 else {"float": None}
    graphs = {name: tiny_maps(size, zero_point=zero) for name, zero in zero_points.items()}
    with scratch(folder.parent) as work:
        files, entry = _save_graph(backbone.GRAPH, graphs, work)
        manifest = Manifest(
            system=backbone.NAME,
            graphs={backbone.GRAPH: entry},
            preprocess=PreprocessSpec(size=size),
            params=backbone.Params(name="tiny").model_dump(mode="json"),
            gate={"top1": 0.01},
            provenance={"made_by": "engineworks.runtime.testing"},
        )
        return write(folder, manifest, files)


def write_tiny_stripe_bundle(
    folder: Path,
    *,
    int8: bool = False,
    gate: Mapping[str, float] | None = None,
    inference: stripe.InferenceConfig | None = None,
) -> Bundle:
    """A ``stripe`` bundle that finds ``draw_strip``'s defects, on a real graph.

    Args:
        folder: to make.
        int8: add the variants ``int8`` and ``int8-u8``, with fixed ranges.
        gate: allowed drops; those of the real system where not given.
        inference: how the graph is used; as by default where not given.
    """
    zero_points = {"float": None, "int8": 0, "int8-u8": 128} if int8 else {"float": None}
    graphs = {name: tiny_segment(zero_point=zero_point) for name, zero_point in zero_points.items()}
    params = stripe.Params(value_range=_SENSOR, inference=inference or stripe.InferenceConfig())
    with scratch(folder.parent) as work:
        files, entry = _save_graph("segment", graphs, work)
        manifest = Manifest(
            system=stripe.NAME,
            graphs={"segment": entry},
            preprocess=PlanesSpec(size=(96, 64), multiple=2),
            thresholds={"candidate": Threshold(value=0.5, source="chosen for drawn strips")},
            params=params.model_dump(mode="json"),
            gate={"pixel_ap": 0.01, "recall_at_1_false": 0.01} if gate is None else dict(gate),
            provenance={"made_by": "engineworks.runtime.testing"},
        )
        return write(folder, manifest, files)


def write_tiny_refdet_bundle(
    folder: Path,
    *,
    size: tuple[int, int] = (64, 96),
    names: Sequence[str] = ("blue", "red"),
    int8: bool = False,
    gate: Mapping[str, float] | None = None,
    inference: refdet.InferenceConfig | None = None,
) -> Bundle:
    """A ``refdet`` bundle that finds ``draw_scene``'s squares by their colour, on real graphs.

    Args:
        folder: to make.
        size: (height, width) of the network input, multiples of 8.
        names: objects that are looked for where nothing else is asked for.
        int8: add the variants ``int8`` and ``int8-u8``, with fixed ranges.
        gate: allowed drops; those of the real system where not given.
        inference: how the graphs are used; as by default where not given.
    """
    zero_points = {"float": None, "int8": 0, "int8-u8": 128} if int8 else {"float": None}
    half = (0.5, 0.5, 0.5)  # grey is 0
    spec = PreprocessSpec(size=size, resize="letterbox", mean=half, std=half, pad_value=_GREY)
    references = spec.model_copy(update={"size": (_REFERENCE, _REFERENCE)})
    params = refdet.Params(
        reference_preprocess=references,
        widths=(3, 3),
        inference=inference or refdet.InferenceConfig(),
    )
    rng = np.random.default_rng(1)
    pictures = {
        name: [draw_reference(rng, (_REFERENCE, _REFERENCE), name) for _ in range(2)]
        for name in names
    }
    with scratch(folder.parent) as work:
        files, graphs = {"references.npz": work / "references.npz"}, {}
        save_references(files["references.npz"], pictures, references)
        for name, make in (("encode", tiny_encode), ("detect", partial(tiny_detect, size))):
            variants = {variant: make(zero_point=point) for variant, point in zero_points.items()}
            more, graphs[name] = _save_graph(name, variants, work)
            files |= more
        manifest = Manifest(
            system=refdet.NAME,
            graphs=graphs,
            preprocess=spec,
            params=params.model_dump(mode="json"),
            assets={"references": "references.npz"},
            gate={"map50_95": 0.01} if gate is None else dict(gate),
            provenance={"made_by": "engineworks.runtime.testing"},
        )
        return write(folder, manifest, files)


def _save_graph(
    name: str, variants: Mapping[str, onnx.ModelProto], folder: Path
) -> tuple[dict[str, Path], GraphEntry]:
    """Write a graph's variants; returns their files and the graph's entry in a manifest."""
    suffix = {variant: "" if variant == "float" else f".{variant}" for variant in variants}
    files = {variant: f"{name}{suffix[variant]}.onnx" for variant in variants}
    for variant, model in variants.items():
        onnx.save(model, folder / files[variant])
    graph = variants["float"].graph
    entry = GraphEntry(inputs=_specs(graph.input), outputs=_specs(graph.output), variants=files)
    return {file: folder / file for file in files.values()}, entry


def _specs(values: Collection[onnx.ValueInfoProto]) -> dict[str, TensorSpec]:
    shapes = {
        value.name: tuple(
            axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim
        )
        for value in values
    }
    dtypes = {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name
        for value in values
    }
    return {name: TensorSpec(dtype=dtypes[name], shape=shape) for name, shape in shapes.items()}


def _run(path: Path, images_BCHW: Array) -> dict[str, Array]:
    for name, row in BACKENDS.items():
        if row.why_not() is None and "float" in row.variants.get("float", ()):
            with closing(open_engine(path, name, threads=1)) as engine:
                return engine.run({"images": images_BCHW})
    raise BackendError("no backend is installed here", fix='pip install "engineworks[cpu]"')


def tiny_features(
    size: tuple[int, int] = (64, 64), *, zero_point: int | None = None, seed: int = 0
) -> onnx.ModelProto:
    """Two convolutions with drawn weights, then a mean over pixels.

    Args:
        size: (height, width) of the input, multiples of 8.
        zero_point: None for the float graph; 0 for canonical int8 Q/DQ pairs, 128 for the same
            numbers with uint8 activations.
        seed: of the weights.

    Returns:
        images (batch, 3, H, W) float32 -> features (batch, H / 8 * W / 8, 16) float32.
    """
    rng = np.random.default_rng(seed)
    net = _Net(zero_point)
    x = net.trunk(rng)
    x = net.add("AveragePool", "pool", [x], kernel_shape=[2, 2], strides=[2, 2])
    shape = net.constant("shape", np.array([0, _WIDTH, -1], np.int64))
    x = net.add("Reshape", "flatten", [x, shape])
    net.add("Transpose", "transpose", [x], output="features", perm=[0, 2, 1])
    patches = size[0] // _STRIDE * (size[1] // _STRIDE)
    outputs = {"features": ("batch", patches, _WIDTH)}
    return net.model({"images": ("batch", 3, *size)}, outputs)


def tiny_maps(
    size: tuple[int, int] = (64, 64), *, zero_point: int | None = None, seed: int = 0
) -> onnx.ModelProto:
    """Two convolutions with drawn weights, then a mean over 2 x 2.

    Args:
        size, zero_point, seed: see ``tiny_features``.

    Returns:
        images (batch, 3, H, W) float32 -> map (batch, 16, H / 8, W / 8) float32.
    """
    net = _Net(zero_point)
    x = net.trunk(np.random.default_rng(seed))
    net.add("AveragePool", "pool", [x], output="map", kernel_shape=[2, 2], strides=[2, 2])
    outputs = {"map": ("batch", _WIDTH, size[0] // _STRIDE, size[1] // _STRIDE)}
    return net.model({"images": ("batch", 3, *size)}, outputs)


def tiny_classifier(
    size: tuple[int, int],
    weight_CF: Array,
    bias_C: Array,
    *,
    zero_point: int | None = None,
    seed: int = 0,
) -> onnx.ModelProto:
    """Two convolutions with drawn weights, a mean over pixels, and a given linear classifier.

    Args:
        size: (height, width) of the input, multiples of 4.
        weight_CF, bias_C: (C, 16) and (C,) of the classifier.
        zero_point, seed: see ``tiny_features``; the classifier is quantized as well.

    Returns:
        images (batch, 3, H, W) -> logits (batch, C), embedding (batch, 16), all float32.
    """
    net = _Net(zero_point)
    x = net.trunk(np.random.default_rng(seed))
    x = net.add("GlobalAveragePool", "pool", [x])
    x = net.add("Flatten", "flatten", [x], output="embedding", axis=1)
    net.linear("classifier", x, weight_CF, bias_C, _HIDDEN_AMAX, output="logits")
    outputs = {"logits": ("batch", len(weight_CF)), "embedding": ("batch", _WIDTH)}
    return net.model({"images": ("batch", 3, *size)}, outputs)


def tiny_segment(*, zero_point: int | None = None) -> onnx.ModelProto:
    """The smaller of a target's differences to two references, smoothed, as a logit per pixel.

    min(u, v) = u - relu(u - v), once for what is brighter and once for what is darker.

    Args:
        zero_point: see ``tiny_features``.

    Returns:
        planes (batch, 3, height, width) -> logits (batch, 1, height, width), both float32: 0 where
        the target differs by 15 from both, rising by 0.4 per unit.
    """
    net = _Net(zero_point)
    differences = np.array([[1, -1, 0], [1, 0, -1], [-1, 1, 0], [-1, 0, 1]])
    smoothing = np.outer([1, 2, 1], [1, 2, 1]) / 16
    weight = differences[:, :, None, None] * smoothing
    x = net.conv("conv1", "planes", weight, 1, _SENSOR[1], pad=1)
    x = net.add("Relu", "relu1", [x])
    parts = np.array([[1, 0, 0, 0], [1, -1, 0, 0], [0, 0, 1, 0], [0, 0, 1, -1]])
    x = net.conv("conv2", x, parts[:, :, None, None], 1, _SENSOR[1])
    x = net.add("Relu", "relu2", [x])
    x = net.conv("conv3", x, 0.4 * np.array([[1, -1, 1, -1]])[:, :, None, None], 1, _SENSOR[1])
    bias = net.constant("bias", np.array(-6, np.float32))
    net.add("Add", "add", [x, bias], output="logits")
    sides = ("height", "width")
    outputs = {"logits": ("batch", 1, *sides)}
    return net.model({"planes": ("batch", 3, *sides)}, outputs)


def tiny_encode(*, zero_point: int | None = None) -> onnx.ModelProto:
    """The mean colour of a picture, as the direction in which it lies from grey.

    Args:
        zero_point: see ``tiny_features``.

    Returns:
        images (batch, 3, 32, 32) -> prototypes (batch, 6), both float32: two equal parts.
    """
    net = _Net(zero_point)
    x = net.add("GlobalAveragePool", "pool", [net.cells()])
    x = net.add("Flatten", "flatten", [x], axis=1)
    x = net.unit("unit", x, 1e-6)
    net.add("Concat", "both", [x, x], output="prototypes", axis=1)
    inputs = {"images": ("batch", 3, _REFERENCE, _REFERENCE)}
    return net.model(inputs, {"prototypes": ("batch", 6)})


def tiny_detect(
    size: tuple[int, int] = (64, 96), *, zero_point: int | None = None
) -> onnx.ModelProto:
    """Places whose 3 x 3 cells of 8 x 8 pixels have the colour of a prototype.

    Args:
        size: (height, width) of the input, multiples of 8.
        zero_point: see ``tiny_features``.

    Returns:
        images (batch, 3, H, W) and prototypes (objects, 6), float32 -> boxes (batch, 16, 4) and
        scores (batch, 16) float32, classes (batch, 16) int64.
    """
    rows, columns = size[0] // _STRIDE, size[1] // _STRIDE
    net = _Net(zero_point)
    x = net.unit("unit", net.cells(), 0.2)  # what is nearly grey stays short
    flat = net.constant("flat", np.array([0, 0, -1], np.int64))
    x = net.add("Reshape", "flatten", [x, flat])
    x = net.add("Concat", "both", [x, x], axis=1)
    x = net.add("MatMul", "compare", ["prototypes", x])
    map_shape = net.constant("map", np.array([0, 0, rows, columns], np.int64))
    x = net.add("Reshape", "unflatten", [x, map_shape])
    x = net.add(
        *("AveragePool", "smooth", [x]),
        kernel_shape=[3, 3],
        pads=[1, 1, 1, 1],
        count_include_pad=1,
    )
    # two equal parts make a similarity of up to 2
    x = net.add("Mul", "sharpen", [x, net.constant("slope", np.array(10, np.float32))])
    x = net.add("Add", "shift", [x, net.constant("border", np.array(-14, np.float32))])
    x = net.add("Reshape", "list", [net.add("Sigmoid", "sigmoid", [x]), flat])
    axis = net.constant("axis", np.array([1], np.int64))
    best = net.add("ReduceMax", "best", [x, axis], keepdims=0)
    kind = net.add("ArgMax", "kind", [x], axis=1, keepdims=0)
    count = net.constant("count", np.array([_NUM_CANDIDATES], np.int64))
    net.add("TopK", "top", [best, count], output="scores", more=["places"], axis=1)
    centres = _STRIDE * (np.indices((columns, rows)).transpose(2, 1, 0) + 0.5)
    half = _STRIDE * _OBJECT / 2
    grid = np.concatenate([centres - half, centres + half], axis=-1)
    anchors = net.constant("anchors", grid.reshape(-1, 4).astype(np.float32))
    net.add("Gather", "boxes", [anchors, "places"], output="boxes", axis=0)
    net.add("GatherElements", "classes", [kind, "places"], output="classes", axis=1)
    return net.model(
        {"images": ("batch", 3, *size), "prototypes": ("objects", 6)},
        {
            "boxes": ("batch", _NUM_CANDIDATES, 4),
            "scores": ("batch", _NUM_CANDIDATES),
            "classes": ("batch", _NUM_CANDIDATES),
        },
        integers=("classes",),
    )


class _Net:
    """Collects the nodes of a small graph."""

    def __init__(self, zero_point: int | None) -> None:
        self._zero_point = zero_point
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Array) -> str:
        self._constants.append(numpy_helper.from_array(value, name))
        return name

    def add(
        self,
        op_type: str,
        name: str,
        inputs: Sequence[str],
        *,
        output: str | None = None,
        more: Sequence[str] = (),
        **attributes: int | Sequence[int],
    ) -> str:
        """A node; returns its first output's name, ``more`` are those of further ones."""
        output = output or f"{name}.out"
        outputs = [output, *more]
        self._nodes.append(helper.make_node(op_type, inputs, outputs, name=name, **attributes))
        return output

    def trunk(self, rng: np.random.Generator) -> str:
        """Two convolutions: (batch, 3, H, W) ``images`` -> (batch, 16, H / 4, W / 4)."""
        x = self.conv("conv1", "images", rng.normal(0, 0.2, (12, 3, 4, 4)), 4, _IMAGE_AMAX)
        x = self.add("Relu", "relu1", [x])
        x = self.conv("conv2", x, rng.normal(0, 0.3, (_WIDTH, 12, 1, 1)), 1, _HIDDEN_AMAX)
        return self.add("Relu", "relu2", [x])

    def cells(self) -> str:
        """Mean colours of ``images`` in cells of 8 x 8 pixels: (batch, 3, H / 8, W / 8)."""
        weight = np.eye(3)[:, :, None, None] * np.full((_STRIDE, _STRIDE), _STRIDE**-2.0)
        return self.conv("cells", "images", weight, _STRIDE, 1)

    def unit(self, name: str, x: str, softness: float) -> str:
        """Axis 1 divided by its length, which ``softness`` is added to."""
        axis = self.constant(f"{name}.axis", np.array([1], np.int64))
        length = self.add("ReduceL2", f"{name}.length", [x, axis], keepdims=1)
        soft = self.constant(f"{name}.softness", np.array(softness, np.float32))
        return self.add("Div", name, [x, self.add("Add", f"{name}.sum", [length, soft])])

    def conv(
        self, name: str, x: str, weight: Array, stride: int, amax: float, *, pad: int = 0
    ) -> str:
        """A convolution of ``x``; see ``_quantized``."""
        inputs = self._quantized(name, x, weight, amax)
        kernel, strides, pads = list(weight.shape[2:]), [stride] * 2, [pad] * 4
        return self.add("Conv", name, inputs, kernel_shape=kernel, strides=strides, pads=pads)

    def linear(
        self, name: str, x: str, weight: Array, bias: Array, amax: float, *, output: str
    ) -> str:
        """``x @ weight.T + bias``; see ``_quantized``."""
        inputs = self._quantized(name, x, weight, amax)
        inputs.append(self.constant(f"{name}.bias", bias.astype(np.float32)))
        return self.add("Gemm", name, inputs, output=output, transB=1)

    def _quantized(self, name: str, x: str, weight: Array, amax: float) -> list[str]:
        """``x`` and ``weight``, in a quantized graph behind Q/DQ of the one and DQ of the other."""
        values = weight.astype(np.float32)
        if self._zero_point is None:
            return [x, self.constant(f"{name}.weight", values)]
        dtype = np.int8 if self._zero_point == 0 else np.uint8
        pair = [
            self.constant(f"{x}.scale", np.asarray(amax / 127, np.float32)),
            self.constant(f"{x}.zero", np.asarray(self._zero_point, dtype)),
        ]
        q = self.add("QuantizeLinear", f"{x}.quantize", [x, *pair])
        x = self.add("DequantizeLinear", f"{x}.dequantize", [q, *pair])
        scale = np.abs(values).reshape(len(values), -1).max(axis=1) / np.float32(127)
        steps = np.rint(values / scale.reshape(-1, *[1] * (values.ndim - 1))).astype(np.int8)
        parts = {"int8": steps, "scale": scale, "zero": np.zeros(scale.shape, np.int8)}
        names = [self.constant(f"{name}.weight.{k}", v) for k, v in parts.items()]
        return [x, self.add("DequantizeLinear", f"{name}.weight.dequantize", names, axis=0)]

    def model(
        self,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Mapping[str, Sequence[int | str]],
        integers: Collection[str] = (),
    ) -> onnx.ModelProto:
        """The graph from inputs to outputs, float32 but those named as integers, int64."""
        ends = [
            [
                helper.make_tensor_value_info(
                    name, TensorProto.INT64 if name in integers else TensorProto.FLOAT, shape
                )
                for name, shape in end.items()
            ]
            for end in (inputs, outputs)
        ]
        graph = helper.make_graph(self._nodes, "tiny", *ends, self._constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)
