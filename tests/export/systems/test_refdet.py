"""``refdet`` from a run to a bundle and to its rival, with small random nets."""

from __future__ import annotations

import dataclasses
import re
import shutil
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from accelerate.state import AcceleratorState

from engineworks.calibration.observe import Observer
from engineworks.calibration.ranges import amax
from engineworks.export import passes, verdict
from engineworks.export.config import ExportConfig
from engineworks.export.legality import check_legal
from engineworks.export.parity import compare
from engineworks.export.pipeline import export
from engineworks.export.quantize import activations, quantizable, quantize, to_unsigned
from engineworks.export.systems import Source
from engineworks.export.systems.refdet import RECIPE
from engineworks.export.trace import compare_with_torch, to_onnx, trace
from engineworks.runtime import images
from engineworks.runtime.bundle import Bundle, read
from engineworks.runtime.engines import open_engine, products_overflow
from engineworks.runtime.errors import RunError
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.references import average, load_references
from engineworks.runtime.systems import open_engines
from engineworks.runtime.systems.refdet import System
from engineworks.runtime.systems.refdet.detecting import Params
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import write_scenes
from engineworks.training.config import load_config
from engineworks.training.run import Run, open_run
from engineworks.training.systems.refdet import eager
from engineworks.training.systems.refdet.config import DetectorConfig, EncoderConfig
from engineworks.training.systems.refdet.model import Detect, Encode, RefDet
from engineworks.training.train import train

pytestmark = pytest.mark.train

SETTINGS = [
    "preprocess.size=[64, 96]",
    "reference_preprocess.size=[32, 32]",
    "encoder.name=test_vit",
    "encoder.weights=none",
    "encoder.args={depth: 2}",  # blocks; tracing takes its time for every layer
    "detector.width=0.125",
    "detector.scales=[3, 4]",
    "detector.reg_max=4",
    "episodes.num=2",
    "episodes.objects=3",
    "num_candidates=40",
    "train.device=cpu",
    "train.epochs=1",
    "train.batch_size=2",
]


