from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engineworks.runtime import images
from engineworks.runtime.cameras import open_cameras
from engineworks.runtime.errors import ConfigError, EngineworksError, InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("left", "right"):
        images.write(tmp_path / name / "0.png", np.zeros((8, 8, 3), np.uint8))
    return tmp_path


def listed(folder: Path, text: str) -> str:
    path = folder / "cameras.yaml"
    path.write_text(text)
    return str(path)


class TestOneSource:
    def test_has_no_name(self, folder: Path) -> None:
        (camera,) = open_cameras([str(folder / "left")], step=3)
        assert (camera.name, camera.step, camera.drops) == ("", 3, False)

    def test_that_is_live_drops_what_it_must(self) -> None:
        (camera,) = open_cameras(["rtsp://joe:secret@host/live"])
        assert camera.drops
        assert "secret" not in repr(camera)


class TestSeveralSources:
    def test_are_called_like_themselves(self, folder: Path) -> None:
        given_ = [str(folder / "left"), str(folder / "right"), str(folder / "left" / "*.png"), "0"]
        cameras = open_cameras([*given_, "rtsp://joe:pw@gate/1", "rtsp://gate/2"])
        names = [camera.name for camera in cameras]
        assert names[:2] == ["left", "right"]
        assert names[3:] == ["camera-0", "gate", "gate-2"]
        assert len({name.casefold() for name in names}) == len(names)

    def test_may_stand_in_a_list(self, folder: Path) -> None:
        text = """
- {name: port, source: left}
- {name: door, source: 0, keep: newest, buffer: 4, frame_step: 5}
- {name: gate, source: "rtsp://host/1", keep: all}
"""
        port, door, gate = open_cameras([listed(folder, text)], step=2)
        assert port.source.paths == (folder / "left" / "0.png",)
        assert (port.step, port.drops, port.buffer) == (2, False, None)
        assert (door.name, door.source.address, door.step, door.buffer) == ("door", "0", 5, 4)
        assert door.drops and not gate.drops

    def test_of_a_list_of_one_has_its_name(self, folder: Path) -> None:
        (camera,) = open_cameras([listed(folder, "- {name: a, source: left}")])
        assert camera.name == "a"

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "no list"),
            ("name: a", "no list"),
            ("- {name: a}", "source"),
            ("- {name: a, source: left, keep: some}", "keep"),
            ("- {name: a, source: left, colour: red}", "colour"),
            ("- {name: a/b, source: left}", "cannot be the name"),
            ("- {name: .., source: left}", "cannot be the name"),
            ("- {name: Earlier-3, source: left}", "cannot be the name"),
            ("- {name: a, source: left}\n- {name: A, source: right}", "two sources are called 'A'"),
            ("- {name: a, source: left", "no YAML"),
            ("- {name: a, source: left, buffer: 0}", "buffer"),
        ],
    )
    def test_are_refused_where_the_list_is_none(self, folder: Path, text: str, says: str) -> None:
        with pytest.raises(ConfigError, match=says) as caught:
            open_cameras([listed(folder, text)])
        assert caught.value.fix

    def test_are_refused_where_one_is_not_there(self, folder: Path) -> None:
        with pytest.raises(InputError, match="nothing at"):
            open_cameras([str(folder / "left"), str(folder / "none")])
        with pytest.raises(InputError, match="nothing at"):
            open_cameras([str(folder / "none.yaml")])

    @given(data=st.binary(max_size=60))
    def test_that_are_noise_are_one_clear_line(
        self, tmp_path_factory: pytest.TempPathFactory, data: bytes
    ) -> None:
        path = tmp_path_factory.mktemp("noise") / "a.yaml"
        path.write_bytes(data)
        with pytest.raises(EngineworksError):
            open_cameras([str(path)])
