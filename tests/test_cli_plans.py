"""``export --half`` and ``--plan`` as a user calls them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from engineworks import cli
from engineworks.runtime.bundle import read
from engineworks.runtime.testing import write_tiny_noising_bundle
from tests.export import trt_stub


def export(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["export", *map(str, arguments)])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Float and INT8; read-only."""
    folder = tmp_path_factory.mktemp("tiny") / "bundle"
    write_tiny_noising_bundle(folder, int8=True)
    return folder


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Any:
    fake = trt_stub.tensorrt("11.4.0.106", inputs={"images": (-1, 3, 64, 64)})
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    trt_stub.forget()
    yield fake
    trt_stub.forget()


def test_half_adds_graphs_and_shows_how_near_they_are(tiny: Path, tmp_path: Path) -> None:
    done = export(tiny, "--out", tmp_path / "out", "--half", "fp16,bf16")
    assert done.exit_code == 0, done.output
    assert {"fp16", "bf16"} <= set(read(tmp_path / "out").manifest.graphs["features"].variants)
    assert "float to fp16" in done.output
    assert "features fp16: " in done.output


def test_plan_adds_plans_with_every_wish_noted(tiny: Path, tmp_path: Path, tensorrt: Any) -> None:
    out = tmp_path / "out"
    wishes = ("--profile", "batch=1:1:1", "--profile", "batch=2:4:8", "--workspace", 256)
    done = export(tiny, "--out", out, "--plan", "float,int8", *wishes)
    assert done.exit_code == 0, done.output
    noted = read(out).manifest.provenance["plans"]["features"]
    assert set(noted) == {"float-plan", "int8-plan"}
    config = noted["int8-plan"]["config"]
    assert config["workspace_mib"] == 256
    assert config["profiles"] == [{"batch": [1, 1, 1]}, {"batch": [2, 4, 8]}]


def test_a_plan_without_tensorrt_names_the_install_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    done = export(tiny, "--out", tmp_path / "out", "--plan", "float")
    assert done.exit_code == 1
    assert 'pip install "engineworks[gpu]"' in done.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "exported already"),
        (("--plan", "float", "--profile", "batch"), "AXIS=MIN:OPT:MAX"),
        (("--plan", "fp8"), "there is no precision fp8"),
        (("--half", "fp8"), "there is no precision fp8"),
        (("--profile", "batch=1:1:1"), "have no meaning without --plan"),
        (("--version-compatible",), "have no meaning without --plan"),
        (("--half", "fp16", "--eval", "."), "has no meaning without --int8"),
    ],
)
def test_a_misuse_is_explained_and_exits_with_2(
    tiny: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    done = export(tiny, "--out", tmp_path / "out", *options)
    assert done.exit_code == 2
    assert said in done.output
    assert not (tmp_path / "out").exists()
