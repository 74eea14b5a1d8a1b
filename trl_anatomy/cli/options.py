"""Options that several commands have, and how they are read."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from .. import recipe
from ..audit.config import TRL_NAMES, AuditConfig
from .commands import COMMANDS

# What the examples of the help are about.
MODEL = "--model_name_or_path Qwen/Qwen2.5-0.5B-Instruct"
DATA = "--dataset_name trl-lib/ultrafeedback_binarized"


def _names(action: argparse.Action) -> list[str]:
    """Names of an option, TRL's first, each in one spelling."""
    spelt = {option.replace("-", "_"): option for option in reversed(action.option_strings)}
    return sorted(reversed(spelt.values()), key=lambda option: option.lstrip("-") not in _OF_TRL)  # noqa: C414


def _value(action: argparse.Action) -> str:
    return str(action.metavar or action.dest.upper())


class _Help(argparse.RawDescriptionHelpFormatter):
    """One spelling of each name, TRL's first, and only defaults that say something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        takes = "" if action.nargs in (0, "?") else self._format_args(action, _value(action))
        return ", ".join(_names(action)) + (f" {takes}" if takes else "")

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text and "efault" not in text and action.default not in (None, False, "", [], argparse.SUPPRESS):
            return f"{text} (default: %(default)s)"
        return text


class _Grouped(argparse.ArgumentParser):
    """A parser whose help stands in the order of need: required, common, advanced, and what belongs to TRL."""

    command = ""
    required: tuple[str, ...] = ()
    common: tuple[str, ...] = ()
    theirs: frozenset[str] = frozenset()

    def add_argument(self, *names: Any, **how: Any) -> Any:
        action = super().add_argument(*names, **how)
        _add_names(self, action, [name[2:] for name in names if name.startswith("--")])
        return action

    def format_usage(self) -> str:
        needed = [f"{_names(action)[0]} {_value(action)}" for action in self._needed() if action.required]
        return f"usage: {' '.join([self.prog, *needed, '[options]'])}\n"

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_text(self.description)
        for title, actions in self._sections().items():
            if actions:
                formatter.start_section(title)
                formatter.add_arguments(actions)
                formatter.end_section()
        formatter.add_text(self.epilog)
        return f"{self.format_usage()}\n{formatter.format_help()}"

    def _needed(self) -> list[argparse.Action]:
        return [action for action in self._actions if action.required or action.dest in self.required]

    def _sections(self) -> dict[str, list[argparse.Action]]:
        needed = self._needed()
        rest = [action for action in self._actions if action not in needed]
        common = [action for dest in (*self.common, "help") for action in rest if action.dest == dest]
        rest = [action for action in rest if action not in common]
        return {
            "required": needed,
            "common": common,
            "advanced": [action for action in rest if action.dest not in self.theirs],
            f"options of `trl {self.command}`": [action for action in rest if action.dest in self.theirs],
        }


def plain_parser(command: str, *examples: str, common: tuple[str, ...] = ()) -> argparse.ArgumentParser:
    """A parser of options that no dataclass holds.

    Args:
        command: its name.
        examples: lines that run, the first the usual one.
        common: options that most readers of the help look for; those that are required stand above them.
    """
    return _described(_Grouped, command, examples, (), common)


def trl_parser(
    command: str,
    kinds: Sequence[type],
    *examples: str,
    required: tuple[str, ...] = (),
    common: tuple[str, ...] = (),
    theirs: Sequence[type] = (),
) -> Any:
    """A TrlParser of dataclasses: of ours, and of TRL's own script.

    Args:
        command: its name.
        kinds: dataclasses of ours.
        examples, common: as of `plain_parser`.
        required: options that the command cannot do without, although a recipe may hold them.
        theirs: dataclasses of TRL's script; they come first in what is parsed, and last in the help.
    """
    from trl import TrlParser

    parser: Any = _described(
        type("Parser", (_Grouped, TrlParser), {}),
        command,
        examples,
        required,
        common,
        dataclass_types=[*theirs, *kinds],
    )
    parser.theirs = frozenset(field.name for kind in theirs for field in dataclasses.fields(kind))
    for dest, names in _also(command).items():
        for action in parser._actions:
            if action.dest == dest:
                _add_names(parser, action, names)
    return parser


def _described(
    kind: Any, command: str, examples: Sequence[str], required: tuple[str, ...], common: tuple[str, ...], **how: Any
) -> Any:
    parser = kind(
        prog=f"trl-anatomy {command}",
        description=COMMANDS[command],
        epilog="\n".join(f"example: {example}" for example in examples),
        formatter_class=_Help,
        **how,
    )
    parser.command, parser.required, parser.common = command, required, common
    return parser


# Names of settings that TRL has too, whichever stands first in the parser.
_OF_TRL = frozenset(
    ("model_name_or_path", "dataset_name", "dataset_train_split", "dataset_config", "truncation_mode", "output_dir")
) | {"concept_policy"}


def _also(command: str) -> dict[str, list[str]]:
    """TRL's option -> our names of it, for the commands that take TRL's."""
    ours: dict[str, list[str]] = {}
    written = {} if command == "predict" else {"out": "output_dir"}  # predict writes elsewhere than the training
    for name, other in {**TRL_NAMES, "policy": "concept_policy", **written}.items():
        ours.setdefault(other, []).append(name)
    return ours


def _add_names(parser: argparse.ArgumentParser, action: argparse.Action, names: Iterable[str]) -> None:
    """Let an option be called by further names, with `-` and with `_`, as TRL's parser does."""
    for option in (spelt for name in names for spelt in (f"--{name}", f"--{name.replace('_', '-')}")):
        if option not in parser._option_string_actions:
            parser._option_string_actions[option] = action
            action.option_strings = [*action.option_strings, option]


