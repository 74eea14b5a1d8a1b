"""The command line: `trl-anatomy audit | plan | predict | dpo | reward | fit | compare | report | sae | demo`.

Exit codes: 0 done; 2 bad input, one sentence on standard error; 1 anything unexpected, with its traceback;
130 interrupted (start the same command again: finished parts are kept).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import recipe
from .errors import AnatomyError

if TYPE_CHECKING:
    from .audit.config import AuditConfig
    from .audit.folder import Audit
    from .audit.text_folder import TextAudit
    from .checking.persona import EndpointJudge
    from .checking.persona_file import Persona
    from .checking.vllm_rollouts import VllmRollouts

_LAUNCHED = "TRL_ANATOMY_LAUNCHED"


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
        from . import __version__

        print(__version__)
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise AnatomyError(
                f"Unknown command '{argv[0]}'{recipe.did_you_mean(argv[0], COMMANDS)}; see trl-anatomy --help."
            )
        return COMMANDS[argv[0]][0](argv[1:])
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
    lines += ["", *(f"  {name:<8} {text}" for name, (_, text) in COMMANDS.items())]
    return "\n".join([*lines, "", "trl-anatomy COMMAND --help shows the options and an example."])


def _parser(command: str, example: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"trl-anatomy {command}",
        description=COMMANDS[command][1],
        epilog=f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _whole(least: int) -> Callable[[str], int]:
    """Reads a whole number of at least `least`, for argparse."""

    def read(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}, allowed: a whole number of at least {least}")
        return int(text)

    return read


# audit ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _AuditFlags:
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


def _audit(argv: list[str]) -> int:
    from trl import TrlParser

    from .audit.config import NO_SAE, AuditConfig
    from .audit.find_sae import AUTO
    from .audit.run import dry_run, run_audit
    from .reading.ranks import is_main_process

    parser = TrlParser(
        (AuditConfig, _AuditFlags),
        prog="trl-anatomy audit",
        description=COMMANDS["audit"][1],
        epilog="example: trl-anatomy audit --model M --dataset D --sae S --layer 20 --out audits/run1\n"
        "without a model, in seconds: trl-anatomy audit --dataset D\n"
        "by the recipe of a training: trl-anatomy audit --config recipe.yaml (docs/recipe.md)",
    )
    config, flags = _strict_parse(parser, argv, {"audit": "out"})
    with redirect_stdout(sys.stderr):  # some libraries print notes, which would spoil the JSON
        _check_labeller(flags)
    if config.sae == NO_SAE or not (config.sae or config.model):
        config.sae = ""
        return _audit_text(config, flags)
    config.sae = config.sae or AUTO
    with redirect_stdout(sys.stderr):
        summary = dry_run(config) if flags.dry_run else None
        audit = None if flags.dry_run else run_audit(config)
        if audit is not None and is_main_process() and flags.label_model is not None:
            _name_concepts(audit, flags)
    if audit is None:
        print(json.dumps(summary, indent=2) if flags.json else _lines(summary or {}))
    elif not is_main_process():
        pass
    elif flags.json:
        print(json.dumps(audit.info, indent=2))
    elif config.data_kind == "sft":
        _print_regions(audit)
    else:
        _print_audit(audit)
    return 0


def _audit_text(config: AuditConfig, flags: Any) -> int:
    """Count habits alone, without an SAE."""
    from .audit.text_audit import run_text_audit
    from .reading.files import without_nan
    from .reading.ranks import is_main_process

    if flags.label_model is not None or flags.dry_run:
        what = "--dry_run" if flags.label_model is None else "--label_model"
        raise AnatomyError(
            f"{what} goes with --model and an SAE; without, an audit counts habits, which takes seconds."
        )
    if not is_main_process():
        return 0
    with redirect_stdout(sys.stderr):  # as in _audit
        audit = run_text_audit(config)
    if flags.json:
        habits = audit.habits.drop_columns(["snippets"]).to_pylist()
        print(json.dumps(without_nan({**audit.info, "habits": habits}), indent=2))
    else:
        _print_habits(audit)
    return 0


def _print_habits(audit: TextAudit) -> None:
    from .audit.finding_words import what_pairs_say
    from .audit.habit_table import LESS, MORE
    from .reading.storage import shown

    _print_size(audit)
    rows = audit.habits.to_pylist()
    print("\n".join(what_pairs_say(audit)))
    _print_findings(audit)
    _print_by_prompt(audit)
    found = sorted((row for row in rows if row["verdict"] in (MORE, LESS)), key=lambda row: row["q"])
    if audit.findings is not None and audit.findings.num_rows:
        found = []  # they are listed already, the others on the page
    if found:
        print(f"  {'habit':<17} {'chosen':>8} {'rejected':>8} {'difference':>11}  {'95 % interval':<20} {'q':>8}")
    for row in found:
        interval = f"[{row['difference_low']:+.3g}, {row['difference_high']:+.3g}]"
        levels = f"{row['chosen']:8.3g} {row['rejected']:8.3g} {row['difference']:+11.3g}"
        print(f"  {row['habit']:<17} {levels}  {interval:<20} {row['q']:8.1g}")
    _print_problems(audit)
    read = (
        "what is trained on"
        if audit.reads_tokens
        else "the dataset's text; --model M --sae none counts what is trained on"
    )
    print(f"Counted: {read}. What no list names needs --model M.")
    print(f"Report: {shown(audit.path / 'report.html')}")


def _print_problems(audit: Audit) -> None:
    from .audit.problems import problem_line

    if (counts := audit.info.get("problems")) is not None:
        print(problem_line(counts))


def _check_labeller(flags: Any) -> None:
    """Refuse what can not work before long work."""
    from .audit.run import empty_model, load_tokenizer
    from .reading.chat import ChatEndpoint, LocalChat
    from .reading.processing import text_tokenizer

    if flags.label_url is not None and flags.label_model is None:
        raise AnatomyError("--label_url needs --label_model, the name of the model there.")
    if flags.label_key_variable is not None and flags.label_url is None:
        raise AnatomyError("--label_key_variable goes with --label_url.")
    if flags.label_url is not None:
        ChatEndpoint(flags.label_url, flags.label_model, flags.label_key_variable).check()
    elif flags.label_model is not None:
        empty_model(flags.label_model)
        LocalChat.check(text_tokenizer(load_tokenizer(flags.label_model)), flags.label_model)


def _name_concepts(audit: Audit, flags: Any) -> None:
    """Have concepts and contexts named, and write the page again."""
    from .audit.config import AuditConfig
    from .audit.labelling import label_audit, read_firings
    from .audit.reopen import reopen
    from .audit.report import write_report
    from .audit.run import load_model, load_tokenizer
    from .reading.chat import ChatEndpoint, LocalChat
    from .reading.processing import text_tokenizer

    source = reopen(audit)
    pairs = source.pairs
    chat: ChatEndpoint | LocalChat
    if flags.label_url is not None:
        chat = ChatEndpoint(flags.label_url, flags.label_model, flags.label_key_variable)
    else:
        name = flags.label_model
        chat = LocalChat(load_model(AuditConfig(model=name)), text_tokenizer(load_tokenizer(name)), Path(name).name)
    label_audit(audit, pairs.texts, chat, firings=read_firings(source))
    write_report(audit, pairs)


def _strict_parse(parser: Any, argv: list[str], places: dict[str, str] | None = None) -> tuple[Any, ...]:
    """The dataclasses of a parser, from flags and --config; refuses what nothing reads."""
    return recipe.parse(parser, argv, ours=_ours(), places=places)


def _ours() -> tuple[type, ...]:
    """Options of our commands beside those of audit and sae, which a recipe may hold for any command."""
    return _AuditFlags, _SAEFlags, PolicyArguments, PredictArguments


def _print_regions(audit: Audit) -> None:
    from .reading.storage import shown

    _print_size(audit)
    labels = {row["concept"]: row["label"] for row in audit.labelled(audit.concepts).to_pylist()}
    regions = audit.info["contexts"]
    found = audit.hypotheses.filter(audit.hypotheses["kept"]).to_pylist()
    print("These rows have no pairs: no shift is predicted, only what sets one region of the corpus apart.")
    if not found:
        print(f"No evidence that responses in any region ({len(regions)}) differ from the rest.")
    else:
        print(f"Where responses differ from the rest of the corpus ({len(found)} findings; largest first):")
        print(f"  {'region':<7} {'concept':<8} {'inside':>7} {'rest':>7} {'equal length':>12} {'q':>9}  label")
    for row in sorted(found, key=lambda row: row["rank"])[:10]:
        print(
            f"  {row['context']:<7} {row['concept']:<8} {row['mean_in']:7.3f} {row['mean_out']:7.3f}"
            f" {row['delta_length_adjusted']:+12.3f} {row['q']:9.2g}  {labels[row['concept']]}"
        )
    print(f"Report: {shown(audit.path / 'report.html')}")


def _print_size(audit: Audit) -> None:
    from .audit.findings import data_notes
    from .reading.columns import column_notes

    data, notes = audit.info["data"], data_notes(audit.info)
    if audit.info.get("too_few_prompts"):  # before anything that could be read as a finding
        print(f"\n{notes.pop(0)}")
    left_out = ", ".join(f"{count} {reason}" for reason, count in data["left_out"].items())
    kind = "usable rows" if audit.info["settings"]["data_kind"] == "sft" else "pairs"
    print(
        f"\n{data['n_pairs']} {kind} of {data['n_rows']} rows" + (f" (left out: {left_out})" if left_out else "") + "."
    )
    for note in [*notes, *column_notes(data.get("unread_columns", []), data.get("looks_like_prompt"))]:
        print(note)
    if (fit := audit.info.get("sae", {}).get("fit")) is not None:
        print(f"The SAE's verdict on these pairs: {fit['verdict']}: {fit['reason']}.")


def _print_audit(audit: Audit) -> None:
    from .audit.concept_words import HELD, lean_sentence, rates_of
    from .audit.finding_words import what_pairs_say
    from .audit.number_words import percent
    from .reading.storage import shown

    _print_size(audit)
    rows = sorted(audit.labelled(audit.concepts).to_pylist(), key=lambda row: -abs(row["predicted"]))
    found = [row for row in rows if row["verdict"] in ("rises", "falls")]
    by_length = sum(row["verdict"] == "explained by length" for row in rows)
    if audit.habits is not None:
        print("\n".join(what_pairs_say(audit)))
    elif found:
        print(lean_sentence(found))
    _print_problems(audit)
    _print_findings(audit)
    _print_by_prompt(audit)
    if not found and audit.info.get("too_few_prompts"):
        print(f"No claim about any of {len(rows)} concepts.")
    elif not found:
        print(f"No evidence that the sides differ in any of {len(rows)} concepts.")
    else:
        print(f"{len(found)} of {len(rows)} concepts differ. Chosen, rejected: share of responses that show it. Lean:")
        print("chosen minus rejected, of the share of its features that fire in a response:")
        print(
            f"  {'concept':<8} {'chosen':>7} {'rejected':>8} {'lean':>7}  {'95 % interval':<18} {'equal length':>12}"
            f" {'q':>9}  label"
        )
    for row in found[:10]:
        interval = f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        rates = rates_of(row)
        chosen, rejected = ("", "") if rates is None else map(percent, rates)
        print(
            f"  {row['concept']:<8} {chosen:>7} {rejected:>8} {row['predicted']:+7.3f}  {interval:<18}"
            f" {row['length_adjusted']:+12.3f} {row['q']:9.2g}  {row['label']}"
        )
    if by_length:
        print(
            f"Of {by_length} more the lengths of the responses, or where max_length cut them, explain the difference."
        )
    if found:
        print(HELD)
    print(f"Report: {shown(audit.path / 'report.html')}")


def _print_by_prompt(audit: Audit, most: int = 3) -> None:
    """The surest habits whose difference depends on what is asked."""
    from .audit.by_prompt_text import by_prompt_texts

    for text in by_prompt_texts(audit.habit_hypotheses, most):
        print(text.sentence)


def _print_findings(audit: Audit) -> None:
    """The findings as the page tells them."""
    from .audit.finding_text import finding_texts

    texts = finding_texts(audit.findings, audit.habits)
    if texts:
        print(
            f"  {'finding':<24} {'chosen':>12} {'rejected':>12} {'difference':>14}  {'95 % interval':<19} {'adds':>12}"
        )
    for text in texts:
        print(
            f"  {_cut(text.title, 24):<24} {text.chosen:>12} {text.rejected:>12} {text.difference:>14}"
            f"  {text.interval:<19} {text.adds:>12}"
        )
        if text.folded:
            print(f"    with it: {text.with_it}")


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else f"{text[: n - 1]}…"


# sae -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _SAEFlags:
    json: bool = dataclasses.field(default=False, metadata={"help": "Print the figures as JSON."})


def _sae(argv: list[str]) -> int:
    from trl import TrlParser

    from .audit.make_sae import SAEConfig, check_saes, make_sae
    from .reading.files import without_nan

    parser = TrlParser(
        (SAEConfig, _SAEFlags),
        prog="trl-anatomy sae",
        description=COMMANDS["sae"][1],
        epilog="example: trl-anatomy sae --model M --dataset D --minutes 20 --out saes/run1\n"
        "by the recipe of a training, into the folder that its `sae` names: trl-anatomy sae --config recipe.yaml",
    )
    config, flags = _strict_parse(parser, argv, {"sae": "out"})
    with redirect_stdout(sys.stderr):  # some libraries print notes, which would spoil the JSON
        fits = make_sae(config) if config.check is None else {Path(config.check): check_saes(config)}
    if flags.json:
        found = {str(path): None if fit is None else dataclasses.asdict(fit) for path, fit in fits.items()}
        print(json.dumps(without_nan(found), indent=2))
        return 0
    for path, fit in fits.items():
        print(f"{path}: trained." if fit is None else f"{path}: {fit.verdict}: {fit.reason}.")
    return 0


def _lines(summary: dict[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in summary.items())


# plan ----------------------------------------------------------------------------------------------------------------


def _plan(argv: list[str]) -> int:
    parser = _parser("plan", "trl-anatomy plan --audit audits/run1 --policy policy.yaml")
    parser.add_argument(
        "--audit", required=True, help="audit folder (or its URL) of the dataset that will be trained on"
    )
    parser.add_argument(
        "--policy", "--concept_policy", dest="policy", required=True, help="concept policy (YAML; path or URL)"
    )
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that the files of the audited model bring"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    args, training = recipe.parse_plain(parser, argv, ours=_ours())

    from .audit.folder import load_audit
    from .audit.reopen import reopen
    from .shaping.plan import plan_json, plan_report
    from .shaping.policy import ConceptPolicy
    from .shaping.resolve import check_policy
    from .shaping.settle import settle_policy

    with redirect_stdout(sys.stderr):  # some libraries print notes, which would spoil the JSON
        audit = load_audit(args.audit)
        audit.check_kind("plan")
        recipe.check_audited(training, audit.info["settings"], audit.name, _ours())
        policy = ConceptPolicy.load(args.policy)
        audit.check_harvest()
        source = reopen(audit, trust_remote_code=args.trust_remote_code)
        resolved = check_policy(policy, audit, source.model_config, source.pairs.raw.column_names)
        scores = audit.path / "scores"
        plan = settle_policy(
            policy,
            source.trained,
            lambda: source.model,
            audit=audit,
            cache_dir=scores,
            resolved=resolved,
        )
    print(json.dumps(plan_json(plan), indent=2) if args.json else plan_report(plan))
    return 0


# dpo and reward ------------------------------------------------------------------------------------------------------


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


def _train(kind: str, argv: list[str]) -> int:
    """Run TRL's own script with our trainer in the place of TRL's: its flags and YAML mean what they mean there."""
    from trl import TrlParser
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    from .audit.folder import load_audit
    from .reading.storage import exists

    script = import_module(f"trl.scripts.{kind}")
    parser = TrlParser(
        (*script.make_parser(prog=f"trl {kind}").dataclass_types, PolicyArguments),
        prog=f"trl-anatomy {kind}",
        description=f"{COMMANDS[kind][1]} Options of accelerate launch are passed on.",
        epilog=f"example: trl-anatomy {kind} --config recipe.yaml --concept_policy policy.yaml",
    )
    from accelerate.commands.launch import launch_command, launch_command_parser

    launcher = launch_command_parser()
    *arguments, policy, from_config, from_line = recipe.parse_known(parser, argv, ours=_ours(), launcher=launcher)
    recipe.refuse_unknown(from_config, from_line, parser, launcher)
    for name in ("concept_policy", "audit"):
        path = getattr(policy, name)
        if path is not None and not exists(path):
            raise AnatomyError(f"--{name} names '{path}', which does not exist.")
    if policy.audit is not None:  # before a model is loaded, or processes are started
        load_audit(policy.audit)

    launch = resolve_accelerate_config_argument(from_config + from_line)
    if _LAUNCHED not in os.environ and (launch or _several_devices()):
        os.environ[_LAUNCHED] = "1"
        ours = _without(argv, from_line)
        launch_command(launcher.parse_args([*launch, "--module", "trl_anatomy.cli", kind, *ours]))
        return 0

    from . import trainers

    ours_class = {"dpo": "AnatomyDPOTrainer", "reward": "AnatomyRewardTrainer"}[kind]
    stock_class = {"dpo": "DPOTrainer", "reward": "RewardTrainer"}[kind]
    trainer = getattr(import_module(f"{trainers.__name__}.{kind}"), ours_class)

    def build(*args: Any, **kwargs: Any) -> Any:
        made = trainer(*args, concept_policy=policy.concept_policy, audit=policy.audit, **kwargs)
        if made.plan is not None and made.is_world_process_zero():
            print(made.plan, flush=True)
        return made

    # The plan that is printed holds the warnings that the trainer would log.
    logged = logging.getLogger(f"{trainers.__name__}.prepare")
    printed = _replaced(logged, "disabled", True)
    replaced = _replaced(import_module("trl"), stock_class, build)
    with printed, replaced, _our_files(*arguments), _remote_code_named(arguments[2]):
        script.main(*arguments)
    return 0


@contextmanager
def _remote_code_named(model_args: Any) -> Iterator[None]:
    """Make one sentence of what transformers says where TRL's script may not run a model's own code."""
    from .reading.remote_code import needs_remote_code, why_not_loaded

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
def _our_files(script_args: Any, training: Any, model_args: Any, mixture: Any) -> Iterator[None]:
    """Let TRL's script read the files that `audit` reads; what it can not train on ends in one sentence.

    Raises:
        AnatomyError: as `load_splits`; a split that is not there, or a dataset without chosen and rejected.
    """
    from .reading.columns import column_notes, prompt_column, unread_columns
    from .reading.dataset import load_splits
    from .reading.ranks import is_main_process
    from .reading.spans import no_pairs

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
        columns = rows.column_names or []  # a stream may not know them
        if columns and "chosen_ids" not in columns and (problem := no_pairs(columns)):
            raise AnatomyError(f"{path}: {problem}")
        if not how.get("streaming") and is_main_process() and (prompt := prompt_column(rows)):
            print(*column_notes(unread_columns(rows), prompt), file=sys.stderr)
        return found

    if mixture.datasets and "dataset_test_split" in splits and mixture.test_split_size is None:
        raise AnatomyError("eval_strategy asks for a test split, which a mixture of datasets has by test_split_size.")
    with _replaced(import_module("datasets"), "load_dataset", load):
        yield


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


def _predict(argv: list[str]) -> int:
    """Build the trainer of a `dpo` recipe, record its first step, and train a pilot of it."""
    from trl import TrlParser

    recipe.refuse_reward(argv)

    script = import_module("trl.scripts.dpo")
    parser = TrlParser(
        (*script.make_parser(prog="trl dpo").dataclass_types, PolicyArguments, PredictArguments),
        prog="trl-anatomy predict",
        description=COMMANDS["predict"][1],
        epilog="example: trl-anatomy predict --config recipe.yaml --audit audits/run1 --concept_policy policy.yaml",
    )
    script_args, training, model_args, *rest = _strict_parse(parser, argv)
    *other, policy, flags = rest
    if policy.audit is None:
        raise AnatomyError("predict needs the audit of the training set: --audit.")
    for name in ("n_prompts", "n_per_prompt", "max_new_tokens", "sample_batch_size", "n_pairs"):
        if getattr(flags, name) < 1:
            raise AnatomyError(f"--{name} is {getattr(flags, name)}; give a whole number above 0.")
    if training.world_size > 1:  # before responses are sampled
        raise AnatomyError("predict runs in one process: start it without a launcher.")

    from .audit.folder import load_audit
    from .checking.prediction import FOLDER, PLAIN, POLICY, predict, prediction_report
    from .checking.responses import prompts_for
    from .reading.storage import local

    with redirect_stdout(sys.stderr):  # as in plan
        audit = load_audit(policy.audit)
        audit.check_kind("predict")
        recipe.check_version(audit, model_args, training)
        prompts = prompts_for(audit, flags.prompts, flags.n_prompts, training.seed)
        training.report_to, training.save_strategy, training.push_to_hub = [], "no", False
        training.eval_strategy = type(training.eval_strategy)("no")
        if not (model_args.use_peft or model_args.load_in_4bit or model_args.load_in_8bit):
            model_args.dtype = "float32"  # a small step would be lost in the rounding of trained weights
        arguments = (script_args, training, model_args, *other)
        made = {PLAIN: lambda: _trainer_of(script, arguments, None, policy.audit)}
        if policy.concept_policy is not None:
            made[POLICY] = lambda: _trainer_of(script, arguments, policy.concept_policy, policy.audit)
        result = predict(
            audit,
            model_args.model_name_or_path,
            made,
            prompts,
            out=local(flags.prediction) if flags.prediction else audit.path / FOLDER,
            policy=policy.concept_policy,
            n_per_prompt=flags.n_per_prompt,
            max_new_tokens=flags.max_new_tokens,
            batch_size=flags.sample_batch_size,
            seed=training.seed,
            n_pairs=flags.n_pairs,
            budget=flags.budget,
            null_drift=flags.null_drift,
        )
    print(json.dumps(result, indent=2) if flags.json else prediction_report(result))
    return 0


class _Made(Exception):
    """Carries a trainer out of TRL's script, which would go on to train it."""


