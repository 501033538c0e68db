from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from engineworks.calibration.table import load
from engineworks.export import int8, verdict
from engineworks.export.config import ExportConfig
from engineworks.export.int8 import OWN
from engineworks.export.legality import check_legal
from engineworks.export.pipeline import export as build
from engineworks.export.quantize import activations, quantizable, quantize, to_unsigned
from engineworks.runtime.bench import Timing, Turn
from engineworks.runtime.bundle import Bundle, read, write
from engineworks.runtime.engines import BACKENDS
from engineworks.runtime.errors import (
    BundleError,
    CalibrationError,
    DatasetError,
    GateError,
    UsageError,
)
from engineworks.runtime.evaluation import Evaluation
from engineworks.runtime.systems import open_system
from engineworks.runtime.testing import write_parts, write_tiny_noising_bundle
from engineworks.runtime.usual import Usual
from engineworks.runtime.verdict import describe

SIZE = (64, 64)
SECONDS = 7.0
MILLISECONDS = {"float": 4.0, "bf16": 3.0, "int8": 1.0, "int8-bf16": 0.9}


def timing(ms: float) -> Timing:
    return Timing(tuple(Turn((ms,) * 5, foreign_cores=0.0) for _ in range(5)))


@pytest.fixture(autouse=True, scope="module")
def ran() -> Iterator[list[str]]:
    """Every contender runs once and gets a fixed time; tests do not depend on the machine."""
    names: list[str] = []

    def interleave(
        contenders: Mapping[str, Callable[[], object]], *, max_seconds: float
    ) -> dict[str, Timing]:
        assert max_seconds == SECONDS
        for name, call in contenders.items():
            call()
            names.append(name)
        return {name: timing(MILLISECONDS[name]) for name in contenders}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verdict.bench, "interleave", interleave)
        yield names


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"), size=SIZE)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("tiny") / "bundle", size=SIZE)


