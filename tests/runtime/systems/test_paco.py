from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engineworks.runtime import images
from engineworks.runtime.bundle import Bundle, GraphEntry, Manifest, Threshold
from engineworks.runtime.errors import BundleError, DatasetError, EngineError, InputError
from engineworks.runtime.metrics import ClassificationMetrics
from engineworks.runtime.preprocess import PreprocessSpec, apply
from engineworks.runtime.systems import open_engines
from engineworks.runtime.systems.paco import NAME, Params, System, contract
from engineworks.runtime.tensors import Array, TensorSpec
from engineworks.runtime.testing import (
    FunctionEngine,
    draw_flower,
    write_flowers,
    write_tiny_paco_bundle,
)

LABELS = ("rye", "wheat", "oat")
SPEC = PreprocessSpec(size=(8, 8), mean=(0, 0, 0), std=(1, 1, 1))


def bundle(
    labels: Sequence[str] = LABELS, params: dict[str, Any] | None = None, num_classes: int = 3
) -> Bundle:
    """A bundle whose graph stands in no file."""
    entry = GraphEntry(
        inputs={"images": TensorSpec(dtype="float32", shape=("batch", 3, 8, 8))},
        outputs={
            "logits": TensorSpec(dtype="float32", shape=("batch", num_classes)),
            "embedding": TensorSpec(dtype="float32", shape=("batch", 3)),
        },
        variants={"float": "classify.onnx"},
    )
    manifest = Manifest(
        system=NAME,
        graphs={"classify": entry},
        preprocess=SPEC,
        labels=tuple(labels),
        params=Params().model_dump(mode="json") if params is None else params,
    )
    return Bundle(root=Path("somewhere"), manifest=manifest)


def system(bundle: Bundle, scale: float = 40.0) -> System:
    """Logits are the mean red, green and blue times ``scale``; the embedding is those means."""
    entry = bundle.manifest.graphs["classify"]

    def classify(feeds: Any) -> dict[str, Array]:
        means = feeds["images"].mean(axis=(2, 3))
        return {"logits": np.float32(scale) * means, "embedding": means}

    engine = FunctionEngine(classify, entry.inputs, entry.outputs)
    return System(bundle, {"classify": engine}, backend="function", precision="float")


def flat(red: int, green: int, blue: int, size: tuple[int, int] = (10, 12)) -> Array:
    return np.full((*size, 3), (red, green, blue), np.uint8)


def softmax(logits: Array) -> Array:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(weights / weights.sum())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_paco_bundle(tmp_path_factory.mktemp("paco") / "bundle", int8=True)


