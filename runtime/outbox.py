"""Results that go elsewhere as they come: a bounded queue on the disk, and a thread that sends.

A result is on the disk before it is sent, and stays there until it has arrived: an outage of the
receiver, or the end of this process, loses none of them. What is left is sent by the next run with
the same folder. A result may arrive twice, where its answer was lost: each has an ``id``.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import SplitResult, urlsplit

from engineworks.runtime import files
from engineworks.runtime.errors import UsageError
from engineworks.runtime.sinks import Item
from engineworks.runtime.systems import Result
from engineworks.runtime.tables import failure_of, record_of
from engineworks.runtime.tensors import Array
from engineworks.runtime.texts import hide_secrets

_PART_BYTES = 1 << 20  # of a file of the queue
_LIMIT_BYTES = 256 << 20
_MAX_BATCH = 100
_SYNC_S = 2.0  # between two times that the queue is put on the disk
_PAUSES_S = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # between attempts; the last one again and again
_LAST_S = 10.0  # that the end waits for a receiver that does not answer
_POSITION = "position.json"


@dataclass(frozen=True)
class Message:
    """One result as it is sent.

    Attributes:
        camera: name of its source; empty where there is one alone.
        body: JSON, an object.
    """

    camera: str
    body: bytes


class NotSentError(Exception):
    """A receiver did not take messages.

    Args:
        reason: in words, without secrets.
        num_sent: messages that arrived before.
        refused: it will never take the next message, which is at fault.
    """

    def __init__(self, reason: str, *, num_sent: int = 0, refused: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.num_sent = num_sent
        self.refused = refused


class Sender(Protocol):
    """Who brings messages to a receiver; called by one thread.

    Attributes:
        name: of the receiver, without secrets.
    """

    name: str

    def send(self, messages: Sequence[Message]) -> None:
        """Return when all have arrived.

        Raises:
            NotSentError: not all have.
        """
        ...

    def close(self) -> None: ...


class Outbox:
    """A sink whose results a sender brings away; a folder holds those that still wait.

    Attributes:
        num_sent: messages that arrived.
        num_lost: that were dropped, the oldest first, because the queue was full.
        num_waiting: that are in the folder.
    """

    def __init__(
        self,
        folder: Path,
        sender: Sender,
        *,
        limit_bytes: int = _LIMIT_BYTES,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Nothing happens before it is opened.

        Args:
            limit_bytes: of the queue.
            say: called from another thread where the receiver stops or begins to answer.
        """
        self.num_sent = self.num_lost = self.num_waiting = 0
        self._folder = folder
        self._sender = sender
        self._limit_bytes = limit_bytes
        self._say = say
        self._changed = threading.Condition()
        self._parts: list[_Part] = []  # oldest first; the last one grows
        self._run, self._number = secrets.token_hex(4), 0
        self._refused: files.Lines | None = None  # what will never be taken
        self._closing = False
        self._synced_s = time.monotonic()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        files.sweep(self._folder)
        self._take_up()
        self._begin_part()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        """Send what is left, as long as it is taken."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()
        self._sender.close()
        self._parts[-1].close()
        if self._refused is not None:
            self._refused.close()
        if self._error is not None:
            raise self._error
        if not self.num_waiting:
            self._parts[-1].path.unlink()
            (self._folder / _POSITION).unlink(missing_ok=True)
            if not any(self._folder.iterdir()):
                self._folder.rmdir()
        else:
            self._say(
                f"{self._sender.name}: {self.num_waiting} results wait in {self._folder}; "
                "the next run with this --out sends them"
            )

    def add(self, item: Item, image: Array, result: Result) -> None:
        """Queue a result."""
        self._queue(record_of(item, image, result))

    def failed(self, item: Item, error: str) -> None:
        """Queue why a picture has no result."""
        self._queue(failure_of(item, error))

    def _queue(self, record: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._number += 1
        message = {"id": f"{self._run}-{self._number}", "time": now, **record}
        with self._changed:
            if self._error is not None:
                raise self._error
            if self._parts[-1].size >= _PART_BYTES:
                self._end_part()
            self._parts[-1].add(json.dumps(message) + "\n")
            self.num_waiting += 1
            while sum(part.size for part in self._parts) > self._limit_bytes and self._parts[1:]:
                self._drop_oldest()
            if time.monotonic() - self._synced_s >= _SYNC_S:
                self._parts[-1].sync()
                self._synced_s = time.monotonic()
            self._changed.notify_all()

    def _drop_oldest(self) -> None:
        part = self._parts.pop(0)
        part.path.unlink()
        self.num_lost += part.num_left
        self.num_waiting -= part.num_left
        self._say(
            f"{self._sender.name}: the queue is full, the oldest {part.num_left} results are lost"
        )

    def _begin_part(self) -> None:
        number = 1 + max((int(part.path.stem) for part in self._parts), default=0)
        self._parts.append(_Part(self._folder / f"{number:08}.jsonl", grows=True))

    def _end_part(self) -> None:
        """Go on in another file; one that has been sent already is removed."""
        part = self._parts[-1]
        part.close()
        self._begin_part()
        if not part.num_left:
            self._parts.remove(part)
            part.path.unlink()

    def _take_up(self) -> None:
        """What an earlier run has left."""
        found = sorted(path for path in self._folder.glob("*.jsonl") if path.stem.isdecimal())
        self._parts = [_Part(path, grows=False) for path in found]
        # without a position that can be read (a power cut), what was sent is sent once more
        with suppress(FileNotFoundError, ValueError, LookupError, TypeError):
            at = json.loads((self._folder / _POSITION).read_bytes())
            if self._parts and at["part"] == self._parts[0].path.name:
                self._parts[0].skip(max(0, int(at["bytes"])))
        self.num_waiting = sum(part.num_left for part in self._parts)

    def _work(self) -> None:
        try:
            self._send_all()
        except BaseException as error:  # handed over: `add` or the end raises it
            with self._changed:
                self._error = error

    def _send_all(self) -> None:
        failures, give_up_s = 0, float("inf")
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.num_waiting or self._closing)
                if self._closing:
                    give_up_s = min(give_up_s, time.monotonic() + _LAST_S)
                if not self.num_waiting or (failures and time.monotonic() > give_up_s):
                    return
                part = next(part for part in self._parts if part.num_left)
                lines = part.next(_MAX_BATCH)
            if not _is_record(lines[0]):
                self._set_aside(part, lines[0], "a line of the queue is no result")
                continue
            lines = list(takewhile(_is_record, lines))
            try:
                self._sender.send([_message(line) for line in lines])
            except NotSentError as error:
                self._arrived(part, lines[: error.num_sent])
                if error.refused:
                    self._set_aside(part, lines[error.num_sent], error.reason)
                    continue
                if not failures:
                    self._say(f"{self._sender.name}: {error.reason}; results wait on the disk")
                self._pause(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
                failures += 1
            else:
                self._arrived(part, lines)
                if failures:
                    self._say(f"{self._sender.name}: takes results again")
                failures = 0

    def _pause(self, seconds: float) -> None:
        """Wait; less where the end comes, or has come."""
        with self._changed:
            before = self._closing
            seconds = min(seconds, _PAUSES_S[0]) if before else seconds
            self._changed.wait_for(lambda: self._closing and not before, seconds)

    def _arrived(self, part: _Part, lines: Sequence[bytes]) -> None:
        self.num_sent += len(lines)
        self._forget(part, lines)

    def _set_aside(self, part: _Part, line: bytes, reason: str) -> None:
        if self._refused is None:
            self._refused = files.Lines(self._folder / f"refused-{self._run}.jsonl")
        self._refused.add(line.decode("utf-8", "surrogateescape"))
        self._say(f"{self._sender.name}: {reason}; the result is in {self._refused.path}")
        self._forget(part, [line])

    def _forget(self, part: _Part, lines: Sequence[bytes]) -> None:
        """These need not be sent any more."""
        with self._changed:
            if part not in self._parts:  # dropped meanwhile
                return
            part.done(lines)
            self.num_waiting -= len(lines)
            if not part.num_left and part is not self._parts[-1]:
                self._parts.remove(part)
                part.path.unlink()
            first = self._parts[0]
            at = {"part": first.path.name, "bytes": first.sent_bytes}
        files.write(self._folder / _POSITION, json.dumps(at), durable=False)


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _message(line: bytes) -> Message:
    return Message(str(json.loads(line).get("camera", "")), line.rstrip(b"\n"))


class _Part:
    """A file of the queue.

    Attributes:
        size: in bytes, those that are sent included.
        sent_bytes: from its beginning.
        num_left: lines behind them.
    """

    def __init__(self, path: Path, *, grows: bool) -> None:
        """A new file; or, where it does not grow, one that an earlier run has left."""
        self.path = path
        self.size = self.sent_bytes = self.num_left = 0
        self._lines = files.Lines(path) if grows else None
        if not grows:
            files.cut_to_whole_lines(path)
            self.size = path.stat().st_size
            self.skip(0)

    def skip(self, num_bytes: int) -> None:
        """Take what stands before as sent."""
        self.sent_bytes = min(num_bytes, self.size)
        self.num_left = _num_lines(self.path, self.sent_bytes)

    def add(self, line: str) -> None:
        assert self._lines is not None
        self._lines.add(line)
        self.size += len(line)  # ASCII
        self.num_left += 1

    def next(self, most: int) -> list[bytes]:
        """The oldest lines that are left."""
        with self.path.open("rb") as file:
            file.seek(self.sent_bytes)
            return [file.readline() for _ in range(min(most, self.num_left))]

    def done(self, lines: Sequence[bytes]) -> None:
        self.sent_bytes += sum(map(len, lines))
        self.num_left -= len(lines)

    def sync(self) -> None:
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()
            self._lines = None


def _num_lines(path: Path, start: int) -> int:
    with path.open("rb") as file:
        file.seek(start)
        return sum(1 for _ in file)


def split_address(text: str, schemes: Sequence[str], example: str) -> SplitResult:
    """An address in its parts.

    Raises:
        UsageError: it is of none of these schemes, or has no host.
    """
    try:
        parts = urlsplit(text)
        wrong = parts.scheme not in schemes or not parts.hostname or parts.port == 0
    except ValueError:  # of the port
        wrong = True
    if wrong:
        raise UsageError(f"{hide_secrets(text)} is no address such as {example}", fix="correct it")
    return parts
