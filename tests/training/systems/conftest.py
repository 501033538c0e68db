from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def fresh_accelerator() -> None:
    """Accelerate keeps one state per process; each test trains as if it were the first."""
    state = pytest.importorskip("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
