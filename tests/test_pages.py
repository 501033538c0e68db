"""What the pages say, done: each command in its order, and the Python beside it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.command import Answer, interpreter, python

ROOT = Path(__file__).parents[1]
# in the order in which a reader follows them: each takes up what those before have made
PAGES = (
    "README.md",
    "docs/tutorials/noising.md",
    "docs/tutorials/paco.md",
    "docs/tutorials/refdet.md",
    "docs/tutorials/stripe.md",
    "docs/tutorials/backbone.md",
    "docs/how-to/move-a-threshold.md",
    "docs/how-to/read-in-cpp.md",
)
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
OTHERS = {
    "docs/add-a-system.md": "has a test of its own, with its files in their places",
    "docs/bundle-format.md": "has a test of its own",
    "docs/gpu.md": "needs a GPU",
    "docs/scale.md": "its server never ends; callers and sources have tests of their own",
}
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
INSTALLATION = ("git", "cd", "make", "pip", "python3", "source")
# smaller pictures, fewer sizes, samples and judged frames, one way to choose ranges instead of
# five, shorter timing than a reader wants; every command is otherwise as it stands
SMALL = ["--set", "preprocess.size=[64, 64]"]
FEW = ["--set", "inference.max_evaluated=8"]
NARROW = ["--set", "match.num_sizes=4", "--set", "match.follow.num_sizes=2"]
FASTER = {
    "train noising": [*SMALL, "--set", "fit.max_rows=100"],
    "train paco": [*SMALL, "--set", "train.epochs=1", "--set", "parts.window=1"],
    "train refdet": [*FEW, "--set", "train.epochs=1", "--set", "episodes.num=2"],
    "train refdet --config match": [*FEW, *NARROW],
    "train refdet --config learn": [*FEW, *NARROW, "--set", "match.relation.frames=12"],
    "train stripe": ["--set", "tiles.repeat=1", "--set", "train.epochs=1"],
    "export": ["--method", "minmax", "--num-samples", "8", "--seconds", "0.1"],
    "bench": ["--seconds", "0.05"],
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    """Lines behind ``$`` in console blocks, continuations joined."""
    joined = "".join(blocks(text, "console")).replace("\\\n", " ")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def is_installation(command: str) -> bool:
    return all(part.split()[0] in INSTALLATION for part in command.split("&&"))


def pages_with_python() -> dict[str, list[str]]:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    found = {
        page.relative_to(ROOT).as_posix(): blocks(page.read_text(encoding="utf-8"), "python")
        for page in pages
    }
    return {name: code for name, code in found.items() if code}


@dataclass(frozen=True)
class Played:
    """What commands and Python of all pages answered, by page and text."""

    folder: Path
    answers: dict[tuple[str, str], Answer]

    def of(self, page: str) -> str:
        return "".join(answer.out for (name, _), answer in self.answers.items() if name == page)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    """All commands but the installation, and all Python, in one folder that was empty."""
    folder = tmp_path_factory.mktemp("pages")

    answers = {}
    for page, text in TEXTS.items():
        for command in filter(lambda command: not is_installation(command), commands(text)):
            program, script, *rest = shlex.split(command)
            assert program == "python", command
            kinds = [each for each in FASTER if " ".join(rest).startswith(each)]
            faster = FASTER[max(kinds, key=len)] if kinds and script == "cli.py" else []
            # what a newcomer reads first is run by an interpreter that starts as theirs does
            run = interpreter if page == "README.md" else python
            answers[page, command] = run(ROOT / script, *rest, *faster, cwd=folder)
        for code in blocks(text, "python"):
            answers[page, code] = python("-c", code, cwd=folder)
    return Played(folder, answers)


@pytest.mark.train
@pytest.mark.slow
class TestThePages:
    def test_have_commands_and_python_that_all_work(self, played: Played) -> None:
        assert len(played.answers) >= 30
        for (page, text), answer in played.answers.items():
            assert answer.code == 0, f"{page}: {text}\n{answer.all}"

    def test_show_every_command_of_the_workflow(self, played: Played) -> None:
        verbs = {shlex.split(text)[2] for _, text in played.answers if "python cli.py" in text}
        workflow = {"sample", "check", "train", "export", "infer", "eval", "bench"}
        assert verbs == workflow | {"bundle", "bank", "refs"}

    def test_show_every_example(self, played: Played) -> None:
        shown = {Path(part) for _, text in played.answers for part in text.split()[1:2]}
        assert {example.relative_to(ROOT) for example in EXAMPLES} <= shown
        assert len(EXAMPLES) >= 2

    def test_promise_files_that_are_there(self, played: Played) -> None:
        first = played.folder / "runs" / "first"
        assert len((first / "pictures/results.jsonl").read_text().splitlines()) == 40
        assert len(list((first / "pictures/overlays").rglob("*.png"))) == 40
        assert (first / "video/video.mp4").stat().st_size > 0
        assert "image_auroc" in json.loads((first / "metrics.json").read_text())["metrics"]

    def test_time_eager_pytorch_beside_every_backend(self, played: Played) -> None:
        report = json.loads((played.folder / "runs/first/bench.json").read_text())
        found = {(row["name"], row["precision"], row["covers"]) for row in report["rows"]}
        for covers in ("network", "images to results"):
            for name in ("eager channels_last", "torch.compile", "openvino"):
                assert {(name, "float", covers), (name, "bf16", covers)} <= found
            for name in ("openvino", "ort"):
                assert (name, "int8", covers) in found

    def test_show_results_of_python(self, played: Played) -> None:
        assert "(64, 64)" in played.of("README.md")  # of the map

    def test_read_a_bundle_without_engineworks_as_the_system_does(self, played: Played) -> None:
        from engineworks import PacoSystem, open_bundle, read_image

        label, probability = played.of("docs/how-to/read-in-cpp.md").split()
        picture = min((played.folder / "runs/moths/data/test").rglob("*.jpg"))
        bundle = played.folder / "runs/moths/bundle"
        with open_bundle(bundle, PacoSystem, backend="ort", precision="float") as system:
            (result,) = system.infer([read_image(picture)])
        assert label == result.label
        # four digits are printed; the sums of the two differ in the order of float32 additions
        assert float(probability) == pytest.approx(result.probability, abs=1e-4)

    def test_run_all_python_that_there_is(self) -> None:
        assert set(pages_with_python()) <= {*PAGES, *OTHERS}

    def test_have_python_that_passes_mypy_strict(self, tmp_path: Path) -> None:
        files = [*EXAMPLES]
        for page, codes in pages_with_python().items():
            if page == "docs/add-a-system.md":  # its blocks import each other
                continue
            for i, code in enumerate(codes):
                name = re.sub(r"\W", "_", page.removesuffix(".md")).lower()
                files.append(tmp_path / f"{name}_{i}.py")
                files[-1].write_text(code, encoding="utf-8")
        # the settings of the tree: strict, and packages without types are not read
        done = subprocess.run(
            [sys.executable, "-m", "mypy", "--config-file", "setup.cfg", *map(str, files)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout


class TestTheMakefile:
    def test_has_every_target_that_the_readme_names(self) -> None:
        from engineworks.training.systems import TASKS

        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
        targets |= {f"demo-{system}" for system in TASKS}
        assert {"help", "demo", "test", "lint", "docs", "bench", "test-gpu"} <= targets
        assert set(re.findall(r"`make ([a-z-]+)`", TEXTS["README.md"])) <= targets

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
