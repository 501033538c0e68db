from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engineworks.runtime.errors import ConfigError, UsageError
from engineworks.training.config import (
    BackboneConfig,
    Config,
    OptimizerConfig,
    TrainConfig,
    changed,
    dump,
    keys,
    load_config,
    parse,
)

positive = st.floats(min_value=1e-12, max_value=1e12)
optimizers = st.builds(
    OptimizerConfig,
    name=st.sampled_from(["adamw", "sgd"]),
    lr=positive,
    weight_decay=positive,
    momentum=st.floats(0, 1, exclude_max=True),
    clip_norm=st.none() | positive,
)
trainings = st.builds(
    TrainConfig,
    seed=st.integers(0, 2**32 - 1),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    epochs=st.integers(1, 10**6),
    ema_decay=st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
    optimizer=optimizers,
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(-1e300, 1e300) | st.text()
backbones = st.builds(
    BackboneConfig,
    name=st.text(),
    stages=st.sets(st.integers(0, 9), min_size=1).map(lambda s: tuple(sorted(s))),
    weights=st.text(),
    args=st.dictionaries(st.text(), scalars | st.lists(scalars), max_size=3),
)


class TestAConfiguration:
    @given(config=trainings | backbones)
    def test_comes_back_from_its_own_yaml(self, config: Config) -> None:
        assert parse(dump(config), type(config)) == config

    def test_cannot_be_changed(self) -> None:
        with pytest.raises(Exception, match="frozen"):
            TrainConfig().seed = 1  # type: ignore[misc]

    @pytest.mark.parametrize("stages", [(), (-1,), (2, 2), (3, 2)])
    def test_has_stages_in_order(self, stages: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="stages"):
            BackboneConfig(name="resnet18", stages=stages)


class TestOfPaco:
    def test_stands_on_one_map(self) -> None:
        config = load_config("paco", overrides=["backbone.stages=[2]"])
        assert config.backbone.stages == (2,)  # type: ignore[attr-defined]
        with pytest.raises(ConfigError, match=r"backbone.*one map"):
            load_config("paco", overrides=["backbone.stages=[1,2]"])

    @pytest.mark.parametrize(
        ("overrides", "rate"),
        [
            ([], 3e-4),
            (["frozen=true"], 3e-3),
            (["frozen=true", "train.optimizer.lr=1e-4"], 1e-4),
            (["frozen=true", "train.optimizer.name=sgd"], 3e-3),
        ],
    )
    def test_has_a_rate_that_fits_what_learns(self, overrides: list[str], rate: float) -> None:
        assert load_config("paco", None, overrides).train.optimizer.lr == rate

    @pytest.mark.parametrize("override", ["train=3", "train.optimizer=null", "frozen=1"])
    def test_names_what_is_wrong_around_a_rate(self, override: str) -> None:
        with pytest.raises(ConfigError, match=f"key '{override.partition('=')[0]}'"):
            load_config("paco", None, [override])


class TestOfNoising:
    def test_has_defaults(self) -> None:
        config = load_config("noising")
        assert config.system == "noising"
        assert config.backbone.stages == (1, 2, 3)  # type: ignore[attr-defined]

    def test_takes_a_file_and_then_overrides(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.yaml"
        file.write_text("train: {seed: 5, batch_size: 3}\nbackbone: {stages: [1, 2]}\n")
        config = load_config(
            "noising", file, ["train.seed=7", "backbone.args={pad_type: same}", "width=64"]
        )
        assert (config.train.seed, config.train.batch_size) == (7, 3)
        assert config.backbone == BackboneConfig(  # type: ignore[attr-defined]
            name="resnet18", stages=(1, 2), weights="hub", args={"pad_type": "same"}
        )
        assert config.width == 64  # type: ignore[attr-defined]

    @pytest.mark.parametrize("spelling", ["1e-4", "1E-4", "1.0e-4", "0.0001"])
    def test_takes_a_float_in_every_usual_spelling(self, spelling: str) -> None:
        config = load_config("noising", None, [f"train.optimizer.lr={spelling}"])
        assert config.train.optimizer.lr == 1e-4

    @pytest.mark.parametrize(
        ("override", "names", "suggests"),
        [
            ("backbone.weigths=none", "backbone.weigths", "backbone.weights"),
            ("train.sede=1", "train.sede", "train.seed"),
            ("seed=1", "seed", "train.seed"),
            ("train.batch_size=many", "train.batch_size", "--set train.batch_size"),
            ("train.seed=1.5", "train.seed", "--set train.seed"),
            ("train.seed=true", "train.seed", "--set train.seed"),
            ("train.optimizer.lr=.inf", "train.optimizer.lr", "--set"),
            ("train.device=tpu", "train.device", "--set train.device"),
            ("train=1", "train", "--set train"),
            ("backbone.stages=[3, 2]", "backbone.stages", "--set backbone.stages"),
            ("train.seed=[1", "train.seed", "brackets"),
            ("train.seed=2024-01-01", "number, text", "quotes"),
            ("train.seed", "key=value", "--set train.seed=1"),
            ("=1", "key=value", "--set train.seed=1"),
            ("system=stripe", "stripe", "noising"),
        ],
    )
    def test_names_the_key_at_fault_and_the_way_out(
        self, override: str, names: str, suggests: str
    ) -> None:
        with pytest.raises(ConfigError) as caught:
            load_config("noising", None, [override])
        assert caught.value.exit_code == 2
        assert names in caught.value.message
        assert suggests in (caught.value.fix or "")

    @pytest.mark.parametrize("text", ["- a\n- b\n", "train: [1\n", "1: 2\n", "\x00"])
    def test_refuses_a_file_that_is_no_tree_of_keys(self, text: str, tmp_path: Path) -> None:
        file = tmp_path / "bad.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"bad\.yaml"):
            load_config("noising", file)

    def test_refuses_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"none\.yaml"):
            load_config("noising", tmp_path / "none.yaml")

    def test_takes_the_name_of_one_that_comes_with_the_system(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        shipped = load_config("refdet", Path("small"))
        assert shipped != load_config("refdet")
        # a file of that name goes first
        Path("small").write_text("train: {epochs: 3}")
        assert load_config("refdet", Path("small")) == load_config(
            "refdet", None, ["train.epochs=3"]
        )

    @pytest.mark.parametrize(
        ("system", "name", "suggests"),
        [
            ("refdet", "smal", "small"),
            ("noising", "small", "rad"),
            ("stripe", "small", "default"),
            ("refdet", "default", "small"),
        ],
    )
    def test_refuses_a_name_that_no_configuration_has(
        self, system: str, name: str, suggests: str
    ) -> None:
        with pytest.raises(ConfigError, match=f"no configuration '{name}'") as caught:
            load_config(system, Path(name))
        assert suggests in (caught.value.fix or "")

    def test_that_is_empty_changes_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "empty.yaml").write_text("")
        assert load_config("noising", tmp_path / "empty.yaml") == load_config("noising")


def test_what_a_run_had_is_changed_where_it_is_told_to_be() -> None:
    before = load_config("noising", None, ["fit.k=5", "backbone.args={pad_type: same}"])
    now = changed(before, ["train.epochs=7", "backbone.args.output_stride=16"])
    assert now.train.epochs == 7
    assert now.backbone.args == {"pad_type": "same", "output_stride": 16}  # type: ignore[attr-defined]
    assert now.model_copy(update={"train": before.train, "backbone": before.backbone}) == before  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"train\.epoch'"):
        changed(before, ["train.epoch=7"])


