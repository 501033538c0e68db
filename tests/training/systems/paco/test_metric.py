from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import logm
from torch import Tensor

from engineworks.training.systems.paco.loss import consistency
from engineworks.training.systems.paco.metric import (
    Euclid,
    LowRank,
    Regulariser,
    RunningCovariance,
    Whitening,
    factors,
    matrix_log,
    of_the_others,
    safe_sqrt,
    squared_distance,
    squared_norm,
    unit,
)

pytestmark = pytest.mark.train


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def positive_definite(num: int, width: int, seed: int) -> Tensor:
    root = draw(num, width, width, seed=seed)
    return root @ root.mT + 0.1 * torch.eye(width)


regularisers = st.builds(
    Regulariser,
    shrinkage=st.sampled_from([None, 0.1, 1.0]),
    ridge=st.sampled_from([1e-1, 1e-3]),
)


class TestMetrics:
    @settings(deadline=None, max_examples=60)
    @given(
        num=st.integers(1, 3),
        rank=st.integers(1, 8),
        width=st.integers(2, 12),
        normalise=st.booleans(),
        own_pools=st.booleans(),
        seed=st.integers(0, 999),
    )
    def test_of_low_rank_and_by_cholesky_are_the_inverse_with_its_gradient(
        self, num: int, rank: int, width: int, normalise: bool, own_pools: bool, seed: int
    ) -> None:
        leaves = [
            draw(num, rank, width, seed=seed),
            draw(num, seed=seed + 1).exp(),
            draw(num, 5, width, seed=seed + 2),
        ]
        results = []
        for kind in ("inverse", "cholesky", "low rank"):
            rows, diagonal, x = (leaf.clone().requires_grad_() for leaf in leaves)
            matrix = rows.mT @ rows + diagonal[:, None, None] * torch.eye(width)
            if kind == "inverse":
                inverse = torch.linalg.inv(matrix)
                scale = inverse.diagonal(dim1=1, dim2=2).mean(1) if normalise else torch.ones(num)
                squares = ((x @ inverse) * x).sum(-1) / scale[:, None]
            elif kind == "cholesky":
                squares = Whitening.of(matrix, normalise=normalise).squared(x)
            else:
                squares = LowRank.of(rows, diagonal, normalise=normalise).squared(x)
            weights = torch.arange(1.0, 6)
            torch.autograd.backward((squares * weights).sum())
            results.append([squares.detach(), rows.grad, diagonal.grad, x.grad])
        for others in results[1:]:
            for got, want in zip(others, results[0], strict=True):
                # float64, times the condition of the matrix
                torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)

        rows, diagonal, x = leaves
        matrix = rows.mT @ rows + diagonal[:, None, None] * torch.eye(width)
        pool = draw(num if own_pools else 1, 7, width, seed=seed + 3)
        for metric in (
            Euclid(),
            Whitening.of(matrix, normalise=normalise),
            LowRank.of(rows, diagonal, normalise=normalise),
        ):
            got = metric.pairwise(x, pool)
            differences = (x[:, :, None] - pool[:, None]).flatten(1, 2)
            want = metric.squared(differences).view(num, 5, 7)
            # products instead of differences, float64
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)

    def test_of_low_rank_keep_their_digits_where_the_diagonal_is_tiny(self) -> None:
        rows = draw(4, 6, 64, seed=0)
        weights = draw(4, 5, 6, seed=1)
        x = weights @ rows  # in the span: |x|^2 / b would lose five digits when subtracted from
        diagonal = torch.full((4,), 2e-5, dtype=torch.float64)
        want = LowRank.of(rows, diagonal).squared(x)
        got = LowRank.of(rows.float(), diagonal.float()).squared(x.float())
        # float32, squared errors of the weights over the diagonal
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)

    def test_that_are_normalised_leave_the_mean_direction_as_it_is(self) -> None:
        metric = Whitening.of(positive_definite(2, 5, seed=0), normalise=True)
        lengths = metric.squared(torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
        torch.testing.assert_close(lengths.mean(1), torch.ones(2, dtype=torch.float64))


class TestRegularisation:
    @settings(deadline=None, max_examples=40)
    @given(
        regulariser=regularisers,
        k=st.integers(1, 5),
        width=st.integers(1, 70),
        scale=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e4]),
        seed=st.integers(0, 99),
    )
    def test_makes_every_covariance_positive_definite_in_float32(
        self, regulariser: Regulariser, k: int, width: int, scale: float, seed: int
    ) -> None:
        rows = scale * factors(draw(3, k, width, seed=seed).float())
        metric = Whitening.of(regulariser.dense(rows.mT @ rows), normalise=True)
        assert metric.matrix_XDD.isfinite().all()
        diagonal = regulariser.diagonal(rows.square().sum((1, 2)), width)
        low = LowRank.of(rows * regulariser.keep**0.5, diagonal, normalise=True)
        assert low.squared(draw(3, 2, width, seed=1).float()).isfinite().all()

    def test_of_nothing_is_a_multiple_of_the_identity(self) -> None:
        matrix = Regulariser(0.2, 1.0).dense(torch.zeros(1, 3, 3))[0]
        assert matrix[0, 0] > 0
        assert torch.equal(matrix, matrix[0, 0] * torch.eye(3))


