from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineworks.runtime import bundle as bundles
from engineworks.runtime import images, preprocess
from engineworks.runtime import search as search_module
from engineworks.runtime.bank import Bank
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.datasets import MvtecSample, mvtec
from engineworks.runtime.errors import BankError, BundleError, DatasetError, EngineError, InputError
from engineworks.runtime.systems import extend, noising
from engineworks.runtime.systems.noising.signals import (
    SIGNALS,
    anomaly_map,
)
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import (
    FunctionEngine,
    write_parts,
    write_tiny_noising_bundle,
)
from tests.runtime.systems.noising_opened import open_noising, pictures
from tests.runtime.systems.noising_reference import (
    plain_nearest,
    plain_signals,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("noising") / "bundle")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(params=["openvino", "ort"])
def system(request: pytest.FixtureRequest, tiny: Bundle) -> Iterator[Any]:
    with closing(open_noising(tiny, backend=request.param, threads=1)) as opened:
        yield opened


def with_engine(bundle: Bundle, features: Sequence[Any] | Array) -> Any:
    """The system of a bundle whose graph answers the same features for every image."""
    entry = bundle.manifest.graphs["features"]
    engine = FunctionEngine(
        lambda feeds: {"features": np.repeat(np.asarray(features)[None], len(feeds["images"]), 0)},
        entry.inputs,
        entry.outputs,
    )
    return open_noising(bundle, backend="ort", engines={"features": engine})


