"""The nets of ``refdet``: references to prototypes, and frames with prototypes to boxes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engineworks.runtime.errors import ConfigError
from engineworks.training import backbones
from engineworks.training.backbones import LastMap
from engineworks.training.features import EngineBackbone
from engineworks.training.profiler import section
from engineworks.training.systems.refdet.backbone import Backbone, channels
from engineworks.training.systems.refdet.config import DetectorConfig, EncoderConfig
from engineworks.training.systems.refdet.fusion import FUSIONS
from engineworks.training.systems.refdet.head import (
    BaseBranch,
    Output,
    PrototypeBranch,
    Raw,
    anchors,
    decode,
)


class Features(nn.Module):
    """What a net says of a whole picture: (B, 3, S, S) -> (B, width).

    That is its class token beside the mean of its patches, each of length 1; or, of a net without a
    class token, the mean of its last map.
    """

    def __init__(self, net: LastMap | EngineBackbone) -> None:
        super().__init__()
        self.net = net
        self.width = net.channels * (2 if net.has_token else 1)

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        token_BC, map_BCHW = self.net.token_and_map(pictures_BCHW)
        mean_BC = map_BCHW.mean((2, 3))
        if token_BC is None:
            return mean_BC
        return torch.cat([F.normalize(part, dim=1) for part in (token_BC, mean_BC)], dim=1)


class SupportEncoder(nn.Module):
    """Reference pictures to rows, of which an object's prototype is the mean.

    Attributes:
        frozen: no part of ``net`` learns; its features of a picture never change.
    """

    def __init__(self, net: Features, widths: Sequence[int], train_blocks: int | str) -> None:
        """Project what a net says.

        Args:
            widths: of the parts of a row, one per scale.
            train_blocks: see ``EncoderConfig``.

        Raises:
            ConfigError: some blocks of a net that has none.
        """
        super().__init__()
        self.net = net
        self.frozen = train_blocks == 0
        if isinstance(train_blocks, int):
            _freeze(net, train_blocks)
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Linear(net.width, width), nn.LayerNorm(width)) for width in widths
        )

    def features(self, pictures_BCHW: Tensor) -> Tensor:
        """(B, F): without a gradient where the net is frozen."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            features_BF: Tensor = self.net(pictures_BCHW)
        return features_BF

    def forward(self, features_BF: Tensor) -> Tensor:
        """(B, P): the part of each scale has length 1."""
        parts = [F.normalize(project(features_BF), dim=1) for project in self.projections]
        return torch.cat(parts, dim=1)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.frozen:
            self.net.eval()
        return self


def _freeze(net: Features, train_blocks: int) -> None:
    """Leave only so many of the last blocks, and what follows them, to learn."""
    net.requires_grad_(False)
    if not train_blocks:
        return
    model: Any = net.net.model
    if not hasattr(model, "blocks"):
        raise ConfigError(
            f"'{type(model).__name__}' has no blocks, of which the last {train_blocks} could learn",
            fix="set encoder.train_blocks to 0 or to all",
        )
    parts = list(model.children())
    following = parts[parts.index(model.blocks) + 1 :]
    for part in [*model.blocks[-train_blocks:], *following]:
        part.requires_grad_(True)


def prototype_widths(config: DetectorConfig) -> tuple[int, ...]:
    """Of the parts of a prototype, one per scale."""
    return config.widths or channels(config.scales, config.width)


