"""Float graphs -> INT8 graphs: the stages calibrate, sensitivity and quantize. Needs no torch.

Ranges are measured through the deployed system on chosen samples, by the method that was asked for
or by the one whose INT8 outputs lie nearest to the float ones. From them the canonical Q/DQ graph
and its dialects are made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import onnx

from engineworks.calibration import calibrate as calibration
from engineworks.calibration.samples import choose
from engineworks.calibration.table import Table
from engineworks.export.confidence import confident
from engineworks.export.job import Calibration, Job
from engineworks.export.legality import check_legal
from engineworks.export.openvino import quantize_for_openvino
from engineworks.export.ort import quantize_for_ort, silus
from engineworks.export.parity import answers, compare, outputs, record
from engineworks.export.passes import before_choice
from engineworks.export.quantize import KeepFloat, activations, quantize, to_unsigned
from engineworks.export.sensitivity import sensitivity as costs_of
from engineworks.runtime.bundle import Bundle, Manifest, read, write
from engineworks.runtime.engines import open_engine
from engineworks.runtime.plans import PROVENANCE
from engineworks.runtime.systems import reader_of

# what `--method auto` tries
_CANDIDATES: tuple[tuple[str, float], ...] = (
    ("minmax", 0.0),
    ("percentile", 99.99),
    ("percentile", 99.999),
    ("entropy", 0.0),
    ("mse", 0.0),
)
_PARITY_SAMPLES = 8

# variants that one backend alone runs
OWN = {"int8-openvino": quantize_for_openvino, "int8-ort": quantize_for_ort}


def calibrate(job: Job) -> None:
    """Measure ranges and choose those that INT8 is made with.

    Raises:
        DatasetError: too few samples.
        CalibrationError: a graph gives NaN or infinity.
        UsageError: no such method.
    """
    config, bundle = job.config, job.bundle
    assert config.samples is not None
    reader = reader_of(bundle.manifest.system)
    samples = choose(config.samples, config.num_samples, config.seed, reader=reader)
    floats = {
        name: onnx.load(bundle.path(graph.variants["float"]))
        for name, graph in bundle.manifest.graphs.items()
    }
    keep = {
        name: KeepFloat.model_validate_json(json.dumps(graph.keep_float))
        for name, graph in bundle.manifest.graphs.items()
    }
    tensors = {
        name: list(dict.fromkeys([*activations(model, keep[name]), *silus(model, keep[name])]))
        for name, model in floats.items()
    }
    job.say(f"calibrating on {len(samples)} images, {sum(map(len, tensors.values()))} tensors")
    histograms = calibration.measure(bundle, samples, tensors, threads=config.threads)
    shown = [reader.read(sample.path) for sample in samples[:_PARITY_SAMPLES]]
    feeds = record(bundle, shown, threads=config.threads)
    if config.method == "auto":
        tables = {
            f"{method} {percentile:g}" if method == "percentile" else method: histograms.table(
                method, percentile=percentile or config.percentile
            )
            for method, percentile in _CANDIDATES
        }
    else:
        tables = {"": histograms.table(config.method, percentile=config.percentile)}
    job.calibration = Calibration(
        floats=floats,
        keep=keep,
        feeds=feeds,
        table=next(iter(tables.values())),
        errors={},
        num_samples=len(samples),
        usual=histograms.usual,
    )
    if len(tables) > 1:
        _take_nearest(job, tables)


def _take_nearest(job: Job, tables: Mapping[str, Table]) -> None:
    """Of several tables, the one with the smallest output error."""
    made, threads = job.calibration, job.config.threads
    want = answers(job.bundle, "ort", "float", made.feeds, threads=threads)
    errors: dict[str, float] = {}
    for label, table in tables.items():
        worst = 0.0
        for name, model in made.floats.items():
            means = table.means(name)
            graph = quantize(before_choice(model), table.amax(name), made.keep[name], means=means)
            model_bytes = to_unsigned(graph).SerializeToString()
            engine = open_engine(model_bytes, "ort", precision="int8", threads=threads)
            with closing(engine):
                found = compare(outputs(engine, made.feeds[name]), want[name])
            worst = max(worst, *(1 - parity.cosine_worst1pct for parity in found.values()))
        errors[label] = worst
        job.say(f"  {label}: cosine of the worst 1 % of vectors {1 - worst:.4f}")
    best = min(errors, key=errors.__getitem__)
    job.say(f"ranges by {best}")
    made.table, made.errors = tables[best], errors


def sensitivity(job: Job) -> None:
    """Measure what each quantized node costs; a gate that fails puts the worst back to float."""
    made = job.calibration
    costs = {}
    for name, model in made.floats.items():
        job.say(f"sensitivity of graph '{name}': one node at a time")
        costs[name] = costs_of(
            before_choice(model),
            made.table.amax(name),
            made.feeds[name][:2],
            made.keep[name],
            means=made.table.means(name),
            threads=job.config.threads,
        )
    made.costs = costs


def quantize_graphs(job: Job) -> None:
    """Make the INT8 graphs; what was made of earlier ones is dropped.

    Raises:
        QuantizationError: a graph that INT8 cannot take.
    """
    job.take(candidate(job, job.bundle, job.room("quantized")))


def candidate(job: Job, bundle: Bundle, folder: Path, *, own: bool = True) -> Bundle:
    """A bundle with INT8 variants of its own, on disk, to be opened and tried.

    Where its system learns how sure it may be, each precision says so in the manifest.

    Args:
        bundle: whose float graphs and assets it has.
        folder: to make.
        own: with graphs that one backend alone runs.
    """
    made, manifest = job.calibration, bundle.manifest
    work = folder / "files"
    work.mkdir(parents=True)
    stale = {
        file
        for graph in manifest.graphs.values()
        for variant, file in graph.variants.items()
        if variant != "float"
    }
    files = {name: bundle.path(name) for name in manifest.files if name not in stale}
    graphs = {}
    for name, model in made.floats.items():
        variants = {"float": manifest.graphs[name].variants["float"]}
        for variant, graph in _quantized(made, name, model, own=own).items():
            file = f"{name}.{variant}.onnx"
            onnx.save(graph, work / file)
            files[file] = work / file
            variants[variant] = file
        graphs[name] = manifest.graphs[name].model_copy(update={"variants": variants})
    made.table.save(work / "calibration.json")
    files["calibration.json"] = work / "calibration.json"
    changed: Manifest = manifest.model_copy(
        update={
            "graphs": graphs,
            "assets": {**manifest.assets, "calibration": "calibration.json"},
            # the plans are dropped with the graphs that they were built from
            "provenance": {k: v for k, v in manifest.provenance.items() if k != PROVENANCE},
        }
    )
    write(folder / "bundle", changed, files)
    config = job.config
    return confident(read(folder / "bundle"), config.evaluation, threads=config.threads)


def _quantized(
    made: Calibration, name: str, model: onnx.ModelProto, *, own: bool
) -> dict[str, onnx.ModelProto]:
    """Variant -> INT8 graph of one float graph."""
    amaxes, means, keep = made.table.amax(name), made.table.means(name), made.keep[name]
    canonical = quantize(model, amaxes, keep, means=means)
    check_legal(canonical)
    found = {"int8": canonical, "int8-u8": to_unsigned(canonical)}
    for variant, quantize_for in OWN.items() if own else ():
        graph = quantize_for(model, amaxes, keep, means=means)
        if graph is not None:
            found[variant] = graph
    return found


def has_own(bundle: Bundle) -> bool:
    """Whether one backend alone runs some of its graphs."""
    return any(OWN.keys() & graph.variants.keys() for graph in bundle.manifest.graphs.values())
