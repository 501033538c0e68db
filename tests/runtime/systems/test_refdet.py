from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engineworks.runtime.bundle import Bundle, FileEntry, GraphEntry, Manifest, read
from engineworks.runtime.errors import (
    BundleError,
    EngineError,
    InputError,
    UsageError,
)
from engineworks.runtime.preprocess import PreprocessSpec
from engineworks.runtime.references import Prototypes, View, average
from engineworks.runtime.results import Detections
from engineworks.runtime.systems import (
    Promptable,
    bring_references,
    open_engines,
    open_system,
    prompt,
)
from engineworks.runtime.systems.refdet import NAME, System, contract
from engineworks.runtime.systems.refdet.detecting import InferenceConfig, Params
from engineworks.runtime.tensors import Array, TensorSpec
from engineworks.runtime.testing import (
    FunctionEngine,
    draw_reference,
    draw_scene,
    write_references,
    write_tiny_refdet_bundle,
)

ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


SPEC = PreprocessSpec(size=(40, 60), resize="letterbox", mean=ZERO, std=ONE, pad_value=0)


REFERENCES = SPEC.model_copy(update={"size": (8, 8)})


WIDTHS = (2, 1)


ENCODER = "e" * 64


def bundle(labels: Sequence[str] = (), params: Mapping[str, Any] | None = None) -> Bundle:
    """A bundle whose graphs stand in no file."""
    width = sum(WIDTHS)
    encode = GraphEntry(
        inputs={"images": TensorSpec(dtype="float32", shape=("batch", 3, 8, 8))},
        outputs={"prototypes": TensorSpec(dtype="float32", shape=("batch", width))},
        variants={"float": "encode.onnx"},
    )
    detect = GraphEntry(
        inputs={
            "images": TensorSpec(dtype="float32", shape=("batch", 3, 40, 60)),
            "prototypes": TensorSpec(dtype="float32", shape=("objects", width)),
        },
        outputs={
            "boxes": TensorSpec(dtype="float32", shape=("batch", "candidates", 4)),
            "scores": TensorSpec(dtype="float32", shape=("batch", "candidates")),
            "classes": TensorSpec(dtype="int64", shape=("batch", "candidates")),
        },
        variants={"float": "detect.onnx"},
    )
    known = Params(reference_preprocess=REFERENCES, widths=WIDTHS).model_dump(mode="json")
    manifest = Manifest(
        system=NAME,
        graphs={"encode": encode, "detect": detect},
        preprocess=SPEC,
        labels=tuple(labels),
        params=known if params is None else dict(params),
        files={"encode.onnx": FileEntry(sha256=ENCODER, size_bytes=1)},
    )
    return Bundle(root=Path("somewhere"), manifest=manifest)


Candidate = tuple[Sequence[float], float, int]


def system(
    candidates: Sequence[Candidate] = (),
    labels: Sequence[str] = (),
    objects: Sequence[str] = ("a",),
) -> System:
    """Finds these candidates, in pixels of the network's input, in whatever it is shown.

    The prototype of a picture is its mean red and green, and one. Prompted with ``objects``.
    """
    made = bundle(labels)
    entries = made.manifest.graphs

    def encode(feeds: Mapping[str, Array]) -> dict[str, Array]:
        means = feeds["images"].mean(axis=(2, 3))
        means[:, 2] = 1
        return {"prototypes": means}

    def detect(feeds: Mapping[str, Array]) -> dict[str, Array]:
        boxes = np.array([box for box, _, _ in candidates], np.float32).reshape(-1, 4)
        scores = np.array([score for _, score, _ in candidates], np.float32)
        classes = np.array([kind for _, _, kind in candidates], np.int64)
        answer: dict[str, Array] = {"boxes": boxes, "scores": scores, "classes": classes}
        return {name: np.stack([each] * len(feeds["images"])) for name, each in answer.items()}

    engines = {
        "encode": FunctionEngine(encode, entries["encode"].inputs, entries["encode"].outputs),
        "detect": FunctionEngine(detect, entries["detect"].inputs, entries["detect"].outputs),
    }
    opened = System(made, engines, backend="function", precision="float")
    rows = np.zeros((len(objects), sum(WIDTHS)), np.float32)
    opened.prompt(Prototypes(tuple(objects), rows, ENCODER))
    return opened