class Detector(nn.Module):
    """Frames and prototypes to boxes.

    Attributes:
        widths: of the parts of a prototype.
        num_base: base classes; 0: there is no branch for them.
    """

    def __init__(self, config: DetectorConfig, num_base: int) -> None:
        super().__init__()
        self.backbone = Backbone(
            config.scales,
            width=config.width,
            depth=config.depth,
            checkpointing=config.checkpointing,
        )
        inputs = self.backbone.channels
        self.widths = prototype_widths(config)
        self.num_base = num_base
        self.strides = tuple(2**scale for scale in config.scales)
        outputs = config.outputs or inputs
        self.fusion = FUSIONS[config.fusion](inputs, self.widths, outputs)
        shared: dict[str, Any] = {
            "bins": config.reg_max,
            "separable": config.separable,
            "prior": config.prior,
        }
        self.head = nn.ModuleDict(
            {
                "prototype": PrototypeBranch(
                    outputs, self.widths, temperature=config.temperature, **shared
                )
            }
        )
        if num_base:
            self.head["base"] = BaseBranch(outputs, num_base, **shared)
        if config.channels_last:
            self.to(memory_format=torch.channels_last)
        if config.compile:
            self.backbone.compile()
            self.fusion.compile()

    def forward(
        self, frames_BCHW: Tensor, prototypes_NP: Tensor, prompted_BN: Tensor | None = None
    ) -> Output:
        """Find what is looked for.

        Args:
            frames_BCHW: sides are multiples of ``STRIDE``.
            prototypes_NP: one row per object.
            prompted_BN: bool: which objects are looked for in which frame; None: all in all.
        """
        return self.answer(self.see(frames_BCHW), prototypes_NP, prompted_BN)

    def see(self, frames_BCHW: Tensor) -> list[Tensor]:
        """What is seen of frames, whatever is looked for: a map of each scale."""
        with section("backbone"):
            maps: list[Tensor] = self.backbone(frames_BCHW)
        return maps

    def answer(
        self, maps: list[Tensor], prototypes_NP: Tensor, prompted_BN: Tensor | None = None
    ) -> Output:
        """As ``forward``, of what was seen."""
        with section("fusion"):
            maps = self.fusion(maps, prototypes_NP, prompted_BN)
        with section("head"):
            places, sizes = anchors(maps, self.strides)
            return Output(
                prototype=self.head["prototype"](maps, prototypes_NP),
                base=self.head["base"](maps) if self.num_base else None,
                anchors_A2=places,
                strides_A=sizes,
                strides=self.strides,
            )


class RefDet(nn.Module):
    """Both nets, as they are trained and saved together."""

    def __init__(
        self,
        encoder: EncoderConfig,
        detector: DetectorConfig,
        num_base: int,
        *,
        reference_size: tuple[int, int] | None = None,
        seed: int = 0,
        weights: bool = True,
    ) -> None:
        """Build both.

        Args:
            reference_size: (height, width) of the pictures, for an encoder that is made for one
                size; None: the one that it comes with.
            weights: False: random ones, for a checkpoint to replace.

        Raises:
            ConfigError, WeightsError: see ``training.backbones.create`` and ``SupportEncoder``.
        """
        super().__init__()
        if encoder.engine is not None and encoder.train_blocks != 0:
            raise ConfigError(
                f"an encoder that an engine runs cannot learn, and encoder.train_blocks is "
                f"{encoder.train_blocks}",
                fix="set encoder.train_blocks to 0, or encoder.engine to null",
            )
        made = backbones.create(
            encoder.model_copy(update={"compile": False}),
            seed=seed,
            weights=weights,
            size=reference_size,
        )
        assert isinstance(made.net, (LastMap, EngineBackbone))
        features = Features(made.net)
        if encoder.compile:
            features.compile()
        self.provenance = made.provenance
        self.detector = Detector(detector, num_base)
        self.encoder = SupportEncoder(features, self.detector.widths, encoder.train_blocks)

    def prototypes(self, rows_RP: Tensor, object_of_row: Tensor, num: int) -> Tensor:
        """(num, P): the mean of each object's rows, the part of each scale of length 1."""
        return average(rows_RP, object_of_row, num, self.detector.widths)

    def parameter_table(self) -> list[tuple[str, int, int]]:
        """(part, parameters, of which learn), and all in the last row."""
        parts: dict[str, nn.Module] = {
            "encoder": self.encoder.net,
            "projections": self.encoder.projections,
            "backbone": self.detector.backbone,
            "fusion": self.detector.fusion,
            **{f"head, {name}": branch for name, branch in self.detector.head.items()},
            "all": self,
        }
        return [
            (
                name,
                sum(p.numel() for p in part.parameters()),
                sum(p.numel() for p in part.parameters() if p.requires_grad),
            )
            for name, part in parts.items()
        ]


