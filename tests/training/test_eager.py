from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from engineworks.runtime.tensors import Array
from engineworks.training.eager import Network, contenders, to_channels_last

pytestmark = pytest.mark.train


class Mean:
    """A system that means the network's answer."""

    def __init__(self, network: Network) -> None:
        self.network = network

    def forward(self, images_BCHW: Array) -> torch.Tensor:
        answer: torch.Tensor = self.network(to_channels_last(images_BCHW))
        return answer

    def infer(self, images: Sequence[Array]) -> list[float]:
        batch = np.stack([image.transpose(2, 0, 1).astype(np.float32) for image in images])
        return [float(row.float().mean()) for row in self.forward(batch)]


@pytest.fixture(autouse=True)
def threads_as_before() -> object:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 4, 3).eval().requires_grad_(False)


def made(net: nn.Module) -> tuple[list[tuple[str, str]], list[str]]:
    said: list[str] = []
    found = contenders(net, Mean, threads=1, say=said.append)
    return [(contender.name, contender.precision) for contender in found], said


def test_without_a_compiler_there_are_eager_rows_and_a_word(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)

    rows, said = made(net)

    assert rows == [("eager channels_last", "float"), ("eager channels_last", "bf16")]
    assert "needs a C++ compiler" in said[0]


def test_with_a_compiler_there_are_compiled_rows_too(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"bin/{name}")

    rows, _ = made(net)

    assert rows[2:] == [("torch.compile", "float"), ("torch.compile", "bf16")]


def test_rows_run_the_network_in_their_precision_and_layout(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _name: None)
    batch = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)

    floats, halves = contenders(net, Mean, threads=1, say=lambda _line: None)

    with torch.no_grad():
        want = net(torch.from_numpy(batch))
        assert floats.network(batch).dtype == torch.float32
        assert halves.network(batch).dtype == torch.bfloat16
        torch.testing.assert_close(floats.network(batch), want)
        # bfloat16 has 8 bits, over sums of 27 products
        assert (halves.network(batch) - want).abs().max() < 0.03 * want.abs().max()
    assert net.weight.is_contiguous(memory_format=torch.channels_last)
    assert to_channels_last(batch).is_contiguous(memory_format=torch.channels_last)
    images = [np.full((8, 8, 3), 7, np.uint8)]
    assert len(floats.path(images)) == 1
