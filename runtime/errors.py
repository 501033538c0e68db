"""Every error that engineworks raises on purpose::

    EngineworksError
    ├── UsageError            exit 2: the command line or a configuration is wrong
    │   └── ConfigError       a configuration file, a ``--set`` or a value in it
    ├── UnexpectedError       exit 70: a fault of engineworks itself
    └── (all others)          exit 1
        ├── InputError        data handed in does not fit: shape, dtype, range, empty
        │   ├── ImageError    a picture cannot be read
        │   └── VideoError    a stream cannot be read
        ├── DatasetError      a folder of data is missing something
        ├── WeightsError      a weights file is missing, corrupt or of another net
        ├── RunError          a training run is missing, incomplete or in the way
        ├── RankError         of the processes that train together another one has ended
        ├── BundleError       a bundle is missing, corrupt, of another schema or system
        ├── BankError         a memory bank cannot be built, read or searched
        ├── InUseError        another process is writing there
        ├── BusyError         a server has as much to do as it may, or it took too long
        ├── ResourceError     the operating system refuses: no file, no right, no room, no memory
        ├── BackendError      a backend, device or package that was asked for is not there
        ├── EngineError       a graph cannot be loaded or run
        │   └── NotFiniteError      it gave values that are not finite
        ├── ExportError       a model cannot be turned into a graph
        │   └── QuantizationError   a graph breaks a rule of the INT8 format
        ├── CalibrationError  ranges cannot be measured, or a table is stale
        ├── ParityError       two engines that must agree do not
        └── GateError         the task metric dropped by more than allowed

A message says what is wrong; ``fix`` says what to do about it. The command line prints both and
exits with ``exit_code``.
"""

from __future__ import annotations


class EngineworksError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what is wrong, in one sentence, with the values that show it.
        fix: what the user can do about it, in the imperative.
    """

    exit_code = 1

    def __init__(self, message: str, *, fix: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message


class UsageError(EngineworksError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class UnexpectedError(EngineworksError):
    exit_code = 70  # EX_SOFTWARE of sysexits.h


class InputError(EngineworksError):
    pass


class ImageError(InputError):
    pass


class VideoError(InputError):
    pass


class DatasetError(EngineworksError):
    pass


class WeightsError(EngineworksError):
    pass


class RunError(EngineworksError):
    pass


class RankError(EngineworksError):
    pass


class BundleError(EngineworksError):
    pass


class BankError(EngineworksError):
    pass


class InUseError(EngineworksError):
    pass


class BusyError(EngineworksError):
    pass


class ResourceError(EngineworksError):
    pass


class BackendError(EngineworksError):
    pass


class EngineError(EngineworksError):
    pass


class NotFiniteError(EngineError):
    pass


class ExportError(EngineworksError):
    pass


class QuantizationError(ExportError):
    pass


class CalibrationError(EngineworksError):
    pass


class ParityError(EngineworksError):
    pass


class GateError(EngineworksError):
    pass
