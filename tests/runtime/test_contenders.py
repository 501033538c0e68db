from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from engineworks.runtime import contenders
from engineworks.runtime.bench import DeviceTime, Timing, Turn
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.contenders import (
    Contender,
    describe_images,
    images_for,
    measure,
    of_bundle,
)
from engineworks.runtime.errors import BackendError, BundleError, UsageError
from engineworks.runtime.images import write as write_image
from engineworks.runtime.systems import System, prompt
from engineworks.runtime.testing import (
    write_parts,
    write_references,
    write_tiny_noising_bundle,
    write_tiny_refdet_bundle,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("tiny") / "bundle", int8=True)


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every contender runs once, nothing is timed; collects the seconds asked for."""
    seconds: list[float] = []

    def interleave(
        calls: Mapping[str, Callable[[], object]], *, max_seconds: float
    ) -> dict[str, Timing]:
        seconds.append(max_seconds)
        for call in calls.values():
            call()
        return {name: Timing((Turn((1.0,) * 5, 0.0),) * 5) for name in calls}

    monkeypatch.setattr(contenders.bench, "interleave", interleave)
    return seconds


def silent(_line: str) -> None:
    pass


class TestImagesToTimeOn:
    def test_are_the_same_noise_at_the_networks_size_every_time(self, tiny: Bundle) -> None:
        first, second = images_for(tiny, None), images_for(tiny, None)

        assert {image.shape for image in first} == {(64, 64, 3)}
        np.testing.assert_array_equal(first, second)
        assert describe_images(first) == describe_images(second)

    def test_are_read_from_a_folder(self, tiny: Bundle, tmp_path: Path) -> None:
        parts = write_parts(tmp_path / "parts", num_train=3)

        found = images_for(tiny, str(parts / "train"))

        assert describe_images(found)["count"] == 3
        assert describe_images(found)["shapes"] == ["(64, 64, 3)"]

    def test_are_told_apart_by_their_hash(self, rng: np.random.Generator) -> None:
        image = rng.integers(0, 256, (4, 6, 3), np.uint8)
        changed = image.copy()
        changed[0, 0, 0] ^= 1

        hashes = {
            describe_images(images)["sha256"]
            for images in ([image], [changed], [image.reshape(6, 4, 3)], [image, image])
        }

        assert len(hashes) == 4

    def test_cannot_be_video(self, tiny: Bundle, tmp_path: Path) -> None:
        (tmp_path / "clip.mp4").write_bytes(b"")
        with pytest.raises(UsageError, match="not video"):
            images_for(tiny, str(tmp_path / "clip.mp4"))


class TestContendersOfABundle:
    def test_are_all_backends_and_precisions_that_it_has_graphs_for(self, tiny: Bundle) -> None:
        found = of_bundle(tiny, "auto", threads=1)

        assert [(c.name, c.precision) for c in found] == [
            ("openvino", "float"),
            ("openvino", "bf16"),
            ("openvino", "int8"),
            ("openvino", "int8-bf16"),
            ("ort", "float"),
            ("ort", "int8"),
        ]
        for contender in found:
            contender.close()

    def test_leave_out_a_precision_that_was_not_exported(self, tmp_path: Path) -> None:
        floats = write_tiny_noising_bundle(tmp_path / "floats")

        found = of_bundle(floats, "ort", threads=1)

        assert [contender.precision for contender in found] == ["float"]
        found[0].close()

    def test_of_an_unknown_backend_are_refused(self, tiny: Bundle) -> None:
        with pytest.raises(UsageError, match="no backend 'magic'"):
            of_bundle(tiny, "magic", threads=1)

    def test_of_a_backend_that_is_not_installed_are_refused_with_the_install_line(
        self, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        with pytest.raises(BackendError, match="pip install"):
            of_bundle(tiny, "ort", threads=1)

    def test_are_not_none_without_a_word(
        self, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
        with pytest.raises(BundleError, match="no graphs for backend"):
            of_bundle(tiny, "auto", threads=1)


class TestMeasuring:
    def test_gives_a_row_per_contender_batch_and_cover(
        self, tiny: Bundle, asked: list[float]
    ) -> None:
        rows = measure(
            tiny,
            images_for(tiny, None),
            backend="ort",
            batches=[1, 3],
            threads=1,
            seconds=2.0,
            evaluation=None,
            say=silent,
        )

        assert [(row.batch, row.covers, row.precision) for row in rows] == [
            (batch, covers, precision)
            for batch in (1, 3)
            for covers in ("network", "images to results")
            for precision in ("float", "int8")
        ]
        assert asked == [4.0] * 4, "seconds per row, for both contenders of a turn"
        assert all(row.evaluation is None for row in rows)

    def test_times_what_is_on_a_gpu_once_more_without_the_copies(
        self, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, given = contenders.of_bundle, []

        def on_gpu(prepared: np.ndarray) -> Callable[[], DeviceTime]:
            given.append(prepared.shape)
            return lambda: DeviceTime(0.25)

        def with_gpu(*args: Any, **options: Any) -> list[contenders.Contender]:
            first, *rest = real(*args, **options)
            return [replace(first, on_gpu=on_gpu), *rest]

        monkeypatch.setattr(contenders, "of_bundle", with_gpu)
        rows = measure(
            tiny,
            images_for(tiny, None),
            backend="ort",
            batches=[2],
            threads=1,
            seconds=0.0,
            evaluation=None,
            say=silent,
        )

        assert [(row.covers, row.precision) for row in rows] == [
            ("network", "float"),
            ("network", "int8"),
            ("network on the GPU", "float"),
            ("images to results", "float"),
            ("images to results", "int8"),
        ]
        assert given == [(2, 3, 64, 64)]

    def test_puts_the_accuracy_beside_the_speed(self, tiny: Bundle, tmp_path: Path) -> None:
        parts = write_parts(tmp_path / "parts")

        rows = measure(
            tiny,
            images_for(tiny, None),
            backend="ort",
            batches=[1],
            threads=1,
            seconds=0.0,
            evaluation=parts,
            say=silent,
        )

        assert [row.accuracy["image_auroc"] for row in rows if row.accuracy] == [1.0] * 4

    def test_feeds_few_images_in_turn_to_fill_a_batch(
        self, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[list[int]] = []
        paths: list[int] = []
        watching = Contender(
            name="watching",
            precision="float",
            network=lambda batch: paths.append(len(batch)),
            path=lambda images: seen.append([int(image[0, 0, 0]) for image in images]),
            evaluate=None,
            close=lambda: None,
        )
        monkeypatch.setattr(contenders, "of_bundle", lambda *_args, **_named: [watching])
        images = [np.full((64, 64, 3), value, np.uint8) for value in (1, 2)]

        measure(
            tiny,
            images,
            backend="auto",
            batches=[5],
            threads=1,
            seconds=0.0,
            evaluation=None,
            say=silent,
        )

        assert seen == [[1, 2, 1, 2, 1]]
        assert paths == [5]

    def test_closes_every_contender_even_where_one_fails(
        self, tiny: Bundle, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed: list[str] = []

        def broken(_batch: object) -> object:
            raise RuntimeError("a kernel failed")

        both = [
            Contender(name, "float", call, call, None, lambda name=name: closed.append(name))
            for name, call in (("good", lambda _batch: None), ("bad", broken))
        ]
        monkeypatch.setattr(contenders, "of_bundle", lambda *_args, **_named: both)

        with pytest.raises(RuntimeError, match="a kernel failed"):
            measure(
                tiny,
                images_for(tiny, None),
                backend="auto",
                batches=[1],
                threads=1,
                seconds=0.0,
                evaluation=None,
                say=silent,
            )

        assert set(closed) == {"good", "bad"}

    def test_reads_no_more_images_than_it_can_use(self, tiny: Bundle, tmp_path: Path) -> None:
        for i in range(40):
            write_image(tmp_path / f"{i:02d}.png", np.full((2, 2, 3), i, np.uint8))

        assert len(images_for(tiny, str(tmp_path))) == 32


class TestASystemThatIsToldWhatToLookFor:
    def test_is_told_before_it_is_timed_and_its_network_runs_without_the_encoder(
        self, tmp_path: Path, rng: np.random.Generator
    ) -> None:
        bundle = write_tiny_refdet_bundle(tmp_path / "bundle")
        folder = write_references(tmp_path / "refs", ["red", "white", "green"])
        told: list[System] = []

        def prepare(system: System) -> None:
            prompt(system, folder)
            told.append(system)

        (found,) = of_bundle(bundle, "ort", 1, prepare)

        batch = rng.normal(size=(2, 3, 64, 96)).astype(np.float32)
        (answer,) = cast("list[dict[str, np.ndarray]]", found.network(batch))
        assert answer["boxes"].shape == (2, 16, 4)
        assert set(np.unique(answer["classes"])) <= {0, 1, 2}
        assert len(told) == 1
        found.close()