def average(rows_RP: Tensor, object_of_row: Tensor, num: int, widths: Sequence[int]) -> Tensor:
    """Prototypes (num, P) from rows; the same as ``runtime.references.average`` for each object."""
    sums = rows_RP.new_zeros(num, rows_RP.shape[1]).index_add(0, object_of_row, rows_RP)
    return torch.cat([F.normalize(part, dim=1) for part in torch.split(sums, list(widths), 1)], 1)


class Encode(nn.Module):
    """The graph ``encode``: pictures (B, 3, S, S) -> rows (B, P)."""

    def __init__(self, model: RefDet) -> None:
        super().__init__()
        self.encoder = model.encoder

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        rows_BP: Tensor = self.encoder(self.encoder.features(pictures_BCHW))
        return rows_BP


class Detect(nn.Module):
    """The graph ``detect``: frames (B, 3, H, W), prototypes (N, P) -> the best M candidates.

    A candidate is an anchor of a branch with its best class: base classes first, then prototypes.
    Candidates come in the order of their anchors. An order by score would hang on the last bit of
    nearly equal ones, and no two backends agree on that.
    """

    def __init__(self, model: RefDet, num_candidates: int) -> None:
        super().__init__()
        self.detector = model.detector
        self.num_candidates = num_candidates

    def forward(self, frames_BCHW: Tensor, prototypes_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (B, M, 4) xyxy in pixels, scores (B, M) in [0, 1], classes (B, M) int64."""
        return self.answer(self.see(frames_BCHW), prototypes_NP)

    def see(self, frames_BCHW: Tensor) -> list[Tensor]:
        """See ``Detector``."""
        return self.detector.see(frames_BCHW)

    def answer(self, seen: list[Tensor], prototypes_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``forward``, of what was seen."""
        output = self.detector.answer(seen, prototypes_NP)
        branches = self._branches(output)
        best = [(raw.logits_BCA.max(1), first) for raw, first in branches]
        logits_BA = torch.cat([found.values for found, _ in best], 1)
        classes_BA = torch.cat([found.indices + first for found, first in best], 1)
        num = min(self.num_candidates, logits_BA.shape[1])
        places_BM = logits_BA.topk(num, dim=1).indices.sort(dim=1).values
        sides_BKA = torch.cat([raw.sides_BKA for raw, _ in branches], -1)
        everywhere = (-1, sides_BKA.shape[1], -1)
        chosen_BMK = sides_BKA.gather(2, places_BM[:, None].expand(everywhere)).transpose(1, 2)
        boxes_BM4 = decode(  # of the chosen ones only: all would take longer than many a layer
            chosen_BMK.reshape(*chosen_BMK.shape[:2], 4, -1),
            output.anchors_A2.repeat(len(branches), 1)[places_BM],
            output.strides_A.repeat(len(branches))[places_BM],
        )
        # ONNX Runtime's own sigmoid is exact to 1e-7 of 1, not of a small score
        scores_BM = 1 / (1 + (-logits_BA.gather(1, places_BM)).exp())
        return boxes_BM4, scores_BM, classes_BA.gather(1, places_BM)

    def before_choice(self, frames_BCHW: Tensor, prototypes_NP: Tensor) -> tuple[Tensor, Tensor]:
        """What candidates are chosen from: sides (B, 4 R, A), see ``Raw``, and best logits (B, A).

        Over the anchors of the base classes' branch, where there is one, and of the prototypes'.
        """
        branches = self._branches(self.detector(frames_BCHW, prototypes_NP))
        return (
            torch.cat([raw.sides_BKA for raw, _ in branches], -1),
            torch.cat([raw.logits_BCA.amax(1) for raw, _ in branches], 1),
        )

    def _branches(self, output: Output) -> list[tuple[Raw, int]]:
        """The branches and the number of each one's first class."""
        prototype = (output.prototype, self.detector.num_base)
        return [prototype] if output.base is None else [(output.base, 0), prototype]
