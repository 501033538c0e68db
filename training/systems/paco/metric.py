"""Covariances of parts: the metric that distances are measured in, and how far two are apart.

A view has few parts (K) of many numbers (d), so the covariance of its parts, F^T F with the K
centred parts as rows of F, has rank K - 1 at most. Where that pays, F is kept instead of the d x d
matrix. Everything here takes float32 or float64 and stays in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

# rounding makes a Gram matrix indefinite by up to about 1 eps trace; the rest is a margin
_ROUNDINGS = 8


def unit(parts: Tensor) -> Tensor:
    """(..., d) at length 1; a vector without a length becomes 0, with gradient 0."""
    squares = parts.square().sum(-1, keepdim=True)
    has_length = squares > torch.finfo(parts.dtype).eps ** 2
    return torch.where(has_length, parts * torch.where(has_length, squares, 1).rsqrt(), 0)


def safe_sqrt(squares: Tensor) -> Tensor:
    """Square root with gradient 0 at 0, where the true one is infinite."""
    positive = squares > torch.finfo(squares.dtype).tiny
    return torch.where(positive, torch.where(positive, squares, 1).sqrt(), 0)


def factors(parts_BKD: Tensor) -> Tensor:
    """(..., K, d) rows F of which F^T F is the unbiased covariance of the K parts."""
    centred = parts_BKD - parts_BKD.mean(-2, keepdim=True)
    return centred / math.sqrt(max(1, parts_BKD.shape[-2] - 1))


@dataclass(frozen=True)
class Regulariser:
    """What makes a covariance S of low rank invertible: ``keep`` S + ``diagonal`` I.

    Attributes:
        shrinkage: rho: (1 - rho) S + rho trace(S) / d I; None adds ``ridge`` to the diagonal.
    """

    shrinkage: float | None
    ridge: float

    @property
    def keep(self) -> float:
        return 1.0 if self.shrinkage is None else 1.0 - self.shrinkage

    def diagonal(self, trace: Tensor, width: int) -> Tensor:
        """What is added to the diagonal, from trace(S) of any shape; never below rounding.

        The floor, eps (1 + 8 trace), keeps every factorisation alive: a covariance of 0, of
        constant features, becomes a small multiple of the identity.
        """
        eps = torch.finfo(trace.dtype).eps
        floor = eps * (1 + _ROUNDINGS * trace)
        if self.shrinkage is None:
            return floor.clamp_min(self.ridge)
        return torch.maximum(self.shrinkage / width * trace, floor)

    def dense(self, covariance_BDD: Tensor) -> Tensor:
        """(..., d, d) S -> the invertible matrix."""
        width = covariance_BDD.shape[-1]
        trace = covariance_BDD.diagonal(dim1=-2, dim2=-1).sum(-1)
        identity = torch.eye(width, dtype=trace.dtype, device=trace.device)
        diagonal = self.diagonal(trace, width)[..., None, None] * identity
        return self.keep * covariance_BDD + diagonal


# --- metrics -------------------------------------------------------------------------------------


class Metric(Protocol):
    """x^T A^-1 x for a positive definite A, one for each of B pictures or one for all."""

    def squared(self, differences_BND: Tensor) -> Tensor:
        """(B, N, d) -> (B, N) squared lengths, with gradient."""
        ...

    def pairwise(self, anchors_BKD: Tensor, pool_XND: Tensor) -> Tensor:
        """(B, K, d) and (X, N, d), X = B or 1 -> (B, K, N) squared distances, for comparisons."""
        ...


def _pairwise(anchors_BKD: Tensor, pool_XND: Tensor) -> Tensor:
    """Squared Euclidean distances from one matrix product."""
    centre = pool_XND.mean(1, keepdim=True)  # what all have in common would only cost digits
    anchors_BKD = anchors_BKD - centre
    pool = (pool_XND - centre).squeeze(0)  # one pool for all: one product instead of B
    own = anchors_BKD.square().sum(-1, keepdim=True)
    theirs = pool.square().sum(-1).unsqueeze(-2)
    return (own + theirs - 2 * (anchors_BKD @ pool.mT)).clamp_min(0)


@dataclass(frozen=True)
class Euclid:
    """A = I."""

    def squared(self, differences_BND: Tensor) -> Tensor:
        return differences_BND.square().sum(-1)

    def pairwise(self, anchors_BKD: Tensor, pool_XND: Tensor) -> Tensor:
        return _pairwise(anchors_BKD, pool_XND)


@dataclass(frozen=True)
class Whitening:
    """x -> W x with W^T W = A^-1.

    Attributes:
        matrix_XDD: W; X = B or 1.
    """

    matrix_XDD: Tensor

    @classmethod
    def of(cls, matrix_XDD: Tensor, *, normalise: bool = False) -> Whitening:
        """From A, by one batched Cholesky.

        Args:
            normalise: A^-1 is divided by its mean eigenvalue trace(A^-1) / d.
        """
        lower = torch.linalg.cholesky(matrix_XDD)
        identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
        whitening = torch.linalg.solve_triangular(lower, identity, upper=False)
        if normalise:
            mean = whitening.square().sum((-2, -1), keepdim=True) / lower.shape[-1]
            whitening = whitening * mean.rsqrt()
        return cls(whitening)

    def squared(self, differences_BND: Tensor) -> Tensor:
        return (differences_BND @ self.matrix_XDD.mT).square().sum(-1)

    def pairwise(self, anchors_BKD: Tensor, pool_XND: Tensor) -> Tensor:
        return _pairwise(anchors_BKD @ self.matrix_XDD.mT, pool_XND @ self.matrix_XDD.mT)


@dataclass(frozen=True)
class LowRank:
    """A = F^T F + b I, without a d x d matrix.

    x^T A^-1 x = min_w |x - F^T w|^2 / b + |w|^2 (ridge regression; the minimum is Woodbury's
    identity). Written so, nothing is subtracted from a larger number, rounding of w counts only
    squared, and the gradient may take w for a constant.

    Attributes:
        rows_BRD: F.
        diagonal_B: b.
        lower_BRR: Cholesky factor of F F^T + b I.
        scale_B: what squared lengths are divided by.
    """

    rows_BRD: Tensor
    diagonal_B: Tensor
    lower_BRR: Tensor
    scale_B: Tensor

    @classmethod
    def of(cls, rows_BRD: Tensor, diagonal_B: Tensor, *, normalise: bool = False) -> LowRank:
        """See ``Whitening.of``; trace(A^-1) comes from the R x R matrix as well."""
        rank, width = rows_BRD.shape[1:]
        identity = torch.eye(rank, dtype=rows_BRD.dtype, device=rows_BRD.device)
        gram_BRR = rows_BRD @ rows_BRD.mT
        lower = torch.linalg.cholesky(gram_BRR + diagonal_B[:, None, None] * identity)
        scale = torch.ones_like(diagonal_B)
        if normalise:
            within = torch.cholesky_inverse(lower).diagonal(dim1=-2, dim2=-1).sum(-1)
            scale = ((width - rank) / diagonal_B + within) / width
        return cls(rows_BRD, diagonal_B, lower.detach(), scale)

    def squared(self, differences_BND: Tensor) -> Tensor:
        with torch.no_grad():
            along_BRN = self.rows_BRD @ differences_BND.mT
            weights_BNR = torch.cholesky_solve(along_BRN, self.lower_BRR).mT
        rest = differences_BND - weights_BNR @ self.rows_BRD
        outside = rest.square().sum(-1) / self.diagonal_B[:, None]
        return (outside + weights_BNR.square().sum(-1)) / self.scale_B[:, None]

    def pairwise(self, anchors_BKD: Tensor, pool_XND: Tensor) -> Tensor:
        inside_BRD = torch.linalg.solve_triangular(self.lower_BRR, self.rows_BRD, upper=False)
        everything = _pairwise(anchors_BKD, pool_XND)
        inside = _pairwise(anchors_BKD @ inside_BRD.mT, pool_XND @ inside_BRD.mT)
        return (everything - inside).clamp_min(0) / (self.diagonal_B * self.scale_B)[:, None, None]


# --- running covariances -------------------------------------------------------------------------


class RunningCovariance(nn.Module):
    """Exponential mean of covariances per row (a class, or everything), in the model's state.

    The upper triangle is kept: 8.3 MB for 1000 classes of width 64. Several ranks each update by
    the whole batch.

    Args:
        momentum: share of the old mean that an update keeps.
    """

    def __init__(self, num_rows: int, width: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        row_P, column_P = torch.triu_indices(width, width)
        place_DD = torch.zeros(width, width, dtype=torch.long)
        place_DD[row_P, column_P] = place_DD[column_P, row_P] = torch.arange(len(row_P))
        # neither is in the state: both follow from the width
        self.register_buffer("upper_P", row_P * width + column_P, persistent=False)
        self.register_buffer("place_DD", place_DD, persistent=False)
        self.register_buffer("packed_RP", torch.zeros(num_rows, len(row_P)))
        self.register_buffer("seen_R", torch.zeros(num_rows, dtype=torch.bool))
        self.upper_P: Tensor
        self.place_DD: Tensor
        self.packed_RP: Tensor
        self.seen_R: Tensor

    def read(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) -> (B, d, d) means, 0 where there is none yet, and (B,) bool whether there is."""
        return self.packed_RP[rows_B][:, self.place_DD], self.seen_R[rows_B]

    @torch.no_grad()
    def update(self, rows_B: Tensor, covariance_BDD: Tensor) -> None:
        """One update per row from the mean of its covariances; the first is a copy."""
        rows_U, place_B = torch.unique(rows_B, return_inverse=True)
        packed_BP = covariance_BDD.flatten(1)[:, self.upper_P]
        count_U1 = place_B.bincount(minlength=len(rows_U))[:, None]
        mean_UP = packed_BP.new_zeros(len(rows_U), packed_BP.shape[1])
        mean_UP = mean_UP.index_add_(0, place_B, packed_BP) / count_U1
        updated = torch.lerp(mean_UP, self.packed_RP[rows_U], self.momentum)
        self.packed_RP[rows_U] = torch.where(self.seen_R[rows_U, None], updated, mean_UP)
        self.seen_R[rows_U] = True


