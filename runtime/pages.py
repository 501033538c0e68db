"""What a page tells of an inference, a bundle, a training and a benchmark; ``report`` draws it."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from engineworks.runtime import images, video
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.compare import Timings
from engineworks.runtime.evaluation import Decisions, table
from engineworks.runtime.outputs import recorded
from engineworks.runtime.report import Report
from engineworks.runtime.verdict import PARITY_HEADER, headline, parity_rows

_MAX_FIGURES = 24
_MAX_ROWS = 2000


def of_inference(
    bundle: Bundle,
    out: Path,
    facts: Mapping[str, object],
    *,
    failures: Sequence[tuple[str, str]] = (),
) -> Report:
    """The page of one run of ``runtime.infer.infer``: what is worst comes first.

    Args:
        bundle: what was run; its verdict is shown.
        out: the folder of the results.
        facts: counts, backend, precision and the like, shown first.
        failures: (name, message) of what could not be read.
    """
    page = Report(f"{bundle.manifest.system}: {out.name}").values("Run", facts)
    if failures:
        page.warning(f"{len(failures)} could not be read")
        page.table("Failed", ("name", "why"), failures[:_MAX_ROWS])
    _verdict(page, bundle)
    _thresholds(page, bundle)
    with (out / "results.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        header, *lines = [*csv.reader(file)] or [[]]
    rows = [[_value(text) for text in line] for line in lines]
    score = next((name for name in ("score", "probability") if name in header), None)
    header, rows = _telling_first(header, rows, score)
    if score is not None:
        rows.sort(key=lambda row: _worst(score, row[header.index(score)]))
    if len(rows) > _MAX_ROWS:
        page.warning(f"the table shows {_MAX_ROWS} of {len(rows)} results; results.csv has all")
        rows = rows[:_MAX_ROWS]
    overlays = _overlays(out, [str(row[0]) for row in rows])
    if rows:
        page.results(
            "Results",
            header,
            rows,
            pictures=overlays.keys(),
            score=score,
            border=_border(header, rows, score),
            above=score != "probability",
        )
    if overlays:
        page.heading(f"{len(overlays)} pictures, as in the table")
    for i, path in overlays.items():
        page.figure(str(rows[i][0]), images.read(path), photo=True, row=i)
    _videos(page, out)
    return page


def of_bundle(bundle: Bundle, bench: Timings | None = None) -> Report:
    """The page of a bundle: verdict, gate, parity, borders, files.

    Args:
        bench: a report that ``bench --json`` wrote of it.
    """
    manifest = bundle.manifest
    page = Report(f"{manifest.system}: {bundle.root.resolve().name}")
    page.values("Bundle", {"system": manifest.system, "digest": manifest.digest})
    _verdict(page, bundle)
    if gate := manifest.reports.get("gate"):
        _gate(page, gate)
    if bench is not None:
        _bench(page, bench)
    if rows := parity_rows(manifest.reports):
        page.table("Same feeds through both", PARITY_HEADER, rows)
    _thresholds(page, bundle)
    graphs = [
        (name, variant, ", ".join(f"{n} {spec.describe()}" for n, spec in graph.inputs.items()))
        for name, graph in manifest.graphs.items()
        for variant in graph.variants
    ]
    page.table("Graphs", ("graph", "variant", "inputs"), graphs)
    files = [(name, f.size_bytes, f.sha256) for name, f in sorted(manifest.files.items())]
    return page.table("Files", ("file", "bytes", "SHA-256"), files)


def of_training(
    name: str,
    facts: Mapping[str, object],
    results: Mapping[str, Any],
    history: Sequence[Mapping[str, str]],
) -> Report:
    """The page of a run: what it found out, and its epochs.

    Args:
        name: of the run, the title.
        facts: system, status, seed and the like.
        results: parts by name, each a list of decisions, values by name, or a table of such.
        history: an epoch each, as ``metrics.csv`` has them.
    """
    page = Report(name).values("Run", facts)
    for part, found in results.items():
        if isinstance(found, list):
            _decisions(page, part, found)
        elif found and all(isinstance(row, Mapping) for row in found.values()):
            columns = list(dict.fromkeys(column for row in found.values() for column in row))
            rows = [(key, *(row.get(name) for name in columns)) for key, row in found.items()]
            page.results(part, ("", *columns), rows)
        else:
            page.values(part, found)
    if history:
        header = list(history[0])
        page.results("Epochs", header, [[_value(row[key]) for key in header] for row in history])
    return page


def _decisions(page: Report, heading: str, found: Sequence[Any]) -> None:
    """What borders decide on labelled data, with intervals."""
    made = [Decisions.model_validate(each) for each in found]
    if made:
        header, rows = table(made)
        page.table(f"{heading}, with 95 % intervals (Wilson)", header, rows)
        for warning in made[0].warnings:
            page.warning(warning)


def _verdict(page: Report, bundle: Bundle) -> None:
    verdict = bundle.manifest.reports.get("verdict")
    if not verdict:
        return
    page.heading(f"Verdict of the export: {headline(verdict)}")
    for warning in verdict.get("warnings", ()):
        page.warning(warning)
    page.points(verdict.get("reasons", ()))


def _thresholds(page: Report, bundle: Bundle) -> None:
    limits = {
        name: f"{limit.value:.4f} ({limit.source})"
        for name, limit in bundle.manifest.thresholds.items()
    }
    page.values("Thresholds", limits)


def _gate(page: Report, gate: Mapping[str, Any]) -> None:
    """Float against INT8: each metric that the gate asks for, and what each decides."""
    allowed, drop = gate.get("allowed", {}), gate.get("drop", {})
    rows = [
        (
            name,
            gate.get("float", {}).get(name),
            gate.get("int8", {}).get(name),
            drop.get(name),
            " to ".join(f"{end:+.4f}" for end in gate.get("interval", {}).get(name, ())),
            allowed[name],
            "failed" if name in gate.get("failed", {}) else "ok" if name in drop else "not judged",
        )
        for name in allowed
    ]
    header = ("metric", "float", "INT8", "drop", "95 %", "allowed", "")
    state = "passed" if gate.get("passed") else "failed"
    page.table(f"Gate: {state}, on {gate.get('num_pictures', 0)} pictures", header, rows)
    for precision, found in gate.get("decisions", {}).items():
        _decisions(page, f"Decisions of {precision}", found)


def _bench(page: Report, bench: Timings) -> None:
    header = ("covers", "batch", "what", "precision", "p50 ms", "verdict")
    rows = [(r.covers, r.batch, r.name, r.precision, r.p50_ms, r.verdict) for r in bench.rows]
    page.results("Speed", header, rows)
    page.values("Where it was timed", bench.environment)


def _telling_first(
    header: Sequence[str], rows: Sequence[Sequence[object]], score: str | None
) -> tuple[list[str], list[list[object]]]:
    """Columns as a narrow screen wants them: name, score, what differs, what is always the same."""
    same = {i for i, column in enumerate(zip(*rows, strict=True)) if len(set(column)) == 1}

    def place(i: int) -> int:
        return 0 if not i else 1 if header[i] == score else 3 if i in same else 2

    order = sorted(range(len(header)), key=place)
    return [header[i] for i in order], [[row[i] for i in order] for row in rows]


def _worst(score: str, value: object) -> float:
    """Where a row stands: high scores first, low probabilities first, and what has none last."""
    if not isinstance(value, int | float) or math.isnan(value):
        return math.inf
    return value if score == "probability" else -value


def _border(header: Sequence[str], rows: Sequence[Sequence[object]], score: str | None) -> float:
    """The border of the results; where they have none, that of the doubtful half."""
    if "threshold" in header:
        first = rows[0][header.index("threshold")]
        if isinstance(first, int | float):
            return float(first)
    return 0.5


def _overlays(out: Path, names: Sequence[str]) -> dict[int, Path]:
    """Row -> its overlay, of the first rows that have one: names end alike but for the suffix."""
    written = [path for path in recorded(out) if path.is_relative_to(out / "overlays")]
    endings: dict[str, list[Path]] = {}
    for path in written:
        endings.setdefault(path.stem, []).append(path)
    found: dict[int, Path] = {}
    for i, name in enumerate(names):
        whole = Path(name).with_suffix("").as_posix()
        fits = [
            path
            for path in endings.get(Path(name).stem, ())
            if f"/{whole}".endswith(
                f"/{path.relative_to(out / 'overlays').with_suffix('').as_posix()}"
            )
        ]
        if len(fits) == 1:
            found[i] = fits[0]
        if len(found) == _MAX_FIGURES:
            break
    return found


def _videos(page: Report, out: Path) -> None:
    """Frames of annotated videos, evenly spread: every kind shall be among them."""
    for path in (path for path in recorded(out) if path.suffix == ".mp4"):
        total = video.info(path).num_frames
        frames = list(video.frames(path, step=-(-total // _MAX_FIGURES)))
        page.heading(f"{len(frames)} of {total} frames of {path.name}")
        for frame in frames:
            page.figure(f"{frame.time_s:.2f} s", frame.image, photo=True)


def _value(text: str) -> object:
    """The number that a field of a CSV file is the spelling of, else its text: 007 is a name."""
    for kind in (int, float):
        with suppress(ValueError):
            if str(kind(text)) == text:
                return kind(text)
    return text