def _trainer_of(script: Any, arguments: Sequence[Any], concept_policy: Any, audit: Any) -> Any:
    """The trainer that TRL's script makes of its arguments, before it begins."""
    from .trainers.dpo import AnatomyDPOTrainer

    def build(*args: Any, **kwargs: Any) -> Any:
        raise _Made(AnatomyDPOTrainer(*args, concept_policy=concept_policy, audit=audit, **kwargs))

    replaced = _replaced(import_module("trl"), "DPOTrainer", build)
    with replaced, _our_files(*arguments), _remote_code_named(arguments[2]):
        try:
            script.main(*map(copy.deepcopy, arguments))
        except _Made as made:
            return made.args[0]
    raise RuntimeError("TRL's script made no trainer.")


def _several_devices() -> bool:
    """Whether `trl dpo`, which always goes through accelerate, would start more than this one process."""
    import torch
    from accelerate.commands.config.config_args import default_config_file

    return torch.cuda.device_count() > 1 or Path(default_config_file).is_file()


def _without(words: list[str], taken: list[str]) -> list[str]:
    """`words` less `taken`, an ordered subsequence of them."""
    rest, remaining = [], list(taken)
    for word in words:
        if remaining and word == remaining[0]:
            remaining.pop(0)
        else:
            rest.append(word)
    return rest


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _dpo(argv: list[str]) -> int:
    return _train("dpo", argv)


