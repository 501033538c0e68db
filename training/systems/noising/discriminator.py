"""A judge without a memory bank: a small net that tells normal patches from the same with noise.

Per step, normal patch features x and x + sigma * e, e standard normal, pass through the net; it
learns by binary cross-entropy which is which, and its logit is the patch's score. What the noise
looks like decides what the net learns to see. Its variance is a mixture of three parts,

    sigma_i^2 = (r l)^2 sum_j pi_j p_ij,    each p_j of mean sum 1 over the normal patches:

    influence   (g_i d)^2   as ``runtime.systems.noising`` proposes it: where the distance d to the
                            bank depends on dimension i, by as much as d
    spread      s_i^2       the variance of dimension i over all normal patches
    distance    (s_i d)^2   the same, but longer where the patch lies far from the bank

The shares pi are learned against the net: they ascend its loss. All mixtures have the same mean
energy l^2, the mean square of d, so the adversary chooses directions and cannot win by noise that
vanishes or leave the features' scale; that is why the game needs no further balance. The factor r
is drawn per patch (``reach``). Noise alike in all dimensions is no part: it is easily told by the
dimensions that hardly vary, and a net that looks at those rejects normal pictures.

Source: noise in feature space and a linear discriminator as in Liu et al., "SimpleNet" (CVPR 2023),
noise that ascends the loss as in Chen et al., "A Unified Anomaly Synthesis Strategy with Gradient
Ascent" (GLASS, ECCV 2024); the proposal is "Propose Noising"'s.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engineworks.runtime.coreset import greedy_k_centre, projection
from engineworks.runtime.tensors import Array
from engineworks.training import ranks
from engineworks.training.systems.noising.config import DiscriminatorConfig
from engineworks.training.systems.noising.model import PatchFeatures

PARTS = ("influence", "spread", "distance")

_BLOCK = 512  # patches whose neighbours fit into memory together
_LEAST_ENERGY = 1e-12
_SEARCH_WIDTH = 128  # of the random projection in which the proposal's bank is chosen


class Proposal(nn.Module):
    """What noise to add to a normal patch.

    Attributes:
        logits_P: the shares of ``PARTS`` before the softmax; all else follows from ``fit``.
    """

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.logits_P = nn.Parameter(torch.zeros(len(PARTS)))
        # not in the state: the features of the normal pictures give them back
        for name in ("bank_MD", "variance_D", "energy_P", "length"):
            self.register_buffer(name, torch.ones(()), persistent=False)
        self.bank_MD: Tensor
        self.variance_D: Tensor
        self.energy_P: Tensor
        self.length: Tensor

    def fit(self, features_IND: Array, *, seed: int) -> None:
        """Take bank and scales from the features of normal images: (I, N, D) float32."""
        width = features_IND.shape[2]
        rng = np.random.default_rng(seed)
        rows_ND = sample_rows(features_IND, self.config.searched, rng)
        space = projection(width, min(width, _SEARCH_WIDTH), seed)
        picks = greedy_k_centre(rows_ND @ space, self.config.rows, first=0)
        device = self.logits_P.device
        self.bank_MD = torch.from_numpy(rows_ND[picks.indices]).to(device)
        normal_ND = torch.from_numpy(sample_rows(features_IND, len(rows_ND), rng)).to(device)
        self.variance_D = normal_ND.var(0)
        blocks = [normal_ND[i : i + _BLOCK] for i in range(0, len(normal_ND), _BLOCK)]
        found = [self.parts(block) for block in blocks]
        self.energy_P = torch.cat([parts.sum(2) for parts, _ in found], 1).mean(1)
        self.length = torch.cat([distance_N1 for _, distance_N1 in found]).square().mean().sqrt()

    @property
    def shares_P(self) -> Tensor:
        """(P,) pi; its gradient is reversed: what minimises a loss lets the shares ascend it."""
        return (2 * self.logits_P.detach() - self.logits_P).softmax(0)

    @torch.no_grad()
    def parts(self, rows_ND: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) patches -> the variance (P, N, D) of each part before it is scaled, and the mean
        distance (N, 1) to the neighbours.
        """
        k = min(self.config.neighbours, len(self.bank_MD))
        nearest = torch.cdist(rows_ND, self.bank_MD).topk(k, largest=False)
        differences_NKD = rows_ND[:, None] - self.bank_MD[nearest.indices]
        # measured again: the product form of the distance loses digits near zero
        lengths_NK1 = differences_NKD.norm(dim=2, keepdim=True)
        directions_NKD = differences_NKD / lengths_NK1.clamp_min(torch.finfo(torch.float32).tiny)
        distance_N1 = lengths_NK1.mean(1)
        found = (
            (directions_NKD.mean(1) * distance_N1).square(),
            self.variance_D.expand_as(rows_ND),
            self.variance_D * distance_N1.square(),
        )
        return torch.stack(found), distance_N1

    def std(self, rows_ND: Tensor) -> Tensor:
        """(N, D) patches -> (N, D) standard deviation of the noise of reach 1."""
        parts_PND, _ = self.parts(rows_ND)
        # parts of features that never vary have no energy to share out
        weights_P = self.shares_P / self.energy_P.clamp_min(_LEAST_ENERGY)
        variance_ND = torch.einsum("p,pnd->nd", weights_P, parts_PND)
        # the root has no gradient at 0
        return self.length * variance_ND.clamp_min(_LEAST_ENERGY).sqrt()

    def forward(self, rows_ND: Tensor) -> Tensor:
        """(N, D) patches -> (N, D) noise."""
        low, high = (math.log(bound) for bound in self.config.reach)
        reach_N1 = torch.empty_like(rows_ND[:, :1]).uniform_(low, high).exp()
        return reach_N1 * self.std(rows_ND) * torch.randn_like(rows_ND)


