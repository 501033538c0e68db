"""The classifier of ``paco`` and what surrounds it in training.

``Paco`` is what is exported: backbone -> mean over the map -> linear. In training every picture
comes in two views; parts of their maps are chosen, described and contrasted, and nothing of that is
left in the graph.

Source: PaCo-2 (parts by saliency, contrast of parts between views).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engineworks.runtime.errors import InputError
from engineworks.training import ranks
from engineworks.training.profiler import section
from engineworks.training.systems.paco.config import LossConfig, PartsConfig
from engineworks.training.systems.paco.loss import PartLoss, weighted_cross_entropy


class Paco(nn.Module):
    """Images to logits.

    Args:
        backbone: images (B, 3, H, W) -> [one map (B, C, h, w)].
        channels: C.
    """

    def __init__(self, backbone: nn.Module, channels: int, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images -> logits (B, classes) and embedding (B, C)."""
        embedding_BF = self.pool(self.features(images_BCHW))
        return self.classifier(embedding_BF), embedding_BF

    def features(self, images_BCHW: Tensor) -> Tensor:
        """The map (B, C, h, w)."""
        (map_BCHW,) = self.backbone(images_BCHW)
        return torch.as_tensor(map_BCHW)

    @staticmethod
    def pool(map_BCHW: Tensor) -> Tensor:
        """The embedding (B, C), mean of the map."""
        return map_BCHW.mean((2, 3))


