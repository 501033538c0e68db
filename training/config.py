"""Configurations: strict, frozen, one YAML file per system, a file and ``--set`` on top.

``load_config`` merges default.yaml of the system <- file <- overrides and validates the result
once. A misspelt key, a value of the wrong type and broken YAML are errors that name the key.
Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from engineworks.runtime import budgets
from engineworks.runtime.errors import ConfigError
from engineworks.training.systems import system_package


class Config(BaseModel):
    """Base of every part of a configuration: no unknown keys, no conversions, no changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def settled(cls, tree: Mapping[str, Any]) -> Mapping[str, Any]:
        """A tree of values with defaults that depend on others in it, before it is checked."""
        return tree


class OptimizerConfig(Config):
    """How parameters move.

    Attributes:
        name: ``adamw`` or ``sgd`` (Nesterov momentum).
        lr: peak learning rate, at the batch size of the configuration.
        momentum: of ``sgd``; ``adamw`` keeps its usual (0.9, 0.999).
        schedule: ``cosine`` (to zero at the last step) or ``constant``, after the warm-up.
        warmup_epochs: the rate grows linearly from 0 over these epochs; may be a fraction.
        clip_norm: largest norm of the whole gradient; null does not clip.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)


class TrainConfig(Config):
    """What the one loop of ``training.train`` uses.

    Attributes:
        device: ``auto`` takes CUDA where there is one and the run records what it was.
        precision: arithmetic of the forward pass; ``fp16`` scales the loss.
        batch_size: images per step, of all processes that train together.
        patience: training ends where so many epochs have gone by since the best one; null trains
            all. Needs data that choose the best epoch.
        accumulate: batches per optimizer step.
        workers: loader processes of each training process; 0 loads in it.
        prefetch: batches that each of these has ready, or in the making.
        pin_memory: batches wait in memory that a CUDA device copies from without the CPU; without
            such a device there is nothing to do.
        checkpoint_steps: also save every so many batches; null saves at the end of each epoch.
        ema_decay: evaluate and keep an exponential moving average of the weights; null does not.
        optimizer: unused by a system without trainable parameters.
    """

    seed: int = Field(default=0, ge=0, lt=2**32)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    epochs: int = Field(default=1, ge=1)
    patience: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    accumulate: int = Field(default=1, ge=1)
    workers: int = Field(default=0, ge=0)
    prefetch: int = Field(default=2, ge=1)
    pin_memory: bool = False
    checkpoint_steps: int | None = Field(default=None, ge=1)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    optimizer: OptimizerConfig = OptimizerConfig()


class BackboneConfig(Config):
    """A timm net, cut at chosen stages or up to its last feature map.

    Attributes:
        name: timm's name, e.g. ``resnet18``.
        stages: indices of its feature maps, from 0 at the stem: layer2 and layer3 of a ResNet are
            2 and 3, those of a plain transformer are its blocks. null: the last map of the whole
            net, as its classifier would pool it; tokens of patches are laid out as a grid.
        norm: the chosen blocks of a plain transformer also pass its last norm, as in DINO's own
            ``get_intermediate_layers``.
        weights: ``hub`` (timm's pretrained weights), ``none`` (random, from the run's seed) or the
            path of a safetensors file with timm's names.
        args: further arguments of ``timm.create_model``, e.g. ``{pad_type: same}``.
        checkpointing: recompute activations in the backward pass instead of keeping them.
        channels_last: keep the weights in the layout that convolutions on a GPU prefer.
        compile: run the net through ``torch.compile``.
        frozen_norms: batch norms keep their statistics in training, only for a whole net: for small
            batches, and for weights whose norms were folded into the convolutions (another
            statistic would make another net of them).
        engine: bundle of the same net, exported by its NAME, that runs in its
            place, frozen; its weights are the bundle's, and ``weights`` is not read. null: PyTorch.
        engine_backend, engine_precision: what runs the bundle; ``auto`` as at inference.
        store: folder that keeps features of pictures across runs, where a system asks a frozen net
            for the same ones again; null: none.
        store_bytes: most of it.
    """

    name: str
    stages: tuple[int, ...] | None = Field(default=None, min_length=1)
    norm: bool = False
    weights: str = "hub"
    args: dict[str, JsonValue] = {}
    checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    frozen_norms: bool = False
    engine: str | None = None
    engine_backend: str = "auto"
    engine_precision: Literal["auto", "int8", "float", "fp16", "bf16"] = "auto"
    store: str | None = None
    store_bytes: int = Field(default=2**32, ge=0)

    @field_validator("stages")
    @classmethod
    def _ascending(cls, stages: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if stages is not None and (stages[0] < 0 or any(a >= b for a, b in pairwise(stages))):
            raise ValueError("stages must ascend from 0")
        return stages

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.frozen_norms and self.stages is not None:
            raise ValueError("frozen_norms needs a whole net: stages must be null")
        if self.norm and self.stages is None:
            raise ValueError("a whole net has its norm: norm is for chosen stages")
        if self.engine is not None and (self.checkpointing or self.compile):
            raise ValueError("an engine takes the place of checkpointing and compile")
        return self

    def plain(self) -> Self:
        """The same net without what made training faster or smaller: that cannot be traced."""
        return self.model_copy(update={"engine": None, "compile": False, "checkpointing": False})


class SystemConfig(Config):
    """What the configurations of all systems have in common.

    Attributes:
        system: the name in ``training.systems.TASKS``; not to be overridden.
        train: the loop's part.
    """

    system: str
    train: TrainConfig = TrainConfig()

    @property
    def task_module(self) -> str:
        """Of the system's package: the module whose ``Task`` trains what this configures."""
        return "task"


