"""A folder of a checkout by its own name: ``runtime`` is ``engineworks.runtime``, module by module.

From the root of a checkout Python finds the folders themselves. A second copy of a module has
classes of its own: ``except runtime.errors.EngineworksError`` would not catch what
``engineworks.runtime`` raises.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _Same(MetaPathFinder, Loader):
    """Finds ``folder.module`` in ``engineworks.folder.module``."""

    def __init__(self) -> None:
        self.folders: set[str] = set()
        self._specs: dict[str, ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        ours = fullname.partition(".")[0] in self.folders
        return ModuleSpec(fullname, self) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"engineworks.{spec.name}")
        self._specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """It has run already; the import just now gave it a specification of its other name."""
        name = module.__name__.removeprefix("engineworks.")
        module.__spec__ = self._specs.pop(name)


_same = _Same()


def same(folder: str) -> None:
    """Called by a folder's package that is being imported by its own name.

    Args:
        folder: its name, without ``engineworks.``.
    """
    if _same not in sys.meta_path:
        sys.meta_path.insert(0, _same)
    _same.folders.add(folder)
    sys.modules[folder] = import_module(f"engineworks.{folder}")
