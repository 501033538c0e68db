"""Plans: what TensorRT is asked for, in which order, and what becomes of every kind of failure.

The calls are checked against stubs with the signatures of 10.x and 11.x. Where a TensorRT builder
can be imported, real ones are built too (marker ``trt_builder``).
"""

from __future__ import annotations

import importlib
import importlib.util
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from engineworks import export
from engineworks.export.halve import halve
from engineworks.export.quantize import quantize
from engineworks.runtime.errors import BackendError, ExportError, QuantizationError
from engineworks.runtime.plans import Machine, PlanConfig, Profile, ShapeRange
from tests.export import trt_stub
from tests.export.residual_net import images, measured, residual_net

VERSIONS = ("10.13.3.9", "11.4.0.106")
INPUTS = {"image": (-1, 3, 32, 32)}
CONFIG = PlanConfig()


def batches(low: int, usual: int, high: int) -> Profile:
    return {"image": ShapeRange(*((size, 3, 32, 32) for size in (low, usual, high)))}


BATCHES = [batches(1, 2, 4)]


def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``export.plan`` as it is with the ``tensorrt`` of the moment; gone after the test."""
    trt_stub.forget()
    for name in ("plan", "deploy"):  # deploy imports it when it builds
        monkeypatch.delitem(sys.modules, f"export.{name}", raising=False)
        monkeypatch.delattr(export, name, raising=False)
    module = importlib.import_module("engineworks.export.plan")
    monkeypatch.setitem(sys.modules, "engineworks.export.plan", module)
    return module


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, version: str) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """Makes (``export.plan``, its ``tensorrt``) for a stub with the options given."""

    def make(**options: Any) -> tuple[Any, Any]:
        fake = trt_stub.tensorrt(version, **{"inputs": INPUTS, **options})
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        return load(monkeypatch), fake

    yield make
    trt_stub.forget()


@pytest.fixture(scope="module")
def model() -> bytes:
    return residual_net().SerializeToString()


@pytest.fixture(scope="module")
def pure() -> Any:
    """``export.plan`` for what of it needs no TensorRT."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        fake = trt_stub.tensorrt(VERSIONS[1], inputs=INPUTS)
        monkeypatch.setitem(sys.modules, "tensorrt", fake)
        module = load(monkeypatch)
    trt_stub.forget()
    return module


class TestABuild:
    def test_is_strongly_typed_by_the_flags_name_whatever_its_number(
        self, stub: Any, version: str, model: bytes
    ) -> None:
        plan, fake = stub()
        plan.build_plan(model, CONFIG, BATCHES)
        # STRONGLY_TYPED is 1 in 10.x and 0 in 11.x
        assert ("network", 2 if version.startswith("10") else 1) in fake.events

    def test_gives_the_bytes_and_counts_layers(self, stub: Any, model: bytes) -> None:
        plan, _ = stub()
        built = plan.build_plan(model, CONFIG, BATCHES)
        assert built.data == b"plan"
        assert built.num_layers == 7
        assert built.seconds >= 0

    def test_attaches_the_recorder_after_the_parser_is_made(self, stub: Any, model: bytes) -> None:
        plan, fake = stub()
        plan.build_plan(model, CONFIG, BATCHES)
        order = [event if isinstance(event, str) else event[0] for event in fake.events]
        assert order == ["builder", "network", "parser", "recorder", "build"]

    def test_sets_no_flag_by_itself(self, stub: Any, model: bytes) -> None:
        plan, fake = stub()
        plan.build_plan(model, CONFIG, BATCHES)
        assert fake.config.flags == {fake.BuilderFlag.TF32}  # TensorRT's own default
        assert fake.config.pools == {}
        assert fake.config.builder_optimization_level == 3
        assert fake.config.profiling_verbosity == fake.ProfilingVerbosity.DETAILED

    def test_passes_every_wish_on(self, stub: Any, model: bytes) -> None:
        plan, fake = stub()
        config = PlanConfig(
            workspace_mib=64,
            optimization_level=5,
            tf32=False,
            detailed=False,
            version_compatible=True,
            hardware="ampere-plus",
            weight_streaming=True,
        )
        plan.build_plan(model, config, BATCHES)
        flags = fake.BuilderFlag
        assert fake.config.flags == {flags.VERSION_COMPATIBLE, flags.WEIGHT_STREAMING}
        assert fake.config.pools == {fake.MemoryPoolType.WORKSPACE: 64 * 2**20}
        assert fake.config.builder_optimization_level == 5
        assert fake.config.profiling_verbosity == fake.ProfilingVerbosity.LAYER_NAMES_ONLY
        level = fake.HardwareCompatibilityLevel.AMPERE_PLUS
        assert fake.config.hardware_compatibility_level == level

    def test_hands_over_several_profiles_in_their_order(self, stub: Any, model: bytes) -> None:
        plan, fake = stub()
        plan.build_plan(model, CONFIG, [batches(1, 1, 1), batches(2, 8, 32)])
        sizes = [[shape[0] for shape in profile["image"]] for profile in fake.config.profiles]
        assert sizes == [[1, 1, 1], [2, 8, 32]]

    def test_needs_no_profile_where_nothing_is_free(self, stub: Any, model: bytes) -> None:
        plan, fake = stub(inputs={"image": (1, 3, 32, 32)})
        plan.build_plan(model, CONFIG)
        assert fake.config.profiles == []


