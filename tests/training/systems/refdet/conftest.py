from __future__ import annotations

from collections.abc import Generator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Generator[None]:
    """Torch's threads wait for each other by spinning: on a busy machine tiny tensors take ages."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
