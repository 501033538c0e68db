"""A model repository of Triton, and the real server on it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from engineworks.cli import main
from engineworks.runtime.bundle import read
from engineworks.runtime.errors import BundleError
from engineworks.runtime.serving.tensors import answers, letters, outputs
from engineworks.runtime.serving.triton import write_repository
from engineworks.runtime.systems import open_bundle
from engineworks.runtime.testing import (
    write_tiny_noising_bundle,
    write_tiny_paco_bundle,
    write_tiny_refdet_bundle,
    write_tiny_stripe_bundle,
)

ROOT = Path(__file__).parents[3]
WRITERS = {
    "noising": write_tiny_noising_bundle,
    "paco": write_tiny_paco_bundle,
    "refdet": write_tiny_refdet_bundle,
    "stripe": write_tiny_stripe_bundle,
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton")
    for name, write in WRITERS.items():
        write(folder / name)
    return folder


class TestARepository:
    def test_holds_the_system_and_each_graph(self, bundles: Path, tmp_path: Path) -> None:
        write_tiny_noising_bundle(tmp_path / "part", int8=True)
        made = write_repository(read(tmp_path / "part"), tmp_path / "models", "part")
        graphs = ["part-features-float", "part-features-int8", "part-features-int8-u8"]
        assert made == ["part", *graphs]
        assert sorted(path.name for path in (tmp_path / "models").iterdir()) == sorted(made)
        copied = read(tmp_path / "models" / "part" / "1" / "bundle")  # verified
        assert copied.manifest == read(tmp_path / "part").manifest
        for name in graphs:
            config = (tmp_path / "models" / name / "config.pbtxt").read_text()
            assert 'platform: "onnxruntime_onnx"' in config and "dims: [3, 64, 64]" in config
            assert (tmp_path / "models" / name / "1" / "model.onnx").is_file()

    def test_joins_batches_where_all_tensors_have_one(self, bundles: Path, tmp_path: Path) -> None:
        write_repository(read(bundles / "refdet"), tmp_path / "models", "find")
        sizes = {
            path.parent.name: re.findall(r"max_batch_size: (\d+)", path.read_text())[0]
            for path in (tmp_path / "models").glob("*/config.pbtxt")
        }
        assert sizes["find"] == "8"
        # prototypes are no pictures: they are not joined
        assert sizes["find-detect-float"] == "0"

    def test_is_not_written_over_another(self, bundles: Path, tmp_path: Path) -> None:
        write_repository(read(bundles / "paco"), tmp_path / "models", "a")
        with pytest.raises(BundleError, match="exists"):
            write_repository(read(bundles / "paco"), tmp_path / "models", "b")
        write_repository(read(bundles / "paco"), tmp_path / "models", "b", exist_ok=True)
        assert sorted(p.name for p in (tmp_path / "models").iterdir()) == ["b", "b-classify-float"]

    def test_comes_of_an_export_and_of_a_bundle(self, bundles: Path, tmp_path: Path) -> None:
        source, out = str(bundles / "noising"), str(tmp_path / "half")
        options = ["--half", "fp16", "--triton", str(tmp_path / "models")]
        done = CliRunner().invoke(main, ["export", source, "--out", out, *options])
        assert done.exit_code == 0, done.output
        assert (tmp_path / "models" / "half-features-fp16" / "1" / "model.onnx").is_file()
        arguments = ["bundle", "triton", source, "--out", str(tmp_path / "more"), "--name", "part"]
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0 and done.output.split() == ["part", "part-features-float"]


def tritonserver() -> Path | None:
    """The server that the wheel ``nvidia-pytriton`` brings; without a GPU it has one backend."""
    found = importlib.util.find_spec("pytriton")
    return Path(found.origin).parent / "tritonserver" if found and found.origin else None


@pytest.fixture(scope="module")
def triton(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    folder = tritonserver()
    if folder is None:
        pytest.skip("the wheel nvidia-pytriton is not here: make test-serve")
    client = pytest.importorskip("tritonclient.grpc", reason="no extra 'clients': make test-serve")
    work = tmp_path_factory.mktemp("server")
    for name in WRITERS:
        write_repository(read(bundles / name), work / name, name)
    shutil.copytree(folder / "backends", work / "backends")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    stub = shutil.copy(
        folder / "python_backend_stubs" / version / "triton_python_backend_stub",
        work / "backends" / "python",
    )
    Path(stub).chmod(0o755)
    server = shutil.copy(folder / "bin" / "tritonserver", work)
    Path(server).chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    import sysconfig

    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": os.pathsep.join(
            [str(folder.parents[1] / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR")]
        ),
        "PYTHONPATH": os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")]),
    }
    command = [server, "--model-control-mode=explicit", "--allow-http=false"]
    command += ["--allow-metrics=false", "--grpc-address=127.0.0.1", f"--grpc-port={port}"]
    command += [f"--backend-directory={work / 'backends'}"]
    for name in WRITERS:
        command += [f"--model-repository={work / name}", f"--load-model={name}"]
    with (work / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            yield _when_ready(client, process, port, work / "log"), bundles
        finally:
            process.terminate()
            process.wait(60)
    assert "PyCapsule" not in (work / "log").read_text()


def _when_ready(module: Any, process: subprocess.Popen[bytes], port: int, log: Path) -> Any:
    client = module.InferenceServerClient(f"127.0.0.1:{port}")
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        try:
            if client.is_server_ready():
                return module, client
        except module.InferenceServerException:
            time.sleep(0.2)
    if "libpython" in log.read_text():
        pytest.skip("the stub of tritonserver finds no libpython of this version")
    raise AssertionError(log.read_text()[-3000:])


class TestTheRealServer:
    @pytest.mark.parametrize("name", WRITERS)
    def test_answers_what_the_system_does_bit_for_bit(
        self, triton: tuple[Any, Path], name: str, rng: np.random.Generator
    ) -> None:
        (module, client), bundles = triton
        images = rng.integers(0, 256, (2, 72, 96, 3))
        images = images.astype(np.float32 if name == "stripe" else np.uint8)
        given = module.InferInput(
            "images", list(images.shape), "FP32" if name == "stripe" else "UINT8"
        )
        given.set_data_from_numpy(images)
        with open_bundle(bundles / name) as system:
            results = system.infer(list(images))
        answer, wanted = client.infer(name, [given]), answers(results)
        for tensor in outputs(type(results[0])):
            array, got = letters(tensor, wanted[tensor.name]), answer.as_numpy(tensor.name)
            assert got.dtype == array.dtype and got.shape == array.shape
            assert (got == array).all()
        told = [json.loads(row.tobytes()) for row in answer.as_numpy("json")]
        assert told == [result.to_json() for result in results]

    def test_refuses_what_is_no_picture(self, triton: tuple[Any, Path]) -> None:
        (module, client), _ = triton
        given = module.InferInput("encoded", [1, 8], "UINT8")
        given.set_data_from_numpy(np.frombuffer(b"no image", np.uint8)[None])
        with pytest.raises(module.InferenceServerException, match="no picture"):
            client.infer("noising", [given])