class TestAnAnswer:
    @settings(max_examples=30)
    @given(st.lists(st.tuples(*[st.integers(0, 255)] * 3), min_size=1, max_size=4))
    def test_ranks_the_classes_by_the_softmax_of_the_logits(
        self, colours: list[tuple[int, int, int]]
    ) -> None:
        pictures = [flat(*colour) for colour in colours]
        means = apply(SPEC, pictures).mean(axis=(2, 3))

        results = system(bundle()).infer(pictures)

        assert len(results) == len(pictures)
        for result, mean in zip(results, means, strict=True):
            want = softmax(np.float32(40) * mean)
            assert result.index == np.argmax(want)
            assert result.label == LABELS[result.index] == result.top[0][0]
            assert result.probability == result.top[0][1]
            found = dict(result.top)
            # float64 sums in another order
            assert [found[label] for label in LABELS] == pytest.approx(want, rel=1e-12)
            values = [p for _, p in result.top]
            assert values == sorted(values, reverse=True)
            np.testing.assert_array_equal(result.embedding_F, mean)

    def test_lists_as_many_classes_as_the_bundle_says(self) -> None:
        (two,) = system(bundle(params={"num_top": 2})).infer([flat(9, 200, 100)])
        (all_three,) = system(bundle(params={"num_top": 99})).infer([flat(9, 200, 100)])

        assert [label for label, _ in two.top] == ["wheat", "oat"]
        assert [label for label, _ in all_three.top] == ["wheat", "oat", "rye"]

    def test_of_equal_logits_is_the_first_class(self) -> None:
        (result,) = system(bundle()).infer([flat(70, 70, 70)])

        assert [label for label, _ in result.top] == list(LABELS)
        assert result.probability == pytest.approx(1 / 3)

    def test_of_many_equal_logits_lists_the_classes_in_their_order(self) -> None:
        """So many that a sort which is not stable would change their order."""
        labels = [f"{i:03d}" for i in range(300)]
        made = bundle(labels=labels, params={"num_top": 300}, num_classes=300)
        entry = made.manifest.graphs["classify"]
        logits = np.repeat(np.float32([[1, 2, 1]]), 100, axis=1)

        def classify(feeds: Any) -> dict[str, Array]:
            return {"logits": logits, "embedding": np.zeros((1, 3), np.float32)}

        engine = FunctionEngine(classify, entry.inputs, entry.outputs)
        opened = System(made, {"classify": engine}, backend="function", precision="float")
        (result,) = opened.infer([flat(1, 2, 3)])

        found = [label for label, _ in result.top]
        assert found == [*labels[100:200], *labels[:100], *labels[200:]]

    def test_survives_logits_whose_exponential_overflows(self) -> None:
        (result,) = system(bundle(), scale=1e5).infer([flat(255, 0, 0)])

        assert [p for _, p in result.top] == [1.0, 0.0, 0.0]

    def test_does_not_depend_on_the_rest_of_the_batch(self, tiny: Bundle) -> None:
        rng = np.random.default_rng(5)
        pictures = [draw_flower(rng, (70, 90), label) for label in ("red", "white", "blue")]
        engines = open_engines(tiny, "ort", "float", threads=1)
        with closing(System(tiny, engines, backend="ort", precision="float")) as opened:
            together = opened.infer(pictures)
            alone = [opened.infer([picture])[0] for picture in pictures]

        assert [result.label for result in together] == ["red", "white", "blue"]
        for one, other in zip(together, alone, strict=True):
            # float32 kernels may sum a batch in another order
            assert one.probability == pytest.approx(other.probability, abs=1e-5)

    def test_to_no_picture_is_none_and_runs_nothing(self) -> None:
        opened = system(bundle())

        assert opened.infer([]) == []
        assert opened.engines["classify"].calls == []  # type: ignore[attr-defined]

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_of_values_that_are_not_finite_is_refused(self, bad: float) -> None:
        opened = system(bundle(), scale=bad)

        with pytest.raises(EngineError, match=r"'classify' graph .* not finite") as caught:
            opened.infer([flat(1, 2, 3)])
        assert "--precision float" in str(caught.value.fix)

    def test_is_not_given_for_what_is_no_picture(self) -> None:
        with pytest.raises(InputError):
            system(bundle()).infer([np.zeros((8, 8), np.uint8)])

    def test_can_be_drawn_on_pictures_of_any_size(self) -> None:
        opened = system(bundle())
        for size in ((8, 8), (3000, 20), (20, 3000)):
            (result,) = opened.infer([flat(9, 9, 200, size)])

            made = opened.draw(flat(9, 9, 200, size), result)

            assert made.dtype == np.uint8
            assert made.ndim == 3
            assert min(made.shape[:2]) >= 90


SURE = {"num_pictures": 40, "temperature": 4.0, "coverage": 0.9, "limit": 0.25, "budget": 0.05}


def sure(precisions: Sequence[str] = ("float",), **changes: float) -> Bundle:
    """A bundle that knows how sure it may be."""
    params = {"confidence": dict.fromkeys(precisions, SURE | changes)}
    made = bundle(params=params)
    thresholds = {
        f"unknown-{precision}": Threshold(value=1.0, source="chosen") for precision in precisions
    }
    return dataclasses.replace(
        made, manifest=made.manifest.model_copy(update={"thresholds": thresholds})
    )


class TestHowSureItIs:
    def test_is_said_by_calibrated_probabilities_a_set_and_whether_it_is_unknown(self) -> None:
        picture = flat(255, 225, 10)
        means = apply(SPEC, [picture]).mean(axis=(2, 3))[0]

        (result,) = system(sure()).infer([picture])

        want = softmax(np.float32(40) * means / 4)
        assert dict(result.top) == pytest.approx(dict(zip(LABELS, want, strict=True)), rel=1e-6)
        assert result.prediction_set == ("rye",)  # of 0.76, 0.24 and 0.00; 0.25 is asked
        assert result.is_unknown is False

    def test_leaves_the_order_of_the_classes_as_it_was(self) -> None:
        pictures = [flat(*colour) for colour in np.random.default_rng(0).integers(0, 256, (20, 3))]

        for one, other in zip(
            system(sure()).infer(pictures), system(bundle()).infer(pictures), strict=True
        ):
            assert [label for label, _ in one.top] == [label for label, _ in other.top]

    def test_is_unknown_from_its_border_on(self) -> None:
        """Three equal classes: the surprise at each is ln 3."""
        made = sure()
        for value, unknown in ((np.log(3) - 1e-9, True), (np.log(3) + 1e-9, False)):
            border = {"unknown-float": Threshold(value=value, source="chosen")}
            moved = made.manifest.model_copy(update={"thresholds": border})
            (result,) = system(dataclasses.replace(made, manifest=moved)).infer([flat(9, 9, 9)])
            assert result.is_unknown is unknown

    def test_has_an_empty_set_where_nothing_is_probable(self) -> None:
        (result,) = system(sure(limit=0.9)).infer([flat(9, 9, 9)])
        assert result.prediction_set == ()

    def test_is_not_said_by_a_bundle_of_before(self) -> None:
        (result,) = system(bundle()).infer([flat(200, 10, 10)])

        assert result.prediction_set is None and result.is_unknown is None
        assert set(result.to_json()) == {"label", "probability", "top"}

    @pytest.mark.parametrize(
        ("precision", "said"),
        [("int8", "int8"), ("int8-bf16", "int8"), ("float", "float"), ("bf16", "float")],
    )
    def test_is_that_of_the_graph_that_runs(self, precision: str, said: str) -> None:
        for known in ("float", "int8"):
            made = sure([known])
            opened = System(made, {}, backend="function", precision=precision)
            assert (opened.confidence is not None) == (known == said)

    def test_needs_the_border_that_belongs_to_it(self) -> None:
        made = bundle(params={"confidence": {"int8": SURE}})
        with pytest.raises(BundleError, match="no threshold 'unknown-int8'"):
            contract(made).check(made)