AnyConfig = TypeVar("AnyConfig", bound=Config)


class _Misleading(yaml.YAMLError):
    """Valid YAML that means something else than it looks like."""

    def __init__(self, problem: str, mark: yaml.Mark, fix: str) -> None:
        super().__init__(f"line {mark.line + 1}: {problem}")
        self.fix = fix


class _Loader(yaml.SafeLoader):
    """YAML without its traps.

    Floats may be written ``1e-3``, as everybody does (YAML 1.1 wants ``1.0e-3``). A key that stands
    twice in a mapping, of which YAML takes the last, is refused, and so is a number that YAML 1.1
    reads in base 8 or 60.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (first := seen.get((key.tag, key.value))) is not None:
                    raise _Misleading(
                        f"the key '{key.value}' stands in line {first} already",
                        key.start_mark,
                        "write each key once, with all that belongs to it",
                    )
                seen[key.tag, key.value] = key.start_mark.line + 1
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        number: int = super().construct_yaml_int(node)
        if re.match(r"[-+]?0[0-9_]", node.value) or ":" in node.value:
            raise _Misleading(
                f"YAML reads {node.value} as {number}",
                node.start_mark,
                f"write {number}, or the number that is meant without leading zeros and colons",
            )
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def load_config(
    system: str, file: Path | None = None, overrides: Sequence[str] = ()
) -> SystemConfig:
    """The configuration of a run: default.yaml of the system <- ``file`` <- ``overrides``.

    Args:
        system: a name in ``training.systems.TASKS``.
        file: YAML with any part of the tree, e.g. the config.yaml of an earlier run; or the bare
            name of one that comes with the system, e.g. ``small``.
        overrides: ``key=value`` each, with dots into the tree; values are YAML, e.g.
            ``backbone.stages=[1, 2]``. Arguments of another package's, such as ``backbone.args``,
            are replaced as a whole, or one by one: ``backbone.args.pad_type=same``.

    Raises:
        UsageError: there is no such system.
        ConfigError: a file that cannot be read, an unknown key, a value of another type.
    """
    package = system_package(system)
    default = resources.files(package).joinpath("default.yaml").read_text(encoding="utf-8")
    schema = schema_of(system)
    whole = _free_form(schema)
    merged = _parse(default, f"default.yaml of '{system}'")
    if file is not None:
        merged = _merge(merged, _parse(_read_over(package, file), str(file)), whole)
    merged = _override(merged, overrides, whole)
    if merged["system"] != system:
        raise ConfigError(
            f"the configuration is of system '{merged['system']}', not '{system}'",
            fix=f"give a configuration of '{system}', or train '{merged['system']}'",
        )
    return validate(schema, merged)


def changed(config: AnyConfig, overrides: Sequence[str]) -> AnyConfig:
    """A configuration with settings of its own, whatever today's defaults are.

    Args:
        overrides: see ``load_config``.

    Raises:
        ConfigError: an unknown key, a value of another type.
    """
    schema = type(config)
    tree = _override(config.model_dump(mode="json"), overrides, _free_form(schema))
    return validate(schema, tree)


def _override(
    tree: dict[str, Any], overrides: Sequence[str], whole: Collection[str]
) -> dict[str, Any]:
    """``key=value`` texts over a tree; ``whole`` as of ``_merge``."""
    for override in overrides:
        key, change = _parse_override(override)
        inside = any(key.startswith(f"{name}.") for name in whole)
        tree = _merge(tree, change, () if inside else whole)
    return tree


def _read_over(package: str, file: Path) -> str:
    """Text of a configuration that goes over the default one: a file's, or a shipped one's."""
    if file.suffix or len(file.parts) > 1 or file.exists():
        return read_text(file)
    folder = resources.files(package)
    shipped = {
        Path(entry.name).stem: entry for entry in folder.iterdir() if entry.name.endswith(".yaml")
    }
    del shipped["default"]
    if file.name not in shipped:
        raise ConfigError(
            f"there is no configuration '{file}'",
            fix=f"give a YAML file, or one of {', '.join(sorted(shipped))}"
            if shipped
            else "give a YAML file; this system comes with default.yaml alone",
        )
    return shipped[file.name].read_text(encoding="utf-8")


def schema_of(system: str) -> type[SystemConfig]:
    """The configuration class of a system.

    Raises:
        UsageError: there is no such system.
    """
    schema: type[SystemConfig] = importlib.import_module(
        f"{system_package(system)}.config"
    ).TaskConfig
    return schema


def parse(text: str, schema: type[AnyConfig], source: str = "the text") -> AnyConfig:
    """A configuration from the YAML that ``dump`` wrote.

    Raises:
        ConfigError: not YAML, an unknown key, a value of another type.
    """
    return validate(schema, _parse(text, source))


def dump(config: Config) -> str:
    """YAML text of a whole configuration; ``parse`` gives the same configuration back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def validate(schema: type[AnyConfig], tree: Mapping[str, Any]) -> AnyConfig:
    """Check a tree of plain values against its schema.

    Raises:
        ConfigError: the first fault: its key, what is wrong and, for an unknown key, the nearest
            valid ones.
    """
    try:
        # by way of JSON, where a list may become a tuple although everything else is strict
        return schema.model_validate_json(json.dumps(schema.settled(tree)))
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(
                f"the configuration holds a value that is no number, text, list or null ({error})",
                fix="put quotes around texts that look like dates",
            ) from error
        faults = error.errors()
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        raise ConfigError(f"there is no configuration key '{key}'", fix=_nearest(schema, key))
    raise ConfigError(
        f"configuration key '{key}': {fault['msg'].lower()}"
        + ("" if fault["type"] == "missing" else f", got {fault['input']!r}"),
        fix=f"set it in the file, or with --set {key}=VALUE",
    )