def _reward(argv: list[str]) -> int:
    return _train("reward", argv)


# fit -----------------------------------------------------------------------------------------------------------------


def _fit(argv: list[str]) -> int:
    parser = _parser("fit", "trl-anatomy fit --model M --dataset refusals.jsonl --scorer probe --out concepts/refusal")
    parser.add_argument(*_both("model"), required=True, help="start model: folder or hub name")
    parser.add_argument(
        *_both("dataset"),
        help="rows with text and label, or prompt, response and label, or chosen (shows the concept) and rejected",
    )
    parser.add_argument(
        "--persona", help="instead of a dataset: YAML with trait, positive, negative and questions, sorted by a judge"
    )
    parser.add_argument("--judge_url", help="judge of a persona: an OpenAI-compatible endpoint, http://HOST:PORT/v1")
    parser.add_argument("--judge_model", help="name of the judge there")
    parser.add_argument("--judge_key_variable", help="environment variable with its key, if it wants one")
    parser.add_argument(
        "--n_per_question", type=_whole(1), default=1, help="responses to a question of a persona (default 1)"
    )
    parser.add_argument("--engine", default="transformers", help="what samples them: transformers (default) or vllm")
    parser.add_argument(*_both("dataset_split"), default="train", help="split of the dataset (default train)")
    parser.add_argument(*_both("dataset_subset"), help="configuration name of a hub dataset")
    parser.add_argument("--negatives", help="examples of another concept: its rows with label 1 become negatives")
    parser.add_argument("--scorer", default="probe", help="direction, probe, attention_probe, features or reft")
    parser.add_argument(
        "--layers",
        help="layers to try, such as 8,12,16 (default: up to eight, spread evenly); of reft: to edit (default: all)",
    )
    parser.add_argument("--sae", help="SAE to select features in: folder, or RELEASE:ID")
    parser.add_argument("--tokens", default="response", help="response, or prompt_end: the last token before it")
    parser.add_argument("--reduce", help="tokens to one score: max, mean, sum, last (default: the scorer's)")
    parser.add_argument(
        "--per",
        help="what is fitted on: response (default of a persona), token (of other directions), or pair (probes)",
    )
    parser.add_argument("--ends", type=int, help="of reft: tokens edited at either end of a response (default 11)")
    parser.add_argument("--held_out", type=float, default=0.2, help="share judged; as much again chooses the layer")
    parser.add_argument("--max_length", type=_whole(1), default=1024, help="tokens read of prompt and response")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto (cuda where there is one), cpu, cuda, ...")
    parser.add_argument("--batch_tokens", type=_whole(1), default=8192, help="tokens in one batch of the frozen pass")
    parser.add_argument(
        "--dose", help="steer by the direction, or by the edit of reft: strengths to try, such as --dose=-8,-4,0,4,8"
    )
    parser.add_argument("--dose_prompts", help="file with a 'prompt' column, for --dose")
    parser.add_argument("--dose_pattern", help="regular expression that tells which steered responses show the concept")
    parser.add_argument(
        "--max_new_tokens", type=_whole(1), help="length of a sampled response (default: 64 steered, 256 of a persona)"
    )
    parser.add_argument("--seed", type=_whole(0), default=0)
    parser.add_argument("--out", required=True, help="folder of the stored concept, or its URL")
    parser.add_argument("--json", action="store_true", help="print the card as JSON")
    args = parser.parse_args(argv)

    with redirect_stdout(sys.stderr):  # some libraries print notes, which would spoil the JSON
        card, figures = _fitted(args)
    print(card if args.json else figures, end="")
    return 0


