"""What every engine of the table does, whatever runs it.

Backends that need a GPU are held to it twice: for real under the marker ``gpu``, and everywhere on
stand-ins of the packages that they are made of (see gpu_stub.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest

from engineworks.runtime.engines import BACKENDS, Engine, open_engine
from engineworks.runtime.errors import EngineError, EngineworksError, InputError
from engineworks.runtime.tensors import Array
from tests.runtime.gpu_stub import Gpu, plan
from tests.runtime.nets import (
    ADD_ONE,
    SAME,
    as_plan,
    conv_net,
    conv_net_in_float64,
    feeds,
    parse,
    ranges,
)

GPU = [name for name, row in BACKENDS.items() if row.needs_gpu]
VERSIONS = ("10.13.3.9", "11.4.0.106")

Open = Callable[[bytes], Engine]


@pytest.fixture(
    params=[
        *(name for name in BACKENDS if name not in GPU),
        *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU),
        *(f"{name} on stand-ins of {version}" for name in GPU for version in VERSIONS[-1:]),
        f"tensorrt on stand-ins of {VERSIONS[0]}",
    ]
)
def subject(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backend(subject: str) -> str:
    return subject.split()[0]


@pytest.fixture
def open_model(subject: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Opens ONNX bytes with the backend, by way of a plan where it takes plans."""
    stand_in = " on stand-ins of " in subject
    if stand_in:
        Gpu().install(subject.split()[-1], monkeypatch)
        monkeypatch.setattr("engineworks.runtime.engines.Backend.why_not", lambda row: None)
    elif reason := BACKENDS[backend].why_not():
        pytest.skip(reason)

    def opened(model: bytes) -> Engine:
        if backend == "tensorrt":
            model = plan(model, [ranges(model)]) if stand_in else as_plan(model)
        return open_engine(model, backend, threads=2)

    return opened


@pytest.fixture
def add_one(open_model: Open) -> Iterator[Engine]:
    with closing(open_model(parse(ADD_ONE))) as engine:
        yield engine


@pytest.fixture
def on_device(backend: str) -> Callable[[Array], Any]:
    """Copies an array to where a GPU backend takes it; for the others it only looks like that."""

    def copied(array: Array) -> Any:
        if backend not in GPU:
            return OnDevice()
        cuda = sys.modules["engineworks.runtime.engines.cuda"]
        with cuda.device().active():
            tensor = cuda.DeviceTensor(cuda.device(), array.shape, array.dtype.name)
            cuda.driver.memcpy_htod(tensor.address, np.ascontiguousarray(array))
        return tensor

    return copied