class TestTheTimingCache:
    def test_starts_empty_and_is_written_after_the_build(
        self, stub: Any, model: bytes, tmp_path: Path
    ) -> None:
        plan, _ = stub()
        file = tmp_path / "cache"
        plan.build_plan(model, CONFIG, BATCHES, timing_cache=file)
        assert file.read_bytes() == b"timings after "

    def test_goes_on_from_what_is_there(self, stub: Any, model: bytes, tmp_path: Path) -> None:
        plan, _ = stub()
        file = tmp_path / "cache"
        file.write_bytes(b"old")
        plan.build_plan(model, CONFIG, BATCHES, timing_cache=file)
        assert file.read_bytes() == b"timings after old"

    def test_of_another_machine_is_left_out(self, stub: Any, model: bytes, tmp_path: Path) -> None:
        plan, _ = stub(cache_matches=False)
        file = tmp_path / "cache"
        file.write_bytes(b"foreign")
        plan.build_plan(model, CONFIG, BATCHES, timing_cache=file)
        assert file.read_bytes() == b"timings after "

    def test_is_not_touched_by_a_build_that_failed(
        self, stub: Any, model: bytes, tmp_path: Path
    ) -> None:
        plan, _ = stub(build=lambda _config: None)
        file = tmp_path / "cache"
        file.write_bytes(b"old")
        with pytest.raises(ExportError):
            plan.build_plan(model, CONFIG, BATCHES, timing_cache=file)
        assert file.read_bytes() == b"old"

    def test_has_version_gpu_and_cuda_in_its_name(self, stub: Any) -> None:
        plan, _ = stub()
        machine = Machine(
            tensorrt="11.4.0.106",
            platform="linux-x86_64",
            gpu="NVIDIA H200",
            compute_capability="9.0",
            cuda="13.0",
        )
        assert plan.cache_name(machine) == "timing-11.4.0.106-NVIDIA_H200-9.0-13.0.cache"
        changes = {"tensorrt": "11.4.1.0", "gpu": "NVIDIA A100/40", "cuda": "12.9"}
        names = [
            plan.cache_name(machine.model_copy(update={field: value}))
            for field, value in changes.items()
        ]
        assert len({plan.cache_name(machine), *names}) == 4
        assert all("/" not in name for name in names)


