"""Many pictures, frames and cycles leave memory and open files as they were; see ``soak``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.campaign.conftest import Ledger
from tests.campaign.soak import Mark

ROOT = Path(__file__).parents[2]
# in the ordinary suite, and times ``CAMPAIGN``
RUNS = {"pictures": (0, 1000), "frames": (0, 1000), "cycles": (0, 50)}
EVALUATIONS = dict.fromkeys(("noising", "paco", "refdet", "stripe", "backbone"), (16, 24))
EVALUATIONS["stripe"] = (32, 24)  # 96 more maps of 0.4 MB would show
_GROWTH = 24  # MiB that allocators may move by in a run
_PEAK = 8  # MiB by which the peak over four times as many pictures may be higher


def measured(
    ledger: Ledger, folder: Path, backend: str, nums: dict[str, tuple[int, int]]
) -> dict[str, list[Mark]]:
    scaled = {k: few if ledger.scale == 1 else n * ledger.scale for k, (few, n) in nums.items()}
    command = [sys.executable, "-m", "tests.campaign.soak", folder, backend]
    done = subprocess.run(
        [*command, *(f"{what}={num}" for what, num in scaled.items())],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, list[Mark]] = json.loads(done.stdout)
    return found


@pytest.mark.skipif("CAMPAIGN" not in os.environ, reason="short runs fill caches: `make campaign`")
@pytest.mark.parametrize("backend", ["ort", "openvino"])
def test_long_runs(ledger: Ledger, tmp_path: Path, backend: str) -> None:
    for what, marks in measured(ledger, tmp_path, backend, RUNS).items():
        done, memory, files = np.array(marks[len(marks) // 4 :]).T
        slope = float(np.polyfit(done, memory, 1)[0])
        growth = slope * (done[-1] - done[0])
        figure = (
            f"{what}, {backend}: {done[-1]:.0f}, memory {memory[0]:.0f} to {memory[-1]:.0f} MiB, "
            f"{1000 * slope:+.2f} MiB per 1,000; open files {files[0]:.0f} to {files[-1]:.0f}"
        )
        ledger.figures.append(figure)
        ledger.add(
            what,
            figure if growth > _GROWTH or files[-1] > files[0] else None,
            num=int(done[-1]),
        )


def test_evaluations(ledger: Ledger, tmp_path: Path) -> None:
    for what, marks in measured(ledger, tmp_path, "ort", EVALUATIONS).items():
        (few, low, _), (many, high, _) = marks
        figure = f"evaluation of {what}: {few} pictures {low:.0f} MiB, {many} {high:.0f} MiB"
        ledger.figures.append(figure)
        ledger.add(what, figure if high - low > _PEAK else None, num=many)
