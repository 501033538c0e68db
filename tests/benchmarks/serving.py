"""What serving costs over calling the system, what a swap does to requests, and what nonsense does.

python -m tests.benchmarks.serving BUNDLE --source DIR [--threads 1] [--other BUNDLE]

Server and clients run on one machine, each client a process of its own at a time: what the clients
take is measured too, and taken off.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http

from engineworks.runtime.serving.tensors import answers
from engineworks.runtime.sources import open_source
from engineworks.runtime.systems import open_bundle
from engineworks.runtime.tensors import Array

ROOT = Path(__file__).parents[2]
NAME = "model"
_CLIENTS = 16


class Server:
    """``serve`` as a process of its own, on free ports of this machine."""

    def __init__(self, bundle: Path, *options: str) -> None:
        command = [sys.executable, "cli.py", "serve", f"{NAME}={bundle}", "--http-port", "0"]
        self.process = subprocess.Popen(
            [*command, "--grpc-port", "0", *options], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        line = next(line for line in lines if line.startswith("http"))
        self.http, self.grpc = (part.split("//")[1] for part in line.strip().split(", "))
        self.told: list[str] = []
        threading.Thread(target=lambda: self.told.extend(lines), daemon=True).start()

    def cpu_s(self) -> float:
        user, system, *_ = psutil.Process(self.process.pid).cpu_times()
        return user + system

    def memory_mb(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 1e6


@contextmanager
def served(bundle: Path, *options: str) -> Iterator[Server]:
    server = Server(bundle, *options)
    try:
        yield server
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(40) == 0


class Client:
    """One client of ``tritonclient``, by either of its ways."""

    def __init__(self, server: Server, way: str, outputs: Sequence[str] = ()) -> None:
        self._module: Any = triton_grpc if way == "grpc" else triton_http
        address = server.grpc if way == "grpc" else server.http
        self._client = self._module.InferenceServerClient(address)
        self._wanted = [self._module.InferRequestedOutput(name) for name in outputs] or None

    def infer(self, image: Array) -> Any:
        kind = {"uint8": "UINT8", "uint16": "UINT16", "float32": "FP32"}[image.dtype.name]
        given = self._module.InferInput("images", [1, *image.shape], kind)
        given.set_data_from_numpy(image[None])
        return self._client.infer(NAME, [given], outputs=self._wanted)


def same(answer: Any, wanted: dict[str, Array]) -> bool:
    return all((answer.as_numpy(name) == array).all() for name, array in wanted.items())


def timed(work: Any, images: Sequence[Array], seconds: float) -> list[float]:
    times, until, i = [], time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        begin = time.perf_counter()
        work(images[i % len(images)])
        times.append(time.perf_counter() - begin)
        i += 1
    return times


def describe(name: str, times: Sequence[float], seconds: float, cpu_s: float) -> str:
    p50, p99 = np.quantile(times, [0.5, 0.99]) * 1e3
    return (
        f"{name}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, {len(times) / seconds:.1f} answers/s, "
        f"{cpu_s / len(times) * 1e3:.2f} ms of CPU each"
    )


def own_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(bundle: Path, images: Sequence[Array], seconds: float, options: list[str]) -> None:
    """Bare, then one client and sixteen, by both ways."""
    threads = int(options[options.index("--threads") + 1]) if "--threads" in options else None
    with open_bundle(bundle, threads=threads) as system:
        wanted = [answers(system.infer([image])) for image in images]
        timed(lambda image: system.infer([image]), images, 1)
        before = own_cpu_s()
        times = timed(lambda image: system.infer([image]), images, seconds)
        click.echo(describe("System.infer", times, seconds, own_cpu_s() - before))
    with served(bundle, *options) as server:
        for way in ("grpc", "http"):
            for outputs in ([], ["json"]):
                client = Client(server, way)
                assert all(
                    same(client.infer(image), want)
                    for image, want in zip(images, wanted, strict=True)
                ), "an answer differs"
                for num in (1, _CLIENTS):
                    clients = [Client(server, way, outputs) for _ in range(num)]
                    before = server.cpu_s()
                    with ThreadPoolExecutor(num) as pool:
                        parts = pool.map(lambda each: timed(each.infer, images, seconds), clients)
                        times = [t for part in parts for t in part]
                    name = f"{way}, {num} clients, {'json' if outputs else 'all outputs'}"
                    click.echo(describe(name, times, seconds, server.cpu_s() - before))


def swap(bundles: Sequence[Path], images: Sequence[Array], options: list[str]) -> None:
    """1,000 requests of four clients over ten swaps, and a damaged bundle among them."""
    with tempfile.TemporaryDirectory() as folder:
        live = Path(folder) / "live"
        shutil.copytree(bundles[0], live)
        with served(live, *options) as server:
            failures: Counter[str] = Counter()
            digests: Counter[str] = Counter()
            times: dict[bool, list[float]] = {False: [], True: []}
            swapping = threading.Event()

            def ask(each: Client) -> None:
                for i in range(250):
                    begin, quiet = time.perf_counter(), not swapping.is_set()
                    try:
                        answer = each.infer(images[i % len(images)])
                        digests[answer.get_response().model_version[:12]] += 1
                    except Exception as error:  # each kind is counted
                        failures[repr(error)] += 1
                    quiet = quiet and not swapping.is_set()
                    times[not quiet].append(time.perf_counter() - begin)

            def load() -> int:
                address = f"http://{server.http}/v2/repository/models/{NAME}/load"
                try:
                    with urllib.request.urlopen(address, data=b"") as reply:
                        return int(reply.status)
                except urllib.error.HTTPError as error:
                    click.echo(f"refused: {error.read().decode()[:200]}")
                    return error.code

            clients = [Client(server, "grpc") for _ in range(4)]
            statuses: Counter[int] = Counter()
            with ThreadPoolExecutor(4) as pool:
                asked = [pool.submit(ask, each) for each in clients]
                for i in range(11):
                    time.sleep(0.3)
                    swapping.set()
                    new = Path(folder) / "new"
                    shutil.copytree(bundles[i % len(bundles)], new)
                    if i == 5:  # one of them is damaged
                        graph = next(new.glob("*.onnx"))
                        graph.write_bytes(graph.read_bytes()[:-1] + b"x")
                    shutil.move(live, Path(folder) / f"old{i}")
                    new.rename(live)
                    statuses[load()] += 1
                    swapping.clear()
                for each in asked:
                    each.result()
            p99 = {key: np.quantile(value, 0.99) * 1e3 for key, value in times.items() if value}
            click.echo(
                f"1000 requests, swaps {dict(statuses)}: {sum(failures.values())} failed "
                f"{dict(failures)}, answered by {dict(digests)}, p99 "
                f"{p99.get(False, 0):.1f} ms ({len(times[False])}), while a swap goes on "
                f"{p99.get(True, 0):.1f} ms ({len(times[True])})"
            )


def nonsense(rng: random.Random) -> tuple[str, bytes, dict[str, str]]:
    """A request that is nearly one, or none at all: path, body, headers."""
    import json

    shape: Any = rng.choice([[1, 8, 8, 3], [0], [], [-1, 3], [2**40], ["a"], [1.5], None, [1] * 40])
    datatype = rng.choice(["UINT8", "FP32", "BYTES", "FP16", "INT64", "", "X", None, 3])
    data: Any = rng.choice([[0] * 192, [], ["x"], [None], [1e400], [[1], [2, 3]], "text", None])
    one = {"name": rng.choice(["images", "encoded", "x", "", 1]), "shape": shape}
    one |= {"datatype": datatype, "data": data}
    said: Any = {"inputs": rng.choice([[one], [one, one], [], {}, None, "x", [None]])}
    if rng.random() < 0.3:
        said["outputs"] = rng.choice([[{"name": "json"}], [{"name": "no"}], [{}], "x", 1])
    if rng.random() < 0.2:
        said["id"] = rng.choice([1, "", "x" * 1000, None, {}])
    binary = bytes(rng.getrandbits(8) for _ in range(rng.choice([0, 3, 192, 5000])))
    headers = {"Content-Type": rng.choice(["application/json", "application/octet-stream", "a/b"])}
    if rng.random() < 0.5 and isinstance(said["inputs"], list) and said["inputs"]:
        if rng.random() < 0.9 and isinstance(one, dict):
            one.pop("data")
            size = rng.choice([len(binary), -1, 10**9, "x", None, 0])
            one["parameters"] = rng.choice([{"binary_data_size": size}, [], None, "x"])
        text = json.dumps(said).encode()
        length = rng.choice([len(text), 0, -5, 10**9, "x", len(text) - 1])
        headers["Inference-Header-Content-Length"] = str(length)
        headers["Content-Type"] = "application/octet-stream"
        body = text + binary
    else:
        body = json.dumps(said).encode()
    if rng.random() < 0.1:
        body = struct.pack("<I", rng.getrandbits(32)) + body[: rng.randrange(len(body))]
    path = rng.choice(
        [f"v2/models/{NAME}/infer"] * 8
        + [f"v1/models/{NAME}:predict", "v2/models/../../etc/passwd/infer", "v2/models/x/infer"]
        + [f"v2/models/{NAME}/versions/7/infer", "v2/repository/models/..%2f..%2fetc/load"]
    )
    if rng.random() < 0.1:
        headers |= {"ce-id": "1", "ce-source": "x", "ce-type": "x", "ce-specversion": "1.0"}
    return path, body, headers


def fuzz(bundle: Path, count: int, options: list[str]) -> None:
    """Requests that are none: no answer without a reason, and no memory that stays."""
    rng = random.Random(0)
    statuses: Counter[int] = Counter()
    faults: list[str] = []
    with served(bundle, *options) as server:
        memory = []
        for i in range(count):
            path, body, headers = nonsense(rng)
            request = urllib.request.Request(f"http://{server.http}/{path}", body, headers)
            try:
                with urllib.request.urlopen(request, timeout=20) as reply:
                    status, text = reply.status, reply.read()
            except urllib.error.HTTPError as error:
                status, text = error.code, error.read()
            statuses[status] += 1
            if status >= 500 and status != 501:
                faults.append(f"{status} {text[:300]!r} for {path} {body[:200]!r} {headers}")
            if i % (count // 10) == count // 10 - 1:
                memory.append(server.memory_mb())
        client = Client(server, "grpc")
        client.infer(np.zeros((64, 64, 3), np.uint8))  # it still answers
    click.echo(f"{count} requests that are none: {dict(sorted(statuses.items()))}")
    click.echo(f"memory after each tenth: {', '.join(f'{mb:.0f}' for mb in memory)} MB")
    for fault in faults[:10]:
        click.echo(fault)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--source", required=True)
@click.option("--other", type=click.Path(path_type=Path), help="Swapped with BUNDLE [itself].")
@click.option("--threads", type=int)
@click.option("--seconds", type=float, default=5.0)
@click.option("--only", type=click.Choice(["measure", "swap", "fuzz"]))
@click.option("--num", type=int, default=1000, help="Requests that are none.")
def main(
    bundle: Path,
    source: str,
    other: Path | None,
    threads: int | None,
    seconds: float,
    only: str | None,
    num: int,
) -> None:
    """Print what serving costs."""
    options = [] if threads is None else ["--threads", str(threads)]
    with open_bundle(bundle, threads=1) as system:
        opened = open_source(source, system.reader)
        images = [system.reader.read(path) for path in opened.paths[:8]]
    click.echo(f"{bundle.name}, {len(os.sched_getaffinity(0))} cores, threads {threads}")
    if only in (None, "measure"):
        measure(bundle, images, seconds, options)
    if only in (None, "swap"):
        swap([bundle, other or bundle], images, options)
    if only in (None, "fuzz"):
        fuzz(bundle, num, options)


if __name__ == "__main__":
    main()
