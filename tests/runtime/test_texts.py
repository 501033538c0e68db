"""Texts from outside are harmless where they are shown."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engineworks.commands.printing import print_table
from engineworks.runtime.files import Lines
from engineworks.runtime.report import Report
from engineworks.runtime.tables import _Table
from engineworks.runtime.texts import cell, hide_secrets, printable

_PLAIN = st.text("abcXYZ019-_.", min_size=1)


class TestAnAddress:
    @pytest.mark.parametrize(
        ("text", "want"),
        [
            ("rtsp://joe:pw@cam:554/live", "rtsp://***@cam:554/live"),
            ("rtsp://joe:p@ss@cam/live", "rtsp://***@cam/live"),
            ("rtsp://joe:p/s@cam/live", "rtsp://***@cam/live"),
            ("rtsp://joe:1234@cam/live", "rtsp://***@cam/live"),
            ("http://joe@[fe80::1]:80/x", "http://***@[fe80::1]:80/x"),
            ("cannot open rtsp://a:b@c/d: refused", "cannot open rtsp://***@c/d: refused"),
            ("http://cam/x.cgi?user=joe&pwd=pw&n=1", "http://cam/x.cgi?user=***&pwd=***&n=1"),
            ("rtsp://cam/user=joe_password=pw", "rtsp://cam/user=***"),
            ("http://cam/picture@2x.jpg", "http://cam/picture@2x.jpg"),
            ("http://cam:8080/picture@2x.jpg", "http://cam:8080/picture@2x.jpg"),
            ("rtsp://cam/live", "rtsp://cam/live"),
            ("a@b.png", "a@b.png"),
            ("", ""),
        ],
    )
    def test_keeps_its_secrets(self, text: str, want: str) -> None:
        assert hide_secrets(text) == want
        assert hide_secrets(want) == want

    @given(st.sampled_from(["rtsp", "http", "HTTPS", "udp"]), _PLAIN, st.text(), _PLAIN)
    def test_never_shows_a_password(self, scheme: str, name: str, password: str, host: str) -> None:
        secret = "S3CRET" + "".join(password.split())
        assert "S3CRET" not in hide_secrets(f"{scheme}://{name}:{secret}@{host}/x")


class TestALine:
    @given(st.text())
    def test_has_nothing_that_a_terminal_obeys(self, text: str) -> None:
        shown = printable(text)
        shown.encode()
        assert not any(ord(each) < 32 or 127 <= ord(each) < 160 for each in shown)
        assert not set(shown) & set("\u202e\u2066")

    @pytest.mark.parametrize("text", ["plain", "é", "日本", "a b", "👩\u200d🔧"])
    def test_that_people_wrote_stays(self, text: str) -> None:
        assert printable(text) == text

    def test_spells_out_what_is_no_utf_8(self) -> None:
        assert printable("a\udcff\x1b[31m") == "a\\udcff\\x1b[31m"


class TestACell:
    @given(st.text())
    def test_is_never_a_formula(self, text: str) -> None:
        assert not cell(text).startswith(("=", "+", "-", "@", "\t", "\r"))
        assert cell(text).removeprefix("'").endswith(text.removeprefix("'"))


class TestATable:
    def test_of_results_holds_no_formula(self, tmp_path: Path) -> None:
        file = Lines(tmp_path / "a.csv")
        _Table(file).add([{"source": "=1+1.png", "score": -1.5, "@x": "+2"}])
        file.close()
        rows = list(csv.reader(io.StringIO((tmp_path / "a.csv").read_text())))
        assert rows == [["source", "score", "'@x"], ["'=1+1.png", "-1.5", "'+2"]]

    def test_on_the_terminal_takes_no_markup(self, capsys: pytest.CaptureFixture[str]) -> None:
        print_table("[/x]", ("[red]a", ""), [("[/x]", "\x1b]0;owned\x07")])
        printed = capsys.readouterr().out
        assert "[red]a" in printed and "[/x]" in printed and "\x1b" not in printed


def test_a_page_takes_names_that_are_no_utf_8(tmp_path: Path) -> None:
    page = Report("\udcff").values("x", {"\udcfe": "\x1b[31m"}).write(tmp_path / "a.html")
    text = page.read_text(encoding="utf-8")
    assert "\\udcff" in text and "\\udcfe" in text and "\x1b" not in text
