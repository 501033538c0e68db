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
