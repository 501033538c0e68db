from __future__ import annotations

import base64
import hashlib
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from engineworks.runtime import draw
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.errors import InputError
from engineworks.runtime.report import Report
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import write_tiny_noising_bundle
from engineworks.runtime.texts import printable

VOID = {"meta", "img", "input"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


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

    def picture(self, index: int) -> Array:
        """(H, W, 3) uint8 RGB."""
        encoded = np.frombuffer(base64.b64decode(self.sources[index].partition(",")[2]), np.uint8)
        return np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB))


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
            ["ort", "3.500"],
            ["openvino", "1.250"],
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

        np.testing.assert_array_equal(page.picture(0), image)
        np.testing.assert_array_equal(page.picture(1)[..., 0], grey)

    # but what cannot be seen, which is spelt out
    @given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=30))
    @example("left to right: \u200e")
    def test_shows_any_text_as_it_is(self, text: str) -> None:
        page = Page(
            Report(text)
            .values(text, {text: text})
            .table(text, (text,), [(text,)])
            .warning(text)
            .html()
        )

        seen = printable(text)
        assert page.texts["title"] == page.texts["h1"] == page.texts["p"] == [seen]
        assert page.texts["h2"] == [seen, seen]
        assert page.rows == [[seen, seen], [seen], [seen]]

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (0.98765, "0.9877"),
            (1234.567, "1234.57"),
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

    @given(
        st.lists(st.none() | st.integers() | st.floats(allow_subnormal=False), min_size=1),
    )
    def test_puts_the_points_of_a_column_in_a_line(self, values: list[float | None]) -> None:
        html = Report("t").table("v", ("x",), [(value,) for value in values]).html()

        shown = [row[0] for row in Page(html).rows[1:]]
        floats = [
            text
            for text, value in zip(shown, values, strict=True)
            if isinstance(value, float) and "e" not in text and math.isfinite(value)
        ]
        assert len({len(text.partition(".")[2]) for text in floats}) <= 1

    def test_puts_numbers_and_the_name_above_them_right(self) -> None:
        html = Report("t").table("v", ("name", "ms"), [("ort", None), ("openvino", 2)]).html()

        assert '<th scope="col">name</th><th scope="col" class="number">ms</th>' in html
        assert '<td>openvino</td><td class="number">2</td>' in html

    def test_lists_points(self) -> None:
        assert Page(Report("t").points(["one", "<two>"]).html()).texts["li"] == ["one", "<two>"]

    def test_keeps_photographs_small_and_their_thin_lines_red(
        self, rng: np.random.Generator
    ) -> None:
        image = np.clip(rng.normal(128, 8, (2000, 3200, 3)), 0, 255).astype(np.uint8)
        image[1000:1004] = draw.MARK

        page = Page(Report("t").figure("photo", image, photo=True).html())

        assert page.sources[0].startswith("data:image/jpeg;base64,")
        stored = page.picture(0)
        assert stored.shape == (1000, 1600, 3)
        assert {("width", "1600"), ("height", "1000")} <= set(page.attributes)
        # JPEG rounds to a few levels of 256
        np.testing.assert_allclose(stored[500:502].mean(axis=(0, 1)), draw.MARK, atol=8)
        assert len(page.sources[0]) < image.size / 8

    @pytest.mark.parametrize("size", [(1, 5000), (5000, 2)])
    def test_shows_even_what_is_only_a_line(self, size: tuple[int, int]) -> None:
        image = np.full((*size, 3), 90, np.uint8)

        stored = Page(Report("t").figure("photo", image, photo=True).html()).picture(0)

        assert sorted(stored.shape[:2]) == [1, 1600]


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


def results() -> Report:
    rows = [("b.png", 2.5, "bad"), ("<a>.png", 0.123456789, "good"), ("c.png", None, "none")]
    return (
        Report("t")
        .results(
            "Results", ("source", "score", "label"), rows, pictures=[0], score="score", border=2
        )
        .figure("b.png", np.zeros((2, 2, 3), np.uint8), row=0)
    )


class TestResults:
    def test_stand_in_the_page_without_any_script(self) -> None:
        assert Page(results().html()).rows == [
            ["source", "score", "label"],
            ["", "2.500", "bad"],  # its name stands in a link
            ["<a>.png", "0.123", "good"],
            ["c.png", "", "none"],
        ]

    def test_keep_what_is_rounded_for_the_script(self) -> None:
        kept = [value for name, value in Page(results().html()).attributes if name == "data-value"]
        assert kept == ["2.5", "0.123456789"]

    def test_lead_to_their_pictures_and_back(self) -> None:
        page = Page(results().html())
        targets = [value for name, value in page.attributes if name == "href"]
        ids = [value for name, value in page.attributes if name == "id"]
        assert targets == ["#picture-0", "#row-0"]
        assert {"picture-0", "row-0", "row-1", "row-2"} == set(ids)

    def test_bring_the_one_script_that_the_policy_allows(self) -> None:
        html = results().html()
        (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)[0]
        assert f"script-src 'sha256-{digest}'" in policy
        assert "default-src 'none'" in policy and "unsafe-inline'; img-src data:" in policy

    def test_have_no_border_to_try_where_there_is_no_score(self) -> None:
        html = Report("t").results("r", ("a",), [("x",)]).html()
        assert 'type="range"' not in html and 'type="search"' in html
