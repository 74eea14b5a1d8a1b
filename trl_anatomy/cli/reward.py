"""`trl-anatomy reward`."""

from .training import train


def run(argv: list[str]) -> int:
    return train("reward", argv)