class TestAFailure:
    def test_of_the_parser_names_node_and_reason(self, stub: Any, model: bytes) -> None:
        errors = [("Unique", "Unique_0", "no importer"), ("", "", "checker failed")]
        plan, fake = stub(parse_errors=errors)
        with pytest.raises(ExportError, match="Unique 'Unique_0': no importer") as caught:
            plan.build_plan(model, CONFIG, BATCHES)
        assert "graph '': checker failed" in caught.value.message
        assert caught.value.fix
        assert "build" not in fake.events

    def test_of_the_build_gives_what_was_recorded(self, stub: Any, model: bytes) -> None:
        made: dict[str, Any] = {}

        def fail(config: Any) -> None:
            config.progress_monitor.phase_start("Timing", None, 3)
            recorder = made["fake"].recorder
            assert recorder.report_error("NO_KERNEL", "no kernel for node conv1") is False
            # C++ asks by these
            assert recorder.get_num_errors() == recorder.num_errors() == 1
            assert recorder.get_error_code(0) == "NO_KERNEL"
            assert recorder.get_error_desc(0) == "no kernel for node conv1"
            assert not recorder.has_overflowed()

        plan, made["fake"] = stub(build=fail)
        with pytest.raises(ExportError, match="NO_KERNEL: no kernel for node conv1") as caught:
            plan.build_plan(model, CONFIG, BATCHES)
        assert "phase 'Timing'" in caught.value.message
        assert caught.value.fix

    def test_without_a_reason_says_so(self, stub: Any, model: bytes) -> None:
        plan, _ = stub(build=lambda _config: None)
        with pytest.raises(ExportError, match="gave no reason"):
            plan.build_plan(model, CONFIG, BATCHES)

    def test_for_want_of_a_gpu_is_one_of_the_backend(self, stub: Any, model: bytes) -> None:
        plan, _ = stub(has_gpu=False)
        with pytest.raises(BackendError, match="no usable GPU") as caught:
            plan.build_plan(model, CONFIG, BATCHES)
        assert "doctor" in str(caught.value.fix)

    def test_of_a_profile_that_tensorrt_refuses_shows_it(self, stub: Any, model: bytes) -> None:
        plan, fake = stub()
        plan.check_profiles = lambda inputs, profiles: None
        with pytest.raises(ExportError, match="refuses profile 0"):
            plan.build_plan(model, CONFIG, [batches(4, 2, 1)])
        assert "build" not in fake.events

    @pytest.mark.parametrize("part", [0.01, 0.3, 0.7, 0.99])
    def test_of_a_truncated_file_comes_before_tensorrt(
        self, stub: Any, model: bytes, part: float
    ) -> None:
        plan, fake = stub()
        with pytest.raises(ExportError, match="no complete ONNX file") as caught:
            plan.build_plan(model[: int(part * len(model))], CONFIG, BATCHES)
        assert caught.value.fix
        assert fake.events == []

    def test_of_an_empty_file_too(self, stub: Any) -> None:
        plan, _ = stub()
        with pytest.raises(ExportError, match="no complete ONNX file"):
            plan.build_plan(b"", CONFIG, BATCHES)

    def test_of_illegal_pairs_comes_before_tensorrt_and_names_the_node(self, stub: Any) -> None:
        net = residual_net()
        graph = quantize(net, measured(net, {"image": images()}))
        node = next(n for n in graph.graph.node if n.op_type == "QuantizeLinear")
        shifted = numpy_helper.from_array(np.array(3, np.int8), "shifted")
        graph.graph.initializer.append(shifted)
        node.input[2] = "shifted"
        plan, fake = stub()
        with pytest.raises(QuantizationError, match=f"'{node.name}': the zero point is not 0"):
            plan.build_plan(graph.SerializeToString(), CONFIG, BATCHES)
        assert fake.events == []


