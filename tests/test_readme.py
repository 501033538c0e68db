"""What the README says, done: each command in its order, and the Python beside it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALLATION = ("git", "cd", "make", "pip", "python3", "source")
# smaller pictures, fewer samples, one way to choose ranges instead of five, shorter timing than a
# reader wants; every command is otherwise as it stands
SMALL = ["--set", "preprocess.size=[64, 64]"]
FASTER = {
    "train noising": [*SMALL, "--set", "fit.max_rows=100"],
    "train paco": [*SMALL, "--set", "train.epochs=1", "--set", "parts.window=1"],
    "train refdet": ["--set", "train.epochs=1", "--set", "episodes.num=2"],
    "train stripe": ["--set", "tiles.repeat=1", "--set", "train.epochs=1"],
    "export": ["--method", "minmax", "--num-samples", "8"],
    "bench": ["--seconds", "0.05"],
}


def commands() -> list[str]:
    """Lines behind ``$`` in console blocks, continuations joined."""
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    text = "".join(blocks).replace("\\\n", " ")
    return [line[2:] for line in text.splitlines() if line.startswith("$ ")]


def is_installation(command: str) -> bool:
    return all(part.split()[0] in INSTALLATION for part in command.split("&&"))


@dataclass(frozen=True)
class Played:
    folder: Path
    answers: dict[str, subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """All commands but the installation, in one empty folder."""
    folder = tmp_path_factory.mktemp("readme")
    answers = {}
    for command in filter(lambda command: not is_installation(command), commands()):
        program, script, verb, *rest = shlex.split(command)
        assert (program, script) == ("python", "cli.py"), command
        faster = FASTER.get(f"{verb} {rest[0]}" if verb == "train" else verb, [])
        answers[command] = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), verb, *rest, *faster],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    return Played(folder, answers)


@pytest.mark.train
@pytest.mark.slow
class TestTheReadme:
    def test_has_commands_that_all_work(self, played: Played) -> None:
        assert len(played.answers) >= 10
        for command, answer in played.answers.items():
            assert answer.returncode == 0, f"{command}\n{answer.stdout}{answer.stderr}"

    def test_shows_every_command_of_the_workflow(self, played: Played) -> None:
        verbs = {shlex.split(command)[2] for command in played.answers}
        workflow = {"sample", "check", "train", "export", "infer", "eval", "bench", "doctor"}
        assert verbs == workflow | {"bundle", "bank", "refs"}

    def test_promises_files_that_are_there(self, played: Played) -> None:
        first = played.folder / "runs" / "first"
        assert len((first / "pictures/results.jsonl").read_text().splitlines()) == 40
        assert len(list((first / "pictures/overlays").rglob("*.png"))) == 40
        assert (first / "video/video.mp4").stat().st_size > 0
        assert "image_auroc" in json.loads((first / "metrics.json").read_text())["metrics"]

    def test_times_eager_pytorch_beside_every_backend(self, played: Played) -> None:
        report = json.loads((played.folder / "runs/first/bench.json").read_text())
        found = {(row["name"], row["precision"], row["covers"]) for row in report["rows"]}
        for covers in ("network", "images to results"):
            for name in ("eager channels_last", "torch.compile", "openvino"):
                assert {(name, "float", covers), (name, "bf16", covers)} <= found
            for name in ("openvino", "ort"):
                assert (name, "int8", covers) in found

    def test_has_python_that_works(self, played: Played) -> None:
        (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        # from the tree's root, as `python` in a checkout finds the packages
        runs = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        done = subprocess.run(
            [sys.executable, "-c", runs + code],
            cwd=played.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "(64, 64)" in done.stdout


class TestTheMakefile:
    def test_has_every_target_that_the_readme_names(self) -> None:
        from engineworks.training.systems import TASKS

        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
        targets |= {f"demo-{system}" for system in TASKS}
        assert {"help", "demo", "test", "lint", "bench", "test-gpu"} <= targets
        assert set(re.findall(r"`make ([a-z-]+)`", README)) <= targets

    def test_demo_runs_every_system(self) -> None:
        from engineworks.training.systems import TASKS

        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        (listed,) = re.findall(r"^SYSTEMS := (.*)$", makefile, re.MULTILINE)
        assert listed.split() == list(TASKS)
        for system in TASKS:
            assert f"demo_{system} :=" in makefile


class TestTheBundleFormat:
    def test_tells_how_to_recompute_the_digest(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from engineworks.runtime.testing import write_tiny_noising_bundle

        write_tiny_noising_bundle(tmp_path / "bundle", int8=True)
        page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
        (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        monkeypatch.chdir(tmp_path)
        exec(compile(code, "bundle-format.md", "exec"), {})  # it asserts

    def test_names_every_field_of_the_manifest(self) -> None:
        from engineworks.runtime.bundle import GraphEntry, Manifest
        from engineworks.runtime.preprocess import PreprocessSpec

        page = (ROOT / "docs" / "bundle-format.md").read_text(encoding="utf-8")
        for part in (Manifest, GraphEntry):
            for name in part.model_fields:
                assert f"`{name}`" in page, name
        for name in PreprocessSpec.model_fields:
            assert name in page, name
