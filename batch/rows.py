"""What systems answer as rows of Arrow: one schema for each kind of result, whatever rows hold.

Values are those of ``results.jsonl``; a row whose ``error`` is not null has nothing but its
``source`` beside it. No type of a package's own is in it: every reader of Arrow and parquet reads
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa

from engineworks.runtime.errors import UsageError
from engineworks.runtime.results import (
    AnomalyMap,
    Classification,
    DefectMap,
    Detections,
    Embedding,
)
from engineworks.runtime.systems import Result, system_module

ERROR = "error"

# of every kind; what stands for a row's place in a file is counted from here, see ``blocks``
_ORIGIN = (
    ("source", pa.string()),
    (ERROR, pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
)
_MAP = (
    # not a list with offsets of 32 bits: maps may be as large as their pictures
    ("map", pa.large_list(pa.float32())),
    ("map_height", pa.int32()),
    ("map_width", pa.int32()),
)
_SCORED = (("label", pa.string()), ("score", pa.float64()), ("threshold", pa.float64()))
_RANKED = pa.struct([("label", pa.string()), ("probability", pa.float64())])
_PEAK = pa.struct([("x", pa.int32()), ("y", pa.int32()), ("score", pa.float64())])
_OBJECT = pa.struct(
    [
        ("name", pa.string()),
        ("score", pa.float64()),
        *((side, pa.float64()) for side in ("x1", "y1", "x2", "y2")),
    ]
)
_KINDS: dict[type, tuple[tuple[str, Any], ...]] = {
    AnomalyMap: (*_SCORED, ("anomalous_area", pa.float64())),
    Classification: (
        ("label", pa.string()),
        ("probability", pa.float64()),
        ("unknown", pa.bool_()),
        ("set", pa.list_(pa.string())),
        ("top", pa.list_(_RANKED)),
    ),
    DefectMap: (*_SCORED, ("num_defects", pa.int32()), ("defects", pa.list_(_PEAK))),
    Detections: (
        ("num_objects", pa.int32()),
        ("best", pa.string()),
        ("score", pa.float64()),
        ("objects", pa.list_(_OBJECT)),
    ),
    Embedding: (("embedding", pa.list_(pa.float32())),),
}
_WITH_MAPS = (AnomalyMap, DefectMap)


def schema_of(system: str, *, maps: bool = False) -> Any:
    """The columns of a system's answers, a ``pyarrow.Schema``.

    Args:
        system: its name, as a bundle's manifest has it.
        maps: with ``map`` (row by row, float32), ``map_height`` and ``map_width``.

    Raises:
        UsageError: there is no such system, or it has no maps.
    """
    kind = _kind_of(system)
    if maps and kind not in _WITH_MAPS:
        raise UsageError(f"the system '{system}' gives no maps", fix="leave --maps out")
    return pa.schema([*_ORIGIN, *_KINDS[kind], *(_MAP if maps else ())])


def _kind_of(system: str) -> type:
    """The class of a system's results, as its ``infer`` says it."""
    answered = get_type_hints(system_module(system).System.infer)["return"]
    (kind,) = get_args(answered)
    assert isinstance(kind, type)
    return kind


def map_of(result: Result) -> dict[str, Any]:
    """The columns of a result's map, for one that has one."""
    assert isinstance(result, _WITH_MAPS)
    height, width = result.map_HW.shape
    flat = np.ascontiguousarray(result.map_HW, np.float32).ravel()
    return {"map": flat, "map_height": height, "map_width": width}


def table_of(records: Sequence[Mapping[str, Any]], schema: Any) -> Any:
    """Records as a ``pyarrow.Table`` of just this schema; what they lack is null.

    Texts may be names of files: bytes that are no UTF-8 are spelt out (``\\udcff``).
    """
    plain = [{name: _text(value) for name, value in record.items()} for record in records]
    return pa.Table.from_pylist(plain, schema=schema)


def _text(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