class TestFittingHowSure:
    @pytest.fixture
    def fields(self, tmp_path: Path) -> Path:
        """Colours near the classes' own, some nearer to another's."""
        rng = np.random.default_rng(2)
        for split, count in {"train": 1, "val": 60, "test": 60}.items():
            for i, name in enumerate(LABELS):
                for n in range(count):
                    colour = rng.integers(90, 130, 3)
                    colour[i] += 25
                    images.write(tmp_path / split / name / f"{n}.png", flat(*colour))
        return tmp_path

    def test_makes_confidence_right_and_covers_what_it_says(self, fields: Path) -> None:
        opened = system(bundle(), scale=1000)
        made = opened.fit_confidence(fields)

        contract(made).check(made)
        before = opened.evaluate(fields)
        judged = system(made, scale=1000).evaluate(fields)
        assert before.metrics["ece"] > 0.1
        # of 180 pictures even a perfect classifier's is not 0
        assert judged.metrics["ece"] < before.metrics["ece"] / 2
        assert judged.metrics["ece_uncalibrated"] == before.metrics["ece"]
        assert judged.metrics["top1"] == before.metrics["top1"]
        # 180 pictures to fit and 180 to judge: two standard deviations
        assert judged.metrics["coverage"] == pytest.approx(0.9, abs=0.064)
        assert 1 <= judged.metrics["set_size"] < 2
        assert judged.decisions[0].rates["called unknown"].of == 180
        assert judged.decisions[0].rates["called unknown"].count < 25
        assert set(before.metrics) == set(judged.metrics) - {
            "ece_uncalibrated",
            "coverage",
            "set_size",
        }

    def test_keeps_the_shares_that_were_asked_for_and_the_other_precision(
        self, fields: Path
    ) -> None:
        made = sure(["int8"], coverage=0.6, budget=0.2)

        found = system(made).fit_confidence(fields)

        known = found.params(Params).confidence
        assert known["int8"] == made.params(Params).confidence["int8"]
        assert (known["float"].coverage, known["float"].budget) == (0.6, 0.2)
        assert known["float"].num_pictures == 180
        assert set(found.manifest.thresholds) == {"unknown-int8", "unknown-float"}

    def test_drops_what_is_stale_where_there_is_nothing_to_fit_on(self, fields: Path) -> None:
        shutil.rmtree(fields / "val")
        for data in (None, fields, fields / "test"):  # one folder is no validation set
            found = system(sure(["float", "int8"])).fit_confidence(data)
            assert set(found.params(Params).confidence) == {"int8"}
            assert set(found.manifest.thresholds) == {"unknown-int8"}

    def test_warns_where_what_it_was_fitted_on_judges_it(self, fields: Path) -> None:
        shutil.rmtree(fields / "test")
        made = system(bundle()).fit_confidence(fields)

        judged = system(made).evaluate(fields)

        assert "no split 'test'" in judged.warnings[-1]


class TestABundle:
    @pytest.mark.parametrize("params", [{"num_top": 0}, {"num_top": "5"}, {"k": 3}])
    def test_with_parameters_of_another_system_is_refused(self, params: dict[str, Any]) -> None:
        with pytest.raises(BundleError, match="parameters of bundle somewhere"):
            system(bundle(params=params))

    def test_without_a_label_for_every_class_is_refused(self) -> None:
        made = bundle(num_classes=4)
        with pytest.raises(BundleError, match=r"'logits'.*\(batch, 4\).*C = 3"):
            contract(made).check(made)

    def test_closes_its_engines(self) -> None:
        opened = system(bundle())

        opened.close()
        opened.close()

        with pytest.raises(EngineError, match="closed"):
            opened.infer([flat(1, 2, 3)])