def of_the_others(covariance_BDD: Tensor) -> Tensor:
    """(B, d, d) -> for each the mean of all others; 0 where there are none."""
    others = covariance_BDD.sum(0, keepdim=True) - covariance_BDD
    return others / max(1, len(covariance_BDD) - 1)


# --- distances between covariances ---------------------------------------------------------------


class _MatrixLog(torch.autograd.Function):
    """Logarithm of positive definite matrices (B, d, d), also where eigenvalues are equal.

    Source: Daleckii and Krein: in the eigenbasis the derivative is multiplied by the divided
    differences of the function. The derivative through ``eigh`` divides by differences of the
    eigenvalues instead.
    """

    @staticmethod
    def forward(ctx: Any, matrix_BDD: Tensor) -> Tensor:
        values_BD, vectors_BDD = torch.linalg.eigh(matrix_BDD)
        ctx.save_for_backward(values_BD, vectors_BDD)
        return torch.as_tensor((vectors_BDD * values_BD.log().unsqueeze(-2)) @ vectors_BDD.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        values_BD, vectors_BDD = ctx.saved_tensors
        rows, columns = values_BD.unsqueeze(-1), values_BD.unsqueeze(-2)
        smaller = torch.minimum(rows, columns)
        ratio = (rows - columns).abs() / smaller
        # log1p(r) / r, which is 1 at 0
        divided = torch.where(ratio > 0, ratio.log1p() / torch.where(ratio > 0, ratio, 1), 1)
        inner = vectors_BDD.mT @ gradients[0] @ vectors_BDD
        return torch.as_tensor(vectors_BDD @ (inner * divided / smaller) @ vectors_BDD.mT)


def matrix_log(matrix_BDD: Tensor) -> Tensor:
    """See ``_MatrixLog``."""
    return torch.as_tensor(_MatrixLog.apply(matrix_BDD))


def squared_distance(
    a_BDD: Tensor, b_BDD: Tensor, kind: Literal["fro", "log-euclidean", "stein"]
) -> Tensor:
    """(B, d, d) and (B, d, d), positive definite -> (B,) squares of the distance.

    ``fro`` |a - b|; ``log-euclidean`` |log a - log b|; ``stein`` logdet((a + b) / 2) -
    (logdet a + logdet b) / 2. Norms are Frobenius'.
    """
    if kind == "stein":
        logdet: Tensor = torch.linalg.slogdet(
            torch.stack([(a_BDD + b_BDD) / 2, a_BDD, b_BDD])
        ).logabsdet
        return (logdet[0] - (logdet[1] + logdet[2]) / 2).clamp_min(0).square()
    if kind == "log-euclidean":
        a_BDD, b_BDD = matrix_log(a_BDD), matrix_log(b_BDD)
    return (a_BDD - b_BDD).square().sum((-2, -1))


def squared_norm(gram_BRR: Tensor, weights_BR: Tensor, diagonal_B: Tensor, width: int) -> Tensor:
    """(B,) squared Frobenius norm of sum_i w_i f_i f_i^T + b I, from G_ij = f_i^T f_j alone.

    It is sum_ij w_i w_j G_ij^2 + 2 b sum_i w_i G_ii + d b^2; weights may be negative, so
    differences are covered.
    """
    pairs = (weights_BR.unsqueeze(1) @ gram_BRR.square() @ weights_BR.unsqueeze(2)).flatten()
    trace = (weights_BR * gram_BRR.diagonal(dim1=1, dim2=2)).sum(1)
    # a difference of equal matrices must not round to a negative square
    return (pairs + 2 * diagonal_B * trace + width * diagonal_B.square()).clamp_min(0)