def _both(setting: str) -> tuple[str, str]:
    """Our option of a setting, and TRL's."""
    from .audit.config import TRL_NAMES

    return f"--{setting}", f"--{TRL_NAMES[setting]}"


def _fitted(args: argparse.Namespace) -> tuple[str, str]:
    """Fit and store as the arguments say; the card as JSON and the figures as text."""
    import numpy as np

    from .audit.config import AuditConfig
    from .audit.run import load_dataset, load_model, load_tokenizer
    from .checking.dose import dose_report, dose_response
    from .reading.files import check_writable
    from .reading.fit import KINDS, fit_concept, fit_report, read_examples, split_examples
    from .reading.prompts import prompt_of
    from .reading.sae import load_sae
    from .reading.scorers.direction import DirectionScorer
    from .reading.scorers.reft import ReftScorer
    from .reading.storage import local, shown

    if args.scorer not in KINDS:
        raise AnatomyError(
            f"Unknown scorer '{args.scorer}'{recipe.did_you_mean(args.scorer, KINDS)}; allowed: {', '.join(KINDS)}."
        )
    layers = _layers(args.layers)
    settings = {name: value for name in ("reduce", "per") if (value := getattr(args, name)) is not None}
    if args.per is not None and args.scorer == "features":
        raise AnatomyError("--per goes with directions and probes.")
    if args.ends is not None:
        if args.scorer != "reft" or args.ends < 1:
            raise AnatomyError("--ends is a number above 0, and goes with --scorer reft.")
        settings["ends"] = args.ends
    if args.scorer == "reft" and (args.reduce or args.per or args.tokens != "response"):
        raise AnatomyError("--reduce, --per and --tokens do not go with --scorer reft, which gives no score.")
    if (args.scorer == "features") != (args.sae is not None):
        raise AnatomyError("--sae goes with --scorer features, which needs it.")
    folder = local(args.out)  # refuses a URL that fsspec cannot read, before anything is fitted
    dose = _dose_settings(args)
    persona = _persona_settings(args)
    same = ("model", "dataset", "dataset_split", "dataset_subset", "dtype", "device")
    config = AuditConfig(**{name: getattr(args, name) for name in same})
    negatives = None
    if args.negatives is not None:
        split = "train" if os.path.isfile(args.negatives) else args.dataset_split  # a file has no splits
        negatives = load_dataset(
            dataclasses.replace(config, dataset=args.negatives, dataset_split=split, dataset_subset=None)
        )
    tokenizer = load_tokenizer(args.model)
    model, rows = None, None
    if persona is None:
        rows = load_dataset(config)
    check_writable(folder)
    if persona is not None:
        model, rows = _persona_rows(args, config, tokenizer, *persona)
        if args.scorer == "direction":
            settings.setdefault("per", "response")
    examples = read_examples(
        rows,
        tokenizer,
        tokens=args.tokens,
        negatives=negatives,
        max_length=args.max_length,
    )
    split_examples(examples.labels, examples.groups, args.held_out, args.seed)  # refuses before weights are loaded
    if model is None:
        model = load_model(config)
    fitted = fit_concept(
        model,
        examples,
        scorer=args.scorer,
        layers=layers,
        sae=None if args.sae is None else load_sae(args.sae),
        held_out=args.held_out,
        seed=args.seed,
        batch_tokens=args.batch_tokens,
        **settings,
    )
    scorer = fitted.scorer
    if persona is not None:
        scorer.card["persona"] = {"trait": persona[0].trait, "judge": args.judge_model, "engine": args.engine}
    if dose is not None and isinstance(scorer, DirectionScorer | ReftScorer):
        strengths, rule = dose
        prompts = load_dataset(AuditConfig(dataset=args.dose_prompts))
        if "prompt" not in prompts.column_names:
            raise AnatomyError(f"{args.dose_prompts} has no 'prompt' column.")
        scorer.card["dose_response"] = dose_response(
            model,
            tokenizer,
            scorer,
            [prompt_of(row) for row in prompts],
            lambda texts: np.array([rule.search(text) is not None for text in texts]),
            strengths=strengths,
            max_new_tokens=args.max_new_tokens or 64,
            seed=args.seed,
        )
    out = scorer.save(folder)
    figures = fit_report(fitted, out) + dose_report(scorer.card.get("dose_response", []))
    return (out / "card.json").read_text(), shown(figures)


