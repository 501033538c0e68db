"""Results to an HTTP address: a request is a POST of a JSON list of the results that are there."""

from __future__ import annotations

import http.client
import string
import time
from base64 import b64encode
from collections.abc import Sequence
from urllib.parse import quote, unquote

from engineworks import __version__
from engineworks.runtime.outbox import Message, NotSentError, split_address
from engineworks.runtime.texts import hide_secrets

_TIMEOUT_S = 10.0
_MAX_ANSWER = 1 << 16  # bytes
_REFUSED = (400, 413, 415, 422)  # of what is sent, and not of who sends or when


class Webhook:
    """A receiver at an address; the connection is kept.

    A user and password in the address are sent as HTTP's basic authentication. Redirections are not
    followed.
    """

    def __init__(self, address: str) -> None:
        """Connect later.

        Raises:
            UsageError: it is none of http or https.
        """
        parts = split_address(address, ("http", "https"), "https://example.org/results")
        self.name = hide_secrets(address)
        kind = http.client.HTTPConnection if parts.scheme == "http" else http.client.HTTPSConnection
        assert parts.hostname is not None
        self._connection = kind(parts.hostname, parts.port, timeout=_TIMEOUT_S)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._target = quote(target, safe=string.punctuation)
        self._headers = {
            "Content-Type": "application/json",
            "User-Agent": f"engineworks/{__version__}",
        }
        if parts.username is not None:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {b64encode(secret.encode()).decode()}"

    def send(self, messages: Sequence[Message]) -> None:
        """See ``outbox.Sender``: a list that is refused as a whole is sent one by one."""
        status = self._post(messages)
        if status not in _REFUSED:
            return
        for i, message in enumerate(messages):
            if len(messages) == 1 or (status := self._post([message])) in _REFUSED:
                raise NotSentError(
                    f"the result was refused with status {status}", num_sent=i, refused=True
                )

    def _post(self, messages: Sequence[Message]) -> int:
        """The status of an answer that is final."""
        body = b"[" + b",\n".join(message.body for message in messages) + b"]"
        try:
            self._connection.request("POST", self._target, body, self._headers)
            response = self._connection.getresponse()
            if not _read_whole(response):
                self._connection.close()
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            self._connection.close()
            raise NotSentError(f"cannot be reached ({error or type(error).__name__})") from error
        if response.status // 100 != 2 and response.status not in _REFUSED:
            self._connection.close()
            raise NotSentError(f"answered with status {response.status}")
        return response.status

    def close(self) -> None:
        self._connection.close()


def _read_whole(response: http.client.HTTPResponse) -> bool:
    """Read an answer, which nobody looks at; False where it is long or does not come to an end."""
    until_s, size = time.monotonic() + _TIMEOUT_S, 0
    while part := response.read1(_MAX_ANSWER):
        size += len(part)
        if size > _MAX_ANSWER or time.monotonic() > until_s:
            return False
    response.close()
    return True
