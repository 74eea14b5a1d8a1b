"""Which of TRL's options for SFT go with which rules: every other combination is refused before anything is scored."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import AnatomyError
from ..shaping.interventions import VERBS

# Option of SFTConfig -> stage that it does not go with: why, and what to do
_OPTIONS: dict[str, dict[str, str]] = {
    "packing": {
        "weight": "a packed row holds rows of several weights",
        "hidden": "a packed row holds rows that are edited apart",
    },
    "padding_free": {"hidden": "a flattened batch holds rows that are edited apart"},
    "label_smoothing_factor": {"weight": "TRL's own losses alone are weighed"},
}


def check_sft_rules(rules: Sequence[Any], config: Any, arguments: Mapping[str, Any], audit: Any = None) -> None:
    """Refuse what the SFT trainer cannot do exactly, before anything long runs.

    Args:
        rules: interventions of a policy.
        config: SFTConfig.
        arguments: of TRL's constructor, by name.
        audit: the audit that the trainer was given, if any.

    Raises:
        AnatomyError: naming the option, what was found and what works.
    """
    columns = getattr(arguments.get("train_dataset"), "column_names", None) or []
    verb = rules[0].verb
    for rule in rules:
        if getattr(rule, "keep", False):
            raise AnatomyError(f"{rule.verb} has keep: true, which is for reward models; a policy is saved unedited.")
    if arguments.get("formatting_func") is not None:
        raise AnatomyError(f"formatting_func is given together with {verb}: apply it to train_dataset first.")
    if (config.dataset_kwargs or {}).get("skip_prepare_dataset"):
        raise AnatomyError(f"skip_prepare_dataset is set together with {verb}, which reads the rows as text; unset it.")
    _check_trained(verb, config, columns)
    _check_packing(verb, config, audit)
    for rule in rules:
        if rule.stage == "prompt" and "prompt" not in columns:
            raise AnatomyError(f"{rule.verb} adds to a prompt, and the rows have none; give 'prompt' and 'completion'.")
        if rule.stage in ("prompt", "hidden") and config.truncation_mode == "keep_end":
            raise AnatomyError(f"truncation_mode is keep_end together with {rule.verb}, which needs whole prompts.")
        for option, stages in _OPTIONS.items():
            if getattr(config, option) and rule.stage in stages:
                raise AnatomyError(f"{option} is set together with {rule.verb}: {stages[rule.stage]}; leave it out.")
        if rule.stage == "weight" and arguments.get("compute_loss_func") is not None:
            raise AnatomyError(f"compute_loss_func is given together with {rule.verb}: TRL's own losses are weighed.")
        if rule.stage in ("weight", "hidden") and getattr(config, "parallelism_config", None) is not None:
            raise AnatomyError(
                f"parallelism_config is set together with {rule.verb}, which needs whole rows; unset it."
            )


def _check_packing(verb: str, config: Any, audit: Any) -> None:
    """Refuse an audit of rows that were cut beside rules that read them whole."""
    if config.packing and audit is not None:
        raise AnatomyError(
            f"packing is set together with {verb} and an audit: rules then read whole rows, and the audit read them as "
            "max_length cuts them; leave packing or audit out."
        )


def _check_trained(verb: str, config: Any, columns: Sequence[str]) -> None:
    """Refuse losses over other tokens than those of the one response that rules act on."""
    if "completion" not in columns and config.dataset_text_field != "text":
        raise AnatomyError(
            f"dataset_text_field is {config.dataset_text_field!r} together with {verb}: rename that column to 'text'."
        )
    if "completion" in columns and config.completion_only_loss is False:
        raise AnatomyError(
            f"completion_only_loss is false together with {verb}: rules act on completions, and prompts would train "
            "untouched; leave completion_only_loss out."
        )
    if config.assistant_only_loss:
        raise AnatomyError(
            f"assistant_only_loss is set together with {verb}: rules act on all of a completion; leave it out, and "
            "give rows with 'prompt' and 'completion'."
        )
    if "messages" in columns and "completion" not in columns:
        raise AnatomyError(
            f"train_dataset has 'messages', all of which train, together with {verb}: rules act on one response a row; "
            "give rows with 'prompt' (the turns before) and 'completion' (the last answer)."
        )


def row_table() -> str:
    """What the SFT trainer does with each verb as Markdown, one row per verb, for the documentation.

    Example:
        >>> print(row_table().splitlines()[2])
        | `filter_rows` | rows | exact | exact | exact |
    """
    rows = [
        f"| verb | acts on | {' | '.join(f'`{option}`' for option in _OPTIONS)} |",
        f"|{'---|' * (2 + len(_OPTIONS))}",
    ]
    for name, verb in VERBS.items():
        if verb.reads in ("", "rows"):
            words = (stages.get(verb.stage) for stages in _OPTIONS.values())
            cells = " | ".join(f"refused: {why}" if why else "exact" for why in words)
            rows.append(f"| `{name}` | {verb.stage} | {cells} |")
    return "\n".join(rows)
