"""The losses of ``refdet``: boxes, classes, and what pulls an object's features to its prototype.

Boxes are xyxy in pixels of the network's input. Every function that is a published formula names
its paper; those that give a value per item leave weighting and averaging to ``DetectionLoss``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from engineworks.training import ranks
from engineworks.training.systems.refdet.assign import Assignment, Targets, iou, pad, task_aligned
from engineworks.training.systems.refdet.config import LossConfig, WeightsConfig

if TYPE_CHECKING:
    from engineworks.training.systems.refdet.head import Output

# --- boxes ---------------------------------------------------------------------------------------


def _centre_and_hull(a_N4: Tensor, b_N4: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of the centres, and squared diagonal of the box around both."""
    between = (a_N4[:, :2] + a_N4[:, 2:] - b_N4[:, :2] - b_N4[:, 2:]) / 2
    hull = torch.maximum(a_N4[:, 2:], b_N4[:, 2:]) - torch.minimum(a_N4[:, :2], b_N4[:, :2])
    return between.square().sum(-1), hull.square().sum(-1).clamp_min(1e-9)


def ciou(boxes_N4: Tensor, wanted_N4: Tensor) -> Tensor:
    """(N,) of ``1 - IoU + rho^2 / c^2 + a v``; the weight a takes no gradient.

    Source: Zheng et al., "Distance-IoU Loss", 2020.
    """
    overlap_N = iou(boxes_N4, wanted_N4)
    distance_N, hull_N = _centre_and_hull(boxes_N4, wanted_N4)
    aspect_N, wanted_aspect_N = (
        torch.atan2(*(b[:, 2:] - b[:, :2]).clamp_min(1e-9).unbind(-1))
        for b in (boxes_N4, wanted_N4)
    )
    v_N = 4 / math.pi**2 * (aspect_N - wanted_aspect_N).square()
    with torch.no_grad():
        a_N = v_N / (1 - overlap_N + v_N).clamp_min(1e-9)
    return 1 - overlap_N + distance_N / hull_N + a_N * v_N


class WIoU(nn.Module):
    """``r R (1 - IoU)``, where R = exp(rho^2 / c^2), c without gradient, turns to far centres.

    r turns to boxes by how they compare with the usual one, beta = (1 - IoU) / mean (1 - IoU):
    v1 is r = 1; v2 beta^0.5, the worse the more; v3 beta / (delta alpha^(beta - delta)), neither
    those that are good already nor the hopeless ones.

    Source: Tong et al., "Wise-IoU: Bounding Box Regression Loss with Dynamic Focusing Mechanism",
    2023.
    """

    mean: Tensor

    def __init__(
        self,
        version: int = 3,
        *,
        alpha: float = 1.9,
        delta: float = 3.0,
        momentum: float = 0.99,
    ) -> None:
        """See the class.

        Args:
            version: 1, 2 or 3.
            momentum: of the running mean of 1 - IoU, which starts at 1.
        """
        super().__init__()
        self.version = version
        self.alpha = alpha
        self.delta = delta
        self.momentum = momentum
        self.register_buffer("mean", torch.ones(()))

    def forward(self, boxes_N4: Tensor, wanted_N4: Tensor) -> Tensor:
        """(N,); in training, the running mean learns from those of all ranks first."""
        missing_N = 1 - iou(boxes_N4, wanted_N4)
        distance_N, hull_N = _centre_and_hull(boxes_N4, wanted_N4)
        loss_N = (distance_N / hull_N.detach()).exp() * missing_N
        if self.version == 1:
            return loss_N
        with torch.no_grad():
            if self.training and ranks.any_of(len(missing_N) > 0):
                self.mean.lerp_(ranks.mean_value(missing_N), 1 - self.momentum)
            beta_N = missing_N / self.mean
            if self.version == 2:
                focus_N = beta_N.sqrt()
            else:
                focus_N = beta_N / (self.delta * self.alpha ** (beta_N - self.delta))
        return focus_N * loss_N