def keys(schema: type[BaseModel], prefix: str = "") -> list[str]:
    """All keys of a schema that hold a value, with dots, in the order of definition."""
    return [key for key, _ in _typed_keys(schema, prefix)]


def _typed_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in schema.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _typed_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def _free_form(schema: type[BaseModel]) -> tuple[str, ...]:
    """The keys whose values are mappings with keys of their own."""
    return tuple(key for key, kind in _typed_keys(schema) if get_origin(kind) is dict)


def _nearest(schema: type[BaseModel], key: str) -> str:
    valid = keys(schema)
    near = difflib.get_close_matches(key, valid, n=3, cutoff=0.6)
    leaf = key.rpartition(".")[2]
    near += [name for name in valid if name.rpartition(".")[2] == leaf and name not in near]
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(valid)}"


def read_text(file: Path) -> str:
    """Text of a configuration file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"configuration file {file} cannot be read ({error})", fix="check the path of --config"
        ) from error


def _parse(text: str, source: str) -> dict[str, Any]:
    tree = read_yaml(text, source)
    if tree is None:
        return {}
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise ConfigError(
            f"{source} is not a tree of `key: value` lines", fix="see the config.yaml of a run"
        )
    return tree


def _parse_override(override: str) -> tuple[str, dict[str, Any]]:
    """The key of ``key=value``, and the tree that holds the value alone."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError(
            f"'{override}' is not of the form key=value",
            fix="write e.g. --set train.seed=1",
        )
    key = key.strip()
    value = read_yaml(text, f"the value of --set {key}")
    tree: dict[str, Any] = {}
    inner = tree
    *path, leaf = key.split(".")
    for part in path:
        inner[part] = inner = {}
    inner[leaf] = value
    return key, tree


def read_yaml(text: str, source: str) -> Any:
    """Plain values from YAML.

    Args:
        source: what errors call the text.

    Raises:
        ConfigError: no YAML, or YAML that means something else than it looks like.
    """
    try:
        _check_extent(yaml.compose(text, _Loader), source)
        return yaml.load(text, _Loader)  # noqa: S506 - a SafeLoader with one more number format
    except _Misleading as error:
        raise ConfigError(f"{source}, {error}", fix=error.fix) from error
    except RecursionError as error:
        raise ConfigError(f"{source} is nested too deeply", fix="write it flat") from error
    except ValueError as error:  # a date that is none, a number of too many digits
        raise ConfigError(f"{source} holds a value that is none: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{source} is not valid YAML: {' '.join(str(error).split())}",
            fix="check brackets, quotes and indentation",
        ) from error


def _check_extent(root: yaml.Node | None, source: str) -> None:
    """Refuse aliases that name what they stand in, or that make a text of a kilobyte huge."""
    counted: dict[int, int] = {}

    def extent(node: yaml.Node) -> int:
        if (known := counted.get(id(node))) == 0:
            raise ConfigError(f"{source} holds an alias of what it stands in")
        if known is None:
            counted[id(node)] = 0  # on the way
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            flat = [
                each for part in parts for each in (part if isinstance(part, tuple) else [part])
            ]
            counted[id(node)] = 1 + sum(extent(each) for each in flat)
        return counted[id(node)]

    if root is not None and (asked := extent(root)) > (limit := budgets.YAML_NODES.limit):
        raise ConfigError(
            f"{source} asks for {asked:,} values, more than the {limit:,} that are allowed",
            fix="write out what its aliases repeat",
        )


def _merge(
    below: dict[str, Any], above: Mapping[str, Any], whole: Collection[str] = (), prefix: str = ""
) -> dict[str, Any]:
    """``above`` over ``below``, block by block; a value of a key in ``whole`` is no block."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        name = f"{prefix}{key}"
        if isinstance(old, dict) and isinstance(value, Mapping) and name not in whole:
            merged[key] = _merge(old, value, whole, f"{name}.")
        else:
            merged[key] = value
    return merged