def make(folder: Path, data: Path, *overrides: str) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(load_config("refdet", None, [*SETTINGS, *overrides]), data, folder)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    """Torch's threads wait for each other by spinning: on a busy machine tiny tensors take ages."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes") / "data")


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make(tmp_path_factory.mktemp("runs") / "run", data, "base=true")


@pytest.fixture(scope="module")
def bundle(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return trace(run.root, tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="module")
def pictures(data: Path) -> list[Array]:
    return [images.read(path) for path in sorted((data / "images").glob("test_*"))]


def opened(bundle: Bundle) -> System:
    engines = open_engines(bundle, "ort", "float", threads=1)
    return System(bundle, engines, backend="ort", precision="float")


class TestTheBundle:
    def test_answers_as_torch_does_for_any_prompt(
        self, run: Run, bundle: Bundle, pictures: list[Array], rng: np.random.Generator
    ) -> None:
        assert read(bundle.root) == bundle
        net = eager.trained_net(run)
        engines = open_engines(bundle, "ort", "float", threads=1)
        widths = Params.model_validate(bundle.manifest.params, strict=False).widths
        assert widths == net.detector.widths
        everything = Detect(net, 10_000)  # of equal scores either may be among the candidates
        for num_frames, num_objects in ((1, 1), (3, 5)):
            frames = apply(bundle.manifest.preprocess, pictures[:num_frames])
            rows = [average(rng.normal(size=(1, sum(widths))), widths) for _ in range(num_objects)]
            feeds = {"images": frames, "prototypes": np.stack(rows)}
            found = engines["detect"].run(feeds)
            assert [found[name].shape for name in ("boxes", "scores", "classes")] == [
                (num_frames, 40, 4),
                (num_frames, 40),
                (num_frames, 40),
            ]
            with torch.no_grad():
                boxes, scores, classes = everything(*(torch.from_numpy(f) for f in feeds.values()))
            for b in range(num_frames):
                for box, score, kind in zip(
                    found["boxes"][b], found["scores"][b], found["classes"][b], strict=True
                ):
                    nearest = (boxes[b] - torch.from_numpy(box)).abs().amax(1)
                    nearest[classes[b] != kind] = torch.inf
                    # float32 sums in another order, at coordinates of up to 100 pixels
                    assert nearest.min() < 0.01
                    assert scores[b, nearest.argmin()].item() == pytest.approx(score, rel=1e-3)
                left_out = scores[b].sort(descending=True).values[40]
                assert found["scores"][b].min() > left_out * (1 - 1e-4)
        for engine in engines.values():
            engine.close()

    def test_encodes_as_torch_does(self, run: Run, bundle: Bundle, pictures: list[Array]) -> None:
        parity = bundle.manifest.reports["parity"]["torch-float"]
        assert set(parity["encode"]) == {"prototypes"}
        assert set(parity["detect"]) == {"boxes", "scores"}
        spec = Params.model_validate(bundle.manifest.params, strict=False).reference_preprocess
        batch = apply(spec, pictures)
        with torch.no_grad():
            want = Encode(eager.trained_net(run))(torch.from_numpy(batch)).numpy()
        with closing(open_engines(bundle, "ort", "float", threads=1)["encode"]) as engine:
            found = engine.run({"images": batch})["prototypes"]
        np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)  # of unit vectors

    def test_has_two_graphs_of_any_number_of_frames_pictures_and_objects(
        self, bundle: Bundle
    ) -> None:
        encode, detect = (bundle.manifest.graphs[name] for name in ("encode", "detect"))
        assert encode.inputs["images"].shape == ("batch", 3, 32, 32)
        assert encode.outputs["prototypes"].shape == ("batch", 32 + 64)
        assert detect.inputs["images"].shape == ("batch", 3, 64, 96)
        assert detect.inputs["prototypes"].shape == ("objects", 32 + 64)
        assert [(s.shape, s.dtype) for s in detect.outputs.values()] == [
            (("batch", 40, 4), "float32"),
            (("batch", 40), "float32"),
            (("batch", 40), "int64"),
        ]

    def test_leaves_to_float_what_adds_up_and_what_decides(self, bundle: Bundle) -> None:
        chosen: dict[str, list[str]] = {}
        for name in bundle.manifest.graphs:
            model = onnx.load(bundle.path(f"{name}.onnx"))
            weights = {tensor.name for tensor in model.graph.initializer}
            chosen[name] = quantizable(model, RECIPE.keep_float)
            nodes = [node for node in model.graph.node if node.name in chosen[name]]
            assert {node.op_type for node in nodes} <= {"Conv", "Gemm", "MatMul"}
            assert all(node.input[1] in weights for node in nodes)
        assert not [node for node in chosen["encode"] if "projections" in node]
        assert not [node for node in chosen["detect"] if "gates" in node]
        head = [node for node in chosen["detect"] if ".head." in node]
        assert head
        before_the_last = re.compile(r".*\.(body|embed\.\d\.0|classify\.\d\.0)\..*")
        assert [node for node in head if not before_the_last.fullmatch(node)] == []
        # every layer of the backbone, and four products per block of the transformer
        assert len([node for node in chosen["detect"] if ".backbone." in node]) >= 40
        assert len(chosen["encode"]) >= 4 * 2

    def test_holds_what_names_and_references_the_run_left(self, run: Run, bundle: Bundle) -> None:
        manifest = bundle.manifest
        assert manifest.labels == ("blue", "red", "yellow")
        assert set(load_references(bundle.asset("references"))) == {"blue", "red", "yellow"}
        assert set(manifest.gate) == {"map50", "map50_95"}
        assert manifest.thresholds == {}
        assert manifest.params["reference_preprocess"]["size"] == [32, 32]

    def test_judges_as_training_did(self, run: Run, bundle: Bundle, data: Path) -> None:
        """Without ``val`` a run is judged on ``test``, as a bundle is."""
        with closing(opened(bundle)) as system:
            found = system.evaluate(data).metrics

        want = run.info.results["test"]
        assert isinstance(want, dict)
        assert set(found) == set(want)
        # float32 kernels of two libraries, and an untrained net's many nearly equal scores
        assert found["map50"] == pytest.approx(want["map50"], abs=0.02)

    def test_of_a_run_without_its_references_is_refused(self, run: Run, tmp_path: Path) -> None:
        shutil.copytree(run.root, tmp_path / "run")
        (tmp_path / "run" / "labels.json").unlink()
        with pytest.raises(RunError, match=r"labels\.json cannot be read"):
            trace(tmp_path / "run", tmp_path / "bundle")


class TestInt8:
    def test_is_legal_and_close_to_float(
        self,
        bundle: Bundle,
        data: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        quick = dict.fromkeys(("int8_speedup", "int8_speedup_low", "int8_speedup_high"), 2.0)
        speed = {"ort": {"p50_ms": {}, "stable": True, **quick}}
        # timing compiles every graph once more; it is judged where `export` is tested
        monkeypatch.setattr(verdict, "_speed", lambda *_: speed)
        config = ExportConfig(
            int8=True, samples=data / "images", num_samples=8, method="minmax", threads=1
        )

        made = export(bundle, tmp_path / "int8", config, say=lambda _line: None)

        variants = {name: set(graph.variants) for name, graph in made.manifest.graphs.items()}
        assert variants["encode"] == {"float", "int8", "int8-u8"}
        # SiLU all over, and maps that are joined
        own = {"int8-openvino", "int8-ort"}
        assert variants["detect"] == {"float", "int8", "int8-u8"} | own
        for backend in made.manifest.reports["parity_int8"].values():
            assert backend["encode"]["prototypes"]["cosine"] > 0.995  # what INT8 is allowed

    @pytest.mark.data
    @pytest.mark.slow
    def test_of_a_trained_convolutional_encoder_keeps_the_prototypes(
        self, shared: Path, tmp_path: Path
    ) -> None:
        weights = "data/weights/mobilenetv2_100_imagenet_from_int8_samepad.safetensors"
        encoder = EncoderConfig(
            name="mobilenetv2_100", weights=str(shared / weights), args={"pad_type": "same"}
        )
        model = RefDet(encoder, DetectorConfig(), 0).eval()
        half = (0.5, 0.5, 0.5)  # how this net was trained
        spec = PreprocessSpec(size=(224, 224), resize="crop", mean=half, std=half)
        paths = sorted((shared / "data/flower17/test").rglob("*.jpg"))
        step = len(paths) // 40
        batches = [
            apply(spec, [images.read(path) for path in paths[i :: 5 * step][:8]])
            for i in range(0, 5 * step, step)
        ]
        example = (torch.from_numpy(batches[0]),)
        source = Source(
            Encode(model).eval(),
            ("images",),
            ("prototypes",),
            (example,),
            {},  # no axis is free
        )
        graph = passes.prepare(to_onnx(source))
        onnx.save(graph, tmp_path / "encode.onnx")
        observer = Observer(
            tmp_path / "encode.onnx", activations(graph, RECIPE.keep_float), threads=1
        )
        for batch in batches[:-1]:
            observer.observe({"images": batch})
        ranges = {name: amax(each, "mse") for name, each in observer.histograms.items()}
        means = {name: each.mean.ravel() for name, each in observer.means.items()}
        int8 = quantize(graph, ranges, RECIPE.keep_float, means=means)
        check_legal(int8)

        answers = []
        for each in (graph, to_unsigned(int8)):
            content = each.SerializeToString()
            with closing(open_engine(content, "ort", precision="int8", threads=1)) as engine:
                answers.append(engine.run({"images": batches[-1]}))
        want, got = answers
        # what INT8 is allowed; steps of weights of 7 bits are twice as large, and 1 - cosine goes
        # with the square of the error
        allowed = 0.02 if products_overflow("ort") else 0.005
        assert compare(got, want)["prototypes"].cosine > 1 - allowed


def test_an_encoder_with_patches_of_14_pixels_answers_as_torch_does(tmp_path: Path) -> None:
    """As it comes, it is made for another size of pictures, and deeper."""
    encoder = EncoderConfig(name="vit_small_patch14_dinov2", weights="none", args={"depth": 2})
    model = RefDet(encoder, DetectorConfig(scales=(4, 5)), 0, reference_size=(56, 84)).eval()
    pictures = torch.randn(3, 3, 56, 84, generator=torch.Generator().manual_seed(0))
    examples = ((pictures[:2],), (pictures,))
    free = {"images": {0: "batch"}}
    source = Source(Encode(model).eval(), ("images",), ("prototypes",), examples, free)
    onnx.save(passes.prepare(to_onnx(source)), tmp_path / "encode.onnx")

    found = compare_with_torch(source, tmp_path / "encode.onnx", tolerance=1e-3)

    assert model.encoder.net.net.has_token
    assert found["prototypes"].cosine > 1 - 1e-6  # float32 sums in another order


class TestTheRival:
    def test_gives_the_answers_of_the_bundle(
        self,
        run: Run,
        bundle: Bundle,
        pictures: list[Array],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("shutil.which", lambda _name: None)
        params = bundle.manifest.params | {"inference": {"conf": 0.0}}  # an untrained net is unsure
        manifest = bundle.manifest.model_copy(update={"params": params})
        generous = dataclasses.replace(bundle, manifest=manifest)
        batch = apply(manifest.preprocess, pictures)
        with closing(opened(generous)) as system:
            want = system.engines["detect"].run(system.feeds(batch)["detect"])["scores"]
            results = system.infer(pictures)

        found = eager.contenders(run.root, generous, threads=1, say=lambda _line: None)

        assert [(c.name, c.precision) for c in found] == [
            ("eager channels_last", "float"),
            ("eager channels_last", "bf16"),
        ]
        # float32 in another order; bfloat16 has 8 bits
        for contender, tolerance in zip(found, (1e-3, 0.2), strict=True):
            boxes, scores, classes = contender.network(batch)
            assert boxes.shape == (len(pictures), 40, 4)
            assert int(classes.max()) < len(system.names())
            # in this order they are comparable: of equal scores either may be a candidate
            np.testing.assert_allclose(np.sort(scores.numpy()), np.sort(want), rtol=tolerance)
            for got, result in zip(contender.path(pictures), results, strict=True):
                best, expected = got.objects[0], result.objects[0]
                assert best.score == pytest.approx(expected.score, rel=tolerance)
                assert best.name in system.names()

    def test_of_another_systems_run_is_refused(
        self, run: Run, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(eager, "open_run", lambda _root: Run(run.root, None, run.info))
        with pytest.raises(RunError, match="the bundle is of 'refdet'"):
            eager.contenders(run.root, bundle, threads=1, say=lambda _line: None)


def test_the_nets_are_loaded_however_they_were_trained(run: Run) -> None:
    opened_run = open_run(run.root)
    faster = {"compile": True, "checkpointing": True}
    changed = opened_run.config.model_copy(
        update={
            "encoder": opened_run.config.encoder.model_copy(update=faster),
            "detector": opened_run.config.detector.model_copy(update=faster),
        }
    )

    net = eager.trained_net(Run(opened_run.root, changed, opened_run.info))

    assert not net.training
    assert not [m for m in net.modules() if m._compiled_call_impl is not None]
    assert not [m for m in net.modules() if getattr(m, "checkpointing", False)]
    saved = eager.read_weights(opened_run.weights())
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, saved[f"net.{name}"])
