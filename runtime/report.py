"""One HTML page that holds everything: it opens offline, from a mail or on a phone."""

from __future__ import annotations

import base64
import csv
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Self

import cv2
import numpy as np

from engineworks.runtime import draw, files, images, video
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.errors import InputError
from engineworks.runtime.outputs import recorded
from engineworks.runtime.tensors import Array
from engineworks.runtime.texts import shown
from engineworks.runtime.verdict import headline

_MAX_FIGURES = 12
_MAX_ROWS = 500
_MAX_SIDE = 1600  # of a photograph: twelve of them make a page of a few megabytes
_QUALITY = [
    *(cv2.IMWRITE_JPEG_QUALITY, 90),
    # thin coloured lines stay what they are
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
]
# no source is allowed but the page itself
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --warn: #e90; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 100rem; margin: auto; padding: 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
td:first-child { min-width: 12rem; overflow-wrap: anywhere; }
td.number, th.number { text-align: right; }
th[scope=row] { font-weight: normal; opacity: .7; vertical-align: top; }
th[scope=row] + td { text-align: left; overflow-wrap: anywhere; }
.warning { border-left: .4rem solid var(--warn); padding: .2rem .8rem; margin: 1rem 0; }
figure { display: inline-block; vertical-align: top; margin: 0 1rem 1rem 0; max-width: 100%; }
img { max-width: 100%; height: auto; }
figcaption { opacity: .7; overflow-wrap: anywhere; }
"""


class Report:
    """A page that is built from top to bottom; each method adds one part and returns the report.

    All texts are shown as they are: no HTML is taken from them.
    """

    def __init__(self, title: str) -> None:
        self._title = _escaped(title)
        self._parts: list[str] = []

    def heading(self, text: str) -> Self:
        """A heading over what follows, e.g. over figures."""
        return self._add(f"<h2>{_escaped(text)}</h2>")

    def text(self, paragraph: str) -> Self:
        return self._add(f"<p>{_escaped(paragraph)}</p>")

    def points(self, lines: Sequence[str]) -> Self:
        """A list, one point a line."""
        return self._add(f"<ul>{''.join(f'<li>{_escaped(line)}</li>' for line in lines)}</ul>")

    def warning(self, message: str) -> Self:
        """A paragraph that stands out."""
        return self._add(f'<p class="warning" role="note">{_escaped(message)}</p>')

    def values(self, heading: str, values: Mapping[str, object]) -> Self:
        """Names and values, one pair a line; see ``table`` for how values are shown."""
        rows = (
            f'<tr><th scope="row">{_escaped(name)}</th>{_cell(value, _format([value]))}</tr>'
            for name, value in values.items()
        )
        return self._table(heading, f"<tbody>{''.join(rows)}</tbody>")

    def table(self, heading: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Self:
        """A table with a name per column.

        Numbers stand right, None is empty. All floats of a column have the same number of decimals:
        so many that the largest shows four digits, at least two, and none from 10 000.

        Raises:
            InputError: a row of another length than the header.
        """
        if wrong := [row for row in rows if len(row) != len(header)]:
            raise InputError(
                f"table '{heading}' has {len(header)} columns, a row has {len(wrong[0])}"
            )
        columns = list(zip(*rows, strict=True)) or [()] * len(header)
        formats = [_format(column) for column in columns]
        head = "".join(
            f'<th scope="col"{_class(column)}>{_escaped(name)}</th>'
            for name, column in zip(header, columns, strict=True)
        )
        body = "".join(f"<tr>{''.join(map(_cell, row, formats))}</tr>" for row in rows)
        return self._table(heading, f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")

    def figure(self, caption: str, image: Array, *, photo: bool = False) -> Self:
        """A picture, stored in the page; several stand side by side, as many as fit.

        Args:
            image: (H, W, 3) uint8 RGB or (H, W) uint8.
            photo: stored as JPEG, at most 1600 pixels wide and high; else as PNG, without loss.

        Raises:
            InputError: another dtype or layout, or no pixels.
        """
        fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not fits or image.size == 0:
            raise InputError(
                f"a figure must be (H, W, 3) or (H, W) uint8, got {image.shape} {image.dtype}",
                fix="colour a map with runtime.draw.heatmap",
            )
        kind, options = ("jpeg", _QUALITY) if photo else ("png", [])
        shrink = _MAX_SIDE / max(image.shape[:2]) if photo else 1
        if shrink < 1:
            image = draw.reduced(image, shrink)
        pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
        encoded = base64.b64encode(cv2.imencode(f".{kind}", pixels, options)[1].tobytes()).decode()
        text = _escaped(caption)
        return self._add(
            f'<figure><img alt="{text}" width="{image.shape[1]}" height="{image.shape[0]}" '
            f'src="data:image/{kind};base64,{encoded}"><figcaption>{text}</figcaption></figure>'
        )

    def html(self) -> str:
        """The whole page."""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            f"<title>{self._title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{self._title}</h1>\n" + "\n".join(self._parts) + "\n</body>\n</html>\n"
        )

    def write(self, path: Path) -> Path:
        """Write the page in one step; folders on the way are made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, self.html())
        return path

    def _add(self, part: str) -> Self:
        self._parts.append(part)
        return self

    def _table(self, heading: str, content: str) -> Self:
        return self.heading(heading)._add(f'<div class="wide"><table>{content}</table></div>')


