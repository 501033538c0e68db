"""What the contract of all engines does not say: which calls reach TensorRT and CUDA, and when."""

from __future__ import annotations

import ast
import gc
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from engineworks.runtime import contenders
from engineworks.runtime.engines import open_engine
from engineworks.runtime.errors import BackendError, EngineError, InputError
from engineworks.runtime.tensors import Array
from tests.runtime.gpu_stub import CudaError, Gpu, plan

ROOT = Path(__file__).parents[2]
# names of TensorRT's run time that 11 took away
REMOVED_IN_11 = {
    *("device_memory_size", "get_device_memory_size_for_profile", "weight_streaming_budget"),
    *("create_execution_context_without_device_memory", "has_implicit_batch_dimension"),
    *("minimum_weight_streaming_budget", "all_shape_inputs_specified", "IStreamReader"),
    *("execute_v2", "execute_async_v2", "num_bindings", "get_binding_shape", "EXPLICIT_BATCH"),
}


def model(text: str) -> bytes:
    """ONNX from the body of a graph with input ``x`` (batch, 3) and output ``y``."""
    head = '<ir_version: 9, opset_import: ["" : 18]> net (float[batch, 3] x) => (float[batch, 3] y)'
    content: bytes = onnx.parser.parse_model(f"{head} {text}").SerializeToString()
    return content


DOUBLE = model("{ y = Add(x, x) }")
UP_TO_4 = {"x": ((1, 3), (2, 3), (4, 3))}
UP_TO_64 = {"x": ((5, 3), (32, 3), (64, 3))}


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture(params=["10.13.3.9", "11.4.0.106"])
def trt(request: pytest.FixtureRequest, gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The backend's module on top of the stand-ins."""
    return gpu.install(request.param, monkeypatch)


@pytest.fixture
def engine(trt: Any) -> Iterator[Any]:
    with closing(trt.TrtEngine(plan(DOUBLE, [UP_TO_4, UP_TO_64]))) as opened:
        yield opened


def rows(batch: int, start: float = 0) -> Array:
    return np.arange(start, start + 3 * batch, dtype=np.float32).reshape(batch, 3)


class Torch:
    """An array in the stand-in's memory as PyTorch shows one: version 2, without a stream."""

    def __init__(self, gpu: Gpu, content: Array, *, offset: int = 0, **more: Any) -> None:
        self.address: int = gpu.allocate(content.nbytes + offset) + offset
        self.shape = content.shape
        gpu.at(self.address, content.nbytes)[:] = content.reshape(-1).view(np.uint8)
        self.__cuda_array_interface__ = {
            "shape": content.shape,
            "typestr": content.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "version": 2,
            **more,
        }


class TestARunOnTheHost:
    def test_calls_tensorrt_in_the_order_that_its_documentation_asks_for(
        self, gpu: Gpu, engine: Any
    ) -> None:
        engine.run({"x": rows(2)})
        gpu.calls.clear()
        engine.run({"x": rows(3)})

        (lane,) = {call[1] for call in gpu.named("execute_async_v3")}
        assert [call[0] for call in gpu.calls] == [
            "memcpy_htod_async",
            "set_input_shape",
            "set_tensor_address",
            "set_tensor_address",
            "execute_async_v3",
            "memcpy_dtoh_async",
            "synchronize",
        ]
        assert gpu.named("set_input_shape")[0][2:] == ("x", (3, 3))
        assert [call[1] for call in gpu.named("set_tensor_address")] == ["x", "y"]
        assert {call[-1] for call in gpu.calls if "memcpy" in call[0]} == {lane}
        assert gpu.named("synchronize") == [("synchronize", lane)]

    def test_has_a_stream_of_its_own_that_does_not_wait_for_the_default_one(
        self, gpu: Gpu, engine: Any
    ) -> None:
        engine.run({"x": rows(2)})
        assert gpu.named("Stream") == [("Stream", 1)]  # CU_STREAM_NON_BLOCKING

    def test_allocates_once_for_the_largest_shapes_of_the_profile(
        self, gpu: Gpu, engine: Any
    ) -> None:
        for batch in (1, 4, 2, 3, 1):
            assert np.array_equal(engine.run({"x": rows(batch)})["y"], 2 * rows(batch))
        scratch, *buffers = [call[2] for call in gpu.named("mem_alloc")]
        assert scratch == 1000 and buffers == [4 * 3 * 4, 4 * 3 * 4]
        assert len(gpu.named("pagelocked_empty")) == 2

    def test_takes_the_first_profile_that_holds_the_shapes(self, gpu: Gpu, engine: Any) -> None:
        for batch in (2, 40, 2, 64):
            assert np.array_equal(engine.run({"x": rows(batch)})["y"], 2 * rows(batch))
        assert gpu.named("set_optimization_profile_async") == [
            ("set_optimization_profile_async", 1)
        ]

    def test_of_a_shape_outside_of_all_profiles_is_refused_with_their_ranges(
        self, engine: Any
    ) -> None:
        for batch in (0, 65):
            with pytest.raises(InputError, match=r"\(1, 3\) to \(4, 3\).*\(64, 3\)") as caught:
                engine.run({"x": rows(batch)})
            assert "--profile" in str(caught.value.fix)

    def test_may_have_fixed_shapes_and_no_profile(self, trt: Any) -> None:
        fixed = onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["" : 18]> n (float[2,3] x) => (float[2,3] y)'
            "{ y = Add(x, x) }"
        )
        with closing(trt.TrtEngine(plan(fixed.SerializeToString()))) as engine:
            assert engine.inputs["x"].shape == (2, 3)
            for _ in range(3):
                assert np.array_equal(engine.run({"x": rows(2)})["y"], 2 * rows(2))


