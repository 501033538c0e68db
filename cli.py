"""The command line: the group of all commands; its errors and signals become messages.

Heavy imports live inside the commands, so that ``--help`` is instant and ``infer`` loads no torch.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from engineworks.commands.batch import batch
from engineworks.commands.bench import bench
from engineworks.commands.bundle import bank, bundle
from engineworks.commands.data import check, sample
from engineworks.commands.doctor import doctor
from engineworks.commands.export import export
from engineworks.commands.printing import echo, show_messages
from engineworks.commands.report import report
from engineworks.commands.run import evaluate, infer, refs
from engineworks.commands.serve import serve
from engineworks.commands.train import train
from engineworks.runtime.refusals import explain
from engineworks.runtime.signals import Stopped, stoppable


class Cli(click.Group):
    """Turns errors and signals into a message and an exit code; no traceback reaches a user."""

    def invoke(self, context: click.Context) -> Any:
        try:
            with stoppable(), _threads_explained():
                return super().invoke(context)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Stopped as stopped:
            echo(f"{stopped}", fg="yellow", err=True)
            context.exit(stopped.exit_code)
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # click ends quietly where nobody reads on
            explained = explain(error)
            echo(f"error: {explained}", fg="red", err=True)
            _drop_unwritten()
            context.exit(explained.exit_code)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="engineworks")
@click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")
@click.pass_context
def main(context: click.Context, quiet: bool) -> None:
    """Train small-data vision systems, export INT8 bundles, run them without PyTorch."""
    context.obj = {"quiet": quiet}
    show_messages(quiet=quiet)


_COMMANDS = (
    sample, check, train, export, infer, evaluate, batch, serve, bench, report, refs, bundle, bank,
    doctor,
)  # fmt: skip
for _command in _COMMANDS:
    main.add_command(_command)


@contextmanager
def _threads_explained() -> Iterator[None]:
    """What a library's thread dies of is said as all errors are; the command itself goes on."""

    def tell(died: threading.ExceptHookArgs) -> None:
        if isinstance(died.exc_value, Exception):
            echo(f"error: {explain(died.exc_value)}", fg="red", err=True)
        else:
            threading.__excepthook__(died)

    before, threading.excepthook = threading.excepthook, tell
    try:
        yield
    finally:
        threading.excepthook = before


def _drop_unwritten() -> None:
    """Forget what standard output could not take: Python would try again at its end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
