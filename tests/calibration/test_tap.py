from __future__ import annotations

import numpy as np
import onnx
import pytest

from engineworks.calibration.observe import Observer
from engineworks.calibration.tap import Tap
from engineworks.runtime.engines import Engine
from engineworks.runtime.engines.ort import OrtEngine
from engineworks.runtime.errors import EngineError, InputError

GRAPH = """<ir_version: 9, opset_import: ["" : 18]>
g (float[n, 2] x) => (float[n, 2] y) { a = Exp(x)  y = Sqrt(a) }"""


@pytest.fixture
def content() -> bytes:
    content: bytes = onnx.parser.parse_model(GRAPH).SerializeToString()
    return content


class TestATap:
    def test_is_an_engine_with_the_graphs_own_border(self, content: bytes) -> None:
        tap: Engine = Tap(Observer(content, ["a"], threads=1))
        plain = OrtEngine(content, threads=1)

        assert (tap.backend, tap.inputs, tap.outputs) == ("ort", plain.inputs, plain.outputs)

    def test_answers_as_the_graph_does(self, content: bytes) -> None:
        feeds = {"x": np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)}

        got = Tap(Observer(content, ["a"], threads=1)).run(feeds)

        assert list(got) == ["y"]
        # exposing a tensor may change which kernels are fused: float32 rounding
        np.testing.assert_allclose(got["y"], OrtEngine(content).run(feeds)["y"], rtol=1e-6)

    def test_shows_all_that_passes(self, content: bytes) -> None:
        tap = Tap(Observer(content, ["x", "a"], threads=1))

        for value in (1.0, -3.0, 2.0):
            tap.run({"x": np.full((2, 2), value, np.float32)})

        assert (tap.histograms["x"].min, tap.histograms["x"].max) == (-3.0, 2.0)
        assert tap.histograms["a"].num_values == 12

    def test_refuses_a_feed_that_does_not_fit(self, content: bytes) -> None:
        with pytest.raises(InputError, match="'x' has shape"):
            Tap(Observer(content, ["a"])).run({"x": np.zeros((1, 3), np.float32)})

    def test_closed_twice_stays_closed(self, content: bytes) -> None:
        tap = Tap(Observer(content, ["a"]))
        tap.close()
        tap.close()

        with pytest.raises(EngineError, match="closed"):
            tap.run({"x": np.zeros((1, 2), np.float32)})
