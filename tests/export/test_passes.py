from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from engineworks.export import passes
from engineworks.runtime.errors import ExportError
from tests.export.residual_net import images, residual_net, run


def op_types(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def parse(text: str, **constants: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    for name, value in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


class TestPrepare:
    def test_leaves_a_resnet_like_graph_without_any_batch_normalisation(self) -> None:
        model = passes.prepare(residual_net(bn=True))

        assert "BatchNormalization" not in op_types(model)
        assert op_types(model)["Conv"] == 8

    def test_does_not_change_what_the_graph_computes(self) -> None:
        model = residual_net(bn=True)
        feeds = {"image": images()}

        got = run(passes.prepare(model), feeds)

        for name, before in run(model, feeds).items():
            # folding rescales float32 weights: a few roundings of 2^-24 per layer, eight layers
            np.testing.assert_allclose(
                got[name], before, rtol=1e-4, atol=1e-5 * np.abs(before).max()
            )

    def test_does_not_change_its_argument(self) -> None:
        model = residual_net(bn=True)
        before = model.SerializeToString(deterministic=True)

        passes.prepare(model)

        assert model.SerializeToString(deterministic=True) == before

    def test_done_twice_changes_nothing_more(self) -> None:
        once = passes.prepare(residual_net(bn=True))

        twice = passes.prepare(once)

        assert list(twice.graph.node) == list(once.graph.node)

    def test_keeps_matmul_plus_add_apart_because_gemm_loses_the_int8_kernel(self) -> None:
        model = parse(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[2, 4] x) => (float[2, 3] y) { h = MatMul(x, w)  y = Add(h, b) }""",
            w=np.ones((4, 3), np.float32),
            b=np.ones(3, np.float32),
        )

        assert op_types(passes.prepare(model)) == {"MatMul": 1, "Add": 1}


class TestInline:
    def test_a_constant_behind_castlike_and_expand_is_folded_into_the_bias(self) -> None:
        model = parse(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[n, 3, 8, 8] x) => (float[n, 4, 8, 8] y) {
                c = CastLike(zero, x)
                b = Expand(c, shape)
                h = Conv(x, w, b)
                y = BatchNormalization(h, ones, ones, ones, ones)
            }""",
            zero=np.array(0.0, np.float64),
            shape=np.array([4]),
            w=np.ones((4, 3, 1, 1), np.float32),
            ones=np.ones(4, np.float32),
        )

        prepared = passes.prepare(model)

        assert op_types(prepared) == {"Conv": 1}

    def test_local_functions_are_expanded(self) -> None:
        model = onnx.parser.parse_model(
            """<ir_version: 9, opset_import: ["" : 18, "local" : 1]>
            g (float[2] x) => (float[2] y) { y = local.twice(x) }
            <domain: "local", opset_import: ["" : 18]>
            twice (a) => (b) { b = Add(a, a) }"""
        )

        inlined = passes.inline(model)

        assert not inlined.functions
        assert op_types(inlined) == {"Add": 1}


class TestFoldBatchnorm:
    @pytest.mark.parametrize("group", [1, 2])
    @pytest.mark.parametrize("op_type", ["Conv", "ConvTranspose"])
    def test_agrees_with_the_formula_in_float64_for_every_group(
        self, op_type: str, group: int
    ) -> None:
        rng = np.random.default_rng(3)
        c_in, c_out = 4, 6
        shape = (c_out, c_in // group) if op_type == "Conv" else (c_in, c_out // group)
        model = parse(
            f"""<ir_version: 9, opset_import: ["" : 18]>
            g (float[2, 4, 5, 5] x) => (float[2, 6, c, d] y) {{
                h = {op_type} <group = {group}> (x, w, b)
                y = BatchNormalization(h, gamma, beta, mean, variance)
            }}""",
            w=rng.normal(size=(*shape, 3, 3)).astype(np.float32),
            b=rng.normal(size=6).astype(np.float32),
            gamma=rng.normal(size=6).astype(np.float32),
            beta=rng.normal(size=6).astype(np.float32),
            mean=rng.normal(size=6).astype(np.float32),
            variance=rng.uniform(0.1, 2, 6).astype(np.float32),
        )
        feeds = {"x": rng.normal(size=(2, 4, 5, 5)).astype(np.float32)}

        folded = passes.fold_batchnorm(model)

        assert op_types(folded) == {op_type: 1}
        # float32 convolution on rescaled weights: 36 products, each rounded to 2^-24 relative
        np.testing.assert_allclose(
            run(folded, feeds)["y"], run(model, feeds)["y"], rtol=1e-4, atol=1e-5
        )

    def test_weights_keep_their_names(self) -> None:
        folded = passes.fold_batchnorm(residual_net(bn=True))

        weights = {node.input[1] for node in folded.graph.node if node.op_type == "Conv"}

        assert "layer2.0.downsample.0.weight" in weights

    def test_a_convolution_that_is_read_elsewhere_is_left_alone(self) -> None:
        model = parse(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] h, float[1, 2, 4, 4] y) {
                h = Conv(x, w)
                y = BatchNormalization(h, ones, ones, ones, ones)
            }""",
            w=np.ones((2, 2, 1, 1), np.float32),
            ones=np.ones(2, np.float32),
        )

        assert op_types(passes.prepare(model)) == {"Conv": 1, "BatchNormalization": 1}

    def test_a_weight_that_two_convolutions_share_is_folded_for_each_alone(self) -> None:
        rng = np.random.default_rng(0)
        model = parse(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) {
                h = Conv(x, w)
                i = BatchNormalization(h, a, a, a, a)
                j = Conv(i, w)
                y = BatchNormalization(j, b, b, b, b)
            }""",
            w=rng.normal(size=(2, 2, 1, 1)).astype(np.float32),
            a=np.array([1.0, 2.0], np.float32),
            b=np.array([3.0, 0.5], np.float32),
        )
        feeds = {"x": rng.normal(size=(1, 2, 4, 4)).astype(np.float32)}

        folded = passes.fold_batchnorm(model)

        assert op_types(folded) == {"Conv": 2}
        # two float32 layers
        np.testing.assert_allclose(
            run(folded, feeds)["y"], run(model, feeds)["y"], rtol=1e-5, atol=1e-6
        )


