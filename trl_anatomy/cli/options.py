"""Options that several commands have, and how they are read."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable
from typing import Any

from .. import recipe
from .commands import COMMANDS


def plain_parser(command: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"trl-anatomy {command}",
        description=COMMANDS[command],
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def whole(least: int) -> Callable[[str], int]:
    """Reads a whole number of at least `least`, for argparse."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}, allowed: a whole number of at least {least}")
        return int(text)

    return read


def both(setting: str) -> tuple[str, str]:
    """Our option of a setting, and TRL's."""
    from ..audit.config import TRL_NAMES

    return f"--{setting}", f"--{TRL_NAMES[setting]}"


@dataclasses.dataclass
class AuditFlags:
    dry_run: bool = dataclasses.field(
        default=False, metadata={"help": "Check everything and say what would be run, without running the model."}
    )
    json: bool = dataclasses.field(default=False, metadata={"help": "Print the summary as JSON."})
    label_model: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Model that names concepts and contexts: one at --label_url, or a chat model here (folder or hub "
            "name). None: their distinctive terms."
        },
    )
    label_url: str | None = dataclasses.field(
        default=None,
        metadata={"help": "OpenAI-compatible endpoint of --label_model, such as http://localhost:8000/v1."},
    )
    label_key_variable: str | None = dataclasses.field(
        default=None, metadata={"help": "Environment variable that holds the key of --label_url."}
    )


@dataclasses.dataclass
class SAEFlags:
    json: bool = dataclasses.field(default=False, metadata={"help": "Print the figures as JSON."})


@dataclasses.dataclass
class PolicyArguments:
    """What these commands add to TRL's own arguments."""

    concept_policy: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Concept policy (YAML, or its URL): what the model may learn. None trains as TRL does."},
    )
    audit: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Audit folder (or its URL) of the training set: for clusters in the policy, and for logging."
        },
    )


@dataclasses.dataclass
class PredictArguments:
    """What `predict` adds to them."""

    prompts: str | None = dataclasses.field(
        default=None, metadata={"help": "File with a 'prompt' column. None: prompts of the audited dataset."}
    )
    n_prompts: int = dataclasses.field(default=250, metadata={"help": "At most so many prompts."})
    n_per_prompt: int = dataclasses.field(
        default=4, metadata={"help": "Responses of the start model to each prompt, an even number."}
    )
    max_new_tokens: int = dataclasses.field(default=256, metadata={"help": "Length of a response, in tokens."})
    sample_batch_size: int = dataclasses.field(default=64, metadata={"help": "Responses sampled at a time."})
    n_pairs: int = dataclasses.field(
        default=4000, metadata={"help": "Pairs that the step is taken on, at most (in whole batches of the recipe)."}
    )
    budget: float = dataclasses.field(
        default=0.1,
        metadata={
            "help": "Share of the training's steps that a pilot trains, to carry them on to its end. 0: no pilot. What "
            "all of it costs is said first."
        },
    )
    null_drift: bool = dataclasses.field(
        default=False,
        metadata={"help": "Train one more pilot on sides swapped at random, to tell apart what any training changes."},
    )
    prediction: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Folder (or URL) for responses, pilots and prediction.json. None: AUDIT/prediction."},
    )
    json: bool = dataclasses.field(default=False, metadata={"help": "Print the prediction as JSON."})


def strict_parse(parser: Any, argv: list[str], places: dict[str, str] | None = None) -> tuple[Any, ...]:
    """The dataclasses of a parser, from flags and --config; refuses what nothing reads."""
    return recipe.parse(parser, argv, ours=ours(), places=places)


def ours() -> tuple[type, ...]:
    """Options of our commands beside those of audit and sae, which a recipe may hold for any command."""
    return AuditFlags, SAEFlags, PolicyArguments, PredictArguments
