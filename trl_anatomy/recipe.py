"""Options of a command: its line, and a recipe, one YAML file that every command and TRL's own read.

Each command takes from a recipe what is its own, by our name or by TRL's, and passes over what belongs to others; what
no command knows is refused. The line wins over the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .audit.config import NO_SAE, TRL_NAMES, AuditConfig
from .errors import AnatomyError

# Our name of a setting -> TRL's, or the one that a recipe has.
_NAMES = {**TRL_NAMES, "policy": "concept_policy"}
_OTHERS = {other: name for name, other in _NAMES.items()}
# What older recipes write for an option, and letters alone would not tell.
_MEANT = {"torch_dtype": "dtype", "revision": "model_revision"}
# Options of commands whose parser has no dataclass.
_PLAIN = ("policy", "before", "after", "batch_size", "likelihood")
# Keys of `model_init_kwargs` that leave what a model computes as it is.
_HOW_LOADED = (
    *("attn_implementation", "device_map", "max_memory", "low_cpu_mem_usage", "offload_folder", "use_safetensors"),
    *("use_cache", "use_kernels", "cache_dir", "token", "local_files_only", "force_download", "num_labels"),
)
# Settings that say what a training reads of its dataset, and those that say of which model.
_READ = ("dataset", "datasets", "dataset_split", "dataset_subset", "max_length", "truncation", "chat_template_path")
_MODEL = ("model", "model_revision")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Options of a YAML file, by the names that stand there."""

    file: str
    options: Mapping[str, Any]


