from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import torch

from training.config import TrainConfig
from training.data import loader

pytestmark = pytest.mark.train


class Numbers:
    """Each sample tells where it was made and what it drew."""

    def __len__(self) -> int:
        return 5

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return {
            "index": np.array([index]),
            "drawn": rng.random(2, np.float32),
            "names": [f"sample {index}"],
            "frozen": gc.get_freeze_count(),
        }


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_a_batch_gets_no_axis(workers: int) -> None:
    batches: Any = loader(Numbers(), TrainConfig(workers=workers), shuffle=False, batched=True)
    for i, batch in enumerate(batches):
        assert batch["index"].tolist() == [i]
        assert batch["drawn"].shape == (2,) and batch["drawn"].dtype == torch.float32
        assert batch["names"] == [f"sample {i}"]
    assert i == 4


def test_a_loader_process_leaves_alone_what_its_parent_had() -> None:
    """It would free decoders whose threads only the parent has, and wait for these for ever."""
    batches: Any = loader(Numbers(), TrainConfig(workers=1), shuffle=False, batched=True)
    assert next(iter(batches))["frozen"] > 1000


def test_each_loader_process_has_so_many_batches_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    for prefetch in (1, 3):
        config = TrainConfig(workers=1, prefetch=prefetch, pin_memory=True)
        batches: Any = loader(Numbers(), config, shuffle=False, batched=True)
        iterator = iter(batches)
        next(iterator)
        # what is sent to the processes and not yet asked for: the one that was taken made room
        assert iterator._tasks_outstanding == prefetch
        assert batches.pin_memory == torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loader(Numbers(), TrainConfig(pin_memory=True), shuffle=False).pin_memory
    assert not loader(Numbers(), TrainConfig(), shuffle=False).pin_memory
