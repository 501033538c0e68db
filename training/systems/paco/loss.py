"""The loss of ``paco``: weighted cross-entropy, part contrast, second-order consistency.

Parts come as (V, B, K, d): K vectors in each of V = 2 views of B pictures.

* *PaC*, part contrast. Every part of view 1 (anchor) has one part of view 2 as its positive, by the
  cheapest of all K! assignments, and the parts of pictures of other classes, both views, as
  negatives. With d+ and d- the distances to the positive and to the chosen negative, the loss is
  the mean of max(0, d+ - d- + margin) over the anchors that have a negative.
* *SoC*, second-order consistency. The covariance of a picture's parts is to be the same in both
  views (mean squared distance), and close to the running covariance of its class (times beta).

Exact and batched: all distances from a few matrix products, the choice of negatives without
gradient, and the gradient through the chosen ones only, which is the same and much cheaper.

Source: PaCo-2; what differs from the published code stands in ``config.LossConfig``.
"""

from __future__ import annotations

from functools import cache
from itertools import permutations
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from engineworks.training import ranks
from engineworks.training.profiler import section
from engineworks.training.systems.paco.config import LossConfig
from engineworks.training.systems.paco.metric import (
    Euclid,
    LowRank,
    Metric,
    Regulariser,
    RunningCovariance,
    Whitening,
    factors,
    of_the_others,
    safe_sqrt,
    squared_distance,
    squared_norm,
    unit,
)

# 5! = 120 sums are nothing; 6! and more are left to a solver
_ENUMERATED = 5
# a negative is beyond the positive only by more than the rounding of distances
_BEYOND = 1 + 1e-5


