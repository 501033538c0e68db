"""The same system in eager PyTorch: what a benchmark compares the bundle with.

Distances by ``torch.cdist`` and ``topk``, influence by gathering the neighbours, map by
interpolation and a separable convolution: the straightforward torch program, without loops. Where
a discriminator judges, its scores take the place of all that comes before the map.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from engineworks.runtime.bank import Bank
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.contenders import Contender
from engineworks.runtime.errors import RunError
from engineworks.runtime.preprocess import apply
from engineworks.runtime.results import AnomalyMap
from engineworks.runtime.systems.noising.foreground import Foreground
from engineworks.runtime.systems.noising.params import DiscriminatorParams, Params
from engineworks.runtime.systems.noising.tiles import Layout, Tiles
from engineworks.runtime.tensors import Array
from engineworks.training import eager
from engineworks.training.run import open_run
from engineworks.training.systems.noising.config import TaskConfig
from engineworks.training.systems.noising.discriminator import DiscriminatorTraining
from engineworks.training.systems.noising.task import build_model


class EagerNoising(ABC):
    """Images to results in torch; what a patch's score is made of is the judge's."""

    params: Params | DiscriminatorParams
    tiles: Tiles | None = None

    def __init__(self, network: eager.Network, bundle: Bundle) -> None:
        manifest = bundle.manifest
        self.network = network
        self.spec = manifest.preprocess
        self.thresholds = manifest.thresholds
        smoothing = manifest.params["smoothing"]
        radius = int(4 * smoothing + 0.5) if smoothing else 0
        offsets = torch.arange(-radius, radius + 1, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (offsets / max(smoothing, 1e-6)) ** 2)
        self.kernel = kernel / kernel.sum()

    @torch.inference_mode()
    def forward(self, images_BCHW: Array) -> Tensor:
        """(B, C, H, W) float32 -> features (B, N, D), or scores (B, N), float32."""
        answers: Tensor = self.network(eager.to_channels_last(images_BCHW))
        return answers.float()

    @torch.inference_mode()
    def infer(self, images: Sequence[Array]) -> list[AnomalyMap]:
        """See ``runtime.systems.noising.System.infer``."""
        if self.tiles is not None:
            return [self._in_tiles(image, self.tiles) for image in images]
        return [self.score(answer) for answer in self.forward(apply(self.spec, images))]

    def _in_tiles(self, image: Array, tiles: Tiles) -> AnomalyMap:
        """One image, eight tiles at a time."""
        layout = Layout.of((image.shape[0], image.shape[1]), self.spec.size, tiles)
        pieces = layout.cut(image)
        parts = [
            self.score(answer)
            for start in range(0, len(pieces), 8)
            for answer in self.forward(apply(self.spec, pieces[start : start + 8]))
        ]
        influence = [part.influence_HW for part in parts if part.influence_HW is not None]
        return AnomalyMap(
            score=max(part.score for part in parts),
            threshold=parts[0].threshold,
            pixel_threshold=parts[0].pixel_threshold,
            map_HW=layout.stitch(part.map_HW for part in parts),
            influence_HW=layout.stitch(influence) if influence else None,
        )

    def score(self, answer: Tensor) -> AnomalyMap:
        """One image's result from what the network says of it."""
        scores, influence = self.judge(answer)
        return AnomalyMap(
            score=self._image_score(scores),
            threshold=self.thresholds["image"].value,
            pixel_threshold=self.thresholds["pixel"].value,
            map_HW=self._smooth(self._upsample(scores)).numpy(),
            influence_HW=None if influence is None else self._upsample(influence)[0, 0].numpy(),
        )

    def _image_score(self, scores_N: Tensor) -> float:
        if self.params.image_score == "patch":
            return float(scores_N.max())
        return float(scores_N.topk(max(1, round(self.params.top * len(scores_N)))).values.mean())

    @abstractmethod
    def judge(self, answer: Tensor) -> tuple[Tensor, Tensor | None]:
        """Score and influence of each patch, (N,), in standard deviations."""

    def _upsample(self, values_N: Tensor) -> Tensor:
        grid = values_N.reshape(1, 1, *self.params.grid)
        return F.interpolate(grid, size=self.spec.size, mode="bilinear", align_corners=False)

    def _smooth(self, map_11HW: Tensor) -> Tensor:
        if len(self.kernel) == 1:
            return map_11HW[0, 0]
        radius = len(self.kernel) // 2
        padded = F.pad(map_11HW, (radius, radius, radius, radius), mode="reflect")
        rows = F.conv2d(padded, self.kernel[None, None, None])
        return F.conv2d(rows, self.kernel[None, None, :, None])[0, 0]


class EagerDiscriminator(EagerNoising):
    """A trained judge: the network's own scores in the bundle's unit."""

    params: DiscriminatorParams

    def __init__(self, network: eager.Network, bundle: Bundle) -> None:
        super().__init__(network, bundle)
        self.params = bundle.params(DiscriminatorParams)

    def judge(self, answer: Tensor) -> tuple[Tensor, Tensor | None]:
        statistics = self.params.scores
        return (answer - statistics.mean) / statistics.std, None


