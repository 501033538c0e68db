"""A small bundle of real graphs for each system; every command takes them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from engineworks.runtime.bundle import Bundle, GraphEntry, Manifest, Threshold, write
from engineworks.runtime.engines import BACKENDS, open_engine
from engineworks.runtime.errors import BackendError
from engineworks.runtime.files import scratch
from engineworks.runtime.preprocess import PlanesSpec, PreprocessSpec, apply
from engineworks.runtime.references import save_references
from engineworks.runtime.systems import backbone, noising, paco, refdet, stripe
from engineworks.runtime.systems.noising.fit import FitConfig, fit
from engineworks.runtime.systems.refdet import detecting
from engineworks.runtime.tensors import Array, TensorSpec
from engineworks.runtime.testing.drawings import (
    COLOURS,
    GREY,
    SENSOR,
    draw_flower,
    draw_part,
    draw_reference,
)
from engineworks.runtime.testing.graphs import (
    REFERENCE,
    STRIDE,
    WIDTH,
    tiny_classifier,
    tiny_detect,
    tiny_encode,
    tiny_features,
    tiny_maps,
    tiny_segment,
)

_RIDGE = 0.1


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
    grid = (size[0] // STRIDE, size[1] // STRIDE)
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
    labels = tuple(COLOURS)
    pictures = [draw_flower(rng, size, label) for label in labels for _ in range(8)]
    wanted = np.eye(len(labels)).repeat(8, axis=0)
    zero_points = {"float": None, "int8": 0, "int8-u8": 128} if int8 else {"float": None}
    with scratch(folder.parent) as work:
        # trained by ridge regression on one where the class is right, else zero; then made
        # confident. The ridge keeps the weights small, and so what INT8 does to the answers.
        blank = tiny_classifier(size, np.zeros((len(labels), WIDTH)), np.zeros(len(labels)))
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
    params = stripe.Params(value_range=SENSOR, inference=inference or stripe.InferenceConfig())
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
    inference: detecting.InferenceConfig | None = None,
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
    spec = PreprocessSpec(size=size, resize="letterbox", mean=half, std=half, pad_value=GREY)
    references = spec.model_copy(update={"size": (REFERENCE, REFERENCE)})
    params = detecting.Params(
        reference_preprocess=references,
        widths=(3, 3),
        inference=inference or detecting.InferenceConfig(),
    )
    rng = np.random.default_rng(1)
    pictures = {
        name: [draw_reference(rng, (REFERENCE, REFERENCE), name) for _ in range(2)]
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
