"""PyTorch and the engines in one process, on one GPU: nothing is copied, order is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from engineworks.runtime.engines import BACKENDS, Engine, open_engine
from tests.runtime.nets import as_plan, conv_net, conv_net_in_float64

pytestmark = [pytest.mark.gpu, pytest.mark.train]


@pytest.fixture
def torch() -> Any:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    return torch


@pytest.fixture
def engine(torch: Any) -> Iterator[Engine]:
    if reason := BACKENDS["tensorrt"].why_not():
        pytest.skip(reason)
    with closing(open_engine(as_plan(conv_net()[0]), "tensorrt")) as opened:
        yield opened


def expected(x: Any) -> Any:
    return conv_net_in_float64(x.cpu().numpy(), conv_net()[1])


@pytest.mark.parametrize("own_stream", [False, True])
def test_a_tensor_goes_in_and_comes_out_on_the_current_stream(
    torch: Any, engine: Engine, own_stream: bool
) -> None:
    stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            # a product that takes a while: who does not wait for it reads what was there before
            long = torch.rand(2048, 2048, device="cuda") @ torch.rand(2048, 2048, device="cuda")
            x = torch.rand(4, 3, 10, 10, device="cuda") + 0 * long[0, 0]
            answer = engine.run({"x": x}, stream=stream.cuda_stream)["y"]
            y = torch.as_tensor(answer, device="cuda") * 1
            want = expected(x)
            # sums of 27 and 32 float32 products: a few 1e-7 of the largest
            np.testing.assert_allclose(y.cpu(), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_tensor_without_a_stream_is_waited_for(torch: Any, engine: Engine) -> None:
    x = torch.rand(2, 3, 10, 10, device="cuda")
    got: Any = engine.run({"x": x})["y"]
    want = expected(x)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_both_live_in_the_primary_context(torch: Any, engine: Engine) -> None:
    before = torch.ones(3, device="cuda")
    engine.run({"x": np.zeros((2, 3, 10, 10), np.float32)})
    engine.close()
    assert (before + 1).tolist() == [2, 2, 2]