class TestNameNodes:
    def test_nodes_are_called_after_their_weights_and_else_counted_by_type(self) -> None:
        model = passes.prepare(residual_net(bn=True))

        names = [node.name for node in model.graph.node]

        assert names[:5] == ["conv1", "Relu_0", "MaxPool_0", "layer1.0.conv1", "Relu_1"]
        assert len(set(names)) == len(names)

    def test_the_exporters_own_names_do_not_matter(self) -> None:
        model = residual_net()
        renamed = onnx.ModelProto()
        renamed.CopyFrom(model)
        for i, node in enumerate(renamed.graph.node):
            node.name = f"other_{i}"
            for j, name in enumerate(node.input):
                node.input[j] = name.replace("val_", "tensor")
            node.output[0] = node.output[0].replace("val_", "tensor")

        assert list(passes.name_nodes(renamed).graph.node) == list(
            passes.name_nodes(model).graph.node
        )

    def test_inputs_outputs_and_initializers_keep_their_names(self) -> None:
        model = residual_net()

        named = passes.name_nodes(model)

        assert named.graph.input == model.graph.input
        assert named.graph.output == model.graph.output
        assert named.graph.initializer == model.graph.initializer


CANDIDATES = """<ir_version: 9, opset_import: ["" : 18]>
g (float[1, 9] logits, float[1, 9] size)
    => (float[1, 3] scores, int64[1, 3] places, int64[1, 3] kinds, float[1, 9] all)
<int64[1] three = {3}> {
    best, where = TopK<axis = 1>(logits, three)
    places = Identity(where)
    wide = Neg(size)
    chosen = GatherElements<axis = 1>(wide, where)
    scores = Sigmoid(chosen)
    counted = Cast<to = 7>(wide)
    kinds = GatherElements<axis = 1>(counted, where)
    all = Mul(wide, logits)
}"""


