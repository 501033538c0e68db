"""Bundles with 16-bit graphs and plans: what is written, what is noted, what is refused."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from engineworks.export import deploy as stage
from engineworks.export.config import ExportConfig
from engineworks.export.deploy import profiles_of
from engineworks.export.pipeline import export as deploy
from engineworks.runtime import plans
from engineworks.runtime.bundle import Bundle, GraphEntry, read, sha256_file, write
from engineworks.runtime.errors import (
    BackendError,
    BundleError,
    ExportError,
    ParityError,
    UsageError,
)
from engineworks.runtime.plans import PLANS, Machine, PlanConfig, PlanOrigin, ShapeRange, origin_of
from engineworks.runtime.systems import open_system
from engineworks.runtime.tensors import TensorSpec
from engineworks.runtime.testing import (
    write_parts,
    write_tiny_noising_bundle,
    write_tiny_paco_bundle,
    write_tiny_stripe_bundle,
)
from tests.export import trt_stub

HERE = Machine(
    tensorrt="11.4.0.106",
    platform="linux-x86_64",
    gpu="NVIDIA H200",
    compute_capability="9.0",
    driver="580.65.06",
    cuda="13.0",
)
INPUTS = {"images": (-1, 3, 64, 64)}
STRIPE_SIZES = ({"batch": (1, 1, 4), "height": (32, 96, 128), "width": (32, 64, 128)},)


def silent(_text: str) -> None:
    pass


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Float and INT8; read-only."""
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("tiny") / "bundle", int8=True)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Puts a stub in TensorRT's place."""

    def make(**options: Any) -> Any:
        fake = trt_stub.tensorrt(HERE.tensorrt, **{"inputs": INPUTS, **options})
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        trt_stub.forget()
        return fake

    monkeypatch.setattr(stage, "this_machine", lambda: HERE)
    yield make
    trt_stub.forget()