class PartSampler:
    """Where the parts of a map are: peaks of its saliency, and a window around each.

    Args:
        num: K.
        window: side in cells, odd.
        radius: no second peak within so many rows and columns of a peak.
    """

    def __init__(self, num: int, window: int, radius: int) -> None:
        self.num = num
        self.window = window
        self.radius = radius

    @staticmethod
    def saliency(map_BCHW: Tensor) -> Tensor:
        """(B, h, w): (sum_c a_c F_c) softmax over places of mean_c F, a = softmax_c mean(F_c)."""
        map_BCN = map_BCHW.flatten(2)
        map_BCN = map_BCN.to(torch.promote_types(map_BCN.dtype, torch.float32))
        attention_B1C = map_BCN.mean(2).softmax(1)[:, None]
        attended_BN = (attention_B1C @ map_BCN).squeeze(1)
        return (attended_BN * map_BCN.mean(1).softmax(1)).view(-1, *map_BCHW.shape[2:])

    @torch.no_grad()
    def peaks(self, map_BCHW: Tensor) -> Tensor:
        """(B, K, 2) int64 row and column, strongest first, of equals the first in reading order.

        Where all cells lie within the radius of a peak, the search goes on among those that the
        fewest peaks cover; with more parts than cells peaks repeat.
        """
        saliency_BHW = self.saliency(map_BCHW)
        height, width = saliency_BHW.shape[1:]
        row_H = torch.arange(height, device=map_BCHW.device)
        column_W = torch.arange(width, device=map_BCHW.device)
        covered_BHW = torch.zeros_like(saliency_BHW, dtype=torch.long)
        peaks: list[Tensor] = []
        for _ in range(self.num):
            open_BHW = covered_BHW == covered_BHW.amin((1, 2), keepdim=True)
            place_B = saliency_BHW.where(open_BHW, -torch.inf).flatten(1).argmax(1)
            row_B1, column_B1 = (place_B // width)[:, None], (place_B % width)[:, None]
            peaks.append(torch.cat([row_B1, column_B1], 1))
            near_BH = (row_H - row_B1).abs() <= self.radius
            near_BW = (column_W - column_B1).abs() <= self.radius
            covered_BHW = covered_BHW + (near_BH[:, :, None] & near_BW[:, None])
        return torch.stack(peaks, 1)

    def windows(self, peaks_BK2: Tensor, map_BCHW: Tensor) -> Tensor:
        """(B, K, h w) weights of the mean over each window, clipped at the border.

        Float32, or float64 for a map of it.
        """
        dtype = torch.promote_types(map_BCHW.dtype, torch.float32)
        half = self.window // 2
        row_H, column_W = (torch.arange(n, device=map_BCHW.device) for n in map_BCHW.shape[2:])
        in_BKH = (row_H - peaks_BK2[..., :1]).abs() <= half
        in_BKW = (column_W - peaks_BK2[..., 1:]).abs() <= half
        window_BKN = (in_BKH[..., :, None] & in_BKW[..., None, :]).flatten(2).to(dtype)
        return window_BKN / window_BKN.sum(2, keepdim=True)

    @staticmethod
    def parts(map_BCHW: Tensor, windows_BKN: Tensor) -> Tensor:
        """(B, K, C) means over the windows, as one batched product."""
        # in this order the gradient of the map has the map's layout
        return (map_BCHW.flatten(2) @ windows_BKN.mT.to(map_BCHW.dtype)).mT


class PeakMemory(nn.Module):
    """The last peaks of every training picture, in coordinates of the original picture.

    Args:
        refresh: every so many visits of a picture its peaks are searched; in between the stored
            ones are used.
    """

    def __init__(self, num_pictures: int, num_parts: int, refresh: int) -> None:
        super().__init__()
        self.refresh = refresh
        self.register_buffer("points_NK2", torch.zeros(num_pictures, num_parts, 2))
        self.register_buffer("visits_N", torch.full((num_pictures,), refresh))
        self.points_NK2: Tensor
        self.visits_N: Tensor

    def recall(self, index_B: Tensor, affine_VB23: Tensor, grid: tuple[int, int]) -> Tensor | None:
        """Peaks (V B, K, 2) in cells of each view, or None where one has to be searched again."""
        if ranks.any_of(bool((self.visits_N[index_B] >= self.refresh).any())):
            return None
        self.visits_N[ranks.gather(index_B)] += 1
        points_BK2 = self.points_NK2[index_B].to(affine_VB23.dtype)
        turn_VB22, shift_VB12 = affine_VB23[..., :2], affine_VB23[..., 2].unsqueeze(-2)
        size = points_BK2.new_tensor(grid)
        cells = ((points_BK2 @ turn_VB22.mT + shift_VB12).flip(-1) * size).floor().long()
        last = torch.tensor(grid, device=cells.device) - 1
        return cells.clamp_min(0).minimum(last).flatten(0, 1)

    def store(
        self, index_B: Tensor, affine_B23: Tensor, peaks_BK2: Tensor, grid: tuple[int, int]
    ) -> None:
        """Remember peaks that were found in the cells of a view."""
        size = affine_B23.new_tensor(grid)
        points_BK2 = ((peaks_BK2 + 0.5) / size).flip(-1)
        turn_B22, shift_B12 = affine_B23[..., :2], affine_B23[..., 2].unsqueeze(-2)
        points_BK2 = torch.linalg.solve(turn_B22, (points_BK2 - shift_B12).mT).mT
        index_B = ranks.gather(index_B)
        self.points_NK2[index_B] = ranks.gather(points_BK2.to(self.points_NK2.dtype))
        self.visits_N[index_B] = 1


class PacoTraining(nn.Module):
    """``Paco`` with everything that only training needs.

    Args:
        num_pictures: of the training set; used with ``parts.refresh`` > 1.
    """

    def __init__(
        self,
        net: Paco,
        parts: PartsConfig,
        loss: LossConfig,
        *,
        num_classes: int,
        num_pictures: int = 0,
    ) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.sampler = PartSampler(parts.num, parts.window, parts.radius)
        self.reduction = self.criterion = self.memory = None
        if loss.pac or loss.soc:
            self.reduction = nn.Linear(net.classifier.in_features, parts.width, bias=False)
            nn.init.kaiming_normal_(self.reduction.weight)
            self.criterion = PartLoss(loss, num_classes, parts.width)
        if parts.refresh > 1:
            self.memory = PeakMemory(num_pictures, parts.num, parts.refresh)

    def forward(
        self,
        views_VBCHW: Tensor,
        labels_B: Tensor,
        ramp: float = 1.0,
        epoch: int = 0,
        index_B: Tensor | None = None,
        affine_VB23: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            views_VBCHW: V = 2 views of every picture, normalised.
            labels_B: int64.
            ramp: in [0, 1], factor of lambda and eta.
            epoch: epochs done.
            index_B, affine_VB23: with ``parts.refresh`` > 1: place of each picture in the training
                set, and the map from the original picture's (x, y) in [0, 1]^2 to the view's.

        Returns:
            Scalars ``loss``, ``ce``, ``pac``, ``soc`` (before their weights), ``active`` (share of
            triplets that PaC acts on) and ``accuracy``.

        Raises:
            InputError: ``parts.refresh`` > 1 without ``index_B`` or ``affine_VB23``.
        """
        num_views = len(views_VBCHW)
        with section("backbone"):
            map_BCHW = self.net.features(views_VBCHW.flatten(0, 1))
            embedding_BF = self.net.pool(map_BCHW).view(*views_VBCHW.shape[:2], -1).mean(0)
            logits_BC = self.net.classifier(embedding_BF)
        contrasts = ramp > 0 and self.criterion is not None
        weights_B = torch.ones_like(labels_B, dtype=torch.float32)
        parts_BKD = None
        if contrasts or self.loss.saliency:
            with section("sampling"):
                peaks_BK2 = self._peaks(map_BCHW, index_B, affine_VB23)
                windows_BKN = self.sampler.windows(peaks_BK2, map_BCHW)
                if self.loss.saliency:
                    weights_B = sample_weights(map_BCHW, windows_BKN, num_views)
                if contrasts and self.reduction is not None:
                    parts_BKD = self.reduction(self.sampler.parts(map_BCHW, windows_BKN))
        ce = weighted_cross_entropy(
            logits_BC,
            labels_B,
            weights_B,
            share=self.loss.saliency,
            label_smoothing=self.loss.label_smoothing,
        )
        zero = ce.new_zeros(())
        losses = {"loss": ce, "ce": ce, "pac": zero, "soc": zero, "active": zero}
        if parts_BKD is not None and self.criterion is not None:
            parts_VBKD = parts_BKD.view(num_views, -1, *parts_BKD.shape[1:])
            # parts of all pictures of the batch are compared with each other
            parts_VBKD = ranks.gather(parts_VBKD.transpose(0, 1)).transpose(0, 1)
            losses |= self.criterion(parts_VBKD, ranks.gather(labels_B), epoch)
            weighted = self.loss.pac * losses["pac"] + self.loss.soc * losses["soc"]
            losses["loss"] = ce + ramp * weighted
        elif self.reduction is not None:
            # distributed training waits for the gradient of every parameter, be it 0
            losses["loss"] = ce + 0 * self.reduction.weight.sum()
        right_B = (logits_BC.argmax(1) == labels_B).float()
        return losses | {"accuracy": ranks.mean_loss(right_B)}

    @torch.no_grad()
    def peaks(self, images_BCHW: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What the net looks at: peaks (B, K, 2), row and column in cells, and (rows, columns)."""
        map_BCHW = self.net.features(images_BCHW)
        return self.sampler.peaks(map_BCHW), _grid(map_BCHW)

    @torch.no_grad()
    def _peaks(
        self, map_BCHW: Tensor, index_B: Tensor | None, affine_VB23: Tensor | None
    ) -> Tensor:
        """(V B, K, 2), searched or remembered."""
        if self.memory is None:
            return self.sampler.peaks(map_BCHW)
        if index_B is None or affine_VB23 is None:
            raise InputError(
                "parts.refresh is more than 1, and the batch does not say which pictures it holds",
                fix="give index_B and affine_VB23, or set parts.refresh to 1",
            )
        grid = _grid(map_BCHW)
        peaks = self.memory.recall(index_B, affine_VB23, grid)
        if peaks is None:
            peaks = self.sampler.peaks(map_BCHW)
            self.memory.store(index_B, affine_VB23[0], peaks[: len(index_B)], grid)
        return peaks


def part_saliency(map_BCHW: Tensor, windows_BKN: Tensor) -> Tensor:
    """(B,) mean over the windows of the map's length |F|, without gradient."""
    length_BN = map_BCHW.detach().flatten(2).square().sum(1, dtype=windows_BKN.dtype).sqrt()
    return (windows_BKN @ length_BN[..., None]).mean((1, 2))


def sample_weights(map_BCHW: Tensor, windows_BKN: Tensor, num_views: int) -> Tensor:
    """(B,) saliency of every picture over its views, divided by the mean of all ranks' batch.

    A batch without any saliency has weights of 1.
    """
    saliency_B = part_saliency(map_BCHW, windows_BKN).view(num_views, -1).mean(0)
    mean = ranks.mean_value(saliency_B)
    return torch.where(mean > 0, saliency_B / torch.where(mean > 0, mean, 1), 1)


def _grid(map_BCHW: Tensor) -> tuple[int, int]:
    height, width = map_BCHW.shape[2:]
    return height, width