def test_an_unknown_system_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no system 'nosing'"):
        load_config("nosing")


def test_all_keys_can_be_listed() -> None:
    class Inner(Config):
        a: int = 0

    class Outer(Config):
        b: Any = None
        inner: Inner = Inner()

    assert keys(Outer) == ["b", "inner.a"]


def test_neither_configuration_nor_drawing_loads_torch() -> None:
    code = (
        "import sys; from engineworks.training.config import load_config; load_config('noising');"
        "import engineworks.training.systems.noising.sample; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class TestAliases:
    LAUGH = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{c}: &{c} [{', '.join(['*' + p] * 9)}]\n"
        for p, c in zip("abcdefgh", "bcdefghi", strict=True)
    )

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            (LAUGH, "values"),
            ("a: &a [*a]", "alias of what it stands in"),
            ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
            ("a: " + "9" * 5000, "value"),
        ],
    )
    def test_that_would_fill_the_memory_are_refused(
        self, tmp_path: Path, text: str, reason: str
    ) -> None:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=reason):
            load_config("noising", tmp_path / "c.yaml", ())

    def test_may_repeat_what_was_written(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("train: {seed: &s 3}\npreprocess: {pad_value: *s}\n")
        assert load_config("noising", tmp_path / "c.yaml", ()).train.seed == 3


class TestYamlThatMisleads:
    @pytest.mark.parametrize(
        "text",
        [
            "train: {epochs: 2}\ntrain: {seed: 1}",
            "train:\n  seed: 1\n  seed: 2",
            "backbone: {args: {a: 1, a: 1}}",
        ],
    )
    def test_a_key_twice_is_named_with_both_lines(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"line \d: the key '\w+' stands in line 1|2"):
            load_config("noising", tmp_path / "c.yaml")

    def test_a_key_over_a_merged_one_is_not_twice(self, tmp_path: Path) -> None:
        (tmp_path / "c.yaml").write_text("train: {<<: {seed: 1, epochs: 2}, seed: 3}")
        config = load_config("noising", tmp_path / "c.yaml")
        assert (config.train.seed, config.train.epochs) == (3, 2)

    @pytest.mark.parametrize("text", ["010", "-010", "0_7", "1:30", "00"])
    def test_a_number_of_another_base_is_refused(self, text: str) -> None:
        with pytest.raises(ConfigError, match=f"YAML reads {text} as") as caught:
            load_config("noising", overrides=[f"train.seed={text}"])
        assert caught.value.fix

    @pytest.mark.parametrize(
        ("text", "seed"), [("0", 0), ("10", 10), ("0x10", 16), ("1_000", 1000)]
    )
    def test_other_numbers_are_what_they_look_like(self, text: str, seed: int) -> None:
        assert load_config("noising", overrides=[f"train.seed={text}"]).train.seed == seed


class TestArgumentsOfOtherPackages:
    @pytest.mark.parametrize(("system", "key"), [("noising", "backbone"), ("refdet", "encoder")])
    def test_are_replaced_as_a_whole_or_one_by_one(
        self, tmp_path: Path, system: str, key: str
    ) -> None:
        (tmp_path / "c.yaml").write_text(f"{key}: {{args: {{a: 1, b: 2}}}}")

        def args(*overrides: str) -> dict[str, object]:
            config = load_config(system, tmp_path / "c.yaml", overrides)
            found: dict[str, object] = getattr(config, key).args
            return found

        assert args() == {"a": 1, "b": 2}
        assert args(f"{key}.args={{}}") == {}
        assert args(f"{key}={{args: {{}}}}") == {}
        assert args(f"{key}.args={{b: 3}}") == {"b": 3}
        assert args(f"{key}.args.b=3") == {"a": 1, "b": 3}
        assert args(f"{key}.args={{}}", f"{key}.args.c=3") == {"c": 3}