def weighted_cross_entropy(
    logits_BC: Tensor,
    labels_B: Tensor,
    weights_B: Tensor,
    *,
    share: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Mean over b, of all ranks, of (1 - share) CE_b + share w_b CE_b.

    With weights that are all the mean of the pictures' saliency this is the published formula.
    """
    each_B = F.cross_entropy(logits_BC, labels_B, reduction="none", label_smoothing=label_smoothing)
    return ranks.mean_loss(each_B * (1 - share + share * weights_B))


# --- matching ------------------------------------------------------------------------------------


@cache
def _permutations(num: int, device: torch.device) -> Tensor:
    """(K!, K) in lexicographic order."""
    return torch.tensor(list(permutations(range(num))), device=device)


@torch.no_grad()
def match(costs_BKK: Tensor) -> Tensor:
    """The cheapest assignment of columns to rows: (B, K) column of each row.

    Of several equally cheap ones the first in lexicographic order, up to five rows.
    """
    num = costs_BKK.shape[-1]
    if num > _ENUMERATED:
        found = [linear_sum_assignment(costs_KK)[1] for costs_KK in costs_BKK.cpu().numpy()]
        return torch.from_numpy(np.stack(found)).to(costs_BKK.device)
    table_PK = _permutations(num, costs_BKK.device)
    rows_K = torch.arange(num, device=costs_BKK.device)
    return table_PK[costs_BKK[:, rows_K, table_PK].sum(-1).argmin(-1)]


def cosine_costs(a_BKD: Tensor, b_BKD: Tensor) -> Tensor:
    """(B, K, K) of 1 - cosine."""
    return 1 - unit(a_BKD) @ unit(b_BKD).mT


# --- part contrast -------------------------------------------------------------------------------


def negative_pool(
    parts_VBKD: Tensor, labels_B: Tensor, cap: int | None = None
) -> tuple[Tensor, Tensor]:
    """Every part of the batch, and whose negative it is.

    Args:
        cap: only the next so many pictures of the batch, beginning again at its end.

    Returns:
        Pool (1, N, d), or (B, N, d) where a cap leaves each picture its own, and (B, N) bool: of
        another class, which a picture's own parts never are.
    """
    num = parts_VBKD.shape[1]
    pool_BND = parts_VBKD.transpose(0, 1).flatten(1, 2)
    per_picture = pool_BND.shape[1]
    if cap is None or cap >= num - 1:
        allowed_BB = labels_B[:, None] != labels_B
        return pool_BND.flatten(0, 1)[None], allowed_BB.repeat_interleave(per_picture, 1)
    steps = torch.arange(num + cap, device=labels_B.device)
    next_BP = steps.unfold(0, cap + 1, 1)[:, 1:] % num
    allowed_BP = labels_B[:, None] != labels_B[next_BP]
    return pool_BND[next_BP].flatten(1, 2), allowed_BP.repeat_interleave(per_picture, 1)


@torch.no_grad()
def _mine(
    squares_BKN: Tensor,
    positive_BK: Tensor,
    allowed_BKN: Tensor,
    mining: Literal["semi-hard", "hardest"],
) -> Tensor:
    """(B, K) place of the chosen negative; any place where none is allowed."""
    squares_BKN = squares_BKN.masked_fill(~allowed_BKN, torch.inf)
    nearest_BK = squares_BKN.argmin(-1)
    if mining == "hardest":
        return nearest_BK
    too_near = squares_BKN <= positive_BK[..., None] * _BEYOND
    beyond = squares_BKN.masked_fill(too_near, torch.inf).min(-1)
    return torch.where(beyond.values.isfinite(), beyond.indices, nearest_BK)


def part_contrast(
    anchors_BKD: Tensor,
    positives_BKD: Tensor,
    pool_XND: Tensor,
    allowed_BN: Tensor,
    metric: Metric,
    *,
    margin: float,
    mining: Literal["semi-hard", "hardest"] = "semi-hard",
    top_m: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Triplet hinge over all anchors that have a negative.

    Args:
        positives_BKD: in the anchors' order.
        pool_XND: (1, N, d), or (B, N, d).
        allowed_BN: which of the pool are negatives of a picture.
        mining: ``semi-hard``: the nearest negative that is farther than the positive, or the
            nearest where none is; ``hardest``: the nearest.
        top_m: look only among so many negatives of largest cosine with the anchor.

    Returns:
        The mean and the share of anchors above 0, both 0 where no anchor has a negative.
    """
    positive_BK = metric.squared(anchors_BKD - positives_BKD)
    with torch.no_grad():
        allowed_BKN = allowed_BN[:, None].expand(*anchors_BKD.shape[:2], -1)
        if top_m is None or top_m >= allowed_BN.shape[1]:
            squares = metric.pairwise(anchors_BKD, pool_XND)
            place_BK = _mine(squares, positive_BK, allowed_BKN, mining)
        else:
            cosine_BKN = unit(anchors_BKD) @ unit(pool_XND).mT
            near_BKM = cosine_BKN.masked_fill(~allowed_BKN, -torch.inf).topk(top_m).indices
            differences = anchors_BKD.unsqueeze(2) - _rows(pool_XND, near_BKM)
            squares = metric.squared(differences.flatten(1, 2)).view(near_BKM.shape)
            place_BKM = _mine(squares, positive_BK, allowed_BKN.gather(2, near_BKM), mining)
            place_BK = near_BKM.gather(2, place_BKM.unsqueeze(2)).squeeze(2)
    negative_BK = metric.squared(anchors_BKD - _rows(pool_XND, place_BK))
    has_negative_B1 = allowed_BN.any(1, keepdim=True)
    hinge_BK = (safe_sqrt(positive_BK) - safe_sqrt(negative_BK) + margin).clamp_min(0)
    hinge_BK = torch.where(has_negative_B1, hinge_BK, 0)
    count = (has_negative_B1.sum() * hinge_BK.shape[1]).clamp_min(1)
    return hinge_BK.sum() / count, (hinge_BK > 0).sum(dtype=hinge_BK.dtype) / count


def _rows(pool_XND: Tensor, index: Tensor) -> Tensor:
    """(X, N, d) and (B, ...) -> (B, ..., d)."""
    if len(pool_XND) == 1:
        return pool_XND[0, index]
    pictures = torch.arange(len(index), device=index.device)
    return pool_XND[pictures.view(-1, *[1] * (index.ndim - 1)), index]


# --- second-order consistency --------------------------------------------------------------------


def consistency(
    rows_VBKD: Tensor,
    regulariser: Regulariser,
    kind: Literal["fro", "log-euclidean", "stein"],
    *,
    normalise: bool = False,
    prototypes_BDD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How far the two views' covariances are apart, and their mean from a prototype.

    Args:
        rows_VBKD: ``metric.factors`` of the parts.
        normalise: every covariance is divided by its trace.
        prototypes_BDD: covariances, not regularised.

    Returns:
        (B,) squared distances between the views, and to the prototypes (0 without).
    """
    width = rows_VBKD.shape[-1]
    trace_VB = rows_VBKD.square().sum((-2, -1))
    diagonal_VB = regulariser.diagonal(trace_VB, width)
    keep_VB = torch.full_like(trace_VB, regulariser.keep)
    if normalise:
        whole_VB = regulariser.keep * trace_VB + width * diagonal_VB
        diagonal_VB, keep_VB = diagonal_VB / whole_VB, keep_VB / whole_VB
    if prototypes_BDD is not None:
        prototypes_BDD = regulariser.dense(prototypes_BDD)
        if normalise:
            traces = prototypes_BDD.diagonal(dim1=1, dim2=2).sum(1)
            prototypes_BDD = prototypes_BDD / traces[:, None, None]
    if kind == "fro":
        return _fro(rows_VBKD, keep_VB, diagonal_VB, prototypes_BDD)
    identity = torch.eye(width, dtype=rows_VBKD.dtype, device=rows_VBKD.device)
    views_VBDD = keep_VB[..., None, None] * (rows_VBKD.mT @ rows_VBKD)
    views_VBDD = views_VBDD + diagonal_VB[..., None, None] * identity
    gap_B = squared_distance(views_VBDD[0], views_VBDD[1], kind)
    if prototypes_BDD is None:
        return gap_B, torch.zeros_like(gap_B)
    return gap_B, squared_distance(views_VBDD.mean(0), prototypes_BDD, kind)


def _fro(
    rows_VBKD: Tensor, keep_VB: Tensor, diagonal_VB: Tensor, prototypes_BDD: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same for Frobenius' norm, from the products of 2K rows."""
    width = rows_VBKD.shape[-1]
    rows_BRD = rows_VBKD.transpose(0, 1).flatten(1, 2)
    gram_BRR = rows_BRD @ rows_BRD.mT
    first, second = keep_VB[..., None].expand(rows_VBKD.shape[:-1])
    difference_BR = torch.cat([first, -second], 1)
    gap_B = squared_norm(gram_BRR, difference_BR, diagonal_VB[0] - diagonal_VB[1], width)
    if prototypes_BDD is None:
        return gap_B, torch.zeros_like(gap_B)
    weights_BR, diagonal_B = torch.cat([first, second], 1) / 2, diagonal_VB.mean(0)
    own_B = squared_norm(gram_BRR, weights_BR, diagonal_B, width)
    along_BR = ((rows_BRD @ prototypes_BDD) * rows_BRD).sum(-1)
    trace_B = prototypes_BDD.diagonal(dim1=1, dim2=2).sum(1)
    common_B = (weights_BR * along_BR).sum(1) + diagonal_B * trace_B
    theirs_B = prototypes_BDD.square().sum((1, 2))
    return gap_B, (own_B - 2 * common_B + theirs_B).clamp_min(0)


# --- the whole -----------------------------------------------------------------------------------


class PartLoss(nn.Module):
    """PaC and SoC with their running covariances, in float32 also under autocast.

    Running covariances are read before the batch updates them, so no part is measured by a
    statistic of itself.

    Args:
        width: d of the parts.
    """

    def __init__(self, config: LossConfig, num_classes: int, width: int) -> None:
        super().__init__()
        self.config = config
        self.has_prototypes = bool(config.soc and config.prototype)
        of_class = bool(config.pac) and config.metric == "class"
        of_all = bool(config.pac) and config.metric == "global"
        self.per_class = self.overall = None
        if self.has_prototypes or of_class:
            self.per_class = RunningCovariance(num_classes, width, config.momentum)
        if of_all:
            self.overall = RunningCovariance(1, width, config.momentum)

    def forward(self, parts_VBKD: Tensor, labels_B: Tensor, epoch: int = 0) -> dict[str, Tensor]:
        """Scalars ``pac``, ``soc`` and ``active``, the share of triplets that PaC acts on.

        Args:
            parts_VBKD: V = 2; of any floating dtype.
            labels_B: int64.
            epoch: epochs done, for ``matching_warmup_epochs``.
        """
        with torch.autocast(parts_VBKD.device.type, enabled=False):
            parts = parts_VBKD.to(torch.promote_types(parts_VBKD.dtype, torch.float32))
            return self._terms(unit(parts) if self.config.normalise else parts, labels_B, epoch)

    def _terms(self, parts_VBKD: Tensor, labels_B: Tensor, epoch: int) -> dict[str, Tensor]:
        config = self.config
        zero = parts_VBKD.new_zeros(())
        terms = {"pac": zero, "soc": zero, "active": zero}
        prototypes = None
        with section("covariance"):
            rows_VBKD = factors(parts_VBKD)
            mean_BDD = None
            if self.per_class or self.overall or (config.pac and config.metric == "batch"):
                rows_BRD = rows_VBKD.detach().transpose(0, 1).flatten(1, 2)
                mean_BDD = rows_BRD.mT @ rows_BRD / 2
            if config.pac:
                metric = self._metric(rows_VBKD, mean_BDD, labels_B)
            if self.has_prototypes and self.per_class is not None:
                prototypes = self.per_class.read(labels_B)
            if self.training and mean_BDD is not None:
                if self.per_class is not None:
                    self.per_class.update(labels_B, mean_BDD)
                if self.overall is not None:
                    self.overall.update(torch.zeros_like(labels_B), mean_BDD)
        if config.pac:
            with section("matching"):
                place_BK = self._match(parts_VBKD, metric, epoch)
            with section("pac"):
                index_BKD = place_BK.unsqueeze(-1).expand(parts_VBKD[1].shape)
                pool_XND, allowed_BN = negative_pool(parts_VBKD, labels_B, config.pool_cap)
                terms["pac"], terms["active"] = part_contrast(
                    parts_VBKD[0],
                    parts_VBKD[1].gather(1, index_BKD),
                    pool_XND,
                    allowed_BN,
                    metric,
                    margin=config.margin,
                    mining=config.mining,
                    top_m=config.top_m,
                )
        if config.soc:
            with section("soc"):
                terms["soc"] = self._consistency(rows_VBKD, prototypes)
        return terms

    def _metric(self, rows_VBKD: Tensor, mean_BDD: Tensor | None, labels_B: Tensor) -> Metric:
        """See ``LossConfig.metric``."""
        config = self.config
        if config.metric == "euclid":
            return Euclid()
        # the published code adds the ridge to each view and once more to their mean
        regulariser = Regulariser(config.shrinkage, 2 * config.ridge)
        if mean_BDD is None or config.metric == "pair":
            rows_BRD = rows_VBKD.transpose(0, 1).flatten(1, 2) / 2**0.5
            diagonal_B = regulariser.diagonal(rows_BRD.square().sum((1, 2)), rows_BRD.shape[-1])
            rows_BRD = rows_BRD * regulariser.keep**0.5
            return LowRank.of(rows_BRD, diagonal_B, normalise=config.normalise)
        if config.metric == "global" and self.overall is not None:
            overall_1DD, seen_1 = self.overall.read(torch.zeros_like(labels_B[:1]))
            if seen_1:
                return Whitening.of(regulariser.dense(overall_1DD), normalise=config.normalise)
        covariance_BDD = of_the_others(mean_BDD)
        if config.metric == "class" and self.per_class is not None:
            own_BDD, seen_B = self.per_class.read(labels_B)
            covariance_BDD = torch.where(seen_B[:, None, None], own_BDD, covariance_BDD)
        return Whitening.of(regulariser.dense(covariance_BDD), normalise=config.normalise)

    @torch.no_grad()
    def _match(self, parts_VBKD: Tensor, metric: Metric, epoch: int) -> Tensor:
        first, second = parts_VBKD
        if self.config.matching == "cosine" or epoch < self.config.matching_warmup_epochs:
            return match(cosine_costs(first, second))
        return match(metric.pairwise(first, second).sqrt())

    def _consistency(self, rows_VBKD: Tensor, prototypes: tuple[Tensor, Tensor] | None) -> Tensor:
        config = self.config
        gap_B, drift_B = consistency(
            rows_VBKD,
            Regulariser(config.shrinkage, config.ridge),
            config.soc_distance,
            normalise=config.soc_normalise,
            prototypes_BDD=None if prototypes is None else prototypes[0],
        )
        if prototypes is None:
            return gap_B.mean()
        seen_B = prototypes[1]
        drift = torch.where(seen_B, drift_B, 0).sum() / seen_B.sum().clamp_min(1)
        return gap_B.mean() + config.prototype * drift