def distribution_focal(logits_N4R: Tensor, distances_N4: Tensor) -> Tensor:
    """(N,) cross-entropy of the two bins beside each true distance; mean over the four sides.

    Args:
        logits_N4R: of R bins at the distances 0, 1 ... R - 1.
        distances_N4: in the same unit; those beyond the last bin count as the last.

    Source: Li et al., "Generalized Focal Loss", 2020.
    """
    last = logits_N4R.shape[-1] - 1
    distances_N4 = distances_N4.clamp(0, last)
    below_N4 = distances_N4.floor().clamp_max(last - 1).long()
    share_N4 = distances_N4 - below_N4  # of the bin above
    log_N4R = logits_N4R.float().log_softmax(-1)
    log_below, log_above = (
        log_N4R.gather(-1, (below_N4 + i)[..., None]).squeeze(-1) for i in (0, 1)
    )
    return -((1 - share_N4) * log_below + share_N4 * log_above).mean(-1)


# --- classes -------------------------------------------------------------------------------------


def binary_cross_entropy(logits: Tensor, targets: Tensor, *, gamma: float = 0.0) -> Tensor:
    """Per element, with soft targets in [0, 1], times ``|target - p| ** gamma``.

    gamma = 0 is plain; 2 is the quality focal loss, in which what is right already hardly counts.

    Source: Li et al., "Generalized Focal Loss", 2020.
    """
    logits = logits.float()
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    return loss * (targets - logits.sigmoid()).abs() ** gamma if gamma else loss


