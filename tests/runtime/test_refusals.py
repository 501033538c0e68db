from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from engineworks.runtime.errors import ResourceError
from engineworks.runtime.refusals import explain


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_an_error_of_the_system_has_path_reason_and_way_out(number: int) -> None:
    error = explain(OSError(number, os.strerror(number), "out/x.csv"))

    assert isinstance(error, ResourceError)
    assert error.exit_code == 1
    assert error.message == f"out/x.csv: {os.strerror(number)}"
    assert error.fix


def test_both_paths_of_a_rename_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        (tmp_path / "a").rename(tmp_path / "b")

    assert re.search(r"/a and .*/b: No such", explain(caught.value).message)


def test_memory_has_a_way_out_too() -> None:
    error = explain(MemoryError("Unable to allocate 112 GiB"))

    assert "112 GiB" in error.message
    assert "--batch" in str(error.fix)


def test_an_error_without_a_number_keeps_its_words() -> None:
    assert explain(OSError("the pipe is strange")).message == "the pipe is strange"
