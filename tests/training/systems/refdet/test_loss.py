from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engineworks.training.systems.refdet.assign import pad
from engineworks.training.systems.refdet.config import LossConfig, WeightsConfig
from engineworks.training.systems.refdet.head import Output, Raw
from engineworks.training.systems.refdet.loss import (
    DetectionLoss,
    Losses,
    WIoU,
    binary_cross_entropy,
    ciou,
    distribution_focal,
    elsewhere,
    hardest_triplet,
    pooled,
    proposal_contrast,
    prototype_contrast,
    supervised_contrast,
    triplet,
)

pytestmark = pytest.mark.train

seeds = st.integers(0, 10_000)


def boxes(rng: np.random.Generator, num: int) -> np.ndarray:
    corner = rng.uniform(0, 40, (num, 2))
    return np.concatenate([corner, corner + rng.uniform(2, 30, (num, 2))], 1)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def box_parts(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """IoU, squared distance of the centres, squared diagonal of the hull of two boxes."""
    inner = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1)]
    hull = [max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1)]
    shared = inner[0] * inner[1]
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    away = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    squares = [float(np.square(pair).sum()) for pair in (away, hull)]
    return shared / (sum(areas) - shared), squares[0], squares[1]


class TestCiou:
    @settings(deadline=None)
    @given(seed=seeds)
    def test_is_the_papers(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        a, b = boxes(rng, 6), boxes(rng, 6)
        want = []
        for p, t in zip(a, b, strict=True):
            overlap, away, hull = box_parts(p, t)
            aspects = [math.atan((x[2] - x[0]) / (x[3] - x[1])) for x in (p, t)]
            v = 4 / math.pi**2 * (aspects[0] - aspects[1]) ** 2
            want.append(1 - overlap + away / hull + v * v / (1 - overlap + v))
        got = ciou(torch.from_numpy(a), torch.from_numpy(b))
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-9)  # both in float64

    @pytest.mark.data
    def test_is_the_published_one_and_so_is_its_gradient(self, shared: Path) -> None:
        fixture = np.load(shared / "fixtures/refdet_ciou.npz")
        predicted = torch.from_numpy(fixture["pred"]).double().requires_grad_()
        each = ciou(predicted, torch.from_numpy(fixture["target"]).double())
        each.mean().backward()
        # the fixture is float32
        np.testing.assert_allclose(each.detach().numpy(), fixture["loss_none"], atol=2e-7)
        assert predicted.grad is not None
        np.testing.assert_allclose(predicted.grad.numpy(), fixture["grad"], atol=1e-8)


