from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.training.systems.stripe.config import LossConfig
from engineworks.training.systems.stripe.loss import focal

pytestmark = pytest.mark.train


def reference(logits: np.ndarray, mask: np.ndarray, alpha: float | None, gamma: float) -> float:
    """The textbook's formula in float64."""
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    p_t = np.where(mask, p, 1 - p)
    weight = 1.0 if alpha is None else np.where(mask, alpha, 1 - alpha)
    return float((-weight * (1 - p_t) ** gamma * np.log(p_t)).mean())


class TestFocalLoss:
    @settings(deadline=None)
    @given(
        seed=st.integers(0, 999),
        alpha=st.none() | st.floats(0.01, 0.99),
        gamma=st.floats(0, 4),
    )
    def test_is_the_textbooks(self, seed: int, alpha: float | None, gamma: float) -> None:
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 4, (2, 1, 5, 6)).astype(np.float32)
        mask = rng.random((2, 1, 5, 6)) < 0.3
        got = focal(
            torch.from_numpy(logits), torch.from_numpy(mask), LossConfig(alpha=alpha, gamma=gamma)
        )
        # a few float32 roundings
        assert float(got) == pytest.approx(reference(logits, mask, alpha, gamma), rel=2e-5)

    def test_without_weights_and_focus_is_cross_entropy(self) -> None:
        logits, mask = torch.randn(3, 1, 4, 4), torch.rand(3, 1, 4, 4) < 0.5
        want = torch.nn.functional.binary_cross_entropy_with_logits(logits, mask.float())
        got = focal(logits, mask, LossConfig(alpha=None, gamma=0))
        torch.testing.assert_close(got, want)  # two float32 formulas of one number

    def test_weighs_the_defect_with_alpha(self) -> None:
        logits = torch.zeros(1, 1, 1, 2)
        defect, background = (
            float(focal(logits, torch.full((1, 1, 1, 2), value), LossConfig(alpha=0.9)))
            for value in (True, False)
        )
        assert defect == pytest.approx(9 * background)

    @pytest.mark.parametrize("logit", [-200.0, 200.0])
    def test_learns_from_pixels_that_are_completely_wrong(self, logit: float) -> None:
        logits = torch.full((1, 1, 2, 2), logit, requires_grad=True)
        loss = focal(logits, torch.full((1, 1, 2, 2), logit < 0), LossConfig())
        loss.backward()
        assert torch.isfinite(loss)
        assert logits.grad is not None
        assert (logits.grad.abs() > 0.05).all()

    @pytest.mark.data
    @pytest.mark.parametrize("gamma", [1.0, 2.0, 3.0])
    def test_is_the_published_one_with_the_weight_on_the_other_side(
        self, shared: Path, gamma: float
    ) -> None:
        fixture = np.load(shared / "fixtures/stripe_focal.npz")
        probability = fixture["probs"][:, 1:].astype(np.float64)
        logits = torch.from_numpy(np.log(probability / (1 - probability)))
        mask = torch.from_numpy(fixture["target"] > 0)
        # the published one adds up to 2e-5 to p_t, which moves log p_t by 2e-5 / p_t
        p_t = np.where(mask.numpy(), probability, 1 - probability)
        moved = float((2e-5 / p_t).mean()) + 1e-6
        plain = float(focal(logits, mask, LossConfig(alpha=None, gamma=gamma)))
        assert plain == pytest.approx(float(fixture[f"alphaNone_gamma{gamma}"]), abs=moved)
        published = float(fixture[f"alpha0.75_gamma{gamma}"])
        swapped = float(focal(logits, mask, LossConfig(alpha=0.25, gamma=gamma)))
        assert swapped == pytest.approx(published, abs=moved)
        ours = float(focal(logits, mask, LossConfig(alpha=0.75, gamma=gamma)))
        assert ours != pytest.approx(published, rel=0.05)