def _escaped(text: str) -> str:
    """The text as HTML, with what no page can hold spelt out."""
    return escape(shown(text))


def _cell(value: object, float_format: str) -> str:
    if isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float | np.floating):
        text = format(float(value), float_format)
    else:
        text = "" if value is None else _escaped(str(value))
    return f"<td{_class([value])}>{text}</td>"


def _class(column: Sequence[object]) -> str:
    """The attribute by which numbers, and the name above them, stand right."""
    kinds = int | float | np.integer | np.floating
    numeric = any(isinstance(value, kinds) and not isinstance(value, bool) for value in column)
    return ' class="number"' if numeric else ""


def _format(column: Sequence[object]) -> str:
    """One format for the floats of a column, so that their points stand in a line."""
    sizes = [abs(float(value)) for value in column if isinstance(value, float | np.floating)]
    largest = max((size for size in sizes if 0 < size < math.inf), default=1.0)
    if largest >= 10_000:
        return ".0f"
    decimals = max(2, 3 - math.floor(math.log10(largest)))
    return f".{decimals}f" if decimals <= 8 else ".4g"


def of_inference(bundle: Bundle, out: Path, facts: Mapping[str, object]) -> Report:
    """The page of one run of ``runtime.infer.infer``.

    Args:
        bundle: what was run; its verdict is shown.
        out: the folder of the results.
        facts: counts, backend, precision and the like, shown first.
    """
    manifest = bundle.manifest
    page = Report(f"{manifest.system}: {out.name}").values("Run", facts)
    verdict = manifest.reports.get("verdict")
    if verdict:
        page.heading(f"Verdict of the export: {headline(verdict)}")
        for warning in verdict.get("warnings", ()):
            page.warning(warning)
        page.points(verdict.get("reasons", ()))
    limits = {
        name: f"{limit.value:.4f} ({limit.source})" for name, limit in manifest.thresholds.items()
    }
    page.values("Thresholds", limits)
    _pictures(page, out)
    with (out / "results.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    if len(rows) > _MAX_ROWS:
        page.warning(f"the table shows {_MAX_ROWS} of {len(rows) - 1} results; results.csv has all")
    if rows:
        values = [[_value(text) for text in row] for row in rows[1 : _MAX_ROWS + 1]]
        page.table("Results", rows[0], values)
    return page


def _pictures(page: Report, out: Path) -> None:
    """Overlays and frames of annotated videos, evenly spread: every kind shall be among them."""
    written = recorded(out)  # what else lies there is somebody else's
    overlays = sorted(path for path in written if path.is_relative_to(out / "overlays"))
    if overlays:
        page.heading(f"{min(len(overlays), _MAX_FIGURES)} of {len(overlays)} pictures")
    for i in np.linspace(0, len(overlays) - 1, min(len(overlays), _MAX_FIGURES)).astype(int):
        name = str(overlays[i].relative_to(out / "overlays"))
        page.figure(name, images.read(overlays[i]), photo=True)
    for path in (path for path in written if path.suffix == ".mp4"):
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
