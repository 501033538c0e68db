"""What a system demands of its bundle is asked for before anything of it is opened."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from engineworks.runtime import testing
from engineworks.runtime.bundle import MANIFEST_NAME, Bundle, GraphEntry, Manifest, read
from engineworks.runtime.contract import CheckedEngine
from engineworks.runtime.errors import BundleError, EngineError
from engineworks.runtime.systems import SYSTEMS, open_system
from engineworks.runtime.tensors import Array, Feeds, TensorSpec

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    root = tmp_path_factory.mktemp("bundles")
    return {name: getattr(testing, f"write_tiny_{name}_bundle")(root / name) for name in SYSTEMS}


def sealed(bundle: Bundle, change: Change) -> Bundle:
    """The bundle with another manifest, whose digest fits: as an attacker writes it.

    Raises:
        BundleError: `read` refuses it.
    """
    whole = bundle.manifest.model_dump(mode="json")
    content = json.loads(json.dumps(whole))
    change(content)
    rest = {key: value for key, value in content.items() if key != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path = bundle.root / MANIFEST_NAME
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    try:
        return read(bundle.root)
    finally:
        path.write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")


class TestABundle:
    @pytest.mark.parametrize("name", list(SYSTEMS))
    def test_that_is_whole_is_opened(self, bundles: dict[str, Bundle], name: str) -> None:
        same = sealed(bundles[name], lambda content: None)
        with closing(open_system(same, backend="ort", threads=1)) as system:
            assert system.bundle == bundles[name]

    @pytest.mark.parametrize("field", ["graphs", "params"])
    @pytest.mark.parametrize("name", list(SYSTEMS))
    def test_without_what_its_system_needs_is_refused(
        self, bundles: dict[str, Bundle], name: str, field: str
    ) -> None:
        with pytest.raises(BundleError):
            open_system(sealed(bundles[name], lambda c: c.update({field: {"x": {}}})))

    @pytest.mark.parametrize("what", ["thresholds", "assets"])
    def test_without_thresholds_or_assets_is_refused(
        self, bundles: dict[str, Bundle], what: str
    ) -> None:
        with pytest.raises(BundleError, match=f"no {what[:-1]} '"):
            open_system(sealed(bundles["noising"], lambda c: c.update({what: {}})))

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("noising", lambda c: c["preprocess"].update(size=[100_000, 100_000])),
            ("noising", lambda c: c["preprocess"].update(size=[64, 72])),
            ("noising", lambda c: c["params"].update(grid=[-8, -8])),
            ("noising", lambda c: c["params"].update(grid=[8, 9])),
            ("noising", lambda c: c["params"].update(k=0)),
            ("noising", lambda c: c["params"]["weights"].pop("influence")),
            ("noising", lambda c: c["params"].update(score_std=1e-300)),
            ("noising", lambda c: c.update(preprocess={"size": [64, 64], "multiple": 2})),
            ("noising", lambda c: c["preprocess"].update(mean=[0.5], std=[0.5])),
            ("paco", lambda c: c.update(labels=["one"])),
            ("paco", lambda c: c["graphs"]["classify"]["outputs"].pop("embedding")),
            ("stripe", lambda c: c["preprocess"].update(multiple=2**31)),
            ("stripe", lambda c: c["params"].update(value_range=[1.0, 1.0])),
            ("stripe", lambda c: c["params"]["inference"].update(suppression=1e9)),
            ("refdet", lambda c: c["params"].update(widths=[1, 2])),
            ("refdet", lambda c: c["params"]["reference_preprocess"].update(size=[2, 2])),
            ("backbone", lambda c: c["graphs"]["features"]["outputs"]["map"].update(shape=[1])),
            ("backbone", lambda c: c["graphs"]["features"]["inputs"]["images"].update(dtype="O")),
        ],
    )
    def test_of_nonsense_is_refused(
        self, bundles: dict[str, Bundle], name: str, change: Change
    ) -> None:
        with pytest.raises(BundleError):
            open_system(sealed(bundles[name], change))

    @pytest.mark.parametrize(
        "reports",
        [
            {"verdict": "int8"},
            {"verdict": {"ship": None}},
            {"verdict": {"ship": "int8", "reasons": 3}},
            {"parity": []},
            {"parity_half": {"fp16": {"features": {"features": {"cosine": "x"}}}}},
        ],
    )
    def test_whose_reports_nobody_could_read_is_refused(
        self, bundles: dict[str, Bundle], reports: dict[str, Any]
    ) -> None:
        with pytest.raises(BundleError, match="reports"):
            sealed(bundles["paco"], lambda c: c.update(reports=reports))

    def test_whose_graph_is_not_what_the_manifest_says_is_refused(
        self, bundles: dict[str, Bundle]
    ) -> None:
        def change(content: dict[str, Any]) -> None:
            content["graphs"]["features"]["inputs"]["images"]["shape"] = ["batch", 3, 32, 32]
            content["preprocess"]["size"] = [32, 32]

        with pytest.raises(EngineError, match=r"not the one.*'images' is.*64, 64"):
            open_system(sealed(bundles["backbone"], change), backend="ort", threads=1)

    def test_that_is_exchanged_after_it_was_checked_is_noticed(
        self, tmp_path: Path, bundles: dict[str, Bundle]
    ) -> None:
        made = testing.write_tiny_backbone_bundle(tmp_path / "bundle")
        path = made.path("features.onnx")
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

        with pytest.raises(BundleError, match="changed after"):
            open_system(made, backend="ort", threads=1)


SPEC = {"x": TensorSpec(dtype="float32", shape=("batch", 2))}


class Says:
    """An engine that gives one answer, whatever its outputs are said to be."""

    backend = "none"
    inputs = SPEC
    outputs: ClassVar = {"y": SPEC["x"]}

    def __init__(self, answer: Array) -> None:
        self.answer = answer

    def run(self, feeds: Feeds, *, stream: int | None = None) -> dict[str, Array]:
        return {"y": self.answer}

    def close(self) -> None:
        pass


def described(answer: Array) -> CheckedEngine:
    """An engine that gives this, where the manifest says (batch, 2) float32."""
    graph = GraphEntry(inputs=SPEC, outputs={"y": SPEC["x"]}, variants={})
    return CheckedEngine(Says(answer), "g", graph)


class TestAnAnswer:
    def test_that_fits_is_passed_on(self) -> None:
        answer = np.zeros((3, 2), np.float32)
        assert described(answer).run({"x": answer})["y"] is answer

    @pytest.mark.parametrize(
        "answer",
        [
            np.zeros((3, 3), np.float32),
            np.zeros((2, 2), np.float32),  # of another batch than it was asked for
            np.zeros((3,), np.float32),
            np.zeros((3, 2), np.float64),
        ],
    )
    def test_of_another_shape_or_type_is_an_error(self, answer: Array) -> None:
        with pytest.raises(EngineError, match="not the one that the manifest describes"):
            described(answer).run({"x": np.zeros((3, 2), np.float32)})


def test_old_manifests_still_read() -> None:
    """Nothing that was optional before has become a duty."""
    least = {"system": "x", "graphs": {}, "preprocess": {"size": [8, 8]}}
    assert Manifest.model_validate_json(json.dumps(least)).reports == {}
