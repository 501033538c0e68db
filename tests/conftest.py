"""Fixtures of all tests, and the rule that a skip on a GPU machine is no pass."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in every run."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Development data, weights and reference values beside the repository; skips without them."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the development data sets are not there: no folder ../shared")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _signals_as_in_a_terminal() -> None:
    """Started in the background, a process ignores some signals, and what is ignored stays so."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """With REQUIRE_GPU=1 a skipped test that is marked ``gpu`` fails."""
    report = yield
    demanded = os.environ.get("REQUIRE_GPU") == "1" and item.get_closest_marker("gpu") is not None
    if demanded and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"REQUIRE_GPU=1, but this test was skipped: {reason}"
    return report
