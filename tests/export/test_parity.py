from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engineworks.export.parity import check, check_shapes, compare
from engineworks.runtime.errors import ParityError
from engineworks.runtime.tensors import Array, TensorSpec

arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=1, max_dims=4, max_side=4),
    elements=st.floats(-100, 100, width=32),
)


class TestTheMeasures:
    @given(array=arrays)
    def test_are_perfect_for_equal_arrays(self, array: Array) -> None:
        parity = compare({"y": array}, {"y": array})["y"]
        assert (parity.max_rel, parity.mean_rel) == (0, 0)
        # rounding of one division in float64
        assert parity.cosine_worst1pct == pytest.approx(1, abs=1e-12)

    def test_are_those_of_the_definition(self) -> None:
        want = np.array([[3.0, 4.0], [0.0, -8.0]], np.float32)
        got = np.array([[3.0, 3.0], [2.0, -8.0]], np.float32)
        parity = compare({"y": got}, {"y": want})["y"]
        assert parity.max_rel == pytest.approx(2 / 8)
        assert parity.mean_rel == pytest.approx((1 + 2) / (3 + 4 + 8))
        cosines = [(9 + 12) / (5 * 18**0.5), 64 / (8 * 68**0.5)]
        assert parity.cosine == pytest.approx(np.mean(cosines))
        assert parity.cosine_worst1pct == pytest.approx(min(cosines))

    def test_take_the_channels_of_a_place_of_a_map_for_a_row(self) -> None:
        want = np.ones((1, 2, 1, 3), np.float32)
        got = want.copy()
        got[0, :, 0, 0] = [1, -1]
        parity = compare({"y": got}, {"y": want})["y"]
        assert parity.cosine == pytest.approx(2 / 3)
        assert parity.cosine_worst1pct == pytest.approx(0)
        one_channel = compare({"y": got[:, :1]}, {"y": 2 * want[:, :1]})["y"]
        assert one_channel.cosine == pytest.approx(1)

    def test_show_the_tail_that_a_mean_hides(self) -> None:
        want = np.ones((1000, 4), np.float32)
        got = want.copy()
        got[:10] = [1, -1, 1, -1]
        parity = compare({"y": got}, {"y": want})["y"]
        assert parity.cosine > 0.98
        assert parity.cosine_worst1pct == pytest.approx(0)

    def test_count_two_zero_rows_as_equal_and_one_as_different(self) -> None:
        want = np.array([[0, 0], [0, 0]], np.float32)
        got = np.array([[0, 0], [0, 1]], np.float32)
        parity = compare({"y": got}, {"y": want})["y"]
        assert parity.cosine == 0.5
        assert np.isfinite(parity.max_rel)


class TestAnOutputBeyondTheTolerance:
    def test_is_named_with_its_error(self) -> None:
        want = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}
        got = {"a": np.ones(3, np.float32), "b": np.full(3, 1.01, np.float32)}
        assert check(got, want, tolerance=0.02)["b"].max_rel == pytest.approx(0.01, rel=1e-5)
        with pytest.raises(ParityError, match=r"'b' by 1\.00e-02"):
            check(got, want, tolerance=1e-3)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_includes_what_is_not_finite(self, bad: float) -> None:
        ones = np.ones(2, np.float32)
        for got, want in ((ones * bad, ones), (ones, ones * bad)):
            with pytest.raises(ParityError, match="not finite"):
                check({"y": got}, {"y": want}, tolerance=1e9)

    def test_includes_what_is_missing_or_of_another_shape(self) -> None:
        with pytest.raises(ParityError, match="'y' is missing"):
            compare({}, {"y": np.ones(2)})
        with pytest.raises(ParityError, match=r"shape \(1, 2\)"):
            compare({"y": np.ones((1, 2))}, {"y": np.ones(2)})


def test_a_promised_shape_is_compared_name_by_name() -> None:
    outputs = {"map": TensorSpec(dtype="float32", shape=("batch", 4, 4, 8))}
    check_shapes(outputs, {"map": ("batch", 4, 4, 8)})
    with pytest.raises(ParityError, match=r"'map' is \('batch', 4, 4, 8\), not .*'rest' is miss"):
        check_shapes(outputs, {"map": ("batch", 8, 4, 4), "rest": ("batch", 1)})
