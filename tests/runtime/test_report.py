from __future__ import annotations

import base64
import csv
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import InputError
from runtime.infer import infer
from runtime.report import Report, of_inference
from runtime.sources import open_source
from runtime.systems import open_system
from runtime.testing import write_parts, write_tiny_noising_bundle

VOID = {"meta", "img"}


class Page(HTMLParser):
    """Reads a page back: cells per table row, texts by tag, sources of pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
            self.texts.setdefault(tag, []).append("")
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts[self.open[-1]][-1] += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    @property
    def sources(self) -> list[str]:
        return [value or "" for name, value in self.attributes if name == "src"]


def a_report() -> Report:
    image = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    return (
        Report("parts, float against INT8")
        .values("bundle", {"system": "noising", "rows": 614, "score": 1.23456, "gate": None})
        .table("speed", ("what", "ms"), [("ort", 3.5), ("openvino", np.float32(1.25))])
        .heading("samples")
        .figure("scratch 003", image)
        .warning("accuracy was not measured")
    )


class TestAPage:
    def test_holds_all_that_was_added_in_its_order(self) -> None:
        page = Page(a_report().html())

        assert page.texts["h1"] == ["parts, float against INT8"]
        assert page.texts["h2"] == ["bundle", "speed", "samples"]
        assert page.rows == [
            ["system", "noising"],
            ["rows", "614"],
            ["score", "1.235"],
            ["gate", ""],
            ["what", "ms"],
            ["ort", "3.5"],
            ["openvino", "1.25"],
        ]
        assert page.texts["p"] == ["accuracy was not measured"]

    def test_refers_to_nothing_outside_and_runs_no_script(self) -> None:
        html = a_report().html()

        assert not re.search(r"https?:|<script|<link|@import|url\(|javascript:", html)
        assert all(source.startswith("data:image/png;base64,") for source in Page(html).sources)

    def test_follows_the_readers_light_or_dark_setting(self) -> None:
        assert "color-scheme: light dark" in a_report().html()

    def test_keeps_pictures_without_loss(self, rng: np.random.Generator) -> None:
        image = rng.integers(0, 256, (5, 7, 3), np.uint8)
        grey = rng.integers(0, 256, (5, 7), np.uint8)

        page = Page(Report("pictures").figure("colour", image).figure("grey", grey).html())

        found = [
            cv2.imdecode(
                np.frombuffer(base64.b64decode(source.partition(",")[2]), np.uint8),
                cv2.IMREAD_UNCHANGED,
            )
            for source in page.sources
        ]
        np.testing.assert_array_equal(found[0][..., ::-1], image)
        np.testing.assert_array_equal(found[1], grey)

    # without surrogates (no UTF-8) and control characters (a parser may normalise them)
    @given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30))
    def test_shows_any_text_as_it_is(self, text: str) -> None:
        page = Page(
            Report(text)
            .values(text, {text: text})
            .table(text, (text,), [(text,)])
            .warning(text)
            .html()
        )

        assert page.texts["title"] == page.texts["h1"] == page.texts["p"] == [text]
        assert page.texts["h2"] == [text, text]
        assert page.rows == [[text, text], [text], [text]]

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (0.98765, "0.9877"),
            (123456.7, "123457"),
            (1e-7, "1e-07"),
            (True, "yes"),
            (np.int64(12345), "12345"),
            (float("nan"), "nan"),
            (None, ""),
        ],
    )
    def test_shows_numbers_shortly(self, value: object, shown: str) -> None:
        assert Page(Report("t").values("v", {"x": value}).html()).rows == [["x", shown]]


class TestWhatDoesNotFit:
    def test_a_row_of_another_length_is_refused(self) -> None:
        with pytest.raises(InputError, match="2 columns, a row has 1"):
            Report("t").table("speed", ("what", "ms"), [("ort",)])

    @pytest.mark.parametrize(
        "image",
        [
            np.zeros((4, 4), np.float32),
            np.zeros((4, 4, 4), np.uint8),
            np.zeros((4,), np.uint8),
            np.zeros((0, 4, 3), np.uint8),
        ],
        ids=["float", "four channels", "one axis", "no pixels"],
    )
    def test_a_figure_that_is_no_picture_is_refused(self, image: np.ndarray) -> None:
        with pytest.raises(InputError, match="a figure must be"):
            Report("t").figure("map", image)


class TestWriting:
    def test_makes_folders_and_leaves_one_file(self, tmp_path: Path) -> None:
        path = tmp_path / "reports" / "eval.html"

        a_report().write(path)

        assert path.read_text(encoding="utf-8") == a_report().html()
        assert list(path.parent.iterdir()) == [path]

    def test_that_fails_leaves_the_old_page(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "eval.html"
        a_report().write(path)
        old = path.read_bytes()

        def broken(*_args: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr("os.fsync", broken)
        with pytest.raises(OSError, match="disk full"):
            Report("new").write(path)

        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]


class TestThePageOfAnInference:
    def test_shows_verdict_thresholds_pictures_and_results(self, tmp_path: Path) -> None:
        bundle = write_tiny_noising_bundle(tmp_path / "bundle")
        parts = tmp_path / "parts"
        write_parts(parts, size=(64, 64), num_train=1, num_good=2, num_defective=2, seed=0)
        system = open_system(bundle)
        try:
            infer(system, open_source(str(parts / "test")), tmp_path / "out", overlays=True)
        finally:
            system.close()
        page = of_inference(bundle, tmp_path / "out", {"done": 4}).html()
        assert page.count("<img") == 4
        assert all(name in page for name in bundle.manifest.thresholds)
        with (tmp_path / "out" / "results.csv").open(newline="") as file:
            assert all(row["score"] in page for row in csv.DictReader(file))

    def test_where_nothing_could_be_read_has_no_table(self, tmp_path: Path) -> None:
        bundle = write_tiny_noising_bundle(tmp_path / "bundle")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "results.csv").touch()
        page = of_inference(bundle, tmp_path / "out", {"done": 0}).html()
        assert "Results" not in page
        assert "<img" not in page
