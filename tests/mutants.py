"""How many small faults do the tests find? A mutation run over the modules that numbers rest on.

    python -m tests.mutants [--num 300] [--seed 0] [--only NAME]

Cosmic Ray makes the mutants: one operator, number, constant or branch changed each. A sample of
them is drawn with the seed, each is run against the tests of its module alone, in a copy of the
tree, and killed by the first that fails. One that runs into the time limit counts as killed, for it
hangs. The score has Wilson's 95 % interval. Annotations are left alone: nothing runs them.
"""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import chdir
from pathlib import Path
from typing import TypeAlias

import click

# module -> the tests that are about it
MODULES = {
    "runtime/metrics/*.py": [
        f"tests/runtime/test_{kind}metrics.py"
        for kind in ("", "box_", "candidate_", "class_", "vector_")
    ],
    "runtime/curves.py": ["tests/runtime/test_metrics.py"],
    "runtime/preprocess.py": ["tests/runtime/test_preprocess.py"],
    "runtime/search.py": ["tests/runtime/test_search.py"],
    "runtime/bundle.py": ["tests/runtime/test_bundle.py"],
    "runtime/confidence.py": ["tests/runtime/test_confidence.py"],
    "calibration/ranges.py": ["tests/calibration/test_ranges.py"],
    "export/quantize.py": ["tests/export/test_quantize.py"],
    "training/systems/paco/loss.py": [
        "tests/training/systems/paco/test_loss.py",
        "tests/training/systems/paco/test_published_loss.py",
    ],
    "training/systems/refdet/loss.py": ["tests/training/systems/refdet/test_loss.py"],
    "training/systems/stripe/loss.py": ["tests/training/systems/stripe/test_loss.py"],
}
ROOT = Path(__file__).parents[1]
_POLL_S = 0.05
Outcome: TypeAlias = dict[str, str]  # mutant, place, outcome
_WIDEST = 200  # columns


def annotations(path: Path) -> set[tuple[int, int]]:
    """Lines and columns of a module that are part of an annotation."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    spans: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            spans.append(node.annotation)
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            spans.append(node.returns)
    return {
        (line, column)
        for span in spans
        for line in range(span.lineno, (span.end_lineno or span.lineno) + 1)
        for column in range(
            span.col_offset if line == span.lineno else 0,
            (span.end_col_offset or 0) if line == span.end_lineno else _WIDEST,
        )
    }


def mutants(paths: Sequence[Path]) -> Iterator[tuple[Path, str, int, str]]:
    """Module, operator, occurrence and place of every mutant, always in the same order."""
    from cosmic_ray.commands.init import init
    from cosmic_ray.work_db import WorkDB

    for path in paths:
        passive = annotations(path)
        with tempfile.TemporaryDirectory() as folder:
            session = WorkDB(f"{folder}/session.sqlite", WorkDB.Mode.create)
            init([path], session, {})
            found = [item.mutations[0] for item in session.work_items]
            session.close()
        for each in sorted(found, key=lambda one: (one.operator_name, one.occurrence)):
            if each.start_pos not in passive:
                place = f"{path}:{each.start_pos[0]} in {each.definition_name}"
                yield path, each.operator_name, each.occurrence, place


def tested(tests: Sequence[str], seconds: float) -> str:
    """``killed``, ``survived`` or ``timeout``, by tests in a process of their own.

    It is a fork, so that nothing is imported again but the project.
    """
    pid = os.fork()
    if not pid:
        os.setsid()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        import pytest

        plain = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
        os._exit(int(pytest.main([*plain, *tests])))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return "survived" if status == 0 else "killed"
        time.sleep(_POLL_S)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "timeout"


def run(path: Path, operator: str, occurrence: int, tests: Sequence[str], seconds: float) -> str:
    """The outcome of one mutant."""
    from cosmic_ray.mutating import use_mutation
    from cosmic_ray.plugins import get_operator

    with use_mutation(path, get_operator(operator)(), occurrence) as (_, mutated):
        assert mutated is not None
        return tested(tests, seconds)


def copy_of(root: Path, out: Path) -> Path:
    """The files that git knows or would take, without what is being changed meanwhile."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.splitlines():
        if (root / name).exists():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, out / name, follow_symlinks=False)
    return out


