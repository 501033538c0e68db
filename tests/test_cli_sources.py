"""Several sources in one command, and results that are sent as they come."""

from __future__ import annotations

import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineworks.runtime.testing import draw_part, write_parts, write_tiny_noising_bundle
from engineworks.runtime.video import VideoWriter
from tests.command import cli

ROOT = Path(__file__).parents[1]
NUM_FRAMES = 12


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "cli.py"), *map(str, arguments)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle, pictures, two videos and one that breaks off, and a list of them."""
    folder = tmp_path_factory.mktemp("sources")
    write_tiny_noising_bundle(folder / "bundle")
    write_parts(folder / "parts", size=(64, 64), num_train=3)
    rng = np.random.default_rng(0)
    for name in ("left", "right", "broken"):
        with VideoWriter(folder / f"{name}.mp4", 10) as writer:
            for i in range(NUM_FRAMES):
                writer.write(draw_part(rng, (64, 64), defective=i % 3 == 0)[0], i / 10)
    whole = (folder / "broken.mp4").read_bytes()
    (folder / "broken.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "cameras.yaml").write_text(
        "- {name: port, source: left.mp4}\n"
        "- {name: star, source: right.mp4, frame_step: 2}\n"
        "- {name: dead, source: broken.mp4}\n"
        "- {name: stills, source: parts/train/good}\n"
    )
    return folder


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
    """Notes what is posted."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            got.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    got: list[dict[str, Any]] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.got = got  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class TestAListOfCameras:
    def test_gives_each_its_folder_and_the_dead_one_holds_up_none(
        self, folder: Path, tmp_path: Path, server: http.server.ThreadingHTTPServer
    ) -> None:
        out, page = tmp_path / "out", tmp_path / "page.html"
        answer = cli(
            *("infer", folder / "bundle", "--source", folder / "cameras.yaml", "--out", out),
            *("--jsonl", "--save-overlays", "--keep", "doubtful:1MB", "--report", page),
            *("--post", f"http://127.0.0.1:{server.server_port}/results"),
        )
        assert answer.code == 1, answer.err
        port, star, stills = (
            lines(out / name / "results.jsonl") for name in ("port", "star", "stills")
        )
        assert [line["frame"] for line in port] == list(range(NUM_FRAMES))
        assert [line["frame"] for line in star] == list(range(0, NUM_FRAMES, 2))
        assert len(stills) == 3
        assert {line["camera"] for line in port} == {"port"}
        assert "dead: " in answer.err and "broken.mp4" in answer.err
        assert (out / "port" / "left.mp4").exists()
        assert len(list((out / "stills" / "overlays").glob("*.png"))) == 3
        counters = json.loads((out / "counters.json").read_text())["sources"]
        assert counters["port"]["done"] == NUM_FRAMES
        assert counters["port"]["latency_ms"]["p99"] >= counters["port"]["latency_ms"]["p50"] > 0
        assert counters["dead"]["failed"] == 1
        assert f"port: {NUM_FRAMES} seen, 0 dropped, {NUM_FRAMES} done" in answer.err
        sent = server.got  # type: ignore[attr-defined]
        assert [each["frame"] for each in sent if each["camera"] == "port"] == list(range(12))
        assert any("error" in each for each in sent)
        assert not (out / "outbox-post").exists()
        assert (tmp_path / "page-port.html").exists()

    def test_answers_as_each_source_alone(self, folder: Path, tmp_path: Path) -> None:
        sources = [folder / "left.mp4", folder / "parts" / "train" / "good"]
        both = ("--source", sources[0], "--source", sources[1])
        assert cli("infer", folder / "bundle", *both, "--out", tmp_path / "both").code == 0
        for source in sources:
            out = tmp_path / source.stem
            call = ("infer", folder / "bundle", "--source", source, "--out", out, "--jsonl")
            assert cli(*call).code == 0
        together = (tmp_path / "both" / "left" / "results.csv").read_text().splitlines()
        alone = (tmp_path / "left" / "results.csv").read_text().splitlines()
        assert [line.partition(",")[2] for line in together] == alone

    def test_is_refused_before_anything_is_written(self, folder: Path, tmp_path: Path) -> None:
        call = ("infer", folder / "bundle", "--source", folder / "cameras.yaml")
        answer = cli(*call, "--out", tmp_path / "out", "--post", "example.org")
        assert answer.code == 2
        assert "no address" in answer.err and "fix:" in answer.err
        assert not (tmp_path / "out").exists()


class TestAnOutage:
    def test_leaves_results_to_the_next_run_and_says_so(
        self, folder: Path, tmp_path: Path, server: http.server.ThreadingHTTPServer
    ) -> None:
        """Killed while the receiver is away, and started again."""
        out = tmp_path / "out"
        call = ("infer", folder / "bundle", "--source", folder / "left.mp4", "--out", out)
        away = command(*call, "--post", "http://127.0.0.1:9/")
        process = subprocess.Popen(away, stderr=subprocess.PIPE, text=True)
        waiting = out / "outbox-post" / "00000001.jsonl"
        for _ in range(1200):
            if waiting.exists() and len(waiting.read_text().splitlines()) == NUM_FRAMES:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        answer = cli(*call, "--exist-ok", "--post", f"http://127.0.0.1:{server.server_port}/")
        assert answer.code == 0, answer.err
        sent = server.got  # type: ignore[attr-defined]
        assert [each["frame"] for each in sent] == [*range(NUM_FRAMES)] * 2
        assert len({each["id"] for each in sent}) == 2 * NUM_FRAMES
