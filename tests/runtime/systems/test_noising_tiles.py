"""Pictures of any size in tiles: geometry, the system, its memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engineworks.runtime import images
from engineworks.runtime.bundle import Bundle, write
from engineworks.runtime.engines import open_engine
from engineworks.runtime.errors import BundleError, InputError
from engineworks.runtime.preprocess import apply
from engineworks.runtime.systems import open_system
from engineworks.runtime.systems.noising.extend import extend
from engineworks.runtime.systems.noising.fit import FitConfig, fit
from engineworks.runtime.systems.noising.tiles import Layout, Tiles
from engineworks.runtime.testing import draw_part, write_parts, write_tiny_noising_bundle

TILE, OVERLAP = 64, 16


def tiled(bundle: Bundle, out: Path, **params: Any) -> Bundle:
    """A bundle that covers pictures by tiles, and is the given one in all else."""
    manifest = bundle.manifest
    changed = {**manifest.params, "tiles": {"overlap": OVERLAP}, **params}
    content = {name: bundle.path(name) for name in manifest.files}
    return write(out, manifest.model_copy(update={"params": changed}), content)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("whole") / "bundle")


@pytest.fixture(scope="module")
def bundle(whole: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiled(whole, tmp_path_factory.mktemp("tiled") / "bundle")


@pytest.fixture
def system(bundle: Bundle) -> Iterator[Any]:
    with closing(open_system(bundle, backend="ort", threads=1)) as opened:
        yield opened


def picture(height: int, width: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


class TestALayout:
    @given(
        height=st.integers(1, 90),
        width=st.integers(1, 90),
        tile=st.tuples(st.integers(8, 32), st.integers(8, 32)),
        overlap=st.integers(0, 4),
    )
    def test_covers_any_picture_and_leads_back_to_it(
        self, height: int, width: int, tile: tuple[int, int], overlap: int
    ) -> None:
        image = picture(height, width)
        layout = Layout.of((height, width), tile, Tiles(overlap=overlap))
        pieces = layout.cut(image)
        assert len(pieces) == len(layout)
        assert all(piece.shape == (*tile, 3) for piece in pieces)
        for starts, side in ((layout.rows, tile[0]), (layout.columns, tile[1])):
            assert all(step <= side - overlap for step in np.diff(starts))
        back = layout.stitch(piece[..., 1] for piece in pieces)
        assert np.array_equal(back, image[..., 1])

    def test_mirrors_what_is_smaller_than_a_tile(self) -> None:
        image = picture(5, 6)
        (piece,) = Layout.of((5, 6), (8, 8), Tiles(overlap=2)).cut(image)
        want = np.pad(image, ((0, 3), (0, 2), (0, 0)), "reflect")
        assert np.array_equal(piece, want)

    def test_of_more_than_half_a_tile_is_refused(self) -> None:
        with pytest.raises(InputError, match="cannot overlap by 40"):
            Tiles(overlap=40).check((64, 96))


class TestFittingTiles:
    def test_a_picture_scores_as_its_highest_tile(self) -> None:
        rng = np.random.default_rng(0)
        features = rng.standard_normal((12, 4, 3)).astype(np.float32)
        features[7] += 9  # the second tile of the third picture of four
        pictures = np.repeat(np.arange(4), 3)
        config = FitConfig(coreset_ratio=1.0, image_score="patch", rule="rank", false_reject=0.3)
        fitted = fit(features, (2, 2), (8, 8), config, seed=0, pictures_I=pictures)
        held_out = fitted.thresholds["image"].held_out
        assert held_out is not None and held_out.count == 4
        assert next(iter(fitted.outstanding)) == 2

    def test_one_picture_is_held_out_tile_by_tile(self) -> None:
        features = np.random.default_rng(0).standard_normal((9, 4, 3)).astype(np.float32)
        one = np.zeros(9, int)
        config = FitConfig(coreset_ratio=1.0, image_score="patch")
        fitted = fit(features, (2, 2), (8, 8), config, seed=0, pictures_I=one)
        each = fit(features, (2, 2), (8, 8), config, seed=0)
        scores = each.thresholds["image"].held_out
        assert scores is not None
        assert fitted.thresholds["image"].value == pytest.approx(scores.quantiles[-1], rel=1e-5)


class TestTheSystem:
    def test_says_of_a_picture_what_its_tiles_say(self, system: Any, whole: Bundle) -> None:
        image = draw_part(np.random.default_rng(3), (150, 200), defective=True)[0]
        (got,) = system.infer([image])
        layout = Layout.of((150, 200), (TILE, TILE), Tiles(overlap=OVERLAP))
        with closing(open_system(whole, backend="ort", threads=1)) as plain:
            parts: Any = plain.infer(layout.cut(image))
        # float32 sums of batches of other sizes
        assert got.score == pytest.approx(max(part.score for part in parts), rel=1e-4)
        want = layout.stitch(part.map_HW for part in parts)
        assert got.map_HW.shape == got.influence_HW.shape == (150, 200)
        np.testing.assert_allclose(got.map_HW, want, atol=1e-3)

    @pytest.mark.parametrize("size", [(10, 300), (64, 64), (63, 65), (1, 1)])
    def test_takes_any_size_and_draws_it(self, system: Any, size: tuple[int, int]) -> None:
        image = picture(*size)
        (got,) = system.infer([image])
        assert got.map_HW.shape == size
        assert system.draw(image, got).dtype == np.uint8

    def test_judges_pixels_at_the_pictures_own_size(self, system: Any, tmp_path: Path) -> None:
        data = write_parts(tmp_path, size=(100, 130), num_good=2, num_defective=2)
        judged = system.evaluate(data)
        assert judged.metrics["pixel_auroc"] > 0.5

    def test_refuses_what_is_no_picture(self, system: Any) -> None:
        with pytest.raises(InputError, match="uint8"):
            system.infer([np.zeros((80, 80), np.uint8)])

    def test_needs_no_more_memory_for_larger_pictures(self, system: Any) -> None:
        def beyond_the_maps(side: int) -> int:
            image = picture(side, side)
            system.infer([image[:TILE, :TILE]])  # whatever is made once
            tracemalloc.start()
            (got,) = system.infer([image])
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            return peak - got.map_HW.nbytes - got.influence_HW.nbytes

        # scores of 64 patches a tile stay: 0.2 bytes per pixel; all maps of tiles would be 14
        assert beyond_the_maps(1536) - beyond_the_maps(384) < 1536**2

    @pytest.mark.parametrize(
        ("params", "said"),
        [
            ({"tiles": {"overlap": 40}}, "cannot overlap by 40"),
            ({"foreground": 0.5}, "no foreground"),
        ],
    )
    def test_of_tiles_that_do_not_fit_is_refused(
        self, whole: Bundle, tmp_path: Path, params: dict[str, Any], said: str
    ) -> None:
        with pytest.raises(BundleError, match=said):
            open_system(tiled(whole, tmp_path / "bundle", **params), backend="ort")

    def test_learns_new_pictures_tile_by_tile(self, bundle: Bundle, tmp_path: Path) -> None:
        images.write(tmp_path / "new/a.png", picture(100, 140))
        added = extend(bundle, tmp_path / "new", tmp_path / "more", max_rows=300, backend="ort")
        # 2 x 3 tiles of 64 patches; a picture brought to the network's size has 64
        assert added == 300


SIDE, PLACE, SPOT = 2048, (1203, 707), 6  # place: row and column


def texture(seed: int) -> Any:
    """Soft noise as of cast metal: (SIDE, SIDE, 3) uint8."""
    rng = np.random.default_rng(seed)
    fine = cv2.GaussianBlur(rng.standard_normal((SIDE, SIDE)).astype(np.float32), (0, 0), 1.5)
    grey = np.clip(128 + 60 * fine, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


class TestASmallDefectInALargePicture:
    def fitted(self, plain: Bundle, out: Path, tiles: Tiles | None) -> Any:
        """The system of a bundle that was fitted to textures, whole or in tiles."""
        size = plain.manifest.preprocess.size
        layout = None if tiles is None else Layout.of((SIDE, SIDE), size, tiles)
        pieces = [p for i in range(3) for p in (layout.cut(texture(i)) if layout else [texture(i)])]
        with closing(open_engine(plain.path("features.onnx"), "ort")) as engine:
            features = np.concatenate(
                [
                    engine.run({"images": apply(plain.manifest.preprocess, pieces[i : i + 64])})[
                        "features"
                    ]
                    for i in range(0, len(pieces), 64)
                ]
            )
        grid = plain.manifest.params["grid"]
        pictures = np.repeat(np.arange(3), len(pieces) // 3)
        config = FitConfig(max_rows=100, image_score="patch", smoothing=2.0)
        made = fit(features, tuple(grid), size, config, seed=0, pictures_I=pictures)
        made.bank.save(out.parent / "bank.faiss")
        params = made.params.model_copy(update={"tiles": tiles}).model_dump(mode="json")
        manifest = plain.manifest.model_copy(
            update={"params": params, "thresholds": made.thresholds}
        )
        content = {name: plain.path(name) for name in manifest.files}
        content["bank.faiss"] = out.parent / "bank.faiss"
        return open_system(write(out, manifest, content), backend="ort", threads=1)

    def test_is_found_in_tiles_and_not_in_the_whole(self, whole: Bundle, tmp_path: Path) -> None:
        good, bad = texture(8), texture(8)
        bad[PLACE[0] : PLACE[0] + SPOT, PLACE[1] : PLACE[1] + SPOT] = 0
        with closing(self.fitted(whole, tmp_path / "tiles", Tiles(overlap=OVERLAP))) as system:
            normal, found = system.infer([good, bad])
        assert found.is_anomalous and not normal.is_anomalous
        highest = np.unravel_index(found.map_HW.argmax(), (SIDE, SIDE))
        assert np.abs(np.subtract(highest, PLACE)).max() < 16
        with closing(self.fitted(whole, tmp_path / "whole", None)) as system:
            normal, missed = system.infer([good, bad])
        assert missed.is_anomalous == normal.is_anomalous
        assert missed.score == pytest.approx(normal.score, abs=0.5)
