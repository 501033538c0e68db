"""``serve`` as a process, and clients of another project."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engineworks.runtime.bundle import read, set_threshold
from engineworks.runtime.serving.tensors import answers
from engineworks.runtime.systems import open_bundle
from engineworks.runtime.tensors import Array
from engineworks.runtime.testing import (
    write_tiny_noising_bundle,
    write_tiny_refdet_bundle,
    write_tiny_stripe_bundle,
)

ROOT = Path(__file__).parents[1]

# not imported: kserve and tritonclient cannot live in one process
if importlib.util.find_spec("kserve") is None:
    pytest.skip("the extra 'serve' is not here: make test-serve", allow_module_level=True)
_clients = "the extra 'clients' is not here: make test-serve"
grpc_client: Any = pytest.importorskip("tritonclient.grpc", reason=_clients)
http_client: Any = pytest.importorskip("tritonclient.http", reason=_clients)


class Server:
    """A process of ``serve``."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "cli.py", "serve", "--threads", "1", "--http-port", "0"]
        self.process = subprocess.Popen(
            [*command, "--grpc-port", "0", *map(str, arguments)],
            cwd=ROOT,
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.lines = iter(self.process.stdout.readline, "")
        self.models = []
        for line in self.lines:
            if line.startswith("http"):
                self.http, self.grpc = (part.split("//")[1] for part in line.split(", "))
                self.grpc = self.grpc.strip()
                return
            self.models.append(line.strip())
        raise AssertionError(self.process.stderr.read() if self.process.stderr else "")

    def call(
        self, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        request = urllib.request.Request(f"http://{self.http}/{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def client(self, way: str) -> tuple[Any, Any]:
        module = grpc_client if way == "grpc" else http_client
        return module, module.InferenceServerClient(self.grpc if way == "grpc" else self.http)

    def infer(self, way: str, name: str, given: str, array: Array, *wanted: str) -> Any:
        module, client = self.client(way)
        kinds = {"object": "BYTES", "uint8": "UINT8", "float32": "FP32", "uint16": "UINT16"}
        tensor = module.InferInput(given, list(array.shape), kinds[array.dtype.name])
        tensor.set_data_from_numpy(array)
        outputs = [module.InferRequestedOutput(each) for each in wanted] or None
        return client.infer(name, [tensor], outputs=outputs)


@contextmanager
def serving(*arguments: object) -> Iterator[Server]:
    server = Server(*arguments)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        _, told = server.process.communicate(timeout=60)
    assert server.process.returncode == 0, told
    assert "Traceback" not in told


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    write_tiny_noising_bundle(folder / "noising")
    write_tiny_refdet_bundle(folder / "refdet")
    write_tiny_stripe_bundle(folder / "stripe")
    return folder


@pytest.fixture(scope="module")
def server(bundles: Path) -> Iterator[Server]:
    names = [bundles / "noising", bundles / "refdet", f"strip={bundles / 'stripe'}"]
    with serving(*names, "--max-mb", 2, "--max-pictures", 4) as started:
        yield started


def images_for(name: str, rng: np.random.Generator, num: int = 2) -> Array:
    values = rng.integers(0, 256, (num, 72, 96, 3))
    return values.astype(np.float32 if name == "strip" else np.uint8)


class TestAClientOfTriton:
    @pytest.mark.parametrize("way", ["grpc", "http"])
    @pytest.mark.parametrize("name", ["noising", "refdet", "strip"])
    def test_gets_what_the_system_answers_bit_for_bit(
        self, server: Server, bundles: Path, way: str, name: str, rng: np.random.Generator
    ) -> None:
        images = images_for(name, rng)
        with open_bundle(bundles / name.replace("strip", "stripe"), threads=1) as system:
            wanted = answers(system.infer(list(images)))
        answer = server.infer(way, name, "images", images)
        for output, array in wanted.items():
            got = answer.as_numpy(output)
            assert got.dtype == array.dtype and got.shape == array.shape
            assert (got == array).all()

    @pytest.mark.parametrize("way", ["grpc", "http"])
    def test_sends_files_and_asks_for_json_alone(
        self, server: Server, bundles: Path, way: str, rng: np.random.Generator
    ) -> None:
        images = images_for("noising", rng)
        files = [[cv2.imencode(".png", image[..., ::-1])[1].tobytes()] for image in images]
        answer = server.infer(way, "noising", "encoded", np.array(files, object), "json")
        with open_bundle(bundles / "noising", threads=1) as system:
            wanted = [result.to_json() for result in system.infer(list(images))]
        assert [json.loads(line) for line in answer.as_numpy("json")[:, 0]] == wanted
        assert answer.as_numpy("map") is None

    @pytest.mark.parametrize("way", ["grpc", "http"])
    def test_learns_what_is_there(self, server: Server, bundles: Path, way: str) -> None:
        _, client = server.client(way)
        assert client.is_server_live() and client.is_server_ready()
        assert client.is_model_ready("noising")
        told = client.get_model_metadata("noising")
        told = told if way == "http" else {"versions": list(told.versions)}
        assert told["versions"] == [read(bundles / "noising").manifest.digest]
        assert server.models[2].startswith("strip: stripe, ")

    @pytest.mark.parametrize("way", ["grpc", "http"])
    @pytest.mark.parametrize(
        ("name", "given", "array", "reason"),
        [
            ("noising", "images", np.zeros((1, 8, 8, 4), np.uint8), "(N, H, W, 3)"),
            ("noising", "images", np.zeros((5, 8, 8, 3), np.uint8), "5 pictures"),
            ("noising", "pixels", np.zeros((1, 8, 8, 3), np.uint8), "'pixels'"),
            ("noising", "encoded", np.array([[b"/etc/passwd"]], object), "no picture"),
            ("nothing", "images", np.zeros((1, 8, 8, 3), np.uint8), "nothing"),
        ],
    )
    def test_is_told_why_it_is_refused(
        self, server: Server, way: str, name: str, given: str, array: Array, reason: str
    ) -> None:
        from tritonclient.utils import InferenceServerException

        with pytest.raises(InferenceServerException) as refused:
            server.infer(way, name, given, array)
        assert reason in refused.value.message()
        assert "400" in str(refused.value) or "404" in str(refused.value) or way == "grpc"
        assert "INTERNAL" not in str(refused.value)


class TestRest:
    def test_takes_a_picture_as_base64(self, server: Server, rng: np.random.Generator) -> None:
        import base64

        image = cv2.imencode(".jpg", images_for("noising", rng)[0])[1].tobytes()
        inputs = {"name": "encoded", "shape": [1, 1], "datatype": "BYTES"}
        inputs["data"] = [base64.b64encode(image).decode()]
        body = {"id": "7", "inputs": [inputs], "outputs": [{"name": "json"}]}
        status, answer = server.call(
            "v2/models/noising/infer",
            json.dumps(body).encode(),
            **{"Content-Type": "application/json"},
        )
        assert status == 200 and answer["id"] == "7"
        assert json.loads(answer["outputs"][0]["data"][0])["label"] in ("normal", "anomalous")

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            ("v2/models/noising/infer", b"{}", 400),
            ("v2/models/noising/infer", b'{"inputs": [{"name": "images"', 400),
            ("v2/models/noising/infer", b'{"inputs": []}', 400),
            ("v2/models/noising/infer", b"x" * (3 << 20), 413),
            ("v2/models/%2e%2e%2f%2e%2e%2fetc/infer", b'{"inputs": []}', 404),
            ("v2/repository/models/..%2f..%2fetc/load", b"", 404),
            ("v2/repository/models/other/load", b"", 404),
            ("v2/repository/models/noising/unload", b"", 400),
            ("v1/models/noising:predict", b'{"instances": []}', 400),
        ],
    )
    def test_refuses_with_a_reason(
        self, server: Server, path: str, body: bytes, status: int
    ) -> None:
        got, answer = server.call(path, body, **{"Content-Type": "application/json"})
        assert got == status
        assert answer.get("error") or answer.get("detail")

    @pytest.mark.parametrize("length", ["x", "-1", "0", "999999"])
    def test_refuses_a_length_that_is_none(self, server: Server, length: str) -> None:
        headers = {"Content-Type": "application/octet-stream"}
        headers["Inference-Header-Content-Length"] = length
        status, answer = server.call("v2/models/noising/infer", b'{"inputs": []}', **headers)
        assert status == 400 and answer["error"]

    @pytest.mark.parametrize("parameters", [["x"], "x", 7])
    @pytest.mark.parametrize("place", ["request", "input", "output"])
    def test_refuses_parameters_that_are_none(
        self, server: Server, place: str, parameters: object
    ) -> None:
        one = {"name": "images", "shape": [1, 1, 1, 3], "datatype": "UINT8", "data": [1, 2, 3]}
        body: dict[str, Any] = {"inputs": [one], "outputs": [{"name": "score"}]}
        of = {"request": body, "input": one, "output": body["outputs"][0]}
        of[place]["parameters"] = parameters
        text = json.dumps(body).encode()
        headers = {"Content-Type": "application/octet-stream"}
        headers["Inference-Header-Content-Length"] = str(len(text))

        status, answer = server.call("v2/models/noising/infer", text, **headers)

        assert status == 400 and "'parameters' are no object" in answer["error"]

    def test_counts_for_prometheus(self, server: Server, rng: np.random.Generator) -> None:
        server.infer("grpc", "refdet", "images", images_for("refdet", rng))
        with urllib.request.urlopen(f"http://{server.http}/metrics", timeout=60) as reply:
            text = reply.read().decode()
        counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
        answered = float(counts['engineworks_pictures_total{model="refdet"}'])
        assert answered >= 2 and answered % 2 == 0
        assert float(counts['engineworks_requests_running{model="refdet"}']) == 0
        assert any(line.startswith("engineworks_bundle{") and 'digest="' in line for line in counts)


def test_an_answer_does_not_wait_for_the_acknowledgement_of_its_head() -> None:
    code = (  # in a process of its own: kserve and tritonclient cannot live in one
        "import socket; from engineworks.runtime.serving.server import listen\n"
        "with listen('127.0.0.1', 0) as server, socket.create_connection(server.getsockname()):\n"
        "    print(server.accept()[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert int(done.stdout) != 0


def test_it_listens_at_this_machine_alone(server: Server) -> None:
    for address in (server.http, server.grpc):
        assert address.startswith("127.0.0.1:")
        with socket.socket() as other, pytest.raises(OSError):
            other.settimeout(5)
            other.connect(("127.0.0.2", int(address.rsplit(":", 1)[1])))


class TestASwap:
    def test_drops_no_request_and_refuses_a_damaged_bundle(self, tmp_path: Path) -> None:
        folder = tmp_path / "part"
        write_tiny_noising_bundle(folder)
        old = read(folder).manifest.digest
        image = np.zeros((1, 64, 64, 3), np.uint8)
        with serving(folder) as server:
            module, client = server.client("grpc")
            given = module.InferInput("images", [1, 64, 64, 3], "UINT8")
            given.set_data_from_numpy(image)
            done = threading.Event()

            def ask() -> list[tuple[str, float]]:
                told = []
                while not done.is_set() or not told:
                    answer = client.infer("part", [given])
                    threshold = float(answer.as_numpy("threshold")[0, 0])
                    told.append((answer.get_response().model_version, threshold))
                return told

            with ThreadPoolExecutor(2) as pool:
                asked = [pool.submit(ask) for _ in range(2)]
                statuses = []
                for value in (5.0, 6.0):
                    set_threshold(read(folder), "image", value)
                    statuses.append(server.call("v2/repository/models/part/load", b"")[0])
                shutil.copytree(folder, tmp_path / "good")
                graph = next(folder.glob("*.onnx"))
                graph.write_bytes(graph.read_bytes()[:-1] + b"x")
                refused, why = server.call("v2/repository/models/part/load", b"")
                done.set()
                told = [each for answers_ in asked for each in answers_.result()]
            assert statuses == [200, 200]
            assert refused == 500 and graph.name in why["error"]
            digests = {digest for digest, _ in told}
            assert len(digests) <= 3 and {value for d, value in told if d != old} <= {5.0, 6.0}
            answer = client.infer("part", [given])
            assert float(answer.as_numpy("threshold")[0, 0]) == 6.0
            # a signal does the same for all bundles
            shutil.rmtree(folder)
            shutil.copytree(tmp_path / "good", folder)
            set_threshold(read(folder), "image", 8.0)
            server.process.send_signal(signal.SIGHUP)
            assert read(folder).manifest.digest[:12] in next(server.lines)
            answer = client.infer("part", [given])
            assert float(answer.as_numpy("threshold")[0, 0]) == 8.0


def test_requests_that_wait_are_joined_where_that_is_asked_for(
    bundles: Path, tmp_path: Path
) -> None:
    """As ``System.infer`` joins them; answers are those of a list of pictures."""
    options = ["--max-batch", 4, "--max-wait-ms", 5, "--keep", tmp_path, "doubtful:1MB"]
    image = np.zeros((1, 64, 64, 3), np.uint8)
    with serving(bundles / "noising", *options) as server, ThreadPoolExecutor(8) as pool:
        asked = [
            pool.submit(server.infer, "grpc", "noising", "images", image, "score")
            for _ in range(16)
        ]
        scores = {float(each.result().as_numpy("score")[0, 0]) for each in asked}
    assert max(scores) - min(scores) < 1e-4 * max(scores)
    assert (tmp_path / "noising").is_dir()


class TestTheLimits:
    def test_cut_off_a_request_that_does_not_arrive(self) -> None:
        from engineworks.runtime.serving.limits import Limits

        sent: list[dict[str, Any]] = []

        async def app(*_: object) -> None:
            raise AssertionError("a request that has not arrived is no request")

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(60)
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        limits = Limits(app, max_bytes=10, timeout_s=0.01)
        asyncio.run(limits({"type": "http", "method": "POST", "headers": []}, receive, send))
        assert sent[0]["status"] == 408

    def test_pass_on_no_error_that_was_answered(self) -> None:
        from engineworks.runtime.serving.limits import Limits

        asked: list[dict[str, Any]] = []

        async def app(scope: dict[str, Any], *_: object) -> None:
            asked.append(scope)
            raise ValueError("uvicorn would print this with its traceback")

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"{}"}

        async def send(_message: dict[str, Any]) -> None: ...

        scope = {"type": "http", "method": "POST", "headers": []}
        asyncio.run(Limits(app, max_bytes=10, timeout_s=5)(scope, receive, send))
        assert asked == [scope]

    def test_an_answer_that_takes_too_long_is_given_up(self, bundles: Path) -> None:
        with serving(bundles / "noising", "--timeout", "0.0001") as server:
            from tritonclient.utils import InferenceServerException

            with pytest.raises(InferenceServerException, match=r"UNAVAILABLE.*took longer"):
                # work for many times as long
                server.infer("grpc", "noising", "images", np.zeros((8, 512, 512, 3), np.uint8))


class TestTheCommand:
    @pytest.mark.parametrize(
        ("arguments", "code", "reason"),
        [
            (["{0}/noising", "{0}/noising"], 2, "two models are named"),
            (["a/b={0}/noising"], 2, "no name"),
            (["{0}/nothing"], 1, "nothing"),
            (["{0}/noising", "--tls-cert", "x"], 2, "certificate and its key"),
            (["{0}/noising", "--http-port", "{1}"], 1, "in use"),
        ],
    )
    def test_says_what_is_wrong(
        self, bundles: Path, arguments: list[str], code: int, reason: str
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            command = [each.format(bundles, port) for each in arguments]
            done = subprocess.run(
                [sys.executable, "cli.py", "serve", "--grpc-port", "0", *command],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        assert done.returncode == code, done.stderr
        assert reason in done.stderr and "Traceback" not in done.stderr

    def test_serves_tls(self, bundles: Path, tmp_path: Path) -> None:
        key, certificate = write_certificate(tmp_path)
        options = ["--tls-cert", certificate, "--tls-key", key]
        with serving(bundles / "noising", *options) as server:
            import grpc

            secure = grpc.ssl_channel_credentials(certificate.read_bytes())
            client = grpc_client.InferenceServerClient(
                server.grpc.replace("127.0.0.1", "localhost"), ssl=True, creds=secure
            )
            assert client.is_server_live()
            import ssl

            context = ssl.create_default_context(cafile=str(certificate))
            address = f"https://{server.http.replace('127.0.0.1', 'localhost')}/v2/health/live"
            with urllib.request.urlopen(address, context=context, timeout=60) as reply:
                assert reply.status == 200


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A key, and a certificate of its own for localhost."""
    from datetime import UTC, datetime, timedelta

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    return folder / "key.pem", folder / "cert.pem"
