"""Requests that are too large, or do not arrive: ended before anything is done for them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from fastapi.responses import JSONResponse

_Message = dict[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class Limits:
    """Takes a request's body as a whole, if it is small enough and comes in time.

    What a client has not sent yet costs nothing of a model.
    """

    def __init__(self, app: Any, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self._timeout_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._max_bytes:
                        error = f"the request has more than {self._max_bytes:,} bytes"
                        await JSONResponse({"error": error}, 413)(scope, receive, send)
                        return
        except TimeoutError:
            error = f"the request took longer than {self._timeout_s:g} s to arrive"
            await JSONResponse({"error": error}, 408)(scope, receive, send)
            return
        whole: list[_Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]
        # answered, and in its log: protocol.answer_error; or the server does not wait any longer
        with suppress(Exception, asyncio.CancelledError):
            await self._app(scope, lambda: _next(whole, receive), send)


async def _next(whole: list[_Message], receive: _Receive) -> _Message:
    return whole.pop() if whole else await receive()
