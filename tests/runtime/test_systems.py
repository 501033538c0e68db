from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from engineworks.runtime.bundle import Bundle, GraphEntry, Manifest
from engineworks.runtime.engines import BACKENDS, Backend
from engineworks.runtime.errors import BackendError, BundleError, UsageError
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.systems import (
    SYSTEMS,
    choose,
    open_engines,
    open_system,
    system_module,
    variant_of,
)
from engineworks.runtime.testing import FunctionEngine, write_tiny_noising_bundle

FLOAT = {"float": "f.onnx"}
INT8 = FLOAT | {"int8": "s.onnx", "int8-u8": "u.onnx"}


def bundle(*graphs: Mapping[str, str], ship: str | None = None) -> Bundle:
    """A bundle of graphs with these variants; nothing of it is opened."""
    manifest = Manifest(
        system="noising",
        preprocess=PreprocessSpec(size=(8, 8)),
        graphs={
            f"graph{i}": GraphEntry(inputs={}, outputs={}, variants=dict(variants))
            for i, variants in enumerate(graphs)
        },
        reports={} if ship is None else {"verdict": {"ship": ship}},
    )
    return Bundle(root=Path("somewhere"), manifest=manifest)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_noising_bundle(tmp_path_factory.mktemp("systems") / "bundle", int8=True)


