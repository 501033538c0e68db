from __future__ import annotations

import itertools
from typing import Any

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
    match,
    negative_pool,
    part_contrast,
    weighted_cross_entropy,
)
from engineworks.training.systems.paco.metric import (
    Euclid,
    Regulariser,
)
from tests.training.systems.paco.loss_reference import (
    Reference,
    draw,
)

pytestmark = pytest.mark.train


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


def test_a_regulariser_keeps_the_trace_of_what_it_shrinks() -> None:
    covariance = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
    shrunk = Regulariser(0.3, 1.0).dense(covariance[None])[0]
    assert float(shrunk.trace()) == pytest.approx(4, rel=1e-6)  # float32
    assert shrunk.diagonal().tolist() == pytest.approx([2.5, 1.1, 0.4], rel=1e-6)
