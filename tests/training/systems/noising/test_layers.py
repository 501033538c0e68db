"""One cosine bank per block of a transformer, from drawn pictures to an INT8 bundle."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file
from torch import nn

from engineworks.export.config import ExportConfig
from engineworks.export.legality import check_legal
from engineworks.export.pipeline import export
from engineworks.export.systems.noising import RECIPE, graphs
from engineworks.export.trace import trace
from engineworks.runtime import datasets, images
from engineworks.runtime.bank import Bank
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.errors import BundleError, ConfigError
from engineworks.runtime.preprocess import apply
from engineworks.runtime.systems import open_system
from engineworks.runtime.systems.noising.extend import extend
from engineworks.runtime.tensors import Array
from engineworks.training.config import SystemConfig, load_config
from engineworks.training.run import Run
from engineworks.training.systems.noising.eager import contenders
from engineworks.training.systems.noising.sample import sample
from engineworks.training.train import train
from tests.runtime.systems.test_noising_layers import published

pytestmark = pytest.mark.train

BLOCKS = (2, 5)
GRID = (4, 4)


def config(weights: str, *overrides: str) -> SystemConfig:
    return load_config(
        "noising",
        Path("rad"),
        [
            "backbone.name=test_vit3",  # one register token before the patches
            f"backbone.stages={list(BLOCKS)}",
            f"backbone.weights={weights}",
            "preprocess.size=[64, 64]",
            "train.device=cpu",
            "fit.max_rows=48",
            *overrides,
        ],
    )


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "data"
    sample(folder, size=64, num_train=6, num_test=6)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the whole net, with norms, biases and scales as training leaves them."""
    torch.manual_seed(0)
    net: nn.Module = timm.create_model("test_vit3")
    for parameter in net.parameters():
        if parameter.std() == 0:
            nn.init.uniform_(parameter, 0.5, 1.5)
    file = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_file(net.state_dict(), file)
    return file


