"""The accuracy gate: how much of the task's metrics INT8 may lose, and whether that can be told.

A metric fails where its drop exceeds what the recipe allows, whatever the noise; the interval of
the paired bootstrap says whether as many pictures can tell that from noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from engineworks.export.int8 import candidate as make
from engineworks.export.int8 import has_own
from engineworks.export.job import Job, Say
from engineworks.export.quantize import KeepFloat
from engineworks.export.sensitivity import NodeCost
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.engines import BACKENDS
from engineworks.runtime.errors import BackendError, DatasetError, GateError
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.evidence import Drop
from engineworks.runtime.systems import open_system, variant_of
from engineworks.runtime.verdict import lost

_MAX_RELAXED = 16


def hold(job: Job) -> None:
    """Hold INT8 against float; while it fails, leave out what makes it fail.

    First the graphs that one backend alone runs; then, where ``sensitivity`` measured them, the
    most expensive nodes, which go back to float.

    Raises:
        DatasetError: the labelled data give none of the gate's metrics.
    """
    data, made, floats = job.config.evaluation, job.calibration, job.bundle
    assert data is not None
    threads = job.config.threads
    before = evaluate(floats, int8_backends()[0], "float", data, threads=threads)

    def judged(tried: Bundle) -> dict[str, Any]:
        return judge(tried, before, data, threads=threads, say=job.say)

    candidate, own = floats, True
    gate = judged(candidate)
    if not gate["passed"] and has_own(candidate):
        job.say("gate failed: trying without the graphs that one backend alone runs")
        shared = make(job, floats, job.room("shared"), own=False)
        shared_gate = judged(shared)
        if shared_gate["passed"]:
            own, candidate, gate = False, shared, shared_gate
    count = 1
    while made.costs and not gate["passed"] and count <= _MAX_RELAXED:
        made.keep, relaxed = _relax(made.keep, made.costs, count)
        job.say(f"gate failed: back to float: {', '.join(relaxed)}")
        candidate = make(job, floats, job.room(f"relaxed{count}"), own=own)
        gate = judged(candidate)
        count *= 2
    job.take(candidate)
    job.report(gate=gate)


def _relax(
    keep: Mapping[str, KeepFloat], costs: Mapping[str, Sequence[NodeCost]], count: int
) -> tuple[dict[str, KeepFloat], list[str]]:
    """The rule with the ``count`` most expensive nodes of each graph left float."""
    worst = {name: [cost.node for cost in found[:count]] for name, found in costs.items()}
    rules = {name: rule.plus(worst.get(name, ())) for name, rule in keep.items()}
    return rules, [node for nodes in worst.values() for node in nodes]


def check(gate: Mapping[str, Any], out: Path) -> None:
    """Refuse a gate that failed, or that could not judge all that it was to judge.

    Args:
        gate: report of ``hold``.
        out: the bundle, which ships what is left.

    Raises:
        GateError: either of them.
    """
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


def int8_backends() -> list[str]:
    """Usable backends that run INT8 ONNX graphs, the preferred one first.

    Raises:
        BackendError: there is none.
    """
    names = [
        name
        for name, row in BACKENDS.items()
        if row.why_not() is None and {"int8", "int8-u8"} & set(row.variants.get("int8", ()))
    ]
    if not names:
        raise BackendError(
            "no backend here can run INT8 graphs", fix='pip install "engineworks[cpu]"'
        )
    return names


def evaluate(
    bundle: Bundle, backend: str, precision: str, data: Path, *, threads: int | None = None
) -> Evaluation:
    """Judge one precision of a bundle on labelled data."""
    with closing(
        open_system(bundle, backend=backend, precision=precision, threads=threads)
    ) as system:
        return system.evaluate(data)


def judge(
    candidate: Bundle, before: Evaluation, data: Path, *, threads: int | None = None, say: Say
) -> dict[str, Any]:
    """Hold INT8 against float, on the backend that ``auto`` takes and on all with own graphs.

    Args:
        before: of the float graphs.
        data: the labelled folder that it is of.
        say: called with a line per metric.

    Returns:
        backend: that decides; float, int8: its metrics; drop: of each; interval: [low, high] of
        each drop, 95 %; num_pictures; unsettled: metric -> about how many pictures would tell its
        drop from noise (null: no number), where these cannot; others: the same of other backends;
        allowed; failed: metric -> largest drop that exceeds it; not_judged: metrics that the data
        do not give; passed; decisions and warnings: of float and of int8.

    Raises:
        DatasetError: the data give none of the metrics that the gate needs.
    """
    allowed = candidate.manifest.gate
    judged = [name for name in allowed if name in before.metrics]
    missing = sorted(set(allowed) - set(judged))
    if missing:
        say(f"gate: {data} does not give {', '.join(missing)}")
    if not judged:
        raise DatasetError(
            f"{data} gives none of the metrics that the gate needs: "
            f"{', '.join(sorted(allowed)) or 'the bundle names none'}",
            fix="give good and defective pictures, or replace --eval by --unjudged",
        )
    afters: dict[str, Evaluation] = {}
    drops: dict[str, dict[str, Drop]] = {}
    for backend in _judging(candidate):
        on = f" on {backend}" if afters else ""
        afters[backend] = evaluate(candidate, backend, "int8", data, threads=threads)
        drops[backend] = before.drops_to(afters[backend], judged)
        for name, drop in drops[backend].items():
            line = _line(drop, before.metrics[name], afters[backend].metrics[name], allowed[name])
            say(f"gate {name}{on}: {line}")
    failed = {
        name: max(found[name].value for found in drops.values())
        for name in judged
        if any(found[name].exceeds(allowed[name]) for found in drops.values())
    }
    first, *others = (
        {"backend": backend, "int8": afters[backend].metrics, **_report(found, allowed)}
        for backend, found in drops.items()
    )
    int8 = next(iter(afters.values()))
    return {
        **first,
        "float": before.metrics,
        "num_pictures": before.num_pictures,
        "others": {other.pop("backend"): other for other in others},
        "allowed": dict(allowed),
        "failed": failed,
        "not_judged": missing,
        "passed": not failed,
        "decisions": {
            "float": before.to_json()["decisions"],
            "int8": int8.to_json()["decisions"],
        },
        "warnings": {"float": list(before.warnings), "int8": list(int8.warnings)},
    }


def _judging(candidate: Bundle) -> list[str]:
    """The backend that ``auto`` takes, and every other one that runs INT8 graphs of its own."""
    first, *others = int8_backends()
    graphs = candidate.manifest.graphs.values()
    taken = {
        backend: [variant_of(graph.variants, backend, "int8") for graph in graphs]
        for backend in (first, *others)
    }
    return [first, *(backend for backend in others if taken[backend] != taken[first])]


def _report(drops: Mapping[str, Drop], allowed: Mapping[str, float]) -> dict[str, Any]:
    return {
        "drop": {name: drop.value for name, drop in drops.items()},
        "interval": {name: list(drop.interval) for name, drop in drops.items() if drop.interval},
        "unsettled": {
            name: drop.needed(allowed[name])
            for name, drop in drops.items()
            if not drop.settled(allowed[name])
        },
    }


def _line(drop: Drop, before: float, after: float, allowed: float) -> str:
    interval = "" if drop.interval is None else "95 % {:+.4f} to {:+.4f}, ".format(*drop.interval)
    text = (
        f"float {before:.4f}, INT8 {after:.4f}, drop {drop.value:+.4f} of {drop.num_pictures} "
        f"pictures, {interval}allowed {allowed:.4f}: {'FAIL' if drop.exceeds(allowed) else 'ok'}"
    )
    if drop.settled(allowed):
        return text
    needed = drop.needed(allowed)
    enough = "no number of pictures would" if needed is None else f"about {needed} pictures would"
    return f"{text}, not told from noise: {enough} settle it"
