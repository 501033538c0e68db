from __future__ import annotations

import numpy as np
import onnx
import pytest

from engineworks.export import passes
from engineworks.export.quantize import KeepFloat, quantizable, quantize, to_unsigned
from engineworks.export.sensitivity import measure, sensitivity
from engineworks.runtime.errors import QuantizationError
from tests.export.residual_net import LITERAL, deployed, images, measured, residual_net, run

FEEDS = {"image": images(num=2)}


@pytest.fixture(scope="module")
def net() -> onnx.ModelProto:
    return passes.prepare(residual_net(bn=True))


@pytest.fixture(scope="module")
def ranges(net: onnx.ModelProto) -> dict[str, float]:
    return measured(net, FEEDS)


class TestSensitivity:
    def test_has_one_cost_per_quantizable_node_worst_first(
        self, net: onnx.ModelProto, ranges: dict[str, float]
    ) -> None:
        costs = sensitivity(net, ranges, [FEEDS], threads=1)

        assert {cost.node for cost in costs} == set(quantizable(net))
        assert [cost.worst for cost in costs] == sorted((c.worst for c in costs), reverse=True)
        assert all(set(cost.alone) == {"layer1", "layer2", "logits"} for cost in costs)

    def test_a_node_costs_nothing_where_it_does_not_lead(
        self, net: onnx.ModelProto, ranges: dict[str, float]
    ) -> None:
        costs = {cost.node: cost for cost in sensitivity(net, ranges, [FEEDS], threads=1)}

        # float layers before it are fused like those of the float graph: float32 rounding at most
        assert costs["fc"].alone["layer2"].relative < 1e-6
        assert costs["layer2.0.conv1"].alone["layer1"].relative < 1e-6
        assert costs["layer2.0.conv1"].alone["layer2"].relative > 1e-3

    def test_finds_the_node_whose_range_is_spoilt(
        self, net: onnx.ModelProto, ranges: dict[str, float]
    ) -> None:
        node = next(n for n in net.graph.node if n.name == "layer2.1.conv2")
        spoilt = ranges | {node.input[0]: 50 * ranges[node.input[0]]}

        costs = sensitivity(net, spoilt, [FEEDS], threads=1)

        assert costs[0].node == "layer2.1.conv2"
        without = {cost.node: cost.without["layer2"].relative for cost in costs}
        assert min(without, key=lambda name: without[name]) == "layer2.1.conv2"

    def test_agrees_with_a_graph_quantized_by_hand(
        self, net: onnx.ModelProto, ranges: dict[str, float]
    ) -> None:
        names = quantizable(net)
        only = KeepFloat(nodes=frozenset(set(names) - {"fc"}))
        got = run(deployed(to_unsigned(quantize(net, ranges, only))), FEEDS, LITERAL)["logits"]
        want = run(net, FEEDS, LITERAL)["logits"]

        cost = {c.node: c for c in sensitivity(net, ranges, [FEEDS], threads=1)}["fc"]

        relative = np.linalg.norm(got - want) / np.linalg.norm(want)
        # one flipped step among 2 x 24 inputs is all that rounding can do
        assert cost.alone["logits"].relative == pytest.approx(relative, rel=0.1)

    def test_leaves_out_what_the_recipe_keeps_float(
        self, net: onnx.ModelProto, ranges: dict[str, float]
    ) -> None:
        rule = KeepFloat(op_types=frozenset({"Add", "Conv"}))

        assert [c.node for c in sensitivity(net, ranges, [FEEDS], rule)] == ["fc"]

    def test_without_feeds_is_refused(self, net: onnx.ModelProto, ranges: dict[str, float]) -> None:
        with pytest.raises(QuantizationError, match="no feeds"):
            sensitivity(net, ranges, [])


class TestMeasure:
    def test_agrees_with_the_definitions_over_all_feeds(self) -> None:
        rng = np.random.default_rng(0)
        want = [rng.normal(size=(2, 5, 10, 10)).astype(np.float32) for _ in range(2)]
        got = [w + 0.1 * rng.normal(size=w.shape).astype(np.float32) for w in want]

        error = measure(want, got)

        a, b = (np.concatenate(v).astype(np.float64) for v in (want, got))
        cosines = sorted(
            float(p @ q / np.sqrt((p @ p) * (q @ q)))
            for image in range(4)
            for y in range(10)
            for x in range(10)
            for p, q in [(a[image, :, y, x], b[image, :, y, x])]
        )
        assert error.relative == pytest.approx(np.sqrt(((a - b) ** 2).sum() / (a**2).sum()))
        assert error.cosine == pytest.approx(np.mean(cosines))
        assert error.tail_cosine == pytest.approx(np.mean(cosines[:4]))  # 1 % of 400

    def test_vectors_that_are_zero_in_both_agree(self) -> None:
        zeros = np.zeros((1, 3), np.float32)

        assert (measure([zeros], [zeros]).cosine, measure([zeros], [zeros]).relative) == (1, 0)
        assert measure([zeros], [zeros + 1]).cosine == 0

    def test_a_changed_sign_is_the_worst(self) -> None:
        value = np.ones((4, 3), np.float32)

        assert measure([value], [-value]).cosine == pytest.approx(-1)