class TestAProfile:
    @pytest.mark.parametrize(
        ("profile", "fault"),
        [
            ({"picture": ((1, 3, 32, 32),) * 3}, "there is no input 'picture'"),
            ({}, "input 'image' is missing"),
            ({"image": ((3, 32, 32),) * 3}, "min has 3 axes, opt has 3 axes"),
            ({"image": ((1, 3, 32, 32), (1, 3, 32, 32), (1, 32, 32))}, "max has 3 axes"),
            ({"image": ((1, 3, 64, 32),) * 3}, "axis 2 is 32 in the graph, not"),
            ({"image": ((2, 3, 32, 32), (1, 3, 32, 32), (4, 3, 32, 32))}, "axis 0 needs 1 <= min"),
            ({"image": ((0, 3, 32, 32), (1, 3, 32, 32), (4, 3, 32, 32))}, "axis 0 needs 1 <= min"),
        ],
    )
    def test_that_does_not_fit_is_refused_before_the_build(
        self, stub: Any, model: bytes, profile: dict[str, Any], fault: str
    ) -> None:
        plan, fake = stub()
        wanted = {name: ShapeRange(*shapes) for name, shapes in profile.items()}
        with pytest.raises(ExportError, match="profile 1 does not fit") as caught:
            plan.build_plan(model, CONFIG, [*BATCHES, wanted])
        assert fault in caught.value.message
        assert "image (-1, 3, 32, 32)" in str(caught.value.fix)
        assert "build" not in fake.events

    def test_is_asked_for_where_an_axis_is_free(self, stub: Any, model: bytes) -> None:
        plan, _ = stub()
        with pytest.raises(ExportError, match=r"inputs \['image'\] have free axes") as caught:
            plan.build_plan(model, CONFIG)
        assert "--profile" in str(caught.value.fix)

    @settings(deadline=None)
    @given(
        shape=st.lists(st.sampled_from([-1, 1, 2, 5]), min_size=1, max_size=4),
        sizes=st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=1, max_size=5),
    )
    def test_is_taken_exactly_where_it_fits(
        self, pure: Any, shape: list[int], sizes: list[tuple[int, int, int]]
    ) -> None:
        profile = {"x": ShapeRange(*(tuple(size[k] for size in sizes) for k in range(3)))}
        fits = len(shape) == len(sizes) and all(
            1 <= low <= usual <= high if fixed == -1 else low == usual == high == fixed
            for fixed, (low, usual, high) in zip(shape, sizes, strict=False)
        )
        if fits:
            pure.check_profiles({"x": tuple(shape)}, [profile])
        else:
            with pytest.raises(ExportError):
                pure.check_profiles({"x": tuple(shape)}, [profile])


class TestProgress:
    def test_rises_to_the_end(self, stub: Any, model: bytes) -> None:
        plan, _ = stub()
        seen: list[tuple[int, int]] = []
        plan.build_plan(model, CONFIG, BATCHES, progress=lambda *done: seen.append(done))
        # of 2 steps of the root: 4 and then 3 steps inside of each
        assert [done for done, _ in seen] == [125, 250, 375, 500, 666, 833, 1000, 1000]
        assert {total for _, total in seen} == {1000}

    @settings(deadline=None)
    @given(
        events=st.lists(
            st.tuples(st.sampled_from("sdf"), st.sampled_from("abc"), st.integers(0, 5)),
            max_size=40,
        )
    )
    def test_never_falls_and_takes_phases_in_any_order(
        self, pure: Any, events: list[tuple[str, str, int]]
    ) -> None:
        seen: list[int] = []
        monitor = pure._Monitor(lambda done, _of: seen.append(done), threading.Event())
        parents = {"a": None, "b": "a", "c": "b"}
        for kind, name, number in events:
            if kind == "s":
                monitor.phase_start(name, parents[name], number)
            elif kind == "d":
                assert monitor.step_complete(name, number) is True
            else:
                monitor.phase_finish(name)
        assert seen == sorted(set(seen))
        assert all(0 <= done <= 1000 for done in seen)

    def test_that_raises_ends_the_build_with_its_own_error(self, stub: Any, model: bytes) -> None:
        plan, _ = stub()

        def show(done: int, _total: int) -> None:
            if done > 300:
                raise RuntimeError("the terminal is gone")

        with pytest.raises(RuntimeError, match="the terminal is gone"):
            plan.build_plan(model, CONFIG, BATCHES, progress=show)

    def test_is_where_a_stop_is_noticed(self, stub: Any, model: bytes) -> None:
        plan, _ = stub()
        stop = threading.Event()

        def show(done: int, _total: int) -> None:
            if done > 300:
                stop.set()

        with pytest.raises(ExportError, match="cancelled in phase 'Parsing'"):
            plan.build_plan(model, CONFIG, BATCHES, progress=show, stop=stop)

    def test_ends_at_an_interrupt_and_the_build_with_it(self, stub: Any, model: bytes) -> None:
        ended = threading.Event()

        def build(config: Any) -> None:
            monitor = config.progress_monitor
            monitor.phase_start("Timing", None, 10)
            time.sleep(0.2)  # until the other thread waits
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            late = time.monotonic() + 30
            while monitor.step_complete("Timing", 0):  # TensorRT goes on until it is told
                if time.monotonic() > late:
                    return
            ended.set()

        plan, _ = stub(build=build)
        # what a shell starts in the background ignores interrupts
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt):
                plan.build_plan(model, CONFIG, BATCHES)
        finally:
            signal.signal(signal.SIGINT, before)
        assert ended.is_set()