def _persona_settings(args: argparse.Namespace) -> tuple[Persona, EndpointJudge, VllmRollouts | None] | None:
    """Persona, judge and engine; whatever can be wrong with them is told before anything is sampled."""
    if (args.persona is None) == (args.dataset is None):
        raise AnatomyError("Give --dataset with labelled text, or --persona; one of the two.")
    if args.persona is None:
        if args.judge_url or args.judge_model or args.judge_key_variable or args.engine != "transformers":
            raise AnatomyError("--judge_url, --judge_model, --judge_key_variable and --engine go with --persona.")
        return None
    if not args.judge_url or not args.judge_model:
        raise AnatomyError("--persona needs a judge: --judge_url and --judge_model.")
    if args.engine not in ("transformers", "vllm"):
        raise AnatomyError(f"--engine is '{args.engine}'; allowed: transformers, vllm.")
    if args.tokens != "response":
        raise AnatomyError("--persona is read at the tokens of its responses; leave --tokens out.")

    from .checking.persona import EndpointJudge
    from .checking.persona_file import Persona
    from .checking.vllm_rollouts import VllmRollouts

    persona = Persona.load(args.persona)
    judge = EndpointJudge(args.judge_url, args.judge_model, persona.trait, args.judge_key_variable)
    judge([])  # refuses an address that is none, and a key that is not set
    return persona, judge, VllmRollouts(args.model, args.dtype) if args.engine == "vllm" else None


