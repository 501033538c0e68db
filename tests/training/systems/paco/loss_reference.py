"""The loss as it is defined, term by term in float64."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from engineworks.training.systems.paco.config import LossConfig


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Reference:
    """The loss as its definition reads, in loops, with its own running covariances."""

    def __init__(self, config: LossConfig) -> None:
        self.config = config
        self.running: dict[str, Tensor] = {}

    def __call__(self, parts: Tensor, labels: list[int], epoch: int) -> dict[str, Tensor]:
        config = self.config
        num = len(labels)
        if config.normalise:
            parts = torch.stack([self.unit(z) for z in parts.flatten(0, 2)]).view(parts.shape)
        covariances = [[self.covariance(parts[v, b]) for b in range(num)] for v in (0, 1)]
        means = [(covariances[0][b] + covariances[1][b]) / 2 for b in range(num)]
        metrics = [self.metric(b, means, labels) for b in range(num)]
        result = self.pac(parts, labels, metrics, epoch)
        result["soc"] = self.soc(covariances, labels)
        for name in {"all", *(f"class {y}" for y in labels)}:
            kept = [
                m.detach()
                for m, y in zip(means, labels, strict=True)
                if name in ("all", f"class {y}")
            ]
            mean = sum(kept[1:], kept[0]) / len(kept)
            old = self.running.get(name, mean)
            self.running[name] = config.momentum * old + (1 - config.momentum) * mean
        return result

    @staticmethod
    def unit(z: Tensor) -> Tensor:
        return z / z.norm() if z.norm() > torch.finfo(z.dtype).eps else z * 0

    @staticmethod
    def covariance(parts: Tensor) -> Tensor:
        mean = parts.mean(0)
        outer = sum((torch.outer(z - mean, z - mean) for z in parts), torch.zeros(()))
        return outer / max(1, len(parts) - 1)

    def regular(self, covariance: Tensor, ridge: float) -> Tensor:
        width, trace = len(covariance), covariance.trace()
        floor = torch.finfo(covariance.dtype).eps * (1 + 8 * trace)
        rho = self.config.shrinkage
        wanted = torch.tensor(ridge, dtype=trace.dtype) if rho is None else rho * trace / width
        kept = covariance if rho is None else (1 - rho) * covariance
        return kept + torch.maximum(wanted, floor) * torch.eye(width, dtype=trace.dtype)

    def metric(self, b: int, means: list[Tensor], labels: list[int]) -> Tensor:
        """Inverse of the metric's covariance."""
        config, width = self.config, len(means[0])
        others = [m.detach() for i, m in enumerate(means) if i != b]
        batch = sum(others, torch.zeros_like(means[0])) / max(1, len(others))
        chosen = {
            "pair": means[b],
            "batch": batch,
            "class": self.running.get(f"class {labels[b]}", batch),
            "global": self.running.get("all", batch),
            "euclid": torch.eye(width, dtype=batch.dtype),
        }[config.metric]
        if config.metric == "euclid":
            return chosen
        inverse: Tensor = torch.linalg.inv(self.regular(chosen, 2 * config.ridge))
        return inverse / (inverse.trace() / width) if config.normalise else inverse

    def pac(
        self, parts: Tensor, labels: list[int], metrics: list[Tensor], epoch: int
    ) -> dict[str, Tensor]:
        config = self.config
        _, num, k, _ = parts.shape
        total, active, rows = parts.sum() * 0, 0, 0
        for b in range(num):
            in_metric = config.matching == "metric" and epoch >= config.matching_warmup_epochs
            costs = [[self.distance(p, q, metrics[b]) if in_metric
                      else 1 - self.unit(p) @ self.unit(q)
                      for q in parts[1, b]] for p in parts[0, b]]  # fmt: skip
            matching = min(
                itertools.permutations(range(k)),
                key=lambda order: sum(float(costs[i][j].detach()) for i, j in enumerate(order)),
            )
            pictures = list(range(num))
            if config.pool_cap is not None:
                following = [(b + step) % num for step in range(1, num)]
                pictures = following[: config.pool_cap]
            pool = [parts[v, i, j] for i in pictures for v in (0, 1) for j in range(k)
                    if labels[i] != labels[b]]  # fmt: skip
            if not pool:
                continue
            for i in range(k):
                p = parts[0, b, i]
                candidates = pool
                if config.top_m is not None:
                    candidates = sorted(
                        pool, key=lambda n: -float((self.unit(p) @ self.unit(n)).detach())
                    )
                    candidates = candidates[: config.top_m]
                positive = self.distance(p, parts[1, b, matching[i]], metrics[b])
                distances = [self.distance(p, n, metrics[b]) for n in candidates]
                if config.mining == "semi-hard":
                    beyond = [d for d in distances if d**2 > positive**2 * (1 + 1e-5)]
                    distances = beyond or distances
                hinge = positive - min(distances) + config.margin
                rows += 1
                if hinge > 0:
                    active += 1
                    total = total + hinge
        share = torch.tensor(active / max(1, rows), dtype=torch.float64)
        return {"pac": total / max(1, rows), "active": share}

    @staticmethod
    def distance(u: Tensor, v: Tensor, inverse: Tensor) -> Tensor:
        square = (u - v) @ inverse @ (u - v)
        return square.sqrt() if square > 1e-300 else square * 0

    def soc(self, covariances: list[list[Tensor]], labels: list[int]) -> Tensor:
        config = self.config
        gaps, drifts = [], []
        for b, label in enumerate(labels):
            first, second = (self.scaled(covariances[v][b]) for v in (0, 1))
            gaps.append(self.apart(first, second))
            if config.prototype and f"class {label}" in self.running:
                prototype = self.scaled(self.running[f"class {label}"])
                drifts.append(self.apart((first + second) / 2, prototype))
        soc = torch.stack(gaps).mean()
        return soc + config.prototype * torch.stack(drifts).mean() if drifts else soc

    def scaled(self, covariance: Tensor) -> Tensor:
        regular = self.regular(covariance, self.config.ridge)
        return regular / regular.trace() if self.config.soc_normalise else regular

    def apart(self, a: Tensor, b: Tensor) -> Tensor:
        """Squared distance."""
        if self.config.soc_distance == "fro":
            return ((a - b) ** 2).sum()
        if self.config.soc_distance == "stein":
            stein = torch.logdet((a + b) / 2) - (torch.logdet(a) + torch.logdet(b)) / 2
            return stein.clamp_min(0) ** 2
        return ((self.log(a) - self.log(b)) ** 2).sum()

    @staticmethod
    def log(a: Tensor) -> Tensor:
        """log A = integral of x / (1 + x) I - x (A + x I)^-1 over log x from -inf to inf.

        The integrand is analytic and falls off exponentially on both sides, so the trapezoidal rule
        is exact to float64; autograd sees inverses alone, no eigenvectors.
        """
        step = 0.5
        x = torch.arange(-90, 60, step, dtype=a.dtype).exp()[:, None, None]
        identity = torch.eye(len(a), dtype=a.dtype)
        inverse: Tensor = torch.linalg.inv(a + x * identity)
        return step * (x / (1 + x) * identity - x * inverse).sum(0)