class DetectionLoss(nn.Module):
    """Boxes and classes of one branch of the head, over all anchors."""

    def __init__(self, config: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.wiou = None if config.box == "ciou" else WIoU(int(config.box[-1]))

    def forward(
        self,
        logits_BAC: Tensor,
        distances_BA4R: Tensor,
        boxes_BA4: Tensor,
        anchors_A2: Tensor,
        strides_A: Tensor,
        targets: Targets,
        valid_BC: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Assignment]:
        """Unweighted losses.

        A box weighs as much as its anchor's score should be, and all sums are divided by the sum of
        these weights over the whole batch (at least 1), as in TOOD: an image with many boxes is no
        more than its boxes, and one without any still has to say so.

        Args:
            distances_BA4R: logits of l, t, r, b in units of the stride; R = 1: no distributions.
            boxes_BA4: decoded from them, with gradient.
            valid_BC: bool: classes that count in an image; all where it is None.

        Returns:
            ``box``, ``dfl`` (0 without distributions) and ``cls``; and who was to learn what.
        """
        config = self.config
        boxes_BA4 = boxes_BA4.float()
        found = task_aligned(
            logits_BAC.detach().float().sigmoid(),
            boxes_BA4.detach(),
            anchors_A2,
            targets,
            top_k=config.top_k,
            alpha=config.alpha,
            beta=config.beta,
        )
        wanted_BA4 = targets.boxes_BM4.gather(1, found.box_BA[..., None].expand(-1, -1, 4))
        weights_BA = found.scores_BAC.sum(-1)
        total = ranks.total(weights_BA.sum()).clamp_min(1) / ranks.size()

        positive_BA = found.positive_BA
        weights_N, wanted_N4 = weights_BA[positive_BA], wanted_BA4[positive_BA]
        boxes_N4 = boxes_BA4[positive_BA]
        box_N = ciou(boxes_N4, wanted_N4) if self.wiou is None else self.wiou(boxes_N4, wanted_N4)
        losses = {"box": (box_N * weights_N).sum() / total, "dfl": total.new_zeros(())}
        if distances_BA4R.shape[-1] > 1:
            corners_N22 = wanted_N4.view(-1, 2, 2)
            image_N, anchor_N = positive_BA.nonzero(as_tuple=True)
            away_N22 = (corners_N22 - anchors_A2[anchor_N, None]) / strides_A[anchor_N, None, None]
            sides_N4 = (away_N22 * away_N22.new_tensor([[-1.0], [1.0]])).flatten(1)
            dfl_N = distribution_focal(distances_BA4R[image_N, anchor_N], sides_N4)
            losses["dfl"] = (dfl_N * weights_N).sum() / total

        each_BAC = binary_cross_entropy(logits_BAC, found.scores_BAC, gamma=config.gamma)
        if valid_BC is not None:
            each_BAC = each_BAC * valid_BC[:, None]
        losses["cls"] = each_BAC.sum() / total
        return losses, found


# --- contrast ------------------------------------------------------------------------------------


def pooled(maps: Sequence[Tensor], strides: Sequence[int], boxes: Sequence[Tensor]) -> Tensor:
    """What the maps of all scales hold inside boxes, as a prototype holds it.

    Args:
        maps: (B, c_s, h_s, w_s) of each scale s.
        boxes: (N_b, 4) of each image.

    Returns:
        (N, sum of c_s) over all images' boxes; the part of each scale has length 1.
    """
    parts = [
        F.normalize(
            roi_align(
                m.float(), list(boxes), 1, 1 / stride, sampling_ratio=2, aligned=True
            ).flatten(1),
            dim=1,
        )
        for m, stride in zip(maps, strides, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _mean(loss_N: Tensor, counts_N: Tensor) -> Tensor:
    """Over the items that count; 0 (with a gradient of 0) where none does."""
    return torch.where(counts_N, loss_N, 0).sum() / counts_N.sum().clamp_min(1)


def _cosines(a_ND: Tensor, b_MD: Tensor) -> Tensor:
    return F.normalize(a_ND, dim=1) @ F.normalize(b_MD, dim=1).T


def supervised_contrast(features_ND: Tensor, labels_N: Tensor, temperature: float) -> Tensor:
    """Mean over anchors of -mean log p(p | anchor) over the other items p of the anchor's label.

    Anchors that are alone with their label are left out.

    Source: Khosla et al., "Supervised Contrastive Learning", 2020 (L_out).
    """
    itself_NN = torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
    logits_NN = _cosines(features_ND, features_ND) / temperature
    log_NN = logits_NN.masked_fill(itself_NN, -torch.inf).log_softmax(1)
    same_NN = (labels_N[:, None] == labels_N) & ~itself_NN
    counts_N = same_NN.sum(1)
    return _mean(-torch.where(same_NN, log_NN, 0).sum(1) / counts_N.clamp_min(1), counts_N > 0)


def prototype_contrast(
    features_ND: Tensor, prototypes_PD: Tensor, labels_N: Tensor, temperature: float
) -> Tensor:
    """Cross-entropy of telling by its cosine to every prototype whose feature it is.

    Source: Snell et al., "Prototypical Networks", 2017, with cosines.
    """
    loss_N = F.cross_entropy(
        _cosines(features_ND, prototypes_PD) / temperature, labels_N, reduction="none"
    )
    return _mean(loss_N, torch.ones_like(labels_N, dtype=torch.bool))


def proposal_contrast(
    features_ND: Tensor,
    labels_N: Tensor,
    ious_N: Tensor,
    *,
    temperature: float,
    min_iou: float = 0.5,
    max_gap: float = 1.0,
) -> Tensor:
    """Contrastive proposal encoding: mean over anchors of -log(sum over positives / sum over all).

    Positives of an anchor are other items of its label; both have an IoU of at least ``min_iou``,
    and the two differ by at most ``max_gap``. All are the positives and the items of other labels.
    Anchors without a positive are left out.

    Args:
        ious_N: of each predicted box with the box that it is to be.

    Source: Sun et al., "FSCE: Few-Shot Object Detection via Contrastive Proposal Encoding", 2021,
    with the sum inside of the logarithm.
    """
    good_N = ious_N >= min_iou
    near_NN = (ious_N[:, None] - ious_N).abs() <= max_gap
    same_NN = labels_N[:, None] == labels_N
    itself_NN = torch.eye(len(labels_N), dtype=torch.bool, device=labels_N.device)
    positive_NN = same_NN & near_NN & good_N & good_N[:, None] & ~itself_NN
    anchor_N = positive_NN.any(1)
    logits_NN = _cosines(features_ND, features_ND) / temperature
    over_positives_N, over_all_N = (
        # rows without any: -inf, and not a number in the gradient, unless they are made finite
        torch.where(anchor_N[:, None], torch.where(mask, logits_NN, -torch.inf), 0).logsumexp(1)
        for mask in (positive_NN, positive_NN | ~same_NN)
    )
    return _mean(over_all_N - over_positives_N, anchor_N)


def triplet(
    anchors_ND: Tensor, positives_ND: Tensor, negatives_ND: Tensor, margin: float
) -> Tensor:
    """(N,) of max(0, cos(anchor, negative) - cos(anchor, positive) + margin).

    Source: Schroff et al., "FaceNet", 2015, with cosine distances.
    """
    positive_N = F.cosine_similarity(anchors_ND, positives_ND)
    negative_N = F.cosine_similarity(anchors_ND, negatives_ND)
    return (negative_N - positive_N + margin).clamp_min(0)


def hardest_triplet(
    anchors_ND: Tensor,
    anchor_labels_N: Tensor,
    items_MD: Tensor,
    item_labels_M: Tensor,
    margin: float,
) -> Tensor:
    """Mean triplet loss with each anchor's farthest positive and nearest negative.

    Anchors without either are left out. Items of label -1, background, are negatives of all.

    Source: Hermans et al., "In Defense of the Triplet Loss for Person Re-Identification", 2017.
    """
    if not len(items_MD):
        return anchors_ND.sum() * 0
    same_NM = anchor_labels_N[:, None] == item_labels_M
    with torch.no_grad():
        cosine_NM = _cosines(anchors_ND, items_MD)
        farthest_N = cosine_NM.masked_fill(~same_NM, torch.inf).argmin(1)
        nearest_N = cosine_NM.masked_fill(same_NM, -torch.inf).argmax(1)
    loss_N = triplet(anchors_ND, items_MD[farthest_N], items_MD[nearest_N], margin)
    return _mean(loss_N, same_NM.any(1) & (~same_NM).any(1))


# --- all of them ---------------------------------------------------------------------------------


class Losses(nn.Module):
    """Every loss of a step, and their weighted sum; what is contrasted is that of all ranks."""

    def __init__(self, config: LossConfig, num_base: int) -> None:
        """See the class.

        Args:
            num_base: base classes; 0: there is no branch for them.
        """
        super().__init__()
        self.config = config
        self.prototype = DetectionLoss(config)
        self.base = DetectionLoss(config) if num_base else None

    def forward(
        self,
        output: Output,
        rows_RP: Tensor,
        prototypes_NP: Tensor,
        batch: Mapping[str, Any],
        weights: WeightsConfig,
    ) -> dict[str, Tensor]:
        """Losses by name, ``loss`` their sum; contrasts that weigh nothing are not computed.

        Args:
            output: of the detector for ``batch["images"]``.
            rows_RP: of the reference pictures of all ranks, which belong to N objects by
                ``batch["object_of_picture"]``.
            prototypes_NP: what was looked for.
            batch: see ``data``.
        """
        objects, prompted_BN = batch["objects"], batch["prompted"]
        targets = pad(batch["boxes"], objects, prompted_BN)
        boxes_BA4 = output.boxes(output.prototype)
        terms, found = self.prototype(
            output.prototype.logits_BAC,
            output.prototype.distances_BA4R,
            boxes_BA4,
            output.anchors_A2,
            output.strides_A,
            targets,
            prompted_BN,
        )
        shares = {name: (term, getattr(weights, name)) for name, term in terms.items()}
        if self.base is not None and output.base is not None and weights.base:
            terms, _ = self.base(
                output.base.logits_BAC,
                output.base.distances_BA4R,
                output.boxes(output.base),
                output.anchors_A2,
                output.strides_A,
                pad(batch["boxes"], batch["base"]),
            )
            for name, term in terms.items():
                shares[f"base_{name}"] = term, weights.base * getattr(weights, name)
        shares |= self._contrast(output, rows_RP, prototypes_NP, batch, weights)
        if weights.proposals:
            term = self._proposals(output, boxes_BA4.detach(), found, targets)
            shares["proposals"] = term, weights.proposals
        losses = {name: term for name, (term, _) in shares.items()}
        return {"loss": torch.stack([t * w for t, w in shares.values()]).sum()} | losses

    def _contrast(
        self,
        output: Output,
        rows_RP: Tensor,
        prototypes_NP: Tensor,
        batch: Mapping[str, Any],
        weights: WeightsConfig,
    ) -> dict[str, tuple[Tensor, float]]:
        """What compares the objects in the frames with the references: loss and weight by name."""
        config, shares = self.config, dict[str, tuple[Tensor, float]]()
        if not (weights.prototype or weights.supervised or weights.triplet):
            return shares
        known = [
            boxes_M4[objects_M >= 0]
            for boxes_M4, objects_M in zip(batch["boxes"], batch["objects"], strict=True)
        ]
        labels_M = torch.cat([objects_M[objects_M >= 0] for objects_M in batch["objects"]])
        labels_M = ranks.gather(labels_M)
        features_MP = ranks.gather(pooled(output.prototype.embeddings, output.strides, known))
        if weights.prototype:
            term = prototype_contrast(features_MP, prototypes_NP, labels_M, config.temperature)
            shares["prototype"] = term, weights.prototype
        if weights.supervised:
            items = torch.cat([rows_RP, features_MP])
            labels = torch.cat([batch["object_of_picture"], labels_M])
            term = supervised_contrast(items, labels, config.temperature)
            shares["supervised"] = term, weights.supervised
        if weights.triplet:
            size = batch["images"].shape[2:]
            empty = elsewhere(batch["boxes"], size)
            nothing_KP = ranks.gather(pooled(output.prototype.embeddings, output.strides, empty))
            items = torch.cat([features_MP, nothing_KP])
            labels = torch.cat([labels_M, labels_M.new_full((len(nothing_KP),), -1)])
            own_N = torch.arange(len(prototypes_NP), device=labels.device)
            term = hardest_triplet(prototypes_NP, own_N, items, labels, config.margin)
            shares["triplet"] = term, weights.triplet
        return shares

    def _proposals(
        self, output: Output, boxes_BA4: Tensor, found: Assignment, targets: Targets
    ) -> Tensor:
        """Contrast of what the maps hold inside predicted boxes, each from its own image."""
        config = self.config
        places_K2 = found.positive_BA.nonzero()
        order_K = ranks.draw(len(places_K2), config.proposals, places_K2.device)
        image_K, anchor_K = places_K2[order_K.sort().values].unbind(1)
        counts = torch.bincount(image_K, minlength=len(boxes_BA4)).tolist()
        boxes = torch.split(boxes_BA4[image_K, anchor_K], counts)
        return proposal_contrast(
            ranks.gather(pooled(output.prototype.embeddings, output.strides, boxes)),
            ranks.gather(targets.classes_BM[image_K, found.box_BA[image_K, anchor_K]]),
            ranks.gather(found.ious_BA[image_K, anchor_K]),
            temperature=config.proposal_temperature,
            min_iou=config.min_iou,
            max_gap=config.max_gap,
        )


def elsewhere(
    boxes: Sequence[Tensor], size: Sequence[int], *, max_iou: float = 0.1
) -> list[Tensor]:
    """Boxes of the objects' sizes at random places of their images, where nothing is.

    Args:
        boxes: (M_b, 4) of each image: all that are known.
        size: (height, width) of the images.
        max_iou: a place that overlaps a known box by more is left out.

    Returns:
        (K_b, 4) of each image.
    """
    known = pad(boxes, [each.new_zeros(len(each), dtype=torch.long) for each in boxes])
    sides_BM2 = known.boxes_BM4[..., 2:] - known.boxes_BM4[..., :2]
    free_BM2 = (sides_BM2.new_tensor([size[1], size[0]]) - sides_BM2).clamp_min(0)
    corner_BM2 = torch.rand_like(free_BM2) * free_BM2
    found_BM4 = torch.cat([corner_BM2, corner_BM2 + sides_BM2], dim=-1)
    overlap_BMM = iou(found_BM4[:, :, None], known.boxes_BM4[:, None])
    empty_BM = (overlap_BMM.amax(-1) <= max_iou) & known.real_BM
    return [each[kept] for each, kept in zip(found_BM4, empty_BM, strict=True)]