class OnDevice:
    """Looks like an array in CUDA memory."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "shape": (2, 3),
        "typestr": "<f4",
        "data": (0, False),
        "version": 3,
    }


class TestAnOpenedGraph:
    def test_says_what_it_takes_and_gives(self, add_one: Engine, backend: str) -> None:
        assert add_one.backend == backend
        for specs, names in ((add_one.inputs, ["x", "n"]), (add_one.outputs, ["y", "m"])):
            assert list(specs) == names
            matrix, vector = specs.values()
            assert (matrix.dtype, vector.dtype) == ("float32", "int64")
            assert isinstance(matrix.shape[0], str) and matrix.shape[1:] == (3,)
            assert len(vector.shape) == 1 and isinstance(vector.shape[0], str)

    def test_runs(self, add_one: Engine) -> None:
        given = feeds()
        got = add_one.run(given)
        assert list(got) == ["y", "m"]
        assert np.array_equal(got["y"], given["x"] + 1) and got["y"].dtype == np.float32
        assert np.array_equal(got["m"], given["n"] + 2) and got["m"].dtype == np.int64

    def test_takes_any_batch_one_after_the_other(self, add_one: Engine) -> None:
        for batch in (2, 1, 7, 2):
            assert np.array_equal(add_one.run(feeds(batch))["y"], feeds(batch)["x"] + 1)

    def test_answers_to_what_it_is_fed_however_often_a_shape_comes_again(
        self, add_one: Engine
    ) -> None:
        """From the third time on, a GPU replays what it did the second time."""
        for turn in range(6):
            given = {"x": feeds()["x"] * turn, "n": feeds()["n"] + turn}
            got = add_one.run(given)
            assert np.array_equal(got["y"], given["x"] + 1)
            assert np.array_equal(got["m"], given["n"] + 2)

    def test_does_not_care_about_the_order_of_the_feeds(self, add_one: Engine) -> None:
        turned = dict(reversed(feeds().items()))
        assert np.array_equal(add_one.run(turned)["y"], feeds()["x"] + 1)

    def test_keeps_the_names_of_tensors_that_are_the_same(self, open_model: Open) -> None:
        x = np.array([[-1, 0, 2]], np.float32)
        with closing(open_model(parse(SAME))) as engine:
            assert list(engine.inputs) == ["x"] and list(engine.outputs) == ["y", "z", "w"]
            got = engine.run({"x": x})
        assert np.array_equal(got["y"], x)
        assert np.array_equal(got["z"], [[0, 0, 2]]) and np.array_equal(got["w"], [[0, 0, 2]])


class TestOutputs:
    def test_belong_to_the_caller(self, add_one: Engine) -> None:
        first = add_one.run(feeds())
        kept = first["y"].copy()
        add_one.run({"x": 100 * feeds()["x"], "n": feeds()["n"]})
        assert np.array_equal(first["y"], kept)
        first["y"][:] = -1  # writable
        assert np.array_equal(add_one.run(feeds())["y"], kept)

    def test_outlive_the_engine(self, open_model: Open) -> None:
        engine = open_model(parse(ADD_ONE))
        got = engine.run(feeds())["y"]
        engine.close()
        del engine
        assert np.array_equal(got, feeds()["x"] + 1)

    def test_share_no_memory_with_the_feeds_or_each_other(self, open_model: Open) -> None:
        x = np.ones((1, 3), np.float32)
        with closing(open_model(parse(SAME))) as engine:
            got = engine.run({"x": x})
        got["y"][:] = 5
        got["z"][:] = 7
        assert np.all(x == 1) and np.all(got["y"] == 5) and np.all(got["w"] == 1)


class TestFeeds:
    def test_need_not_be_contiguous(self, add_one: Engine) -> None:
        x = np.arange(24, dtype=np.float32).reshape(3, 8)
        for strided in (x.T[::2], x[::-1, 1:4], np.broadcast_to(x[:1, :3], (4, 3))):
            n = np.arange(2 * len(strided))[::2]
            got = add_one.run({"x": strided, "n": n})
            assert np.array_equal(got["y"], strided + 1)
            assert np.array_equal(got["m"], n + 2)

    def test_may_be_read_only_and_stay_as_they_are(self, add_one: Engine) -> None:
        given = feeds()
        for array in given.values():
            array.setflags(write=False)
        assert np.array_equal(add_one.run(given)["y"], feeds()["x"] + 1)
        assert np.array_equal(given["x"], feeds()["x"])

    def test_of_another_shape_are_refused_with_both_shapes(self, add_one: Engine) -> None:
        with pytest.raises(InputError, match=r"'x' has shape \(2, 4\).*\(\w+, 3\)") as caught:
            add_one.run(feeds() | {"x": np.zeros((2, 4), np.float32)})
        assert caught.value.fix

    def test_of_another_rank_are_refused_with_both_shapes(self, add_one: Engine) -> None:
        with pytest.raises(InputError, match=r"'x' has shape \(3,\).*\(\w+, 3\)"):
            add_one.run(feeds() | {"x": np.zeros(3, np.float32)})

    @pytest.mark.parametrize("dtype", ["float64", "float16", "uint8"])
    def test_of_another_dtype_are_refused_with_both(self, add_one: Engine, dtype: str) -> None:
        with pytest.raises(InputError, match=f"{dtype}.*float32"):
            add_one.run(feeds() | {"x": np.zeros((2, 3), dtype)})

    def test_that_are_missing_or_unknown_are_named(self, add_one: Engine) -> None:
        with pytest.raises(InputError, match=r"missing \['n'\], unknown \['image'\]"):
            add_one.run({"x": feeds()["x"], "image": feeds()["x"]})

    def test_on_a_device_are_taken_by_a_gpu_and_refused_by_others(
        self, add_one: Engine, backend: str, on_device: Callable[[Array], Any]
    ) -> None:
        given: dict[str, Any] = {name: on_device(array) for name, array in feeds().items()}
        if backend in GPU:
            got: dict[str, Any] = add_one.run(given)
            assert got["y"].__cuda_array_interface__["shape"] == (2, 3)
            assert got["m"].__cuda_array_interface__["typestr"] == "<i8"
            kept = add_one.run({name: on_device(array) for name, array in feeds(5).items()})["y"]
            assert np.array_equal(got["y"].numpy(), feeds()["x"] + 1)
            assert np.array_equal(kept.numpy(), feeds(5)["x"] + 1)  # type: ignore[attr-defined]
        else:
            with pytest.raises(EngineError, match=r"\['x', 'n'\]") as caught:
                add_one.run(given)
            assert "tensorrt" in str(caught.value.fix)

    def test_on_a_device_and_on_the_host_are_not_mixed(
        self, add_one: Engine, on_device: Callable[[Array], Any]
    ) -> None:
        given: dict[str, Any] = feeds() | {"x": on_device(feeds()["x"])}
        with pytest.raises((EngineError, InputError), match=r"\['x'\]"):
            add_one.run(given)

    def test_on_the_host_are_refused_with_a_stream(self, add_one: Engine) -> None:
        with pytest.raises((EngineError, InputError), match="stream") as caught:
            add_one.run(feeds(), stream=0)
        assert caught.value.fix

    def test_on_a_device_are_queued_on_a_stream_by_tensorrt_only(
        self, add_one: Engine, backend: str, on_device: Callable[[Array], Any]
    ) -> None:
        given: dict[str, Any] = {name: on_device(array) for name, array in feeds().items()}
        if backend == "tensorrt":
            got: dict[str, Any] = add_one.run(given, stream=0)
            assert np.array_equal(got["y"].numpy(), feeds()["x"] + 1)
        else:
            with pytest.raises(EngineError, match="stream"):
                add_one.run(given, stream=0)

    def test_that_the_graph_cannot_run_are_an_error_with_the_backends_words(
        self, open_model: Open
    ) -> None:
        # two axes that are free in the specs, but must agree
        text = ADD_ONE.replace("m = Add(n, two)", "m = Add(n, n)").replace(
            "y = Add(x, one)", "k = Cast<to = 1>(n)  s = Unsqueeze(k, two)  y = Add(x, s)"
        )
        text = text.replace("int64 two = {2}", "int64[1] two = {1}")
        with closing(open_model(parse(text))) as engine:
            with pytest.raises(EngineError, match=r"failed: \S"):
                engine.run({"x": feeds(4)["x"], "n": feeds(3)["n"]})
            # and the engine is still usable
            assert engine.run(feeds())["y"].tolist() == [[0, 1, 2], [4, 5, 6]]


class TestManyThreads:
    def test_may_run_at_once(self, open_model: Open) -> None:
        model, _ = conv_net()
        rng = np.random.default_rng(1)
        images = [rng.standard_normal((1 + i % 3, 3, 10, 10)).astype(np.float32) for i in range(24)]
        with closing(open_model(model)) as engine:
            alone = [engine.run({"x": image})["y"] for image in images]
            with ThreadPoolExecutor(4) as pool:
                together = list(pool.map(lambda image: engine.run({"x": image})["y"], images * 4))
        for got, want in zip(together, alone * 4, strict=True):
            assert np.array_equal(got, want)


class TestAClosedEngine:
    def test_can_be_closed_again_but_not_run(self, open_model: Open) -> None:
        engine = open_model(parse(ADD_ONE))
        engine.run(feeds())
        engine.close()
        engine.close()
        with pytest.raises(EngineError, match="closed") as caught:
            engine.run(feeds())
        assert caught.value.fix


class TestFloatArithmetic:
    def test_is_float32(self, open_model: Open, backend: str) -> None:
        model, weights = conv_net()
        x = np.random.default_rng(2).standard_normal((2, 3, 10, 10)).astype(np.float32)
        with closing(open_model(model)) as engine:
            got = engine.run({"x": x})["y"]
        want = conv_net_in_float64(x, weights)
        # sums of 27 and 32 float32 products: a few 1e-7 of the largest; bfloat16 would be 4e-3 off.
        # ONNX Runtime cannot keep TensorRT from rounding products to 10 bits of mantissa: 5e-4 each
        tolerance = 5e-3 if backend == "ort-tensorrt" else 1e-5
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


class TestWhatIsNoGraph:
    @pytest.mark.parametrize("content", [b"", b"not a graph"])
    def test_is_an_error_with_a_fix(
        self, open_model: Open, backend: str, content: bytes, add_one: Engine
    ) -> None:
        with pytest.raises(EngineworksError) as caught:
            open_engine(content, backend)
        assert caught.value.fix
        assert np.array_equal(add_one.run(feeds())["y"], feeds()["x"] + 1)