def read_recipe(argv: Sequence[str]) -> tuple[Recipe | None, list[str]]:
    """The file that ``--config`` names, and the words of the line without it. Its `env` is set.

    Raises:
        AnatomyError: --config names no file of options.
    """
    import yaml

    words = list(argv)
    at = next((i for i, word in enumerate(words) if word.partition("=")[0] == "--config"), None)
    if at is None:
        return None, words
    file = words[at].partition("=")[2] or "".join(words[at + 1 : at + 2])
    if not file:
        raise AnatomyError("--config names no file; give the path of a YAML file.")
    del words[at : at + (1 if "=" in words[at] else 2)]
    try:
        with open(file, encoding="utf-8") as text:
            options = yaml.safe_load(text)
    except OSError as error:
        raise AnatomyError(f"--config names '{file}', which cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise AnatomyError(f"--config: {file} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(options, dict):
        raise AnatomyError(f"--config: {file} holds no options; write them as NAME: VALUE, one a line.")
    options = {str(key): value for key, value in options.items()}
    variables = options.pop("env", None) or {}
    if not isinstance(variables, dict):
        raise AnatomyError(f"--config: {file}: env holds no variables; write them as NAME: VALUE, one a line.")
    os.environ.update({str(name): str(value) for name, value in variables.items()})
    return Recipe(file, options), words


def parse(
    parser: Any, argv: Sequence[str], *, ours: Iterable[type] = (), places: Mapping[str, str] | None = None
) -> tuple[Any, ...]:
    """The dataclasses of a TrlParser, filled from line and recipe; refuses what nothing reads.

    TRL itself passes over a misspelt key in silence.

    Args:
        parser: of the command.
        argv: words of the line.
        ours: dataclasses whose fields are options of other commands of ours.
        places: key of a recipe -> option that it stands for in this command.

    Raises:
        AnatomyError: as `parse_known`; a word or key that no command knows.
    """
    *parsed, from_config, from_line = parse_known(parser, argv, ours=ours, places=places)
    refuse_unknown(from_config, from_line, parser)
    return tuple(parsed)


def parse_known(
    parser: Any,
    argv: Sequence[str],
    *,
    ours: Iterable[type] = (),
    places: Mapping[str, str] | None = None,
    launcher: Any = None,
) -> tuple[Any, ...]:
    """As `parse`; then what the launcher is to read, as words: of the recipe, and of the line.

    Raises:
        AnatomyError: --config names no file of options, a key that nothing knows, two names of one setting with two
            values, or an option with a value that it cannot have, which TRL's parser would tell with a traceback.
    """
    recipe, words = read_recipe(argv)
    line = _given(parser, words)
    from_config: list[str] = []
    if recipe is not None:
        options = _options_for(parser, recipe, line, ours, places or {}, _options(launcher))
        options.update(_words_for_booleans(options, parser, recipe.file))
        from_config = parser.set_defaults_with_config(**options)
    try:
        *parsed, from_line = parser.parse_args_into_dataclasses(args=words, return_remaining_strings=True)
    except AnatomyError:
        raise
    except ValueError as error:  # of the options' own classes, which check values as they are made
        raise AnatomyError(f"The options cannot be used: {' '.join(str(error).split()).rstrip('.')}.") from error
    return (*parsed, from_config, from_line)


def parse_plain(
    parser: argparse.ArgumentParser,
    argv: Sequence[str],
    *,
    ours: Iterable[type] = (),
    places: Mapping[str, str] | None = None,
) -> tuple[argparse.Namespace, Recipe | None]:
    """The options of a plain parser, from line and recipe, and the recipe.

    Raises:
        AnatomyError: as `parse`, for the recipe; the line ends as argparse ends it.
    """
    parser.add_argument("--config", metavar="RECIPE", help="YAML file of the training, read for the options above")
    if {"-h", "--help"} & set(argv):
        parser.parse_args(["--help"])
    recipe, words = read_recipe(argv)
    line = _given(parser, words)
    options = {} if recipe is None else _options_for(parser, recipe, line, ours, places or {}, {})
    for action in parser._actions:
        if action.dest not in options or recipe is None:
            continue
        value = options[action.dest]
        if action.nargs == 0 and not isinstance(value, bool):
            raise AnatomyError(f"--config: {recipe.file}: {action.dest} is {value!r}; allowed: true or false.")
        if action.nargs == "+":
            value = [str(item) for item in (value if isinstance(value, list) else [value])]
        action.default = value if action.nargs in (0, "+") or value is None else str(value)  # argparse reads texts
        action.required = False
    return parse_line(parser, words), recipe


def parse_line(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """The options of a plain parser, from the line alone.

    Raises:
        AnatomyError: an option that the parser does not have; whatever else is wrong the line ends as argparse ends it.
    """
    options = list(parser._option_string_actions)
    for word in words:
        name = word.partition("=")[0]
        if name == "--":
            break
        if name.startswith("--") and not any(option.startswith(name) for option in options):
            # Before argparse, which would ask for an option that is there, misspelt.
            raise AnatomyError(f"Unknown option '{name}' on the command line{did_you_mean(name, options)}.")
    parsed, rest = parser.parse_known_args(list(words))
    refuse_unknown([], rest, parser)
    return parsed


def check_audited(
    recipe: Recipe | None,
    settings: Mapping[str, Any],
    audit: str,
    ours: Iterable[type] = (),
    line: Mapping[str, Any] | None = None,
) -> None:
    """Refuse an audit that was made of something else than a recipe trains on.

    Args:
        recipe: the recipe; None checks nothing, and so does one that names no model and no dataset.
        settings: of the audit, as `audit.json` has them.
        audit: what it is called.
        ours: as of `parse`.
        line: settings that the command line names, by our names; they win over the recipe.

    Raises:
        AnatomyError: names the first setting that differs.
    """
    line = line or {}
    if recipe is None and not line:
        return
    stands = {} if recipe is None else {k: v for k, v in recipe.options.items() if _OTHERS.get(k, k) not in line}
    recipe = Recipe("the command line" if recipe is None else recipe.file, {**stands, **line})
    from trl import TrlParser

    parser = TrlParser((AuditConfig,))
    options = _options_for(parser, recipe, {}, ours, {"audit": "out"}, {}, quiet=True)
    parser.set_defaults_with_config(**{name: options[name] for name in (*_READ, *_MODEL) if name in options})
    config, _ = parser.parse_args_into_dataclasses(args=[], return_remaining_strings=True)
    mine, usual = config.settings(), AuditConfig().settings()
    names = [*(_READ if config.data_name else ()), *(_MODEL if config.model else ())]
    if recipe.options == line:
        names = list(line)
    for name in names:
        theirs = settings.get(name, usual[name])
        unsure = name == "truncation" and name not in options
        in_memory = name in ("model", "dataset") and not theirs and not (name == "dataset" and settings.get("datasets"))
        if mine[name] != theirs and not unsure and not in_memory and name in line:
            option = TRL_NAMES.get(name, name)
            raise AnatomyError(
                f"{audit} was made with {name} {theirs!r}, and --{option} says {mine[name]!r}: give the audit of what "
                f"is trained on, or leave --{option} out."
            )
        if mine[name] != theirs and not unsure and not in_memory:
            raise AnatomyError(
                f"{audit} was made with {name} {theirs!r}, and {recipe.file} trains with {mine[name]!r}: audit what is "
                f"trained on (trl-anatomy audit --config {recipe.file}), or leave --config out."
            )


def check_version(audit: Any, model_args: Any, training: Any) -> None:
    """Refuse to take the first step of a training from another version of the model than was audited.

    Raises:
        AnatomyError: the revisions of one name differ.
    """
    init = training.model_init_kwargs if isinstance(training.model_init_kwargs, dict) else {}
    revision, settings = init.get("revision") or model_args.model_revision, audit.info["settings"]
    audited = settings.get("model_revision", "main")
    if settings["model"] == model_args.model_name_or_path and revision != audited:
        raise AnatomyError(
            f"{audit.name} was made with model_revision {audited!r}, and the training has {revision!r}: audit the "
            "version that is trained."
        )


def refuse_reward(argv: Sequence[str]) -> None:
    """Refuse a recipe of reward training where only one of DPO is understood.

    Raises:
        AnatomyError: the file of --config has a key of reward training.
    """
    recipe, _ = read_recipe(argv)
    if recipe is not None and (keys := _of_reward(recipe.options)):
        raise AnatomyError(
            f"--config: {recipe.file}: {keys[0]} is a key of reward training, and predict reads recipes of dpo: a "
            "reward model samples no responses; give the recipe of the training that uses it."
        )


def _of_reward(options: Mapping[str, Any]) -> list[str]:
    """Keys of a recipe that reward training alone has."""
    trl = _trl_names()
    keys = sorted(set(options) & trl["reward"] - trl["dpo"])
    return keys + (["lora_task_type"] if options.get("lora_task_type") == "SEQ_CLS" else [])


def refuse_unknown(from_config: list[str], from_line: list[str], parser: Any, launcher: Any = None) -> None:
    """Raise AnatomyError for a word that nobody reads: not the parser, nor the launcher, to whom it may be passed."""
    known = {option for action in parser._actions for option in action.option_strings}
    passed = _options(launcher)
    for word in from_config:
        name = word.split("=")[0]
        if word.startswith("--") and name not in passed:
            close = did_you_mean(name, [*known, *passed])
            raise AnatomyError(f"Unknown option '{name.lstrip('-')}' in the --config file{close}.")
    values = 0.0  # words that the last option still takes
    for word in from_line:
        name, has_value, _ = word.partition("=")
        if name in passed:
            nargs = 1 if passed[name] is None else passed[name]
            values = 0 if has_value else nargs if isinstance(nargs, int) else float("inf")
        elif word.startswith("-") and name.strip("-"):
            close = did_you_mean(f"--{name.lstrip('-')}", [*known, *passed])
            raise AnatomyError(f"Unknown option '{name}' on the command line{close}.")
        elif values < 1:
            raise AnatomyError(f"Found '{word}' on the command line, which no option takes; every value needs a name.")
        else:
            values -= 1


def did_you_mean(word: str, known: Any) -> str:
    """The nearest of the known words, as the end of a sentence; nothing where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""


def _options(launcher: Any) -> dict[str, Any]:
    """Options of accelerate's launcher -> how many words each takes; none without a launcher."""
    if launcher is None:
        return {}
    passed = {option: action.nargs for action in launcher._actions for option in action.option_strings}
    return passed | {"--accelerate_config": None}


def _given(parser: Any, words: Sequence[str]) -> dict[str, str | None]:
    """Option -> what the line says of it.

    Raises:
        AnatomyError: two names of one option with two values.
    """
    actions = {option: action for action in parser._actions for option in action.option_strings}
    said: dict[str, tuple[str, str | None]] = {}
    for word, following in zip(words, [*words, None][1:], strict=True):
        option, has_value, text = word.partition("=")
        if option not in actions:
            continue
        dest, value = actions[option].dest, text if has_value else following
        before, earlier = said.get(dest, (option, value))
        if _spelt(option) != _spelt(before) and value != earlier and not _spelt(option).startswith("no_"):
            raise AnatomyError(
                f"{before} is {earlier} and {option} is {value}, two names of one setting; give one of them."
            )
        said[dest] = option, value
    return {dest: value for dest, (_, value) in said.items()}


def _spelt(option: str) -> str:
    return option.lstrip("-").replace("-", "_")


def _options_for(  # noqa: C901, PLR0912
    parser: Any,
    recipe: Recipe,
    line: Mapping[str, str | None],
    ours: Iterable[type],
    places: Mapping[str, str],
    launcher: Mapping[str, Any],
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """What a command takes from a recipe, by its own names; says on standard error what it leaves that acts.

    Raises:
        AnatomyError: a key that no command knows, two names of one setting with two values, a mixture that is none.
    """
    own = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    known = _known(ours) | set(own)
    taken: dict[str, dict[str, Any]] = {}
    passed_over = []
    for key, value in recipe.options.items():
        dest = _destination(key, value, own, places)
        if dest is None and f"--{key}" in launcher:
            dest = key
        if dest is not None:
            taken.setdefault(dest, {})[key] = value
        elif key in known:
            passed_over.append(key)
        else:
            close = f" (did you mean '{_MEANT[key]}'?)" if key in _MEANT else did_you_mean(key, sorted(known))
            raise AnatomyError(f"Unknown option '{key}' in the --config file{close}.")
    kept = {dest: _one_of(recipe, dest, values, places) for dest, values in taken.items()}
    if recipe.options.get("datasets"):
        from .reading.dataset import check_mixture

        check_mixture(recipe.options["datasets"])
    notes = []
    if "output_dir" in own:  # a command that trains
        if kept.get("truncation_mode") == "drop":
            raise AnatomyError(
                f"--config: {recipe.file}: truncation is drop, as reward training does; DPO drops no row."
            )
        if left := [key for key in passed_over if key not in _launcher_names()]:
            of = parser.prog.split()[-1]
            notes.append(f"{of} does not read {', '.join(left)}.")
    elif "truncation" in own:  # a command that reads what is trained on
        notes += _read_as_trained(recipe, kept, line, own)
        for dest, action in own.items():
            if action.nargs == "+" and dest in kept and not isinstance(kept[dest], list | None):
                kept[dest] = [kept[dest]]
    if not quiet and os.environ.get("RANK", "0") == "0":
        for note in notes:
            print(f"{recipe.file}: {note}", file=sys.stderr)
    return kept


def _destination(key: str, value: Any, own: Mapping[str, Any], places: Mapping[str, str]) -> str | None:
    """The option of a command that a key of a recipe stands for."""
    if key in places:
        # As SAE a recipe names a folder, or what is no place to write one.
        no_folder = key == "sae" and (
            not isinstance(value, str) or value in ("", "auto", NO_SAE) or (":" in value and not Path(value).exists())
        )
        return None if no_folder else places[key]
    return next((name for name in (key, _NAMES.get(key), _OTHERS.get(key)) if name in own), None)


def _one_of(recipe: Recipe, dest: str, values: Mapping[str, Any], places: Mapping[str, str]) -> Any:
    """What a recipe says of an option by several names: one value.

    A model that `compare` gets by its own option stands before that of the training; an SAE's own folder before
    an `out`, which is the audit's then.
    """
    own = {key: value for key, value in values.items() if key not in places}
    if own and dest in ("before", "after"):
        values = own
    elif "sae" in values and places.get("sae") == dest:
        values = {"sae": values["sae"]}
    (first, value), *others = values.items()
    for key, other in others:
        if other != value:
            raise AnatomyError(
                f"--config: {recipe.file}: {first} is {value!r} and {key} is {other!r}, two names of one setting; keep "
                "one of them."
            )
    return value


def _read_as_trained(  # noqa: C901, PLR0912
    recipe: Recipe, kept: dict[str, Any], line: Mapping[str, str | None], own: Mapping[str, Any]
) -> list[str]:
    """Put into `kept` what else of a training's recipe says what it reads; notes on what a reader cannot follow.

    Raises:
        AnatomyError: a recipe of both trainers, or a setting that changes the tokens and that no reader knows.
    """
    options, notes, trl = recipe.options, [], _trl_names()
    if options.get("eos_token") is not None:
        raise AnatomyError(
            f"--config: {recipe.file}: eos_token is {options['eos_token']!r}, which changes what is trained on and is "
            "not read here: save the model's tokenizer with that eos_token."
        )
    init = options.get("model_init_kwargs") or {}
    if isinstance(init, str):
        try:
            init = json.loads(init)
        except ValueError:
            init = None
    if not isinstance(init, dict):
        raise AnatomyError(f"--config: {recipe.file}: model_init_kwargs holds no settings; write NAME: VALUE.")
    for theirs, name in (("revision", "model_revision"), ("torch_dtype", "dtype"), ("dtype", "dtype")):
        if theirs in init:  # wins over the recipe's own, as in TRL
            kept[name] = init[theirs]
    more = [key for key in init if key not in ("revision", "dtype", "torch_dtype", *_HOW_LOADED)]
    if more:
        notes.append(f"the start model is read without {', '.join(more)} of model_init_kwargs.")
    if options.get("load_in_4bit") or options.get("load_in_8bit"):
        notes.append("the start model is read as it is stored, not quantised.")
    mixture = bool(kept.get("datasets"))
    if options.get("streaming" if mixture else "dataset_streaming"):
        notes.append("the dataset is read whole, not as a stream.")
    if not mixture or line.get("dataset") is not None:
        mixture = False
        kept.pop("datasets", None)
    else:
        beside = [name for name in ("dataset", "dataset_subset") if kept.pop(name, None) is not None]
        if beside:
            notes.append("datasets is read, and dataset_name beside it is not, as in TRL.")
        if options.get("test_split_size") is not None:
            notes.append("the whole mixture is read: which rows test_split_size holds out, each training draws anew.")
    data = line.get("dataset") or kept.get("dataset")
    evaluates = options.get("eval_strategy") not in (None, False, "no")
    if evaluates and data and not mixture and "eval_dataset" in own and "eval_dataset" not in {*kept, *line}:
        kept["eval_dataset"], kept["eval_split"] = data, options.get("dataset_test_split", "test")
    if "truncation" in {*kept, *line} or not set(options) & frozenset().union(*trl.values()) - set(own):
        return notes
    if "data_kind" in own and set(options) & trl["sft"] - trl["dpo"] - trl["reward"]:
        kept["truncation"] = "keep_start"
        kept.setdefault("data_kind", "sft")
        return notes
    dpo = sorted(set(options) & trl["dpo"] - trl["reward"])
    reward = _of_reward(options)
    if dpo and reward:
        raise AnatomyError(
            f"--config: {recipe.file} has keys of dpo ({dpo[0]}) and of reward ({reward[0]}), which read long pairs in "
            "two ways: say --truncation keep_start (dpo) or --truncation drop (reward)."
        )
    if dpo or reward:
        kept["truncation"] = "drop" if reward else "keep_start"
    if reward:
        notes.append(f"a recipe of reward training ({reward[0]}): pairs longer than max_length are left out.")
    elif not dpo and "output_dir" in options:
        notes.append("nothing in it tells dpo from reward; read as dpo trains (as reward does: --truncation drop).")
    return notes


@cache
def _trl_names() -> dict[str, frozenset[str]]:
    """Command -> names of the options that TRL's own script takes."""
    from trl import DatasetMixtureConfig, DPOConfig, ModelConfig, RewardConfig, ScriptArguments, SFTConfig

    both = (ScriptArguments, ModelConfig, DatasetMixtureConfig)
    kinds = {"dpo": DPOConfig, "reward": RewardConfig, "sft": SFTConfig}
    return {kind: _fields(config, *both) for kind, config in kinds.items()}


@cache
def _launcher_names() -> frozenset[str]:
    from accelerate.commands.launch import launch_command_parser

    return frozenset(map(_spelt, _options(launch_command_parser())))


def _known(ours: Iterable[type]) -> set[str]:
    """Every key that a recipe may have: options of all commands, of TRL and of accelerate's launcher."""
    from .audit.make_sae import SAEConfig

    trl = _trl_names()
    return {
        *_fields(AuditConfig, SAEConfig, *ours),
        *frozenset().union(*trl.values()),
        *_launcher_names(),
        *_NAMES,
        *_PLAIN,
    }


def _fields(*kinds: Any) -> frozenset[str]:
    return frozenset(field.name for kind in kinds for field in dataclasses.fields(kind))


def _words_for_booleans(options: dict[str, Any], parser: Any, file: str) -> dict[str, str]:
    """Options that YAML read as no word although they take one: `save_strategy: no` is false to YAML.

    `report_to: null` and `None` are nothing to report to.

    Raises:
        AnatomyError: a boolean where the option knows no such word.
    """
    hints = {name: hint for kind in parser.dataclass_types for name, hint in get_type_hints(kind).items()}
    words: dict[str, str] = {}
    if options.get("report_to", "none") in (None, "None"):
        words["report_to"] = "none"
    for name in (name for name, value in options.items() if isinstance(value, bool)):
        kinds = [kind for kind in get_args(hints.get(name)) if isinstance(kind, type) and issubclass(kind, enum.Enum)]
        allowed = [str(member.value) for kind in kinds for member in kind]
        if name == "report_to":
            allowed = ["none", "all", "or the name of a tracker"]
        nothing = [word for word in ("no", "none") if word in allowed]
        if allowed and (options[name] or not nothing):
            raise AnatomyError(
                f"--config: {file}: {name} is {str(options[name]).lower()} (so YAML reads yes, on, no and off); "
                f"allowed: {', '.join(allowed)}, in quotes."
            )
        if allowed:
            words[name] = nothing[0]
    return words
