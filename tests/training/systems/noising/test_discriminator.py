from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engineworks.runtime.tensors import Array
from engineworks.training.systems.noising.config import DiscriminatorConfig
from engineworks.training.systems.noising.discriminator import (
    PARTS,
    Discriminator,
    DiscriminatorTraining,
    Judged,
    Proposal,
    sample_rows,
)
from engineworks.training.systems.noising.model import PatchFeatures

pytestmark = pytest.mark.train

K = 3


def drawn_features(num: int = 6, patches: int = 20, width: int = 5, seed: int = 0) -> Array:
    """(I, N, D) float32 whose dimensions differ in mean and spread."""
    rng = np.random.default_rng(seed)
    scale = np.geomspace(0.2, 2, width)
    return (rng.standard_normal((num, patches, width)) * scale + scale).astype(np.float32)


def proposal(features_IND: Array, **settings: object) -> Proposal:
    config = DiscriminatorConfig.model_validate({"neighbours": K, "rows": 40} | settings)
    made = Proposal(config)
    made.fit(features_IND, seed=0)
    return made


def plain_parts(x: Array, bank: Array, variance: Array) -> tuple[Array, float]:
    """The parts of one patch's variance by their definition, in float64."""
    nearest = sorted((float(np.sqrt(((x - row) ** 2).sum())), tuple(row)) for row in bank)[:K]
    distance = float(np.mean([d for d, _ in nearest]))
    influence = np.mean([(x - row) / d if d else np.zeros(len(x)) for d, row in nearest], axis=0)
    return np.stack([(influence * distance) ** 2, variance, variance * distance**2]), distance


class TestTheProposedNoise:
    def test_has_the_variance_of_its_formula(self) -> None:
        features = drawn_features()
        made = proposal(features)
        with torch.no_grad():
            made.logits_P.copy_(torch.tensor([0.3, -0.5, 0.1]))
        bank = made.bank_MD.double().numpy()
        rows = features.reshape(-1, 5).astype(np.float64)  # fewer than are searched: all of them
        variance = rows.var(axis=0, ddof=1)
        found = [plain_parts(x, bank, variance) for x in rows]
        parts = np.stack([part for part, _ in found], axis=1)
        length = np.sqrt(np.mean([distance**2 for _, distance in found]))
        weights = np.exp([0.3, -0.5, 0.1]) / np.exp([0.3, -0.5, 0.1]).sum()
        energy = parts.sum(axis=2).mean(axis=1)
        want = length * np.sqrt(np.einsum("p,pnd->nd", weights / energy, parts))
        got = made.std(torch.from_numpy(features.reshape(-1, 5))).detach().numpy()
        # float32 differences of numbers of size 1, and the floor 1e-6 below each root
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5)

    @settings(deadline=None, max_examples=30)
    @given(logits=st.lists(st.floats(-8, 8), min_size=len(PARTS), max_size=len(PARTS)))
    def test_has_the_same_mean_energy_whatever_the_shares(self, logits: list[float]) -> None:
        features = drawn_features()
        made = proposal(features)
        with torch.no_grad():
            made.logits_P.copy_(torch.tensor(logits))
            std = made.std(torch.from_numpy(features.reshape(-1, 5)))
        energy = float(std.double().square().sum(1).mean())
        # a mean of 120 float32 sums
        assert energy == pytest.approx(float(made.length) ** 2, rel=1e-4)

    def test_is_as_long_as_its_reach(self) -> None:
        features = drawn_features(patches=2000)
        torch.manual_seed(0)
        made = proposal(features, reach=(3.0, 3.0))
        with torch.no_grad():
            noise = made(torch.from_numpy(features.reshape(-1, 5)))
        length = float(noise.square().sum(1).mean().sqrt())
        # 12,000 draws of a mixture whose patches differ: a standard error below 2 %
        assert length == pytest.approx(3 * float(made.length), rel=0.06)

    def test_has_shares_that_ascend_what_is_minimised(self) -> None:
        made = proposal(drawn_features())
        target = torch.tensor([1.0, 2.0, 3.0])
        (made.shares_P * target).sum().backward()  # type: ignore[no-untyped-call]
        assert made.logits_P.grad is not None
        share = np.full(3, 1 / 3)
        # d(sum pi_j t_j) / d theta_j = pi_j (t_j - mean), here with the other sign; float32
        want = -share * (target.numpy() - 2)
        np.testing.assert_allclose(made.logits_P.grad.numpy(), want, atol=1e-6)
        np.testing.assert_allclose(made.shares_P.detach().numpy(), share, atol=1e-6)

    def test_of_a_patch_that_is_in_the_bank_is_finite(self) -> None:
        features = np.ones((2, 10, 4), np.float32)
        made = proposal(features)
        noise = made(torch.ones(3, 4))
        noise.sum().backward()
        assert torch.isfinite(noise).all() and torch.isfinite(made.logits_P.grad).all()  # type: ignore[arg-type]

    def test_leaves_nothing_but_its_shares_in_the_state(self) -> None:
        assert set(proposal(drawn_features()).state_dict()) == {"logits_P"}


