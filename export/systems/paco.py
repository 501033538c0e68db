"""``paco``: one graph, ``classify``; what trained it stays behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from engineworks.export.systems import TRANSFORMER, Contents, Recipe, Source
from engineworks.runtime.bundle import Threshold
from engineworks.runtime.confidence import Confidence
from engineworks.runtime.systems.paco import Params, unknown_border
from engineworks.training.backbones import is_transformer
from engineworks.training.run import open_run, read_json
from engineworks.training.systems.paco.config import TaskConfig
from engineworks.training.systems.paco.eager import trained_net


def graphs(run: Path) -> dict[str, Source]:
    """``classify``: images (batch, 3, H, W) -> logits (batch, C), embedding (batch, F), float32."""
    opened = open_run(run)
    assert isinstance(opened.config, TaskConfig)
    generator = torch.Generator().manual_seed(0)
    height, width = opened.config.preprocess.size
    net = trained_net(opened)
    num_classes, embedding = net.classifier.weight.shape
    examples = torch.randn(3, 3, height, width, generator=generator)
    return {
        "classify": Source(
            module=net,
            inputs=("images",),
            outputs=("logits", "embedding"),
            examples=((examples[:2],), (examples[2:],)),
            free={"images": {0: "batch"}},
            keep_float=TRANSFORMER if is_transformer(net) else None,
            shapes={"logits": ("batch", num_classes), "embedding": ("batch", embedding)},
        )
    }


def contents(run: Path) -> Contents:
    """What ``finish`` left in the run: class names, and the confidence of the float graph."""
    opened = open_run(run)
    assert isinstance(opened.config, TaskConfig)
    params, thresholds = Params(), {}
    if (run / "confidence.json").is_file():  # without ``val`` there was nothing to fit it on
        known = read_json(run, "confidence")
        params = Params(confidence={"float": Confidence.model_validate(known["confidence"])})
        # through JSON: tuples are lists
        unknown = Threshold.model_validate_json(json.dumps(known["unknown"]))
        thresholds[unknown_border("float")] = unknown
    return Contents(
        preprocess=opened.config.preprocess,
        params=params.model_dump(mode="json"),
        thresholds=thresholds,
        assets={},
        labels=tuple(read_json(run, "labels")),
    )


RECIPE = Recipe(graphs=graphs, contents=contents, gate={"top1": 0.005})
