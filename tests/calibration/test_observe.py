from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from engineworks.calibration.observe import NUM_BINS, ChannelMean, Histogram, Observer
from engineworks.runtime.errors import CalibrationError

GRAPH = """<ir_version: 9, opset_import: ["" : 18]>
g (float[n, 3] x) => (float[n, 3] y, float[n, 3] z)
<float two = {2.0}> { a = Mul(x, two)  y = Relu(a)  b = Log(x)  z = Neg(b) }"""


def model() -> bytes:
    content: bytes = onnx.parser.parse_model(GRAPH).SerializeToString()
    return content


def plain(values: np.ndarray) -> tuple[float, dict[int, int]]:
    """Limit and counts of all values at once, in float64 and plain Python."""
    magnitudes = [abs(float(v)) for v in values.reshape(-1) if v != 0]
    limit = 2.0**-100
    while limit <= max(magnitudes):
        limit *= 2
    counts: dict[int, int] = {}
    for magnitude in magnitudes:
        index = int(magnitude / limit * NUM_BINS)
        counts[index] = counts.get(index, 0) + 1
    return limit, counts


class TestHistogram:
    @given(
        st.lists(
            hnp.arrays(
                np.float32,
                hnp.array_shapes(max_dims=3, max_side=6),
                elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
            ),
            min_size=1,
            max_size=6,
        )
    )
    @settings(max_examples=100, deadline=None)
    def test_streamed_is_exactly_that_of_all_at_once(self, batches: list[np.ndarray]) -> None:
        histogram = Histogram()
        for batch in batches:
            histogram.add(batch)

        values = np.concatenate([batch.reshape(-1) for batch in batches])
        assert histogram.num_values == values.size
        assert histogram.num_zeros == (values == 0).sum()
        assert (histogram.min, histogram.max) == (values.min(), values.max())
        if values.any():
            limit, counts = plain(values)
            assert histogram.limit == limit
            assert {int(i): int(histogram.counts[i]) for i in np.flatnonzero(histogram.counts)} == (
                counts
            )

    @pytest.mark.parametrize("factor", [1.0, 2.0, 3.7, 2.0**13, 1e-12, 1e30])
    def test_does_not_depend_on_the_order(self, factor: float) -> None:
        rng = np.random.default_rng(1)
        a = rng.normal(size=1000).astype(np.float32)
        b = (factor * rng.normal(size=1000)).astype(np.float32)
        forth, back = Histogram(), Histogram()

        for histogram, order in ((forth, (a, b)), (back, (b, a))):
            for values in order:
                histogram.add(values)

        assert forth.limit == back.limit
        np.testing.assert_array_equal(forth.counts, back.counts)

    def test_counts_more_values_than_one_chunk(self) -> None:
        values = np.random.default_rng(0).normal(size=200_001).astype(np.float32)
        histogram = Histogram()

        histogram.add(values)

        want, _ = np.histogram(np.abs(values), bins=NUM_BINS, range=(0, histogram.limit))
        np.testing.assert_array_equal(histogram.counts, want)

    def test_the_largest_magnitude_lies_in_its_upper_half(self) -> None:
        histogram = Histogram()

        histogram.add(np.array([-5.0, 1.0], np.float32))

        assert histogram.amax == 5.0
        assert histogram.limit == 8.0

    def test_of_zeros_alone_has_no_range_yet(self) -> None:
        histogram = Histogram()

        histogram.add(np.zeros((3, 4), np.float32))

        assert (histogram.num_values, histogram.limit, histogram.amax) == (12, 0.0, 0.0)

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_refuses_what_is_not_finite(self, bad: float) -> None:
        with pytest.raises(CalibrationError, match="NaN or infinity"):
            Histogram().add(np.array([1.0, bad], np.float32))


class TestObserver:
    def test_counts_inputs_inner_tensors_and_outputs(self) -> None:
        observer = Observer(model(), ["x", "a", "y"], threads=1)
        x = np.array([[1.0, 2.0, 4.0]], np.float32)

        observer.observe({"x": x})
        observer.observe({"x": 3 * x})

        seen = {name: (h.min, h.max) for name, h in observer.histograms.items()}
        assert seen == {"x": (1.0, 12.0), "a": (2.0, 24.0), "y": (2.0, 24.0)}

    def test_hands_on_the_graphs_own_outputs_only(self) -> None:
        observer = Observer(model(), ["a"], threads=1)
        x = np.array([[1.0, 2.0, 4.0]], np.float32)

        outputs = observer.observe({"x": x})

        assert list(outputs) == ["y", "z"]
        np.testing.assert_array_equal(outputs["y"], 2 * x)

    def test_names_the_tensor_that_is_not_finite(self) -> None:
        observer = Observer(model(), ["a", "b"], threads=1)

        with pytest.raises(CalibrationError, match="'b' of the float graph: NaN or infinity"):
            observer.observe({"x": np.zeros((1, 3), np.float32)})  # log(0)

    def test_refuses_a_tensor_that_the_graph_does_not_have(self) -> None:
        with pytest.raises(CalibrationError, match=r"no tensors \['c'\]"):
            Observer(model(), ["a", "c"])


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=4),
    st.sampled_from([(5,), (7, 5), (5, 3, 2)]),
)
def test_channel_means_are_those_of_all_values_at_once(
    batches: list[tuple[int, int]], rest: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(len(batches))
    values = [rng.normal(3, 2, (size, *rest)).astype(np.float32) for size, _ in batches]
    channels = ChannelMean()
    for part in values:
        channels.add(part)
    whole = np.concatenate(values).astype(np.float64)
    axes = (0, 2, 3) if whole.ndim == 4 else tuple(range(whole.ndim - 1))
    # float64 sums in another order
    np.testing.assert_allclose(channels.mean, whole.mean(axis=axes), rtol=1e-12)