class TestGraphs:
    def test_replay_a_shape_from_its_third_run_on(self, gpu: Gpu, engine: Any) -> None:
        for turn in range(5):
            x = rows(2, start=turn)
            assert np.array_equal(engine.run({"x": x})["y"], 2 * x)
        (begin,), (end,) = gpu.named("begin capture"), gpu.named("end capture")
        assert begin[1] == end[1] == gpu.named("synchronize")[0][1]
        assert len(gpu.named("cuGraphLaunch")) == 3
        # runs 1 and 2, and the one that is captured and does not run
        assert len(gpu.named("execute_async_v3")) == 3

    def test_are_kept_for_each_shape_with_a_context_of_its_own(self, gpu: Gpu, engine: Any) -> None:
        batches = (1, 2, 3, 1, 2, 3, 2, 1, 3, 4, 1)
        for turn, batch in enumerate(batches):
            x = rows(batch, start=turn)
            assert np.array_equal(engine.run({"x": x})["y"], 2 * x)
        assert len(gpu.named("begin capture")) == 3
        assert len(gpu.named("cuGraphLaunch")) == 4
        assert len(gpu.named("create_execution_context")) == 1 + 3

    def test_share_the_scratch_memory_of_their_lane(self, gpu: Gpu, engine: Any) -> None:
        for _ in range(2):
            engine.run({"x": rows(1)})
        places = {call[1:] for call in gpu.named("set_device_memory")}
        assert len(places) == 1 and len(gpu.named("set_device_memory")) == 2

    def test_are_forgotten_when_too_many_shapes_come(
        self, gpu: Gpu, engine: Any, trt: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trt, "_MAX_GRAPHS", 2)
        for batch in (1, 1, 2, 2, 3, 3, 1, 1, 1):
            assert np.array_equal(engine.run({"x": rows(batch)})["y"], 2 * rows(batch))
        assert len(gpu.graphs) == 2 and len(gpu.named("begin capture")) == 4

    def test_that_cannot_be_captured_are_done_without_and_it_can_be_read_why(
        self, gpu: Gpu, engine: Any
    ) -> None:
        assert engine.capture_failure is None
        gpu.capture_fails = True
        for turn in range(4):
            x = rows(2, start=turn)
            assert np.array_equal(engine.run({"x": x})["y"], 2 * x)
        assert "cuStreamEndCapture" in str(engine.capture_failure)
        assert len(gpu.named("begin capture")) == 1 and not gpu.graphs

    def test_can_be_left_out(self, gpu: Gpu, trt: Any) -> None:
        with closing(trt.TrtEngine(plan(DOUBLE, [UP_TO_4]), graphs=False)) as engine:
            for _ in range(4):
                engine.run({"x": rows(2)})
        assert not gpu.named("begin capture") and not gpu.graphs