def _persona_rows(
    args: argparse.Namespace,
    config: AuditConfig,
    tokenizer: Any,
    persona: Persona,
    judge: EndpointJudge,
    generate: VllmRollouts | None,
) -> tuple[Any, Any]:
    """The start model, and labelled responses, which are kept in the folder of the concept."""
    import torch

    from .audit.run import load_model
    from .checking.persona import persona_rows
    from .reading.storage import local

    # vLLM takes most of the GPU for as long as it samples.
    model = load_model(config if generate is None else dataclasses.replace(config, device="cpu"))
    rows = persona_rows(
        model,
        tokenizer,
        persona.positive,
        persona.negative,
        persona.questions,
        judge,
        n_per_question=args.n_per_question,
        max_new_tokens=args.max_new_tokens or 256,
        seed=args.seed,
        generate=generate,
        store=local(args.out),
    )
    if generate is not None:
        automatic = "cuda" if torch.cuda.is_available() else "cpu"
        model = model.to(automatic if config.device == "auto" else config.device)
    return model, rows


def _dose_settings(args: argparse.Namespace) -> tuple[list[float], re.Pattern[str]] | None:
    given = [value is not None for value in (args.dose, args.dose_prompts, args.dose_pattern)]
    if not any(given):
        return None
    if not all(given) or args.scorer not in ("direction", "reft"):
        raise AnatomyError(
            "--dose, --dose_prompts and --dose_pattern go together, and with --scorer direction or reft."
        )
    try:
        return [float(word) for word in args.dose.split(",")], re.compile(args.dose_pattern)
    except ValueError:
        raise AnatomyError(f"--dose is '{args.dose}'; give numbers, such as --dose=-8,-4,0,4,8.") from None
    except re.error as error:
        raise AnatomyError(f"--dose_pattern is no regular expression: {error}.") from None