class TestDistancesBetweenCovariances:
    @settings(deadline=None, max_examples=60)
    @given(
        regulariser=regularisers,
        k=st.integers(2, 5),
        width=st.integers(2, 9),
        normalise=st.booleans(),
        with_prototypes=st.booleans(),
        seed=st.integers(0, 999),
    )
    def test_of_frobenius_need_no_matrices(
        self,
        regulariser: Regulariser,
        k: int,
        width: int,
        normalise: bool,
        with_prototypes: bool,
        seed: int,
    ) -> None:
        parts = draw(2, 3, k, width, seed=seed)
        prototypes = positive_definite(3, width, seed) if with_prototypes else None
        gradients, values = [], []
        for low_rank in (True, False):
            leaf = parts.clone().requires_grad_()
            rows = factors(leaf)
            if low_rank:
                gap, drift = consistency(
                    rows, regulariser, "fro", normalise=normalise, prototypes_BDD=prototypes
                )
            else:
                matrices = [regulariser.dense(view.mT @ view) for view in rows]
                if prototypes is not None:
                    matrices.append(regulariser.dense(prototypes))
                if normalise:
                    matrices = [
                        m / m.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] for m in matrices
                    ]
                gap = squared_distance(matrices[0], matrices[1], "fro")
                drift = torch.zeros_like(gap)
                if prototypes is not None:
                    mean = (matrices[0] + matrices[1]) / 2
                    drift = squared_distance(mean, matrices[2], "fro")
            values.append(torch.stack([gap, drift]).detach())
            torch.autograd.backward((gap + 2 * drift).sum())
            assert leaf.grad is not None
            gradients.append(leaf.grad)
        # float64; squares of size up to 1e3 are subtracted
        torch.testing.assert_close(*values, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-11)

    def test_between_equal_ones_are_0_and_not_below(self) -> None:
        rows = factors(draw(1, 5, 4, 16, seed=0).float()).expand(2, 5, 4, 16)
        for kind in ("fro", "log-euclidean", "stein"):
            chosen: Any = kind
            gap, _ = consistency(rows, Regulariser(0.2, 0.0), chosen, normalise=True)
            assert (gap >= 0).all()
            assert (gap < 1e-6).all()  # float32: squares of size 1 are subtracted

    def test_of_a_norm_take_negative_weights(self) -> None:
        rows, weights, diagonal = draw(2, 3, 4, seed=0), draw(2, 3, seed=1), draw(2, seed=2)
        matrix = (rows.mT * weights[:, None]) @ rows + diagonal[:, None, None] * torch.eye(4)
        got = squared_norm(rows @ rows.mT, weights, diagonal, 4)
        torch.testing.assert_close(got, matrix.square().sum((1, 2)))  # float64

    @pytest.mark.parametrize("kind", ["fro", "log-euclidean", "stein"])
    def test_have_the_gradient_of_finite_differences(self, kind: Any) -> None:
        a, b = positive_definite(2, 4, seed=0), positive_definite(2, 4, seed=1)

        def of(root: Tensor) -> Tensor:
            return squared_distance(root @ root.mT + torch.eye(4), b, kind)

        assert torch.autograd.gradcheck(of, (a.requires_grad_(),))

    def test_of_logarithms_have_a_gradient_where_eigenvalues_are_equal(self) -> None:
        # two equal eigenvalues, and all equal
        values = torch.tensor([[2.0, 2.0, 0.5], [3.0, 3.0, 3.0]], dtype=torch.float64)
        basis = torch.linalg.qr(draw(2, 3, 3, seed=0)).Q
        matrix = basis @ torch.diag_embed(values) @ basis.mT

        def of(change: Tensor) -> Tensor:
            return matrix_log(matrix + change + change.mT)

        assert torch.autograd.gradcheck(of, (torch.zeros_like(matrix).requires_grad_(),))

    def test_of_logarithms_are_scipys(self) -> None:
        matrix = positive_definite(1, 6, seed=3)[0]
        got = matrix_log(matrix[None])[0].numpy()
        np.testing.assert_allclose(got, logm(matrix.numpy()), rtol=0, atol=1e-10)  # float64


class TestRunningCovariance:
    def test_first_copies_then_averages_once_per_class_and_batch(self) -> None:
        running = RunningCovariance(4, 3, momentum=0.9).double()
        first, second = positive_definite(3, 3, seed=0), positive_definite(3, 3, seed=1)
        running.update(torch.tensor([2, 0, 2]), first)
        running.update(torch.tensor([2, 2, 3]), second)
        got, seen = running.read(torch.arange(4))
        assert seen.tolist() == [True, False, True, True]
        twice = 0.9 * (first[0] + first[2]) / 2 + 0.1 * (second[0] + second[1]) / 2
        want = torch.stack([first[1], torch.zeros(3, 3), twice, second[2]])
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)  # float64

    def test_takes_no_gradient(self) -> None:
        running = RunningCovariance(1, 3, momentum=0.5)
        running.update(
            torch.zeros(2, dtype=torch.long), torch.eye(3).repeat(2, 1, 1).requires_grad_()
        )
        assert not running.packed_RP.requires_grad

    def test_of_a_thousand_classes_is_small(self) -> None:
        state = RunningCovariance(1000, 64, momentum=0.9).state_dict()
        assert set(state) == {"packed_RP", "seen_R"}
        assert sum(value.nbytes for value in state.values()) < 8.4e6

    def test_without_the_picture_is_the_mean_of_the_others(self) -> None:
        matrices = positive_definite(3, 4, seed=0)
        got = of_the_others(matrices)
        torch.testing.assert_close(got[1], (matrices[0] + matrices[2]) / 2)  # float64
        assert not of_the_others(matrices[:1]).any()


