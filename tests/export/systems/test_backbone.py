"""``backbone`` from timm to a bundle, with small random nets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import timm
import torch
from safetensors.torch import load_file

from engineworks.export.quantize import quantizable
from engineworks.export.systems import TRANSFORMER
from engineworks.export.systems.backbone import trace_backbone
from engineworks.runtime.bundle import Bundle, read
from engineworks.runtime.errors import ConfigError
from engineworks.runtime.preprocess import apply
from engineworks.runtime.systems import open_system
from engineworks.runtime.testing import draw_flower, write_flowers
from engineworks.training.config import BackboneConfig
from tests.command import cli

pytestmark = pytest.mark.train

VIT = BackboneConfig(name="test_vit", weights="none")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return trace_backbone(VIT, tmp_path_factory.mktemp("vit") / "bundle", size=(64, 48))


def test_a_whole_transformer_gives_token_and_map_of_an_oblong_picture(vit: Bundle) -> None:
    graph = vit.manifest.graphs["features"]
    assert graph.inputs["images"].shape == ("batch", 3, 64, 48)
    assert graph.outputs["token"].shape == ("batch", 64)
    assert graph.outputs["map"].shape == ("batch", 64, 4, 3)
    ops = {node.op_type for node in onnx.load(vit.path("features.onnx")).graph.node}
    assert not ops & {"If", "Resize"}  # nothing hangs on the size, which is fixed


def test_the_graph_is_the_net_that_timm_makes(vit: Bundle) -> None:
    net = timm.create_model("test_vit", num_classes=0, img_size=(64, 48)).eval()
    net.load_state_dict(load_file(vit.asset("weights")), strict=False)
    # ``LastMap`` keeps the net below ``model.``
    tensors = {k.removeprefix("model."): v for k, v in load_file(vit.asset("weights")).items()}
    net.load_state_dict(tensors, strict=False)
    picture = draw_flower(np.random.default_rng(0), (64, 48), "red")
    x = apply(vit.manifest.preprocess, [picture])
    with torch.no_grad():
        tokens = net.forward_features(torch.from_numpy(x)).double().numpy()[0]
    parts = [tokens[0], tokens[1:].mean(axis=0)]
    want = np.concatenate([part / np.linalg.norm(part) for part in parts]) / np.sqrt(2)
    system = open_system(vit, backend="ort")
    (found,) = system.infer([picture])
    system.close()
    # float32 of two libraries, in a vector of length 1
    np.testing.assert_allclose(found.vector_F, want, atol=1e-5)  # type: ignore[attr-defined]


def test_a_transformers_residual_stream_stays_float(vit: Bundle) -> None:
    model = onnx.load(vit.path("features.onnx"))
    kept = vit.manifest.graphs["features"].keep_float
    assert kept == TRANSFORMER.model_dump(mode="json")
    nodes = {node.name: node.op_type for node in model.graph.node}
    chosen = {nodes[name] for name in quantizable(model, TRANSFORMER)}
    assert chosen <= {"Conv", "MatMul", "Gemm"}
    assert "Add" in {nodes[name] for name in quantizable(model)}


def test_a_convolutional_net_may_be_quantized_whole(tmp_path: Path) -> None:
    config = BackboneConfig(name="resnet10t", weights="none", stages=(1, 3))
    made = trace_backbone(config, tmp_path / "bundle", size=(64, 64))
    graph = made.manifest.graphs["features"]
    assert [graph.outputs[name].shape[2] for name in ("stage1", "stage3")] == [16, 4]
    assert not any(graph.keep_float.values())
    assert made.manifest.params == {
        "name": "resnet10t",
        "stages": [1, 3],
        "args": {},
        "norm": False,
    }
    assert made.manifest.provenance["backbone"]["weights"] == "random, seed 0"


def test_blocks_behind_the_last_norm_are_in_the_bundle(tmp_path: Path) -> None:
    config = BackboneConfig(name="test_vit3", weights="none", stages=(2, 5), norm=True)
    made = trace_backbone(config, tmp_path / "bundle", size=(32, 48))
    assert made.manifest.params["norm"]
    shapes = {name: spec.shape for name, spec in made.manifest.graphs["features"].outputs.items()}
    assert shapes == {"stage2": ("batch", 96, 2, 3), "stage5": ("batch", 96, 2, 3)}


def test_a_net_that_timm_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no net 'resnet18x'"):
        trace_backbone(BackboneConfig(name="resnet18x"), tmp_path / "bundle")


class TestTheCommand:
    def test_makes_an_int8_bundle_with_a_gate_on_who_is_alike(self, tmp_path: Path) -> None:
        data = write_flowers(tmp_path / "data", num_test=2)
        done = cli(
            *("export", "backbone:resnet10t", "--weights", "none", "--stages", "1,2"),
            *("--size", "64,64", "--args", "{act_layer: relu}", "--out", tmp_path / "bundle"),
            *("--int8", "--samples", data / "train", "--num-samples", 4, "--method", "minmax"),
            *("--eval", data, "--seconds", 0.1),
        )
        assert done.code == 0, done.err
        manifest = read(tmp_path / "bundle").manifest
        assert set(manifest.graphs["features"].variants) == {"float", "int8", "int8-u8"}
        assert manifest.params["args"] == {"act_layer": "relu"}
        assert set(manifest.reports["gate"]["drop"]) == {"top1"}
        json.dumps(manifest.reports, allow_nan=False)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["backbone:resnet18", "--size", "64"], "cannot be read"),
            (["backbone:resnet18", "--stages", "two"], "cannot be read"),
            (["backbone:resnet18", "--stages", "3,2"], "stages must ascend"),
            (["somewhere", "--stages", "2"], "--stages is for backbone:NAME alone"),
        ],
    )
    def test_refuses_what_it_cannot_mean(
        self, arguments: list[str], message: str, tmp_path: Path
    ) -> None:
        done = cli("export", *arguments, "--out", tmp_path / "bundle")
        assert done.code == 2
        assert message in done.err

    def test_sends_who_wants_to_train_one_there(self, tmp_path: Path) -> None:
        for verb in (["train", "backbone", "--data", tmp_path], ["sample", "backbone"]):
            done = cli(*verb, "--out", tmp_path / "out")
            assert done.code == 2
            assert "cli.py export backbone:NAME" in done.err
