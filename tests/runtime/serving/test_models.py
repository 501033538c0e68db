"""A model that is exchanged while it answers."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("prometheus_client", reason="the extra 'serve' is not here: make test-serve")

from engineworks.runtime.bundle import read, set_threshold
from engineworks.runtime.errors import BundleError, BusyError, InputError, UsageError
from engineworks.runtime.serving.models import Model
from engineworks.runtime.systems import System, open_bundle
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import write_tiny_noising_bundle

FEEDS = {"images": np.zeros((1, 64, 64, 3), np.uint8)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tiny_noising_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


class Gate:
    """Opens bundles; a system's calls wait for ``passed`` once ``shut`` is asked for."""

    def __init__(self) -> None:
        self.passed, self.entered = threading.Event(), threading.Event()
        self.passed.set()
        self.closed: list[str] = []

    def __call__(self, folder: Path) -> System:
        system: Any = open_bundle(folder, threads=1)
        infer, close = system.infer, system.close

        def slow(images: Sequence[Array]) -> Any:
            self.entered.set()
            assert self.passed.wait(20)
            return infer(images)

        def closing() -> None:
            self.closed.append(system.bundle.manifest.digest)
            close()

        system.infer, system.close = slow, closing
        opened: System = system
        return opened


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def make(folder: Path, gate: Gate) -> Iterator[Callable[..., Model]]:
    made: list[Model] = []

    def model(**options: Any) -> Model:
        made.append(Model("part", folder, gate, **options))
        return made[-1]

    yield model
    for each in made:
        each.close()


def ask(model: Model, feeds: dict[str, Array] | None = None, *wanted: str) -> Any:
    model.admit()
    return model.infer(FEEDS if feeds is None else feeds, wanted)


class TestAModel:
    def test_answers_as_the_system_does(self, make: Callable[..., Model], folder: Path) -> None:
        made, digest = ask(make())
        with open_bundle(folder, threads=1) as system:
            (want,) = system.infer([FEEDS["images"][0]])
        assert (made["map"][0] == want.map_HW).all() and made["score"][0, 0] == want.score
        assert digest == read(folder).manifest.digest

    def test_answers_what_is_asked_for(self, make: Callable[..., Model]) -> None:
        assert list(ask(make(), None, "json", "score")[0]) == ["json", "score"]

    def test_refuses_what_it_does_not_have(self, make: Callable[..., Model]) -> None:
        model = make(max_requests=1)
        for _ in range(3):  # and does not count it for ever
            with pytest.raises(InputError, match="no output 'maps'"):
                ask(model, None, "maps")
            with pytest.raises(InputError):
                ask(model, {})
        ask(model)

    def test_refuses_more_than_may_wait(self, make: Callable[..., Model], gate: Gate) -> None:
        model = make(max_requests=2)
        gate.passed.clear()
        with ThreadPoolExecutor(2) as pool:
            answers = [pool.submit(ask, model) for _ in range(2)]
            while model._num_requests < 2:
                pass
            with pytest.raises(BusyError, match="2 requests"):
                model.admit()
            gate.passed.set()
            assert all(answer.result() for answer in answers)
        ask(model)

    @pytest.mark.parametrize("name", ["", "a/b", "..", ".a", "a b", "a" * 101, "ä"])
    def test_has_a_name_that_is_part_of_an_address(
        self, name: str, folder: Path, gate: Gate
    ) -> None:
        with pytest.raises(UsageError, match="no name"):
            Model(name, folder, gate)


class TestASwap:
    def test_lets_what_runs_end_on_the_old_bundle(
        self, make: Callable[..., Model], folder: Path, gate: Gate
    ) -> None:
        model = make()
        old = model.digest
        gate.passed.clear()
        gate.entered.clear()
        with ThreadPoolExecutor(3) as pool:
            running = pool.submit(ask, model)
            assert gate.entered.wait(20)
            set_threshold(read(folder), "image", 7.0)
            swap = pool.submit(model.swap)
            gate.passed.set()
            new = swap.result()
            assert running.result()[1] == old
        assert new == model.digest == read(folder).manifest.digest != old
        assert gate.closed == [old]
        made, digest = ask(model)
        assert digest == new and made["threshold"][0, 0] == 7.0

    def test_to_a_damaged_bundle_is_refused(
        self, make: Callable[..., Model], folder: Path, gate: Gate
    ) -> None:
        model = make()
        old = model.digest
        graph = next(folder.glob("*.onnx"))
        graph.write_bytes(graph.read_bytes()[:-1] + b"x")
        with pytest.raises(BundleError):
            model.swap()
        assert ask(model)[1] == model.digest == old and gate.closed == []

    def test_to_nothing_is_refused(self, make: Callable[..., Model], folder: Path) -> None:
        model = make()
        shutil.rmtree(folder)
        with pytest.raises(BundleError):
            model.swap()
        ask(model)


class TestWhatIsDoubtful:
    def test_is_kept_across_a_swap(
        self, make: Callable[..., Model], folder: Path, tmp_path: Path
    ) -> None:
        model = make(keep=(tmp_path / "kept", 1 << 20))
        score = float(ask(model)[0]["score"][0, 0])
        assert list((tmp_path / "kept").rglob("*.png")) == []
        set_threshold(read(folder), "image", score)  # at the border: who knows
        model.swap()
        for _ in range(2):
            ask(model)
        kept = list((tmp_path / "kept").rglob("*.png"))
        assert len(kept) == 2 and all(path.with_suffix(".json").is_file() for path in kept)

    def test_that_cannot_be_kept_costs_no_answer(
        self, make: Callable[..., Model], folder: Path, tmp_path: Path
    ) -> None:
        score = float(ask(make())[0]["score"][0, 0])
        set_threshold(read(folder), "image", score)
        model = make(keep=(tmp_path / "kept", 1 << 20))
        shutil.rmtree(tmp_path / "kept")
        (tmp_path / "kept").write_text("a file stands where the folder was")
        assert ask(model)[0]["score"][0, 0] == score
