"""What of a bundle ships, and why: decided by the export, told by whoever opens the bundle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engineworks.runtime.bundle import Manifest

_WORTH = 1.05  # a speed-up below this is not worth a second set of numbers
_UNMEASURED = "accuracy was not measured"


def decide(
    gate: Mapping[str, Any], speed: Mapping[str, Any], *, unjudged: bool = False
) -> dict[str, Any]:
    """What ``--precision auto`` takes: the report ``verdict`` of a manifest.

    The first backend decides: ``--backend auto`` takes it, and the gate was measured with it.

    Args:
        gate: report of ``export.gate``; empty where nothing was judged.
        speed: report of ``export.verdict``, per backend.
        unjudged: INT8 ships without a gate.
    """
    decisive = next(iter(speed))
    reasons = [line for backend, found in speed.items() for line in _speed_lines(backend, found)]
    pays = speed[decisive]["int8_speedup_low"] >= _WORTH
    if not pays:
        reasons.append(f"INT8 does not pay here with {decisive}")
    if not speed[decisive]["stable"]:
        reasons.append("the machine was not quiet while this was timed")
    ship = "int8" if pays and (gate["passed"] if gate else unjudged) else "float"
    if not gate:
        asked = "--unjudged lets INT8 ship all the same, where it pays"
        fix = "pass --eval DIR with labelled data, or --unjudged to ship INT8 without"
        reasons.append(f"{_UNMEASURED}: {asked if unjudged else fix}")
    elif gate["passed"]:
        reasons.append("the task's metrics stayed within the allowed drop")
    else:
        reasons.append(f"the task's metrics dropped too much: {lost(gate)}")
    if gate.get("not_judged"):
        reasons.append(f"not judged, the data do not give it: {', '.join(gate['not_judged'])}")
    return {
        "ship": ship,
        "backend": decisive,
        "pays": pays,
        "unjudged": not gate,
        "warnings": list(gate.get("warnings", {}).get(ship, ())),
        "reasons": reasons,
    }


def _speed_lines(backend: str, found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{backend}: INT8 is {found['int8_speedup']:.2f}x as fast as float (95 % interval "
        f"{found['int8_speedup_low']:.2f} to {found['int8_speedup_high']:.2f})"
    ]
    if "bf16" in found["p50_ms"]:
        each = [f"{name} {ms:.2f} ms" for name, ms in found["p50_ms"].items()]
        lines.append(f"{backend}: {', '.join(each)}")
    return lines


def lost(gate: Mapping[str, Any]) -> str:
    """What failed a gate, in words."""
    return ", ".join(f"{name} by {drop:.4f}" for name, drop in gate["failed"].items())


def headline(verdict: Mapping[str, Any]) -> str:
    """A verdict in a few words; one of an older version has fewer fields."""
    return f"ship {verdict['ship']}" + (f": {_UNMEASURED}" if verdict.get("unjudged") else "")


def describe(verdict: Mapping[str, Any]) -> list[str]:
    """A verdict as lines of text."""
    return [
        f"verdict: {headline(verdict)}",
        *(f"  warning: {warning}" for warning in verdict.get("warnings", ())),
        *(f"  {reason}" for reason in verdict.get("reasons", ())),
    ]


def unjudged(manifest: Manifest, precision: str) -> str | None:
    """What whoever runs a precision should be told, where no gate has judged it."""
    if not precision.startswith("int8") or manifest.reports.get("gate"):
        return None
    return f"{precision} is unjudged: {_UNMEASURED} when this bundle was exported"


PARITY_HEADER = ("parity", "output", "max rel", "mean rel", "cosine", "cosine, worst 1 %")


def parity_rows(reports: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """How far each stage of an export is from the one before, per graph output, as text."""
    stages = {"torch to ONNX": reports.get("parity", {}).get("torch-float", {})}
    for kind, graphs in reports.get("parity_half", {}).items():
        stages[f"float to {kind}"] = graphs
    for backend, graphs in reports.get("parity_int8", {}).items():
        stages[f"float to INT8, {backend}"] = graphs
    return [
        (
            stage,
            f"{graph}.{output}",
            *(f"{parity.get(key, math.nan):.2e}" for key in ("max_rel", "mean_rel")),
            *(f"{parity.get(key, math.nan):.6f}" for key in ("cosine", "cosine_worst1pct")),
        )
        for stage, graphs in stages.items()
        for graph, outputs in graphs.items()
        for output, parity in outputs.items()
    ]