def _layers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not all(word.strip().isdecimal() for word in text.split(",")):
        raise AnatomyError(f"--layers is '{text}'; give layer numbers from 0, such as 8,12,16.")
    return [int(word) for word in text.split(",")]


# compare, report, demo -----------------------------------------------------------------------------------------------


def _compare(argv: list[str]) -> int:
    parser = _parser("compare", "trl-anatomy compare --audit audits/run1 --before M --after out")
    parser.add_argument("--audit", required=True, help="audit folder (or its URL) of the dataset that was trained on")
    parser.add_argument(
        *("--before", "--model_name_or_path"), required=True, help="the start model (the one that was audited)"
    )
    parser.add_argument(
        *("--after", "--output_dir"),
        required=True,
        nargs="+",
        help="trained model(s); recovery is counted against the first",
    )
    parser.add_argument("--prompts", help="file with a 'prompt' column; default: the audited prompts")
    parser.add_argument("--n_prompts", type=_whole(1), default=1000, help="at most so many prompts (default 1000)")
    parser.add_argument(
        "--n_per_prompt",
        type=_whole(1),
        default=1,
        help="responses to each prompt (default 1); with 4 or more the tilt of the start model predicts better",
    )
    parser.add_argument("--max_new_tokens", type=_whole(1), default=256, help="length of a rollout (default 256)")
    parser.add_argument("--batch_size", type=_whole(1), default=64, help="rollouts at a time (default 64)")
    parser.add_argument("--seed", type=_whole(0), default=0)
    parser.add_argument(
        "--likelihood",
        action="store_true",
        help="add a baseline: how likely the start model finds the audited pairs (reads up to 2000 of them, once)",
    )
    parser.add_argument("--prediction", help="what predict wrote (default: AUDIT/prediction, if there is one)")
    parser.add_argument("--out", help="folder (or URL) for rollouts and compare.json (default: AUDIT/compare)")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    trained = {"model": "before", "model_name_or_path": "before", "output_dir": "after"}
    args, training = recipe.parse_plain(parser, argv, ours=_ours(), places=trained)

    from .audit.folder import load_audit
    from .checking.compare import compare, comparison_report, names_of
    from .checking.prediction import FILE, FOLDER, load_prediction
    from .checking.responses import prompts_for
    from .reading.storage import fetch, local, shown

    after = names_of(args.after)
    with redirect_stdout(sys.stderr):  # as in plan
        audit = load_audit(args.audit)
        audit.check_kind("compare")
        recipe.check_audited(training, audit.info["settings"], audit.name, _ours())
        prompts = prompts_for(audit, args.prompts, args.n_prompts, args.seed) * args.n_per_prompt
        out = local(args.out) if args.out else audit.path / "compare"
        foretold = args.prediction or str(audit.path / FOLDER)
        prediction = load_prediction(foretold, audit) if args.prediction or fetch(local(foretold) / FILE) else None
        comparison = compare(
            audit,
            args.before,
            after,
            prompts,
            out=out,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            seed=args.seed,
            prediction=prediction,
            likelihood=args.likelihood,
        )
    print(json.dumps(comparison, indent=2) if args.json else comparison_report(comparison))
    if not args.json:
        print(f"\nPage: {shown(out / 'compare.html')}")
    return 0


