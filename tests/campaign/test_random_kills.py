"""kill -9 at random moments of each command that writes; see ``kills``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.conftest import Ledger

ROOT = Path(__file__).parents[2]
FEW = {"set-threshold": 6, "infer": 2, "bank": 1, "export": 1, "train": 1}

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, list[str]]]:
    """(tried, bad) of each command."""
    scale = int(os.environ.get("CAMPAIGN", "1"))
    nums = FEW if scale == 1 else dict.fromkeys(FEW, 30 * scale)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.campaign.kills", tmp_path_factory.mktemp("kills")),
            *("0", *(f"{name}={num}" for name, num in nums.items())),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, tuple[int, list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("command", FEW)
def test_kill_at_a_random_moment(
    ledger: Ledger, counts: dict[str, tuple[int, list[str]]], command: str
) -> None:
    tried, bad = counts[command]
    for i in range(tried):
        ledger.add(f"kill {i}", bad[i] if i < len(bad) else None)