# --- with a real builder --------------------------------------------------------------------------


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``export.plan`` on a TensorRT builder, wherever that runs."""
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("there is no TensorRT here")
    yield load(monkeypatch)
    trt_stub.forget()


def single(op_type: str, num_outputs: int, shape: list[int | str]) -> bytes:
    """image (2, 8) -> one node -> y of the shape given, and further outputs."""
    outputs = ["y", *(f"y{i}" for i in range(1, num_outputs))]
    graph = helper.make_graph(
        [helper.make_node(op_type, ["image"], outputs, name=f"{op_type}_0")],
        "single",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [2, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    opset = helper.make_opsetid("", 18)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


@pytest.mark.trt_builder
class TestABuilder:
    @pytest.mark.parametrize("precision", ["float", "fp16", "bf16", "int8"])
    def test_takes_every_precision(self, real: Any, precision: Any) -> None:
        net = residual_net()
        if precision == "int8":
            net = quantize(net, measured(net, {"image": images()}))
        elif precision != "float":
            net = halve(net, precision)
        built = real.build_plan(net.SerializeToString(), CONFIG, BATCHES)
        assert len(built.data) > 10_000
        assert built.num_layers >= len(net.graph.node) / 2

    def test_takes_several_profiles_and_every_wish(self, real: Any, model: bytes) -> None:
        config = PlanConfig(
            workspace_mib=256,
            optimization_level=1,
            tf32=False,
            detailed=False,
            hardware="ampere-plus",
            weight_streaming=True,
        )
        profiles = [batches(1, 1, 1), batches(2, 8, 32)]
        seen: list[int] = []
        built = real.build_plan(
            model, config, profiles, progress=lambda done, _of: seen.append(done)
        )
        assert built.data
        assert seen == sorted(seen)
        assert seen[-1] == 1000

    def test_names_the_node_that_it_does_not_take(self, real: Any) -> None:
        with pytest.raises(ExportError, match="Unique 'Unique_0'"):
            real.build_plan(single("Unique", 4, ["n"]), CONFIG)

    def test_says_why_a_mixed_graph_without_casts_is_none(self, real: Any) -> None:
        half = numpy_helper.from_array(np.ones(8, np.float16), "half")
        broken = onnx.load_from_string(single("Identity", 1, [2, 8]))
        broken.graph.initializer.append(half)
        node = helper.make_node("Add", ["image", "half"], ["y"], name="Add_0")
        broken.graph.node.pop()
        broken.graph.node.append(node)
        with pytest.raises(ExportError, match="Add 'Add_0': "):
            real.build_plan(broken.SerializeToString(), CONFIG)

    def test_keeps_its_timings_beside_the_recorder(
        self, real: Any, model: bytes, tmp_path: Path
    ) -> None:
        """A recorder that dies before the cache takes the process with it."""
        file = tmp_path / "cache"
        for _ in range(2):
            real.build_plan(model, CONFIG, BATCHES, timing_cache=file)
            assert file.stat().st_size > 0
        file.write_bytes(b"no timings at all")
        real.build_plan(model, CONFIG, BATCHES, timing_cache=file)
        assert file.read_bytes() != b"no timings at all"

    def test_stops_when_it_is_told(self, real: Any, model: bytes) -> None:
        stop = threading.Event()
        with pytest.raises(ExportError, match="cancelled in phase"):
            real.build_plan(
                model, CONFIG, BATCHES, stop=stop, progress=lambda _done, _of: stop.set()
            )
