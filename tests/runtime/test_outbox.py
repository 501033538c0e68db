from __future__ import annotations

import base64
import contextlib
import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineworks.runtime import mqtt, outbox, webhook
from engineworks.runtime.errors import UsageError
from engineworks.runtime.mqtt import Mqtt
from engineworks.runtime.outbox import Message, NotSentError, Outbox
from engineworks.runtime.sinks import Item
from engineworks.runtime.webhook import Webhook

IMAGE = np.zeros((4, 6, 3), np.uint8)


@dataclass(frozen=True)
class Level:
    level: float

    def to_json(self) -> dict[str, Any]:
        return {"level": self.level}

    def summary(self) -> str:
        return ""


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(30_000):
        if condition():
            return
        time.sleep(0.001)
    raise AssertionError("it never came to that")


def put(box: Outbox, *levels: int, camera: str = "") -> None:
    for level in levels:
        box.add(Item("a.png", camera=camera), IMAGE, Level(level))


@dataclass
class Receiver:
    """A sender that takes, or refuses to, as it is told."""

    name: str = "receiver"
    down: bool = False
    refuses: tuple[int, ...] = ()
    got: list[Message] = field(default_factory=list)
    attempts: int = 0

    def send(self, messages: Sequence[Message]) -> None:
        self.attempts += 1
        if self.down:
            raise NotSentError("is down")
        for i, message in enumerate(messages):
            if json.loads(message.body).get("level") in self.refuses:
                raise NotSentError("was refused", num_sent=i, refused=True)
            self.got.append(message)

    def close(self) -> None: ...

    def levels(self) -> list[int]:
        return [json.loads(message.body)["level"] for message in self.got]


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_PAUSES_S", (0.01,))
    monkeypatch.setattr(outbox, "_LAST_S", 0.05)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


