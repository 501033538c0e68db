"""Float bundle -> bundle with INT8 graphs, checked and measured. Needs no torch.

The stage top to bottom: choose samples, measure ranges through the deployed system, pick a range
method, write the canonical Q/DQ graph and its dialects, check legality and parity, hold the task's
metric against the float system's, time both, say what should ship, write the bundle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from engineworks.calibration import calibrate, ranges
from engineworks.calibration.samples import choose
from engineworks.calibration.table import Table
from engineworks.export.gate import evaluate, int8_backends, judge
from engineworks.export.legality import check_legal
from engineworks.export.openvino import quantize_for_openvino
from engineworks.export.ort import quantize_for_ort, silus
from engineworks.export.parity import Feeds, Parity, compare, outputs, record
from engineworks.export.passes import before_choice
from engineworks.export.quantize import KeepFloat, activations, quantize, to_unsigned
from engineworks.export.sensitivity import NodeCost, sensitivity
from engineworks.runtime import bench
from engineworks.runtime.bundle import Bundle, Manifest, check_out, read, write
from engineworks.runtime.engines import BACKENDS, Engine, open_engine
from engineworks.runtime.errors import ExportError, GateError, UsageError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.files import scratch
from engineworks.runtime.plans import PROVENANCE
from engineworks.runtime.systems import open_engines, reader_of, variant_of
from engineworks.runtime.tensors import Array
from engineworks.runtime.verdict import decide, describe, lost

# what `--method auto` tries; the one whose INT8 outputs lie nearest to the float ones is taken
_CANDIDATES: tuple[tuple[str, float], ...] = (
    ("minmax", 0.0),
    ("percentile", 99.99),
    ("percentile", 99.999),
    ("entropy", 0.0),
    ("mse", 0.0),
)
METHODS = ("auto", *ranges.METHODS)
_PARITY_SAMPLES = 8
_MAX_RELAXED = 16
_OWN = {"int8-openvino": quantize_for_openvino, "int8-ort": quantize_for_ort}
_PRECISIONS = ("float", "bf16", "int8", "int8-bf16")  # whose speed the verdict names
_SPEED_SECONDS = 10.0  # per backend
# what this stage writes into the manifest's reports; those of an earlier build are dropped
_REPORTS = (
    "calibration",
    "kept_float",
    "parity_int8",
    "gate",
    "speed",
    "verdict",
    "sensitivity",
    "parity_half",
)

Say = Callable[[str], None]


@dataclass(frozen=True)
class BuildConfig:
    """What ``build`` is asked for.

    Attributes:
        samples: folder of images that the system will meet.
        num_samples: how many of them are shown.
        seed: of their choice.
        method: one of ``METHODS``.
        percentile: of method ``percentile``.
        evaluation: labelled folder for the gate; without one, INT8 does not ship.
        unjudged: ship INT8 that nothing has judged, where it pays.
        sensitivity: measure each node's cost, and put the worst back to float while the gate fails.
        fail_on_drop: raise where the gate fails; needs ``evaluation``.
        threads: CPU threads; None takes all cores that this process may use.
    """

    samples: Path | None = None
    num_samples: int = 64
    seed: int = 0
    method: str = "auto"
    percentile: float = ranges.DEFAULT_PERCENTILE
    evaluation: Path | None = None
    unjudged: bool = False
    sensitivity: bool = False
    fail_on_drop: bool = False
    threads: int | None = None


def build(
    bundle: Bundle, out: Path, config: BuildConfig, *, exist_ok: bool = False, say: Say = print
) -> Bundle:
    """Write ``out``: the bundle's float graphs with INT8 variants, reports and a verdict.

    Args:
        say: called with a line of text per step.

    Raises:
        CalibrationError, QuantizationError: ranges or a graph that INT8 cannot take.
        ExportError, UsageError: no samples, ``fail_on_drop`` without ``evaluation``, or
            ``unjudged`` with it.
        DatasetError: too few samples, or labelled data that give none of the gate's metrics.
        BackendError: no backend that can run INT8 graphs.
        GateError: with ``fail_on_drop``, a metric dropped by more than allowed or could not be
            judged; ``out`` is written all the same.
        BundleError: ``out`` exists.
    """
    if config.samples is None:
        raise ExportError("INT8 needs sample images", fix="pass --samples DIR")
    if config.fail_on_drop and config.evaluation is None:
        raise UsageError("a drop cannot fail without labelled data", fix="pass --eval DIR")
    if config.unjudged and config.evaluation is not None:
        raise UsageError(
            "labelled data judge INT8, --unjudged does not", fix="leave one of them out"
        )
    check_out(out, replace=exist_ok)
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
    say(f"calibrating on {len(samples)} images, {sum(map(len, tensors.values()))} tensors")
    histograms = calibrate.measure(bundle, samples, tensors, threads=config.threads)
    shown = [reader.read(sample.path) for sample in samples[:_PARITY_SAMPLES]]
    feeds = record(bundle, shown, threads=config.threads)

    table, errors = _choose_table(histograms, floats, keep, feeds, config, bundle, say)
    costs: dict[str, list[NodeCost]] = {}
    if config.sensitivity:
        for name, model in floats.items():
            say(f"sensitivity of graph '{name}': one node at a time")
            costs[name] = sensitivity(
                before_choice(model),
                table.amax(name),
                feeds[name][:2],
                keep[name],
                means=table.means(name),
                threads=config.threads,
            )
    with scratch(out.parent) as trial:
        candidate = _assemble(bundle, floats, table, keep, trial / "0")
        want = _judged_float(candidate, config)

        def judged(tried: Bundle) -> dict[str, Any]:
            if want is None or config.evaluation is None:
                return {}
            return judge(tried, want, config.evaluation, threads=config.threads, say=say)

        gate = judged(candidate)
        own = True
        if gate and not gate["passed"] and _has_own(candidate):
            say("gate failed: trying without the graphs that one backend alone runs")
            shared = _assemble(bundle, floats, table, keep, trial / "shared", own=False)
            shared_gate = judged(shared)
            if shared_gate["passed"]:
                own, candidate, gate = False, shared, shared_gate
        count = 1
        while costs and gate and not gate["passed"] and count <= _MAX_RELAXED:
            keep, relaxed = _relax(keep, costs, count)
            say(f"gate failed: back to float: {', '.join(relaxed)}")
            candidate = _assemble(bundle, floats, table, keep, trial / str(count), own=own)
            gate = judged(candidate)
            count *= 2
        parity = _parity(candidate, feeds, config.threads)
        say("timing float against INT8")
        speed = _speed(candidate, feeds, config.threads)
        verdict = decide(gate, speed, unjudged=config.unjudged)
        reports: dict[str, Any] = {
            **{k: v for k, v in bundle.manifest.reports.items() if k not in _REPORTS},
            "calibration": {
                "method": table.method,
                "percentile": table.percentile,
                "num_samples": len(samples),
                "seed": config.seed,
                "output_error": errors,
            },
            "kept_float": {name: sorted(rule.nodes) for name, rule in keep.items() if rule.nodes},
            "parity_int8": parity,
            "gate": gate,
            "speed": speed,
            "verdict": verdict,
        }
        if costs:
            reports["sensitivity"] = {
                name: [asdict(cost) for cost in found] for name, found in costs.items()
            }
        manifest = candidate.manifest.model_copy(update={"reports": reports})
        files = {name: candidate.path(name) for name in candidate.manifest.files}
        built = write(out, manifest, files, replace=exist_ok)
    for line in describe(verdict):
        say(line)
    if config.fail_on_drop:
        _check(gate, out)
    return built


def _check(gate: Mapping[str, Any], out: Path) -> None:
    """Refuse a gate that failed, or that could not judge all that it was to judge."""
    if not gate["passed"]:
        raise GateError(
            f"INT8 lost more than allowed: {lost(gate)}",
            fix="try --sensitivity, another --method, more --samples, or ship float "
            f"(the bundle {out} does)",
        )
    if gate["not_judged"]:
        raise GateError(
            f"the gate could not judge {', '.join(gate['not_judged'])}: the data do not give it",
            fix="complete the labels, e.g. by masks of all defects, or leave --fail-on-drop out",
        )


def _judged_float(candidate: Bundle, config: BuildConfig) -> Evaluation | None:
    """What INT8 is held against; None where that is not asked for."""
    if config.evaluation is None:
        return None
    backend = int8_backends()[0]
    return evaluate(candidate, backend, "float", config.evaluation, threads=config.threads)


def _choose_table(
    histograms: calibrate.Histograms,
    floats: Mapping[str, onnx.ModelProto],
    keep: Mapping[str, KeepFloat],
    feeds: Feeds,
    config: BuildConfig,
    bundle: Bundle,
    say: Say,
) -> tuple[Table, dict[str, float]]:
    """The table of the method asked for, or of the one with the smallest output error."""
    if config.method != "auto":
        return histograms.table(config.method, percentile=config.percentile), {}
    want = _compared(bundle, "ort", "float", feeds, config.threads)
    errors: dict[str, float] = {}
    tables: dict[str, Table] = {}
    for method, percentile in _CANDIDATES:
        label = f"{method} {percentile:g}" if method == "percentile" else method
        tables[label] = histograms.table(method, percentile=percentile or config.percentile)
        worst = 0.0
        for name, model in floats.items():
            table = tables[label]
            means = table.means(name)
            graph = quantize(before_choice(model), table.amax(name), keep[name], means=means)
            model_bytes = to_unsigned(graph).SerializeToString()
            engine = open_engine(model_bytes, "ort", precision="int8", threads=config.threads)
            with closing(engine):
                found = compare(outputs(engine, feeds[name]), want[name])
            worst = max(worst, *(1 - parity.cosine_worst1pct for parity in found.values()))
        errors[label] = worst
        say(f"  {label}: cosine of the worst 1 % of vectors {1 - worst:.4f}")
    best = min(errors, key=errors.__getitem__)
    say(f"ranges by {best}")
    return tables[best], errors


@contextmanager
def _opened(
    bundle: Bundle, backend: str, precision: str, threads: int | None
) -> Iterator[dict[str, Engine]]:
    engines = open_engines(bundle, backend, precision, threads=threads)
    try:
        yield engines
    finally:
        for engine in engines.values():
            engine.close()


def _assemble(
    bundle: Bundle,
    floats: Mapping[str, onnx.ModelProto],
    table: Table,
    keep: Mapping[str, KeepFloat],
    folder: Path,
    *,
    own: bool = True,
) -> Bundle:
    """The bundle with INT8 variants, as a bundle on disk that can be opened and tried.

    Args:
        own: with graphs that one backend alone runs.
    """
    manifest = bundle.manifest
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
    for name, model in floats.items():
        amaxes, means = table.amax(name), table.means(name)
        canonical = quantize(model, amaxes, keep[name], means=means)
        check_legal(canonical)
        written = {"int8": canonical, "int8-u8": to_unsigned(canonical)}
        for variant, quantize_for in _OWN.items() if own else ():
            graph = quantize_for(model, amaxes, keep[name], means=means)
            if graph is not None:
                written[variant] = graph
        variants = {"float": manifest.graphs[name].variants["float"]}
        for variant, graph in written.items():
            file = f"{name}.{variant}.onnx"
            onnx.save(graph, work / file)
            files[file] = work / file
            variants[variant] = file
        graphs[name] = manifest.graphs[name].model_copy(update={"variants": variants})
    table.save(work / "calibration.json")
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
    return read(folder / "bundle")


def _has_own(candidate: Bundle) -> bool:
    return any(_OWN.keys() & graph.variants.keys() for graph in candidate.manifest.graphs.values())


def _relax(
    keep: Mapping[str, KeepFloat], costs: Mapping[str, Sequence[NodeCost]], count: int
) -> tuple[dict[str, KeepFloat], list[str]]:
    """The rule with the ``count`` most expensive nodes of each graph left float."""
    worst = {name: [cost.node for cost in found[:count]] for name, found in costs.items()}
    rules = {name: rule.plus(worst.get(name, ())) for name, rule in keep.items()}
    return rules, [node for nodes in worst.values() for node in nodes]


def _parity(candidate: Bundle, feeds: Feeds, threads: int | None) -> dict[str, Any]:
    """INT8 against float outputs of every graph, per backend."""
    report: dict[str, Any] = {}
    for backend in int8_backends():
        got, want = (_compared(candidate, backend, p, feeds, threads) for p in ("int8", "float"))
        report[backend] = {}
        for name in want:
            found: Mapping[str, Parity] = compare(got[name], want[name])
            report[backend][name] = {k: v.model_dump() for k, v in found.items()}
    return report


def _compared(
    bundle: Bundle, backend: str, precision: str, feeds: Feeds, threads: int | None
) -> dict[str, dict[str, Array]]:
    """Per graph, what can be compared of its outputs; see ``passes.before_choice``."""
    answers = {}
    for name, graph in bundle.manifest.graphs.items():
        variant = variant_of(graph.variants, backend, precision)
        assert variant is not None  # float is in every bundle, INT8 was just written
        model = before_choice(onnx.load(bundle.path(graph.variants[variant])))
        with closing(
            open_engine(model.SerializeToString(), backend, precision=precision, threads=threads)
        ) as engine:
            answers[name] = outputs(engine, feeds[name])
    return answers


def _speed(candidate: Bundle, feeds: Feeds, threads: int | None) -> dict[str, Any]:
    """Float against INT8 network time on one sample, contenders taking turns, per backend.

    Of the graphs that every sample meets: what runs once, when a system is opened, is left out.
    """
    report: dict[str, Any] = {}
    most = max(map(len, feeds.values()))
    every = [name for name, fed in feeds.items() if len(fed) == most]
    for backend in int8_backends():
        with ExitStack() as stack:
            contenders = {}
            for precision in [p for p in _PRECISIONS if p in BACKENDS[backend].variants]:
                engines = stack.enter_context(_opened(candidate, backend, precision, threads))

                def call(engines: Mapping[str, Engine] = engines) -> None:
                    for name in every:
                        engines[name].run(feeds[name][0])

                contenders[precision] = call
            timings = bench.interleave(contenders, max_seconds=_SPEED_SECONDS)
        ratio = bench.ratio(timings["float"], timings["int8"])
        report[backend] = {
            "p50_ms": {name: timing.p50_ms for name, timing in timings.items()},
            "stable": all(timing.stable for timing in timings.values()),
            "int8_speedup": ratio.median,
            "int8_speedup_low": ratio.low,
            "int8_speedup_high": ratio.high,
        }
    return report
