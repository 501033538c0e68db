"""Bundle -> bundle with mixed 16-bit graphs, and with TensorRT plans for this machine. No torch.

The stage top to bottom: write the 16-bit graphs that are asked for and hold them against float32 on
what the deployed system feeds them, build a plan per graph and precision, note what each was built
from and on, write the bundle.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from engineworks.calibration.samples import choose
from engineworks.export.halve import TYPES, HalfType, halve, num_half, rounded
from engineworks.export.parity import Feeds, Parity, compare, outputs, record
from engineworks.export.passes import before_choice
from engineworks.runtime.bundle import Bundle, GraphEntry, Manifest, check_out, sha256_file, write
from engineworks.runtime.contenders import images_for
from engineworks.runtime.engines import BACKENDS
from engineworks.runtime.engines.ort import OrtEngine
from engineworks.runtime.errors import BackendError, BundleError, ParityError, UsageError
from engineworks.runtime.files import scratch
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

Say = Callable[[str], None]


@dataclass(frozen=True)
class DeployConfig:
    """What ``deploy`` is asked for.

    Attributes:
        halves: 16-bit types to write mixed ONNX graphs in.
        plans: precisions to build plans of, names in ``PLANS``; those of 16 bits imply their graph.
        plan: how plans are built.
        timing_cache: folder for timings of kernels; None keeps none.
        samples: folder of images that 16-bit graphs are checked on; None takes seeded noise.
        threads: CPU threads of the check; None takes all cores that this process may use.
    """

    halves: tuple[str, ...] = ()
    plans: tuple[str, ...] = ()
    plan: PlanConfig = field(default_factory=PlanConfig)
    timing_cache: Path | None = None
    samples: Path | None = None
    threads: int | None = None


def deploy(
    bundle: Bundle,
    out: Path,
    config: DeployConfig,
    *,
    exist_ok: bool = False,
    say: Say = print,
    progress: Callable[[str, int, int], None] | None = None,
) -> Bundle:
    """Write ``out``: the bundle with what is asked for beside what it has.

    Args:
        say: called with a line of text per step.
        progress: called with (what, done, of).

    Raises:
        UsageError: an unknown precision, or profiles that do not name the free axes.
        BackendError: TensorRT is not here, or cannot start.
        BundleError: ``out`` exists, or the bundle has no INT8 graphs to build plans of.
        ParityError: a 16-bit graph is too far from float32.
        ExportError: TensorRT does not take a graph; see ``plan.build_plan``.
    """
    if unknown := set(config.plans) - set(PLANS) or set(config.halves) - set(TYPES):
        raise UsageError(
            f"there is no precision {', '.join(sorted(unknown))} here",
            fix=f"plans: {', '.join(PLANS)}; 16-bit graphs: {', '.join(TYPES)}",
        )
    check_out(out, replace=exist_ok)
    graphs = bundle.manifest.graphs
    if "int8" in config.plans and not all("int8" in graph.variants for graph in graphs.values()):
        raise BundleError(
            f"bundle {bundle.root} has no INT8 graphs to build plans of",
            fix="export with --int8 --samples DIR first",
        )
    if config.plans:
        _check_tensorrt()
        # before the long work, and with all graphs' axes in sight
        ranges = {name: profiles_of(name, graph, config.plan) for name, graph in graphs.items()}
        _check_axes(graphs, config.plan)
    halves = [kind for kind in TYPES if kind in (*config.halves, *config.plans)]
    with scratch(out.parent) as folder:
        work = _Work(bundle, folder)
        if halves:
            feeds = record(bundle, _images(bundle, config.samples), threads=config.threads)
            for kind in halves:
                _add_half(work, kind, feeds, config.threads, say)
        for precision in config.plans:
            for name in graphs:
                _add_plan(work, name, precision, ranges[name], config, say, progress)
        return write(out, work.manifest(), work.files, replace=exist_ok)


class _Work:
    """The bundle in the making: its files and variants, and what was learnt on the way."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        self.bundle = bundle
        self.folder = folder
        self.files = {name: bundle.path(name) for name in bundle.manifest.files}
        self.graphs = dict(bundle.manifest.graphs)
        self.origins: dict[str, dict[str, Any]] = {
            name: dict(known)
            for name, known in bundle.manifest.provenance.get(PROVENANCE, {}).items()
        }
        self.parity: dict[str, Any] = dict(bundle.manifest.reports.get("parity_half", {}))

    def add(self, graph: str, variant: str, file: str) -> Path:
        """The place of a new variant's file, listed under its name."""
        entry = self.graphs[graph]
        variants = {**entry.variants, variant: file}
        self.graphs[graph] = entry.model_copy(update={"variants": variants})
        self.files[file] = self.folder / file
        return self.folder / file

    def path(self, graph: str, variant: str) -> Path:
        return self.files[self.graphs[graph].variants[variant]]

    def manifest(self) -> Manifest:
        manifest = self.bundle.manifest
        reports = {**manifest.reports, **({"parity_half": self.parity} if self.parity else {})}
        plans = {PROVENANCE: self.origins} if self.origins else {}
        return manifest.model_copy(
            update={
                "graphs": self.graphs,
                "provenance": {**manifest.provenance, **plans},
                "reports": reports,
            }
        )


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


