"""What TensorRT reports, kept: an error recorder for a builder or a runtime.

It must outlive everything made under the object that it is set on.

Source: TensorRT, ``IErrorRecorder``.
"""

from __future__ import annotations

import threading
from typing import Any

import tensorrt as trt


class Recorder(trt.IErrorRecorder):  # type: ignore[misc]  # the bindings are not typed
    """Keeps reports in order; called from any thread."""

    def __init__(self) -> None:
        trt.IErrorRecorder.__init__(self)
        self._lock = threading.Lock()
        self._errors: list[tuple[Any, str]] = []

    def take(self) -> list[str]:
        """All reports since the last call."""
        with self._lock:
            errors, self._errors = self._errors, []
        return [f"{code}: {text}" for code, text in errors]

    def num_errors(self) -> int:
        return len(self._errors)

    # C++ looks the count up under this name, Python's base class has it under the other
    get_num_errors = num_errors

    def get_error_code(self, index: int) -> Any:
        return self._errors[index][0]

    def get_error_desc(self, index: int) -> str:
        return self._errors[index][1]

    def has_overflowed(self) -> bool:
        return False

    def clear(self) -> None:
        with self._lock:
            self._errors.clear()

    def report_error(self, code: Any, text: str) -> bool:
        with self._lock:
            self._errors.append((code, text))
        return False  # not fatal: the answer of the call itself decides
