"""The same system in eager PyTorch, and the published way to run the published network.

What a benchmark compares the bundle with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from engineworks.runtime import tiling
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.contenders import Contender
from engineworks.runtime.errors import RunError
from engineworks.runtime.preprocess import PlanesSpec, apply
from engineworks.runtime.results import Candidate, DefectMap
from engineworks.runtime.systems.stripe import Params, defect_maps, find_candidates
from engineworks.runtime.tensors import Array
from engineworks.training import eager
from engineworks.training.backbones import read_weights
from engineworks.training.run import Run, open_run
from engineworks.training.systems.stripe.config import NetworkConfig, TaskConfig
from engineworks.training.systems.stripe.model import Segment, build

_TILE = 128  # published
_PUBLISHED = NetworkConfig(name="unet-se", width=64)


class EagerStripe:
    """Images to results in torch."""

    def __init__(self, network: eager.Network, bundle: Bundle) -> None:
        manifest = bundle.manifest
        assert isinstance(manifest.preprocess, PlanesSpec)
        self.network = network
        self.spec = manifest.preprocess
        self.config = bundle.params(Params).inference
        self.threshold = manifest.thresholds["candidate"].value

    @torch.inference_mode()
    def forward(self, planes_BCHW: Array) -> Tensor:
        """(B, 3, H, W) float32 -> logits (B, 1, H, W) float32."""
        logits: Tensor = self.network(eager.to_channels_last(planes_BCHW))
        return logits.float()

    def infer(self, images: Sequence[Array]) -> list[DefectMap]:
        """See ``runtime.systems.stripe.System.infer``."""
        maps = defect_maps(
            lambda batch: self.forward(batch).numpy(),
            images,
            self.spec,
            tile=self.config.tile,
            overlap=self.config.overlap,
        )
        return [
            DefectMap(
                map_HW,
                tuple(
                    find_candidates(
                        map_HW,
                        suppression=self.config.suppression,
                        max_candidates=self.config.max_candidates,
                    )
                ),
                self.threshold,
            )
            for map_HW in maps
        ]


class PublishedWindow:
    """Strips in tiles, one after the other through the published network; with random weights.

    Source: the last state of Background_Removal_Net: tiles of 128, at least two along an axis.
    """

    def __init__(self, network: Callable[[Tensor], Tensor], bundle: Bundle) -> None:
        self.network = network
        self.spec = PlanesSpec(size=bundle.manifest.preprocess.size, multiple=1)
        self.threshold = bundle.manifest.thresholds["candidate"].value

    @torch.inference_mode()
    def forward(self, planes_BCHW: Array) -> list[Array]:
        """(B, 3, H, W) float32 -> probabilities (H, W) float32 each."""
        return [self._strip(planes_CHW) for planes_CHW in planes_BCHW]

    def infer(self, images: Sequence[Array]) -> list[DefectMap]:
        """An image's score is its highest pixel."""
        found = []
        for image in images:
            (map_HW,) = self.forward(apply(self.spec, [image]))
            y, x = np.unravel_index(int(map_HW.argmax()), map_HW.shape)
            best = Candidate(x=int(x), y=int(y), score=float(map_HW[y, x]))
            found.append(DefectMap(map_HW, (best,), self.threshold))
        return found

    def _strip(self, planes_CHW: Array) -> Array:
        rows, columns = (tiling.positions(side, _TILE) for side in planes_CHW.shape[1:])
        maps = [
            self.network(torch.from_numpy(np.ascontiguousarray(tile))[None]).sigmoid()[0, 0].numpy()
            for tile in tiling.cut(planes_CHW, rows, columns, (_TILE, _TILE))
        ]
        return tiling.stitch(np.stack(maps), rows, columns)


def trained_net(run: Run) -> Segment:
    """The network of a run with its best weights, in eval mode.

    Raises:
        RunError, WeightsError: the run has no weights, or damaged ones.
    """
    assert isinstance(run.config, TaskConfig)
    net = build(run.config)
    net.load_state_dict(read_weights(run.weights()))
    return net.eval()


def published_net() -> nn.Module:
    """The published network, with random weights: how fast it is does not depend on them."""
    return build(TaskConfig(network=_PUBLISHED)).eval()


def contenders(
    run: Path, bundle: Bundle, *, threads: int, say: Callable[[str], None]
) -> list[Contender]:
    """The published way, and eager and compiled PyTorch, for the bundle exported from ``run``.

    Raises:
        RunError: the folder is no finished run of ``stripe``.
    """
    opened = open_run(run)
    if not isinstance(opened.config, TaskConfig):
        raise RunError(f"{run} is a run of '{opened.info.system}', the bundle is of 'stripe'")
    rows = eager.contenders(
        trained_net(opened),
        lambda network: EagerStripe(network, bundle),
        threads=threads,
        say=say,
    )
    if min(bundle.manifest.preprocess.size) < _TILE:
        say(f"no row of the published way: it takes strips of at least {_TILE} pixels")
        return rows
    say("the published network, tile by tile: a second per call and more")
    published = PublishedWindow(published_net(), bundle)
    first = Contender(
        name="published, tile by tile",
        precision="float",
        network=published.forward,
        path=published.infer,
        evaluate=None,
        close=lambda: None,
    )
    return [first, *rows]
