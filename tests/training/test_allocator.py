"""Memory that a step frees is there for the next one."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.train

SCRIPT = """
import resource, sys
import torch
from engineworks.training.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
for turn in range(30):
    if turn == 20:  # by then the heap has found its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    parts = [torch.zeros(1 << 24) for _ in range(4)]  # 64 MiB each
    del parts
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Pages that the system had to provide for ten turns of four equal tensors."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how],
        cwd=Path(__file__).parents[2],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="the C library is not glibc"
)
def test_freed_memory_is_used_again() -> None:
    assert (
        faults("kept") < faults("given back") / 4
    )  # 16,384 small pages per tensor, or 32 large ones