class TestARunOnTheDevice:
    def test_reads_and_writes_in_place(self, gpu: Gpu, engine: Any) -> None:
        feed = Torch(gpu, rows(2))
        got = engine.run({"x": feed})["y"]
        assert not [call for call in gpu.calls if "memcpy" in call[0]]
        interface = got.__cuda_array_interface__
        assert gpu.named("set_tensor_address")[-2:] == [
            ("set_tensor_address", "x", feed.address),
            ("set_tensor_address", "y", interface["data"][0]),
        ]
        assert (interface["shape"], interface["typestr"]) == ((2, 3), "<f4")
        assert (interface["version"], interface["stream"]) == (3, None)
        assert np.array_equal(got.numpy(), 2 * rows(2))

    def test_waits_for_the_device_where_the_feed_does_not_tell_its_stream(
        self, gpu: Gpu, engine: Any
    ) -> None:
        feed = Torch(gpu, rows(2))
        producer = gpu.new_stream()
        producer.add(lambda: _write(gpu, feed, rows(2, start=50)))
        assert np.array_equal(engine.run({"x": feed})["y"].numpy(), 2 * rows(2, start=50))

    def test_waits_for_the_stream_that_the_feed_tells(self, gpu: Gpu, engine: Any) -> None:
        producer = gpu.new_stream()
        feed = Torch(gpu, rows(2), version=3, stream=producer.handle)
        producer.add(lambda: _write(gpu, feed, rows(2, start=50)))
        got = engine.run({"x": feed})["y"]
        assert not gpu.named("Context.synchronize")
        assert np.array_equal(got.numpy(), 2 * rows(2, start=50))

    def test_on_a_stream_is_only_queued_there(self, gpu: Gpu, engine: Any) -> None:
        engine.run({"x": Torch(gpu, rows(1))})  # buffers are there from now on
        gpu.calls.clear()
        stream = gpu.new_stream()
        feed = Torch(gpu, rows(2))
        stream.add(lambda: _write(gpu, feed, rows(2, start=7)))
        got = engine.run({"x": feed}, stream=stream.handle)["y"]
        assert not gpu.named("synchronize") and not gpu.named("Context.synchronize")
        assert got.__cuda_array_interface__["stream"] == stream.handle
        own = gpu.named("execute_async_v3")[0][1]
        records = [call[1] for call in gpu.named("cuEventRecord")]
        waits = [call[1] for call in gpu.named("cuStreamWaitEvent")]
        assert (records, waits) == ([stream.handle, own], [own, stream.handle])
        stream.run()
        content = gpu.at(got.address, 24).view(np.float32).reshape(2, 3)
        assert np.array_equal(content, 2 * rows(2, start=7))

    def test_on_the_default_stream_is_named_as_the_interface_wants_it(
        self, gpu: Gpu, engine: Any
    ) -> None:
        got = engine.run({"x": Torch(gpu, rows(2))}, stream=0)["y"]
        assert got.__cuda_array_interface__["stream"] == 1

    def test_follows_earlier_ones_of_the_same_lane_on_other_streams(
        self, gpu: Gpu, engine: Any
    ) -> None:
        """They share scratch memory: the second may not overtake the first."""
        first, second = gpu.new_stream(), gpu.new_stream()
        a, b = Torch(gpu, rows(2)), Torch(gpu, rows(3, start=9))
        first.add(lambda: gpu.log("produced"))
        one = engine.run({"x": a}, stream=first.handle)["y"]
        two = engine.run({"x": b}, stream=second.handle)["y"]
        second.run()
        assert gpu.named("produced")
        assert np.array_equal(one.numpy(), 2 * rows(2))
        assert np.array_equal(two.numpy(), 2 * rows(3, start=9))

    def test_copies_an_input_that_is_not_aligned(self, gpu: Gpu, engine: Any) -> None:
        feed = Torch(gpu, rows(2), offset=16)
        assert np.array_equal(engine.run({"x": feed})["y"].numpy(), 2 * rows(2))
        assert [call[2:4] for call in gpu.named("memcpy_dtod_async")] == [(feed.address, 24)]

    @pytest.mark.parametrize("strides", [(4, 8), (24, 4), (12, 8)])
    def test_refuses_an_input_that_is_not_contiguous(
        self, gpu: Gpu, engine: Any, strides: tuple[int, int]
    ) -> None:
        with pytest.raises(InputError, match="contiguous") as caught:
            engine.run({"x": Torch(gpu, rows(2), strides=strides)})
        assert ".contiguous()" in str(caught.value.fix)

    @pytest.mark.parametrize("strides", [None, (12, 4), (999, 4)])
    def test_takes_strides_that_make_no_difference(
        self, gpu: Gpu, engine: Any, strides: tuple[int, int] | None
    ) -> None:
        feed = Torch(gpu, rows(1), strides=strides)
        assert np.array_equal(engine.run({"x": feed})["y"].numpy(), 2 * rows(1))

    def test_frees_an_answer_with_its_last_reference(self, gpu: Gpu, engine: Any) -> None:
        got = engine.run({"x": Torch(gpu, rows(2))})["y"]
        address = got.address
        assert address in gpu.memory
        del got
        gc.collect()
        assert address not in gpu.memory

    def test_leaves_answers_that_outlive_the_engine(self, gpu: Gpu, engine: Any) -> None:
        got = engine.run({"x": Torch(gpu, rows(2))})["y"]
        engine.close()
        assert np.array_equal(got.numpy(), 2 * rows(2))

    def test_is_not_mixed_with_the_host(self, gpu: Gpu, trt: Any) -> None:
        two = onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["" : 18]> n (float[2] a, float[2] b) => (float[2] y)'
            "{ y = Add(a, b) }"
        )
        half = np.ones(2, np.float32)
        with (
            closing(trt.TrtEngine(plan(two.SerializeToString()))) as engine,
            pytest.raises(InputError, match=r"only \['b'\] of"),
        ):
            engine.run({"a": half, "b": Torch(gpu, half)})

    def test_on_a_stream_needs_feeds_on_the_device(self, engine: Any) -> None:
        with pytest.raises(InputError, match="stream"):
            engine.run({"x": rows(2)}, stream=5)


