"""The systems that can be trained: a table, and nothing imported until it is asked for.

Each package has the same files: ``config.TaskConfig``, ``task.Task``, ``sample.sample`` and
``default.yaml``. ``config`` and ``sample`` do not import torch.
"""

from __future__ import annotations

from engineworks.runtime.errors import UsageError

TASKS: dict[str, str] = {
    "noising": "engineworks.training.systems.noising",
    "paco": "engineworks.training.systems.paco",
    "refdet": "engineworks.training.systems.refdet",
    "stripe": "engineworks.training.systems.stripe",
}

# systems without a package here, and where their bundles come from
UNTRAINED: dict[str, str] = {
    "backbone": "export a net: cli.py export backbone:NAME --out BUNDLE, e.g. backbone:resnet18",
}


def system_package(name: str) -> str:
    """Import path of a system's package.

    Raises:
        UsageError: there is no such system, or it is not trained.
    """
    if name in UNTRAINED:
        raise UsageError(f"'{name}' is not trained", fix=UNTRAINED[name])
    if name not in TASKS:
        raise UsageError(f"there is no system '{name}'", fix=f"choose one of {', '.join(TASKS)}")
    return TASKS[name]
