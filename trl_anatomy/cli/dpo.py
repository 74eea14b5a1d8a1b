"""`trl-anatomy dpo`."""

from .training import train


def run(argv: list[str]) -> int:
    return train("dpo", argv)
