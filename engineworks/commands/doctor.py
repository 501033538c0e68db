"""``doctor``: what is installed, and what can run here."""

from __future__ import annotations

import sys

import click

from engineworks.commands.printing import echo


@click.command()
def doctor() -> None:
    """Versions, processor, and which backends can be used here."""
    from engineworks.runtime.doctor import examine

    problems = 0
    for finding in examine():
        colour = {"ok": "green", "missing": "yellow", "problem": "red"}[finding.level]
        click.echo(f"{click.style(finding.level.ljust(8), fg=colour)}{finding.text}")
        if finding.fix:
            echo(f"        {finding.fix}")
        problems += finding.level == "problem"
    if problems:
        sys.exit(1)
