"""What Triton's Python backend loads: a whole system, its batches put together by Triton.

Only Triton can import it. Tensors pass by DLPack, whose memory NumPy 2 and the backend see alike:
what ``as_numpy`` gives under NumPy 2 are other pixels, without an error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton

from engineworks.runtime.errors import EngineworksError, InputError
from engineworks.runtime.refusals import explain
from engineworks.runtime.serving.tensors import (
    ENCODED,
    RAW,
    answers,
    blank,
    letters,
    outputs,
    pictures,
)
from engineworks.runtime.systems import open_bundle
from engineworks.runtime.tensors import Array

_MAX_PICTURES = 64  # of a request; Triton's own limit is max_batch_size


class TritonPythonModel:
    """A model as Triton calls it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Verify, open and warm the bundle beside the model's file."""
        sys.unraisablehook = _told
        config = json.loads(args["model_config"])
        options = {k: v["string_value"] for k, v in config.get("parameters", {}).items()}
        folder = Path(args["model_repository"]) / args["model_version"] / "bundle"
        self._system = open_bundle(
            folder,
            backend=options.get("backend") or "auto",
            precision=options.get("precision") or "auto",
            threads=int(options["threads"]) if options.get("threads") else None,
        )
        size = self._system.bundle.manifest.preprocess.size
        (result,) = self._system.infer([blank(self._system.reader, size)])
        self._outputs = outputs(type(result))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, in one call of the system where it takes all their pictures."""
        read = [self._read(request) for request in requests]
        whole = [image for images in read if isinstance(images, list) for image in images]
        try:
            results = iter(self._system.infer(whole) if whole else ())
            answered = [
                images if isinstance(images, EngineworksError) else [next(results) for _ in images]
                for images in read
            ]
        except Exception:  # one of them must not take the others along
            answered = [self._alone(images) for images in read]
        return [self._response(each) for each in answered]

    def finalize(self) -> None:
        self._system.close()

    def _read(self, request: Any) -> list[Array] | EngineworksError:
        try:
            feeds: dict[str, Array] = {}
            for name in (RAW, ENCODED):
                tensor = triton.get_input_tensor_by_name(request, name)
                if tensor is not None:
                    feeds[name] = np.from_dlpack(tensor)
            if ENCODED in feeds:
                files = np.empty(len(feeds[ENCODED]), np.object_)
                files[:] = [row.tobytes() for row in feeds[ENCODED]]
                feeds[ENCODED] = files
            return pictures(self._system.reader, feeds, max_pictures=_MAX_PICTURES)
        except Exception as error:  # a client is told what the command line would say
            return explain(error)

    def _alone(self, images: list[Array] | EngineworksError) -> Any:
        if isinstance(images, EngineworksError):
            return images
        try:
            return self._system.infer(images)
        except Exception as error:  # as above
            return explain(error)

    def _response(self, answered: Any) -> Any:
        if not isinstance(answered, EngineworksError):
            try:
                made = answers(answered)
                return triton.InferenceResponse(
                    [
                        # a copy: memory that must not be written to cannot be passed on
                        triton.Tensor.from_dlpack(
                            each.name, np.array(letters(each, made[each.name]))
                        )
                        for each in self._outputs
                    ]
                )
            except InputError as error:
                answered = error
        code = (
            triton.TritonError.INVALID_ARG
            if isinstance(answered, InputError)
            else triton.TritonError.INTERNAL
        )
        return triton.InferenceResponse([], error=triton.TritonError(str(answered), code))


def _told(unraisable: Any) -> None:
    """Leaves out a line per tensor: the backend renames what NumPy passes to a name of its own.

    It frees the memory all the same.
    """
    if "PyCapsule_GetPointer" not in str(unraisable.exc_value):
        sys.__unraisablehook__(unraisable)
