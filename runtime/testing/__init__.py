"""Test doubles for this project's tests and for its users': an engine made of a function, and a
small bundle of real graphs that every command takes. Nothing here needs PyTorch or a download.
"""

from __future__ import annotations

from engineworks.runtime.testing.bundles import (
    write_tiny_backbone_bundle,
    write_tiny_noising_bundle,
    write_tiny_paco_bundle,
    write_tiny_refdet_bundle,
    write_tiny_stripe_bundle,
)
from engineworks.runtime.testing.data import (
    write_flowers,
    write_parts,
    write_references,
    write_scenes,
    write_strips,
)
from engineworks.runtime.testing.drawings import (
    draw_flower,
    draw_part,
    draw_reference,
    draw_scene,
    draw_strip,
)
from engineworks.runtime.testing.engines import (
    FunctionEngine,
)
from engineworks.runtime.testing.graphs import (
    tiny_classifier,
    tiny_detect,
    tiny_encode,
    tiny_features,
    tiny_maps,
    tiny_segment,
)

__all__ = [
    "FunctionEngine",
    "draw_flower",
    "draw_part",
    "draw_reference",
    "draw_scene",
    "draw_strip",
    "tiny_classifier",
    "tiny_detect",
    "tiny_encode",
    "tiny_features",
    "tiny_maps",
    "tiny_segment",
    "write_flowers",
    "write_parts",
    "write_references",
    "write_scenes",
    "write_strips",
    "write_tiny_backbone_bundle",
    "write_tiny_noising_bundle",
    "write_tiny_paco_bundle",
    "write_tiny_refdet_bundle",
    "write_tiny_stripe_bundle",
]
