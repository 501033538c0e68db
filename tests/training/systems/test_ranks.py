"""Every system by two processes becomes what it becomes by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engineworks.runtime.testing import write_flowers, write_parts, write_scenes, write_strips
from tests.training.fleet import together, train_system

pytestmark = pytest.mark.train

NET = ("backbone.name=test_resnet", "backbone.weights=none", "preprocess.size=[32, 32]")
PATCHES = (*NET, "backbone.stages=[1, 2]")
# Adam makes steps of what rounding leaves where a norm follows a bias
SGD = ("train.optimizer.name=sgd", "train.optimizer.lr=1e-2", "train.device=cpu", "train.epochs=2")
MATCH = ("encoder.name=test_resnet", "encoder.weights=none", "encoder.stages=[1, 2]")


@dataclass(frozen=True)
class Case:
    """What is trained, and how far the weights may be apart: float32 of sums in another order."""

    system: str
    data: Callable[[Path], Path]
    settings: tuple[str, ...]
    file: str | None = None


CASES = {
    # 12 pictures in batches of 5: the last has two
    "paco": Case(
        "paco",
        write_flowers,
        (
            *NET,
            "train.batch_size=5",
            "parts.width=8",
            "parts.refresh=2",
            "loss.metric=class",
            "loss.saliency=0.1",
            "loss.warmup_epochs=0",
        ),
    ),
    "paco, frozen": Case("paco", write_flowers, (*NET, "train.batch_size=5", "frozen=true")),
    "stripe": Case(
        "stripe",
        write_strips,
        ("network.width=8", "network.depth=2", "tiles.size=32", "tiles.jitter=4"),
    ),
    "refdet": Case(
        "refdet",
        write_scenes,
        (
            "preprocess.size=[64, 96]",
            "reference_preprocess.size=[32, 32]",
            "episodes.objects=3",
            "detector.width=0.125",
            # of one step: what is to learn which box turns on the last bit
            "episodes.num=1",
            "train.epochs=1",
            "train.batch_size=3",
            "loss.proposals=1000",
            "stages=[{name: all, weights: {prototype: 1.0, supervised: 1.0, proposals: 1.0}}]",
        ),
        "small",
    ),
    "refdet, relation": Case(
        "refdet",
        write_scenes,
        (
            *MATCH,
            "preprocess.size=[64, 96]",
            "reference_preprocess.size=[64, 64]",
            "match.relation.kept_back=0.0",
            "match.relation.dropout=0.0",
            "train.batch_size=16",
        ),
        "learn",
    ),
}


def both(case: Case, tmp_path: Path) -> tuple[Any, Path, Path]:
    """Results of two processes, and the folders of the runs of one and of two."""
    data = case.data(tmp_path / "data")
    one, two = tmp_path / "one", tmp_path / "two"
    told = (case.system, case.file, [*SGD, *case.settings], data)
    train_system(*told, one)
    results, _ = together(train_system, *told, two)
    return results, one, two


@pytest.mark.parametrize("name", CASES)
def test_learns_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    _, *runs = both(case, tmp_path)
    want, got = (load_file(run / "weights" / "last.safetensors") for run in runs)
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4, msg=key)


def test_a_bank_is_the_same_bit_for_bit(tmp_path: Path) -> None:
    # 8 pictures in batches of 3: the last one is taken by both
    case = Case("noising", write_parts, (*PATCHES, "train.batch_size=3"))
    _, one, two = both(case, tmp_path)
    for name in ("bank.faiss", "params.json", "thresholds.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@pytest.mark.parametrize("augment", ["null", "{rotation: 90}"])
def test_a_discriminator_learns_of_the_same_pictures(augment: str, tmp_path: Path) -> None:
    # of pictures that are changed all patches are taken: which, would be drawn at random
    patches = 31 if augment == "null" else 8 * 64
    discriminator = {"steps": 5, "patches": patches, "rows": 64, "augment": augment}
    settings = [f"discriminator.{name}={value}" for name, value in discriminator.items()]
    case = Case("noising", write_parts, (*PATCHES, "judge=discriminator", *settings))
    results, one, two = both(case, tmp_path)
    want, got = (load_file(run / "weights" / "last.safetensors") for run in (one, two))
    assert torch.equal(want["discriminator.mean_D"], got["discriminator.mean_D"])
    assert results["fit"]["bank_rows_of_proposal"] == 64
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-4, msg=key)
    assert not (two / "features.float32").exists()
