"""The Open Inference Protocol v2 on kserve's model server: requests to models, errors to statuses.

Of kserve this takes the endpoints, the messages and the gRPC service. What it does with the content
of requests is replaced where it would make a list of every pixel, or take no picture that is not
UTF-8.
"""

from __future__ import annotations

import asyncio
import struct
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any

import grpc
import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve import InferInput, InferOutput, InferRequest, InferResponse
from kserve import Model as KserveModel
from kserve.errors import InvalidInput, ModelNotFound
from kserve.model_repository import ModelRepository
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.infer_type import RequestedOutput
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.v2_datamodels import InferenceRequest

from engineworks import __version__
from engineworks.runtime.errors import BusyError, EngineworksError, InputError
from engineworks.runtime.refusals import explain
from engineworks.runtime.serving.models import Model, metadata
from engineworks.runtime.serving.tensors import DATATYPES
from engineworks.runtime.tensors import Array

_JSON_LENGTH = "inference-header-content-length"
_MAX_AXES = 8
_CUT = 200  # letters of what a client sent, when it is told of it
# what kserve's messages and NumPy end in, where a request is none
_BROKEN = (ValueError, TypeError, KeyError, AttributeError, OverflowError, struct.error)


def status(error: EngineworksError) -> tuple[HTTPStatus, grpc.StatusCode]:
    """What a client is told: the request is wrong, try again, or it is a fault on this side."""
    if isinstance(error, InputError):
        return HTTPStatus.BAD_REQUEST, grpc.StatusCode.INVALID_ARGUMENT
    if isinstance(error, BusyError):
        return HTTPStatus.SERVICE_UNAVAILABLE, grpc.StatusCode.UNAVAILABLE
    return HTTPStatus.INTERNAL_SERVER_ERROR, grpc.StatusCode.INTERNAL


async def answer_error(_request: Request, error: Exception) -> JSONResponse:
    """An error as the protocol has it; of one that nobody foresaw, the log is named."""
    explained = explain(error)
    return JSONResponse({"error": str(explained)}, status_code=status(explained)[0])


async def answer_invalid(_request: Request, error: Exception) -> JSONResponse:
    """JSON that is no request; only where and what, for not all that JSON brings can be sent back.

    FastAPI's own answer repeats it.
    """
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
    text = f"this is no request: {'; '.join(faults)}"
    return JSONResponse({"error": text[:_CUT]}, status_code=HTTPStatus.BAD_REQUEST)


class ServedModel(KserveModel):  # type: ignore[misc]
    """A model as kserve calls it."""

    def __init__(self, model: Model, threads: ThreadPoolExecutor, *, timeout_s: float) -> None:
        super().__init__(model.name)
        self.model = model
        self.ready = True
        self._threads = threads
        self._timeout_s = timeout_s

    async def predict(
        self, payload: object, headers: Mapping[str, str] | None = None, *_: object
    ) -> InferResponse:
        """Answer a request.

        Raises:
            InputError: it is none, or what it brings is refused.
            BusyError: too many run or wait, or the answer took too long.
            EngineworksError: see ``System.infer``.
        """
        if not isinstance(payload, InferRequest):
            raise InputError("this is version 1 of the protocol", fix="POST /v2/models/NAME/infer")
        feeds = {given.name: _array(given) for given in payload.inputs}
        if len(feeds) < len(payload.inputs):
            raise InputError("the request has two inputs of one name")
        wanted = list(dict.fromkeys(output.name for output in payload.request_outputs or ()))
        self.model.admit()
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, self._infer, feeds, wanted)
        try:
            made, digest = await asyncio.wait_for(asyncio.shield(work), self._timeout_s)
        except TimeoutError:
            work.add_done_callback(lambda done: done.exception())  # nobody waits for it any more
            raise BusyError(
                f"'{self.name}' took longer than {self._timeout_s:g} s",
                fix="send fewer or smaller pictures, or start the server with a longer --timeout",
            ) from None
        return InferResponse(
            payload.id or str(uuid.uuid4()),
            self.name,
            [_output(name, array) for name, array in made.items()],
            model_version=digest,
            # of gRPC kserve would ask an array whether it is true
            use_binary_outputs=payload.use_binary_outputs and not payload.from_grpc,
            requested_outputs=payload.request_outputs,
        )

    def _infer(self, feeds: Mapping[str, Array], wanted: list[str]) -> tuple[dict[str, Array], str]:
        try:
            return self.model.infer(feeds, wanted)
        except Exception as error:  # a client is told what the command line would say
            raise explain(error) from error


def _array(given: InferInput) -> Array:
    """What a request brings as an array.

    Raises:
        InputError: dtype, shape and content do not fit each other.
    """
    if given.datatype not in DATATYPES:
        raise InputError(
            f"'{given.name}' is of the type {given.datatype!r}",
            fix=f"send one of {', '.join(DATATYPES)}",
        )
    shape = given.shape
    if (
        not isinstance(shape, list)
        or not 0 < len(shape) <= _MAX_AXES
        or any(type(n) is not int or n < 0 for n in shape)
    ):
        raise InputError(f"'{given.name}' has the shape {str(shape)[:_CUT]}")
    try:
        array: Array = given.as_numpy()
    except _BROKEN as error:
        raise InputError(
            f"'{given.name}' does not hold {list(shape)} {given.datatype}: {error}"
        ) from error
    return array