def _report(argv: list[str]) -> int:
    parser = _parser("report", "trl-anatomy report --audit audits/run1 --open")
    parser.add_argument("--audit", required=True, help="audit folder, or its URL")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    for field in dataclasses.fields(_AuditFlags):
        if field.name.startswith("label_"):
            parser.add_argument(f"--{field.name}", help=field.metadata["help"])
    args = parser.parse_args(argv)

    from .audit.folder import REPORT, load_audit
    from .audit.reopen import reopen
    from .audit.report import write_report
    from .audit.text_folder import TextAudit
    from .reading.storage import shown

    with redirect_stdout(sys.stderr):  # as in plan
        _check_labeller(args)
        audit = load_audit(args.audit)
        if args.label_model is not None:
            _name_concepts(audit, args)
            page = audit.path / REPORT
        else:
            page = write_report(audit, None if isinstance(audit, TextAudit) else reopen(audit).pairs)
    print(shown(page))
    if args.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    return 0


def _demo(argv: list[str]) -> int:
    parser = _parser("demo", "trl-anatomy demo --out anatomy-demo")
    parser.add_argument("--out", default="anatomy-demo", help="folder for the model, the data, the audit and the page")
    parser.add_argument("--seed", type=_whole(0), default=0)
    args = parser.parse_args(argv)

    from .reading.storage import is_url
    from .testbed.demo import run_demo

    if is_url(args.out):
        raise AnatomyError(f"--out is {args.out}; the demo is made in a folder of this machine.")
    run_demo(Path(args.out), seed=args.seed)
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "audit": (_audit, "Read a preference dataset: what sets its sides apart, where, and how surely."),
    "plan": (_plan, "Show what each rule of a policy would touch, before any training."),
    "predict": (_predict, "Predict what a `dpo` recipe will change, from its first steps."),
    "dpo": (_dpo, "Train with DPO: the flags and YAML of `trl dpo`, plus a concept policy."),
    "reward": (_reward, "Train a reward model: the flags and YAML of `trl reward`, plus a concept policy."),
    "fit": (_fit, "Learn a concept from labelled text, judge it on held-out text, and store it for policies."),
    "compare": (_compare, "Set what the audit predicts beside what training changed."),
    "report": (_report, "Rebuild or open the page of an audit."),
    "sae": (_sae, "Train an SAE on a model's own activations, or judge one on the pairs it is to read."),
    "demo": (_demo, "See all of it on a small model with planted habits, in minutes on a CPU."),
}

if __name__ == "__main__":
    sys.exit(main())