def grey(height: int = 40, width: int = 60) -> Array:
    return np.full((height, width, 3), 90, np.uint8)


def calls(opened: System, graph: str) -> list[dict[str, Array]]:
    engine = opened.engines[graph]
    assert isinstance(engine, FunctionEngine)
    return engine.calls


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_tiny_refdet_bundle(tmp_path_factory.mktemp("refdet") / "bundle", int8=True)


class TestAnAnswer:
    def test_has_the_boxes_in_pixels_of_the_image(self) -> None:
        """A picture of 80 x 80 is halved, and stands in the middle of 40 x 60."""
        opened = system([((10, 0, 30, 20), 0.9, 0)])

        (result,) = opened.infer([grey(80, 80)])

        assert [found.box for found in result.objects] == [(0, 0, 40, 40)]

    def test_is_clipped_to_the_image_and_has_none_of_the_padding(self) -> None:
        opened = system([((-9, -9, 30, 50), 0.9, 0), ((0, 0, 10, 40), 0.8, 0)])

        (result,) = opened.infer([grey(80, 80)])

        assert [found.box for found in result.objects] == [(0, 0, 40, 80)]

    def test_names_base_classes_first_and_then_what_was_asked_for(self) -> None:
        four = [((9 * k, 0, 9 * k + 8, 9), 0.9 - k / 10, k) for k in range(4)]
        opened = system(four, labels=("person", "dog"), objects=("cup", "jar"))

        (result,) = opened.infer([grey()])

        assert [found.name for found in result.objects] == ["person", "dog", "cup", "jar"]
        assert opened.names() == ("person", "dog", "cup", "jar")

    def test_is_not_what_looks_more_like_something_else(self) -> None:
        box, near, far = (0, 0, 20, 20), (1, 1, 21, 21), (30, 0, 50, 20)
        candidates = [(box, 0.8, 0), (far, 0.4, 0), (near, 0.9, 1), (far, 0.39, 1), (box, 0.8, 2)]
        opened = system(candidates, objects=("cup", "not-jar", "pen"))

        (result,) = opened.infer([grey()])

        assert [(f.name, round(f.score, 2)) for f in result.objects] == [("cup", 0.4)]

    def test_shows_what_it_knows_objects_by(self) -> None:
        opened = system()
        whole = np.full((30, 40, 3), 90, np.uint8)
        opened.prompt(opened.encode({"cup": [View(whole, (5, 6, 25, 26)), whole]}))
        sheet = opened.draw_references()
        assert sheet is not None
        assert sheet.shape[0] * sheet.shape[1] >= 2 * 30 * 40
        assert (sheet != 90).any()
        opened.prompt(Prototypes(("cup",), np.ones((1, 3), np.float32), ENCODER))
        assert opened.draw_references() is None

    def test_needs_something_to_look_for(self) -> None:
        opened = system()
        with pytest.raises(InputError, match="nothing to look for but not-jar"):
            opened.prompt(Prototypes(("not-jar",), np.ones((1, 3), np.float32), ENCODER))

    def test_keeps_overlapping_boxes_of_different_objects_only(self) -> None:
        box, near = (0, 0, 20, 20), (1, 1, 21, 21)
        opened = system(
            [(box, 0.5, 0), (near, 0.6, 0), (box, 0.7, 1), (near, 0.4, 1)], objects=("a", "b")
        )

        (result,) = opened.infer([grey()])

        assert [(f.name, round(f.score, 2)) for f in result.objects] == [("b", 0.7), ("a", 0.6)]

    @pytest.mark.parametrize(
        ("conf", "left"), [(0.0, 4), (0.25, 3), (0.5, 2), (0.50001, 1), (1.0, 0)]
    )
    def test_has_what_reaches_the_score_asked_for(self, conf: float, left: int) -> None:
        scores = (0.75, 0.5, 0.25, 0.0)
        opened = system([((9 * k, 0, 9 * k + 8, 9), s, 0) for k, s in enumerate(scores)])
        opened.configure(conf=conf)

        assert len(opened.infer([grey()])[0].objects) == left

    @pytest.mark.parametrize(("limit", "left"), [(0.0, 1), (0.32, 1), (0.34, 2), (1.0, 2)])
    def test_drops_what_overlaps_more_than_asked_for(self, limit: float, left: int) -> None:
        opened = system([((0, 0, 20, 20), 0.9, 0), ((10, 0, 30, 20), 0.8, 0)])  # a third
        opened.configure(iou=limit)

        assert len(opened.infer([grey()])[0].objects) == left

    def test_has_no_more_objects_than_allowed(self) -> None:
        opened = system([((k, k, k + 1, k + 1), 0.9 - k / 100, 0) for k in range(30)])
        opened.config = InferenceConfig(max_objects=7)

        found = opened.infer([grey()])[0].objects

        assert [round(each.score, 2) for each in found] == [
            round(0.9 - k / 100, 2) for k in range(7)
        ]

    def test_to_no_picture_is_none_and_runs_nothing(self) -> None:
        opened = system()
        assert opened.infer([]) == []
        assert calls(opened, "detect") == []

    def test_of_no_candidates_is_empty(self) -> None:
        (result,) = system().infer([grey()])
        assert result == Detections(())
        assert result.summary() == "nothing"

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_of_values_that_are_not_finite_is_refused(self, bad: float) -> None:
        for candidate in (((0, 0, bad, 9), 0.9, 0), ((0, 0, 9, 9), bad, 0)):
            with pytest.raises(EngineError, match=r"'detect' graph .* not finite") as caught:
                system([candidate]).infer([grey()])
            assert "--precision float" in str(caught.value.fix)

    def test_is_not_given_for_what_is_no_picture(self) -> None:
        with pytest.raises(InputError):
            system().infer([np.zeros((8, 8), np.uint8)])

    def test_can_be_drawn_on_pictures_of_any_size(self) -> None:
        opened = system([((0, 0, 59, 39), 0.9, 0), ((20, 10, 21, 11), 0.9, 0)])
        for size in ((8, 8), (900, 20), (20, 900)):
            image = grey(*size)
            (result,) = opened.infer([image])
            drawn = opened.draw(image, result)
            assert drawn.shape == image.shape
            assert drawn.dtype == np.uint8
            assert image.max() == 90  # the picture itself is left alone

    @pytest.mark.parametrize("wrong", [{"conf": -0.1}, {"iou": 1.1}])
    def test_is_not_configured_by_what_is_no_share(self, wrong: dict[str, float]) -> None:
        with pytest.raises(InputError, match="shares"):
            system().configure(**wrong)


