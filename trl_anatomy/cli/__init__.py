"""The command line: `trl-anatomy audit | plan | predict | dpo | sft | reward | fit | compare | report | sae | demo`.

Exit codes: 0 done; 2 bad input, one sentence on standard error; 1 anything unexpected, with its traceback;
130 interrupted (start the same command again: finished parts are kept).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from ..errors import AnatomyError
from ..recipe import did_you_mean
from .commands import COMMANDS

__all__ = ["COMMANDS", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; default `sys.argv[1:]`.

    Returns:
        The exit code.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if argv[0] == "--version":
        from .. import __version__

        print(__version__)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise AnatomyError(f"Unknown command '{argv[0]}'{did_you_mean(argv[0], COMMANDS)}; see trl-anatomy --help.")
        return int(import_module(f".{argv[0]}", __name__).run(argv[1:]))
    except AnatomyError as error:
        print(f"trl-anatomy {argv[0]}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Start the same command again: finished parts are kept.", file=sys.stderr)
        return 130


def _overview() -> str:
    lines = [
        "usage: trl-anatomy COMMAND [options]",
        "",
        "Read what a preference dataset teaches, and decide what the model may learn.",
    ]
    lines += ["", *(f"  {name:<8} {text}" for name, text in COMMANDS.items())]
    return "\n".join([*lines, "", "trl-anatomy COMMAND --help shows the options and an example."])