class EagerBank(EagerNoising):
    """A memory bank, with the signals that the bundle ships."""

    params: Params

    def __init__(self, network: eager.Network, bundle: Bundle) -> None:
        super().__init__(network, bundle)
        self.params = bundle.params(Params)
        self.tiles = self.params.tiles
        self.bank_MD = torch.from_numpy(Bank.load(bundle.asset("bank")).rows_MD)
        self.foreground: Foreground | None = None
        if self.params.foreground is not None:
            direction_D = np.load(bundle.asset("foreground"))
            self.foreground = Foreground(direction_D, self.params.foreground)

    def judge(self, answer: Tensor) -> tuple[Tensor, Tensor | None]:
        params, features_ND = self.params, answer
        distances = torch.cdist(features_ND[None], self.bank_MD[None])[0]
        found = distances.topk(params.neighbours, largest=False)
        distances_NK = found.values
        if params.neighbours == 1:
            statistics = params.signals["distance"]
            scale = params.weights["distance"] / (statistics.std * params.score_std)
            return (distances_NK[:, 0] - statistics.mean) * scale, None
        differences = features_ND[:, None] - self.bank_MD[found.indices]
        directions = differences / distances_NK[..., None].clamp_min(1e-12)
        g_ND = directions.mean(dim=1).abs()
        signals = {"distance": distances_NK[:, 0], "influence": g_ND.mean(dim=1)}
        if params.weights["concentration"]:
            square = g_ND.square()
            ratio = g_ND.shape[1] * square.square().sum(1) / square.sum(1).square()
            signals["concentration"] = ratio.clamp_min(1).log()
        if params.weights["response"]:
            signals["response"] = self._response(g_ND, distances_NK, directions)
        scores = torch.stack(
            [
                weight * (signals[name] - params.signals[name].mean) / params.signals[name].std
                for name, weight in params.weights.items()
                if weight
            ]
        ).sum(dim=0)
        scores = self.of_part(scores / params.score_std, features_ND)
        if not params.weights["influence"]:
            return scores, None
        influence = params.signals["influence"]
        return scores, (signals["influence"] - influence.mean) / influence.std

    def of_part(self, scores_N: Tensor, features_ND: Tensor) -> Tensor:
        """Scores of which the ground's are no more than normal, where the bundle tells it apart."""
        if self.foreground is None:
            return scores_N
        return torch.from_numpy(
            self.foreground.judge(scores_N.numpy(), features_ND.numpy(), self.params.grid)
        )

    def _response(self, g_ND: Tensor, distances_NK: Tensor, directions_NKD: Tensor) -> Tensor:
        params = self.params
        low, high = params.noise_range
        z_ND = (g_ND - g_ND.mean(1, keepdim=True)) / (g_ND.std(1, keepdim=True) + 1e-8)
        delta_N = (distances_NK.mean(1) - params.mean_distance.mean) / params.mean_distance.std
        drive = z_ND + params.distance_weight * delta_N[:, None]
        variance = (low + (high - low) * drive.sigmoid()).square()
        total_N1 = variance.sum(1, keepdim=True)
        along_NK = (directions_NKD.square() * variance[:, None]).sum(-1)
        second_order = 0.5 * (total_N1 - along_NK) / distances_NK.clamp_min(1e-12)
        return torch.minimum(second_order, total_N1.sqrt()).mean(1)


class EagerLayers(EagerBank):
    """One bank per layer: all cosines, and of these the window's."""

    def __init__(self, network: eager.Network, bundle: Bundle) -> None:
        super().__init__(network, bundle)
        assert self.params.layers is not None
        self.widths = list(self.params.layers.widths)
        self.banks = [part.contiguous() for part in torch.split(self.bank_MD, self.widths, dim=1)]
        self.is_far_NM: Tensor | None = None
        window = self.params.layers.window
        if window is not None:
            h, w = self.params.grid
            places_N = torch.arange(h * w)
            rows_M = places_N.repeat_interleave(len(self.bank_MD) // (h * w))
            apart = [
                (places_N[:, None] // w - rows_M // w).abs(),
                (places_N[:, None] % w - rows_M % w).abs(),
            ]
            self.is_far_NM = torch.maximum(*apart) > window

    def judge(self, answer: Tensor) -> tuple[Tensor, Tensor | None]:
        similar = [
            part @ rows_MD.T
            for part, rows_MD in zip(
                torch.split(answer, self.widths, dim=1), self.banks, strict=True
            )
        ]
        if self.is_far_NM is not None:
            similar = [cosines.masked_fill(self.is_far_NM, -1) for cosines in similar]
        raw_N = 1 - torch.stack([cosines.amax(dim=1) for cosines in similar]).mean(dim=0)
        statistics = self.params.signals["distance"]
        weight = self.params.weights["distance"] / self.params.score_std
        return self.of_part(weight * (raw_N - statistics.mean) / statistics.std, answer), None


def contenders(
    run: Path, bundle: Bundle, *, threads: int, say: Callable[[str], None]
) -> list[Contender]:
    """Eager and compiled PyTorch rows for the bundle that was exported from ``run``.

    Raises:
        RunError: the folder is no finished run of ``noising``.
    """
    opened = open_run(run)
    if not isinstance(opened.config, TaskConfig):
        raise RunError(f"{run} is a run of '{opened.info.system}', the bundle is of 'noising'")
    plain = opened.config.model_copy(update={"backbone": opened.config.backbone.plain()})
    model, _ = build_model(plain, weights=False)
    model.load_state_dict(load_file(opened.weights()))
    network: nn.Module = model
    around: type[EagerNoising] = EagerLayers if opened.config.fit.layers else EagerBank
    if isinstance(model, DiscriminatorTraining):
        network, around = model.judge().eval(), EagerDiscriminator
    return eager.contenders(network, lambda way: around(way, bundle), threads=threads, say=say)
