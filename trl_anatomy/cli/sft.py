"""`trl-anatomy sft`."""

from typing import Any

from . import training


def arguments(argv: list[str]) -> tuple[Any, ...]:
    """The options of TRL's script, and ours."""
    return training.arguments("sft", argv)[:-3]


def run(argv: list[str]) -> int:
    return training.train("sft", argv)
