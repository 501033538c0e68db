from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from engineworks.runtime.bundle import MANIFEST_NAME, Bundle, read, write
from engineworks.runtime.testing import (
    write_parts,
    write_tiny_noising_bundle,
)
from tests.command import (
    Answer,
    cli,
    refused,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_parts(tmp_path_factory.mktemp("data"), size=(48, 64), num_train=10)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that no torch was needed for; read-only."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny_noising_bundle(folder, int8=True)
    return folder


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def changed(bundle: Bundle, out: Path, **update: Any) -> Bundle:
    """The same bundle with another manifest."""
    files = {name: bundle.path(name) for name in bundle.manifest.files}
    return write(out, bundle.manifest.model_copy(update=update), files)


class TestAMistake:
    def test_in_an_option_is_usage(self, tiny: Path, tmp_path: Path) -> None:
        answer = cli("infer", tiny, "--sorce", "x", "--out", tmp_path / "out")
        refused(answer, 2, "--sorce", "--source")

    def test_in_a_command_is_usage(self) -> None:
        refused(cli("infr"), 2, "infr")

    @pytest.mark.parametrize("command", ["sample", "train"])
    def test_in_a_system_names_the_systems(self, command: str, data: Path, tmp_path: Path) -> None:
        options = ["--data", data] if command == "train" else []
        answer = cli(command, "noisng", *options, "--out", tmp_path / "out")
        refused(answer, 2, "noisng", "choose one of noising")
        assert not (tmp_path / "out").exists()

    def test_in_a_backend_names_the_backends(self, tiny: Path, data: Path, tmp_path: Path) -> None:
        answer = cli(
            *("infer", tiny, "--source", data, "--out", tmp_path / "o", "--backend", "tensort")
        )
        refused(answer, 2, "openvino", "tensorrt")

    @pytest.mark.train
    def test_in_a_setting_names_the_nearest_key(self, data: Path, tmp_path: Path) -> None:
        answer = cli(
            *("train", "noising", "--data", data, "--out", tmp_path / "run"),
            *("--set", "fit.coreset_ration=0.1"),
        )
        refused(answer, 2, "fit.coreset_ration", "did you mean fit.coreset_ratio")
        assert not (tmp_path / "run").exists()

    @pytest.mark.train
    @pytest.mark.parametrize(
        ("setting", "word"),
        [("fit.k=nine", "fit.k"), ("fit.k", "key=value"), ("backbone.stages=[1", "YAML")],
    )
    def test_in_a_value_says_which(
        self, setting: str, word: str, data: Path, tmp_path: Path
    ) -> None:
        answer = cli(
            *("train", "noising", "--data", data, "--out", tmp_path / "run", "--set", setting)
        )
        refused(answer, 2, word)

    @pytest.mark.parametrize("batches", ["0", "one", "1,", ""])
    def test_in_the_batch_sizes_of_bench_is_usage(self, batches: str, tiny: Path) -> None:
        refused(cli("bench", tiny, "--batch", batches), 2, "--batch")

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            (("--int8",), "--samples"),
            (("--eval", "."), "--int8"),
            (("--fail-on-drop",), "--int8"),
            (("--sensitivity",), "--int8"),
            ((), "--int8"),
        ],
    )
    def test_in_what_export_needs_is_usage(
        self, options: tuple[str, ...], word: str, tiny: Path, tmp_path: Path
    ) -> None:
        refused(cli("export", tiny, "--out", tmp_path / "out", *options), 2, word)
        assert not (tmp_path / "out").exists()


class TestSomethingThatIsNotThere:
    @pytest.mark.train
    def test_weights(self, data: Path, tmp_path: Path) -> None:
        answer = cli(
            *("train", "noising", "--data", data, "--out", tmp_path / "run"),
            *("--set", f"backbone.weights={tmp_path}/lost.safetensors"),
        )
        refused(answer, 1, "lost.safetensors", "backbone.weights")

    def test_a_backend_is_an_error_with_its_install_line(
        self, tiny: Path, data: Path, tmp_path: Path
    ) -> None:
        import importlib.util

        if importlib.util.find_spec("tensorrt"):
            pytest.skip("TensorRT is installed here")
        answer = cli(
            *("infer", tiny, "--source", data, "--out", tmp_path / "o", "--backend", "tensorrt")
        )
        refused(answer, 1, "tensorrt", 'pip install "engineworks[gpu]"')
        assert not (tmp_path / "o").exists()

    def test_a_source(self, tiny: Path, tmp_path: Path) -> None:
        answer = cli("infer", tiny, "--source", tmp_path / "lost", "--out", tmp_path / "out")
        refused(answer, 1, "lost")

    def test_a_bundle(self, data: Path, tmp_path: Path) -> None:
        answer = cli("infer", tmp_path, "--source", data, "--out", tmp_path / "out")
        refused(answer, 1, MANIFEST_NAME)

    def test_a_run(self, tmp_path: Path) -> None:
        refused(cli("export", tmp_path / "lost", "--out", tmp_path / "out"), 2, "lost")

    def test_labels(self, tiny: Path, tmp_path: Path) -> None:
        refused(cli("eval", tiny, "--data", tmp_path), 1, "train/good")

    def test_an_int8_graph(self, data: Path, tmp_path: Path) -> None:
        write_tiny_noising_bundle(tmp_path / "float")
        answer = cli(
            *("infer", tmp_path / "float", "--source", data / "test", "--out", tmp_path / "o"),
            *("--precision", "int8"),
        )
        refused(answer, 1, "int8", "--samples")


FILES = ("features.onnx", "features.int8.onnx", "features.int8-u8.onnx", "bank.faiss")


class TestADamagedBundle:
    def infer(self, bundle: Path, data: Path, tmp_path: Path) -> Answer:
        return cli("infer", bundle, "--source", data / "test", "--out", tmp_path / "out")

    def test_has_only_the_files_that_are_damaged_below(self, tiny: Path) -> None:
        assert sorted(p.name for p in tiny.iterdir()) == sorted((*FILES, MANIFEST_NAME))

    @pytest.mark.parametrize("name", [*FILES, MANIFEST_NAME])
    def test_one_flipped_byte_in_any_file_is_found_before_it_is_opened(
        self, name: str, copy: Path, data: Path, tmp_path: Path
    ) -> None:
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        refused(self.infer(copy, data, tmp_path), 1, name)

    def test_a_missing_file_is_named(self, copy: Path, data: Path, tmp_path: Path) -> None:
        (copy / "bank.faiss").unlink()
        refused(self.infer(copy, data, tmp_path), 1, "missing", "bank.faiss")

    def test_a_file_too_many_is_named(self, copy: Path, data: Path, tmp_path: Path) -> None:
        (copy / "notes.txt").write_text("mine")
        refused(self.infer(copy, data, tmp_path), 1, "extra", "notes.txt")

    def test_another_schema_version_says_both_versions(
        self, copy: Path, data: Path, tmp_path: Path
    ) -> None:
        content = json.loads((copy / MANIFEST_NAME).read_text())
        content["schema_version"] = 2
        (copy / MANIFEST_NAME).write_text(json.dumps(content))
        refused(self.infer(copy, data, tmp_path), 1, "schema version 2", "reads version 1")

    def test_another_system_names_those_that_are_known(
        self, copy: Path, data: Path, tmp_path: Path
    ) -> None:
        changed(read(copy), tmp_path / "other", system="weaving")
        answer = self.infer(tmp_path / "other", data, tmp_path)
        refused(answer, answer.code, "weaving", "noising")
        assert answer.code != 0
