"""One HTML page that holds everything: it opens offline, from a mail or on a phone."""

from __future__ import annotations

import base64
import csv
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Self

import cv2
import numpy as np

from runtime import images
from runtime.bundle import Bundle, write_atomic
from runtime.errors import InputError
from runtime.tensors import Array

_MAX_FIGURES = 12
_MAX_ROWS = 500
# no source is allowed but the page itself
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --warn: #e90; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: auto; padding: 1rem; }
h1, h2 { line-height: 1.2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
td.number { text-align: right; }
th[scope=row] { font-weight: normal; opacity: .7; }
.warning { border-left: .4rem solid var(--warn); padding: .2rem .8rem; margin: 1rem 0; }
figure { display: inline-block; vertical-align: top; margin: 0 1rem 1rem 0; max-width: 100%; }
img { max-width: 100%; height: auto; }
figcaption { opacity: .7; }
"""


class Report:
    """A page that is built from top to bottom; each method adds one part and returns the report.

    All texts are shown as they are: no HTML is taken from them.
    """

    def __init__(self, title: str) -> None:
        self._title = escape(title)
        self._parts: list[str] = []

    def heading(self, text: str) -> Self:
        """A heading over what follows, e.g. over figures."""
        return self._add(f"<h2>{escape(text)}</h2>")

    def text(self, paragraph: str) -> Self:
        return self._add(f"<p>{escape(paragraph)}</p>")

    def warning(self, message: str) -> Self:
        """A paragraph that stands out."""
        return self._add(f'<p class="warning" role="note">{escape(message)}</p>')

    def values(self, heading: str, values: Mapping[str, object]) -> Self:
        """Names and values, one pair a line; see ``table`` for how values are shown."""
        rows = (f'<tr><th scope="row">{escape(k)}</th>{_cell(v)}</tr>' for k, v in values.items())
        return self._table(heading, f"<tbody>{''.join(rows)}</tbody>")

    def table(self, heading: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Self:
        """A table with a name per column.

        Numbers stand right, floats have four significant digits, None is empty.

        Raises:
            InputError: a row of another length than the header.
        """
        if wrong := [row for row in rows if len(row) != len(header)]:
            raise InputError(
                f"table '{heading}' has {len(header)} columns, a row has {len(wrong[0])}"
            )
        head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
        return self._table(heading, f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")

    def figure(self, caption: str, image: Array) -> Self:
        """A picture, stored in the page as PNG; several stand side by side, as many as fit.

        Args:
            image: (H, W, 3) uint8 RGB or (H, W) uint8.

        Raises:
            InputError: another dtype or layout, or no pixels.
        """
        fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)
        if image.dtype != np.uint8 or not fits or image.size == 0:
            raise InputError(
                f"a figure must be (H, W, 3) or (H, W) uint8, got {image.shape} {image.dtype}",
                fix="colour a map with runtime.draw.heatmap",
            )
        pixels = cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image
        encoded = base64.b64encode(cv2.imencode(".png", pixels)[1].tobytes()).decode()
        text = escape(caption)
        return self._add(
            f'<figure><img alt="{text}" width="{image.shape[1]}" height="{image.shape[0]}" '
            f'src="data:image/png;base64,{encoded}"><figcaption>{text}</figcaption></figure>'
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
        write_atomic(path, self.html())
        return path

    def _add(self, part: str) -> Self:
        self._parts.append(part)
        return self

    def _table(self, heading: str, content: str) -> Self:
        return self.heading(heading)._add(f'<div class="wide"><table>{content}</table></div>')


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, float | np.floating):
        number = float(value)
        text = f"{number:.4g}" if abs(number) < 10_000 else f"{number:.0f}"
        return f'<td class="number">{text}</td>'
    if isinstance(value, int | np.integer):
        return f'<td class="number">{value}</td>'
    return f"<td>{'' if value is None else escape(str(value))}</td>"


def of_inference(bundle: Bundle, out: Path, facts: Mapping[str, object]) -> Report:
    """The page of one run of ``runtime.infer.infer``.

    Args:
        bundle: what was run; its verdict is shown.
        out: the folder with ``results.csv`` and, if drawn, ``overlays``.
        facts: counts, backend, precision and the like, shown first.
    """
    manifest = bundle.manifest
    page = Report(f"{manifest.system}: {out.name}").values("Run", facts)
    verdict = manifest.reports.get("verdict")
    if verdict:
        page.heading(f"Verdict of the export: ship {verdict['ship']}")
        for reason in verdict["reasons"]:
            page.text(reason)
    limits = {
        name: f"{limit.value:.4f} ({limit.source})" for name, limit in manifest.thresholds.items()
    }
    page.values("Thresholds", limits)
    overlays = sorted((out / "overlays").rglob("*.png"))
    if overlays:
        page.heading(f"{min(len(overlays), _MAX_FIGURES)} of {len(overlays)} pictures")
    # evenly spread, so that every kind of picture is among them
    for i in np.linspace(0, len(overlays) - 1, min(len(overlays), _MAX_FIGURES)).astype(int):
        page.figure(str(overlays[i].relative_to(out / "overlays")), images.read(overlays[i]))
    with (out / "results.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    if len(rows) > _MAX_ROWS:
        page.warning(f"the table shows {_MAX_ROWS} of {len(rows) - 1} results; results.csv has all")
    if rows:
        page.table("Results", rows[0], rows[1 : _MAX_ROWS + 1])
    return page
