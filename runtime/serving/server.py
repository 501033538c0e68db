"""The process that serves: sockets, limits, signals. HTTP is uvicorn's, gRPC is grpcio's."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError

from engineworks.runtime.errors import EngineworksError, UsageError
from engineworks.runtime.serving.limits import Limits
from engineworks.runtime.serving.models import Model

with patch.object(sys, "argv", sys.argv[:1]):  # kserve reads the command line when it is imported
    from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import (
        add_GRPCInferenceServiceServicer_to_server,
    )
    from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
    from kserve.protocol.rest.server import RESTServer

    from engineworks.runtime.serving.protocol import (
        Dataplane,
        Repository,
        ServedModel,
        Servicer,
        Swapping,
        answer_error,
        answer_invalid,
    )

Say = Callable[[str], None]

_THREADS = 16  # that decode pictures and wait for systems
_MAX_CONNECTIONS = 1000
_GRACE_S = 30


@dataclass(frozen=True)
class Config:
    """How to serve.

    Attributes:
        host: address to listen at; the default can be reached from this machine alone.
        http_port, grpc_port: 0 takes a free one.
        max_bytes: of a request.
        timeout_s: for a request to arrive, and for its answer.
        certificate, key: PEM files, for TLS of both.
    """

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 8081
    max_bytes: int = 64 << 20
    timeout_s: float = 30.0
    certificate: Path | None = None
    key: Path | None = None


class _Server(uvicorn.Server):  # type: ignore[misc]
    """Leaves signals to us: gRPC has to end with it."""

    def capture_signals(self) -> AbstractContextManager[None]:
        return nullcontext()


def serve(models: Sequence[Model], config: Config, say: Say) -> None:
    """Serve models by REST and gRPC until SIGTERM or Ctrl-C; SIGHUP exchanges all bundles.

    What runs when the end is asked for is answered, for up to 30 s.

    Args:
        say: called with a line once it listens, and for each bundle that is exchanged.

    Raises:
        UsageError: two models of one name, or half of a certificate.
        OSError: an address that cannot be listened at.
    """
    names = [model.name for model in models]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"two models are named '{twice[0]}'", fix="name them: NAME=BUNDLE")
    if (config.certificate is None) != (config.key is None):
        raise UsageError("TLS needs a certificate and its key", fix="give --tls-cert and --tls-key")
    for name in ("kserve", "kserve.trace"):  # a line for each request, and each refusal's stack
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    # of kserve's own endpoints, and nothing that a user could mend
    warnings.filterwarnings("ignore", "ORJSONResponse is deprecated")
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="serve"))
        served = {
            model.name: ServedModel(model, threads, timeout_s=config.timeout_s) for model in models
        }
        asyncio.run(_serve(served, config, say))


async def _serve(served: dict[str, ServedModel], config: Config, say: Say) -> None:
    repository = Repository(served)
    dataplane, swapping = Dataplane(repository), Swapping(repository)
    app = _rest(dataplane, swapping, config)
    listening = listen(config.host, config.http_port)
    http = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_graceful_shutdown=_GRACE_S,
            ssl_certfile=config.certificate,
            ssl_keyfile=config.key,
        )
    )
    rpc, rpc_port = _grpc(dataplane, swapping, config)
    await rpc.start()
    scheme = "" if config.certificate is None else "s"
    host = f"[{config.host}]" if ":" in config.host else config.host
    say(f"http{scheme}://{host}:{listening.getsockname()[1]}, grpc{scheme}://{host}:{rpc_port}")

    def stop() -> None:
        http.should_exit = True

    tasks: set[asyncio.Task[None]] = set()

    def swap() -> None:
        task = asyncio.ensure_future(_swap_all(served, say))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    loop = asyncio.get_running_loop()
    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGHUP: swap}
    for number, handle in handlers.items():
        loop.add_signal_handler(number, handle)
    try:
        await http.serve(sockets=[listening])
    finally:
        await rpc.stop(_GRACE_S)
        for number in handlers:
            loop.remove_signal_handler(number)


async def _swap_all(served: dict[str, ServedModel], say: Say) -> None:
    """Exchange each bundle whose folder holds one that can be used."""
    for each in served.values():
        try:
            await asyncio.to_thread(each.model.swap)
            say(each.model.describe())
        except EngineworksError as error:
            say(f"{each.name} goes on with {each.model.digest[:12]}: {error}")


def _rest(dataplane: Dataplane, swapping: Swapping, config: Config) -> Any:
    rest = RESTServer("kserve.model_server:app", dataplane, swapping, config.http_port)
    with patch.object(sys, "argv", sys.argv[:1]):  # as above
        rest.create_application()
        from kserve.model_server import app
    assert isinstance(app, FastAPI)
    for kind in (EngineworksError, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    return Limits(app, max_bytes=config.max_bytes, timeout_s=config.timeout_s)


def _grpc(dataplane: Dataplane, swapping: Swapping, config: Config) -> tuple[grpc.aio.Server, int]:
    server = grpc.aio.server(
        interceptors=[ExceptionToStatusInterceptor()],
        options=[
            ("grpc.max_receive_message_length", config.max_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
        maximum_concurrent_rpcs=_MAX_CONNECTIONS,
    )
    add_GRPCInferenceServiceServicer_to_server(Servicer(dataplane, swapping), server)
    host = f"[{config.host}]" if ":" in config.host else config.host
    address = f"{host}:{config.grpc_port}"
    try:
        if config.certificate is None or config.key is None:
            return server, server.add_insecure_port(address)
        pair = (config.key.read_bytes(), config.certificate.read_bytes())
        return server, server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    except RuntimeError as error:
        raise UsageError(
            f"gRPC cannot listen at {address}", fix="choose another --host or --grpc-port"
        ) from error


def listen(host: str, port: int) -> socket.socket:
    """A socket whose connections send at once.

    Otherwise the body of an answer waits until its head is acknowledged, for 40 ms: asyncio sets
    this by itself only for sockets that it has made.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, port), family=family)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
    return listening