class TestAnOutbox:
    def test_sends_all_in_their_order_and_leaves_nothing(self, folder: Path) -> None:
        receiver = Receiver()
        with Outbox(folder, receiver) as box:
            put(box, *range(250), camera="left")
            box.failed(Item("b.png"), "broken")
        records = [json.loads(message.body) for message in receiver.got[:-1]]
        assert [record["level"] for record in records] == list(range(250))
        assert {message.camera for message in receiver.got[:-1]} == {"left"}
        assert json.loads(receiver.got[-1].body)["error"] == "broken"
        assert len({record["id"] for record in records}) == 250
        assert records[0]["width"] == 6 and records[0]["time"].endswith("+00:00")
        assert (box.num_sent, box.num_waiting, box.num_lost) == (251, 0, 0)
        assert not folder.exists()

    def test_loses_nothing_in_an_outage(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(outbox, "_PART_BYTES", 2000)
        said: list[str] = []
        receiver = Receiver()
        with Outbox(folder, receiver, say=said.append) as box:
            put(box, *range(10))
            wait_for(lambda: len(receiver.got) == 10)
            receiver.down = True
            put(box, *range(10, 200))
            wait_for(lambda: receiver.attempts > 3)
            assert len(list(folder.glob("*.jsonl"))) > 5
            receiver.down = False
        assert receiver.levels() == list(range(200))
        assert said == [
            "receiver: is down; results wait on the disk",
            "receiver: takes results again",
        ]

    def test_leaves_what_is_not_taken_to_the_next_run(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(outbox, "_PART_BYTES", 500)
        said: list[str] = []
        first, second = Receiver(), Receiver()
        with Outbox(folder, first, say=said.append) as box:
            put(box, *range(20))
            wait_for(lambda: len(first.got) == 20)
            first.down = True
            put(box, *range(20, 50))
        assert box.num_waiting == 30
        assert "30 results wait" in said[-1]
        with Outbox(folder, second) as box:
            put(box, 50)
        assert second.levels() == list(range(20, 51))
        assert not folder.exists()

    @pytest.mark.parametrize(
        "position", [b"", b"\0\0", b"[]", b"null", b'{"part": 1}', b'{"part": "00000001.jsonl"}']
    )
    def test_sends_once_more_what_a_power_cut_left_without_a_position(
        self, folder: Path, position: bytes
    ) -> None:
        folder.mkdir()
        (folder / "00000001.jsonl").write_bytes(b'{"level": 1}\n{"level": 2}\n')
        (folder / "position.json").write_bytes(position)
        receiver = Receiver()
        with Outbox(folder, receiver):
            pass
        assert receiver.levels() == [1, 2]

    def test_sets_aside_what_is_no_result(self, folder: Path) -> None:
        folder.mkdir()
        broken = [b"\0\0\0", b"\xff\xfe", b"[1]", b"[" * 100_000]
        lines = [b'{"level": 1}', *broken, b'{"level": 2}']
        (folder / "00000001.jsonl").write_bytes(b"".join(line + b"\n" for line in lines))
        said: list[str] = []
        receiver = Receiver()
        with Outbox(folder, receiver, say=said.append):
            pass
        assert receiver.levels() == [1, 2]
        (aside,) = folder.glob("refused-*")
        assert aside.read_bytes().splitlines() == broken
        assert all("no result" in line for line in said) and len(said) == len(broken)

    def test_keeps_no_file_of_what_was_sent(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(outbox, "_PART_BYTES", 300)
        receiver = Receiver()
        with Outbox(folder, receiver) as box:
            for i in range(30):
                put(box, i)
                wait_for(lambda: box.num_waiting == 0)
                assert len(list(folder.glob("0*.jsonl"))) == 1
        assert receiver.levels() == list(range(30))

    def test_goes_on_where_its_process_was_killed(self, folder: Path) -> None:
        first, second = Receiver(), Receiver()
        box = Outbox(folder, first)
        box.__enter__()
        put(box, *range(5))
        wait_for(lambda: (folder / "position.json").exists() and len(first.got) == 5)
        first.down = True
        put(box, *range(5, 9))
        with next(folder.glob("0*.jsonl")).open("a") as file:
            file.write('{"level": 1')  # a line that was being written
        copy = folder.with_name("copy")
        wait_for(lambda: first.attempts > 8)
        shutil.copytree(folder, copy)
        with Outbox(copy, second):
            pass
        assert second.levels() == [5, 6, 7, 8]
        box.__exit__(None, None, None)

    def test_drops_the_oldest_where_it_is_full_and_says_so(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(outbox, "_PART_BYTES", 1000)
        receiver, said = Receiver(down=True), []
        with Outbox(folder, receiver, limit_bytes=5000, say=said.append) as box:
            put(box, *range(300))
            size = sum(path.stat().st_size for path in folder.glob("*.jsonl"))
            assert size <= 5000 + 1200
            assert box.num_lost > 0
            receiver.down = False
        assert receiver.levels() == list(range(300))[-len(receiver.got) :]
        assert box.num_lost + box.num_sent == 300
        assert any("queue is full" in line for line in said)

    def test_sets_aside_what_will_never_be_taken(self, folder: Path) -> None:
        receiver, said = Receiver(refuses=(3, 5)), []
        with Outbox(folder, receiver, say=said.append) as box:
            put(box, *range(8))
        assert receiver.levels() == [0, 1, 2, 4, 6, 7]
        (refused,) = folder.iterdir()
        assert [json.loads(line)["level"] for line in refused.read_text().splitlines()] == [3, 5]
        assert box.num_waiting == 0


# --- a webhook -----------------------------------------------------------------------------------


class Server:
    """An HTTP server that notes what it is sent."""

    def __init__(self, port: int = 0) -> None:
        outer = self
        self.got: list[Any] = []
        self.headers: list[dict[str, str]] = []
        self.statuses: list[int] = []  # of the next answers; 200 behind them
        self.endless = False
        self.refuses = -1  # a level

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = outer.statuses.pop(0) if outer.statuses else 200
                if any(each["level"] == outer.refuses for each in content):
                    status = 422
                if status == 200:
                    outer.got += content
                    outer.headers.append(dict(self.headers.items()) | {"path": self.path})
                self.send_response(status)
                if outer.endless:
                    self.end_headers()
                    with contextlib.suppress(OSError):  # until nobody listens any more
                        while True:
                            self.wfile.write(bytes(10_000))
                    return
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, *_: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def levels(self) -> list[int]:
        return [each["level"] for each in self.got]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


class TestAWebhook:
    def test_gets_lists_of_results(self, folder: Path, server: Server) -> None:
        with Outbox(folder, Webhook(f"http://joe:p%40ss@127.0.0.1:{server.port}/in?x=1")) as box:
            put(box, *range(120), camera="left")
        assert server.levels() == list(range(120))
        assert server.got[0]["camera"] == "left"
        headers = server.headers[0]
        assert headers["path"] == "/in?x=1"
        assert headers["Authorization"] == f"Basic {base64.b64encode(b'joe:p@ss').decode()}"
        assert headers["Content-Type"] == "application/json"

    def test_that_is_away_for_a_while_misses_nothing(self, folder: Path) -> None:
        first = Server()
        with Outbox(folder, Webhook(f"http://127.0.0.1:{first.port}")) as box:
            put(box, *range(5))
            wait_for(lambda: len(first.got) == 5)
            first.close()
            put(box, *range(5, 40))
            time.sleep(0.05)
            second = Server(first.port)
        assert sorted(set(first.levels() + second.levels())) == list(range(40))
        second.close()

    @pytest.mark.parametrize("status", [500, 503, 429, 404, 302])
    def test_is_asked_again_where_it_fails(self, folder: Path, server: Server, status: int) -> None:
        server.statuses = [status] * 3
        said: list[str] = []
        with Outbox(folder, Webhook(f"http://127.0.0.1:{server.port}"), say=said.append) as box:
            put(box, 1, 2)
            wait_for(lambda: box.num_sent == 2)
        assert server.levels() == [1, 2]
        assert f"status {status}" in said[0]

    def test_may_refuse_one_result_and_takes_the_others(self, folder: Path, server: Server) -> None:
        server.refuses = 3
        with Outbox(folder, Webhook(f"http://127.0.0.1:{server.port}")) as box:
            put(box, *range(6))
        assert sorted(set(server.levels())) == [0, 1, 2, 4, 5]
        assert len(list(folder.glob("refused-*"))) == 1

    def test_may_talk_without_end(self, folder: Path, server: Server) -> None:
        server.endless = True
        with Outbox(folder, Webhook(f"http://127.0.0.1:{server.port}")) as box:
            put(box, 1)
        assert box.num_sent == 1

    def test_may_have_any_letters_in_its_address(self, folder: Path, server: Server) -> None:
        with Outbox(folder, Webhook(f"http://127.0.0.1:{server.port}/é x%20?y=ü")) as box:
            put(box, 1)
        assert server.headers[0]["path"] == "/%C3%A9%20x%20?y=%C3%BC"

    @pytest.mark.parametrize("address", ["example.org", "ftp://a/b", "http://", "http://a:x/"])
    def test_needs_an_address(self, address: str) -> None:
        with pytest.raises(UsageError, match="no address"):
            Webhook(address)

    def test_never_says_a_password(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(webhook, "_TIMEOUT_S", 0.2)
        hook = Webhook("http://joe:S3cret@127.0.0.1:9/?token=abc")
        assert "S3cret" not in hook.name and "abc" not in hook.name
        with pytest.raises(NotSentError) as caught:
            hook.send([Message("", b"{}")])
        assert "S3cret" not in caught.value.reason


# --- a broker ------------------------------------------------------------------------------------


class Broker:
    """Mosquitto on this machine."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin")
        if program is None:
            pytest.skip("there is no MQTT broker here: apt-get install mosquitto")
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        passwords = folder / "passwords"
        subprocess.run(
            ["mosquitto_passwd", "-b", "-c", passwords, "joe", "p@ss"],
            check=True,
            capture_output=True,
        )
        passwords.chmod(0o644)
        self._config = folder / "mosquitto.conf"
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous false\npassword_file {passwords}\n"
            f"user root\npersistence true\npersistence_location {folder}/\n"
        )
        self._program = program
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(
            [self._program, "-c", str(self._config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for(self._listens)

    def _listens(self) -> bool:
        with socket.socket() as trying:
            return trying.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    broker = Broker(tmp_path_factory.mktemp("mosquitto"))
    yield broker
    broker.stop()


class Subscriber:
    """A client that keeps its session, so that it misses nothing while the broker is away."""

    def __init__(self, port: int, topic: str) -> None:
        import paho.mqtt.client as paho

        self.got: list[tuple[str, Any]] = []
        ready = threading.Event()
        client = paho.Client(
            paho.CallbackAPIVersion.VERSION2, client_id=f"test-{topic}", clean_session=False
        )
        client.username_pw_set("joe", "p@ss")
        client.on_connect = lambda *_: client.subscribe(f"{topic}/#", qos=1)
        client.on_subscribe = lambda *_: ready.set()
        client.on_message = lambda _client, _data, message: self.got.append(
            (message.topic, json.loads(message.payload))
        )
        client.reconnect_delay_set(1, 1)
        client.connect("127.0.0.1", port)
        client.loop_start()
        assert ready.wait(30)
        self._client = client

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


class TestABroker:
    def test_gets_a_message_for_each_result_on_its_sources_topic(
        self, folder: Path, broker: Broker
    ) -> None:
        listener = Subscriber(broker.port, "line/1")
        address = f"mqtt://joe:p%40ss@127.0.0.1:{broker.port}/line/1"
        with Outbox(folder, Mqtt(address)) as box:
            put(box, *range(120), camera="left +#")
            put(box, 120)
        wait_for(lambda: len(listener.got) == 121)
        listener.close()
        assert [content["level"] for _, content in listener.got] == list(range(121))
        assert listener.got[0][0] == "line/1/left __"
        assert listener.got[-1][0] == "line/1"

    def test_that_is_away_for_a_while_misses_nothing(self, folder: Path, broker: Broker) -> None:
        listener = Subscriber(broker.port, "outage")
        said: list[str] = []
        address = f"mqtt://joe:p%40ss@127.0.0.1:{broker.port}/outage"
        with Outbox(folder, Mqtt(address), say=said.append) as box:
            put(box, *range(5))
            wait_for(lambda: box.num_sent == 5)
            broker.stop()
            put(box, *range(5, 40))
            wait_for(lambda: bool(said))
            broker.start()
            wait_for(lambda: box.num_sent == 40)
        wait_for(lambda: {content["level"] for _, content in listener.got} == set(range(40)))
        listener.close()
        assert "results wait on the disk" in said[0]

    def test_that_lets_nobody_in_is_told_of(self, folder: Path, broker: Broker) -> None:
        said: list[str] = []
        with Outbox(
            folder, Mqtt(f"mqtt://joe:wrong@127.0.0.1:{broker.port}"), say=said.append
        ) as box:
            put(box, 1)
            wait_for(lambda: bool(said))
        assert "lets nobody in" in said[0]
        assert "wrong" not in "".join(said)
        assert box.num_waiting == 1

    def test_needs_an_address(self) -> None:
        with pytest.raises(UsageError, match="no address"):
            Mqtt("http://host/topic")

    def test_that_is_not_there_is_tried_again(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mqtt, "_TIMEOUT_S", 0.2)
        with pytest.raises(NotSentError, match="cannot be reached"):
            Mqtt("mqtt://127.0.0.1:9").send([Message("", b"{}")])