def test_a_vector_without_length_has_no_direction_and_no_gradient() -> None:
    parts = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    directions = unit(parts)
    torch.autograd.backward(directions[:, 0].sum())
    torch.testing.assert_close(directions.detach(), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))
    assert parts.grad is not None
    assert parts.grad[1].tolist() == [0, 0]


def test_the_square_root_of_0_has_gradient_0() -> None:
    squares = torch.tensor([0.0, 4.0], requires_grad=True)
    torch.autograd.backward(safe_sqrt(squares).sum())
    assert squares.grad is not None
    assert squares.grad.tolist() == [0, 0.25]


# --- what the published code computes ------------------------------------------------------------


def fixture(shared: Path, name: str) -> dict[str, Tensor]:
    with np.load(shared / "fixtures" / f"paco_{name}.npz") as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


@pytest.mark.data
class TestPublishedValues:
    @pytest.mark.parametrize("name", ["k4d64", "k4d8_eps1e-5", "k6d16"])
    def test_of_covariances_are_reproduced(self, shared: Path, name: str) -> None:
        given_ = fixture(shared, f"covariance_{name}")
        rows = factors(given_["Z"])
        got = Regulariser(None, float(given_["eps"])).dense(rows.mT @ rows)
        torch.testing.assert_close(got, given_["Sigma"], rtol=1e-5, atol=1e-6)  # float32
        torch.testing.assert_close(  # the mean leaves with the centring
            given_["Z"] - rows * math.sqrt(given_["Z"].shape[1] - 1),
            given_["mu"][:, None].expand(given_["Z"].shape),
            rtol=0,
            atol=1e-6,
        )

    def test_of_mahalanobis_distances_are_reproduced(self, shared: Path) -> None:
        given_ = fixture(shared, "mahalanobis")
        metric = Whitening.of(given_["Sigma"][None])
        got = metric.squared((given_["u"] - given_["v"])[None])[0].sqrt()
        torch.testing.assert_close(got, given_["dist"], rtol=1e-10, atol=0)  # float64

    def test_of_distances_between_covariances_are_reproduced(self, shared: Path) -> None:
        given_ = fixture(shared, "spd_distance")
        for kind, name in (
            ("fro", "fro"),
            ("stein", "stein"),
            ("log-euclidean", "log_euclidean_true"),
        ):
            chosen: Any = kind
            got = squared_distance(given_["Sigma1"], given_["Sigma2"], chosen).sqrt()
            torch.testing.assert_close(got, given_[name], rtol=1e-9, atol=0)  # float64

    def test_of_a_logarithm_that_was_frobenius_are_not(self, shared: Path) -> None:
        given_ = fixture(shared, "spd_distance")
        got = squared_distance(given_["Sigma1"], given_["Sigma2"], "log-euclidean").sqrt()
        assert ((got - given_["log_euclidean_as_original_returns"]).abs() > 0.1).all()

    def test_of_the_consistency_are_reproduced(self, shared: Path) -> None:
        given_ = fixture(shared, "soc")
        first, second = given_["Sigma1"], given_["Sigma2"]
        fro = squared_distance(first, second, "fro").mean()
        drift = squared_distance((first + second) / 2, given_["proto"], "fro").mean()
        stein = squared_distance(first, second, "stein").mean()
        beta = float(given_["beta"])
        # float32; stein through determinants
        torch.testing.assert_close(fro, given_["fro"], rtol=1e-5, atol=0)
        torch.testing.assert_close(fro + beta * drift, given_["fro_proto"], rtol=1e-5, atol=0)
        torch.testing.assert_close(stein, given_["stein"], rtol=1e-4, atol=0)

    def test_of_prototypes_are_reproduced_where_a_class_comes_once(self, shared: Path) -> None:
        given_ = fixture(shared, "proto_ema")
        mean = (given_["Sigma1"] + given_["Sigma2"]) / 2
        running = RunningCovariance(5, 16, momentum=0.9)
        # picture by picture, as the published code goes through a batch
        for targets, after in (("targets1", "after1"), ("targets2", "after2")):
            for b in range(3):
                running.update(given_[targets][b : b + 1], mean[b : b + 1])
            got, seen = running.read(torch.arange(5))
            want = given_[after]
            torch.testing.assert_close(got[seen], want[seen], rtol=1e-5, atol=1e-6)  # float32
        assert seen.tolist() == (given_["counts"] > 0).tolist()