@pytest.fixture
def usable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says which backends are there, whatever is installed."""

    def only(*names: str) -> None:
        rows = [BACKENDS[name] for name in names]
        monkeypatch.setattr(
            Backend, "why_not", lambda row: None if row in rows else "it is not installed"
        )

    return only


class TestChoosing:
    @pytest.mark.parametrize("ship", ["float", "int8", "bf16"])
    def test_takes_the_precision_that_the_verdict_ships(self, usable: Any, ship: str) -> None:
        usable("openvino")
        assert choose(bundle(INT8, ship=ship)) == ("openvino", ship)

    def test_takes_float_where_there_is_no_verdict(self, usable: Any) -> None:
        usable("openvino", "ort")
        assert choose(bundle(INT8)) == ("openvino", "float")

    def test_follows_the_user_against_the_verdict(self, usable: Any) -> None:
        usable("openvino", "ort")
        assert choose(bundle(INT8, ship="int8"), precision="float") == ("openvino", "float")
        assert choose(bundle(INT8, ship="float"), "ort", "int8") == ("ort", "int8")

    def test_takes_the_first_backend_of_the_table_that_is_there(self, usable: Any) -> None:
        usable("ort")
        assert choose(bundle(FLOAT)) == ("ort", "float")
        usable("ort", "openvino")
        assert choose(bundle(FLOAT)) == ("openvino", "float")

    def test_passes_over_a_backend_that_the_bundle_has_no_graphs_for(self, usable: Any) -> None:
        usable("tensorrt", "openvino", "ort")
        assert choose(bundle(FLOAT)) == ("openvino", "float")
        planned = FLOAT | {"float-plan": "f.plan"}
        assert choose(bundle(planned)) == ("tensorrt", "float")
        # every graph needs one
        assert choose(bundle(planned, FLOAT)) == ("openvino", "float")
        halved = FLOAT | {"fp16": "h.onnx"}  # no row of OpenVINO's takes it
        assert choose(bundle(halved), precision="fp16") == ("ort", "fp16")


class TestWhatCannotBeChosen:
    def test_an_unknown_precision_is_a_wrong_option(self) -> None:
        with pytest.raises(UsageError, match="'fp8'") as caught:
            choose(bundle(FLOAT), precision="fp8")
        assert "bf16" in str(caught.value.fix)

    def test_an_unknown_backend_is_a_wrong_option(self) -> None:
        with pytest.raises(UsageError, match="'onnx'"):
            choose(bundle(FLOAT), "onnx")

    def test_a_backend_that_is_not_there_is_never_replaced(self, usable: Any) -> None:
        usable("openvino")
        with pytest.raises(BackendError, match="'ort'") as caught:
            choose(bundle(FLOAT), "ort")
        assert "pip install" in str(caught.value.fix)

    def test_no_backend_at_all_is_an_error_with_the_install_line(self, usable: Any) -> None:
        usable()
        with pytest.raises(BackendError, match="no backend") as caught:
            choose(bundle(FLOAT))
        assert "pip install" in str(caught.value.fix)

    @pytest.mark.parametrize("backend", ["auto", "openvino", "ort"])
    def test_int8_that_was_not_exported_says_how_to_export_it(
        self, usable: Any, backend: str
    ) -> None:
        usable("openvino", "ort")
        for graphs in ([FLOAT], [INT8, FLOAT]):
            with pytest.raises(BundleError, match="'int8'") as caught:
                choose(bundle(*graphs), backend, "int8")
            assert "--int8" in str(caught.value.fix)

    def test_a_precision_that_the_backend_does_not_have_is_never_replaced(
        self, usable: Any
    ) -> None:
        usable("ort")
        with pytest.raises(BundleError, match="'bf16' graphs for backend ort") as caught:
            choose(bundle(INT8), "ort", "bf16")
        assert "--precision" in str(caught.value.fix)


class TestOpening:
    @pytest.mark.parametrize("backend", ["openvino", "ort"])
    @pytest.mark.parametrize("precision", ["float", "int8"])
    def test_says_what_really_runs(self, tiny: Bundle, backend: str, precision: str) -> None:
        with closing(open_system(tiny, backend=backend, precision=precision)) as system:
            assert (system.backend, system.precision) == (backend, precision)
            assert {engine.backend for engine in system.engines.values()} == {backend}

    @pytest.mark.parametrize(
        ("backend", "precision", "variant"),
        [
            ("ort", "int8", "int8-u8"),
            ("openvino", "int8", "int8-u8"),
            ("openvino", "bf16", "float"),
            ("ort", "float", "float"),
        ],
    )
    def test_takes_the_variant_that_suits_the_backend(
        self,
        tiny: Bundle,
        backend: str,
        precision: str,
        variant: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        entry = tiny.manifest.graphs["features"]
        opened: list[tuple[bytes, str, str, int | None]] = []

        def open_engine(
            model: bytes,
            backend: str,
            *,
            precision: str,
            threads: int,
            host_code: bool,
            again: object,
        ) -> FunctionEngine:
            opened.append((model, backend, precision, threads))
            return FunctionEngine(lambda feeds: {}, entry.inputs, entry.outputs)

        monkeypatch.setattr("engineworks.runtime.systems.open_engine", open_engine)
        assert list(open_engines(tiny, backend, precision, threads=3)) == ["features"]
        assert opened == [(tiny.content(entry.variants[variant]), backend, precision, 3)]

    @pytest.mark.parametrize("owner", ["openvino", "ort"])
    def test_a_backend_prefers_its_own_int8_graph_and_no_other_takes_it(self, owner: str) -> None:
        own = f"int8-{owner}"
        variants = INT8 | {own: "o.onnx"}
        assert variant_of(variants, owner, "int8") == own
        for backend in set(BACKENDS) - {owner}:
            assert variant_of(variants, backend, "int8") != own

    def test_int8_with_the_rest_in_bfloat16_runs_the_graphs_of_int8(self) -> None:
        rows = [row.variants for row in BACKENDS.values() if "int8-bf16" in row.variants]
        assert rows
        assert all(variants["int8-bf16"] == variants["int8"] for variants in rows)

    def test_with_engines_of_the_callers_own_opens_no_graph(self, tiny: Bundle) -> None:
        entry = tiny.manifest.graphs["features"]
        own = FunctionEngine(lambda feeds: {}, entry.inputs, entry.outputs)
        with closing(open_system(tiny, backend="ort", engines={"features": own})) as system:
            assert system.engines["features"] is own

    def test_of_a_variant_that_is_not_there_is_an_error(self) -> None:
        with pytest.raises(BundleError, match=r"'graph0'.*'int8'.*'ort'"):
            open_engines(bundle(FLOAT), "ort", "int8")


class TestTheTable:
    @pytest.mark.parametrize("name", list(SYSTEMS))
    def test_names_modules_with_a_system_of_that_name(self, name: str) -> None:
        module = system_module(name)
        assert name == module.NAME and callable(module.System)

    def test_does_not_know_others(self) -> None:
        with pytest.raises(UsageError, match="'noisy'") as caught:
            system_module("noisy")
        assert all(name in str(caught.value.fix) for name in SYSTEMS)
