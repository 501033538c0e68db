"""Calibration and its table on a drawn bundle, with a system that is small and honest."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest

from engineworks.calibration import calibrate as stage
from engineworks.calibration import table as tables
from engineworks.calibration.calibrate import calibrate, measure
from engineworks.calibration.ranges import METHODS
from engineworks.calibration.samples import Sample, choose
from engineworks.runtime import images
from engineworks.runtime.bundle import Bundle, GraphEntry, Manifest, write
from engineworks.runtime.engines import Engine
from engineworks.runtime.engines.ort import OrtEngine
from engineworks.runtime.errors import CalibrationError, UsageError
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.sources import PICTURES
from engineworks.runtime.testing import write_scenes, write_tiny_refdet_bundle

GRAPH = """<ir_version: 9, opset_import: ["" : 18]>
g (float[batch, 3, 64, 64] image) => (float[batch, 3, 64, 64] features)
<float three = {3.0}> { tripled = Mul(image, three)  features = Relu(tripled) }"""
TENSORS = {"features": ["image", "tripled"]}


class FakeSystem:
    """Preprocesses and runs one graph, as a deployed system does."""

    reader = PICTURES

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]) -> None:
        self.bundle, self.engines = bundle, engines
        self.closed = False

    def infer(self, pictures: Sequence[np.ndarray]) -> list[None]:
        spec = self.bundle.manifest.preprocess
        self.engines["features"].run({"image": apply(spec, pictures)})
        return [None] * len(pictures)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def systems(monkeypatch: pytest.MonkeyPatch) -> list[FakeSystem]:
    """Puts the fake in the place of a system; lists those that were opened."""
    opened: list[FakeSystem] = []

    def open_fake(bundle: Bundle, *, engines: Mapping[str, Engine], **options: Any) -> FakeSystem:
        assert options == {"backend": "ort", "precision": "float", "threads": options["threads"]}
        opened.append(FakeSystem(bundle, engines))
        return opened[-1]

    monkeypatch.setattr(stage, "open_system", open_fake)
    return opened


MakeBundle = Callable[..., Bundle]


@pytest.fixture
def make_bundle(tmp_path: Path) -> MakeBundle:
    def make(name: str = "bundle", graph: str = GRAPH, mean: float = 0.5) -> Bundle:
        path = tmp_path / f"{name}.onnx"
        onnx.save(onnx.parser.parse_model(graph), path)
        engine = OrtEngine(path, threads=1)
        entry = GraphEntry(
            inputs=dict(engine.inputs),
            outputs=dict(engine.outputs),
            variants={"float": "features.onnx"},
        )
        spec = PreprocessSpec(size=(64, 64), mean=(mean,) * 3, std=(0.25,) * 3)
        manifest = Manifest(system="noising", graphs={"features": entry}, preprocess=spec)
        return write(tmp_path / name, manifest, {"features.onnx": path})

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """64 pictures of 96 x 96, each of one grey level."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(64):
        cv2.imwrite(str(folder / f"{i:02}.png"), np.full((96, 96, 3), 4 * i, np.uint8))
    return folder


@pytest.fixture
def samples(folder: Path) -> list[Sample]:
    return choose(folder, 6)


