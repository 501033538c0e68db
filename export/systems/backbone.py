"""``backbone``: one graph, ``features``, of a net that nobody trained here.

There is no run: ``prepare`` leaves in a folder what a run would hold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from engineworks.export.systems import TRANSFORMER, Contents, Recipe, Source
from engineworks.export.trace import trace_prepared
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.errors import UsageError
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.systems import backbone
from engineworks.training import backbones
from engineworks.training.backbones import LastMap, read_weights
from engineworks.training.config import BackboneConfig, read_yaml, validate
from engineworks.training.run import read_json

NAME = backbone.NAME

_RECORD = "backbone"  # .json
_WEIGHTS = "weights.safetensors"


class Outputs(nn.Module):
    """A net's maps, and its class token where it has one: images (B, 3, H, W) -> tensors.

    Attributes:
        names: of the outputs: ``token``, then ``map`` of a whole net, or ``stage<i>`` of its cuts.
    """

    def __init__(self, net: nn.Module, stages: tuple[int, ...] | None) -> None:
        super().__init__()
        self.net = net
        self.names = ("map",) if stages is None else tuple(f"stage{stage}" for stage in stages)
        if isinstance(net, LastMap) and net.has_token:
            self.names = (backbone.TOKEN, *self.names)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, ...]:
        if isinstance(self.net, LastMap) and self.net.has_token:
            token_BC, map_BCHW = self.net.token_and_map(images_BCHW)
            assert token_BC is not None
            return token_BC, map_BCHW
        return tuple(self.net(images_BCHW))


def prepare(folder: Path, config: BackboneConfig, size: tuple[int, int] | None) -> dict[str, str]:
    """Write weights and description of a net into a folder.

    Args:
        size: see ``trace_backbone``.

    Returns:
        Where its weights came from, for the record.

    Raises:
        ConfigError, WeightsError: see ``training.backbones.create``.
    """
    made = backbones.create(config, size=size)
    known = backbones.model_of(made.net).pretrained_cfg
    state = {name: value.contiguous() for name, value in made.net.state_dict().items()}
    save_file(state, folder / _WEIGHTS)
    spec = PreprocessSpec(
        size=size or backbones.native_size(made.net),
        resize="crop",
        mean=known["mean"],
        std=known["std"],
    )
    content = {
        "config": config.model_dump(mode="json"),
        "preprocess": spec.model_dump(mode="json"),
    }
    (folder / f"{_RECORD}.json").write_text(json.dumps(content), encoding="utf-8")
    return made.provenance


def prepare_named(folder: Path, *, name: str, options: Mapping[str, str]) -> dict[str, str]:
    """The same of what the command line says: backbone:NAME and its options.

    Args:
        name: timm's.
        options: weights, stages, norm, size and args, as text; those that were given.

    Raises:
        UsageError: an option that cannot be read.
        ConfigError, WeightsError: see ``training.backbones.create``.
    """
    tree: dict[str, Any] = {"name": name, **options}
    size = None
    try:
        if "stages" in tree:
            tree["stages"] = [int(stage) for stage in options["stages"].split(",")]
        if text := tree.pop("size", None):
            height, width = (int(side) for side in text.split(","))
            size = height, width
        if "args" in tree:
            tree["args"] = read_yaml(options["args"], "--args")
    except ValueError as error:
        raise UsageError(
            f"--stages, --size or --args of {name} cannot be read: {error}",
            fix="write e.g. --stages 2,3 --size 256,256 --args '{pad_type: same}'",
        ) from error
    return prepare(folder, validate(BackboneConfig, tree), size)


def trace_backbone(
    config: BackboneConfig, out: Path, *, size: tuple[int, int] | None = None
) -> Bundle:
    """Export a net alone, for ``backbone.engine`` and for embeddings.

    Args:
        size: (height, width) of its images in pixels; None: what it was trained with.
        out: the bundle to make.

    Raises:
        ConfigError, WeightsError: see ``training.backbones.create``.
        ExportError, ParityError, BundleError: see ``export.trace.trace``.
    """
    return trace_prepared(NAME, partial(prepare, config=config, size=size), out)


def _read(folder: Path) -> tuple[BackboneConfig, PreprocessSpec]:
    content: dict[str, Any] = read_json(folder, _RECORD)
    config = BackboneConfig.model_validate_json(json.dumps(content["config"]))
    return config, PreprocessSpec.model_validate_json(json.dumps(content["preprocess"]))


def graphs(folder: Path) -> dict[str, Source]:
    """``features``: images (batch, 3, H, W) -> ``Outputs.names``, all float32."""
    config, spec = _read(folder)
    made = backbones.create(config, weights=False, size=spec.size)
    net = made.net
    net.load_state_dict(read_weights(folder / _WEIGHTS))
    module = Outputs(net, config.stages).eval()
    generator = torch.Generator().manual_seed(0)
    examples = torch.randn(3, 3, *spec.size, generator=generator)
    maps = [name for name in module.names if name != backbone.TOKEN]
    return {
        backbone.GRAPH: Source(
            module=module,
            inputs=("images",),
            outputs=module.names,
            examples=((examples[:2],), (examples[2:],)),
            free={"images": {0: "batch"}},
            keep_float=TRANSFORMER if backbones.is_transformer(net) else None,
            shapes={
                name: ("batch", width, *grid)
                for name, width, grid in zip(maps, made.channels, made.grids, strict=True)
            },
        )
    }


def contents(folder: Path) -> Contents:
    """Preprocessing as the net was trained with, which net it is, and its weights."""
    config, spec = _read(folder)
    params = backbone.Params(
        name=config.name, stages=config.stages, args=config.args, norm=config.norm
    )
    return Contents(
        preprocess=spec,
        params=params.model_dump(mode="json"),
        thresholds={},
        assets={backbone.WEIGHTS: folder / _WEIGHTS},
    )


RECIPE = Recipe(graphs=graphs, contents=contents, gate={"top1": 0.01}, prepare=prepare_named)