class TestTheSystem:
    def test_tells_defective_from_good_parts(self, system: Any) -> None:
        good, bad = system.infer(pictures(4)[:1]), system.infer(pictures(1, defective=True))
        assert bad[0].score > good[0].score
        assert bad[0].is_anomalous

    def test_answers_with_maps_at_the_networks_size(self, system: Any) -> None:
        for result in system.infer(pictures(3)):
            for map_HW in (result.map_HW, result.influence_HW):
                assert map_HW.shape == (64, 64) and map_HW.dtype == np.float32
            assert result.threshold == system.bundle.manifest.thresholds["image"].value
            assert result.pixel_threshold == system.bundle.manifest.thresholds["pixel"].value

    def test_searches_the_patches_of_a_batch_together(
        self, system: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        features_BND = np.stack(
            [
                system.engines["features"].run({"images": preprocess.apply(system.spec, [each])})[
                    "features"
                ][0]
                for each in pictures(3)
            ]
        )
        apart = [system.judge.scores(each[None])[0] for each in features_BND]
        asked: list[int] = []
        real = system.judge.search.search

        def counted(queries_ND: Array) -> Any:
            asked.append(len(queries_ND))
            return real(queries_ND)

        monkeypatch.setattr(system.judge.search, "search", counted)
        together = system.judge.scores(features_BND)
        assert asked == [features_BND.shape[0] * features_BND.shape[1]]
        for (scores_N, influence_N), (alone_N, alone_influence_N) in zip(
            together, apart, strict=True
        ):
            np.testing.assert_array_equal(scores_N, alone_N)
            np.testing.assert_array_equal(influence_N, alone_influence_N)

    def test_gives_an_image_the_same_answer_whatever_its_batch(self, system: Any) -> None:
        images_of_both = pictures(3) + pictures(3, defective=True)
        together = system.infer(images_of_both)
        for image, result in zip(images_of_both, together, strict=True):
            (alone,) = system.infer([image])
            # a convolution may sum in another order for another batch: float32 rounding, in
            # standard deviations of a normal patch
            assert alone.score == pytest.approx(result.score, rel=1e-4, abs=1e-4)
            np.testing.assert_allclose(alone.map_HW, result.map_HW, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                alone.influence_HW, result.influence_HW, rtol=1e-4, atol=1e-3
            )

    def test_scores_a_patch_as_the_formulas_say(self, system: Any, tiny: Bundle) -> None:
        (image,) = pictures(1, defective=True)
        batch = preprocess.apply(tiny.manifest.preprocess, [image])
        features = system.engines["features"].run({"images": batch})["features"][0]
        params, rows = system.params, system.judge.bank.rows_MD
        scores, uneven = [], []
        for x in features:
            signals = plain_signals(x, plain_nearest(x, rows, params.k), params.mean_distance)
            standard = {
                n: (signals[n] - params.signals[n].mean) / params.signals[n].std for n in SIGNALS
            }
            scores.append(sum(params.weights[n] * standard[n] for n in SIGNALS) / params.score_std)
            uneven.append(standard["influence"])
        (result,) = system.infer([image])
        # float32 distances divided by the normal spread
        assert result.score == pytest.approx(max(scores), rel=1e-4)
        want = anomaly_map(np.array(scores), params.grid, (64, 64), params.smoothing)
        np.testing.assert_allclose(result.map_HW, want, rtol=1e-4, atol=1e-4)
        want = anomaly_map(np.array(uneven), params.grid, (64, 64), 0)
        np.testing.assert_allclose(result.influence_HW, want, rtol=1e-4, atol=1e-3)

    def test_answers_alike_with_the_fast_search(
        self, system: Any, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(search_module, "_WORTHWHILE_BLOCKS", 2)
        with closing(open_noising(tiny, backend=system.backend, threads=1)) as fast:
            assert fast.judge.search._engine is not None and system.judge.search._engine is None
            for one, other in zip(fast.infer(pictures(2)), system.infer(pictures(2)), strict=True):
                # the same rows: only ties may be named in another order
                np.testing.assert_allclose(one.map_HW, other.map_HW, rtol=1e-5, atol=1e-5)

    def test_writes_results_as_json(self, system: Any) -> None:
        for result in system.infer(pictures(1) + pictures(1, defective=True)):
            content = json.loads(json.dumps(result.to_json(), allow_nan=False))
            assert content["label"] == ("anomalous" if result.is_anomalous else "normal")
            assert content["score"] == pytest.approx(result.score, abs=1e-6)
            assert content["anomalous_area"] == pytest.approx(
                (result.map_HW >= result.pixel_threshold).mean(), abs=1e-6
            )

    def test_a_score_on_the_border_is_anomalous(self, system: Any) -> None:
        (result,) = system.infer(pictures(1))
        assert replace(result, threshold=result.score).is_anomalous
        assert not replace(result, threshold=float(np.nextafter(result.score, np.inf))).is_anomalous

    def test_draws_image_map_and_marks_side_by_side(self, system: Any) -> None:
        image = pictures(2)[1]
        (result,) = system.infer([image])
        drawn = system.draw(image, result)
        assert drawn.dtype == np.uint8 and drawn.ndim == 3 and drawn.shape[2] == 3
        assert drawn.shape[1] >= 3 * image.shape[1]

    def test_of_no_images_answers_nothing(self, system: Any) -> None:
        assert system.infer([]) == []

    @pytest.mark.parametrize(
        "image",
        [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32)],
        ids=["grey", "float"],
    )
    def test_refuses_what_is_no_picture(self, system: Any, image: Array) -> None:
        with pytest.raises(InputError, match="uint8"):
            system.infer([image])

    def test_closed_twice_is_closed(self, tiny: Bundle) -> None:
        opened = open_noising(tiny, backend="ort")
        opened.close()
        opened.close()
        with pytest.raises(EngineError, match="closed"):
            opened.infer(pictures(1))


class TestFeaturesOfABrokenNetwork:
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("fast", [False, True])
    def test_are_an_error_and_no_normal_image(
        self, tiny: Bundle, value: float, fast: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if fast:
            monkeypatch.setattr(search_module, "_WORTHWHILE_BLOCKS", 2)
        features = np.zeros((64, 16), np.float32)
        features[10, 3] = value
        with (
            closing(with_engine(tiny, features)) as system,
            pytest.raises(EngineError, match="not finite") as caught,
        ):
            system.infer(pictures(1))
        assert caught.value.fix

    def test_of_another_width_are_refused(self, tiny: Bundle) -> None:
        entry = tiny.manifest.graphs["features"]
        spec = entry.outputs["features"].model_copy(update={"shape": ("batch", 64, 15)})
        engine = FunctionEngine(
            lambda feeds: {"features": np.zeros((len(feeds["images"]), 64, 15), np.float32)},
            entry.inputs,
            {"features": spec},
        )
        with (
            closing(open_noising(tiny, backend="ort", engines={"features": engine})) as system,
            pytest.raises(BankError, match="width 16"),
        ):
            system.infer(pictures(1))


class TestABundleOfOtherParameters:
    def test_is_refused_with_the_field(self, tiny: Bundle, tmp_path: Path) -> None:
        params = tiny.manifest.params | {"score_std": -1.0}
        manifest = tiny.manifest.model_copy(update={"params": params})
        files = {name: tiny.path(name) for name in tiny.manifest.files}
        broken = bundles.write(tmp_path / "bundle", manifest, files)
        with pytest.raises(BundleError, match="parameters"):
            open_noising(broken, backend="ort")


class TestAnEvaluation:
    def test_measures_the_test_images(self, system: Any, parts: Path) -> None:
        seen: list[tuple[int, int]] = []
        found = system.evaluate(parts, progress=lambda *now: seen.append(now)).metrics
        assert seen[-1] == (8, 8)
        samples = mvtec(parts, "test")
        scores = np.array([system.infer([images.read(s.path)])[0].score for s in samples])
        labels = np.array([s.label for s in samples], bool)
        wins = scores[labels][:, None] > scores[~labels]
        assert found["image_auroc"] == pytest.approx(wins.mean())
        assert {"image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "aupro"} <= set(found)
        assert found["image_auroc"] > 0.9 and found["pixel_auroc"] > 0.8

    def test_of_a_folder_without_test_images_is_refused(self, system: Any, tmp_path: Path) -> None:
        images.write(tmp_path / "train/good/0.png", pictures(1)[0])
        with pytest.raises(DatasetError):
            system.evaluate(tmp_path)


class TestGroundTruth:
    spec = preprocess.PreprocessSpec(size=(32, 32))

    def test_of_a_normal_image_is_empty(self, tmp_path: Path) -> None:
        got = noising.target_mask(MvtecSample(tmp_path / "a.png", 0, "good", None), self.spec)
        assert got is not None and got.shape == (32, 32) and not got.any()

    def test_of_a_defect_without_a_mask_is_unknown(self, tmp_path: Path) -> None:
        sample = MvtecSample(tmp_path / "a.png", 1, "cut", None)
        assert noising.target_mask(sample, self.spec) is None

    def test_is_placed_like_the_image(self, tmp_path: Path) -> None:
        mask = np.zeros((64, 64), np.uint8)
        mask[16:32, 32:48] = 255
        images.write(tmp_path / "m.png", mask)
        sample = MvtecSample(tmp_path / "a.png", 1, "cut", tmp_path / "m.png")
        got = noising.target_mask(sample, self.spec)
        want = np.zeros((32, 32), bool)
        want[8:16, 16:24] = True
        assert got is not None and got.dtype == bool and np.array_equal(got, want)


class TestMoreNormalImages:
    @pytest.fixture
    def unusual(self, tmp_path: Path) -> Path:
        """Parts that the bank has not seen: another colour; one suffix in capitals."""
        folder = tmp_path / "new"
        for i, image in enumerate(pictures(3, seed=9)):
            images.write(folder / f"{i}.png", image[..., ::-1] // 2 + np.uint8(100))
        (folder / "2.png").rename(folder / "2.PNG")
        return folder

    def test_make_their_like_normal_and_leave_the_rest(
        self, tiny: Bundle, unusual: Path, tmp_path: Path
    ) -> None:
        count = extend(tiny, unusual, tmp_path / "out", max_rows=50, backend="ort")
        grown = bundles.read(tmp_path / "out")
        old, new = (Bank.load(b.asset("bank")) for b in (tiny, grown))
        assert count == len(new) - len(old) == 50
        assert np.array_equal(new.rows_MD[: len(old)], old.rows_MD)
        assert grown.manifest.thresholds == tiny.manifest.thresholds
        assert grown.manifest.params == tiny.manifest.params
        with (
            closing(open_noising(tiny, backend="ort")) as before,
            closing(open_noising(grown, backend="ort")) as after,
        ):
            for path in sorted(unusual.iterdir()):
                image = images.read(path)
                assert after.infer([image])[0].score < before.infer([image])[0].score

    def test_never_add_more_rows_than_there_are(
        self, tiny: Bundle, unusual: Path, tmp_path: Path
    ) -> None:
        count = extend(tiny, unusual, tmp_path / "out", max_rows=10_000, backend="ort")
        assert 0 < count <= 3 * 64

    def test_must_be_pictures(self, tiny: Bundle, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "film.mp4").write_bytes(b"x")
        for source in (tmp_path / "empty", tmp_path / "film.mp4"):
            with pytest.raises(InputError, match="pictures"):
                extend(tiny, source, tmp_path / "out", max_rows=5, backend="ort")
        assert not (tmp_path / "out").exists()

    def test_cannot_be_added_to_another_system(
        self, tiny: Bundle, unusual: Path, tmp_path: Path
    ) -> None:
        other = replace(tiny, manifest=tiny.manifest.model_copy(update={"system": "stripe"}))
        with pytest.raises(BundleError, match="'stripe'"):
            extend(other, unusual, tmp_path / "out", max_rows=5)