def spoilt_by_one_node() -> onnx.ModelProto:
    """A graph whose second convolution cannot be quantized.

    One channel that it reads is a large constant: with one scale for all channels, the others,
    which carry everything, become zero. Its own weights ignore that channel.
    """
    rng = np.random.default_rng(0)
    first = rng.normal(0, 0.2, (12, 3, 4, 4))
    first[0] = 0
    bias = np.zeros(12)
    bias[0] = 3000
    second = rng.normal(0, 0.3, (16, 12, 1, 1))
    second[:, 0] = 0
    third = rng.normal(0, 0.3, (16, 16, 1, 1))
    constants: dict[str, Any] = {
        "w1": first.astype(np.float32),
        "b1": bias.astype(np.float32),
        "w2": second.astype(np.float32),
        "w3": third.astype(np.float32),
        "shape": np.array([0, 16, -1], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Conv", ["images", "w1", "b1"], ["c1"], "first", kernel_shape=[4, 4], strides=[4, 4]),
        node("Relu", ["c1"], ["r1"], "relu1"),
        node("Conv", ["r1", "w2"], ["c2"], "spoilt", kernel_shape=[1, 1]),
        node("Relu", ["c2"], ["r2"], "relu2"),
        node("Conv", ["r2", "w3"], ["c3"], "third", kernel_shape=[1, 1]),
        node("AveragePool", ["c3"], ["p"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        node("Reshape", ["p", "shape"], ["f"], "flatten"),
        node("Transpose", ["f"], ["features"], "transpose", perm=[0, 2, 1]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "spoilt",
        [value("images", TensorProto.FLOAT, ["batch", 3, *SIZE])],
        [value("features", TensorProto.FLOAT, ["batch", 64, 16])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opset = helper.make_opsetid("", 18)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=9)
    return onnx.shape_inference.infer_shapes(model, strict_mode=True)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("spoilt") / "bundle"
    return write_tiny_noising_bundle(folder, size=SIZE, graph=spoilt_by_one_node())


def config(parts: Path, **changes: Any) -> ExportConfig:
    options = {
        "int8": True,
        "samples": parts / "train",
        "num_samples": 6,
        "evaluation": parts,
        "threads": 1,
        "seconds": SECONDS,
    }
    return ExportConfig(**{**options, **changes})


def silent(_line: str) -> None:
    pass


def judged_as(monkeypatch: pytest.MonkeyPatch, auroc: Callable[[Bundle, str, str], float]) -> None:
    """Makes the image AUROC of a bundle by backend and precision what a test wants."""

    def evaluate(bundle: Bundle, backend: str, precision: str, *_: object, **__: object) -> object:
        return Evaluation({"image_auroc": auroc(bundle, backend, precision)})

    monkeypatch.setattr("engineworks.export.gate.evaluate", evaluate)


@dataclass(frozen=True)
class Built:
    bundle: Bundle
    said: list[str]
    ran: list[str]


@pytest.fixture(scope="module")
def once(
    floats: Bundle, parts: Path, ran: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Built:
    said: list[str] = []
    before = len(ran)
    bundle = build(floats, tmp_path_factory.mktemp("once") / "out", config(parts), say=said.append)
    return Built(bundle, said, ran[before:])


class TestABuild:
    @pytest.fixture
    def built(self, once: Built) -> Bundle:
        return once.bundle

    def test_writes_a_bundle_that_passes_its_own_checks(self, built: Bundle) -> None:
        assert read(built.root) == built
        assert set(built.manifest.graphs["features"].variants) == {"float", "int8", "int8-u8"}

    def test_keeps_the_float_graph_the_bank_and_the_thresholds(
        self, built: Bundle, floats: Bundle
    ) -> None:
        for name, entry in floats.manifest.files.items():
            assert built.manifest.files[name] == entry
        assert built.manifest.thresholds == floats.manifest.thresholds
        assert built.manifest.params == floats.manifest.params

    def test_writes_int8_graphs_that_are_legal_and_quantized(self, built: Bundle) -> None:
        variants = built.manifest.graphs["features"].variants
        canonical = onnx.load(built.path(variants["int8"]))

        check_legal(canonical)
        expected = len(activations(onnx.load(built.path(variants["float"]))))
        pairs = [node for node in canonical.graph.node if node.op_type == "QuantizeLinear"]
        assert len(pairs) == expected > 0

    @pytest.mark.parametrize("backend", ["ort", "openvino"])
    def test_opens_in_int8_and_still_tells_good_from_bad(
        self, built: Bundle, parts: Path, backend: str
    ) -> None:
        system = open_system(built, backend=backend, precision="int8", threads=1)
        assert system.evaluate(parts).metrics["image_auroc"] == 1.0
        system.close()

    def test_ships_its_calibration_table_bound_to_graph_and_samples(
        self, built: Bundle, parts: Path
    ) -> None:
        table = load(built.asset("calibration"))
        names = [f"good/{path.name}" for path in (parts / "train" / "good").iterdir()]

        assert table.graphs["features"].sha256 == built.manifest.files["features.onnx"].sha256
        assert len(table.samples) == 6
        assert set(table.samples) <= set(names)

    def test_reports_everything_that_it_measured(self, built: Bundle) -> None:
        reports = built.manifest.reports

        assert reports["calibration"]["num_samples"] == 6
        assert len(reports["calibration"]["output_error"]) == 5
        usual = Usual.in_reports(reports)
        assert usual is not None and usual.num == 6
        assert 0 < usual.brightness[0] <= usual.brightness[-1] < 255
        assert usual.score is not None and usual.score[0] < usual.score[-1]
        assert set(reports["parity_int8"]) == set(reports["speed"]) == {"openvino", "ort"}
        parity = reports["parity_int8"]["ort"]["features"]["features"]
        # INT8 steps of 1/127 of the range: the mean vector stays within a few degrees
        assert parity["cosine"] > 0.99
        assert reports["gate"]["passed"]
        assert reports["gate"]["float"]["image_auroc"] == 1.0
        assert reports["speed"]["ort"]["int8_speedup"] == 4.0
        assert reports["verdict"]["ship"] == "int8"
        assert "sensitivity" not in reports
        json.dumps(reports, allow_nan=False)

    def test_says_its_steps_and_its_verdict(self, once: Built) -> None:
        lines = describe(once.bundle.manifest.reports["verdict"])

        assert once.said[0].startswith("calibrating on 6 images")
        assert once.said[-len(lines) :] == lines

    def test_runs_every_precision_before_it_states_its_speed(self, once: Built) -> None:
        assert once.ran == [*MILLISECONDS, "float", "int8"]

    def test_is_what_auto_precision_opens(self, built: Bundle) -> None:
        system = open_system(built, threads=1)
        assert system.precision == "int8"
        assert system.backend == built.manifest.reports["verdict"]["backend"]
        system.close()


class TestABuildOfABundleThatHasInt8:
    def test_replaces_stale_graphs_tables_and_reports(
        self, floats: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        once = build(
            floats, tmp_path / "a", config(parts, method="minmax", sensitivity=True), say=silent
        )
        stale = read(once.root).manifest.model_copy(
            update={
                "graphs": {
                    "features": once.manifest.graphs["features"].model_copy(
                        update={
                            "variants": {
                                **once.manifest.graphs["features"].variants,
                                "int8-plan": "old.plan",
                            }
                        }
                    )
                }
            }
        )
        (tmp_path / "old.plan").write_bytes(b"a plan of the old graph")
        files = {name: once.path(name) for name in once.manifest.files}
        before = write(tmp_path / "b", stale, {**files, "old.plan": tmp_path / "old.plan"})

        after = build(
            before, tmp_path / "b", config(parts, num_samples=3), exist_ok=True, say=silent
        )

        assert "old.plan" not in after.manifest.files
        assert set(after.manifest.graphs["features"].variants) == {"float", "int8", "int8-u8"}
        assert len(load(after.asset("calibration")).samples) == 3
        assert "sensitivity" in before.manifest.reports
        assert "sensitivity" not in after.manifest.reports
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_keeps_reports_of_other_stages(
        self, floats: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        parity = {"torch-float": {"features": {"features": {"max_rel": 1e-6}}}}
        manifest = floats.manifest.model_copy(update={"reports": {"parity": parity}})
        files = {name: floats.path(name) for name in floats.manifest.files}
        traced = write(tmp_path / "traced", manifest, files)

        built = build(traced, tmp_path / "built", config(parts, method="minmax"), say=silent)

        assert built.manifest.reports["parity"] == parity

    def test_gives_the_same_graphs_again(self, floats: Bundle, parts: Path, tmp_path: Path) -> None:
        first = build(floats, tmp_path / "a", config(parts, method="mse"), say=silent)
        second = build(first, tmp_path / "b", config(parts, method="mse"), say=silent)

        assert second.manifest.files == first.manifest.files


class TestTheGate:
    def test_fails_a_graph_that_int8_spoils_and_ships_float(
        self, spoilt: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        built = build(spoilt, tmp_path / "out", config(parts, method="minmax"), say=silent)

        gate = built.manifest.reports["gate"]
        assert not gate["passed"]
        assert gate["drop"]["pixel_auroc"] == pytest.approx(
            gate["float"]["pixel_auroc"] - gate["int8"]["pixel_auroc"]
        )
        assert "pixel_auroc" in gate["failed"]
        assert built.manifest.reports["verdict"]["ship"] == "float"
        system = open_system(built, threads=1)
        assert system.precision == "float"
        system.close()

    def test_raises_after_writing_where_a_drop_shall_fail(
        self, spoilt: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(
            GateError, match=r"lost more than allowed: .*pixel_auroc by 0\."
        ) as error:
            build(
                spoilt,
                tmp_path / "out",
                config(parts, method="minmax", fail_on_drop=True),
                say=silent,
            )

        assert "--sensitivity" in str(error.value.fix)
        assert read(tmp_path / "out").manifest.reports["verdict"]["ship"] == "float"

    def test_puts_the_worst_node_back_to_float_until_it_passes(
        self, spoilt: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        said: list[str] = []
        options = config(parts, method="minmax", sensitivity=True, fail_on_drop=True)

        built = build(spoilt, tmp_path / "out", options, say=said.append)

        reports = built.manifest.reports
        assert reports["sensitivity"]["features"][0]["node"] == "spoilt"
        assert len(reports["sensitivity"]["features"]) == 3
        assert reports["kept_float"] == {"features": ["spoilt"]}
        assert reports["gate"]["passed"]
        assert "gate failed: back to float: spoilt" in said
        graph = onnx.load(built.path(built.manifest.graphs["features"].variants["int8"])).graph
        assert {n.name: list(n.input) for n in graph.node}["spoilt"] == ["r1", "w2"]

    def test_measures_nodes_but_relaxes_none_while_it_passes(
        self, floats: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        options = config(parts, method="minmax", sensitivity=True)
        built = build(floats, tmp_path / "out", options, say=silent)

        names = quantizable(onnx.load(built.path("features.onnx")))
        assert {c["node"] for c in built.manifest.reports["sensitivity"]["features"]} == set(names)
        assert built.manifest.reports["kept_float"] == {}

    def test_leaves_alone_what_the_recipe_keeps_float(
        self, spoilt: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        entry = spoilt.manifest.graphs["features"]
        rule = {"op_types": [], "patterns": ["spo.*"], "nodes": []}
        manifest = spoilt.manifest.model_copy(
            update={"graphs": {"features": entry.model_copy(update={"keep_float": rule})}}
        )
        files = {name: spoilt.path(name) for name in spoilt.manifest.files}
        ruled = write(tmp_path / "ruled", manifest, files)

        built = build(ruled, tmp_path / "out", config(parts, method="minmax"), say=silent)

        assert built.manifest.reports["gate"]["passed"]
        assert built.manifest.graphs["features"].keep_float == rule

    def test_holds_for_every_backend_that_runs_graphs_of_its_own(
        self, floats: Bundle, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own = dataclasses.replace(
            BACKENDS["ort"], variants={**BACKENDS["ort"].variants, "int8": ("int8",)}
        )
        monkeypatch.setitem(BACKENDS, "ort", own)
        found = {("openvino", "float"): 0.9, ("openvino", "int8"): 0.9, ("ort", "int8"): 0.8}
        judged_as(monkeypatch, lambda _, backend, precision: found[backend, precision])
        said: list[str] = []

        built = build(floats, tmp_path / "out", config(parts, method="minmax"), say=said.append)

        gate = built.manifest.reports["gate"]
        assert (gate["backend"], gate["drop"]) == ("openvino", {"image_auroc": 0})
        assert gate["others"]["ort"]["int8"] == {"image_auroc": 0.8}
        assert gate["failed"] == {"image_auroc": pytest.approx(0.1)} and not gate["passed"]
        lines = {line.split(":")[0] for line in said if line.startswith("gate image")}
        assert lines == {"gate image_auroc", "gate image_auroc on ort"}

    @pytest.mark.parametrize("owner", ["openvino", "ort"])
    def test_leaves_out_what_one_backend_alone_runs_and_drops_too_much(
        self,
        floats: Bundle,
        parts: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        owner: str,
    ) -> None:
        own = f"int8-{owner}"
        monkeypatch.setitem(
            OWN, own, lambda *arguments, **named: to_unsigned(quantize(*arguments, **named))
        )

        def auroc(bundle: Bundle, backend: str, precision: str) -> float:
            spoilt = own in bundle.manifest.graphs["features"].variants and backend == owner
            return 0.8 if spoilt and precision == "int8" else 0.9

        judged_as(monkeypatch, auroc)

        built = build(floats, tmp_path / "out", config(parts, method="minmax"), say=silent)

        variants = set(built.manifest.graphs["features"].variants)
        assert variants == {"float", "int8", "int8-u8"}
        gate = built.manifest.reports["gate"]
        assert gate["passed"] and gate["others"] == {}

    def test_keeps_them_where_the_shared_graph_fails_as_well(
        self, floats: Bundle, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(
            OWN, "int8-ort", lambda *arguments, **named: to_unsigned(quantize(*arguments, **named))
        )
        judged_as(
            monkeypatch, lambda _, _backend, precision: {"float": 0.9, "int8": 0.8}[precision]
        )

        built = build(floats, tmp_path / "out", config(parts, method="minmax"), say=silent)

        assert "int8-ort" in built.manifest.graphs["features"].variants
        assert not built.manifest.reports["gate"]["passed"]

    def test_that_is_not_measured_ships_float_unless_somebody_says_so(
        self, floats: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        for unjudged in (False, True):
            options = config(parts, method="minmax", evaluation=None, unjudged=unjudged)
            built = build(floats, tmp_path / str(unjudged), options, say=silent)

            assert built.manifest.reports["gate"] == {}
            verdict = built.manifest.reports["verdict"]
            assert verdict["unjudged"]
            assert verdict["ship"] == ("int8" if unjudged else "float")
            assert ("--eval DIR" in verdict["reasons"][-1]) != unjudged

    def test_says_what_each_precision_decides_and_warns_of_the_one_that_ships(
        self, floats: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        """With a border that nothing reaches, all metrics are perfect and all defects pass."""
        files = {name: floats.path(name) for name in floats.manifest.files}
        far = {**floats.manifest.thresholds}
        far["image"] = far["image"].model_copy(update={"value": 1e6})
        blind = write(
            tmp_path / "blind", floats.manifest.model_copy(update={"thresholds": far}), files
        )

        built = build(blind, tmp_path / "out", config(parts, method="minmax"), say=silent)

        gate = built.manifest.reports["gate"]
        assert gate["passed"] and gate["num_pictures"] == 8
        low, high = gate["interval"]["pixel_auroc"]
        assert low <= gate["drop"]["pixel_auroc"] <= high
        for precision in ("float", "int8"):
            shipped, best = gate["decisions"][precision]
            misses = shipped["rates"]["misses"]
            assert misses["count"] == misses["of"] == 4
            assert best["rates"]["misses"]["count"] == 0
        told = f"passes {4} of {4} labelled defects at its border"
        assert built.manifest.reports["verdict"]["warnings"] == [told]

    def test_names_metrics_that_the_labels_do_not_give(
        self, floats: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        unmasked = write_parts(tmp_path / "unmasked", size=SIZE)
        for mask in (unmasked / "ground_truth" / "scratch").iterdir():
            mask.unlink()
        said: list[str] = []

        options = config(parts, method="minmax", evaluation=unmasked)
        built = build(floats, tmp_path / "out", options, say=said.append)

        assert f"gate: {unmasked} does not give pixel_auroc" in said
        assert set(built.manifest.reports["gate"]["drop"]) == {"image_auroc"}
        reasons = built.manifest.reports["verdict"]["reasons"]
        assert reasons[-1] == "not judged, the data do not give it: pixel_auroc"

        strict = dataclasses.replace(options, fail_on_drop=True)
        with pytest.raises(GateError, match="could not judge pixel_auroc"):
            build(floats, tmp_path / "strict", strict, say=silent)
        assert read(tmp_path / "strict").manifest.reports["gate"]["not_judged"] == ["pixel_auroc"]

    def test_does_not_pass_where_nothing_was_measured(
        self, floats: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        normal = write_parts(tmp_path / "normal", size=SIZE, num_defective=0)

        with pytest.raises(DatasetError, match="none of the metrics that the gate needs"):
            build(
                floats,
                tmp_path / "out",
                config(parts, method="minmax", evaluation=normal),
                say=silent,
            )
        assert not (tmp_path / "out").exists()


class TestRanges:
    def test_of_auto_are_those_of_the_smallest_output_error(
        self, floats: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        options = config(parts, evaluation=None)
        report = build(floats, tmp_path / "out", options, say=silent).manifest.reports

        errors = report["calibration"]["output_error"]
        best = min(errors, key=errors.__getitem__)
        assert best.split()[0] == report["calibration"]["method"]
        assert set(errors) == {"minmax", "percentile 99.99", "percentile 99.999", "entropy", "mse"}

    @pytest.mark.parametrize("method", ["minmax", "percentile", "entropy", "mse"])
    def test_of_a_method_that_was_asked_for_are_taken_without_trying_others(
        self, floats: Bundle, parts: Path, tmp_path: Path, method: str
    ) -> None:
        options = config(parts, evaluation=None, method=method, percentile=99.5)
        report = build(floats, tmp_path / "out", options, say=silent).manifest.reports

        assert report["calibration"]["method"] == method
        assert report["calibration"]["percentile"] == (99.5 if method == "percentile" else None)
        assert report["calibration"]["output_error"] == {}


class TestWhatCannotBeBuilt:
    def refused(
        self, floats: Bundle, out: Path, options: ExportConfig, error: type[Exception], match: str
    ) -> None:
        with pytest.raises(error, match=match):
            build(floats, out, options, say=silent)
        assert not out.exists()

    def test_without_samples(self, floats: Bundle, parts: Path, tmp_path: Path) -> None:
        options = config(parts, samples=None)
        self.refused(floats, tmp_path / "out", options, UsageError, "needs sample images")

    def test_from_an_empty_folder(self, floats: Bundle, parts: Path, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        options = config(parts, samples=tmp_path / "empty")
        self.refused(floats, tmp_path / "out", options, DatasetError, "no images in")

    def test_from_fewer_samples_than_asked_for(
        self, floats: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        options = config(parts, num_samples=9)
        self.refused(floats, tmp_path / "out", options, DatasetError, "8 images, 9 were asked for")

    def test_by_an_unknown_method(self, floats: Bundle, parts: Path, tmp_path: Path) -> None:
        options = config(parts, method="magic")
        self.refused(floats, tmp_path / "out", options, UsageError, "magic")

    def test_with_a_drop_that_shall_fail_but_is_not_measured(
        self, floats: Bundle, parts: Path, tmp_path: Path
    ) -> None:
        options = config(parts, evaluation=None, fail_on_drop=True)
        self.refused(floats, tmp_path / "out", options, UsageError, "without labelled data")

    def test_unjudged_with_what_judges(self, floats: Bundle, parts: Path, tmp_path: Path) -> None:
        options = config(parts, unjudged=True)
        self.refused(floats, tmp_path / "out", options, UsageError, "--unjudged does not")

    def test_over_a_bundle_is_refused_before_any_work(
        self, floats: Bundle, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def worked(*_args: object, **_options: object) -> None:
            pytest.fail("work was done before the destination was checked")

        monkeypatch.setattr(int8.calibration, "measure", worked)
        with pytest.raises(BundleError, match="already exists") as error:
            build(floats, floats.root, config(parts), say=silent)
        assert "--exist-ok" in str(error.value.fix)

    def test_from_a_graph_that_gives_nan(self, floats: Bundle, parts: Path, tmp_path: Path) -> None:
        model = onnx.load(floats.path("features.onnx"))
        weight = next(t for t in model.graph.initializer if t.name == "conv1.weight")
        values = numpy_helper.to_array(weight).copy()
        values[0, 0, 0, 0] = np.nan
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
        onnx.save(model, tmp_path / "features.onnx")
        files = {name: floats.path(name) for name in floats.manifest.files}
        files["features.onnx"] = tmp_path / "features.onnx"
        broken = write(tmp_path / "broken", floats.manifest, files)

        options = config(parts)
        self.refused(broken, tmp_path / "out", options, CalibrationError, "NaN or infinity")
