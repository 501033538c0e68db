"""Each system, each stage: a system is a module per stage and a line per table."""

from __future__ import annotations

import importlib
import inspect
from importlib import resources
from pathlib import Path

import pytest

from engineworks.runtime.errors import UsageError
from engineworks.runtime.systems import SYSTEMS, system_module
from engineworks.training.config import SystemConfig, dump, load_config, parse
from engineworks.training.systems import TASKS, UNTRAINED, system_package

ROOT = Path(__file__).parents[1]
FILES = ("config.py", "data.py", "model.py", "task.py", "sample.py", "eager.py", "default.yaml")

every_system = pytest.mark.parametrize("name", SYSTEMS)
every_trained_one = pytest.mark.parametrize("name", TASKS)


def test_the_tables_name_the_same_systems() -> None:
    from engineworks.export.systems import RECIPES

    assert set(SYSTEMS) == set(RECIPES) == {*TASKS, *UNTRAINED}
    assert not {*TASKS} & {*UNTRAINED}


@pytest.mark.parametrize("name", UNTRAINED)
def test_what_is_not_trained_says_where_it_comes_from(name: str) -> None:
    with pytest.raises(UsageError, match=f"'{name}' is not trained") as caught:
        system_package(name)
    assert f"cli.py export {name}:" in str(caught.value.fix)


@every_system
class TestASystem:
    def test_runs(self, name: str) -> None:
        module = system_module(name)
        assert name == module.NAME
        offered = {member for member, _ in inspect.getmembers(module.System, inspect.isfunction)}
        assert {"infer", "draw", "evaluate", "close"} <= offered
        wanted = [
            "bundle",
            "engines",
            "backend",
            "precision",
            "threads",
            "max_batch",
            "max_wait_ms",
        ]
        assert list(inspect.signature(module.System).parameters) == wanted

    @pytest.mark.train
    def test_is_exported_with_a_gate_on_its_metrics(self, name: str) -> None:
        from engineworks.export.systems import recipe

        found = recipe(name)
        assert found.gate
        assert all(0 <= drop < 0.1 for drop in found.gate.values())
        assert 0 < found.tolerance <= 1e-3

    def test_is_on_the_pages(self, name: str) -> None:
        pages = ("README.md", "docs/design.md", "docs/bundle-format.md", "docs/benchmarks.md")
        for page in pages:
            assert f"`{name}`" in (ROOT / page).read_text(encoding="utf-8"), page


@every_trained_one
class TestASystemThatIsTrained:
    def test_has_the_same_files_for_training_as_every_other(self, name: str) -> None:
        package = resources.files(system_package(name))
        assert [file for file in FILES if not package.joinpath(file).is_file()] == []

    def test_has_defaults_that_survive_being_written_into_a_run(self, name: str) -> None:
        config = load_config(name)
        assert isinstance(config, SystemConfig)
        assert config.system == name
        assert parse(dump(config), type(config)) == config

    def test_draws_a_sample_from_a_seed(self, name: str) -> None:
        sample = importlib.import_module(f"{system_package(name)}.sample").sample
        assert {"out", "seed"} <= set(inspect.signature(sample).parameters)

    @pytest.mark.train
    def test_trains(self, name: str) -> None:
        task = importlib.import_module(f"{system_package(name)}.task").Task
        assert list(inspect.signature(task).parameters) == ["config", "data", "root", "weights"]
        for method in ("loader", "step", "evaluate", "finish"):
            assert callable(getattr(task, method))

    @pytest.mark.train
    def test_has_an_eager_rival_for_the_benchmark(self, name: str) -> None:
        contenders = importlib.import_module(f"{system_package(name)}.eager").contenders
        assert list(inspect.signature(contenders).parameters) == ["run", "bundle", "threads", "say"]