class TestWIoU:
    @settings(deadline=None)
    @given(seed=seeds, version=st.sampled_from([1, 2, 3]))
    def test_is_the_papers(self, seed: int, version: int) -> None:
        rng = np.random.default_rng(seed)
        a, b = boxes(rng, 6), boxes(rng, 6)
        loss = WIoU(version).double().eval()
        loss.mean.fill_(0.4)
        want = []
        for p, t in zip(a, b, strict=True):
            overlap, away, hull = box_parts(p, t)
            v1 = math.exp(away / hull) * (1 - overlap)
            beta = (1 - overlap) / 0.4
            focus = {1: 1.0, 2: beta**0.5, 3: beta / (3 * 1.9 ** (beta - 3))}[version]
            want.append(focus * v1)
        got = loss(torch.from_numpy(a), torch.from_numpy(b))
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-9)  # both in float64

    def test_takes_no_gradient_through_the_hull_and_the_focus(self) -> None:
        rng = np.random.default_rng(0)
        a, b = torch.from_numpy(boxes(rng, 5)).requires_grad_(), torch.from_numpy(boxes(rng, 5))
        loss = WIoU(3).double().eval()
        loss.mean.fill_(0.5)
        loss(a, b).sum().backward()
        assert a.grad is not None
        got = a.grad.clone()
        frozen = []
        for p, t in zip(a.detach().numpy(), b.numpy(), strict=True):
            overlap, _, hull = box_parts(p, t)
            beta = (1 - overlap) / 0.5
            frozen.append((hull, beta / (3 * 1.9 ** (beta - 3))))
        step = 1e-6
        for n, (hull, focus) in enumerate(frozen):
            for side in range(4):
                value = []
                for sign in (1, -1):
                    moved = a.detach().numpy()[n].copy()
                    moved[side] += sign * step
                    overlap, away, _ = box_parts(moved, b.numpy()[n])
                    value.append(focus * math.exp(away / hull) * (1 - overlap))
                slope = (value[0] - value[1]) / (2 * step)
                # central differences in float64
                assert float(got[n, side]) == pytest.approx(slope, abs=1e-7)

    def test_learns_in_training_how_well_boxes_usually_fit(self) -> None:
        same = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        half = torch.tensor([[0.0, 0.0, 10.0, 5.0]])
        loss = WIoU(3, momentum=0.9)
        loss(half, same)
        assert float(loss.mean) == pytest.approx(0.9 + 0.1 * 0.5)  # of 1, and of 1 - IoU = 0.5
        loss.eval()(half, same)
        loss.train()(half[:0], same[:0])
        assert float(loss.mean) == pytest.approx(0.95)

    def test_v3_turns_from_the_perfect_and_from_the_hopeless(self) -> None:
        wanted = torch.tensor([[0.0, 0.0, 20.0, 20.0]]).expand(3, 4)
        near, usual, far = (torch.tensor([0, 0, 20.0, h]) for h in (19.5, 9.0, 0.2))
        found = torch.stack([near, usual, far])
        ratio = {}
        for version in (1, 3):
            loss = WIoU(version).eval()
            loss.mean.fill_(0.2)
            ratio[version] = loss(found, wanted)
        focus = ratio[3] / ratio[1]
        assert focus[1] > focus[0]
        assert focus[1] > focus[2]


class TestDistributionFocalLoss:
    @settings(deadline=None)
    @given(seed=seeds)
    def test_is_cross_entropy_with_the_two_bins_beside(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 2, (5, 4, 8))
        distances = rng.uniform(0, 9, (5, 4))  # some beyond the last bin, which is 7
        log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        want = np.zeros(5)
        for n in range(5):
            for side in range(4):
                d = min(distances[n, side], 7.0)
                low = min(int(d), 6)
                want[n] -= (low + 1 - d) * log[n, side, low] / 4
                want[n] -= (d - low) * log[n, side, low + 1] / 4
        got = distribution_focal(torch.from_numpy(logits), torch.from_numpy(distances))
        np.testing.assert_allclose(got.numpy(), want, rtol=2e-5)  # its softmax is float32

    @pytest.mark.data
    def test_is_a_quarter_of_the_published_sum(self, shared: Path) -> None:
        fixture = np.load(shared / "fixtures/refdet_dfl.npz")
        bins = int(fixture["reg_max"])
        logits = torch.from_numpy(fixture["pred_dist"]).requires_grad_()
        each = distribution_focal(logits.view(-1, 4, bins), torch.from_numpy(fixture["target"]))
        (4 * each.mean()).backward()
        total = float(fixture["loss_sum_over_4_sides_mean_over_boxes"])
        assert 4 * float(each.detach().mean()) == pytest.approx(total, rel=1e-6)  # both float32
        assert logits.grad is not None
        np.testing.assert_allclose(logits.grad.numpy(), fixture["grad"], atol=1e-7)


class TestBinaryCrossEntropy:
    @settings(deadline=None)
    @given(seed=seeds, gamma=st.sampled_from([0.0, 1.5, 2.0]))
    def test_is_the_quality_focal_loss(self, seed: int, gamma: float) -> None:
        rng = np.random.default_rng(seed)
        logits, targets = rng.normal(0, 3, (2, 5, 3)), rng.random((2, 5, 3))
        p = 1 / (1 + np.exp(-logits))
        entropy = -targets * np.log(p) - (1 - targets) * np.log(1 - p)
        got = binary_cross_entropy(
            torch.from_numpy(logits).float(), torch.from_numpy(targets).float(), gamma=gamma
        )
        want = np.abs(targets - p) ** gamma * entropy
        # float32, and |target - p| loses digits where the two are close
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-4, atol=1e-6)

    @pytest.mark.data
    def test_is_the_published_one(self, shared: Path) -> None:
        fixture = np.load(shared / "fixtures/refdet_bce.npz")
        each = binary_cross_entropy(*(torch.from_numpy(fixture[k]) for k in ("logits", "targets")))
        assert float(each.mean()) == pytest.approx(float(fixture["loss"]), rel=1e-6)


