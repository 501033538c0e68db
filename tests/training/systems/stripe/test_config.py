from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import yaml

from engineworks.runtime.errors import ConfigError
from engineworks.training.config import dump, keys, parse, validate
from engineworks.training.systems.stripe.config import TaskConfig


def default() -> Any:
    text = (
        resources.files("engineworks.training.systems.stripe")
        .joinpath("default.yaml")
        .read_text("utf-8")
    )
    return yaml.safe_load(text)


def test_default_yaml_holds_the_defaults() -> None:
    told, built_in = validate(TaskConfig, default()), TaskConfig()
    assert told.model_copy(update={"train": built_in.train}) == built_in


def test_default_yaml_names_every_setting_of_the_system() -> None:
    named = {
        f"{part}.{key}"
        for part, tree in default().items()
        if isinstance(tree, dict)
        for key in tree
    }
    known = {key for key in keys(TaskConfig) if "." in key and not key.startswith("train.")}
    assert known <= named


def test_a_configuration_comes_back_from_its_yaml() -> None:
    config = validate(TaskConfig, default())
    assert parse(dump(config), TaskConfig) == config


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"value_range": [255.0, 0.0]}, "value_range"),
        ({"defects": {"num": [1, 8]}}, "num must be"),
        ({"defects": {"num_target_only": [2, 2]}}, "num_target_only must be"),
        ({"defects": {"amplitude": [0.3, 0.2]}}, "amplitude must be"),
        ({"defects": {"kernels": []}}, "kernels"),
        ({"defects": {"kernels": [{"size": [4, 3], "sigma": [1.0, 1.0]}]}}, "two odd numbers"),
        ({"network": {"cell": 3}}, "network.cell"),
        ({"tiles": {"size": 128, "stride": 64}}, "tiles.stride"),
    ],
)
def test_a_wrong_value_is_named(tree: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        validate(TaskConfig, tree)
