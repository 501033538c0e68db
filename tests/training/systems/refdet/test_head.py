from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from engineworks.training.systems.refdet.head import (
    BaseBranch,
    Output,
    PrototypeBranch,
    Raw,
    anchors,
)

pytestmark = pytest.mark.train

CHANNELS, WIDTHS, STRIDES = (16, 32), (8, 12), (8, 16)
GRID = ((4, 6), (2, 3))
NUM_ANCHORS = 4 * 6 + 2 * 3

seeds = st.integers(0, 10_000)


def maps(num: int = 2, *, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(num, c, *grid, generator=generator)
        for c, grid in zip(CHANNELS, GRID, strict=True)
    ]


def prototypes(num: int, *, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(num, sum(WIDTHS), generator=torch.Generator().manual_seed(seed))
    return torch.cat([F.normalize(part, dim=1) for part in torch.split(rows, list(WIDTHS), 1)], 1)


def branch(*, bins: int = 4, separable: bool = True, prior: float = 0.01) -> PrototypeBranch:
    torch.manual_seed(0)
    return PrototypeBranch(
        CHANNELS, WIDTHS, bins=bins, separable=separable, temperature=10.0, prior=prior
    ).eval()


def output(raw: Raw) -> Output:
    places, sizes = anchors(maps(1), STRIDES)
    return Output(raw, None, places, sizes, STRIDES)


class TestAnchors:
    def test_are_the_centres_of_all_cells_row_by_row(self) -> None:
        places, sizes = anchors(maps(), STRIDES)

        want = [
            (stride * (column + 0.5), stride * (row + 0.5), stride)
            for stride, (height, width) in zip(STRIDES, GRID, strict=True)
            for row in range(height)
            for column in range(width)
        ]
        assert torch.cat([places, sizes[:, None]], 1).tolist() == [
            list(map(float, w)) for w in want
        ]


class TestABox:
    @given(seed=seeds, bins=st.sampled_from([1, 2, 16]))
    @settings(max_examples=30, deadline=None)
    def test_reaches_as_far_as_the_distribution_expects(self, seed: int, bins: int) -> None:
        rng = np.random.default_rng(seed)
        logits = rng.normal(0, 3, (1, NUM_ANCHORS, 4, bins))
        sides_BKA = torch.from_numpy(logits).float().flatten(2).transpose(1, 2)
        raw = Raw((sides_BKA,), (torch.zeros(1, 1, NUM_ANCHORS),))
        out = output(raw)

        found = out.boxes(raw)[0].double().numpy()

        if bins == 1:
            sides = np.log1p(np.exp(logits[0, ..., 0]))
        else:
            shares = np.exp(logits[0]) / np.exp(logits[0]).sum(-1, keepdims=True)
            sides = (shares * np.arange(bins)).sum(-1)
        sides *= out.strides_A.numpy()[:, None]
        x, y = out.anchors_A2.double().numpy().T
        left, top, right, bottom = sides.T
        want = np.stack([x - left, y - top, x + right, y + bottom], 1)
        # float32, at coordinates of up to some 300 pixels
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-3)
        assert (found[:, :2] <= out.anchors_A2.numpy()).all()
        assert (found[:, 2:] >= out.anchors_A2.numpy()).all()

    @pytest.mark.parametrize("bins", [1, 16])
    def test_gives_a_gradient_to_every_side(self, bins: int) -> None:
        distances = torch.randn(1, 4 * bins, NUM_ANCHORS, requires_grad=True)
        raw = Raw((distances,), (torch.zeros(1, 1, NUM_ANCHORS),))
        output(raw).boxes(raw).square().sum().backward()
        assert distances.grad is not None
        assert (distances.grad.unflatten(1, (4, bins)).abs().sum(2) > 0).all()


