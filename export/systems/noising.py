"""``noising``: the graph ``features`` and the memory bank beside it; or ``discriminate``, which is
backbone and discriminator in one, and no bank.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import nn

from engineworks.export.systems import TRANSFORMER, Contents, Recipe, Source
from engineworks.runtime.bundle import Threshold
from engineworks.runtime.systems.noising import DISCRIMINATE, FEATURES
from engineworks.training.backbones import is_transformer, read_weights
from engineworks.training.run import open_run, read_json
from engineworks.training.systems.noising.config import TaskConfig
from engineworks.training.systems.noising.discriminator import DiscriminatorTraining
from engineworks.training.systems.noising.task import build_model

# of the largest value: beside zero, where a transformer's features often lie, the root of an error
# is what is left of it, and the recipe's 1e-4 becomes this
_ROOTED = 1e-2


def graphs(run: Path) -> dict[str, Source]:
    """``features``: images (batch, 3, H, W) -> features (batch, N, D); or ``discriminate``: the
    same images -> scores (batch, N). All float32.
    """
    opened = open_run(run)
    config = opened.config
    assert isinstance(config, TaskConfig)
    plain = config.model_copy(update={"backbone": config.backbone.plain()})
    model, _ = build_model(plain, weights=False)
    model.load_state_dict(read_weights(opened.weights()))
    generator = torch.Generator().manual_seed(0)
    height, width = config.preprocess.size
    examples = torch.randn(3, 3, height, width, generator=generator)
    features = model.features if isinstance(model, DiscriminatorTraining) else model
    num_patches = math.prod(features.grid(height, width))

    def source(module: nn.Module, output: str, *shape: int) -> Source:
        return Source(
            module=module,
            inputs=("images",),
            outputs=(output,),
            examples=((examples[:2],), (examples[2:],)),
            free={"images": {0: "batch"}},
            shapes={output: ("batch", *shape)},
            tolerance=_ROOTED if config.scale == "roots" else None,
            keep_float=TRANSFORMER if is_transformer(features.backbone) else None,
        )

    if isinstance(model, DiscriminatorTraining):
        return {DISCRIMINATE: source(model.judge().eval(), "scores", num_patches)}
    return {FEATURES: source(model, "features", num_patches, features.width)}


def contents(run: Path) -> Contents:
    """Statistics, thresholds, and what the judge needs, that ``finish`` left in the run."""
    opened = open_run(run)
    assert isinstance(opened.config, TaskConfig)
    thresholds = {
        name: Threshold.model_validate_json(json.dumps(value))  # through JSON: tuples are lists
        for name, value in read_json(run, "thresholds").items()
    }
    assets = {}
    if opened.config.judge == "bank":
        assets["bank"] = run / "bank.faiss"
    if opened.config.fit.foreground:
        assets["foreground"] = run / "foreground.npy"
    return Contents(
        preprocess=opened.config.preprocess,
        params=read_json(run, "params"),
        thresholds=thresholds,
        assets=assets,
    )


# Resize, pooling and the neighbourhood mean have no weights: the quantizer leaves them in float.
RECIPE = Recipe(
    graphs=graphs,
    contents=contents,
    gate={"image_auroc": 0.005, "pixel_auroc": 0.005},
)
