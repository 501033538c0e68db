"""Readers of headers, led by atheris to their corners; see ``explore``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.conftest import Ledger

pytest.importorskip("atheris", reason="the extra 'fuzz' is not installed")

ROOT = Path(__file__).parents[2]
LIMITS = ("-rss_limit_mb=2048", "-timeout=20", "-seed=1", "-max_len=4096")


@pytest.mark.parametrize("reader", ["pictures", "planes", "arrays"])
def test_headers_led_by_coverage(ledger: Ledger, tmp_path: Path, reader: str) -> None:
    runs = 5_000 * ledger.scale
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.campaign.explore", reader, corpus),
            *(*LIMITS, f"-runs={runs}", f"-artifact_prefix={tmp_path}/"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    bad = None if done.returncode == 0 else (done.stdout + done.stderr)[-1500:]
    ledger.add(reader, bad, num=runs)