class TestSupervisedContrast:
    @settings(deadline=None)
    @given(seed=seeds)
    def test_is_the_papers_outer_sum(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        features, labels = rng.normal(size=(9, 6)), rng.integers(0, 4, 9)
        logits = unit(features) @ unit(features).T / 0.2
        each = []
        for i in range(9):
            others = [k for k in range(9) if k != i]
            positives = [k for k in others if labels[k] == labels[i]]
            if positives:
                log_sum = np.log(np.exp(logits[i, others]).sum())
                each.append(-np.mean([logits[i, k] - log_sum for k in positives]))
        got = supervised_contrast(torch.from_numpy(features), torch.from_numpy(labels), 0.2)
        want = np.mean(each) if each else 0.0
        assert float(got) == pytest.approx(want, rel=1e-9)  # both in float64

    @pytest.mark.data
    def test_is_the_textbooks(self, shared: Path) -> None:
        fixture = np.load(shared / "fixtures/refdet_supcon.npz")
        got = supervised_contrast(
            torch.from_numpy(fixture["features"]),
            torch.from_numpy(fixture["labels"]),
            float(fixture["temperature"]),
        )
        # float32, and logits up to 1 / 0.07
        assert float(got) == pytest.approx(float(fixture["loss_textbook_no_clamp"]), rel=2e-6)

    def test_learns_from_what_is_completely_wrong(self) -> None:
        """The published clamp of the logits would leave it no gradient."""
        features = torch.tensor([[1.0, 0.01], [-1.0, 0.0], [1.0, 0.0]], requires_grad=True)
        supervised_contrast(features, torch.tensor([0, 0, 1]), 0.07).backward()
        assert features.grad is not None
        assert (features.grad.abs().sum(1) > 0.01).all()

    def test_is_0_with_a_gradient_of_0_where_nothing_has_a_partner(self) -> None:
        features = torch.randn(3, 4, requires_grad=True)
        loss = supervised_contrast(features, torch.arange(3), 0.1)
        loss.backward()
        assert float(loss.detach()) == 0
        assert features.grad is not None
        assert not features.grad.any()


class TestPrototypeContrast:
    @settings(deadline=None)
    @given(seed=seeds)
    def test_is_cross_entropy_of_cosines(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        features, prototypes = rng.normal(size=(7, 5)), rng.normal(size=(3, 5))
        labels = rng.integers(0, 3, 7)
        logits = unit(features) @ unit(prototypes).T / 0.3
        want = np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(7), labels])
        got = prototype_contrast(
            *(torch.from_numpy(x) for x in (features, prototypes, labels)), 0.3
        )
        assert float(got) == pytest.approx(want, rel=1e-9)  # both in float64

    @pytest.mark.data
    def test_is_the_textbooks(self, shared: Path) -> None:
        fixture = np.load(shared / "fixtures/refdet_proto_contrast.npz")
        names = ("query", "prototypes", "labels")
        got = prototype_contrast(*(torch.from_numpy(fixture[k]) for k in names), 0.07)
        # 1e-4 is what is left of logits up to 14: float32 keeps 1e-6 of those
        assert float(got) == pytest.approx(float(fixture["loss_no_clamp"]), abs=1e-6)

    def test_is_0_without_any_feature(self) -> None:
        none = torch.zeros(0, 4, requires_grad=True)
        loss = prototype_contrast(none, torch.randn(2, 4), torch.zeros(0).long(), 0.1)
        loss.backward()
        assert float(loss.detach()) == 0


