"""Results to an MQTT broker: a message each, on a topic for each source, at least once (QoS 1)."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote

from engineworks.runtime.errors import BackendError
from engineworks.runtime.outbox import Message, NotSentError, split_address
from engineworks.runtime.texts import hide_secrets

_TIMEOUT_S = 10.0
_TOPIC = "engineworks"
_WILD = re.compile(r"[+#/\0]")  # signs of topics that no name of a source may hold


class Mqtt:
    """A broker, connected to when there is something to send; MQTT 3.1.1 over TCP or TLS."""

    def __init__(self, address: str) -> None:
        """Connect later.

        Args:
            address: ``mqtt://[user:password@]host[:1883][/topic]``, or ``mqtts://`` for TLS.

        Raises:
            UsageError: another address.
            BackendError: the package is not installed.
        """
        parts = split_address(address, ("mqtt", "mqtts"), "mqtt://broker:1883/topic")
        try:
            import paho.mqtt.client
        except ImportError as error:
            raise BackendError(
                "the package 'paho-mqtt' is not installed", fix='pip install "engineworks[mqtt]"'
            ) from error
        self._paho = paho.mqtt.client
        self.name = hide_secrets(address)
        self._parts = parts
        self._topic = unquote(parts.path).strip("/") or _TOPIC
        self._client: Any = None

    def send(self, messages: Sequence[Message]) -> None:
        """See ``outbox.Sender``."""
        sent = 0
        try:
            client = self._connected()
            tokens = [
                client.publish(self._topic_of(message), message.body, qos=1) for message in messages
            ]
            until = time.monotonic() + _TIMEOUT_S
            for token in tokens:
                token.wait_for_publish(max(0.001, until - time.monotonic()))
                if not token.is_published():
                    raise NotSentError("does not confirm what is sent", num_sent=sent)
                sent += 1
        except (OSError, ValueError, RuntimeError) as error:
            self.close()
            raise NotSentError(f"cannot be reached ({error})", num_sent=sent) from error
        except NotSentError:
            self.close()  # a new client: this one would send again what it holds
            raise

    def _topic_of(self, message: Message) -> str:
        return f"{self._topic}/{_WILD.sub('_', message.camera)}" if message.camera else self._topic

    def _connected(self) -> Any:
        """A client that the broker has let in.

        Raises:
            NotSentError: it has not.
        """
        if self._client is not None:
            return self._client
        paho, parts = self._paho, self._parts
        answered, answers = threading.Event(), []

        def on_connect(_client: Any, _data: Any, _flags: Any, code: Any, _properties: Any) -> None:
            answers.append(code)
            answered.set()

        client = paho.Client(paho.CallbackAPIVersion.VERSION2)
        client.on_connect = on_connect
        if parts.username is not None:
            client.username_pw_set(unquote(parts.username), unquote(parts.password or ""))
        secure = parts.scheme == "mqtts"
        if secure:
            client.tls_set()
        client.connect(parts.hostname, parts.port or (8883 if secure else 1883), keepalive=30)
        client.loop_start()
        self._client = client
        if not answered.wait(_TIMEOUT_S):
            raise NotSentError("does not answer")
        if answers[0].is_failure:
            raise NotSentError(f"lets nobody in ({answers[0]})")
        return client

    def close(self) -> None:
        if self._client is not None:
            self._client.disconnect()
            self._client.loop_stop()
            self._client = None
