"""Training on pictures in tiles."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate.state import AcceleratorState

from engineworks.export.trace import trace
from engineworks.runtime import images
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.datasets import MvtecSample
from engineworks.runtime.errors import ConfigError
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.systems import open_system
from engineworks.runtime.systems.noising.tiles import Tiles
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import write_parts
from engineworks.training.config import load_config
from engineworks.training.systems.noising.config import CopiesConfig
from engineworks.training.systems.noising.data import Images
from engineworks.training.systems.noising.eager import contenders
from engineworks.training.train import train

pytestmark = pytest.mark.train


def config(*overrides: str) -> Any:
    small = ["backbone.name=resnet10t", "backbone.stages=[1, 2]", "backbone.weights=none"]
    size = [
        "preprocess.size=[64, 64]",
        "stride=4",
        "width=40",
        "train.device=cpu",
        "train.batch_size=5",
    ]
    return load_config("noising", None, [*small, *size, "fit.max_rows=150", *overrides])


def test_a_run_in_tiles_judges_pictures_at_their_own_size(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    data = write_parts(tmp_path / "data", size=(80, 120), num_train=3, num_good=2, num_defective=2)
    copies = "copies={num: 1, brightness: 0.1}"
    run = train(config("tiles={overlap: 16}", copies), data, tmp_path / "run")
    report: Any = run.info.results["fit"]
    # 2 x 3 tiles of 16 x 16 patches, of 3 pictures and as many copies
    assert (report["num_images"], report["num_patches"]) == (3, 6 * 6 * 256)
    bundle = trace(run.root, tmp_path / "bundle")
    with closing(open_system(bundle, backend="ort", threads=1)) as system:
        judged = system.evaluate(data)
    ablation: Any = run.info.results["ablation"]
    for name in ("image_auroc", "pixel_auroc"):
        # float32 sums in another order
        assert judged.metrics[name] == pytest.approx(ablation["shipped"][name], abs=1e-3)
    # the eager rival says the same
    (eager, *_) = contenders(run.root, bundle, threads=1, say=lambda _: None)
    picture = images.read(data / "test/scratch/000.png")
    (rival,), (result,) = eager.path([picture]), _infer(bundle, picture)
    assert rival.score == pytest.approx(result.score, rel=1e-3)
    assert rival.map_HW.shape == result.map_HW.shape == (80, 120)
    # it mirrors tiles beyond their borders in another way
    assert np.abs(rival.map_HW - result.map_HW).mean() < 0.05


def _infer(bundle: Bundle, picture: Array) -> Any:
    with closing(open_system(bundle, backend="ort", threads=1)) as system:
        return system.infer([picture])


class TestImagesInTiles:
    def test_are_counted_by_picture_and_copy(self, tmp_path: Path) -> None:
        samples = []
        for i, (height, width) in enumerate([(20, 20), (40, 33)]):
            rng = np.random.default_rng(i)
            image = rng.integers(0, 256, (height, width, 3), np.uint8)
            images.write(tmp_path / f"{i}.png", image)
            samples.append(MvtecSample(tmp_path / f"{i}.png", 0, "good", None))
        spec = PreprocessSpec(size=(32, 32), mean=(0.0,) * 3, std=(1 / 255,) * 3)
        source = Images(samples, spec, CopiesConfig(num=1, brightness=0.5), Tiles(overlap=8))
        assert source.pictures_I.tolist() == [0, 0] + [1] * 8
        assert source.copies_I.tolist() == [False, True] + [False] * 4 + [True] * 4
        assert list(source.tiles_of(1)) == [2, 3, 4, 5]
        got = source.get(5, np.random.default_rng(0))["images"].numpy()
        want = images.read(samples[1].path)[8:, 1:].transpose(2, 0, 1)
        np.testing.assert_allclose(got, want, atol=1e-3)


@pytest.mark.parametrize(
    "wrong", ["tiles={overlap: 65}", "judge=discriminator", "fit.foreground=true"]
)
def test_tiles_that_fit_nothing_else_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match="tiles"):
        config("tiles={overlap: 16}", wrong)