def _add_half(work: _Work, kind: HalfType, feeds: Feeds, threads: int | None, say: Say) -> None:
    """Write the mixed graphs of one type; refuse them where an output turned away."""
    work.parity[kind] = {}
    for name, graph in work.graphs.items():
        exact = onnx.load(work.bundle.path(graph.variants["float"]))
        mixed = halve(exact, kind)
        found = _compare_half(exact, mixed, feeds[name], threads)
        far = {output: p.cosine for output, p in found.items() if p.cosine < MIN_COSINE}
        if far:
            listed = ", ".join(f"'{output}' {cosine:.5f}" for output, cosine in far.items())
            raise ParityError(
                f"graph '{name}' in {kind} turns its outputs too far away from float32: cosine "
                f"{listed}, at least {MIN_COSINE} is wanted",
                fix="use bf16 where numbers are large, fp16 where they are fine, or float",
            )
        onnx.save(mixed, work.add(name, kind, f"{name}.{kind}.onnx"))
        work.parity[kind][name] = {output: p.model_dump() for output, p in found.items()}
        say(
            f"{name} {kind}: {num_half(mixed)} of {len(exact.graph.node)} nodes in 16 bits, "
            f"cosine {min(p.cosine for p in found.values()):.6f}"
        )


def _compare_half(
    exact: onnx.ModelProto,
    mixed: onnx.ModelProto,
    feeds: Sequence[Mapping[str, Array]],
    threads: int | None,
) -> dict[str, Parity]:
    """Per output, the mixed graph against the float32 one.

    Measured on its float32 twin that rounds every 16-bit result: ONNX Runtime on the CPU computes
    most float16 nodes in float32, without rounding in between, and has no bfloat16.
    """
    answers = []
    for model in (rounded(mixed), exact):
        compared = before_choice(model).SerializeToString()
        with closing(OrtEngine(compared, threads=threads)) as engine:
            answers.append(outputs(engine, feeds))
    return compare(*answers)


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


def _add_plan(
    work: _Work,
    graph: str,
    precision: str,
    profiles: Sequence[Profile],
    config: DeployConfig,
    say: Say,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Build one plan and note where it comes from."""
    from engineworks.export.plan import (  # needs TensorRT, which 16-bit graphs do not
        build_plan,
        cache_name,
    )

    variant, source = PLANS[precision]
    path, machine = work.path(graph, source), this_machine()
    label = f"{graph} {variant}"
    cache = None
    if config.timing_cache is not None:
        config.timing_cache.mkdir(parents=True, exist_ok=True)
        cache = config.timing_cache / cache_name(machine)
    plan = build_plan(
        path.read_bytes(),
        config.plan,
        profiles,
        timing_cache=cache,
        progress=None if progress is None else partial(progress, label),
    )
    work.add(graph, variant, f"{graph}.{precision}.plan").write_bytes(plan.data)
    origin = PlanOrigin(
        source=source, source_sha256=sha256_file(path), machine=machine, config=config.plan
    )
    work.origins.setdefault(graph, {})[variant] = origin.model_dump(mode="json")
    say(f"{label}: {plan.num_layers} layers, {len(plan.data)} bytes, {plan.seconds:.1f} s")
