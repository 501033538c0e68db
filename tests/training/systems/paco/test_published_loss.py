from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from engineworks.training.systems.paco.config import LossConfig
from engineworks.training.systems.paco.loss import (
    PartLoss,
    cosine_costs,
    match,
    negative_pool,
    part_contrast,
    weighted_cross_entropy,
)
from engineworks.training.systems.paco.metric import (
    LowRank,
    Whitening,
    factors,
)
from tests.training.systems.paco.loss_reference import (
    Reference,
    draw,
)

# the published settings of the Cotton80 runs
pytestmark = pytest.mark.train

PUBLISHED = LossConfig(
    metric="pair",
    shrinkage=None,
    ridge=1e-2,
    normalise=False,
    soc_normalise=False,
    matching="cosine",
    warmup_epochs=0,
    saliency=0.1,
)


def fixture(shared: Path, name: str) -> dict[str, Tensor]:
    with np.load(shared / "fixtures" / f"paco_{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.mark.data
class TestPublishedValues:
    @pytest.mark.parametrize("kind", ["semi", "hard"])
    def test_of_the_part_contrast_are_reproduced(
        self, shared: Path, kind: Literal["semi", "hard"]
    ) -> None:
        given_ = fixture(shared, "pac_small")
        leaves = {name: given_[name].clone().requires_grad_()
                  for name in ("Z1", "Z2", "pool", "Sigma_plus")}  # fmt: skip
        matching = given_["matching"][..., None].expand(leaves["Z2"].shape)
        loss, _ = part_contrast(
            leaves["Z1"],
            leaves["Z2"].gather(1, matching),
            leaves["pool"][None],
            torch.ones(3, 20, dtype=torch.bool),
            Whitening.of(leaves["Sigma_plus"]),
            margin=float(given_["alpha"]),
            mining="semi-hard" if kind == "semi" else "hardest",
        )
        torch.autograd.backward(loss)
        # float32 on both sides, through a Cholesky factor
        torch.testing.assert_close(loss.detach(), given_[f"loss_{kind}"], rtol=1e-4, atol=1e-6)
        for leaf, name in (("Z1", "gZ1"), ("Z2", "gZ2"), ("pool", "gpool")):
            torch.testing.assert_close(
                leaves[leaf].grad, given_[f"{name}_{kind}"], rtol=1e-3, atol=1e-5
            )
        got, want = leaves["Sigma_plus"].grad, given_[f"gSigma_{kind}"]
        assert got is not None
        # how a gradient is shared between a symmetric matrix' triangles is a matter of taste
        torch.testing.assert_close(got + got.mT, want + want.mT, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("kind", ["semi", "hard"])
    @pytest.mark.parametrize("top_m", [32, 8])
    def test_of_the_two_stage_choice_are_reproduced(
        self, shared: Path, kind: Literal["semi", "hard"], top_m: int
    ) -> None:
        given_ = fixture(shared, "pac_small")
        matching = given_["matching"][..., None].expand(given_["Z2"].shape)
        loss, _ = part_contrast(
            given_["Z1"],
            given_["Z2"].gather(1, matching),
            given_["pool"][None],
            torch.ones(3, 20, dtype=torch.bool),
            Whitening.of(given_["Sigma_plus"] + 1e-4 * torch.eye(16)),
            margin=float(given_["alpha"]),
            mining="semi-hard" if kind == "semi" else "hardest",
            top_m=top_m,
        )
        # float32 on both sides, through a Cholesky factor
        torch.testing.assert_close(loss, given_[f"opt_loss_{kind}_M{top_m}"], rtol=1e-4, atol=1e-5)

    def test_of_the_matching_are_reproduced(self, shared: Path) -> None:
        given_ = fixture(shared, "matching_k4")
        cosine = cosine_costs(given_["Z1"], given_["Z2"])
        torch.testing.assert_close(cosine, given_["cost_cosine"], rtol=0, atol=1e-6)  # float32
        assert torch.equal(match(cosine), given_["match_cosine"])
        metric = Whitening.of(given_["Sigma_plus"])
        costs = metric.pairwise(given_["Z1"], given_["Z2"]).sqrt()
        # float32, through a Cholesky factor
        torch.testing.assert_close(costs, given_["cost_mahalanobis"], rtol=1e-4, atol=1e-5)
        assert torch.equal(match(costs), given_["match_mahalanobis"])

    def test_of_a_pool_with_the_picture_itself_are_not(self, shared: Path) -> None:
        given_ = fixture(shared, "negatives_pool_bug")
        parts = torch.stack([given_["Z1"], given_["Z2"]])
        pool, allowed = negative_pool(parts, torch.arange(4))
        assert pool.shape[1] == int(given_["unique_rows"])
        assert allowed.sum(1).tolist() == [int(given_["expected_rows_if_correct"])] * 4
        for b in range(4):
            own = parts[:, b].flatten(0, 1)
            rows = pool[0, allowed[b]]
            assert not (rows[:, None] == own).all(-1).any()
            assert ((given_["pool"][:, None] == own).all(-1).any(1)).sum() == 24  # there they are

    def test_of_a_metric_made_of_the_pair_silence_the_contrast(self, shared: Path) -> None:
        given_ = fixture(shared, "pac_small")
        parts = torch.stack([given_["Z1"], given_["Z2"]])
        metric = LowRank.of(
            factors(parts).transpose(0, 1).flatten(1, 2) / math.sqrt(2),
            torch.full((3,), 2e-5),
        )
        matching = given_["matching"][..., None].expand(given_["Z2"].shape)
        loss, active = part_contrast(
            parts[0],
            parts[1].gather(1, matching),
            given_["pool"][None],
            torch.ones(3, 20, dtype=torch.bool),
            metric,
            margin=float(given_["alpha"]),
        )
        assert loss == given_["loss_semi_with_Sigma_from_the_parts"] == 0
        assert active == 0

    def test_of_the_weighted_cross_entropy_come_from_the_batchs_mean_weight(
        self, shared: Path
    ) -> None:
        given_ = fixture(shared, "weighted_ce")
        weights = torch.stack(
            [
                torch.stack(
                    [
                        saliency[max(0, r - 2) : r + 3, max(0, c - 2) : c + 3].mean()
                        for r, c in peaks.tolist()
                    ]
                ).mean()
                for saliency, peaks in zip(given_["saliency"], given_["peaks"], strict=True)
            ]
        )
        share = float(given_["gamma"])
        logits, targets = given_["logits"], given_["targets"]
        got = weighted_cross_entropy(logits, targets, weights.mean().expand(3), share=share)
        torch.testing.assert_close(got, given_["loss"], rtol=1e-6, atol=0)  # float32
        plain = weighted_cross_entropy(logits, targets, weights, share=0)
        torch.testing.assert_close(plain, given_["plain_ce"], rtol=1e-6, atol=0)  # float32


def test_the_published_settings_are_those_of_the_reference() -> None:
    parts, labels = draw(2, 4, 4, 16, seed=7), [0, 1, 1, 2]
    ours, reference = PartLoss(PUBLISHED, 3, 16).double(), Reference(PUBLISHED)
    for epoch in range(2):
        got, want = ours(parts, torch.tensor(labels), epoch), reference(parts, labels, epoch)
        for name, value in got.items():  # float64
            torch.testing.assert_close(value, want[name], rtol=1e-9, atol=1e-12)
        assert got["active"] < 1  # what the pair's own metric does to the hinge