def _write(gpu: Gpu, feed: Torch, content: Array) -> None:
    gpu.at(feed.address, content.nbytes)[:] = content.reshape(-1).view(np.uint8)


class TestClosing:
    def test_releases_everything_in_order(self, gpu: Gpu, trt: Any) -> None:
        engine = trt.TrtEngine(plan(DOUBLE, [UP_TO_4, UP_TO_64]))
        for batch in (2, 2, 40, 40):
            engine.run({"x": rows(batch)})
        gpu.calls.clear()
        engine.close()
        assert not gpu.memory and not gpu.graphs and not gpu.events
        order = [call[0] for call in gpu.calls if call[0] != "synchronize"]
        assert order[-3:] == ["del Stream", "del Engine", "del Runtime"]
        contexts = [i for i, name in enumerate(order) if name == "del Context"]
        assert len(contexts) == 4 and max(contexts) < order.index("del Engine")
        # scratch memory goes after the contexts that work in it
        assert max(i for i, name in enumerate(order) if name == "free") > max(contexts)
        assert order.index("cuGraphExecDestroy") < min(contexts)

    def test_happens_by_itself_when_the_engine_is_dropped(self, gpu: Gpu, trt: Any) -> None:
        engine = trt.TrtEngine(plan(DOUBLE, [UP_TO_4]))
        engine.run({"x": rows(2)})
        del engine
        gc.collect()
        assert not gpu.memory and gpu.calls[-1] == ("del Runtime",)

    def test_detaches_from_the_device_last_of_all(self, gpu: Gpu, trt: Any) -> None:
        engine = trt.TrtEngine(plan(DOUBLE, [UP_TO_4]))
        device = trt.cuda.device()
        trt.cuda.device.cache_clear()
        del device
        gc.collect()
        assert not gpu.named("detach"), "the engine still needs it"
        engine.close()
        del engine
        gc.collect()
        assert gpu.calls[-1] == ("detach",)

    def test_leaves_no_context_current(self, gpu: Gpu, engine: Any) -> None:
        engine.run({"x": rows(2)})
        engine.close()
        assert gpu.context.depth == 0