class TestBeforeTheChoice:
    def test_an_output_of_chosen_entries_becomes_what_they_are_chosen_from(self) -> None:
        rng = np.random.default_rng(0)
        feeds = {n: rng.normal(size=(1, 9)).astype(np.float32) for n in ("logits", "size")}
        model = passes.prepare(onnx.parser.parse_model(CANDIDATES))

        changed = passes.before_choice(model)

        got = run(changed, feeds)
        names = [node.name for node in changed.graph.node]
        assert len(set(names)) == len(names)  # as the quantizer wants them
        want = run(model, feeds)
        np.testing.assert_array_equal(got["all"], want["all"])
        np.testing.assert_array_equal(got["places"], want["places"])
        np.testing.assert_array_equal(got["scores"], -feeds["size"])
        assert set(got) == {"all", "places", "scores"}  # what the kinds count is not defined

    def test_a_graph_that_chooses_nothing_stays_as_it_is(self) -> None:
        model = passes.prepare(residual_net(bn=True))

        assert passes.before_choice(model) == model
        assert passes.telling_choice(model) == (model, [])
        assert passes.given_choice(model) == model

    def test_a_graph_takes_the_choice_of_another_one(self) -> None:
        rng = np.random.default_rng(0)
        feeds, others = (
            {n: rng.normal(size=(1, 9)).astype(np.float32) for n in ("logits", "size")}
            for _ in range(2)
        )
        model = passes.prepare(onnx.parser.parse_model(CANDIDATES))
        telling, names = passes.telling_choice(model)
        told = run(telling, feeds)
        choice = {name: told.pop(name) for name in names}
        assert choice

        # its own choice changes nothing
        found = run(passes.given_choice(model), {**feeds, **choice})
        assert set(found) == set(told)
        for name, value in told.items():
            np.testing.assert_array_equal(found[name], value)

        # of another input others would be chosen, and it takes those that it is told
        other = run(passes.given_choice(model), {**others, **choice})
        (where,) = choice.values()
        assert (run(telling, others)[names[0]] != where).any()
        size = np.take_along_axis(others["size"].astype(np.float64), where, axis=1)
        np.testing.assert_allclose(other["scores"], 1 / (1 + np.exp(size)), rtol=1e-6)

    def test_the_argument_is_not_changed(self) -> None:
        model = passes.infer_shapes(onnx.parser.parse_model(CANDIDATES))
        before = model.SerializeToString(deterministic=True)

        passes.before_choice(model)

        assert model.SerializeToString(deterministic=True) == before


class TestAGraphThatThePassesDoNotTake:
    def test_an_old_opset_is_refused_with_the_way_out(self) -> None:
        model = onnx.parser.parse_model(
            """<ir_version: 8, opset_import: ["" : 13]>
            g (float[2] x) => (float[2] y) { y = Relu(x) }"""
        )

        with pytest.raises(ExportError, match=r"opset 13.*\n.*opset_version=18"):
            passes.prepare(model)

    def test_control_flow_is_refused_by_name(self) -> None:
        branch = onnx.parser.parse_graph(
            "b () => (float[1] y) { y = Constant<value_floats=[1.0]>() }"
        )
        node = helper.make_node(
            "If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch
        )
        graph = helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

        with pytest.raises(ExportError, match="'choice'"):
            passes.check_flat(model)

    def test_a_graph_that_contradicts_itself_is_refused(self) -> None:
        model = parse(
            """<ir_version: 9, opset_import: ["" : 18]>
            g (float[2, 4] x) => (float[2, 3] y) { y = MatMul(x, w) }""",
            w=np.ones((5, 3), np.float32),
        )

        with pytest.raises(ExportError, match="not valid ONNX"):
            passes.infer_shapes(model)


class TestOrderGelu:
    HEAD = """<ir_version: 9, opset_import: ["" : 18]> gelu (float[4,32] x) => (float[4,32] y) {
        scaled = Div (x, root)
        bent = Erf (scaled)
    """

    def model(self, tail: str) -> onnx.ModelProto:
        constants = {"root": 2**0.5, "one": 1.0, "half": 0.5, "third": 1 / 3}
        values = {name: np.array(value, np.float32) for name, value in constants.items()}
        return parse(self.HEAD + tail + "}", **values)

    @pytest.mark.parametrize(
        "tail",
        [
            "gate = Add (bent, one) shut = Mul (half, gate) y = Mul (x, shut)",
            "gate = Add (one, bent) shut = Mul (gate, half) y = Mul (shut, x)",
        ],
    )
    def test_lets_onnxruntime_find_it_and_changes_no_bit(self, tail: str, tmp_path: Path) -> None:
        before = self.model(tail)
        after = passes.order_gelu(before)
        feeds = {"x": np.random.default_rng(0).normal(0, 3, (4, 32)).astype(np.float32)}
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        one, other = (
            ort.InferenceSession(m.SerializeToString(), options, ["CPUExecutionProvider"])
            for m in (before, after)
        )
        np.testing.assert_array_equal(one.run(None, feeds)[0], other.run(None, feeds)[0])
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(after.SerializeToString(), options, ["CPUExecutionProvider"])
        assert op_types(onnx.load(tmp_path / "optimized.onnx")) == {"Gelu": 1}
        assert passes.order_gelu(after) == after

    @pytest.mark.parametrize(
        "tail",
        [
            "gate = Add (bent, one) shut = Mul (third, gate) y = Mul (x, shut)",
            "gate = Add (bent, one) shut = Mul (half, gate) y = Mul (bent, shut)",
            "gate = Add (bent, one) shut = Mul (half, gate) z = Mul (x, shut) y = Add (z, shut)",
            "shut = Mul (half, bent) y = Mul (x, shut)",
        ],
    )
    def test_leaves_other_products_alone(self, tail: str) -> None:
        model = self.model(tail)
        assert passes.order_gelu(model) == model
