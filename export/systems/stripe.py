"""``stripe``: one graph, ``segment``, for strips of every size."""

from __future__ import annotations

from pathlib import Path

import torch

from engineworks.export.quantize import KeepFloat
from engineworks.export.systems import Contents, Recipe, Source
from engineworks.runtime.bundle import Threshold
from engineworks.runtime.preprocess import PlanesSpec
from engineworks.training.run import open_run, read_json
from engineworks.training.systems.stripe.config import TaskConfig
from engineworks.training.systems.stripe.eager import trained_net

_CELLS = (24, 32)  # of the traced example: height and width in multiples of the stride


def graphs(run: Path) -> dict[str, Source]:
    """``segment``: planes (batch, 3, height, width) -> logits (batch, 1, height, width).

    Both are float32. The planes are in the sensor's own values: the graph rescales them.
    """
    opened = open_run(run)
    assert isinstance(opened.config, TaskConfig)
    model = trained_net(opened)
    low, high = opened.config.value_range
    generator = torch.Generator().manual_seed(0)
    height, width = (model.stride * cells for cells in _CELLS)

    def example(batch: int, height: int, width: int) -> tuple[torch.Tensor]:
        return (low + (high - low) * torch.rand(batch, 3, height, width, generator=generator),)

    return {
        "segment": Source(
            module=model,
            inputs=("planes",),
            outputs=("logits",),
            examples=(example(2, height, width), example(1, 2 * width, height)),
            free={"planes": {0: "batch", 2: "height", 3: "width"}},
        )
    }


def contents(run: Path) -> Contents:
    """What ``finish`` left in the run."""
    thresholds = {
        name: Threshold.model_validate(value)
        for name, value in read_json(run, "thresholds").items()
    }
    spec = read_json(run, "preprocess")
    return Contents(
        preprocess=PlanesSpec(size=tuple(spec["size"]), multiple=spec["multiple"]),
        params=read_json(run, "params"),
        thresholds=thresholds,
        assets={},
    )


# The fixed mix of planes before the first convolution of `plain`: cancelling target against
# references is left to float, so that no rounded weight has to.
_KEEP_FLOAT = KeepFloat(nodes=frozenset({"net.mix"}))

RECIPE = Recipe(
    graphs=graphs,
    contents=contents,
    gate={"pixel_ap": 0.01, "recall_at_1_false": 0.01},
    keep_float=_KEEP_FLOAT,
)
