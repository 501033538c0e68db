"""Disks that are full, read-only roots, no temporary folder; see ``narrow``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign.conftest import Ledger

ROOT = Path(__file__).parents[2]
MODULE = [sys.executable, "-m", "tests.campaign.narrow"]
ALONE = ("unshare", "--mount", "--propagation", "private")

pytestmark = [pytest.mark.train, pytest.mark.slow]


def test_narrow_places(ledger: Ledger, tmp_path: Path) -> None:
    probe = [*ALONE, "mount", "-t", "tmpfs", "none", "/mnt"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount: the disks of this test cannot be made")
    sizes = ["64k"] if ledger.scale == 1 else [f"{4 * i}k" for i in range(1, 3 * ledger.scale // 4)]
    found = run([*MODULE, str(tmp_path), *sizes])
    read_only = "mount --bind / /mnt; mount -o remount,ro,bind / /"
    mounts = f"mount -t tmpfs none {tmp_path}/place; {read_only}"
    found += run(["sh", "-c", f'{mounts} && exec "$@"', "sh", *MODULE, str(tmp_path)])
    for what, bad in found:
        ledger.add(what, bad)


def run(command: list[str]) -> list[tuple[str, str | None]]:
    done = subprocess.run(
        [*ALONE, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[tuple[str, str | None]] = json.loads(done.stdout.splitlines()[-1])
    return found