class TestWhatIsRefused:
    def test_names_the_plan_with_tensorrts_words_and_the_rebuild_command(
        self, trt: Any, tmp_path: Path
    ) -> None:
        path = tmp_path / "features.int8.plan"
        path.write_bytes(b"built elsewhere")
        with pytest.raises(EngineError, match=r"features\.int8\.plan: SERIALIZATION: no pl") as e:
            trt.TrtEngine(path)
        assert "--plan" in str(e.value.fix)
        with pytest.raises(EngineError, match=r"none\.plan cannot be read"):
            trt.TrtEngine(tmp_path / "none.plan")

    def test_leaves_nothing_behind(self, gpu: Gpu, trt: Any) -> None:
        with pytest.raises(EngineError):
            trt.TrtEngine(b"")
        assert gpu.calls[-1] == ("del Runtime",) and not gpu.memory and gpu.context.depth == 0

    @pytest.mark.parametrize(
        ("dtype", "words"), [("bfloat16", "BF16, which NumPy does not have"), ("host", "a shape")]
    )
    def test_are_tensors_that_cannot_be_fed(self, trt: Any, dtype: str, words: str) -> None:
        if dtype == "host":
            content = plan(DOUBLE, [UP_TO_4]).replace(b"{", b'{"host": ["x"], ', 1)
        else:
            cast = onnx.parser.parse_model(
                '<ir_version: 9, opset_import: ["" : 18]> n (float[2] x) => (bfloat16[2] y)'
                "{ y = Cast<to = 16>(x) }"
            )
            content = plan(cast.SerializeToString())
        with pytest.raises(EngineError, match=words):
            trt.TrtEngine(content)

    def test_are_outputs_whose_shape_depends_on_the_data(self, trt: Any) -> None:
        with (
            closing(trt.TrtEngine(plan(DOUBLE, [UP_TO_4], data_dependent=True))) as engine,
            pytest.raises(EngineError, match="depend on the data"),
        ):
            engine.run({"x": rows(2)})

    def test_are_outputs_that_grow_while_the_inputs_shrink(self, gpu: Gpu, trt: Any) -> None:
        """Their buffers were made for the largest inputs."""
        shrinking = onnx.parser.parse_model(
            '<ir_version: 9, opset_import: ["" : 18]> n (float[batch, 3] x) => (float[rest] y)'
            "<int64[1] ten = {10}, int64[1] first = {0}> { s = Shape(x)  b = Gather(s, first)"
            "  r = Sub(ten, b)  y = ConstantOfShape(r) }"
        ).SerializeToString()
        with closing(trt.TrtEngine(plan(shrinking, [UP_TO_4]))) as engine:
            assert engine.run({"x": rows(4)})["y"].shape == (6,)
            with pytest.raises(EngineError, match=r"\['y'\] are larger"):
                engine.run({"x": rows(2)})
            assert len(gpu.named("execute_async_v3")) == 1

    def test_a_run_that_fails_tells_tensorrts_reason_once(self, trt: Any) -> None:
        content = plan(DOUBLE, [UP_TO_4]).replace(b"{", b'{"fails": true, ', 1)
        with closing(trt.TrtEngine(content)) as engine:
            for _ in range(2):
                with pytest.raises(EngineError, match=r"failed: FAILED_EXECUTION: as asked$"):
                    engine.run({"x": rows(2)})

    def test_full_memory_is_an_error_that_says_what_to_do(
        self, trt: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(num_bytes: int) -> None:
            raise trt.cuda.driver.MemoryError("cuMemAlloc failed: out of memory")

        with closing(trt.TrtEngine(plan(DOUBLE, [UP_TO_4]))) as engine:
            monkeypatch.setattr(trt.cuda.driver, "mem_alloc", full)
            with pytest.raises(EngineError, match=r"memory is full.*out of memory") as caught:
                engine.run({"x": rows(2)})
        assert "smaller" in str(caught.value.fix)

    def test_a_machine_without_a_device(self, trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trt.cuda.driver.Device, "count", staticmethod(lambda: 0))
        with pytest.raises(BackendError, match="no CUDA device"):
            trt.TrtEngine(plan(DOUBLE, [UP_TO_4]))

        def no_driver() -> None:
            raise CudaError("cuInit failed: no CUDA-capable device is detected")

        monkeypatch.setattr(trt.cuda.driver, "init", no_driver)
        with pytest.raises(BackendError, match="cuInit failed"):
            trt.TrtEngine(plan(DOUBLE, [UP_TO_4]))


class TestThePlan:
    def test_brings_no_code_of_its_own_unless_that_is_allowed(self, gpu: Gpu, trt: Any) -> None:
        for allowed in (False, True):
            trt.TrtEngine(plan(DOUBLE, [UP_TO_4]), host_code=allowed).close()
        assert gpu.named("deserialize") == [("deserialize", False), ("deserialize", True)]

    def test_opens_by_the_table(self, gpu: Gpu, trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engineworks.runtime.engines.Backend.why_not", lambda row: None)
        open_engine(plan(DOUBLE, [UP_TO_4]), "tensorrt", host_code=True).close()
        assert gpu.named("deserialize") == [("deserialize", True)]
        with closing(open_engine(plan(DOUBLE, [UP_TO_4]), "tensorrt")) as engine:
            assert engine.backend == "tensorrt"
            assert np.array_equal(engine.run({"x": rows(2)})["y"], 2 * rows(2))


class TestTheCode:
    @pytest.mark.parametrize("name", ["trt", "cuda"])
    def test_uses_no_name_that_tensorrt_11_took_away(self, name: str) -> None:
        tree = ast.parse((ROOT / "runtime" / "engines" / f"{name}.py").read_text())
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        assert used & REMOVED_IN_11 == set()

    def test_imports_pycuda_in_one_place(self) -> None:
        users = [
            path.relative_to(ROOT).as_posix()
            for package in ("runtime", "calibration", "batch", "training", "export")
            for path in (ROOT / package).rglob("*.py")
            if "import pycuda" in path.read_text() or "from pycuda" in path.read_text()
        ]
        assert users == ["runtime/engines/cuda.py"]


class TestTheStopwatch:
    def test_times_the_work_alone_on_the_stream_that_it_is_queued_on(
        self, gpu: Gpu, trt: Any, engine: Any
    ) -> None:
        feed, stopwatch = trt.cuda.upload(rows(2)), trt.cuda.Stopwatch()
        kept = []

        def work(stream: int) -> object:
            kept.append(engine.run({"x": feed}, stream=stream))
            return kept[-1]

        assert [stopwatch.time(work) for _ in range(2)] == [stopwatch.time(work)] * 2
        assert stopwatch.time(lambda _stream: None) < stopwatch.time(work)
        for results in kept:
            np.testing.assert_array_equal(results["y"].numpy(), 2 * rows(2))

    def test_is_what_a_benchmark_times_the_graphs_of_a_system_with(
        self, gpu: Gpu, trt: Any, engine: Any
    ) -> None:
        system: Any = SimpleNamespace(engines={"net": engine})
        call = contenders._on_gpu(system, rows(2))
        gpu.calls.clear()

        assert call().ms == call().ms > 0
        assert gpu.named("execute_async_v3")
        # neither there nor back
        assert not [call for call in gpu.calls if "htod" in call[0] or "dtoh" in call[0]]


class TestAnUpload:
    @pytest.mark.parametrize("batch", [0, 3])
    def test_comes_back_as_it_was(self, trt: Any, batch: int) -> None:
        array = rows(batch)
        tensor = trt.cuda.upload(array)
        assert tensor.__cuda_array_interface__["stream"] is None  # complete
        np.testing.assert_array_equal(tensor.numpy(), array)

    def test_takes_any_layout(self, trt: Any) -> None:
        turned = rows(4).T
        np.testing.assert_array_equal(trt.cuda.upload(turned).numpy(), turned)
