"""Bundles of ``noising``, opened, and pictures to show them."""

from __future__ import annotations

from typing import Any

import numpy as np

from engineworks.runtime.bundle import Bundle
from engineworks.runtime.systems import open_system
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import draw_part


def pictures(count: int, *, defective: bool = False, seed: int = 5) -> list[Array]:
    rng = np.random.default_rng(seed)
    sizes = [(64, 64), (80, 60), (48, 100)]
    return [draw_part(rng, sizes[i % 3], defective=defective)[0] for i in range(count)]


def open_noising(bundle: Bundle, **options: Any) -> Any:
    """An opened bundle, with all that this system has beyond the protocol."""
    return open_system(bundle, **options)