class TestTheDiscriminator:
    def test_standardises_by_all_patches(self) -> None:
        features = drawn_features()
        features[..., 2] = 7.0
        net = Discriminator(5, 4)
        net.fit(features)
        rows = features.reshape(-1, 5).astype(np.float64)
        want = rows.std(axis=0)
        want[2] = 1.0  # never varies
        # stored as float32
        np.testing.assert_allclose(net.mean_D.numpy(), rows.mean(axis=0), rtol=1e-6)
        np.testing.assert_allclose(net.std_D.numpy(), want, rtol=1e-6)

    @settings(deadline=None, max_examples=30)
    @given(
        width=st.integers(1, 12),
        hidden=st.integers(1, 9),
        grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
        seed=st.integers(0, 99),
    )
    def test_is_the_same_on_maps_as_on_rows(
        self, width: int, hidden: int, grid: tuple[int, int], seed: int
    ) -> None:
        torch.manual_seed(seed)
        net = Discriminator(width, hidden)
        net.fit(drawn_features(width=width, seed=seed) if width > 1 else np.ones((2, 3, 1), "f4"))
        maps = torch.randn(2, width, *grid)
        with torch.no_grad():
            got = net.convolutions()(maps).flatten(1)
        rows = PatchFeatures.rows(maps).double().numpy()
        first, second = net.first, net.second
        z = (rows - net.mean_D.double().numpy()) / net.std_D.double().numpy()
        h = np.maximum(z @ first.weight.detach().numpy().T + first.bias.detach().numpy(), 0)
        want = (h @ second.weight.detach().numpy().T + second.bias.detach().numpy())[..., 0]
        # float32 sums of at most 12 terms; the mean is divided by a spread of at least 0.2
        np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-4)
        with torch.no_grad():
            flat = net(PatchFeatures.rows(maps).reshape(-1, width))
        np.testing.assert_allclose(flat.numpy(), want.reshape(-1), rtol=0, atol=1e-4)


class _Maps(nn.Module):
    """A backbone with a norm, whose map is the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.norm(images)]


def trained(features: Array, steps: int) -> DiscriminatorTraining:
    torch.manual_seed(0)
    width = features.shape[2]
    model = DiscriminatorTraining(
        PatchFeatures(_Maps(), [3], width), DiscriminatorConfig(hidden=32, neighbours=K, rows=64)
    )
    model.discriminator.fit(features)
    model.proposal.fit(features, seed=0)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    rows = torch.from_numpy(features.reshape(-1, width))
    for _ in range(steps):
        model(rows)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class TestTraining:
    def test_teaches_what_is_off_the_normal_patches(self) -> None:
        # normal patches lie near a circle: neither their mean nor their spread tells an odd one
        angle = np.random.default_rng(0).uniform(0, 2 * np.pi, (4, 50))
        circle = np.stack([np.cos(angle), np.sin(angle)], axis=2).astype(np.float32)
        model = trained(circle, 100)
        with torch.no_grad():
            normal = model.discriminator(torch.from_numpy(circle[0]))
            odd = model.discriminator(torch.from_numpy(circle[0] * 3))
        assert float(odd.min()) > float(normal.max())

    def test_moves_neither_the_backbone_nor_its_norms(self) -> None:
        model = trained(drawn_features(width=3), 2)
        model.features.backbone(torch.randn(4, 3, 8, 8))
        norm = model.features.backbone.norm
        assert isinstance(norm, nn.BatchNorm2d)
        assert not norm.training and not norm.running_mean.any()  # type: ignore[union-attr]
        moving = {name for name, p in model.named_parameters() if p.requires_grad}
        assert not any(name.startswith("features.") for name in moving)
        assert "proposal.logits_P" in moving

    def test_says_its_loss_as_binary_cross_entropy(self) -> None:
        model = trained(drawn_features(width=3), 0)
        with torch.no_grad():
            model.discriminator.second.weight.zero_()
            model.discriminator.second.bias.fill_(2.0)
        losses = model(torch.zeros(7, 3))
        # half of -log(1 - p) - log p at p = sigmoid(2); float32
        want = 0.5 * (math.log1p(math.exp(2)) + math.log1p(math.exp(-2)))
        assert losses["loss"].item() == pytest.approx(want, rel=1e-6)
        assert float(losses["accuracy"]) == 0.5

    def test_ends_in_one_net_from_images_to_scores(self) -> None:
        model = trained(drawn_features(width=3), 3).eval()
        judged = model.judge()
        assert isinstance(judged, Judged)
        images = torch.randn(2, 3, 4, 6)
        with torch.no_grad():
            want = model.discriminator(model.features(images).flatten(0, 1)).reshape(2, 24)
            # float32, with the standardisation in the weights
            torch.testing.assert_close(judged.eval()(images), want, rtol=1e-5, atol=1e-5)


@given(num=st.integers(1, 150), seed=st.integers(0, 99))
@settings(deadline=None)
def test_rows_are_drawn_from_all_images_and_none_twice(num: int, seed: int) -> None:
    features = np.arange(120, dtype=np.float32).reshape(6, 20, 1)
    rows = sample_rows(features, num, np.random.default_rng(seed))
    assert rows.shape == (min(num, 120), 1)
    assert len(np.unique(rows)) == len(rows)
