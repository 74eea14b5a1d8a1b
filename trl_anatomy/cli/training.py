"""TRL's own script with our trainer in the place of TRL's, for `dpo`, `reward`, `sft` and `predict`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import recipe
from ..errors import AnatomyError
from .options import DATA, MODEL, PolicyArguments, ours, trl_parser

_LAUNCHED = "TRL_ANATOMY_LAUNCHED"


# Options of TRL's scripts that most readers of the help look for.
NEEDED = ("model_name_or_path", "dataset_name", "output_dir")
USUAL = (
    *("dataset_train_split", "max_length", "learning_rate", "num_train_epochs", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "use_peft"),
)


def script_types(kind: str) -> list[type]:
    """The dataclasses of the options of TRL's script."""
    return list(import_module(f"trl.scripts.{kind}").make_parser(prog=f"trl {kind}").dataclass_types)


def arguments(kind: str, argv: list[str]) -> tuple[Any, ...]:
    """Options of TRL's script and ours; then the launcher's parser, and its words of recipe and line."""
    from accelerate.commands.launch import launch_command_parser

    parser = trl_parser(
        kind,
        (PolicyArguments,),
        f"trl-anatomy {kind} {MODEL} {DATA} --output_dir runs/{kind} --concept_policy policy.yaml --audit audits/run1",
        required=NEEDED,
        common=("concept_policy", "audit", *USUAL),
        theirs=script_types(kind),
    )
    parser.description += " Options of accelerate launch are passed on."
    launcher = launch_command_parser()
    *given, from_config, from_line = recipe.parse_known(parser, argv, ours=ours(), launcher=launcher)
    recipe.refuse_unknown(from_config, from_line, parser, launcher)
    return (*given, launcher, from_config, from_line)


def check_named(command: str, script_args: Any, training: Any, model_args: Any, mixture: Any, *_: Any) -> None:
    """Refuse a training of no model or of no data, which TRL's script would tell with a traceback.

    Raises:
        AnatomyError: names the option.
    """
    if not model_args.model_name_or_path:
        raise AnatomyError(f"{command} needs a model: --model_name_or_path.")
    if not script_args.dataset_name and not mixture.datasets:
        raise AnatomyError(f"{command} needs a dataset: --dataset_name, or datasets in a recipe.")


def train(kind: str, argv: list[str]) -> int:
    """Run TRL's own script with our trainer in the place of TRL's: its flags and YAML mean what they mean there."""
    from accelerate.commands.launch import launch_command
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from ..audit.folder import load_audit
    from ..reading.storage import exists

    *given, policy, launcher, from_config, from_line = arguments(kind, argv)
    for name in ("concept_policy", "audit"):
        path = getattr(policy, name)
        if path is not None and not exists(path):
            raise AnatomyError(f"--{name} names '{path}', which does not exist.")
    check_named(kind, *given)
    if policy.audit is not None:  # before a model is loaded, or processes are started
        load_audit(policy.audit)

    launch = resolve_accelerate_config_argument(from_config + from_line)
    if _LAUNCHED not in os.environ and (launch or _several_devices()):
        os.environ[_LAUNCHED] = "1"
        words = without(argv, from_line)
        launch_command(launcher.parse_args([*launch, "--module", "trl_anatomy.cli", kind, *words]))
        return 0

    from .. import trainers

    stock_class = {"dpo": "DPOTrainer", "reward": "RewardTrainer", "sft": "SFTTrainer"}[kind]
    ours_class = f"Anatomy{stock_class}"
    trainer = getattr(import_module(f"{trainers.__name__}.{kind}"), ours_class)

    def build(*args: Any, **kwargs: Any) -> Any:
        made = trainer(*args, concept_policy=policy.concept_policy, audit=policy.audit, **kwargs)
        if made.plan is not None and made.is_world_process_zero():
            print(made.plan, flush=True)
        return made

    # The plan that is printed holds the warnings that the trainer would log.
    logged = logging.getLogger(f"{trainers.__name__}.prepare")
    printed = replaced_name(logged, "disabled", True)
    script = import_module(f"trl.scripts.{kind}")
    replaced = replaced_name(import_module("trl"), stock_class, build)
    with printed, replaced, our_files(*given, pairs=kind != "sft"), remote_code_named(given[2]):
        script.main(*given)
    return 0


@contextmanager
def remote_code_named(model_args: Any) -> Iterator[None]:
    """Make one sentence of what transformers says where TRL's script may not run a model's own code."""
    from ..reading.remote_code import needs_remote_code, why_not_loaded

    try:
        yield
    except AnatomyError:
        raise
    except ValueError as error:
        if not needs_remote_code(error):
            raise
        reason = why_not_loaded(error, settable=True)
        raise AnatomyError(f"model {model_args.model_name_or_path}: cannot be loaded ({reason}).") from error


@contextmanager
def our_files(script_args: Any, training: Any, model_args: Any, mixture: Any, *, pairs: bool = True) -> Iterator[None]:
    """Let TRL's script read the files that `audit` reads; what it can not train on ends in one sentence.

    Raises:
        AnatomyError: as `load_splits`; a split that is not there, or, of `pairs`, none with chosen and rejected.
    """
    from ..reading.columns import column_notes, prompt_column, unread_columns
    from ..reading.dataset import load_splits
    from ..reading.ranks import is_main_process
    from ..reading.spans import no_pairs

    splits = {"dataset_train_split": script_args.dataset_train_split}
    if training.eval_strategy != "no":
        splits["dataset_test_split"] = script_args.dataset_test_split

    def load(path: str, name: str | None = None, *, split: str | None = None, **how: Any) -> Any:
        found = load_splits(path, name, split=split, **how)
        for option, wanted in splits.items() if split is None else ():
            if wanted not in found:
                why = " (evaluation needs it: eval_strategy is not no)" if option == "dataset_test_split" else ""
                raise AnatomyError(f"{path}: found splits {', '.join(found)}, but {option} is {wanted!r}{why}.")
        rows = found[splits["dataset_train_split"]] if split is None else found
        if not pairs:
            return found
        columns = rows.column_names or []  # a stream may not know them
        if columns and "chosen_ids" not in columns and (problem := no_pairs(columns)):
            raise AnatomyError(f"{path}: {problem}")
        if not how.get("streaming") and is_main_process() and (prompt := prompt_column(rows)):
            print(*column_notes(unread_columns(rows), prompt), file=sys.stderr)
        return found

    if mixture.datasets and "dataset_test_split" in splits and mixture.test_split_size is None:
        raise AnatomyError("eval_strategy asks for a test split, which a mixture of datasets has by test_split_size.")
    with replaced_name(import_module("datasets"), "load_dataset", load):
        yield


def _several_devices() -> bool:
    """Whether `trl dpo`, which always goes through accelerate, would start more than this one process."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    return torch.cuda.device_count() > 1 or Path(default_config_file).is_file()


def without(words: list[str], taken: list[str]) -> list[str]:
    """`words` less `taken`, an ordered subsequence of them."""
    rest, remaining = [], list(taken)
    for word in words:
        if remaining and word == remaining[0]:
            remaining.pop(0)
        else:
            rest.append(word)
    return rest


@contextmanager
def replaced_name(module: Any, name: str, value: Any) -> Iterator[None]:
    """Put a value in the place of a module's name, for as long as the block runs."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)
