from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from engineworks.export.confidence import confident
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.systems.paco import Params
from engineworks.runtime.testing import (
    write_flowers,
    write_tiny_backbone_bundle,
    write_tiny_paco_bundle,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_paco_bundle(tmp_path_factory.mktemp("paco") / "bundle", int8=True)


@pytest.fixture(scope="module")
def flowers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flowers")
    data = write_flowers(folder / "data", num_train=1, num_test=2)
    write_flowers(folder / "more", num_train=0, num_test=4, seed=7)
    shutil.move(folder / "more" / "test", data / "val")
    return data


def test_each_precision_gets_its_own(tiny: Bundle, flowers: Path) -> None:
    made = confident(tiny, flowers, threads=1)

    known = made.params(Params).confidence
    assert set(known) == {"float", "int8"}
    assert known["float"].temperature != known["int8"].temperature
    assert {each.num_pictures for each in known.values()} == {24}
    assert set(made.manifest.thresholds) == {"unknown-float", "unknown-int8"}
    assert made.root == tiny.root and made.manifest.files == tiny.manifest.files


def test_what_training_fitted_stays_and_int8_is_fitted_anew(tiny: Bundle, flowers: Path) -> None:
    before = confident(tiny, flowers, threads=1)
    (flowers / "val" / "red" / "000.png").rename(flowers / "red.png")
    try:
        after = confident(before, flowers, threads=1)
        without = confident(before, None, threads=1)
    finally:
        (flowers / "red.png").rename(flowers / "val" / "red" / "000.png")

    old, new = (made.params(Params).confidence for made in (before, after))
    assert new["float"] == old["float"]
    assert (old["int8"].num_pictures, new["int8"].num_pictures) == (24, 23)
    assert without.params(Params).confidence == {"float": old["float"]}
    assert set(without.manifest.thresholds) == {"unknown-float"}


def test_a_system_that_learns_nothing_of_the_kind_is_left_alone(
    flowers: Path, tmp_path: Path
) -> None:
    bundle = write_tiny_backbone_bundle(tmp_path / "bundle", int8=True)
    assert confident(bundle, flowers, threads=1) is bundle
