"""Names from data as parts of files' names: harmless everywhere, and no two alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engineworks.runtime.names import file_name, overlay_names


@pytest.mark.parametrize("text", ["bar", "M8 Mutter", "naïve-é_1.5", "螺母", "a,b (c)"])
def test_an_ordinary_name_stays(text: str) -> None:
    assert file_name(text) == text


PATHS = ("../../outside", "/etc/passwd", "n/a", "a\\b", "..", ".", ".hidden", "a:b", "end.")
ODD = ("", " ", "a\0b", "a\nb", "x" * 300, "é" * 120, "-rf", "CON", "nul.txt", "\udcff", "\x1b[31m")


@pytest.mark.parametrize("text", [*PATHS, *ODD])
def test_no_name_is_a_path_or_refused_by_a_file_system(tmp_path: Path, text: str) -> None:
    name = file_name(text)
    (tmp_path / f"{name}_00000.png").write_bytes(b"")
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}_00000.png"]
    assert len(name.encode()) <= 100
    assert not name.startswith((".", "-", " "))


@given(texts=st.lists(st.text(), unique=True, min_size=2, max_size=5))
def test_different_texts_have_different_names(texts: list[str]) -> None:
    assert len({file_name(text) for text in texts}) == len(texts)


@given(text=st.text())
def test_a_name_is_one_part_of_a_path(text: str) -> None:
    name = file_name(text)
    assert Path(name).parts == (name,)
    assert name.isprintable()


def test_overlays_keep_apart_what_differs_in_case_alone() -> None:
    names = overlay_names([Path("d/a.png"), Path("d/A.png"), Path("d/B/c.png"), Path("d/b.png")])
    assert len({str(name).lower() for name in names.values()}) == 4
    assert names[Path("d/a.png")] == Path("a.png")
