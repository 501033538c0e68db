from __future__ import annotations

import inspect

import pytest

from engineworks.runtime import errors
from engineworks.runtime.errors import ConfigError, EngineworksError, UnexpectedError, UsageError

ALL = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, EngineworksError)
]


class TestAnError:
    def test_prints_what_is_wrong_and_then_the_way_out(self) -> None:
        assert str(EngineworksError("it broke", fix="mend it")) == "it broke\n  fix: mend it"

    def test_without_a_fix_prints_one_line(self) -> None:
        assert str(EngineworksError("it broke")) == "it broke"

    def test_keeps_its_parts(self) -> None:
        error = EngineworksError("it broke", fix="mend it")

        assert (error.message, error.fix) == ("it broke", "mend it")

    @pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
    def test_of_any_kind_is_caught_as_one_and_stands_in_the_tree(
        self, kind: type[EngineworksError]
    ) -> None:
        with pytest.raises(EngineworksError):
            raise kind("it broke", fix="mend it")

        assert kind.__name__ in (errors.__doc__ or "")

    @pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
    def test_exits_2_for_a_wrong_call_70_for_a_fault_of_ours_and_1_otherwise(
        self, kind: type[EngineworksError]
    ) -> None:
        ours = 70 if issubclass(kind, UnexpectedError) else 1
        assert kind.exit_code == (2 if issubclass(kind, UsageError) else ours)

    def test_in_a_configuration_is_a_wrong_call(self) -> None:
        assert ConfigError.exit_code == 2
