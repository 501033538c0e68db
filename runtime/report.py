"""One HTML page that holds everything: it opens offline, from a mail or on a phone."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Self

import cv2
import numpy as np

from engineworks.runtime import draw, files
from engineworks.runtime.errors import InputError
from engineworks.runtime.tensors import Array
from engineworks.runtime.texts import shown

_MAX_SIDE = 1600  # of a photograph: twelve of them make a page of a few megabytes
_QUALITY = [
    *(cv2.IMWRITE_JPEG_QUALITY, 90),
    # thin coloured lines stay what they are
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
]
# Of a table of results: sorting, a filter, a border to try. Without it the page still has it all.
_SCRIPT = r"""
for (const area of document.querySelectorAll('.results')) {
  const table = area.querySelector('table'), body = table.tBodies[0];
  const rows = [...body.rows], told = area.querySelector('[role=status]');
  const filter = area.querySelector('[type=search]'), border = area.querySelector('[type=range]');
  const number = area.querySelector('[type=number]');
  const value = (row, i) => row.cells[i].dataset.value ?? row.cells[i].textContent;
  const column = Number(table.dataset.score), above = table.dataset.above === 'true';
  const pictures = new Map([...document.querySelectorAll('figure[data-row]')]
    .map(figure => [figure.dataset.row, figure]));
  const count = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0, flagged = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every(word => text.includes(word));
      const figure = pictures.get(row.id);
      if (figure) figure.hidden = row.hidden;
      if (border) {
        const score = value(row, column) === '' ? NaN : Number(value(row, column));
        const is = above ? score >= number.valueAsNumber : score < number.valueAsNumber;
        row.classList.toggle('flagged', is);
        if (figure) figure.classList.toggle('flagged', is);
        if (is && !row.hidden) flagged++;
      }
      if (!row.hidden) shown++;
    }
    told.textContent = `${shown} of ${rows.length} shown` + (border ? `, ${flagged} ` +
      `${above ? 'at or above' : 'below'} ${number.value}` : '');
  };
  area.querySelector('form').hidden = false;
  area.querySelector('form').addEventListener('submit', event => event.preventDefault());
  filter.addEventListener('input', count);
  if (border) {
    border.addEventListener('input', () => { number.value = border.value; count(); });
    number.addEventListener('input', () => { border.value = number.value; count(); });
    area.querySelector('[type=reset]').addEventListener('click', () => setTimeout(count));
  }
  [...table.tHead.rows[0].cells].forEach((head, i) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener('click', () => {
      const up = head.ariaSort !== 'ascending';
      for (const other of table.tHead.rows[0].cells) other.removeAttribute('aria-sort');
      head.ariaSort = up ? 'ascending' : 'descending';
      const numbers = head.classList.contains('number');
      const order = (a, b) => {
        const [x, y] = [value(a, i), value(b, i)];
        if (x === '' || y === '') return (x === '') - (y === '');
        const less = numbers ? x - y : x.localeCompare(y, undefined, {numeric: true});
        return up ? less : -less;
      };
      body.append(...rows.sort(order));
    });
  });
  count();
}
"""
_HASH = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
# no source is allowed but the page itself, and no script but that one
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --warn: #e90; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 100rem; margin: auto; padding: 1rem; }
h1, h2 { line-height: 1.2; overflow-wrap: anywhere; }
a { color: inherit; }
:focus-visible { outline: .2rem solid Highlight; outline-offset: .1rem; }
[hidden] { display: none !important; }
.wide { overflow-x: auto; }
.results .wide { max-height: 40rem; overflow-y: auto; }
.results thead { position: sticky; top: 0; background: Canvas; }
th button { all: unset; cursor: pointer; font-weight: bold; }
th button:focus-visible { outline: .2rem solid Highlight; }
th button::after { content: " \\2195"; opacity: .4; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
form { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; align-items: center; margin: 1rem 0; }
label { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; }
input, form button { font: inherit; min-height: 2.2rem; }
input[type=range] { width: min(24rem, 80vw); }
input[type=number] { width: 8rem; }
tr:target, figure:target { outline: .2rem solid Highlight; }
tr.flagged td:first-child { box-shadow: inset .4rem 0 var(--warn); }
figure.flagged { border-top: .4rem solid var(--warn); }
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
        self._moves = False  # whether the page has something for the script

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
        head, formats = self._head(heading, header, rows)
        body = "".join(f"<tr>{''.join(map(_cell, row, formats))}</tr>" for row in rows)
        return self._table(heading, f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>")

    def _head(
        self, heading: str, header: Sequence[str], rows: Sequence[Sequence[object]]
    ) -> tuple[str, list[str]]:
        """The cells of a table's head, and how the floats of each column are shown."""
        if wrong := [row for row in rows if len(row) != len(header)]:
            raise InputError(
                f"table '{heading}' has {len(header)} columns, a row has {len(wrong[0])}"
            )
        columns = list(zip(*rows, strict=True)) or [()] * len(header)
        head = "".join(
            f'<th scope="col"{_class(column)}>{_escaped(name)}</th>'
            for name, column in zip(header, columns, strict=True)
        )
        return head, [_format(column) for column in columns]

    def results(
        self,
        heading: str,
        header: Sequence[str],
        rows: Sequence[Sequence[object]],
        *,
        pictures: Collection[int] = (),
        score: str | None = None,
        border: float | None = None,
        above: bool = True,
    ) -> Self:
        """A table that can be sorted by each column and filtered.

        Args:
            header, rows: see ``table``; they stand as they are given until somebody sorts them.
            pictures: places of the rows that have a ``figure``, to which their first cell leads.
            score: the column that a border is held against; None where there is none.
            border: the one that was used; the reader can try others, and rows are counted again.
            above: whether what lies at or above the border is flagged, or what lies below.

        Raises:
            InputError: a row of another length than the header.
        """
        head, formats = self._head(heading, header, rows)
        lines = []
        for i, row in enumerate(rows):
            cells = [
                _cell(value, form, exact=True) for value, form in zip(row, formats, strict=True)
            ]
            if i in pictures:
                first = cells[0].removeprefix("<td>").removesuffix("</td>")
                cells[0] = f'<td><a href="#picture-{i}">{first}</a></td>'
            lines.append(f'<tr id="row-{i}">{"".join(cells)}</tr>')
        at = "" if score is None else f' data-score="{list(header).index(score)}"'
        values = [] if score is None else [row[list(header).index(score)] for row in rows]
        numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
        tried = "" if border is None or not numbers else _slider(score or "", border, numbers)
        label = _escaped(heading)
        self._moves = True
        return self.heading(heading)._add(
            f'<section class="results" aria-label="{label}"><form hidden>'
            f'<label>Filter <input type="search" autocomplete="off"></label>{tried}'
            f'<output role="status"></output></form>'
            f'<div class="wide" role="region" aria-label="{label}" tabindex="0">'
            f'<table{at} data-above="{str(above).lower()}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div></section>"
        )

    def figure(
        self, caption: str, image: Array, *, photo: bool = False, row: int | None = None
    ) -> Self:
        """A picture, stored in the page; several stand side by side, as many as fit.

        Args:
            image: (H, W, 3) uint8 RGB or (H, W) uint8.
            photo: stored as JPEG, at most 1600 pixels wide and high; else as PNG, without loss.
            row: of ``results``, that the caption leads to.

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
        linked = text if row is None else f'<a href="#row-{row}">{text}</a>'
        at = "" if row is None else f' id="picture-{row}" data-row="row-{row}"'
        return self._add(
            f'<figure{at}><img alt="{text}" width="{image.shape[1]}" height="{image.shape[0]}" '
            f'src="data:image/{kind};base64,{encoded}"><figcaption>{linked}</figcaption></figure>'
        )

    def html(self) -> str:
        """The whole page."""
        policy = f"{_POLICY}; script-src 'sha256-{_HASH}'" if self._moves else _POLICY
        script = f"<script>{_SCRIPT}</script>\n" if self._moves else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
            f"<title>{self._title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{self._title}</h1>\n" + "\n".join(self._parts) + f"\n</main>\n{script}</body>\n"
            "</html>\n"
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


def _slider(score: str, border: float, values: Sequence[float]) -> str:
    """A border to try, between the smallest and the largest value."""
    low, high = min([*values, border]), max([*values, border])
    step = 10.0 ** (math.floor(math.log10(high - low)) - 3) if high > low else 1.0
    shown, name = f"{border:.6g}", _escaped(score)
    span = f'min="{low - step:.6g}" max="{high + step:.6g}" step="any" value="{shown}"'
    return (
        f'<label>Border of {name} <input type="range" {span}></label>'
        f'<label>{name} <input type="number" step="any" value="{shown}"></label>'
        f'<button type="reset">Back to {shown}</button>'
    )


def _cell(value: object, float_format: str, *, exact: bool = False) -> str:
    """One cell; ``exact`` keeps what a float is rounded from, for the script."""
    if isinstance(value, bool):
        text = "yes" if value else "no"
    elif isinstance(value, float | np.floating):
        text = format(float(value), float_format)
    else:
        text = "" if value is None else _escaped(str(value))
    kept = f' data-value="{float(value)!r}"' if exact and isinstance(value, float) else ""
    return f"<td{_class([value])}{kept}>{text}</td>"


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
