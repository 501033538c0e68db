from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.gpu
def test_needs_a_gpu():
    pytest.skip("no CUDA device")

def test_needs_something_else():
    pytest.skip("not here")

@pytest.mark.gpu
def test_runs():
    pass
"""


@pytest.mark.parametrize(
    ("required", "counts"), [("1", "1 failed, 1 passed, 1 skipped"), ("", "1 passed, 2 skipped")]
)
def test_a_skipped_gpu_test_fails_only_where_a_gpu_is_required(
    required: str, counts: str, tmp_path: Path
) -> None:
    rules = Path(__file__).with_name("conftest.py").read_text()
    (tmp_path / "conftest.py").write_text(rules)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: needs a CUDA device\n")
    (tmp_path / "test_some.py").write_text(TESTS)

    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "REQUIRE_GPU": required},
        capture_output=True,
        text=True,
        check=False,
    )

    assert counts in found.stdout
    assert found.returncode == (1 if required else 0)
    if required:
        assert "REQUIRE_GPU=1, but this test was skipped: Skipped: no CUDA device" in found.stdout
