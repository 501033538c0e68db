"""What pages tell, and what they do in a real browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from fractions import Fraction
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineworks.runtime import video
from engineworks.runtime.bundle import Bundle
from engineworks.runtime.compare import Timings
from engineworks.runtime.infer import infer
from engineworks.runtime.pages import of_bundle, of_inference, of_training
from engineworks.runtime.report import Report
from engineworks.runtime.sources import open_source
from engineworks.runtime.systems import open_system
from engineworks.runtime.testing import draw_part, write_parts, write_tiny_noising_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("bundles") / "bundle")


@pytest.fixture(scope="module")
def out(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inferred")
    parts = write_parts(folder / "parts", num_train=1, num_good=2, num_defective=2)
    with closing(open_system(bundle)) as system:
        infer(system, open_source(str(parts / "test")), folder / "out", overlays=True)
    return folder / "out"


def texts(html: str, tag: str) -> list[str]:
    found = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    return [unescape(re.sub(r"<[^>]*>", "", text)) for text in found]


def rows(html: str) -> list[list[str]]:
    return [texts(row, "t[dh]") for row in re.findall(r"<tr\b.*?</tr>", html, re.DOTALL)]


def judged(bundle: Bundle, **reports: Any) -> Bundle:
    manifest = bundle.manifest.model_copy(update={"reports": reports})
    return Bundle(bundle.root, manifest)


class TestThePageOfAnInference:
    def test_has_what_is_worst_first_and_its_pictures_in_that_order(
        self, bundle: Bundle, out: Path
    ) -> None:
        verdict = {"ship": "int8", "reasons": ["twice as fast"]}
        html = of_inference(judged(bundle, verdict=verdict), out, {"done": 4}).html()
        told = ["Run", "Verdict of the export: ship int8", "Thresholds", "Results"]
        assert texts(html, "h2") == [*told, "4 pictures, as in the table"]
        assert texts(html, "li") == ["twice as fast"]
        found = [row for row in rows(html) if row[0].endswith(".png")]
        scores = [float(row[1]) for row in found]
        assert len(scores) == 4 and scores == sorted(scores, reverse=True)
        assert texts(html, "figcaption") == [row[0] for row in found]

    def test_names_what_failed(self, bundle: Bundle, out: Path) -> None:
        failures = [("a<b.png", "is truncated"), ("c.png", "is empty")]
        html = of_inference(bundle, out, {}, failures=failures).html()
        assert ["a<b.png", "is truncated"] in rows(html) and ["c.png", "is empty"] in rows(html)
        assert texts(html, "p") == ["2 could not be read"]

    def test_of_classes_has_those_that_are_least_sure_first(
        self, bundle: Bundle, tmp_path: Path
    ) -> None:
        lines = ["source,label,probability", "a,x,0.9", "b,y,0.4", "c,x,"]
        (tmp_path / "results.csv").write_text("\n".join(lines), "utf-8")
        html = of_inference(bundle, tmp_path, {}).html()
        assert [row[0] for row in rows(html)[-3:]] == ["b", "a", "c"]
        assert 'data-above="false"' in html and 'value="0.5"' in html

    def test_keeps_names_that_look_like_numbers(self, bundle: Bundle, tmp_path: Path) -> None:
        (tmp_path / "results.csv").write_text("source,label,score\n007,1e3,0.25\n", "utf-8")
        assert rows(of_inference(bundle, tmp_path, {}).html())[-1] == ["007", "0.2500", "1e3"]

    def test_of_no_results_is_a_page_as_well(self, bundle: Bundle, tmp_path: Path) -> None:
        (tmp_path / "results.csv").write_text("", "utf-8")
        assert "Results" not in of_inference(bundle, tmp_path, {"done": 0}).html()

    def test_of_a_video_shows_frames_from_its_beginning_to_its_end(
        self, bundle: Bundle, tmp_path: Path
    ) -> None:
        rng = np.random.default_rng(0)
        with video.VideoWriter(tmp_path / "line.mp4", Fraction(10)) as writer:
            for i in range(49):
                writer.write(draw_part(rng, (64, 64), defective=i > 40)[0], i / 10)
        with closing(open_system(bundle)) as system:
            source = open_source(str(tmp_path / "line.mp4"))
            infer(system, source, tmp_path / "out", overlays=True)
        html = of_inference(bundle, tmp_path / "out", {}).html()
        assert "17 of 49 frames of line.mp4" in texts(html, "h2")
        assert texts(html, "figcaption") == [f"{i / 10:.2f} s" for i in range(0, 49, 3)]


class TestThePageOfABundle:
    def test_tells_gate_parity_speed_and_hashes(self, bundle: Bundle) -> None:
        gate = {
            **{"float": {"image_auroc": 0.99}, "int8": {"image_auroc": 0.95}},
            **{"drop": {"image_auroc": 0.04}, "interval": {"image_auroc": [0.01, 0.07]}},
            **{"allowed": {"image_auroc": 0.005, "pixel_auroc": 0.005}, "num_pictures": 30},
            **{"failed": {"image_auroc": 0.04}, "passed": False},
        }
        parity = {"max_rel": 1e-5, "mean_rel": 1e-6, "cosine": 1.0, "cosine_worst1pct": 1.0}
        reports = {"gate": gate, "parity": {"torch-float": {"features": {"features": parity}}}}
        timed = Timings(
            environment={"cpu": "some"},
            bundle_digest="",
            inputs={},
            rows=(
                {"name": "ort", "precision": "int8", "batch": 1, "covers": "network"}
                | {"p50_ms": 1.25, "verdict": "stable"},
            ),
        )
        html = of_bundle(judged(bundle, **reports), timed).html()
        assert "Gate: failed, on 30 pictures" in texts(html, "h2")
        found = rows(html)
        assert found[3][:5] == ["image_auroc", "0.9900", "0.9500", "0.04000", "+0.0100 to +0.0700"]
        assert found[3][6] == "failed" and found[4][6] == "not judged"
        assert ["network", "1", "ort", "int8", "1.250", "stable"] in found
        assert any(row[:2] == ["torch to ONNX", "features.features"] for row in found)
        for name, entry in bundle.manifest.files.items():
            assert [name, str(entry.size_bytes), entry.sha256] in found


class TestThePageOfATraining:
    def test_tells_results_and_epochs(self) -> None:
        results = {
            "fit": {"rows": 200},
            "ablation": {"distance": {"auroc": 0.9}, "all": {"auroc": 0.95, "ap": 0.5}},
        }
        history = [{"epoch": "1", "loss": "0.5"}, {"epoch": "2", "loss": ""}]
        html = of_training("part: run", {"status": "finished"}, results, history).html()
        assert texts(html, "h2") == ["Run", "fit", "ablation", "Epochs"]
        assert rows(html)[-2:] == [["1", "0.5000"], ["2", ""]]
        assert ["distance", "0.9000", ""] in rows(html)


class Browser:
    """Chromium without a window, told by its own protocol over a pair of pipes."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def pipes() -> None:  # the protocol's descriptors are 3 and 4
            high = [os.dup(to_browser), os.dup(from_browser)]
            for wanted, given in zip((3, 4), high, strict=True):
                os.dup2(given, wanted)

        self.process = subprocess.Popen(
            [
                *(program, "--headless=new", "--no-sandbox", "--disable-gpu"),
                *("--disable-dev-shm-usage", "--remote-debugging-pipe"),
                *(f"--user-data-dir={profile}", "about:blank"),
            ],
            close_fds=False,
            preexec_fn=pipes,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._rest, self._id, self._session = b"", 0, ""
        self.faults: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.call("Page.enable")
        self.call("Log.enable")
        self.call("Runtime.enable")

    def call(self, method: str, **options: Any) -> dict[str, Any]:
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": options}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (told := self._next()).get("id") != self._id:
            self._note(told)
        assert "error" not in told, told
        result: dict[str, Any] = told["result"]
        return result

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        while (told := self._next()).get("method") != "Page.loadEventFired":
            self._note(told)

    def run(self, code: str) -> Any:
        """The value of an expression in the page."""
        told = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        codes = {"Tab": 9, "Enter": 13, "ArrowRight": 39, "ArrowLeft": 37}
        options = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "text": text}
        self.call("Input.dispatchKeyEvent", type="keyDown", **options)
        self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)
        self.process.terminate()
        self.process.wait(30)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._in, 1 << 16)
            assert read, "the browser has ended"
            self._rest += read
        message, _, self._rest = self._rest.partition(b"\0")
        told: dict[str, Any] = json.loads(message)
        return told

    def _note(self, told: dict[str, Any]) -> None:
        if told.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
            self.faults.append(json.dumps(told["params"])[:500])


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no browser is here: apt-get install chromium")
    started = Browser(program, tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = np.full((20, 30, 3), 90, np.uint8)
    lines = [("a/10.png", 9.5, "bad"), ("a/9.png", 2.25, "bad"), ("b/1.png", 1.0, "good")]
    lines += [("b/2.png", 0.5, "good"), ("b/3.png", None, "none")]
    report = Report("parts").results(
        "Results",
        ("source", "score", "label"),
        lines,
        pictures=[0, 2],
        score="score",
        border=2.0,
    )
    report.figure("a/10.png", image, row=0).figure("b/1.png", image, row=2)
    return report.write(tmp_path_factory.mktemp("page") / "page.html")


NAMES = (
    "[...document.querySelectorAll('tbody tr')].filter(r => !r.hidden)"
    ".map(r => r.cells[0].textContent)"
)
FLAGGED = "[...document.querySelectorAll('tr.flagged')].map(r => r.cells[0].textContent)"
TOLD = "document.querySelector('[role=status]').textContent"
ALL = ["a/10.png", "a/9.png", "b/1.png", "b/2.png", "b/3.png"]


@pytest.mark.usefixtures("opened")
class TestInABrowser:
    @pytest.fixture
    def opened(self, browser: Browser, page: Path) -> Iterator[None]:
        browser.faults.clear()
        browser.open(page)
        yield
        assert browser.faults == []  # its policy lets it do all that it does

    def test_the_page_counts_at_its_border(self, browser: Browser) -> None:
        assert browser.run(NAMES) == ALL
        assert browser.run(FLAGGED) == ["a/10.png", "a/9.png"]
        assert browser.run(TOLD) == "5 of 5 shown, 2 at or above 2"

    def test_a_border_is_tried_by_keyboard_alone(self, browser: Browser) -> None:
        browser.run("document.querySelector('[type=range]').focus()")
        for _ in range(3):
            browser.press("ArrowLeft")
        moved = browser.run("document.querySelector('[type=number]').valueAsNumber")
        assert moved < 2
        browser.run("document.querySelector('[type=number]').select()")
        browser.call("Input.insertText", text="0.75")
        assert browser.run(TOLD) == "5 of 5 shown, 3 at or above 0.75"
        assert browser.run("document.querySelector('[type=range]').valueAsNumber") == 0.75
        assert browser.run("document.querySelector('#picture-2').classList.contains('flagged')")
        browser.press("Tab")
        assert browser.run("document.activeElement.type") == "reset"
        browser.press("Enter", "\r")
        assert browser.run("document.querySelector('[type=number]').valueAsNumber") == 2

    def test_a_filter_hides_rows_and_their_pictures(self, browser: Browser) -> None:
        browser.run("document.querySelector('[type=search]').focus()")
        browser.call("Input.insertText", text="B/ good")
        assert browser.run(NAMES) == ["b/1.png", "b/2.png"]
        assert browser.run(TOLD) == "2 of 5 shown, 0 at or above 2"
        shown = "[...document.querySelectorAll('figure')].filter(f => !f.hidden).map(f => f.id)"
        assert browser.run(shown) == ["picture-2"]

    def test_columns_are_sorted_by_keyboard_alone(self, browser: Browser) -> None:
        browser.run("document.querySelectorAll('th button')[1].focus()")
        browser.press("Enter", "\r")
        # what has no score stands last, up and down
        assert browser.run(NAMES) == [*ALL[3::-1], "b/3.png"]
        assert browser.run("document.querySelectorAll('th')[1].ariaSort") == "ascending"
        browser.press("Enter", "\r")
        assert browser.run(NAMES) == ALL
        browser.run("document.querySelector('th button').click()")
        assert browser.run(NAMES) == ["a/9.png", "a/10.png", *ALL[2:]]  # 9 before 10
        assert browser.run("document.querySelectorAll('th')[1].ariaSort") is None

    def test_rows_lead_to_pictures_and_back(self, browser: Browser) -> None:
        browser.run("document.querySelector('#row-2 a').click()")
        assert browser.run("document.querySelector(':target').id") == "picture-2"
        browser.run("document.querySelector('#picture-2 a').click()")
        assert browser.run("document.querySelector(':target').id") == "row-2"

    def test_a_screen_reader_is_told_names_and_counts(self, browser: Browser) -> None:
        nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
        told = {
            (n["role"]["value"], n.get("name", {}).get("value", "")) for n in nodes if "role" in n
        }
        for role, name in [
            *(("heading", "parts"), ("heading", "Results"), ("region", "Results")),
            *(("searchbox", "Filter"), ("slider", "Border of score"), ("spinbutton", "score")),
            *(("button", "Back to 2"), ("image", "a/10.png"), ("link", "a/10.png")),
        ]:
            assert (role, name) in told, (role, name, sorted(told))
        assert any(role == "status" for role, _ in told) and any(role == "main" for role, _ in told)

    def test_another_script_is_not_run(self, browser: Browser) -> None:
        code = "document.body.append(Object.assign(document.createElement('script'), "
        browser.run(code + "{textContent: 'window.broken = 1'}))")
        assert browser.run("window.broken") is None
        assert any("Content Security Policy" in fault for fault in browser.faults)
        browser.faults.clear()