@click.command()
@click.option("--num", default=300, show_default=True, help="Mutants; 0 takes all.")
@click.option("--seed", default=0, show_default=True, help="Of their choice.")
@click.option("--only", default="", help="Modules whose path holds this.")
@click.option("--limit", default=300.0, show_default=True, help="Seconds per mutant.")
@click.option("--minutes", default=0.0, help="Begin no mutant after so many; 0 is no limit.")
@click.option(
    "--report",
    type=click.Path(path_type=Path),
    default="build/mutants.jsonl",
    show_default=True,
    help="A line per mutant. Those that it has are not run again.",
)
def main(num: int, seed: int, only: str, limit: float, minutes: float, report: Path) -> None:
    """Print survivors, and the score of each module and of all."""
    begin = time.monotonic()
    # a module's time stamp is too coarse to tell two mutants apart
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    report = report.resolve()
    report.parent.mkdir(parents=True, exist_ok=True)
    lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    done: dict[str, Outcome] = {(each := json.loads(line))["mutant"]: each for line in lines}
    with tempfile.TemporaryDirectory() as folder, chdir(copy_of(ROOT, Path(folder))):
        sys.path.insert(0, folder)
        for name in ("numpy", "scipy.stats", "sklearn.metrics", "cv2", "onnx", "torch"):
            __import__(name)  # not once per mutant; pytest wants to load hypothesis by itself
        tests_of = {
            path: tests
            for pattern, tests in MODULES.items()
            for path in sorted(Path().glob(pattern))
            if only in str(path)
        }
        everything = list(mutants(list(tests_of)))
        chosen = random.Random(seed).sample(
            everything, min(num or len(everything), len(everything))
        )
        click.echo(f"{len(everything)} mutants of {len(tests_of)} modules, {len(chosen)} drawn")
        whole: set[tuple[str, ...]] = set()  # tests that pass without a mutant
        for path, operator, occurrence, place in chosen:
            if minutes and time.monotonic() - begin > 60 * minutes:
                break
            mutant, tests = f"{path} {operator} {occurrence}", tuple(tests_of[path])
            if mutant in done:
                continue
            if tests not in whole and tested(tests, limit) != "survived":
                raise click.ClickException(f"{' '.join(tests)} fail without a mutant")
            whole.add(tests)
            outcome = run(path, operator, occurrence, tests, limit)
            done[mutant] = {"mutant": mutant, "place": place, "outcome": outcome}
            with report.open("a", encoding="utf-8") as file:
                file.write(json.dumps(done[mutant]) + "\n")
        names = [f"{path} {operator} {occurrence}" for path, operator, occurrence, _ in chosen]
        summarise([done[name] for name in names if name in done])


def summarise(outcomes: Sequence[Outcome]) -> None:
    from engineworks.runtime.evaluation import wilson

    for each in sorted(outcomes, key=lambda one: one["mutant"]):
        if each["outcome"] == "survived":
            click.echo(f"survived: {each['place']}: {each['mutant']}")
    modules = sorted({each["mutant"].split()[0] for each in outcomes})
    for name in (*modules, ""):
        counts = Counter(
            each["outcome"]
            for each in outcomes
            if each["mutant"].startswith(f"{name} " * bool(name))
        )
        total = counts.total()
        killed = total - counts["survived"]
        low, high = wilson(killed, total)
        click.echo(
            f"{name or 'all':42s} {killed:4d} of {total:4d} killed, {counts['timeout']} by time: "
            f"{killed / max(1, total):.3f} ({low:.3f} to {high:.3f})"
        )


if __name__ == "__main__":
    main()
