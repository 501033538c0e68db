"""Mixed 16-bit graphs, and TensorRT plans for this machine: the stages settle, halves and plans.

The 16-bit graphs are held against float32 on what the deployed system feeds them; of a plan it is
noted what it was built from and on. Needs no torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from engineworks.calibration.samples import choose
from engineworks.export.halve import HalfType, halve, num_half, rounded
from engineworks.export.job import Job
from engineworks.export.parity import Feeds, Parity, compare, outputs, record
from engineworks.export.passes import before_choice, given_choice, telling_choice
from engineworks.runtime.bundle import Bundle, GraphEntry, sha256_file
from engineworks.runtime.contenders import images_for
from engineworks.runtime.engines import BACKENDS
from engineworks.runtime.engines.ort import OrtEngine
from engineworks.runtime.errors import BackendError, BundleError, ParityError, UsageError
from engineworks.runtime.plans import (
    DEFAULT_BATCH,
    PLANS,
    PROVENANCE,
    AxisRanges,
    PlanConfig,
    PlanOrigin,
    Profile,
    ShapeRange,
    this_machine,
)
from engineworks.runtime.systems import reader_of
from engineworks.runtime.tensors import Array, TensorSpec

# what a 16-bit graph must keep of every output's direction, on average over its rows
MIN_COSINE = 0.999
_PARITY_SAMPLES = 8


def settle(job: Job) -> None:
    """Settle the shapes of all plans, before the long work.

    Raises:
        UsageError: profiles that do not name the free axes.
        BackendError: TensorRT is not here.
        BundleError: the bundle has and gets no INT8 graphs to build plans of.
    """
    config, graphs = job.config, job.manifest.graphs
    has_int8 = config.int8 or all("int8" in graph.variants for graph in graphs.values())
    if "int8" in config.plans and not has_int8:
        raise BundleError(
            f"bundle {job.bundle.root} has no INT8 graphs to build plans of",
            fix="export with --int8 --samples DIR first",
        )
    _check_tensorrt()
    job.profiles = {name: profiles_of(name, graph, config.plan) for name, graph in graphs.items()}
    _check_axes(graphs, config.plan)


def halves(job: Job) -> None:
    """Write the mixed graphs of all types that are needed, held against float32.

    Raises:
        ParityError: a 16-bit graph is too far from float32.
    """
    pictures = _images(job.bundle, job.config.samples)
    feeds = record(job.bundle, pictures, threads=job.config.threads)
    for kind in job.config.half_types:
        _add_half(job, kind, feeds)


def plans(job: Job) -> None:
    """Build the plans for this machine.

    Raises:
        BackendError: TensorRT cannot start.
        ExportError: TensorRT does not take a graph; see ``plan.build_plan``.
    """
    for precision in job.config.plans:
        for name in job.manifest.graphs:
            _add_plan(job, name, precision)


def _check_tensorrt() -> None:
    row = BACKENDS["tensorrt"]
    if importlib.util.find_spec(row.package) is None:
        raise BackendError(
            f"plans cannot be built: the package '{row.package}' is not installed", fix=row.install
        )


def _images(bundle: Bundle, samples: Path | None) -> list[Array]:
    if samples is None:
        return images_for(bundle, None)[:_PARITY_SAMPLES]
    reader = reader_of(bundle.manifest.system)
    return [reader.read(s.path) for s in choose(samples, _PARITY_SAMPLES, 0, reader=reader)]


def _add_half(job: Job, kind: HalfType, feeds: Feeds) -> None:
    """Write the mixed graphs of one type; refuse them where an output turned away."""
    parities: dict[str, Any] = {}
    for name in job.manifest.graphs:
        exact = onnx.load(job.path(name, "float"))
        mixed = halve(exact, kind)
        found = _compare_half(exact, mixed, feeds[name], job.config.threads)
        far = {output: p.cosine for output, p in found.items() if p.cosine < MIN_COSINE}
        if far:
            listed = ", ".join(f"'{output}' {cosine:.5f}" for output, cosine in far.items())
            raise ParityError(
                f"graph '{name}' in {kind} turns its outputs too far away from float32: cosine "
                f"{listed}, at least {MIN_COSINE} is wanted",
                fix="use bf16 where numbers are large, fp16 where they are fine, or float",
            )
        onnx.save(mixed, job.add(name, kind, f"{name}.{kind}.onnx"))
        parities[name] = {output: p.model_dump() for output, p in found.items()}
        job.say(
            f"{name} {kind}: {num_half(mixed)} of {len(exact.graph.node)} nodes in 16 bits, "
            f"cosine {min(p.cosine for p in found.values()):.6f}"
        )
    known = job.manifest.reports.get("parity_half", {})
    job.report(parity_half={**known, kind: parities})


def _compare_half(
    exact: onnx.ModelProto,
    mixed: onnx.ModelProto,
    feeds: Sequence[Mapping[str, Array]],
    threads: int | None,
) -> dict[str, Parity]:
    """Per output, the mixed graph against the float32 one.

    Measured on its float32 twin that rounds every 16-bit result: ONNX Runtime on the CPU computes
    most float16 nodes in float32, without rounding in between, and has no bfloat16. What is chosen
    is compared before the choice, or, where much follows on it, behind the choice of the exact one.
    """
    telling, chosen = telling_choice(before_choice(exact))
    with closing(OrtEngine(telling.SerializeToString(), threads=threads)) as engine:
        want = [dict(engine.run(feed)) for feed in feeds]
    told = [
        {**feed, **{n: found.pop(n) for n in chosen}}
        for feed, found in zip(feeds, want, strict=True)
    ]
    given = given_choice(before_choice(rounded(mixed))).SerializeToString()
    with closing(OrtEngine(given, threads=threads)) as engine:
        got = outputs(engine, told)
    return compare(got, {name: np.concatenate([each[name] for each in want]) for name in want[0]})


def profiles_of(graph: str, entry: GraphEntry, config: PlanConfig) -> list[Profile]:
    """The shapes that a configuration's axis ranges mean for one graph.

    Raises:
        UsageError: a free axis of the graph has no range, and is no batch.
    """
    free = {axis for spec in entry.inputs.values() for axis in spec.shape if isinstance(axis, str)}
    profiles: list[Profile] = []
    for number, given in enumerate(config.profiles or ({},)):
        ranges = {"batch": DEFAULT_BATCH, **given}
        if missing := sorted(free - set(ranges)):
            example = ",".join(f"{axis}=MIN:OPT:MAX" for axis in sorted(free))
            raise UsageError(
                f"profile {number} has no range for {', '.join(missing)} of graph '{graph}'",
                fix=f"pass --profile {example}",
            )
        profiles.append(
            {
                name: ShapeRange(*(_sizes(spec, ranges, which) for which in range(3)))
                for name, spec in entry.inputs.items()
                if free & set(spec.shape)
            }
        )
    return profiles if free else []


def _sizes(spec: TensorSpec, ranges: AxisRanges, which: int) -> tuple[int, ...]:
    return tuple(ranges[axis][which] if isinstance(axis, str) else axis for axis in spec.shape)


def _check_axes(graphs: Mapping[str, GraphEntry], config: PlanConfig) -> None:
    specs = [spec for graph in graphs.values() for spec in graph.inputs.values()]
    known = {axis for spec in specs for axis in spec.shape if isinstance(axis, str)}
    for profile in config.profiles:
        if unknown := sorted(set(profile) - known):
            raise UsageError(
                f"no graph has a free axis {', '.join(unknown)}",
                fix=f"the free axes are {', '.join(sorted(known)) or '(none)'}",
            )


def _add_plan(job: Job, graph: str, precision: str) -> None:
    """Build one plan and note where it comes from."""
    from engineworks.export.plan import (  # needs TensorRT, which 16-bit graphs do not
        build_plan,
        cache_name,
    )

    config = job.config
    variant, source = PLANS[precision]
    path, machine = job.path(graph, source), this_machine()
    label = f"{graph} {variant}"
    cache = None
    if config.timing_cache is not None:
        config.timing_cache.mkdir(parents=True, exist_ok=True)
        cache = config.timing_cache / cache_name(machine)
    plan = build_plan(
        path.read_bytes(),
        config.plan,
        job.profiles[graph],
        timing_cache=cache,
        progress=partial(job.progress, label),
    )
    job.add(graph, variant, f"{graph}.{precision}.plan").write_bytes(plan.data)
    origin = PlanOrigin(
        source=source, source_sha256=sha256_file(path), machine=machine, config=config.plan
    )
    known = job.manifest.provenance.get(PROVENANCE, {})
    of_graph = {**known.get(graph, {}), variant: origin.model_dump(mode="json")}
    job.update(provenance={**job.manifest.provenance, PROVENANCE: {**known, graph: of_graph}})
    job.say(f"{label}: {plan.num_layers} layers, {len(plan.data)} bytes, {plan.seconds:.1f} s")
