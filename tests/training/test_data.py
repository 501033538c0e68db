from __future__ import annotations

import gc
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engineworks.runtime.errors import ImageError, RunError
from engineworks.runtime.labels import Item, Labelled
from engineworks.training.config import TrainConfig
from engineworks.training.data import iterate, labels_fingerprint, loader

pytestmark = pytest.mark.train


class Numbers:
    """Each sample tells where it was made and what it drew."""

    def __len__(self) -> int:
        return 5

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        return {
            "index": np.array([index]),
            "drawn": rng.random(2, np.float32),
            "names": [f"sample {index}"],
            "frozen": gc.get_freeze_count(),
        }


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_is_a_batch_gets_no_axis(workers: int) -> None:
    batches: Any = loader(Numbers(), TrainConfig(workers=workers), shuffle=False, batched=True)
    for i, batch in enumerate(batches):
        assert batch["index"].tolist() == [i]
        assert batch["drawn"].shape == (2,) and batch["drawn"].dtype == torch.float32
        assert batch["names"] == [f"sample {i}"]
    assert i == 4


def test_a_loader_process_leaves_alone_what_its_parent_had() -> None:
    """It would free decoders whose threads only the parent has, and wait for these for ever."""
    batches: Any = loader(Numbers(), TrainConfig(workers=1), shuffle=False, batched=True)
    assert next(iter(batches))["frozen"] > 1000


def test_each_loader_process_has_so_many_batches_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    for prefetch in (1, 3):
        config = TrainConfig(workers=1, prefetch=prefetch, pin_memory=True)
        batches: Any = loader(Numbers(), config, shuffle=False, batched=True)
        iterator = iter(batches)
        next(iterator)
        # what is sent to the processes and not yet asked for: the one that was taken made room
        assert iterator._tasks_outstanding == prefetch
        assert batches.pin_memory == torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loader(Numbers(), TrainConfig(pin_memory=True), shuffle=False).pin_memory
    assert not loader(Numbers(), TrainConfig(), shuffle=False).pin_memory


class Failing(Numbers):
    """One sample that cannot be read."""

    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        if index == 3:
            raise ImageError("a.png is truncated", fix="copy it again")
        return super().get(index, rng)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batched", [False, True])
def test_the_error_of_a_sample_is_raised_as_it_was(workers: int, batched: bool) -> None:
    config = TrainConfig(workers=workers, batch_size=2)
    batches = iterate(loader(Failing(), config, shuffle=False, batched=batched))
    assert next(batches)["index"].flatten().tolist() == [0] if batched else [0, 1]
    with pytest.raises(ImageError) as caught:
        list(batches)
    assert (caught.value.message, caught.value.fix) == ("a.png is truncated", "copy it again")


def test_the_error_of_a_sample_passes_through_accelerate() -> None:
    from accelerate import Accelerator

    whole: Any = loader(Failing(), TrainConfig(batch_size=5), shuffle=False)
    with pytest.raises(ImageError, match="truncated"):
        list(iterate(Accelerator(cpu=True).prepare(whole)))


class Killed(Numbers):
    def get(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        return {}


def test_a_loader_process_that_is_killed_is_said() -> None:
    batches = iterate(loader(Killed(), TrainConfig(workers=1), shuffle=False))
    with pytest.raises(RunError, match="has ended") as caught:
        next(batches)
    assert "train.workers" in str(caught.value.fix)


class TestTheFingerprintOfLabels:
    def item(self, root: Path, **changes: Any) -> Item:
        path = root / "a.png"
        if not path.exists():
            path.write_bytes(b"picture")
        return replace(Item("a", (path,), lambda: np.zeros((2, 2, 3)), "cup"), **changes)

    @pytest.mark.parametrize(
        "changes",
        [{"label": "pen"}, {"name": "b"}, {"frame": 3}, {"boxes": (("cup", (0, 0, 9, 9)),)}],
    )
    def test_sees_every_change_of_a_label(self, tmp_path: Path, changes: dict[str, Any]) -> None:
        before = Labelled({"train": (self.item(tmp_path),)})
        after = Labelled({"train": (self.item(tmp_path, **changes),)})
        assert labels_fingerprint(before) != labels_fingerprint(after)
        assert labels_fingerprint(before) == labels_fingerprint(before)

    def test_sees_masks_splits_and_the_pictures_that_judge(self, tmp_path: Path) -> None:
        mask = tmp_path / "mask.png"
        mask.write_bytes(b"mask")

        def of(split: str, **changes: Any) -> str:
            return labels_fingerprint(Labelled({split: (self.item(tmp_path, **changes),)}))

        found = [of("train"), of("test"), of("test", mask=mask)]
        mask.write_bytes(b"changed")
        found.append(of("test", mask=mask))
        (tmp_path / "a.png").write_bytes(b"changed")
        found.append(of("test"))
        assert len(set(found)) == 5

    def test_does_not_see_where_the_data_lie(self, tmp_path: Path) -> None:
        places = [tmp_path / "a", tmp_path / "b"]
        for place in places:
            place.mkdir()
        first, second = (labels_fingerprint(Labelled({"val": (self.item(p),)})) for p in places)
        assert first == second
