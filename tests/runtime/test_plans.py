"""Whether a plan may be loaded here, and the command that builds it anew."""

from __future__ import annotations

import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.commands.options import plan_options
from engineworks.runtime import gpu, plans
from engineworks.runtime.bundle import Bundle, read, write
from engineworks.runtime.engines import BACKENDS
from engineworks.runtime.errors import BackendError, BundleError, EngineError, UsageError
from engineworks.runtime.plans import (
    PLANS,
    Machine,
    PlanConfig,
    PlanOrigin,
    check_origin,
    origin_of,
    parse_profile,
    rebuild_command,
    why_not,
)
from engineworks.runtime.systems import open_engines
from engineworks.runtime.testing import write_tiny_noising_bundle

H200 = Machine(
    tensorrt="11.4.0.106",
    platform="linux-x86_64",
    gpu="NVIDIA H200",
    compute_capability="9.0",
    driver="580.65.06",
    cuda="13.0",
)
H100 = H200.model_copy(update={"gpu": "NVIDIA H100"})
A100 = H200.model_copy(update={"gpu": "NVIDIA A100", "compute_capability": "8.0"})
T4 = H200.model_copy(update={"gpu": "Tesla T4", "compute_capability": "7.5"})


def origin(machine: Machine = H200, sha256: str = "0" * 64, **config: Any) -> PlanOrigin:
    return PlanOrigin(
        source="float", source_sha256=sha256, machine=machine, config=PlanConfig(**config)
    )


def with_plan(folder: Path, made: PlanOrigin | None, *, own_source: bool = True) -> Bundle:
    """A bundle with a float plan of ``features`` that is none, and what its manifest says of it."""
    bundle = write_tiny_noising_bundle(folder / "float")
    manifest = bundle.manifest
    graph = manifest.graphs["features"]
    file = folder / "features.float.plan"
    file.write_bytes(b"a plan")
    provenance = dict(manifest.provenance)
    if made is not None:
        if own_source:
            sha256 = manifest.files[graph.variants["float"]].sha256
            made = made.model_copy(update={"source_sha256": sha256})
        provenance["plans"] = {"features": {"float-plan": made.model_dump(mode="json")}}
    variants = {**graph.variants, "float-plan": file.name}
    changed = manifest.model_copy(
        update={
            "graphs": {"features": graph.model_copy(update={"variants": variants})},
            "provenance": provenance,
        }
    )
    files = {name: bundle.path(name) for name in manifest.files}
    write(folder / "bundle", changed, {**files, file.name: file})
    return read(folder / "bundle")


class TestAPlan:
    def test_is_loaded_where_it_was_built(self) -> None:
        assert why_not(origin(), H200) is None

    def test_does_not_mind_another_driver(self) -> None:
        assert (
            why_not(origin(), H200.model_copy(update={"driver": "590.1", "cuda": "13.2"})) is None
        )

    @pytest.mark.parametrize("field", ["tensorrt", "platform", "gpu", "compute_capability"])
    def test_is_refused_where_one_thing_is_another(self, field: str) -> None:
        here = {"tensorrt": "11.4.1.2", "platform": "linux-aarch64", "gpu": "NVIDIA B200"}
        changed = H200.model_copy(update={field: here.get(field, "10.0")})
        reason = why_not(origin(), changed)
        assert reason is not None
        assert getattr(H200, field) in reason
        assert getattr(changed, field) in reason

    def test_is_refused_without_a_gpu_on_either_side(self) -> None:
        none = H200.model_copy(update={"gpu": "", "compute_capability": ""})
        assert "without a GPU" in str(why_not(origin(none), H200))
        assert "without a GPU" in str(why_not(origin(none), none))
        assert "no GPU is found here" in str(why_not(origin(), none))

    @pytest.mark.parametrize(
        ("hardware", "taken"),
        [
            ("none", [H200]),
            ("same-compute-capability", [H200, H100]),
            ("ampere-plus", [H200, H100, A100]),
        ],
    )
    def test_runs_on_the_gpus_that_it_was_asked_to(
        self, hardware: str, taken: list[Machine]
    ) -> None:
        made = origin(hardware=hardware)
        assert [m for m in (H200, H100, A100, T4) if why_not(made, m) is None] == taken

    @pytest.mark.parametrize(
        ("built", "here", "taken"),
        [
            ("10.13.3.9", "11.4.0.106", True),
            ("11.1.0.106", "11.4.0.106", True),
            ("11.4.0.106", "11.4.0.106", True),
            ("11.4.0.106", "11.1.0.106", False),
            ("11.4.0.106", "10.16.1.11", False),
        ],
    )
    def test_that_is_version_compatible_runs_on_later_versions_alone(
        self, built: str, here: str, taken: bool
    ) -> None:
        made = H200.model_copy(update={"tensorrt": built})
        reason = why_not(
            origin(made, version_compatible=True), H200.model_copy(update={"tensorrt": here})
        )
        assert (reason is None) == taken