def add_setting(parser: argparse.ArgumentParser, name: str, **changed: Any) -> None:
    """Give a plain parser a setting of an audit: its names, its default and its help."""
    field = AuditConfig.__dataclass_fields__[name]
    names = [name, *([TRL_NAMES[name]] if name in TRL_NAMES else [])]
    settings = {"help": field.metadata["help"], **({} if changed.get("required") else {"default": field.default})}
    parser.add_argument(*(f"--{option}" for option in names), **{"dest": name, **settings, **changed})


def add_audited(parser: argparse.ArgumentParser, *names: str) -> None:
    """Let settings of a training stand on the line of a command that reads an audit: they must be what was audited."""
    for name in names:
        kind = whole(1) if name == "max_length" else str
        told = "must be what was audited (default: not checked)"
        # By a name that no recipe has: what a recipe says is checked as a whole.
        add_setting(parser, name, dest=f"audited_{name}", metavar=name.upper(), type=kind, default=None, help=told)


def audited(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of `add_audited` that were given, by our names."""
    return {name: value for name in names if (value := getattr(args, f"audited_{name}")) is not None}


def whole(least: int) -> Callable[[str], int]:
    """Reads a whole number of at least `least`, for argparse."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}, allowed: a whole number of at least {least}")
        return int(text)

    return read


@dataclasses.dataclass
class AuditFlags:
    dry_run: bool = dataclasses.field(
        default=False, metadata={"help": "Check everything and say what would be run, without running the model."}
    )
    json: bool = dataclasses.field(default=False, metadata={"help": "Print the summary as JSON."})
    against: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Of SFT data: model, to set each response beside the start model's own to the same prompt, as "
            "pairs: what these data will teach this model. None: regions of the data against the rest."
        },
    )
    n_prompts: int = dataclasses.field(default=250, metadata={"help": "With --against: at most so many rows."})
    max_new_tokens: int = dataclasses.field(
        default=256, metadata={"help": "With --against: length of a sampled response, in tokens."}
    )
    sample_batch_size: int = dataclasses.field(
        default=64, metadata={"help": "With --against: responses sampled at a time."}
    )
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