@pytest.fixture(scope="module")
def made(tiny: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """With both 16-bit graphs; read-only."""
    out = tmp_path_factory.mktemp("half") / "bundle"
    return deploy(tiny, out, ExportConfig(halves=("fp16", "bf16")), say=silent)


class TestA16BitGraph:
    def test_stands_beside_all_that_was_there(self, tiny: Bundle, made: Bundle) -> None:
        variants = made.manifest.graphs["features"].variants
        assert variants == {
            **tiny.manifest.graphs["features"].variants,
            "fp16": "features.fp16.onnx",
            "bf16": "features.bf16.onnx",
        }
        assert set(made.manifest.files) > set(tiny.manifest.files)
        assert "plans" not in made.manifest.provenance
        assert read(made.root).manifest == made.manifest

    def test_has_the_inputs_and_outputs_of_the_float_graph(self, made: Bundle) -> None:
        for kind in ("fp16", "bf16"):
            graph = onnx.load(made.path(f"features.{kind}.onnx")).graph
            values = [*graph.input, *graph.output]
            assert {v.type.tensor_type.elem_type for v in values} == {onnx.TensorProto.FLOAT}

    def test_was_held_against_float32(self, made: Bundle) -> None:
        report = made.manifest.reports["parity_half"]
        for kind in ("fp16", "bf16"):
            assert 0.999 <= report[kind]["features"]["features"]["cosine"] <= 1 + 1e-6
        # bfloat16 has three bits less
        error = {kind: report[kind]["features"]["features"]["mean_rel"] for kind in report}
        assert 0 < error["fp16"] < error["bf16"]

    def test_runs_as_a_precision_of_onnx_runtime(self, made: Bundle, tmp_path: Path) -> None:
        data = write_parts(tmp_path / "data", size=(48, 64), num_train=10)
        metrics = {}
        for precision in ("float", "fp16"):
            system = open_system(made, backend="ort", precision=precision)
            metrics[precision] = system.evaluate(data).metrics
            system.close()
        for name, value in metrics["float"].items():
            # a score moves by a thousandth of itself; few pictures change places in a ranking
            assert metrics["fp16"][name] == pytest.approx(value, abs=0.02)

    def test_is_checked_on_samples_where_there_are_any(self, tiny: Bundle, tmp_path: Path) -> None:
        data = write_parts(tmp_path / "data", size=(48, 64), num_train=10)
        config = ExportConfig(halves=("fp16",), samples=data / "train")
        made = deploy(tiny, tmp_path / "out", config, say=silent)
        noise = deploy(tiny, tmp_path / "noise", ExportConfig(halves=("fp16",)), say=silent)
        assert made.manifest.reports["parity_half"] != noise.manifest.reports["parity_half"]

    def test_that_turns_an_output_away_is_refused(self, tiny: Bundle, tmp_path: Path) -> None:
        """Features that share a large offset differ by less than a step of float16."""
        graph = onnx.load(tiny.path("features.onnx"))
        names = {node.name: node for node in graph.graph.node}
        bias = numpy_helper.from_array(np.array([1, -1] * 8, np.float32) * 3e4, "offset")
        back = numpy_helper.from_array(np.array([-1, 1] * 8, np.float32) * 3e4, "back")
        for tensor in (bias, back):
            tensor.dims[:] = [1, 16, 1, 1]
            graph.graph.initializer.append(tensor)
        conv, relu = names["conv2"], names["relu2"]
        relu.input[0] = "near"
        add = onnx.helper.make_node("Add", [conv.output[0], "offset"], ["far"], name="add")
        sub = onnx.helper.make_node("Add", ["far", "back"], ["near"], name="sub")
        place = list(graph.graph.node).index(relu)
        graph.graph.node.insert(place, sub)
        graph.graph.node.insert(place, add)
        onnx.save(graph, tmp_path / "features.onnx")
        files = {name: tiny.path(name) for name in tiny.manifest.files}
        files["features.onnx"] = tmp_path / "features.onnx"
        write(tmp_path / "bad", tiny.manifest, files)
        with pytest.raises(ParityError, match="'features' in fp16 turns its outputs") as caught:
            config = ExportConfig(halves=("fp16",))
            deploy(read(tmp_path / "bad"), tmp_path / "out", config, say=silent)
        assert "at least 0.999" in caught.value.message
        assert "float" in str(caught.value.fix)
        assert not (tmp_path / "out").exists()


class TestAPlan:
    def test_is_a_file_of_its_own_with_its_origin_noted(
        self, tiny: Bundle, tensorrt: Any, tmp_path: Path
    ) -> None:
        tensorrt()
        config = ExportConfig(plans=("float", "fp16", "int8"), plan=PlanConfig(workspace_mib=128))
        made = deploy(tiny, tmp_path / "out", config, say=silent)
        variants = made.manifest.graphs["features"].variants
        assert {"float-plan", "fp16", "fp16-plan", "int8-plan"} <= set(variants)
        for precision in config.plans:
            variant, source = PLANS[precision]
            # plain: any tool that reads plans reads this file
            assert made.path(variants[variant]).read_bytes() == b"plan"
            assert origin_of(made, "features", variant) == PlanOrigin(
                source=source,
                source_sha256=sha256_file(made.path(variants[source])),
                machine=HERE,
                config=config.plan,
            )
        assert plans.check_origin(made, "features", "int8-plan", HERE).source == "int8"

    def test_is_added_to_those_that_are_there(
        self, tiny: Bundle, tensorrt: Any, tmp_path: Path
    ) -> None:
        tensorrt()
        first = deploy(tiny, tmp_path / "a", ExportConfig(plans=("float",)), say=silent)
        # in place, as the rebuild command does it
        both = deploy(
            first, tmp_path / "a", ExportConfig(plans=("int8",)), exist_ok=True, say=silent
        )
        assert set(both.manifest.provenance["plans"]["features"]) == {"float-plan", "int8-plan"}
        assert both.manifest.provenance["made_by"] == tiny.manifest.provenance["made_by"]

    def test_gets_the_shapes_of_the_axes_that_are_named(
        self, tiny: Bundle, tensorrt: Any, tmp_path: Path
    ) -> None:
        fake = tensorrt()
        config = ExportConfig(
            plans=("float",), plan=PlanConfig(profiles=({"batch": (1, 1, 1)}, {"batch": (2, 4, 8)}))
        )
        deploy(tiny, tmp_path / "out", config, say=silent)
        sizes = [[shape[0] for shape in profile["images"]] for profile in fake.config.profiles]
        assert sizes == [[1, 1, 1], [2, 4, 8]]

    def test_keeps_timings_under_the_machines_name(
        self, tiny: Bundle, tensorrt: Any, tmp_path: Path
    ) -> None:
        tensorrt()
        config = ExportConfig(plans=("float",), timing_cache=tmp_path / "timings")
        deploy(tiny, tmp_path / "out", config, say=silent)
        assert [path.name for path in (tmp_path / "timings").iterdir()] == [
            "timing-11.4.0.106-NVIDIA_H200-9.0-13.0.cache"
        ]

    def test_reports_progress_under_its_name(
        self, tiny: Bundle, tensorrt: Any, tmp_path: Path
    ) -> None:
        tensorrt()
        seen: list[tuple[str, int, int]] = []
        lines: list[str] = []
        deploy(
            tiny,
            tmp_path / "out",
            ExportConfig(plans=("float",)),
            say=lines.append,
            progress=lambda *step: seen.append(step),
        )
        assert seen[-1] == ("features float-plan", 1000, 1000)
        (line,) = lines
        assert line.startswith("features float-plan: 7 layers, 4 bytes, ")

    def test_that_tensorrt_refuses_leaves_nothing_behind(
        self, tiny: Bundle, tensorrt: Any, tmp_path: Path
    ) -> None:
        tensorrt(parse_errors=[("Conv", "conv1", "no")])
        with pytest.raises(ExportError, match="Conv 'conv1': no"):
            deploy(tiny, tmp_path / "out", ExportConfig(plans=("float",)), say=silent)
        assert list(tmp_path.iterdir()) == []

    def test_needs_tensorrt(
        self, tiny: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "tensorrt" else find(name)
        )
        with pytest.raises(BackendError, match="'tensorrt' is not installed") as caught:
            deploy(tiny, tmp_path / "out", ExportConfig(plans=("float",)), say=silent)
        assert "pip install" in str(caught.value.fix)

    def test_of_int8_needs_int8_graphs(self, tensorrt: Any, tmp_path: Path) -> None:
        tensorrt()
        bundle = write_tiny_noising_bundle(tmp_path / "float")
        with pytest.raises(BundleError, match="no INT8 graphs") as caught:
            deploy(bundle, tmp_path / "out", ExportConfig(plans=("int8",)), say=silent)
        assert "--int8" in str(caught.value.fix)

    @pytest.mark.parametrize(
        "config", [ExportConfig(plans=("fp8",)), ExportConfig(halves=("float",))]
    )
    def test_of_an_unknown_precision_is_a_misuse(
        self, tiny: Bundle, tmp_path: Path, config: ExportConfig
    ) -> None:
        with pytest.raises(UsageError, match="there is no precision") as caught:
            deploy(tiny, tmp_path / "out", config, say=silent)
        assert "fp16" in str(caught.value.fix)


class TestAProfile:
    @staticmethod
    def entry(**inputs: tuple[int | str, ...]) -> GraphEntry:
        specs = {name: TensorSpec(dtype="float32", shape=shape) for name, shape in inputs.items()}
        return GraphEntry(inputs=specs, outputs={}, variants={})

    def test_is_the_usual_batches_where_nothing_is_said(self) -> None:
        entry = self.entry(images=("batch", 3, 8, 8), bank=(5, 4))
        assert profiles_of("g", entry, PlanConfig()) == [
            {"images": ShapeRange((1, 3, 8, 8), (8, 3, 8, 8), (32, 3, 8, 8))}
        ]

    def test_is_none_where_no_axis_is_free(self) -> None:
        assert profiles_of("g", self.entry(images=(1, 3, 8, 8)), PlanConfig()) == []

    def test_gives_an_axis_that_several_inputs_share_one_size(self) -> None:
        entry = self.entry(a=("batch", "k"), b=("k", 2))
        (profile,) = profiles_of("g", entry, PlanConfig(profiles=({"k": (1, 2, 3)},)))
        assert profile == {
            "a": ShapeRange((1, 1), (8, 2), (32, 3)),
            "b": ShapeRange((1, 2), (2, 2), (3, 2)),
        }

    def test_asks_for_every_axis_but_the_batch(self) -> None:
        entry = self.entry(planes=("batch", 3, "height", "width"))
        with pytest.raises(UsageError, match="no range for height, width of graph 'g'") as caught:
            profiles_of("g", entry, PlanConfig())
        assert "batch=MIN:OPT:MAX,height=MIN:OPT:MAX,width=MIN:OPT:MAX" in str(caught.value.fix)

    def test_of_an_axis_that_no_graph_has_is_refused(
        self, tiny: Bundle, tensorrt: Any, tmp_path: Path
    ) -> None:
        tensorrt()
        config = ExportConfig(plans=("float",), plan=PlanConfig(profiles=({"bach": (1, 2, 3)},)))
        with pytest.raises(UsageError, match="no graph has a free axis bach") as caught:
            deploy(tiny, tmp_path / "out", config, say=silent)
        assert caught.value.fix == "the free axes are batch"


@pytest.mark.trt_builder
@pytest.mark.parametrize(
    ("write_bundle", "sizes"),
    [
        (write_tiny_noising_bundle, ()),
        (write_tiny_paco_bundle, ({"batch": (1, 1, 1)}, {"batch": (2, 8, 16)})),
        (write_tiny_stripe_bundle, STRIPE_SIZES),
    ],
)
def test_a_builder_takes_every_graph_of_every_system_in_every_precision(
    write_bundle: Callable[..., Bundle], sizes: Any, tmp_path: Path
) -> None:
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("there is no TensorRT here")
    bundle = write_bundle(tmp_path / "onnx", int8=True)
    config = ExportConfig(plans=tuple(PLANS), plan=PlanConfig(profiles=sizes))
    made = deploy(bundle, tmp_path / "plans", config, say=silent)
    for name, graph in made.manifest.graphs.items():
        for variant, source in PLANS.values():
            assert made.path(graph.variants[variant]).stat().st_size > 10_000
            assert origin_of(made, name, variant).source == source
    trt_stub.forget()