@pytest.fixture(scope="module")
def run(drawn: Path, weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    AcceleratorState._reset_state(reset_partial_state=True)
    settings = config(str(weights), "fit.foreground=true")
    return train(settings, drawn, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def bundle(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return trace(run.root, tmp_path_factory.mktemp("traced") / "bundle")


def blocks_of(weights: Path, image_3HW: Array) -> Array:
    """(N, D) features of a picture straight from timm, of any length."""
    net = timm.create_model(
        "test_vit3", pretrained=True, pretrained_cfg_overlay={"file": str(weights)}
    ).eval()
    net.set_input_size(img_size=image_3HW.shape[1:])
    with torch.no_grad():
        maps = net.forward_intermediates(
            torch.from_numpy(image_3HW)[None],
            indices=list(BLOCKS),
            norm=True,
            intermediates_only=True,
        )
    return torch.cat([m[0].flatten(1).T for m in maps], 1).numpy()


def test_the_map_is_the_published_one(run: Run, drawn: Path, weights: Path, tmp_path: Path) -> None:
    """Bank, window, mean of the layers and of the top patches, without the foreground."""
    settings = config(str(weights), "fit.smoothing=0", "fit.top=0.2")
    made = trace(train(settings, drawn, tmp_path / "run").root, tmp_path / "bundle")
    params = made.manifest.params
    assert params["layers"] == {"widths": [96, 96], "window": 1}
    # three rows for each place
    bank_IND = Bank.load(made.asset("bank")).rows_MD.reshape(16, 3, 192).swapaxes(0, 1)
    unit = params["signals"]["distance"]
    for item in datasets.mvtec(drawn, "test")[:2]:
        picture = images.read(item.path)
        features_ND = blocks_of(weights, apply(made.manifest.preprocess, [picture])[0])
        raw_N = published(features_ND, bank_IND, GRID, 1, (96, 96))
        want_N = (raw_N - unit["mean"]) / unit["std"] / params["score_std"]
        system: Any = open_system(made, backend="ort", precision="float")
        with closing(system):
            (result,) = system.infer([picture])
            feeds = {"images": apply(system.spec, [picture])}
            (answer_ND,) = system.engines["features"].run(feeds)["features"]
            ((got_N, _),) = system.judge.scores(answer_ND[None])
        # raw scores to 1e-5, in the unit of the bundle
        tolerance = 1e-5 / (unit["std"] * params["score_std"])
        assert result.score == pytest.approx(np.sort(want_N)[-3:].mean(), abs=tolerance)
        np.testing.assert_allclose(got_N, want_N, atol=tolerance)


def test_only_roots_are_compared_by_a_wider_tolerance(run: Run, tmp_path: Path) -> None:
    """The root of a rounding error beside zero is large; nothing else of the features is."""
    assert graphs(run.root)["features"].tolerance is None
    shutil.copytree(run.root, tmp_path / "run")
    text = (tmp_path / "run/config.yaml").read_text()
    text = text.replace("scale: unit", "scale: roots").replace("layers: true", "layers: false")
    (tmp_path / "run/config.yaml").write_text(text.replace("window: 1", "window: null"))
    assert graphs(tmp_path / "run")["features"].tolerance == pytest.approx(RECIPE.tolerance**0.5)


class TestTheBundle:
    def test_holds_what_tells_part_from_ground(self, run: Run, bundle: Bundle) -> None:
        direction_D = np.load(bundle.asset("foreground"))
        assert direction_D.shape == (192,)
        assert isinstance(bundle.manifest.params["foreground"], float)
        assert set(run.info.results["ablation"]) == {"distance", "shipped"}  # type: ignore[arg-type]

    def test_is_answered_alike_by_eager_torch(self, run: Run, bundle: Bundle, drawn: Path) -> None:
        rows = contenders(run.root, bundle, threads=1, say=lambda _: None)
        pictures = [images.read(item.path) for item in datasets.mvtec(drawn, "test")[:3]]
        with closing(open_system(bundle, backend="ort", precision="float")) as system:
            want: Any = system.infer(pictures)
        got: Any = rows[0].path(pictures)
        for eager, result in zip(got, want, strict=True):
            # float32 sums in another order
            assert eager.score == pytest.approx(result.score, rel=1e-3, abs=1e-3)
            inner = np.s_[16:-16, 16:-16]  # at the border the two reflect in different ways
            difference = np.abs(eager.map_HW[inner] - result.map_HW[inner])
            assert difference.max() < 5e-3 * np.abs(result.map_HW).max()
            assert eager.influence_HW is result.influence_HW is None

    def test_takes_int8_in_every_linear_layer(
        self, bundle: Bundle, drawn: Path, tmp_path: Path
    ) -> None:
        chosen = ExportConfig(
            int8=True,
            samples=drawn / "train/good",
            num_samples=4,
            method="minmax",
            threads=1,
            seconds=0.1,
        )
        made = export(bundle, tmp_path / "int8", chosen, say=lambda _: None)
        model = onnx.load(made.path("features.int8.onnx"))
        check_legal(model)
        readers = [
            node.op_type
            for node in model.graph.node
            if any(name.endswith(".weight.dequantized") for name in node.input)
        ]
        # four in each of six blocks, and the patches
        assert sorted(readers) == ["Conv"] + ["MatMul"] * 24
        quantized = {n.input[0] for n in model.graph.node if n.op_type == "QuantizeLinear"}
        kinds = {
            n.op_type
            for n in model.graph.node
            if set(n.input) & {f"{q}.dequantized" for q in quantized}
        }
        assert kinds == {"Conv", "MatMul"}  # norms, softmax, rotation and residuals stay float
        for backend in made.manifest.reports["parity_int8"].values():
            assert backend["features"]["features"]["cosine"] > 0.999

    def test_is_not_extended_where_a_window_searches(
        self, bundle: Bundle, drawn: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(BundleError, match="as many rows for each place"):
            extend(bundle, drawn / "train/good", tmp_path / "more", max_rows=5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("scale=roots",), "compares by cosines"),
        (("width=40",), "width must be null"),
        (("fit.layers=false",), "a window is for one bank per layer"),
        (
            ("fit.weights={distance: 1.0, influence: 1.0, concentration: 0.0, response: 0.0}",),
            "only the distance",
        ),
        (("judge=discriminator",), "for judge=bank"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config("none", *overrides)
