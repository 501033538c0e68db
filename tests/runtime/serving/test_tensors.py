"""Pictures and answers as tensors."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from engineworks.runtime.errors import ImageError, InputError
from engineworks.runtime.planes import PLANES
from engineworks.runtime.results import (
    AnomalyMap,
    Candidate,
    Classification,
    DefectMap,
    Detection,
    Detections,
    Embedding,
)
from engineworks.runtime.serving.tensors import (
    DATATYPES,
    answers,
    in_letters,
    inputs,
    letters,
    outputs,
    pictures,
)
from engineworks.runtime.sources import PICTURES

MAP = np.arange(6, dtype=np.float32).reshape(2, 3)
FOUND = Detections(
    (Detection("bolt", 0.1 + 0.2, (1.5, 2, 3, 4)), Detection("nut", 0.25, (0, 0, 1, 1)))
)
RESULTS: dict[str, list[Any]] = {
    "anomalies": [
        AnomalyMap(0.1 + 0.2, 0.25, 1.0, MAP, None),
        AnomalyMap(0, 0.25, 1.0, -MAP, None),
    ],
    "classes": [Classification("ä", 1, 1 / 3, (("ä", 1 / 3),), MAP[0])],
    "defects": [
        DefectMap(MAP, (Candidate(3, 4, 1 / 3),), 0.5),
        DefectMap(MAP, (Candidate(1, 2, 0.9), Candidate(5, 6, 0.1)), 0.5),
    ],
    "objects": [FOUND, Detections(())],
    "nothing": [Detections(())],
    "vectors": [Embedding(MAP[0])],
}


class TestAnswers:
    @pytest.mark.parametrize("name", RESULTS)
    def test_are_what_the_model_promises(self, name: str) -> None:
        results = RESULTS[name]
        made, promised = answers(results), outputs(type(results[0]))
        assert list(made) == [tensor.name for tensor in promised]
        for tensor in promised:
            array = made[tensor.name]
            assert array.dtype == DATATYPES[tensor.datatype]
            assert array.ndim == len(tensor.shape) and len(array) == len(results)
            assert all(
                want in (-1, got) for want, got in zip(tensor.shape, array.shape, strict=True)
            )
            assert array.size  # what is empty, some servers cannot pass on

    @pytest.mark.parametrize("name", RESULTS)
    def test_bring_the_line_of_json_of_each_picture(self, name: str) -> None:
        lines = answers(RESULTS[name])["json"]
        assert [json.loads(line) for line in lines[:, 0]] == [r.to_json() for r in RESULTS[name]]

    def test_round_no_number(self) -> None:
        assert answers(RESULTS["anomalies"])["score"][0, 0] == 0.1 + 0.2
        assert answers(RESULTS["objects"])["scores"][0].tolist() == [0.1 + 0.2, 0.25]
        assert answers(RESULTS["classes"])["probability"][0, 0] == 1 / 3
        assert answers(RESULTS["defects"])["candidates"][0].tolist() == [[3, 4, 1 / 3], [0, 0, 0]]

    def test_say_how_many_of_a_list_count(self) -> None:
        made = answers(RESULTS["objects"])
        assert made["num_objects"].tolist() == [[2], [0]]
        assert made["names"].tolist() == [[b"bolt", b"nut"], [b"", b""]]
        assert made["boxes"][0].tolist() == [[1.5, 2, 3, 4], [0, 0, 1, 1]]
        assert made["boxes"][1].tolist() == [[0] * 4] * 2

    def test_of_different_sizes_are_no_one_tensor(self) -> None:
        maps = [
            DefectMap(MAP, (Candidate(0, 0, 1),), 1),
            DefectMap(MAP.T, (Candidate(0, 0, 1),), 1),
        ]
        with pytest.raises(InputError, match="different sizes"):
            answers(maps)

    @pytest.mark.parametrize("name", RESULTS)
    def test_travel_in_letters_as_well(self, name: str) -> None:
        made = answers(RESULTS[name])
        for tensor in outputs(type(RESULTS[name][0])):
            spec, array = in_letters(tensor), letters(tensor, made[tensor.name])
            assert array.ndim == len(spec.shape) and array.dtype == DATATYPES[spec.datatype]
            if tensor.datatype == "BYTES":
                rows = array.reshape(-1, array.shape[-1])
                texts = [row.tobytes().rstrip(b" ") for row in rows]
                assert texts == made[tensor.name].ravel().tolist()
            else:
                assert array is made[tensor.name]


class TestPictures:
    def test_are_taken_as_they_are(self, rng: np.random.Generator) -> None:
        images = rng.integers(0, 256, (2, 4, 5, 3), dtype=np.uint8)
        read = pictures(PICTURES, {"images": images}, max_pictures=2)
        assert (np.stack(read) == images).all()

    @pytest.mark.parametrize("form", [bytes, lambda data: base64.b64encode(data).decode()])
    def test_are_decoded(self, rng: np.random.Generator, form: Callable[[bytes], Any]) -> None:
        image = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        data = cv2.imencode(".png", image[..., ::-1])[1].tobytes()
        given = np.array([[form(data)]], object)
        (read,) = pictures(PICTURES, {"encoded": given}, max_pictures=1)
        assert (read == image).all()

    @pytest.mark.parametrize("suffix", [".npy", ".tif"])
    def test_of_planes_keep_their_values(
        self, rng: np.random.Generator, tmp_path: Path, suffix: str
    ) -> None:
        from engineworks.runtime import planes

        values = rng.integers(0, 1 << 16, (8, 9, 3), dtype=np.uint16)
        planes.write(tmp_path / f"a{suffix}", values)
        given = np.array([[(tmp_path / f"a{suffix}").read_bytes()]], object)
        (read,) = pictures(PLANES, {"encoded": given}, max_pictures=1)
        assert read.dtype == np.uint16 and (read == values).all()

    @pytest.mark.parametrize(
        "feeds",
        [
            {},
            {"pixels": np.zeros((1, 2, 2, 3), np.uint8)},
            {"images": np.zeros((1, 2, 2, 3), np.uint8), "encoded": np.array([[b""]], object)},
            {"images": np.zeros((2, 2, 3), np.uint8)},
            {"images": np.zeros((1, 2, 2, 4), np.uint8)},
            {"images": np.zeros((1, 2, 2, 3), np.float32)},
            {"images": np.zeros((0, 2, 2, 3), np.uint8)},
            {"images": np.zeros((3, 2, 2, 3), np.uint8)},
            {"images": np.uint8(3)},
            {"encoded": np.zeros((1, 2, 2, 3), np.uint8)},
            {"encoded": np.array([["no base64!"]], object)},
            {"encoded": np.array([["ä"]], object)},
        ],
    )
    def test_that_are_none_are_refused(self, feeds: dict[str, Any]) -> None:
        arrays = {name: np.asarray(given) for name, given in feeds.items()}
        with pytest.raises(InputError):
            pictures(PICTURES, arrays, max_pictures=2)

    def test_that_cannot_be_decoded_are_refused_by_their_place(self) -> None:
        given = np.array([[b"\x89PNG\r\n\x1a\n"]], object)
        with pytest.raises(ImageError, match="picture 0"):
            pictures(PICTURES, {"encoded": given}, max_pictures=1)

    def test_have_no_more_pixels_together_than_allowed(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = cv2.imencode(".png", np.zeros((30, 40, 3), np.uint8))[1].tobytes()
        given = {"encoded": np.array([[file]] * 2, object)}
        monkeypatch.setenv("ENGINEWORKS_MAX_REQUEST_PIXELS", "2400")
        assert len(pictures(PICTURES, given, max_pictures=2)) == 2

        monkeypatch.setenv("ENGINEWORKS_MAX_REQUEST_PIXELS", "2399")
        with pytest.raises(InputError, match="the request asks for 2,400 pixels"):
            pictures(PICTURES, given, max_pictures=2)

    def test_have_names_that_the_reader_knows(self) -> None:
        assert [t.datatype for t in inputs(PICTURES)] == ["UINT8", "BYTES"]
        assert [t.datatype for t in inputs(PLANES)] == ["FP32", "BYTES"]
