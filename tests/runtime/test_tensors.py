from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from engineworks.runtime.errors import EngineError, InputError
from engineworks.runtime.tensors import TensorSpec, check_feeds, check_host

IMAGES = TensorSpec(dtype="float32", shape=("batch", 3, 4, 4))


class OnDevice:
    """What a CUDA array shows of itself."""

    def __init__(self, shape: tuple[int, ...], typestr: str = "<f4") -> None:
        self.__cuda_array_interface__: dict[str, Any] = {"shape": shape, "typestr": typestr}


class TestASpec:
    @pytest.mark.parametrize("batch", [0, 1, 7])
    def test_leaves_a_named_axis_free(self, batch: int) -> None:
        IMAGES.check("images", np.zeros((batch, 3, 4, 4), np.float32))

    @pytest.mark.parametrize("shape", [(1, 3, 4, 5), (1, 1, 4, 4), (3, 4, 4), (1, 1, 3, 4, 4)])
    def test_refuses_another_shape_with_both_shapes(self, shape: tuple[int, ...]) -> None:
        for array in (np.zeros(shape, np.float32), OnDevice(shape)):
            with pytest.raises(InputError) as error:
                IMAGES.check("images", array)

            assert "'images'" in error.value.message
            assert str(shape) in error.value.message
            assert "(batch, 3, 4, 4)" in error.value.message
            assert error.value.fix

    @pytest.mark.parametrize("dtype", ["float64", "float16", "uint8"])
    def test_refuses_another_dtype_with_the_conversion(self, dtype: str) -> None:
        shape = (1, 3, 4, 4)
        for array in (np.zeros(shape, dtype), OnDevice(shape, np.dtype(dtype).str)):
            with pytest.raises(InputError, match=rf"dtype {dtype}.*float32") as error:
                IMAGES.check("images", array)

            assert ".astype('float32')" in (error.value.fix or "")

    def test_takes_a_device_array_that_fits(self) -> None:
        IMAGES.check("images", OnDevice((2, 3, 4, 4)))

    def test_refuses_what_is_no_array(self) -> None:
        with pytest.raises(InputError, match="'images' is a list, not an array"):
            IMAGES.check("images", [[1.0]])  # type: ignore[arg-type]

    def test_describes_its_shape(self) -> None:
        assert IMAGES.describe() == "(batch, 3, 4, 4)"

    def test_comes_back_from_json(self) -> None:
        assert TensorSpec.model_validate_json(IMAGES.model_dump_json()) == IMAGES

    def test_cannot_be_changed_and_takes_no_unknown_field(self) -> None:
        with pytest.raises(ValidationError):
            IMAGES.dtype = "uint8"  # type: ignore[misc]
        with pytest.raises(ValidationError):
            TensorSpec(dtype="float32", shape=(1,), layout="NCHW")  # type: ignore[call-arg]


class TestFeeds:
    def test_that_fit_are_taken(self) -> None:
        check_feeds({"images": IMAGES}, {"images": np.zeros((1, 3, 4, 4), np.float32)})

    def test_with_missing_and_unknown_names_are_refused_with_all_of_them(self) -> None:
        with pytest.raises(InputError, match=r"missing \['images'\], unknown \['image', 'x'\]"):
            check_feeds({"images": IMAGES}, {"x": np.zeros(1), "image": np.zeros(1)})

    def test_are_checked_one_by_one(self) -> None:
        with pytest.raises(InputError, match="input 'b'"):
            check_feeds(
                {"a": IMAGES, "b": IMAGES},
                {"a": np.zeros((1, 3, 4, 4), np.float32), "b": np.zeros((1, 3, 4), np.float32)},
            )


class TestACpuBackend:
    def test_takes_host_arrays_without_a_stream(self) -> None:
        check_host({"images": np.zeros(1)}, None, "ort")

    def test_refuses_a_device_array_by_name(self) -> None:
        with pytest.raises(EngineError, match=r"'ort' runs on the CPU.*\['images'\]"):
            check_host({"images": OnDevice((1,)), "other": np.zeros(1)}, None, "ort")

    def test_refuses_a_stream(self) -> None:
        with pytest.raises(EngineError, match="no CUDA stream"):
            check_host({}, 0, "ort")
