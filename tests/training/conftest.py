from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState

from tests.training.toy import ToyTask, known


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[ToyTask]:
    """The system "toy", known to the loop for one test."""
    task = known(monkeypatch.setitem)
    AcceleratorState._reset_state(reset_partial_state=True)
    return task
