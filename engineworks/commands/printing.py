"""What commands print: lines, tables and bars. Nobody else prints.

Names and labels come from data: no terminal shall obey them.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from engineworks.runtime.texts import shown

if TYPE_CHECKING:
    from engineworks.runtime.evaluation import Decisions

LINE_EVERY_S = 60.0  # of what takes longer, where stderr is no terminal


def echo(text: object, *, err: bool = False, fg: str | None = None) -> None:
    """Print lines that may hold names and labels: no terminal shall obey them."""
    click.secho(shown(str(text)), err=err, fg=fg)


def say(context: click.Context) -> Callable[[str], None]:
    quiet = context.find_root().obj["quiet"]
    return (lambda _text: None) if quiet else (lambda text: echo(text, err=True))


def warn(text: str) -> None:
    echo(text, fg="yellow", err=True)


class _Messages(logging.Handler):
    """Shows on stderr what packages log: news; warnings, each once and also with --quiet."""

    def __init__(self, *, quiet: bool) -> None:
        super().__init__(logging.WARNING if quiet else logging.INFO)
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno < logging.WARNING:
            echo(message, err=True)
        elif message not in self._shown:
            self._shown.add(message)
            echo(message, fg="yellow", err=True)


def show_messages(*, quiet: bool) -> None:
    """From now on, show what the packages log."""
    logger = logging.getLogger("engineworks")
    logger.handlers = [handler := _Messages(quiet=quiet)]
    logger.setLevel(handler.level)


def hide_messages() -> None:
    """From now on, show nothing: another process of the same command tells it."""
    logging.getLogger("engineworks").handlers = [logging.NullHandler()]


class Progress:
    """Progress on stderr: bars; where it is no terminal, a line a minute; with --quiet nothing."""

    def __init__(self, context: click.Context) -> None:
        self._quiet = context.find_root().obj["quiet"]
        self._show = sys.stderr.isatty() and not self._quiet

    def __enter__(self) -> Callable[[str, int, int], None]:
        if self._quiet:
            return lambda _label, _done, _total: None
        if not self._show:
            return self._lines()
        from rich.console import Console
        from rich.progress import Progress, TaskID

        self._bar = Progress(console=Console(stderr=True, force_terminal=True), transient=True)
        self._bar.start()
        tasks: dict[str, TaskID] = {}

        def show(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = self._bar.add_task(label)
            self._bar.update(tasks[label], completed=done, total=total or None)

        return show

    def __exit__(self, *_error: object) -> None:
        if self._show:
            self._bar.stop()

    @staticmethod
    def _lines() -> Callable[[str, int, int], None]:
        told = time.monotonic()

        def show(label: str, done: int, total: int) -> None:
            nonlocal told
            if (now := time.monotonic()) - told >= LINE_EVERY_S:
                told = now
                echo(f"{label}: {done}{f' of {total}' if total else ''}", err=True)

        return show


def write_json(path: Path, content: dict[str, Any]) -> None:
    from engineworks.runtime import files

    files.write(path, json.dumps(content, indent=2) + "\n")


def print_table(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=any(header))
    for name in header:
        # a narrow terminal must not cut names off
        table.add_column(Text(shown(name)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(part)) for part in row))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(Text(shown(title)), table, sep="\n")


def print_decisions(decisions: Sequence[Decisions | dict[str, Any]], of: str = "") -> None:
    """What borders decide on labelled data, and what nobody would want of the one that ships.

    Args:
        decisions: as they were made, or as JSON has them.
        of: the precision that made them, where there are several.
    """
    from engineworks.runtime.evaluation import Decisions, table

    made = [Decisions.model_validate(each) for each in decisions]
    if not made:
        return
    header, rows = table(made)
    of = f"{of} " if of else ""
    print_table(f"{of}decisions, with 95 % intervals (Wilson)", header, rows)
    for warning in made[0].warnings:
        warn(f"warning: {of}{warning}")


def print_gate(gate: dict[str, Any]) -> None:
    """What the precisions of an export decided; gates of older exports do not tell."""
    for precision, decisions in gate.get("decisions", {}).items():
        print_decisions(decisions, precision)


def print_parity(reports: dict[str, Any]) -> None:
    """How far each stage is from the one before, per graph output."""
    from engineworks.runtime.verdict import PARITY_HEADER, parity_rows

    print_table("same feeds through both", PARITY_HEADER, parity_rows(reports))


def print_results(results: dict[str, Any]) -> None:
    """What a run found out: each part a table whose longer side runs down, or a list of values."""
    for name, part in results.items():
        if isinstance(part, list):
            print_decisions(part)
            continue
        rows = part if all(isinstance(row, dict) for row in part.values()) else {"": part}
        across = list(dict.fromkeys(column for row in rows.values() for column in row))
        down = list(rows)
        cells = [[_text(row.get(column)) for column in across] for row in rows.values()]
        if len(across) > len(down):
            across, down, cells = down, across, [list(line) for line in zip(*cells, strict=True)]
        print_table(
            name,
            ("", *across),
            [(key, *line) for key, line in zip(down, cells, strict=True)],
        )


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
