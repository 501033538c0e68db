from __future__ import annotations

import sys
from types import ModuleType

import pytest
from accelerate.state import AcceleratorState

from engineworks.training.systems import TASKS
from tests.training.toy import ToyConfig, ToyTask


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> type[ToyTask]:
    """The system "toy", known to the loop for one test."""
    task = type("Task", (ToyTask,), {})
    package, config_module, task_module = (ModuleType(n) for n in ("toy", "toy.config", "toy.task"))
    config_module.TaskConfig = ToyConfig  # type: ignore[attr-defined]
    task_module.Task = task  # type: ignore[attr-defined]
    for module in (package, config_module, task_module):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(TASKS, "toy", "toy")
    AcceleratorState._reset_state(reset_partial_state=True)
    return task