class TestAPrompt:
    def test_is_the_average_of_each_objects_pictures(self) -> None:
        opened = system()
        levels = {"a": (0, 255, 100, 30, 20), "b": (10,), "c": (200, 3)}  # more than a batch
        pictures = {
            name: [np.full((5, 5, 3), (n, 255 - n, 0), np.uint8) for n in each]
            for name, each in levels.items()
        }

        found = opened.encode(pictures)

        assert (found.names, found.encoder) == (("a", "b", "c"), ENCODER)
        for row, each in zip(found.rows_NP, levels.values(), strict=True):
            rows = np.array([(n / 255, 1 - n / 255, 1) for n in each], np.float32)
            np.testing.assert_allclose(row, average(rows, WIDTHS), atol=1e-6)  # float32
        assert [len(call["images"]) for call in calls(opened, "encode")] == [4, 4]

    def test_is_fed_to_the_graph_as_it_is(self) -> None:
        opened = system()
        rows = np.arange(6, dtype=np.float32).reshape(2, 3)
        opened.prompt(Prototypes(("a", "b"), rows, ENCODER))

        opened.infer([grey(), grey(9, 9)])

        (call,) = calls(opened, "detect")
        assert np.array_equal(call["prototypes"], rows)
        assert call["images"].shape == (2, 3, 40, 60)
        fed = opened.feeds(call["images"])
        assert fed.keys() == {"detect"}
        assert np.array_equal(fed["detect"]["prototypes"], rows)

    def test_of_another_encoder_is_refused_and_says_how_to_make_it_again(self) -> None:
        opened = system()
        foreign = Prototypes(("cup",), np.ones((1, 3), np.float32), "f" * 64)

        with pytest.raises(InputError, match=r"cup were made by another encoder \(ffff") as caught:
            opened.prompt(foreign)

        assert "cli.py refs" in str(caught.value.fix)
        assert opened.names() == ("a",)  # the old one stands

    def test_of_nothing_or_of_another_width_is_refused(self) -> None:
        opened = system()
        for names, shape in (((), (0, 3)), (("a",), (1, 4))):
            with pytest.raises(InputError, match="cannot be looked for"):
                opened.prompt(Prototypes(names, np.ones(shape, np.float32), ENCODER))
        assert opened.encode({}).names == ()

    def test_needs_a_picture_of_each_object(self) -> None:
        with pytest.raises(InputError, match="no picture of 'b'"):
            system().encode({"a": [grey()], "b": []})

    def test_that_is_not_finite_is_refused(self) -> None:
        opened = system()
        engine = opened.engines["encode"]
        assert isinstance(engine, FunctionEngine)
        engine.function = lambda feeds: {
            "prototypes": np.full((len(feeds["images"]), 3), np.nan, np.float32)
        }
        with pytest.raises(EngineError, match="'encode' graph"):
            opened.encode({"a": [grey()]})


