from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from engineworks.training.profiler import Profiler
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
    Euclid,
    LowRank,
    Regulariser,
    Whitening,
    factors,
)

pytestmark = pytest.mark.train

# the published settings of the Cotton80 runs
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


def draw(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# --- the reference: the definitions, one vector at a time ----------------------------------------


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


@st.composite
def batches(draw_value: st.DrawFn) -> tuple[Tensor, tuple[list[int], int], list[int]]:
    """Distinct parts (2, B, K', d), how a batch is made of them (pictures, K), and the labels.

    K' = 1 stands for constant features. Gradients are compared for the distinct parts, because
    among equal ones rounding may choose either.
    """
    num, k = draw_value(st.integers(1, 4)), draw_value(st.sampled_from([2, 3, 4]))
    width, seed = draw_value(st.integers(2, 7)), draw_value(st.integers(0, 999))
    kind = draw_value(st.sampled_from(["random", "random", "duplicates", "constant"]))
    labels = draw_value(st.lists(st.integers(0, 2), min_size=num, max_size=num))
    parts = draw(2, num, 1 if kind == "constant" else k, width, seed=seed)
    pictures = list(range(num)) if kind != "duplicates" else [0, *range(num - 1)]
    return parts, (pictures, k), labels


configs = st.builds(
    LossConfig,
    normalise=st.booleans(),
    metric=st.sampled_from(["pair", "batch", "class", "global", "euclid"]),
    shrinkage=st.sampled_from([None, 0.2, 1.0]),
    ridge=st.sampled_from([1e-2, 1e-4]),
    mining=st.sampled_from(["semi-hard", "hardest"]),
    top_m=st.sampled_from([None, 1, 5]),
    pool_cap=st.sampled_from([None, 1, 2]),
    matching=st.sampled_from(["cosine", "metric"]),
    soc_distance=st.sampled_from(["fro", "log-euclidean", "stein"]),
    soc_normalise=st.booleans(),
    prototype=st.sampled_from([0.0, 0.5]),
    momentum=st.sampled_from([0.0, 0.9]),
)


def gradient_of(loss: Tensor, source: Tensor) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros_like(source)
    return torch.autograd.grad(loss, source, retain_graph=True)[0]


class TestTheLoss:
    @settings(deadline=None, max_examples=80)
    @given(config=configs, first=batches(), epoch=st.sampled_from([0, 3]), more=st.integers(0, 9))
    def test_is_the_definitions_value_and_gradient(
        self,
        config: LossConfig,
        first: tuple[Tensor, tuple[list[int], int], list[int]],
        epoch: int,
        more: int,
    ) -> None:
        source, (pictures, k), labels = first
        ours = PartLoss(config, num_classes=3, width=source.shape[-1]).double()
        reference = Reference(config)
        other = draw(*source.shape, seed=more)
        # the first batch fills the running covariances, for some of the classes
        for values, targets in ((other, [y // 2 for y in labels]), (source, labels)):
            leaf = values.clone().requires_grad_()
            parts = leaf.expand(-1, -1, k, -1)[:, pictures]
            got = ours(parts, torch.tensor(targets), epoch)
            want = reference(parts, targets, epoch)
            for name in ("pac", "soc", "active"):
                # float64; the metric of constant features divides by its eps
                torch.testing.assert_close(got[name], want[name], rtol=1e-8, atol=1e-10)
            for name in ("pac", "soc"):
                gradients = [gradient_of(terms[name], leaf) for terms in (got, want)]
                scale = float(gradients[1].abs().max())
                torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-7 * scale + 1e-9)

    @pytest.mark.parametrize("metric", ["pair", "batch", "class", "global", "euclid"])
    @pytest.mark.parametrize("kind", ["zeros", "constant", "duplicates", "tiny", "huge"])
    def test_is_finite_with_its_gradient_for_degenerate_parts(self, metric: Any, kind: str) -> None:
        parts = {
            "zeros": torch.zeros(2, 4, 3, 6),
            "constant": torch.full((2, 4, 3, 6), 3.7),
            "duplicates": draw(1, 1, 1, 6, seed=0).float().expand(2, 4, 3, 6) / 3,
            "tiny": 1e-12 * draw(2, 4, 3, 6, seed=0).float(),
            "huge": 1e4 * draw(2, 4, 3, 6, seed=0).float(),
        }[kind]
        options = itertools.product(
            ("semi-hard", "hardest"),
            (None, 2),
            ("fro", "log-euclidean", "stein"),
            (False, True),
            (None, 0.2),
        )
        for mining, top_m, soc_distance, normalise, shrinkage in options:
            chosen: Any = {"mining": mining, "soc_distance": soc_distance}
            config = LossConfig(
                metric=metric,
                **chosen,
                top_m=top_m,
                normalise=normalise,
                soc_normalise=normalise,
                shrinkage=shrinkage,
            )
            loss = PartLoss(config, num_classes=3, width=6)
            for _ in range(2):  # without and with running covariances
                leaf = parts.clone().requires_grad_()
                terms = loss(leaf, torch.tensor([0, 1, 1, 2]), epoch=9)
                (terms["pac"] + terms["soc"]).backward()
                assert all(value.detach().isfinite() for value in terms.values()), config
                assert leaf.grad is not None
                assert leaf.grad.isfinite().all(), config

    @pytest.mark.parametrize("metric", ["pair", "batch", "class", "global", "euclid"])
    def test_of_float32_parts_is_that_of_float64(self, metric: Any) -> None:
        parts, labels = draw(2, 8, 4, 32, seed=3), torch.arange(8) % 3
        config = LossConfig(metric=metric, mining="hardest")
        double = PartLoss(config, 3, 32).double()(parts, labels, epoch=9)
        single = PartLoss(config, 3, 32)(parts.float(), labels, epoch=9)
        for name, value in single.items():
            assert value.dtype == torch.float32
            # float32, times the spread of the metric's eigenvalues under the default shrinkage
            torch.testing.assert_close(value.double(), double[name], rtol=1e-5, atol=1e-6)

    def test_is_float32_under_autocast(self) -> None:
        parts, labels = draw(2, 4, 4, 8, seed=0).bfloat16(), torch.tensor([0, 1, 2, 0])
        loss = PartLoss(LossConfig(metric="batch"), 3, 8).eval()
        want = loss(parts.float(), labels)
        with torch.autocast("cpu", torch.bfloat16):
            got = loss(parts, labels)
        assert got == want

    def test_of_one_class_has_no_contrast_and_no_gradient_of_it(self) -> None:
        parts = draw(2, 3, 4, 8, seed=0).float().requires_grad_()
        terms = PartLoss(LossConfig(soc=0.0), 5, 8)(parts, torch.tensor([2, 2, 2]))
        terms["pac"].backward()
        assert [float(terms[name].detach()) for name in ("pac", "active")] == [0, 0]
        assert parts.grad is not None
        assert not parts.grad.any()

    def test_times_its_sections(self) -> None:
        with Profiler() as profiler:
            PartLoss(LossConfig(), 3, 8)(draw(2, 3, 4, 8, seed=0).float(), torch.arange(3))
        assert set(profiler.seconds) == {"other", "covariance", "matching", "pac", "soc"}

    def test_is_scale_free_where_it_is_normalised(self) -> None:
        parts, labels = draw(2, 5, 4, 8, seed=0), torch.tensor([0, 1, 2, 0, 1])
        metrics: list[Any] = ["pair", "batch", "class", "global", "euclid"]
        for metric in metrics:
            config = LossConfig(metric=metric)
            small, large = (
                PartLoss(config, 3, 8).double()(scale * parts, labels) for scale in (0.01, 100)
            )
            for name, value in small.items():  # float64
                torch.testing.assert_close(value, large[name], rtol=1e-9, atol=1e-12)


class TestRunningCovariancesOfTheLoss:
    def test_are_read_before_the_batch_updates_them(self) -> None:
        parts, labels = draw(2, 4, 4, 8, seed=0).float(), torch.tensor([0, 1, 2, 0])
        learning = PartLoss(LossConfig(), 3, 8)
        fixed = PartLoss(LossConfig(), 3, 8).eval()
        assert learning(parts, labels) == fixed(parts, labels)
        assert learning(parts, labels) != fixed(parts, labels)

    def test_change_only_in_training(self) -> None:
        loss = PartLoss(LossConfig(), 3, 8).eval()
        before = {name: value.clone() for name, value in loss.state_dict().items()}
        loss(draw(2, 3, 4, 8, seed=0).float(), torch.arange(3))
        assert all(torch.equal(value, before[name]) for name, value in loss.state_dict().items())

    def test_come_back_with_the_state(self) -> None:
        parts, labels = draw(2, 4, 4, 8, seed=0).float(), torch.tensor([0, 1, 2, 0])
        first, second = (PartLoss(LossConfig(metric="class"), 3, 8) for _ in range(2))
        first(parts, labels)
        second.load_state_dict(first.state_dict())
        assert first(parts, labels) == second(parts, labels)

    @pytest.mark.parametrize(
        ("settings", "names"),
        [
            ({"metric": "batch", "prototype": 0.0}, set()),
            ({"metric": "class", "soc": 0.0}, {"per_class"}),
            ({"metric": "global", "soc": 0.0}, {"overall"}),
            ({"metric": "global", "pac": 0.0}, {"per_class"}),
            ({"metric": "global"}, {"per_class", "overall"}),
        ],
    )
    def test_are_kept_only_where_something_reads_them(
        self, settings: dict[str, Any], names: set[str]
    ) -> None:
        state = PartLoss(LossConfig(**settings), 3, 8).state_dict()
        assert {name.split(".")[0] for name in state} == names

    def test_of_unseen_classes_are_left_out(self) -> None:
        parts = draw(2, 2, 4, 8, seed=0)
        with_prototypes = PartLoss(LossConfig(), 3, 8).double()
        without = PartLoss(LossConfig(prototype=0.0), 3, 8).double()
        first = with_prototypes(parts, torch.tensor([0, 1]))["soc"]
        assert first == without(parts, torch.tensor([0, 1]))["soc"]
        # class 2 is new, class 1 is not: the mean is over the one
        mixed = with_prototypes(parts, torch.tensor([2, 1]))["soc"]
        assert mixed > first


class TestMatching:
    @settings(deadline=None, max_examples=40)
    @given(num=st.integers(2, 7), seed=st.integers(0, 999))
    def test_is_the_cheapest_assignment(self, num: int, seed: int) -> None:
        costs = draw(3, num, num, seed=seed)
        want = [linear_sum_assignment(cost.numpy())[1].tolist() for cost in costs]
        assert match(costs).tolist() == want

    def test_of_equal_costs_takes_the_first(self) -> None:
        assert match(torch.zeros(1, 4, 4)).tolist() == [[0, 1, 2, 3]]

    def test_waits_for_its_metric_until_the_warm_up_is_over(self) -> None:
        # in the metric of the pair the cheap direction decides, in the cosine it does not
        parts, labels = draw(2, 6, 4, 8, seed=5), torch.arange(6)
        config = LossConfig(metric="pair", matching_warmup_epochs=3, normalise=False)
        cosine = LossConfig(metric="pair", matching="cosine", normalise=False)
        loss = PartLoss(config, 6, 8).double()
        assert (
            loss(parts, labels, 2)["pac"] == PartLoss(cosine, 6, 8).double()(parts, labels)["pac"]
        )
        assert loss(parts, labels, 3)["pac"] < loss(parts, labels, 2)["pac"]


class TestNegatives:
    def test_are_never_of_the_same_class(self) -> None:
        labels = torch.tensor([0, 1, 0, 2])
        parts = torch.arange(4.0)[None, :, None, None].expand(2, 4, 3, 5)  # the picture's number
        pool, allowed = negative_pool(parts, labels)
        for b, label in enumerate(labels):
            of = pool[0, allowed[b], 0].long()
            assert len(of) == 6 * int((labels != label).sum())
            assert (labels[of] != label).all()

    @settings(deadline=None)
    @given(num=st.integers(1, 6), cap=st.integers(1, 7))
    def test_with_a_cap_come_from_the_next_pictures(self, num: int, cap: int) -> None:
        parts = torch.arange(float(num))[None, :, None, None].expand(2, num, 3, 5)
        pool, allowed = negative_pool(parts, torch.arange(num), cap)
        for b in range(num):
            want = {(b + step) % num for step in range(1, min(cap, num - 1) + 1)}
            assert set(pool[b % len(pool), allowed[b], 0].tolist()) == want

    def test_of_largest_cosine_are_not_always_the_nearest(self) -> None:
        parts, labels = draw(2, 8, 4, 32, seed=0), torch.arange(8)
        losses = {
            top_m: float(PartLoss(LossConfig(top_m=top_m), 8, 32).double()(parts, labels)["pac"])
            for top_m in (None, 8, 56, 1000)
        }
        assert losses[8] != pytest.approx(losses[None], rel=1e-3)
        # float64: the same candidates, by differences instead of products
        assert losses[56] == pytest.approx(losses[None], rel=1e-9)
        assert losses[1000] == losses[None]

    def test_may_equal_the_positive_without_counting_as_beyond_it(self) -> None:
        anchor, positive = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0]]])
        pool = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
        loss, active = part_contrast(
            anchor, positive, pool, torch.tensor([[True, True]]), Euclid(), margin=2.5
        )
        assert [float(loss), float(active)] == [0.5, 1.0]  # 1 - 3 + 2.5


