from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from engineworks.runtime.claims import claim
from engineworks.runtime.errors import InUseError
from tests.campaign.faults import other_process


@pytest.fixture(params=["there", "not there yet"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "out"
    if request.param == "there":
        path.mkdir()
    return path


def test_a_second_process_is_told_whose_it_is(place: Path) -> None:
    with other_process(place) as pid:
        with pytest.raises(InUseError) as caught, claim(place):
            pass
        assert f"process {pid} (" in caught.value.message
        assert str(place) in caught.value.message
        with claim(place.with_name("another")):
            pass


def test_it_ends_with_the_process_and_leaves_nothing(place: Path) -> None:
    before = sorted(place.parent.rglob("*"))
    with other_process(place):
        assert sorted(place.parent.rglob("*")) == before
    with claim(place):
        pass
    assert sorted(place.parent.rglob("*")) == before


def test_a_claim_may_be_waited_for(place: Path) -> None:
    with other_process(place, seconds=0.1), claim(place, wait_s=10):
        pass


def test_claims_of_one_process_are_nested(place: Path) -> None:
    with claim(place):
        with claim(place / ".." / place.name):
            pass
        pid = os.fork()
        if pid == 0:
            try:
                with claim(place):
                    os._exit(0)
            except InUseError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_folder_is_the_same_by_any_path(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with other_process(tmp_path / "link"), pytest.raises(InUseError), claim(tmp_path / "real"):
        pass


def test_a_child_that_outlives_its_parent_holds_nothing(place: Path) -> None:
    """As the workers of a data loader do, for a while, when training is killed."""
    ready, told = os.pipe()
    parent = os.fork()
    if parent == 0:
        with claim(place):
            if os.fork() == 0:
                os.write(told, b"x")
                time.sleep(5)
                os._exit(0)
            time.sleep(30)
    os.read(ready, 1)
    os.kill(parent, 9)
    os.waitpid(parent, 0)

    with claim(place):
        pass