class TestThePrototypesBranch:
    def test_says_how_like_each_prototype_an_anchor_is(self) -> None:
        net, rows = branch(), prototypes(3)
        torch.nn.init.normal_(net.log_temperature)

        with torch.no_grad():
            raw = net(maps(), rows)

        assert raw.distances_BA4R.shape == (2, NUM_ANCHORS, 4, 4)
        assert [tuple(e.shape) for e in raw.embeddings] == [
            (2, width, *grid) for width, grid in zip(WIDTHS, GRID, strict=True)
        ]
        parts = np.split(rows.double().numpy(), np.cumsum(WIDTHS)[:-1], axis=1)
        start = 0
        for i, (x, embedding) in enumerate(zip(maps(), raw.embeddings, strict=True)):
            heat = math.exp(net.log_temperature[i].item())
            with torch.no_grad():
                objectness = net.objectness[i](x)[:, 0].double().numpy()
            height, width = GRID[i]
            for b in range(2):
                for row in range(height):
                    for column in range(width):
                        vector = embedding[b, :, row, column].double().numpy()
                        cosines = parts[i] @ vector / np.linalg.norm(vector)
                        want = heat * cosines + objectness[b, row, column]
                        got = raw.logits_BAC[b, start + row * width + column].numpy()
                        # float32 sums of a dozen terms
                        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
            start += height * width

    @given(seed=seeds, num=st.integers(1, 5))
    @settings(max_examples=10, deadline=None)
    def test_has_a_column_per_prototype_that_depends_on_no_other(self, seed: int, num: int) -> None:
        net, rows = branch(), prototypes(num, seed=seed)
        order = torch.randperm(num, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            want, got = net(maps(), rows), net(maps(), rows[order])
            alone = net(maps(), rows[:1])
        # products of another shape
        torch.testing.assert_close(got.logits_BAC, want.logits_BAC[..., order], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.logits_BAC, want.logits_BAC[..., :1], rtol=0, atol=1e-5)
        assert torch.equal(got.distances_BA4R, want.distances_BA4R)

    def test_takes_nearly_everything_for_background_in_the_beginning(self) -> None:
        net = PrototypeBranch(
            (64, 128), (64, 128), bins=16, separable=True, temperature=10.0, prior=0.01
        )
        rows = torch.cat([F.normalize(torch.randn(8, c), dim=1) for c in (64, 128)], 1)
        with torch.no_grad():
            scores = net([torch.randn(2, 64, 16, 16), torch.randn(2, 128, 8, 8)], rows)
        scores = scores.logits_BAC.sigmoid()
        assert scores.median() < 0.02
        assert (scores > 0.25).float().mean() < 0.01  # cosines of random vectors are small

    def test_learns_in_every_parameter(self) -> None:
        net = branch().train()
        raw = net(maps(), prototypes(2))
        (raw.logits_BAC.square().mean() + raw.distances_BA4R.square().mean()).backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []

    def test_lets_the_prototypes_learn(self) -> None:
        rows = prototypes(2).requires_grad_()
        branch()(maps(), rows).logits_BAC.sum().backward()
        assert rows.grad is not None
        assert (rows.grad.abs().sum(1) > 0).all()

    def test_costs_less_with_separable_convolutions(self) -> None:
        operations = []
        for separable in (True, False):
            net = branch(separable=separable)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                net(maps(), prototypes(1))
            operations.append(counter.get_total_flops())
        assert operations[0] < operations[1] / 2

    def test_answers_in_float32_under_autocast(self) -> None:
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            got = branch()(maps(), prototypes(3)).logits_BAC
        with torch.no_grad():
            want = branch()(maps(), prototypes(3)).logits_BAC
        assert got.dtype == torch.float32
        assert (got - want).abs().max() < 0.5  # 8 bits, times a temperature of 10


class TestTheBaseClassesBranch:
    def test_takes_everything_for_background_in_the_beginning(self) -> None:
        net = BaseBranch(CHANNELS, 5, bins=4, separable=True, prior=0.01).eval()
        with torch.no_grad():
            raw = net(maps())
        assert raw.logits_BAC.shape == (2, NUM_ANCHORS, 5)
        assert raw.distances_BA4R.shape == (2, NUM_ANCHORS, 4, 4)
        assert raw.embeddings == ()
        # the last layer starts with weights of 0.01 and this bias
        assert (raw.logits_BAC - math.log(0.01 / 0.99)).abs().max() < 0.5

    def test_learns_in_every_parameter(self) -> None:
        net = BaseBranch(CHANNELS, 5, bins=4, separable=True, prior=0.01)
        raw = net(maps())
        (raw.logits_BAC.square().mean() + raw.distances_BA4R.square().mean()).backward()
        assert [name for name, p in net.named_parameters() if p.grad is None] == []
