"""How sure each precision of a bundle may be, learnt from labelled pictures."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from engineworks.runtime.bundle import Bundle
from engineworks.runtime.systems import Confident, open_system, system_module


def confident(bundle: Bundle, data: Path | None, *, threads: int | None = None) -> Bundle:
    """The bundle with a confidence of its INT8 graphs, and of its float ones where they had none.

    Other INT8 graphs need another confidence: without labelled data they have none. Its files stay
    as they are.

    Args:
        data: labelled pictures, see ``runtime.systems.Confident``.

    Raises:
        DatasetError: they are not of the bundle's classes.
    """
    if not isinstance(system_module(bundle.manifest.system).System, Confident):
        return bundle
    for precision in ("float", "int8"):
        with closing(open_system(bundle, precision=precision, threads=threads)) as system:
            assert isinstance(system, Confident)
            if precision == "int8" or system.confidence is None:
                bundle = system.fit_confidence(data)
    return bundle