class TestABundle:
    @pytest.mark.parametrize(
        "params", [{}, {"num_top": 5}, {"reference_preprocess": {"size": [8, 8]}, "widths": [0, 3]}]
    )
    def test_with_parameters_of_another_system_is_refused(self, params: dict[str, Any]) -> None:
        with pytest.raises(BundleError, match="parameters of bundle somewhere"):
            System(bundle(params=params), {}, backend="none", precision="float")

    def test_whose_prototypes_have_another_width_is_refused(self) -> None:
        params = Params(reference_preprocess=REFERENCES, widths=(2, 2)).model_dump(mode="json")
        made = bundle(params=params)
        with pytest.raises(BundleError, match=r"'prototypes'.*3\), and not.*P = 4"):
            contract(made).check(made)

    def test_closes_its_engines(self) -> None:
        opened = system()
        opened.close()
        opened.close()
        with pytest.raises(EngineError, match="closed"):
            opened.infer([grey()])

    def test_looks_for_its_own_references_where_nothing_else_is_asked_for(
        self, tiny: Bundle, rng: np.random.Generator
    ) -> None:
        image, truth = draw_scene(rng, (64, 96), ["red", "yellow", "blue"])
        with closing(open_system(tiny, backend="ort", threads=1)) as opened:
            assert isinstance(opened, Promptable)
            (result,) = opened.infer([image])

        found = {each.name: each.box for each in result.objects}
        assert found == {"red": tuple(truth[0]), "blue": tuple(truth[2])}

    def test_gets_other_references_of_its_own(self, tiny: Bundle, tmp_path: Path) -> None:
        folder = write_references(tmp_path / "refs", ["white", "green", "violet"])
        bring_references(tiny, folder, tmp_path / "other")

        other = read(tmp_path / "other")

        with closing(open_system(other, backend="ort", threads=1)) as opened:
            assert isinstance(opened, Promptable)
            assert opened.names() == ("green", "violet", "white")
        changed = {
            name
            for name, entry in other.manifest.files.items()
            if entry != tiny.manifest.files[name]
        }
        assert changed == {"references.npz"}

    def test_of_another_system_brings_no_references(self, tiny: Bundle, tmp_path: Path) -> None:
        manifest = tiny.manifest.model_copy(update={"system": "paco"})
        with pytest.raises(UsageError, match="'paco' is not told what to look for"):
            bring_references(Bundle(tiny.root, manifest), tmp_path, tmp_path / "out")


