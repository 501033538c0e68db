"""How much a file may ask for: checked from its header, before memory is taken.

A few hundred bytes can ask for a hundred gigabytes. Each budget has a value that nothing honest in
this field reaches, and an environment variable for who does. ``docs/reliability.md`` lists them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from engineworks.runtime.errors import InputError, UsageError


@dataclass(frozen=True)
class Budget:
    """One limit.

    Attributes:
        variable: of the environment that sets another one.
        default: where it is not set.
        unit: what is counted.
    """

    variable: str
    default: int
    unit: str

    @property
    def limit(self) -> int:
        """What holds now.

        Raises:
            UsageError: the variable is set to something else than a whole number above 0.
        """
        text = os.environ.get(self.variable, "")
        if not text:
            return self.default
        if not text.isdecimal() or not int(text):
            raise UsageError(
                f"{self.variable} is {text!r}", fix="set it to a whole number above 0, or unset it"
            )
        return int(text)

    def check(self, asked: int, name: str, error: type[InputError] = InputError) -> None:
        """Refuse what asks for more.

        Args:
            asked: in the budget's unit.
            name: of the file, for the message.
            error: what to raise.
        """
        if asked > (limit := self.limit):
            raise error(
                f"{name} asks for {asked:,} {self.unit}, more than the {limit:,} that are allowed",
                fix=f"if it can be trusted, set {self.variable} to a larger number",
            )


FILE_BYTES = Budget("ENGINEWORKS_MAX_FILE_BYTES", 1 << 30, "bytes")
PIXELS = Budget("ENGINEWORKS_MAX_PIXELS", 1 << 27, "pixels")
REQUEST_PIXELS = Budget("ENGINEWORKS_MAX_REQUEST_PIXELS", 1 << 25, "pixels per request")
FRAME_PIXELS = Budget("ENGINEWORKS_MAX_FRAME_PIXELS", 1 << 26, "pixels per frame")
ARRAY_BYTES = Budget("ENGINEWORKS_MAX_ARRAY_BYTES", 1 << 30, "bytes of arrays")
YAML_NODES = Budget("ENGINEWORKS_MAX_YAML_NODES", 100_000, "values")
LABEL_BYTES = Budget("ENGINEWORKS_MAX_LABEL_BYTES", 1 << 30, "bytes of labels")