class Discriminator(nn.Module):
    """Patch features to a logit each: standardised, one hidden layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(width))
        self.register_buffer("std_D", torch.ones(width))
        self.mean_D: Tensor
        self.std_D: Tensor
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, 1)

    def fit(self, features_IND: Array) -> None:
        """Take mean and spread from the features of normal images: (I, N, D) float32."""
        mean_ID = features_IND.mean(1, dtype=np.float64)
        variance_ID = features_IND.var(1, dtype=np.float64)
        mean_D = mean_ID.mean(0)
        variance_D = variance_ID.mean(0) + mean_ID.var(0)
        self.mean_D.copy_(torch.from_numpy(mean_D))
        # a feature that never varies (a filter that sees nothing) is let through as it is
        self.std_D.copy_(torch.from_numpy(np.sqrt(np.where(variance_D > 1e-12, variance_D, 1.0))))

    def forward(self, rows_ND: Tensor) -> Tensor:
        """(N, D) -> (N,) logits: above 0 for noise."""
        hidden = F.relu(self.first((rows_ND - self.mean_D) / self.std_D))
        logits: Tensor = self.second(hidden)[:, 0]
        return logits

    def convolutions(self) -> nn.Sequential:
        """The same on maps, (B, D, h, w) -> (B, 1, h, w): the standardisation in the weights."""
        (hidden, width), device = self.first.weight.shape, self.first.weight.device
        first = nn.Conv2d(width, hidden, 1, device=device)
        second = nn.Conv2d(hidden, 1, 1, device=device)
        weight_HD = self.first.weight / self.std_D
        with torch.no_grad():
            first.weight.copy_(weight_HD[:, :, None, None])
            assert first.bias is not None
            first.bias.copy_(self.first.bias - weight_HD @ self.mean_D)
            second.weight.copy_(self.second.weight[:, :, None, None])
            assert second.bias is not None
            second.bias.copy_(self.second.bias)
        return nn.Sequential(first, nn.ReLU(), second)


class Judged(nn.Module):
    """Images to one score per patch: the graph ``discriminate`` of the bundle."""

    def __init__(self, features: PatchFeatures, discriminator: Discriminator) -> None:
        super().__init__()
        self.features = features
        self.discriminator = discriminator.convolutions()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, H, W) float32, normalised -> (B, N) float32, N = h w of the largest map."""
        maps_BDHW = self.features.pooled(self.features.backbone(images_BCHW))
        scores: Tensor = self.discriminator(maps_BDHW).flatten(1)
        return scores


class DiscriminatorTraining(nn.Module):
    """The frozen feature net, the discriminator, and the noise that it learns from."""

    def __init__(self, features: PatchFeatures, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.features = features.requires_grad_(False)
        self.discriminator = Discriminator(features.width, config.hidden)
        self.proposal = Proposal(config)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.features.eval()  # frozen: its norms keep their statistics
        return self

    def forward(self, rows_ND: Tensor) -> Mapping[str, Tensor]:
        """Losses of (N, D) normal patches, and how often the net is right."""
        noisy_ND = rows_ND + self.proposal(rows_ND)
        normal_N, noise_N = self.discriminator(torch.cat([rows_ND, noisy_ND])).chunk(2)
        mean = ranks.mean_loss
        loss = 0.5 * (mean(F.softplus(normal_N)) + mean(F.softplus(-noise_N)))
        right = 0.5 * (mean((normal_N < 0).float()) + mean((noise_N > 0).float()))
        return {"loss": loss, "accuracy": right.detach()}

    def judge(self) -> Judged:
        """What is deployed."""
        return Judged(self.features, self.discriminator)


def sample_rows(features_IND: Array, num: int, rng: np.random.Generator) -> Array:
    """(num, D) patches of all images, at most all of them, none twice."""
    num_images, num_patches, _ = features_IND.shape
    num = min(num, num_images * num_patches)
    chosen = rng.choice(num_images * num_patches, num, replace=False, shuffle=True)
    return np.asarray(features_IND[chosen // num_patches, chosen % num_patches])