@pytest.mark.parametrize("backend", ["ort", "openvino"])
@pytest.mark.parametrize("precision", ["float", "int8"])
class TestARealEngine:
    def test_finds_each_object_and_only_those_that_are_asked_for(
        self, tiny: Bundle, backend: str, precision: str, rng: np.random.Generator
    ) -> None:
        engines = open_engines(tiny, backend, precision, threads=1)
        with closing(System(tiny, engines, backend=backend, precision=precision)) as opened:
            for names in (["green"], ["yellow", "violet", "white"], ["red", "blue"]):
                image, truth = draw_scene(rng, (128, 192), [*names, "red", "blue"][:5])
                pictures = {name: [draw_reference(rng, (50, 40), name)] for name in names}
                opened.prompt(opened.encode(pictures))

                (result,) = opened.infer([image])

                found = {each.name: each.box for each in result.objects}
                assert found == {name: tuple(truth[i]) for i, name in enumerate(names)}

    def test_gives_what_a_fresh_process_gives_whatever_was_asked_before(
        self, tiny: Bundle, backend: str, precision: str, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        image, _ = draw_scene(rng, (90, 140), ["red", "white", "blue", "green"])
        first = write_references(tmp_path / "first", ["red", "green"])
        second = write_references(tmp_path / "second", ["white"])

        def answers(*folders: Path) -> Detections:
            with closing(open_system(tiny, backend=backend, precision=precision)) as opened:
                assert isinstance(opened, Promptable)
                for folder in folders:
                    prompt(opened, folder)
                    result = opened.infer([image])[0]
            return result

        assert answers(second) == answers(first, second)
        assert answers(first) == answers(second, first) == answers(first, second, first)

    def test_knows_prototypes_that_the_other_backend_and_precision_made(
        self, tiny: Bundle, backend: str, precision: str, rng: np.random.Generator, tmp_path: Path
    ) -> None:
        image, truth = draw_scene(rng, (64, 96), ["white", "red"])
        pictures = {"white": [draw_reference(rng, (40, 40), "white")]}
        with closing(open_system(tiny, backend="ort", precision="float")) as maker:
            assert isinstance(maker, Promptable)
            maker.encode(pictures).save(tmp_path / "white.npz")
        with closing(open_system(tiny, backend=backend, precision=precision)) as opened:
            prompt(opened, tmp_path / "white.npz")
            assert isinstance(opened, Promptable)
            (result,) = opened.infer([image])

        assert [(f.name, f.box) for f in result.objects] == [("white", tuple(truth[0]))]


def test_a_swap_runs_no_graph_but_that_of_new_pictures(
    tiny: Bundle, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a set of 20 objects that are encoded already, and of one, whose picture is encoded."""
    with closing(open_system(tiny, backend="ort", threads=1)) as opened:
        assert isinstance(opened, Promptable)
        one = opened.encode({"red": [draw_reference(rng, (32, 32), "red")]})
        many = Prototypes(tuple(map(str, range(20))), one.rows_NP.repeat(20, axis=0), one.encoder)
        ran: list[str] = []
        for name, engine in opened.engines.items():

            def run(feeds: Any, name: str = name, engine: Any = engine) -> Any:
                ran.append(name)
                return type(engine).run(engine, feeds)

            monkeypatch.setattr(engine, "run", run)

        opened.prompt(many)
        assert ran == []
        opened.prompt(opened.encode({"red": [draw_reference(rng, (32, 32), "red")]}))
        assert ran == ["encode"]


BOX, AWAY = (10.0, 10.0, 30.0, 30.0), (35.0, 5.0, 55.0, 25.0)
