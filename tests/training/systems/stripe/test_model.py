from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engineworks.training.systems.stripe.config import NetworkConfig, TaskConfig
from engineworks.training.systems.stripe.model import Segment, UNet, build, multiply_adds

pytestmark = pytest.mark.train


def built(**network: Any) -> Segment:
    torch.manual_seed(0)
    return build(TaskConfig(network=NetworkConfig(**network))).eval()


class TestTheNetwork:
    @settings(deadline=None, max_examples=25)
    @given(
        cell=st.sampled_from([1, 2, 4]),
        depth=st.integers(2, 4),
        height=st.integers(1, 9),
        width=st.integers(1, 9),
    )
    def test_gives_a_logit_for_every_pixel(
        self, cell: int, depth: int, height: int, width: int
    ) -> None:
        net = built(cell=cell, depth=depth, width=4)
        size = (height * net.stride, width * net.stride)
        with torch.no_grad():
            assert net(torch.zeros(2, 3, *size)).shape == (2, 1, *size)

    @pytest.mark.parametrize("name", ["unet", "unet-se"])
    def test_may_be_the_published_one(self, name: str) -> None:
        net = built(name=name, width=4)
        assert net.stride == 32
        with torch.no_grad():
            assert net(torch.zeros(1, 3, 64, 96)).shape == (1, 1, 64, 96)

    @pytest.mark.parametrize("name", ["plain", "unet"])
    def test_takes_the_sensors_values(self, name: str) -> None:
        network = NetworkConfig(name=name, width=4)  # type: ignore[arg-type]
        nets = []
        for value_range in ((0.0, 1.0), (100.0, 4100.0)):
            torch.manual_seed(0)
            nets.append(build(TaskConfig(network=network, value_range=value_range)).eval())
        share = torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            one, other = nets[0](share), nets[1](100 + 4000 * share)
        # values near 4,000 in float32 are shares to 1e-7, and layers add to that
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)

    def test_takes_differences_in_float32_whatever_the_rest_does(self) -> None:
        config = TaskConfig(network=NetworkConfig(width=4), value_range=(0.0, 65535.0))
        net = build(config).eval()
        planes = torch.full((1, 3, 8, 8), 60000.0)
        planes[:, 1] += 1
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            mixed = net.get_submodule("net.mix")(planes)
        assert mixed.dtype == torch.float32
        # one step of 65,535, of shares near 1 in float32
        assert mixed[0, 1, 0, 0].item() == pytest.approx(-2 / 65535, rel=5e-3)
        assert mixed[0, 2].abs().max() < 2e-7

    def test_begins_with_few_defects(self) -> None:
        with torch.no_grad():
            probability = built()(255 * torch.rand(1, 3, 64, 64)).sigmoid()
        assert 0.001 < probability.mean() < 0.1

    def test_sees_as_far_as_a_defect_needs_and_no_further(self) -> None:
        net = built(width=8, depth=6, cell=2)
        planes = torch.rand(1, 3, 128, 128, requires_grad=True)
        net(planes)[0, 0, 64, 64].backward()
        assert planes.grad is not None
        seen = planes.grad[0].abs().sum(0) > 0
        rows = torch.nonzero(seen.any(1)).flatten()
        reach = max(64 - int(rows.min()), int(rows.max()) - 64)
        assert 10 <= reach <= net.reach

    def test_does_not_see_other_images_of_its_batch(self) -> None:
        net = built(width=8)
        planes = 255 * torch.rand(3, 3, 32, 32)
        with torch.no_grad():
            # convolutions may sum in another order for another batch size
            torch.testing.assert_close(net(planes)[1:2], net(planes[1:2]), rtol=0, atol=1e-5)


class TestThePublishedUNet:
    @pytest.mark.data
    @pytest.mark.parametrize(("name", "attentive"), [("v1", False), ("head", True)])
    def test_answers_as_published_with_its_weights(
        self, shared: Path, name: str, attentive: bool
    ) -> None:
        fixture = np.load(shared / f"fixtures/stripe_unet_{name}_base8.npz")
        published = np.load(shared / f"fixtures/stripe_unet_{name}_base8_io.npz")
        state = {
            key.removeprefix("w:"): torch.from_numpy(np.asarray(fixture[key]))
            for key in fixture.files
            if key.startswith("w:")
        }
        net = UNet(8, attentive=attentive).eval()
        net.load_state_dict(
            {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
        )
        with torch.no_grad():
            got = net(torch.from_numpy(published["x"])).numpy()
        # float32 sums in another order; logits are of size 0.1
        np.testing.assert_allclose(got, published["logits16"], rtol=0, atol=1e-6)
        # its weights before they were rounded to half precision
        np.testing.assert_allclose(got, fixture["logits"], rtol=0, atol=1e-3)

    @pytest.mark.parametrize(("attentive", "parameters"), [(False, 28_372_418), (True, 26_089_246)])
    def test_has_the_published_size(self, attentive: bool, parameters: int) -> None:
        with torch.device("meta"):
            net = UNet(64, attentive=attentive)
        assert sum(p.numel() for p in net.parameters()) == parameters

    def test_has_one_logit_with_the_same_probability(self) -> None:
        net = built(name="unet", width=4)
        planes = 255 * torch.rand(1, 3, 64, 64)
        with torch.no_grad():
            two = net.get_submodule("net.net")(planes / 255).softmax(1)[:, 1:]
            one = net(planes).sigmoid()
        # two float32 formulas of one number
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)


class _Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(5, 10, 1, groups=5)
        self.linear = nn.Linear(10, 7)

    def forward(self, planes: Tensor) -> Tensor:
        pooled: Tensor = self.linear(self.grouped(self.conv(planes)).mean((2, 3)))
        return pooled


class TestTheCountOfMultiplyAdds:
    def test_is_that_of_the_formula(self) -> None:
        per_cell = 5 * 3 * 9 + 10 * 1
        assert multiply_adds(_Two(), 8, 12) == 4 * 6 * per_cell + 7 * 10

    def test_of_the_default_is_a_fraction_of_the_published(self) -> None:
        with torch.device("meta"):
            published = UNet(64)
        assert multiply_adds(published, 128, 128) == 9_484_369_920
        assert 50 * multiply_adds(built(), 128, 128) < 9_484_369_920

    def test_leaves_the_module_as_it_was(self) -> None:
        net = _Two().train()
        multiply_adds(net, 8, 8)
        assert net.training
        assert not net.conv._forward_hooks