class TestProposalContrast:
    @settings(deadline=None)
    @given(seed=seeds, max_gap=st.sampled_from([0.1, 0.3, 1.0]))
    def test_is_the_sum_over_positives_by_the_sum_over_all(self, seed: int, max_gap: float) -> None:
        rng = np.random.default_rng(seed)
        features, labels, ious = rng.normal(size=(9, 5)), rng.integers(0, 3, 9), rng.random(9)
        e = np.exp(unit(features) @ unit(features).T / 0.1)
        each = []
        for i in range(9):
            positives = [
                j
                for j in range(9)
                if j != i and labels[j] == labels[i] and min(ious[i], ious[j]) >= 0.4
                and abs(ious[i] - ious[j]) <= max_gap
            ]  # fmt: skip
            others = [j for j in range(9) if labels[j] != labels[i]]
            if positives:
                each.append(-np.log(e[i, positives].sum() / e[i, positives + others].sum()))
        got = proposal_contrast(
            *(torch.from_numpy(x) for x in (features, labels, ious)),
            temperature=0.1,
            min_iou=0.4,
            max_gap=max_gap,
        )
        # both in float64; logsumexp of one number and of the same one with others
        assert float(got) == pytest.approx(np.mean(each) if each else 0.0, rel=1e-9, abs=1e-12)

    @pytest.mark.data
    @pytest.mark.parametrize(
        ("name", "min_iou", "max_gap"), [("cpe", 0.5, 0.2), ("simplified", 0.0, 1.0)]
    )
    def test_is_the_published_one_and_so_is_its_gradient(
        self, shared: Path, name: str, min_iou: float, max_gap: float
    ) -> None:
        fixture = np.load(shared / "fixtures/refdet_cpe.npz")
        labels = torch.from_numpy(fixture["labels"])
        features = torch.from_numpy(fixture["features"]).requires_grad_()
        real = labels >= 0  # the others are background
        ious = torch.from_numpy(fixture["ious"])[real]
        loss = proposal_contrast(
            features[real], labels[real], ious, temperature=0.1, min_iou=min_iou, max_gap=max_gap
        )
        loss.backward()
        assert float(loss.detach()) == pytest.approx(float(fixture[name]), rel=1e-6)  # float32
        assert features.grad is not None
        np.testing.assert_allclose(features.grad.numpy(), fixture[f"{name}_grad"], atol=5e-7)

    def test_is_0_with_a_gradient_of_0_where_nothing_has_a_partner(self) -> None:
        features = torch.randn(3, 4, requires_grad=True)
        loss = proposal_contrast(features, torch.arange(3), torch.ones(3), temperature=0.1)
        loss.backward()
        assert float(loss.detach()) == 0
        assert features.grad is not None
        assert not features.grad.any()