class TestEvaluating:
    @pytest.fixture
    def fields(self, tmp_path: Path) -> Path:
        """By name the classes are oat, rye, wheat: another order than the bundle's."""
        for name, colours in {
            "test/rye": [(200, 10, 10), (200, 190, 10), (10, 200, 10)],
            "test/wheat": [(10, 200, 10)],
            "test/oat": [(10, 10, 200), (10, 200, 190)],
        }.items():
            for i, colour in enumerate(colours):
                images.write(tmp_path / name / f"{i}.png", flat(*colour))
        return tmp_path

    def test_knows_the_classes_by_name(self, fields: Path) -> None:
        shown: list[tuple[int, int]] = []
        opened = system(bundle())

        found = opened.evaluate(fields, progress=lambda done, of: shown.append((done, of))).metrics

        # wrong are one rye and one oat
        assert found["top1"] == pytest.approx(4 / 6)
        assert found["balanced_accuracy"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
        want = ClassificationMetrics(3)
        for label, name in enumerate(LABELS):
            for path in sorted((fields / "test" / name).iterdir()):
                means = apply(SPEC, [images.read(path)]).mean(axis=(2, 3))
                want.update(np.float32(40) * means[0], label)
        assert found == pytest.approx(want.compute())
        assert shown == [(6, 6)]

    def test_takes_test_before_val_and_a_folder_of_classes_as_it_is(self, fields: Path) -> None:
        opened = system(bundle())
        on_test = opened.evaluate(fields).metrics

        assert opened.evaluate(fields / "test").metrics == on_test
        images.write(fields / "val" / "rye" / "0.png", flat(10, 10, 200))
        assert opened.evaluate(fields).metrics == on_test
        shutil.rmtree(fields / "test")
        assert opened.evaluate(fields).metrics["top1"] == 0

    def test_does_not_look_at_training_pictures(self, fields: Path) -> None:
        (fields / "test").rename(fields / "train")

        with pytest.raises(DatasetError, match="no pictures of the split 'val'"):
            system(bundle()).evaluate(fields)

    def test_refuses_a_class_that_the_bundle_does_not_know(self, fields: Path) -> None:
        images.write(fields / "test" / "barley" / "0.png", flat(1, 2, 3))

        with pytest.raises(DatasetError, match="class 'barley'") as caught:
            system(bundle()).evaluate(fields)
        assert "rename" in str(caught.value.fix)

    def test_goes_through_a_parquet_file_as_through_folders(
        self, fields: Path, tmp_path: Path
    ) -> None:
        pa = pytest.importorskip("pyarrow")
        pq = pytest.importorskip("pyarrow.parquet")
        paths = sorted((fields / "test").rglob("*.png"))
        names = [path.parent.name for path in paths]
        rows = {
            "image": [path.read_bytes() for path in paths],
            "label": [sorted(set(names)).index(name) for name in names],
            "class_name": names,
            "split": ["test"] * len(names),
        }
        (tmp_path / "packed").mkdir()
        pq.write_table(pa.table(rows), tmp_path / "packed" / "fields.parquet")
        opened = system(bundle())

        assert opened.evaluate(tmp_path / "packed").metrics == opened.evaluate(fields).metrics

    def test_of_many_pictures_goes_batch_by_batch(self, tmp_path: Path) -> None:
        for i in range(19):
            images.write(tmp_path / "rye" / f"{i:02}.png", flat(200, 0, 0))
        opened = system(bundle())
        shown: list[tuple[int, int]] = []

        opened.evaluate(tmp_path, progress=lambda done, of: shown.append((done, of)))

        calls = opened.engines["classify"].calls  # type: ignore[attr-defined]
        assert [len(call["images"]) for call in calls] == [8, 8, 3]
        assert shown == [(8, 19), (16, 19), (19, 19)]


@pytest.mark.parametrize("backend", ["ort", "openvino"])
@pytest.mark.parametrize("precision", ["float", "int8"])
def test_real_engines_know_drawn_flowers(
    tiny: Bundle, tmp_path: Path, backend: str, precision: str
) -> None:
    flowers = write_flowers(tmp_path / "flowers", size=(50, 60))
    engines = open_engines(tiny, backend, precision, threads=1)
    with closing(System(tiny, engines, backend=backend, precision=precision)) as opened:
        found = opened.evaluate(flowers).metrics

    assert found["top1"] == found["top5"] == found["balanced_accuracy"] == 1.0
    assert found["nll"] < 0.1


def test_the_result_is_frozen_and_has_the_embedding_of_the_graph(tiny: Bundle) -> None:
    engines = open_engines(tiny, "ort", "float", threads=1)
    with closing(System(tiny, engines, backend="ort", precision="float")) as opened:
        (result,) = opened.infer([flat(200, 10, 10, (64, 64))])

    assert dataclasses.is_dataclass(result)
    assert result.embedding_F.shape == (16,)
    assert result.embedding_F.dtype == np.float32