class TestABundle:
    def test_gives_the_origin_of_its_plan(self, tmp_path: Path) -> None:
        bundle = with_plan(tmp_path, origin(workspace_mib=512))
        found = check_origin(bundle, "features", "float-plan", H200)
        assert found.machine == H200
        assert found.config == PlanConfig(workspace_mib=512)

    def test_that_was_built_elsewhere_is_refused_with_the_command(self, tmp_path: Path) -> None:
        bundle = with_plan(tmp_path, origin(profiles=({"batch": (1, 2, 4)},)))
        with pytest.raises(EngineError, match="NVIDIA A100") as caught:
            check_origin(bundle, "features", "float-plan", A100)
        root = bundle.root
        assert caught.value.fix == (
            f"build it here: cli.py export {root} --out {root} --exist-ok "
            "--plan float --profile batch=1:2:4"
        )

    def test_whose_graph_has_changed_since_is_refused(self, tmp_path: Path) -> None:
        bundle = with_plan(tmp_path, origin(), own_source=False)
        with pytest.raises(EngineError, match="not the bundle's any more"):
            check_origin(bundle, "features", "float-plan", H200)

    def test_that_does_not_say_where_its_plan_is_from_is_refused(self, tmp_path: Path) -> None:
        bundle = with_plan(tmp_path, None)
        with pytest.raises(BundleError, match="does not say what 'float-plan'") as caught:
            origin_of(bundle, "features", "float-plan")
        assert "--plan" in str(caught.value.fix)

    def test_is_checked_before_any_engine_sees_the_plan(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bundle = with_plan(tmp_path, origin())
        monkeypatch.setattr(plans, "this_machine", lambda: A100)
        with pytest.raises(EngineError, match="cannot be loaded here"):
            open_engines(bundle, "tensorrt", "float")


class TestThisMachine:
    @pytest.fixture
    def tensorrt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module: Any = types.ModuleType("tensorrt")
        module.__version__ = "11.4.0.106"
        monkeypatch.setitem(sys.modules, "tensorrt", module)

    def test_is_told_with_its_gpu(self, tensorrt: None, monkeypatch: pytest.MonkeyPatch) -> None:
        found = gpu.Gpu("NVIDIA H200", "9.0", "580.65.06", "13.0", 1)
        monkeypatch.setattr(gpu, "find", lambda: found)
        machine = plans.this_machine()
        assert machine == H200.model_copy(update={"platform": machine.platform})
        assert machine.platform.startswith(sys.platform)

    def test_may_have_none(self, tensorrt: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "find", lambda: None)
        assert plans.this_machine().gpu == ""

    def test_without_tensorrt_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        with pytest.raises(BackendError, match="cannot be loaded") as caught:
            plans.this_machine()
        assert caught.value.fix == BACKENDS["tensorrt"].install


class TestAProfile:
    def test_is_read_axis_by_axis(self) -> None:
        assert parse_profile("batch=1:8:32, height=64:256:512") == {
            "batch": (1, 8, 32),
            "height": (64, 256, 512),
        }

    @pytest.mark.parametrize(
        "text",
        ["", "batch", "batch=1:2", "batch=1:2:3:4", "batch=a:b:c", "=1:2:3", "batch=1:8:32,"],
    )
    def test_of_another_form_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError, match=r"AXIS=MIN:OPT:MAX") as caught:
            parse_profile(text)
        assert "batch=1:8:32" in str(caught.value.fix)

    @pytest.mark.parametrize("text", ["batch=0:1:2", "batch=2:1:3", "batch=1:3:2"])
    def test_whose_sizes_do_not_rise_is_refused(self, text: str) -> None:
        with pytest.raises(UsageError, match="1 <= MIN <= OPT <= MAX"):
            parse_profile(text)

    def test_names_an_axis_once(self) -> None:
        with pytest.raises(UsageError, match="'batch' twice"):
            parse_profile("batch=1:1:1,batch=2:2:2")


sizes = st.tuples(*[st.integers(1, 5000)] * 3).map(lambda three: tuple(sorted(three)))
configs = st.builds(
    PlanConfig,
    profiles=st.lists(
        st.dictionaries(st.sampled_from(["batch", "height", "width"]), sizes, min_size=1),
        max_size=3,
    ).map(tuple),
    workspace_mib=st.none() | st.integers(1, 1 << 20),
    optimization_level=st.integers(0, 5),
    tf32=st.booleans(),
    detailed=st.booleans(),
    version_compatible=st.booleans(),
    hardware=st.sampled_from(["none", "same-compute-capability", "ampere-plus"]),
    weight_streaming=st.booleans(),
)


@settings(max_examples=30, deadline=None)
@given(config=configs, precision=st.sampled_from(sorted(PLANS)))
def test_the_rebuild_command_is_read_back_as_what_was_built(
    config: PlanConfig, precision: str
) -> None:
    """What the error prints, the command line understands, to the last option."""
    import click

    made = PlanOrigin(source="float", source_sha256="0" * 64, machine=H200, config=config)
    bundle = Bundle(root=Path("some bundle"), manifest=None)  # type: ignore[arg-type]
    words = shlex.split(rebuild_command(bundle, PLANS[precision][0], made))
    assert words[:6] == ["cli.py", "export", "some bundle", "--out", "some bundle", "--exist-ok"]
    seen: dict[str, Any] = {}

    @click.command()
    @plan_options
    def command(**options: Any) -> None:
        seen.update(options)

    done = CliRunner().invoke(command, words[6:], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert seen == {"plans": (precision,), "plan": config, "timing_cache": None}


@given(config=configs)
def test_an_origin_survives_the_manifest(config: PlanConfig) -> None:
    made = PlanOrigin(source="int8", source_sha256="f" * 64, machine=A100, config=config)
    assert PlanOrigin.model_validate_json(made.model_dump_json()) == made