class TestTriplet:
    @pytest.mark.data
    def test_is_the_published_one_with_cosines(self, shared: Path) -> None:
        fixture = np.load(shared / "fixtures/refdet_triplet.npz")
        items = [torch.from_numpy(fixture[k]) for k in ("anchor", "positive", "negative")]
        got = triplet(*items, float(fixture["margin"])).mean()
        assert float(got) == pytest.approx(float(fixture["cosine"]), rel=1e-6)  # float32
        embeddings, labels = (torch.from_numpy(fixture[k]) for k in ("embeddings", "labels"))
        hard = hardest_triplet(embeddings, labels, embeddings, labels, float(fixture["margin"]))
        assert float(hard) == pytest.approx(float(fixture["batch_hard_cosine"]), rel=1e-6)

    @settings(deadline=None)
    @given(seed=seeds)
    def test_of_the_hardest_is_the_textbooks(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        anchors, items = rng.normal(size=(4, 5)), rng.normal(size=(7, 5))
        labels, cosine = rng.integers(-1, 4, 7), unit(anchors) @ unit(items).T
        each = [
            max(0, cosine[i, labels != i].max() - cosine[i, labels == i].min() + 0.3)
            for i in range(4)
            if (labels == i).any() and (labels != i).any()
        ]
        got = hardest_triplet(
            *(torch.from_numpy(x) for x in (anchors, np.arange(4), items, labels)), 0.3
        )
        assert float(got) == pytest.approx(np.mean(each) if each else 0.0, abs=1e-12)  # float64

    def test_is_0_without_items(self) -> None:
        loss = hardest_triplet(
            torch.randn(2, 4), torch.arange(2), torch.zeros(0, 4), torch.zeros(0).long(), 0.3
        )
        assert float(loss) == 0


class TestPooling:
    def test_takes_each_box_from_its_own_image_and_gives_each_scale_length_1(self) -> None:
        maps = [torch.zeros(2, 3, 8, 8), torch.zeros(2, 2, 4, 4)]
        for image in range(2):
            maps[0][image, image] = 5.0
            maps[1][image, 1 - image] = 7.0
        box = torch.tensor([[8.0, 8.0, 40.0, 40.0]])
        rows = pooled(maps, (8, 16), [box, box])
        want = torch.tensor([[1.0, 0, 0, 0, 1], [0, 1, 0, 1, 0]])
        torch.testing.assert_close(rows, want)  # constants: their mean is exact

    def test_looks_inside_the_box(self) -> None:
        fine = torch.zeros(1, 2, 8, 8)
        fine[:, 0] = 1.0
        fine[:, :, 2:5, 1:4] = torch.tensor([0.0, 1.0])[:, None, None]
        rows = pooled([fine], (8,), [torch.tensor([[12.0, 20.0, 28.0, 36.0]])])
        torch.testing.assert_close(rows, torch.tensor([[0.0, 1.0]]))

    def test_no_boxes_are_no_rows(self) -> None:
        assert pooled([torch.randn(2, 3, 4, 4)], (8,), [torch.zeros(0, 4)] * 2).shape == (0, 3)

    @settings(deadline=None)
    @given(seed=seeds)
    def test_what_lies_elsewhere_lies_in_the_image_and_on_nothing(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        known = [torch.from_numpy(boxes(rng, n)).float() for n in (3, 0, 1)]
        for empty, full in zip(elsewhere(known, (80, 90)), known, strict=True):
            assert (empty >= 0).all()
            assert (empty <= torch.tensor([90.0, 80.0, 90.0, 80.0]) + 1e-4).all()  # float32
            for a in empty:
                for b in full:
                    assert box_parts(a.double().numpy(), b.double().numpy())[0] <= 0.1 + 1e-6


def branch(
    seed: int, bins: int = 8, images: int = 2, classes: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Logits, distributions, boxes, anchors and strides of a head on 64 x 64 pixels."""
    torch.manual_seed(seed)
    side = (torch.arange(8) + 0.5) * 8
    y, x = torch.meshgrid(side, side, indexing="ij")
    centres = torch.stack([x, y], -1).flatten(0, 1)
    logits = torch.randn(images, 64, classes, requires_grad=True)
    raw = torch.randn(images, 64, 4, bins, requires_grad=True)
    sides = (raw.softmax(-1) @ torch.arange(float(bins))) * 8
    found = torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], -1)
    return logits, raw, found, centres, torch.full((64,), 8.0)


class TestDetectionLoss:
    @pytest.mark.parametrize("box", ["wiou-v1", "wiou-v2", "wiou-v3", "ciou"])
    def test_pulls_on_boxes_and_on_all_scores(self, box: str) -> None:
        logits, raw, *rest = branch(0)
        targets = pad(
            [torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.zeros(0, 4)],
            [torch.tensor([1]), torch.zeros(0).long()],
        )
        losses, found = DetectionLoss(LossConfig(box=box))(logits, raw, *rest, targets)  # type: ignore[arg-type]
        sum(losses.values()).backward()  # type: ignore[union-attr]
        assert logits.grad is not None
        assert raw.grad is not None
        assert (logits.grad != 0).all()  # background as well, in the image without a box too
        moved = raw.grad.abs().amax((-1, -2)) > 0
        assert torch.equal(moved, found.positive_BA)

    def test_an_image_without_boxes_only_pushes_scores_down(self) -> None:
        logits, raw, *rest = branch(1)
        none = pad([torch.zeros(0, 4)] * 2, [torch.zeros(0).long()] * 2)
        losses, _ = DetectionLoss(LossConfig())(logits, raw, *rest, none)
        losses["cls"].backward()
        assert float(losses["box"].detach()) == float(losses["dfl"].detach()) == 0
        assert logits.grad is not None
        assert (logits.grad > 0).all()

    def test_classes_that_do_not_count_in_an_image_take_no_gradient_there(self) -> None:
        logits, raw, *rest = branch(2)
        valid = torch.tensor([[True, True, False], [False, True, True]])
        true = [torch.tensor([[8.0, 8.0, 40.0, 40.0]])] * 2
        targets = pad(true, [torch.tensor([0]), torch.tensor([0])], valid)
        losses, found = DetectionLoss(LossConfig())(logits, raw, *rest, targets, valid)
        losses["cls"].backward()
        assert logits.grad is not None
        assert torch.equal((logits.grad != 0).all(1), valid)
        assert torch.equal((logits.grad != 0).any(1), valid)
        assert found.positive_BA.any(1).tolist() == [True, False]

    def test_weighs_a_box_by_its_anchors_score_and_divides_by_all_of_them(self) -> None:
        logits, raw, found, centres, strides = branch(3)
        true = [torch.tensor([[6.0, 4.0, 50.0, 45.0]]), torch.tensor([[20.0, 8.0, 60.0, 40.0]])]
        targets = pad(true, [torch.tensor([0]), torch.tensor([2])])
        config = LossConfig(box="ciou", gamma=0.0)
        losses, assigned = DetectionLoss(config)(logits, raw, found, centres, strides, targets)
        total = float(assigned.scores_BAC.sum())
        assert total > 1
        box = dfl = 0.0
        found, raw = found.detach(), raw.detach()
        for b, a in assigned.positive_BA.nonzero().tolist():
            weight = float(assigned.scores_BAC[b, a].sum())
            box += weight * float(ciou(found[b, a][None], true[b]))
            x, y = centres[a].tolist()
            x1, y1, x2, y2 = true[b][0].tolist()
            sides = torch.tensor([[x - x1, y - y1, x2 - x, y2 - y]]) / 8
            dfl += weight * float(distribution_focal(raw[b, a][None], sides))
        p = torch.sigmoid(logits.detach().double())
        wanted = assigned.scores_BAC.double()
        entropy = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum()
        got = {name: float(loss.detach()) for name, loss in losses.items()}
        # sums of a hundred float32
        assert got["box"] == pytest.approx(box / total, rel=1e-5)
        assert got["dfl"] == pytest.approx(dfl / total, rel=1e-5)
        assert got["cls"] == pytest.approx(float(entropy) / total, rel=1e-5)

    def test_without_distributions_there_is_nothing_to_say_about_them(self) -> None:
        logits, raw, *rest = branch(4)
        targets = pad([torch.tensor([[8.0, 8.0, 40.0, 40.0]])] * 2, [torch.tensor([0])] * 2)
        losses, _ = DetectionLoss(LossConfig())(logits, raw[..., :1], *rest, targets)
        assert float(losses["dfl"]) == 0


def raw_of(distances_BA4R: Tensor, logits_BAC: Tensor, maps: tuple[Tensor, ...] = ()) -> Raw:
    sides_BKA = distances_BA4R.detach().flatten(2).transpose(1, 2)
    logits_BCA = logits_BAC.detach().transpose(1, 2)
    return Raw((sides_BKA.requires_grad_(),), (logits_BCA.requires_grad_(),), maps)


class TestAllLosses:
    """Two frames, three objects, of which not all are looked for in each."""

    WEIGHTS = WeightsConfig(
        box=2.0,
        dfl=0.5,
        cls=3.0,
        base=0.25,
        prototype=0.7,
        supervised=0.6,
        proposals=0.4,
        triplet=0.3,
    )

    @staticmethod
    def step(weights: WeightsConfig, seed: int = 0) -> tuple[dict[str, Tensor], Output, Tensor]:
        logits, raw, _, centres, strides = branch(seed)
        base_logits, base_raw, *_ = branch(seed + 1, classes=2)
        maps = (torch.randn(2, 6, 8, 8, requires_grad=True),)
        rows = torch.nn.functional.normalize(torch.randn(6, 6), dim=1).requires_grad_()
        output = Output(
            raw_of(raw, logits, maps), raw_of(base_raw, base_logits), centres, strides, (8,)
        )
        batch = {
            "images": torch.zeros(2, 3, 64, 64),
            "object_of_picture": torch.arange(3).repeat_interleave(2),
            "prompted": torch.tensor([[True, False, True], [True, True, False]]),
            "boxes": [
                torch.tensor([[4.0, 4, 30, 30], [34.0, 30, 60, 60]]),
                torch.tensor([[10.0, 8, 40, 50], [44.0, 4, 60, 20]]),
            ],
            "objects": [torch.tensor([0, 1]), torch.tensor([2, -1])],
            "base": [torch.tensor([0, -1]), torch.tensor([1, 1])],
        }
        prototypes = torch.nn.functional.normalize(rows.view(3, 2, 6).mean(1), dim=1)
        torch.manual_seed(seed)
        losses = Losses(LossConfig(min_iou=0.0), 2)(output, rows, prototypes, batch, weights)
        return losses, output, rows

    def test_are_summed_with_their_weights(self) -> None:
        losses, *_ = self.step(self.WEIGHTS)
        weights = dict(self.WEIGHTS)
        for name in ("box", "dfl", "cls"):
            weights[f"base_{name}"] = weights["base"] * weights[name]
        want = sum(weights[name] * value for name, value in losses.items() if name != "loss")
        assert len(losses) == 11
        torch.testing.assert_close(losses["loss"], want)  # ten float32 in another order

    def test_reach_what_they_are_about(self) -> None:
        losses, output, rows = self.step(self.WEIGHTS)
        losses["loss"].backward()
        assert output.base is not None
        (embedding,) = output.prototype.embeddings
        reached = (*output.prototype.logits, *output.base.logits, embedding, rows)
        assert all(each.grad is not None and each.grad.any() for each in reached)

    def test_a_contrast_alone_teaches_embeddings_and_references(self) -> None:
        losses, output, rows = self.step(self.WEIGHTS)
        for name in ("prototype", "supervised", "triplet"):
            (embedding,) = output.prototype.embeddings
            grads = torch.autograd.grad(losses[name], (embedding, rows), retain_graph=True)
            assert all(grad.any() for grad in grads), name

    def test_an_object_that_is_not_looked_for_is_no_target(self) -> None:
        losses, output, _ = self.step(WeightsConfig(base=0.0))
        losses["cls"].backward()
        grad = output.prototype.logits[0].grad
        assert grad is not None
        assert not grad[0, 1].any()
        assert not grad[1, 2].any()
        # its second frame shows none of the two that are looked for there
        assert (grad[1, :2] > 0).all()

    def test_what_weighs_nothing_is_not_computed(self) -> None:
        losses, *_ = self.step(WeightsConfig(base=0.0))
        assert set(losses) == {"loss", "box", "dfl", "cls"}

    def test_no_boxes_at_all_are_no_reason_to_fail(self) -> None:
        logits, raw, _, centres, strides = branch(5)
        maps = (torch.randn(2, 6, 8, 8),)
        rows = torch.nn.functional.normalize(torch.randn(3, 6), dim=1)
        nothing = torch.zeros(0).long()
        batch = {
            "images": torch.zeros(2, 3, 64, 64),
            "object_of_picture": torch.arange(3),
            "prompted": torch.ones(2, 3, dtype=torch.bool),
            "boxes": [torch.zeros(0, 4)] * 2,
            "objects": [nothing] * 2,
            "base": [nothing] * 2,
        }
        output = Output(raw_of(raw, logits, maps), None, centres, strides, (8,))
        losses = Losses(LossConfig(), 0)(output, rows, rows, batch, self.WEIGHTS)
        losses["loss"].backward()
        assert torch.isfinite(losses["loss"])
