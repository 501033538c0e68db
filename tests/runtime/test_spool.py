"""Arrays that do not fit into memory come back as they were."""

from __future__ import annotations

import gc
import resource
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from engineworks.runtime import spool
from engineworks.runtime.spool import Spool


@pytest.mark.parametrize("in_memory", [1, 10**9])
def test_arrays_come_back_in_any_order(monkeypatch: pytest.MonkeyPatch, in_memory: int) -> None:
    monkeypatch.setattr(spool, "_IN_MEMORY", in_memory)
    rng = np.random.default_rng(0)
    arrays = [
        rng.random((3, 4), np.float32),
        np.zeros((0, 5), np.int64),
        rng.integers(0, 9, 7).astype(np.uint8),
        np.asfortranarray(rng.random((2, 3, 4))),
        rng.random((6, 6))[::2, 1::3],
    ]
    kept = Spool()
    for place, each in enumerate(arrays):
        kept.append(each)
        assert np.array_equal(kept[0], arrays[0])  # reading between two does not move the end
        assert len(kept) == place + 1
    for place in (4, 0, 2, 1, 3):
        got = kept[place]
        assert got.dtype == arrays[place].dtype
        assert np.array_equal(got, arrays[place]) and got.shape == arrays[place].shape


def test_what_is_more_than_fits_lies_in_a_file_that_goes_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spool, "_IN_MEMORY", 1 << 16)
    gc.collect()  # what others left open
    before = len(list(Path("/proc/self/fd").iterdir()))
    kept, row = Spool(), np.zeros(1 << 12)
    tracemalloc.start()
    try:
        for _ in range(200):
            kept.append(row)
        assert tracemalloc.get_traced_memory()[1] < 1 << 19  # of 6 MiB
    finally:
        tracemalloc.stop()
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1
    del kept
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_temporary_folder_that_is_full_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "_IN_MEMORY", 1 << 10)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    kept = Spool()
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            for _ in range(100):
                kept.append(np.zeros(1 << 10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path)