class TestCalibrate:
    def test_measures_what_the_deployed_system_feeds_its_graph(
        self, make_bundle: MakeBundle, samples: list[Sample], systems: list[FakeSystem]
    ) -> None:
        bundle = make_bundle()
        fed = apply(bundle.manifest.preprocess, [images.read(s.path) for s in samples])

        table = calibrate(bundle, samples, TENSORS, threads=1)

        found = table.graphs["features"].tensors
        assert found["image"].amax == np.abs(fed).max()
        means = table.means("features")["image"]
        # float64 sums of the same float32 values in another order
        np.testing.assert_allclose(means, fed.mean(axis=(0, 2, 3), dtype=np.float64), rtol=1e-9)
        assert (found["tripled"].min, found["tripled"].max) == (3 * fed.min(), 3 * fed.max())
        assert systems[0].closed

    def test_derives_every_methods_table_from_one_pass(
        self, make_bundle: MakeBundle, samples: list[Sample], systems: list[FakeSystem]
    ) -> None:
        histograms = measure(make_bundle(), samples, TENSORS, threads=1)

        found = {method: histograms.table(method).amax("features") for method in METHODS}

        assert len(systems) == 1
        assert all(0 < found[m]["image"] <= found["minmax"]["image"] for m in METHODS)

    def test_tells_its_progress(
        self, make_bundle: MakeBundle, samples: list[Sample], systems: list[FakeSystem]
    ) -> None:
        told: list[tuple[int, int]] = []

        measure(make_bundle(), samples, TENSORS, progress=lambda *now: told.append(now))

        assert told == [(4, 6), (6, 6)]

    def test_needs_no_more_memory_for_more_images(
        self, make_bundle: MakeBundle, folder: Path, systems: list[FakeSystem]
    ) -> None:
        bundle = make_bundle()
        peaks = []
        measure(bundle, choose(folder, 4), TENSORS, threads=1)  # caches and imports settle
        for num in (8, 64):
            chosen = choose(folder, num)
            tracemalloc.start()
            measure(bundle, chosen, TENSORS, threads=1)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()

        # one batch of activations is 0.8 MB; holding 64 images' would be 16 times that
        assert peaks[1] < 1.1 * peaks[0]

    def test_refuses_to_run_without_samples(
        self, make_bundle: MakeBundle, systems: list[FakeSystem]
    ) -> None:
        with pytest.raises(CalibrationError, match="no samples"):
            calibrate(make_bundle(), [], TENSORS)

    def test_refuses_a_graph_that_the_bundle_does_not_have(
        self, make_bundle: MakeBundle, samples: list[Sample], systems: list[FakeSystem]
    ) -> None:
        with pytest.raises(CalibrationError, match=r"no graphs \['classify'\]"):
            calibrate(make_bundle(), samples, {"classify": ["x"]})

    def test_refuses_an_unknown_method_before_it_measures(
        self, make_bundle: MakeBundle, samples: list[Sample], systems: list[FakeSystem]
    ) -> None:
        with pytest.raises(UsageError, match="'median'"):
            calibrate(make_bundle(), samples, TENSORS, method="median")

        assert systems == []

    def test_says_so_when_the_system_never_runs_a_graph(
        self,
        make_bundle: MakeBundle,
        samples: list[Sample],
        systems: list[FakeSystem],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(FakeSystem, "infer", lambda self, pictures: [None] * len(pictures))

        with pytest.raises(CalibrationError, match="no image through graph 'features'"):
            calibrate(make_bundle(), samples, TENSORS)

    def test_closes_the_system_when_a_tensor_is_not_finite(
        self, make_bundle: MakeBundle, samples: list[Sample], systems: list[FakeSystem]
    ) -> None:
        bundle = make_bundle(graph=GRAPH.replace("Mul(image, three)", "Log(image)"))

        with pytest.raises(CalibrationError, match="'tripled' of the float graph"):
            calibrate(bundle, samples, TENSORS)

        assert systems[0].closed


class TestTheTable:
    @pytest.fixture
    def table(
        self, make_bundle: MakeBundle, samples: list[Sample], systems: list[FakeSystem]
    ) -> tables.Table:
        return calibrate(make_bundle(), samples, TENSORS, method="percentile", percentile=99.0)

    @pytest.fixture
    def bundle(self, table: tables.Table, tmp_path: Path) -> Bundle:
        from engineworks.runtime.bundle import read

        return read(tmp_path / "bundle")

    def test_comes_back_from_its_file_as_it_was(self, table: tables.Table, tmp_path: Path) -> None:
        table.save(tmp_path / "table.json")

        assert tables.load(tmp_path / "table.json") == table

    def test_fits_what_it_was_measured_with(
        self, table: tables.Table, bundle: Bundle, samples: list[Sample]
    ) -> None:
        table.check(bundle, samples, method="percentile", percentile=99.0)

    def test_is_stale_for_another_graph(
        self, table: tables.Table, make_bundle: MakeBundle, samples: list[Sample]
    ) -> None:
        other = make_bundle("other", graph=GRAPH.replace("3.0", "2.0"))

        with pytest.raises(CalibrationError, match="stale: graph 'features' is another file\n"):
            table.check(other, samples, method="percentile", percentile=99.0)

    def test_is_stale_for_another_preprocessing(
        self, table: tables.Table, make_bundle: MakeBundle, samples: list[Sample]
    ) -> None:
        other = make_bundle("other", mean=0.4)

        with pytest.raises(CalibrationError, match="stale: the preprocess spec is another one\n"):
            table.check(other, samples, method="percentile", percentile=99.0)

    def test_is_stale_for_other_samples(
        self, table: tables.Table, bundle: Bundle, samples: list[Sample], folder: Path
    ) -> None:
        samples[2].path.write_bytes(b"changed")
        changed = choose(folder, 6)

        with pytest.raises(CalibrationError, match=f"differ in 1 files .{samples[2].name}"):
            table.check(bundle, changed, method="percentile", percentile=99.0)

    def test_is_stale_for_another_method_or_percentile(
        self, table: tables.Table, bundle: Bundle, samples: list[Sample]
    ) -> None:
        with pytest.raises(CalibrationError, match="was percentile, now it is minmax\n"):
            table.check(bundle, samples, method="minmax")
        with pytest.raises(CalibrationError, match=r"was 99\.0, now it is 99\.9\n"):
            table.check(bundle, samples, method="percentile", percentile=99.9)

    def test_names_all_that_differs_at_once(
        self, table: tables.Table, make_bundle: MakeBundle, folder: Path
    ) -> None:
        other = make_bundle("other", graph=GRAPH.replace("3.0", "2.0"), mean=0.4)

        with pytest.raises(CalibrationError) as caught:
            table.check(other, choose(folder, 7), method="mse")

        for word in ("graph 'features'", "preprocess", "samples", "method"):
            assert word in caught.value.message

    def test_has_no_ranges_for_a_graph_that_was_not_measured(self, table: tables.Table) -> None:
        with pytest.raises(CalibrationError, match="no graph 'segment'"):
            table.amax("segment")

    @pytest.mark.parametrize(
        ("change", "where"),
        [
            ({"schema_version": 2}, "schema_version"),
            ({"format": "else"}, "format"),
            ({"extra": 1}, "extra"),
            ({"method": None}, "method"),
            ({"preprocess": "short"}, "preprocess"),
            (
                {"graphs": {"g": {"sha256": "0" * 64, "tensors": {"t": {"amax": 0.0}}}}},
                "graphs.g.tensors.t.amax",
            ),
        ],
    )
    def test_that_is_not_of_this_schema_is_refused_with_the_place(
        self, table: tables.Table, tmp_path: Path, change: dict[str, Any], where: str
    ) -> None:
        path = tmp_path / "table.json"
        path.write_text(json.dumps(table.model_dump(mode="json") | change))

        with pytest.raises(CalibrationError, match=f"this version: {where}: "):
            tables.load(path)

    def test_that_is_missing_or_no_json_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CalibrationError, match="no calibration table"):
            tables.load(tmp_path / "table.json")
        (tmp_path / "table.json").write_bytes(b'{"half": ')
        with pytest.raises(CalibrationError, match="this version: the file: Invalid JSON"):
            tables.load(tmp_path / "table.json")


def test_a_system_of_two_graphs_shows_both_its_own_references_and_the_samples(
    tmp_path: Path,
) -> None:
    """Nobody asks for an object here: those that the bundle brings are encoded, two pictures each.

    The system is the real one.
    """
    bundle = write_tiny_refdet_bundle(tmp_path / "bundle", names=("red", "blue", "white"))
    scenes = write_scenes(tmp_path / "scenes", num_test=2, num_train=4)
    samples = choose(scenes / "images", 6)
    tensors = {"encode": ["images", "pool.out"], "detect": ["images", "prototypes"]}

    found = measure(bundle, samples, tensors, threads=1)

    counts = {
        graph: {name: histogram.num_values for name, histogram in histograms.items()}
        for graph, histograms in found.graphs.items()
    }
    assert counts["encode"] == {"images": 6 * 3 * 32 * 32, "pool.out": 6 * 3}
    # six samples in two batches, each with the three prototypes
    assert counts["detect"] == {"images": 6 * 3 * 64 * 96, "prototypes": 2 * 3 * 6}
    assert found.table("minmax").graphs.keys() == {"encode", "detect"}
