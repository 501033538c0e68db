"""The table of what was tried and what was bad, printed at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

_COUNTS = pytest.StashKey[dict[str, list[int]]]()
_FIGURES = pytest.StashKey[list[str]]()


class Ledger:
    """The tries of one campaign.

    Attributes:
        scale: how much more there is to try than in the ordinary suite; 1 there.
    """

    def __init__(self) -> None:
        self.scale = int(os.environ.get("CAMPAIGN", "1"))
        self.tried = 0
        self.bad: list[str] = []
        self.figures: list[str] = []

    def add(self, what: str, bad: str | None = None, *, num: int = 1) -> None:
        """Note a try, or so many that are judged together.

        Args:
            bad: what is wrong; None where all is well.
        """
        self.tried += num
        if bad is not None:
            self.bad.append(f"{what}: {bad}")


@pytest.fixture
def ledger(request: pytest.FixtureRequest) -> Iterator[Ledger]:
    """Counts tries; the test fails at its end where one of them was bad."""
    ledger = Ledger()
    yield ledger
    name = request.node.name.removeprefix("test_").replace("_", " ")
    counts = request.config.stash.setdefault(_COUNTS, {})
    counts[name] = [ledger.tried, len(ledger.bad)]
    request.config.stash.setdefault(_FIGURES, []).extend(ledger.figures)
    assert ledger.tried, "nothing was tried"
    assert not ledger.bad, f"{len(ledger.bad)} of {ledger.tried}: " + "\n".join(ledger.bad[:20])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = terminalreporter.config.stash.get(_COUNTS, {})
    if os.environ.get("CAMPAIGN") and counts:
        terminalreporter.section("campaign")
        terminalreporter.line("| campaign | tried | bad |\n|---|---|---|")
        for name, (tried, bad) in sorted(counts.items()):
            terminalreporter.line(f"| {name} | {tried} | {bad} |")
        for figure in terminalreporter.config.stash[_FIGURES]:
            terminalreporter.line(figure)