def _output(name: str, array: Array) -> InferOutput:
    datatype = next(kind for kind, dtype in DATATYPES.items() if dtype == array.dtype.name)
    return InferOutput(name, list(array.shape), datatype, array)


class Dataplane(DataPlane):  # type: ignore[misc]
    """kserve's way from a request's body to a model and back."""

    def metadata(self) -> dict[str, Any]:
        return {
            "name": "engineworks",
            "version": __version__,
            "extensions": ["binary_tensor_data", "model_repository"],
        }

    async def model_metadata(self, model_name: str) -> dict[str, Any]:
        return metadata(self.get_model_from_registry(model_name).model)

    def decode(
        self,
        body: object,
        headers: Mapping[str, str],
        protocol_version: str = "",
        model_name: str = "",
    ) -> tuple[InferRequest, dict[str, Any]]:
        """A request of REST.

        Raises:
            InvalidInput: it is none.
        """
        try:
            if isinstance(body, InferenceRequest):
                return InferRequest.from_inference_request(body, model_name), {}
            if isinstance(body, bytes) and protocol_version:
                length = int(headers.get(_JSON_LENGTH, len(body)))
                return _with_binary(body, length, model_name), {}
        except _BROKEN as error:
            raise InvalidInput(f"this is no request: {type(error).__name__}: {error}") from error
        raise InvalidInput("this server has version 2 of the protocol: POST /v2/models/NAME/infer")

    def encode(
        self,
        model_name: str,
        response: InferResponse,
        headers: Mapping[str, str],
        req_attributes: Mapping[str, Any],
    ) -> tuple[Any, dict[str, str]]:
        content, length = response.to_rest()
        return content, {} if length is None else {_JSON_LENGTH: str(length)}


def _with_binary(body: bytes, length: int, model_name: str) -> InferRequest:
    """A request whose tensors follow its JSON.

    Source: Triton's extension of the protocol, "Binary Tensor Data".
    """
    if not 0 < length <= len(body):
        raise InvalidInput(f"{_JSON_LENGTH} is {length} of {len(body)} bytes")
    said = orjson.loads(body[:length])
    at, inputs = length, []
    for one in said["inputs"]:
        size = _parameters(one).get("binary_data_size")
        if size is None:
            data = one["data"]
        else:
            if type(size) is not int or not 0 <= size <= len(body) - at:
                raise InvalidInput(f"'{one['name']}' has {size} bytes, {len(body) - at} are left")
            data, at = body[at : at + size], at + size
        inputs.append(_input(str(one["name"]), one["shape"], one["datatype"], data))
    return InferRequest(
        model_name,
        inputs,
        request_id=None if said.get("id") is None else str(said["id"]),
        parameters=_parameters(said),
        request_outputs=[
            RequestedOutput(str(one["name"]), _parameters(one)) for one in said.get("outputs") or ()
        ]
        or None,
    )


def _parameters(said: dict[str, Any]) -> dict[str, Any]:
    found = said.get("parameters") or {}
    if not isinstance(found, dict):
        raise InvalidInput("'parameters' are no object")
    return found


def _input(name: str, shape: list[int], datatype: str, data: bytes | list[Any]) -> InferInput:
    given = InferInput(name, shape, datatype)
    if isinstance(data, bytes):
        given._raw_data = data  # as kserve's own readers of requests do
    else:
        given.data = data
    return given


class Servicer(InferenceServicer):  # type: ignore[misc]
    """kserve's gRPC service; its metadata tell the version, its errors the reason."""

    async def ModelMetadata(
        self, request: pb.ModelMetadataRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelMetadataResponse:
        return pb.ModelMetadataResponse(**await self._data_plane.model_metadata(request.name))

    async def ModelInfer(
        self, request: pb.ModelInferRequest, context: grpc.aio.ServicerContext
    ) -> pb.ModelInferResponse:
        try:
            return await super().ModelInfer(request, context)
        except EngineworksError as error:
            await context.abort(status(error)[1], str(error))
        except (InvalidInput, *_BROKEN) as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))


class Repository(ModelRepository):  # type: ignore[misc]
    """The models of this server, and no others: a request can name them, but bring none."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        super().__init__()
        self.models = dict(models)


class Swapping(ModelRepositoryExtension):  # type: ignore[misc]
    """``load`` takes what lies in a model's folder now; ``unload`` is not for clients."""

    async def load(self, model_name: str) -> None:
        """Exchange a model's bundle; see ``Model.swap``.

        Raises:
            ModelNotFound: no such model here.
            EngineworksError: the new bundle cannot be used; the old one goes on.
        """
        served = self._model_registry.get_model(model_name)
        if served is None:
            raise ModelNotFound(model_name)
        await asyncio.to_thread(served.model.swap)

    async def unload(self, model_name: str) -> None:
        raise InvalidInput("clients cannot take a model away: stop the server")
