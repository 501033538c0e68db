"""NPY and NPZ files are looked at before memory is taken."""

from __future__ import annotations

import contextlib
import io
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engineworks.runtime import npy
from engineworks.runtime.errors import InputError
from engineworks.runtime.tensors import Array

HEADER = "{'descr': %s, 'fortran_order': False, 'shape': %s, }\n"


def saved(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def made(descr: str, shape: str, data: bytes = b"") -> bytes:
    head = (HEADER % (descr, shape)).encode()
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + data


class TestAnArray:
    @settings(max_examples=60, deadline=None)
    @given(
        hnp.arrays(
            st.sampled_from(["<f4", ">f4", "u1", "<u2", "<i8", "<U3", "?"]),
            hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
        ),
        st.booleans(),
    )
    def test_is_that_of_numpy(self, array: Array, in_columns: bool) -> None:
        data = saved(np.asfortranarray(array) if in_columns else array)
        found, want = npy.decode(data, "x"), np.load(io.BytesIO(data))
        assert found.shape == want.shape and found.dtype == want.dtype.newbyteorder("=")
        assert np.array_equal(found, want, equal_nan=array.dtype.kind == "f")

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"PK\x03\x04" + bytes(100),
            b"\x80\x04cos\nsystem\n(S'true'\ntR.",
            made("'<f4'", "(1000000, 1000000, 3)"),
            made("'<f4'", f"({2**40}, {2**40})"),
            made("'<f4'", "(-1, 5)"),
            made("'<f4'", "(1.5, 2)"),
            made("'<f4'", "(True, True)", bytes(4)),
            made("'|O'", "(1,)", bytes(8)),
            made("[('a', '<f4')]", "(1,)", bytes(4)),
            made("'<M8[s]'", "(1,)", bytes(8)),
            made("'|V0'", "(4,)"),
            b"\x93NUMPY\x01\x00\x0e\x00{'descr': '<f4",
            b"\x93NUMPY\x02\x00\xff\xff\xff\xff",
            b"\x93NUMPY\x09\x00" + made("'<f4'", "(1,)", bytes(4))[8:],
        ],
    )
    def test_that_is_none_is_an_input_error(self, data: bytes) -> None:
        with pytest.raises(InputError, match="no NPY file"):
            npy.decode(data, "x")

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_that_is_broken_is_an_input_error_or_an_array(self, data: st.DataObject) -> None:
        content = bytearray(saved(np.ones((4, 5, 3), np.float32)))
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, 127))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(InputError):
            npy.decode(bytes(content), "x")


class TestAnArchive:
    def test_is_that_of_numpy(self) -> None:
        file = io.BytesIO()
        np.savez_compressed(file, a=np.arange(5), b=np.array(["x", "y"]))
        found = npy.decode_archive(file.getvalue(), "x")
        assert list(found) == ["a", "b"]
        assert found["a"].tolist() == [0, 1, 2, 3, 4] and found["b"].tolist() == ["x", "y"]

    def test_that_unpacks_to_more_than_is_allowed_is_refused(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = io.BytesIO()
        np.savez_compressed(file, a=np.zeros(100_000))
        monkeypatch.setenv("ENGINEWORKS_MAX_ARRAY_BYTES", "500000")
        with pytest.raises(InputError, match="bytes of arrays"):
            npy.decode_archive(file.getvalue(), "x")

    @pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
    def test_of_another_compression_is_refused(self, method: int) -> None:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            archive.writestr("a.npy", saved(np.zeros(3)))
        with pytest.raises(InputError, match="another compression"):
            npy.decode_archive(file.getvalue(), "x")

    @settings(max_examples=200, deadline=None)
    @given(st.data())
    def test_that_is_broken_is_an_input_error_or_arrays(self, data: st.DataObject) -> None:
        file = io.BytesIO()
        np.savez_compressed(file, a=np.arange(5), b=np.array(["x", "y"]))
        content = bytearray(file.getvalue())
        for _ in range(data.draw(st.integers(1, 4))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        with contextlib.suppress(InputError):
            npy.decode_archive(bytes(content), "x")