class TestWeightedCrossEntropy:
    def test_weights_each_picture_with_its_own(self) -> None:
        logits, labels = draw(3, 5, seed=0), torch.tensor([0, 4, 2])
        weights = torch.tensor([0.5, 2.0, 0.5], dtype=torch.float64)
        smooth = 0.1
        want = 0.0
        for row, label, weight in zip(logits, labels, weights, strict=True):
            target = torch.full((5,), smooth / 5, dtype=torch.float64)
            target[label] += 1 - smooth
            ce = -float((target * (row - row.exp().sum().log())).sum())
            want += (0.7 * ce + 0.3 * float(weight) * ce) / 3
        got = weighted_cross_entropy(logits, labels, weights, share=0.3, label_smoothing=smooth)
        assert float(got) == pytest.approx(want, rel=1e-12)  # float64

    def test_without_a_share_is_the_plain_one(self) -> None:
        logits, labels = draw(3, 5, seed=0), torch.tensor([0, 4, 2])
        weights = torch.tensor([0.0, 9.0, 1.0], dtype=torch.float64)
        got = weighted_cross_entropy(logits, labels, weights, share=0.0)
        torch.testing.assert_close(got, F.cross_entropy(logits, labels))


# --- what the published code computes ------------------------------------------------------------


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


def test_a_regulariser_keeps_the_trace_of_what_it_shrinks() -> None:
    covariance = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    shrunk = Regulariser(0.3, 1.0).dense(covariance[None])[0]
    assert float(shrunk.trace()) == pytest.approx(4, rel=1e-6)  # float32
    assert shrunk.diagonal().tolist() == pytest.approx([2.5, 1.1, 0.4], rel=1e-6)
