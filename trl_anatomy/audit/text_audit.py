"""Audit preference data by named habits alone: seconds, without a model's weights and without an SAE."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AnatomyError
from ..reading.clock import dated, template_now
from ..reading.habits import Habit
from ..reading.storage import local
from .choice import choice_of
from .config import AuditConfig
from .counted import Counted
from .finding_list import habit_lines, list_findings
from .findings import timed
from .habit_table import (
    LazyTexts,
    Texts,
    habit_table,
    habit_values,
    habits_to_count,
    prompt_groups,
    texts_of,
    tokens_of,
)
from .habits_by_prompt import Asked, habits_by_prompt
from .improbable import improbable_labels
from .problems import count_problems, eval_prompts, find_problems, looked_for, with_improbable
from .prompt_rules import n_turns, rules_of, rules_of_pairs
from .run import load_dataset, tokenizer_of, versions
from .text_folder import TextAudit, write_text_audit
from .ties import can_tell_ties

if TYPE_CHECKING:
    from datasets import Dataset


_ROWS_AT_ONCE = 100


def run_text_audit(
    config: AuditConfig,
    *,
    tokenizer: Any = None,
    dataset: "Dataset | None" = None,
    habits: Mapping[str, Habit] | None = None,
) -> TextAudit:
    """Count named habits on both sides, and write the audit folder with its page.

    With a tokenizer (its own, or that of the model that `config` names) the text is what template and truncation leave
    for training, and tokens are counted too; else it is the dataset's.

    Args:
        config: `dataset`, `out`, `alpha`, `habits` and what concerns reading are used; `sae` has to be empty.
        tokenizer, dataset: in memory, instead of being loaded as `config` says.
        habits: habits of one's own, name -> habit, counted beside the library and those of `config.habits`.

    Raises:
        AnatomyError: no dataset, no usable row, SFT data, an SAE, or bad habits.
    """
    from ..reading.columns import column_notes, prompt_column, unread_columns
    from .report import write_report

    if config.data_kind != "pairs":
        raise AnatomyError("audit setting data_kind: habits are compared between chosen and rejected; allowed: pairs.")
    if config.sae:
        raise AnatomyError("audit setting sae: an audit of habits alone reads none; leave it out, or use run_audit.")
    timings: dict[str, float] = {}
    local(config.out)  # refuses a URL that fsspec cannot read
    reads_tokens = tokenizer is not None or bool(config.model)
    counted = {**habits_to_count(config.habits, reads_tokens), **(habits or {})}
    with timed(timings, "load"):
        raw = load_dataset(config) if dataset is None else dataset
        evaluated, pairs = eval_prompts(config), None
        if reads_tokens:
            from ..reading.spans import read_pairs

            tokenizer = dated(tokenizer_of(config, None, tokenizer), template_now())
            pairs = read_pairs(raw, tokenizer, max_length=config.max_length, truncation=config.truncation)
            texts, tokens, rows = texts_of(pairs), tokens_of(pairs), pairs.rows
            groups, left_out, fingerprint = pairs.prompt_groups, dict(pairs.left_out), pairs.fingerprint
            written = {"date": pairs.date, "chat_template": tokenizer.chat_template}
        else:
            texts, rows, left_out = raw_texts(raw)
            tokens, groups, fingerprint = None, prompt_groups(texts), text_fingerprint(texts, rows)
            written = {}
    with timed(timings, "habits"):
        values = habit_values(texts, counted, tokens)
        table = habit_table(texts, counted, groups=groups, rows=rows, alpha=config.alpha, values=values)
    with timed(timings, "choice"):
        both = Counted(values, counted, groups)
        lines = habit_lines(both, config.seed)
        choice = choice_of(both, seed=config.seed, lines=lines)
        doubtful = improbable_labels(both, choice, seed=config.seed)
    with timed(timings, "findings"):
        listed, of_list = list_findings(both, rows, lines=lines, seed=config.seed)
    with timed(timings, "by_prompt"):
        asked = Asked.of(raw_rules(raw, rows) if pairs is None else rules_of_pairs(pairs))
        copies = None if pairs is None else pairs.copies.group
        by_prompt = habits_by_prompt(both, asked, alpha=config.alpha, least=config.min_context, copies=copies)
    with timed(timings, "problems"):
        problems = find_problems(raw, pairs=pairs, evaluated=evaluated)
        problems = with_improbable(problems, doubtful, rows, raw)
        kinds = looked_for(reads_tokens, evaluated is not None, can_tell_ties(raw), doubtful is not None)
    unread, prompt = unread_columns(raw), prompt_column(raw)
    info = {
        "versions": versions(),
        "model": {
            "name": config.model
            or (getattr(tokenizer, "name_or_path", "") or "tokenizer in memory" if reads_tokens else "")
        },
        "data": {
            "name": config.data_name or "dataset in memory",
            "fingerprint": fingerprint,
            "n_rows": len(raw),
            "n_pairs": len(texts),
            "left_out": left_out,
            "unread_columns": unread,
            "looks_like_prompt": prompt,
            **written,
        },
        "settings": config.settings(),
        "notes": column_notes(unread, prompt),
        "choice": choice,
        "findings": of_list,
        "counts": {"pairs": len(texts), "n_prompts": len(np.unique(groups))},
        "problems": count_problems(problems, kinds),
        "timings": timings,
    }
    audit = write_text_audit(config.out, info, table, problems, listed, by_prompt)
    write_report(audit)
    return audit


def raw_texts(raw: "Dataset") -> tuple[Sequence[Texts], np.ndarray, dict[str, int]]:
    """Prompt, chosen and rejected text of the usable rows, as the dataset has them; their rows; what is left out.

    Raises:
        AnatomyError: no usable row, or rows of another kind.
    """
    from ..reading.spans import PAIR_COLUMNS, flatten_text, split_row, usable_rows

    usable, left_out = usable_rows(raw)
    rows = np.flatnonzero(usable)
    if not len(rows):
        raise AnatomyError(
            f"The dataset has no usable row: {len(raw)} rows, all with an empty response. Every pair needs two "
            "responses that are not blank."
        )
    kept = raw.select_columns([column for column in PAIR_COLUMNS if column in raw.column_names])
    kept = kept if len(rows) == len(raw) else kept.select(rows)

    def texts(row: Mapping[str, Any]) -> Texts:
        split = split_row(row)
        return flatten_text(split["prompt"]), flatten_text(split["chosen"]), flatten_text(split["rejected"])

    def each() -> Iterator[Texts]:
        for batch in kept.iter(batch_size=_ROWS_AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                yield texts(dict(zip(batch, values, strict=True)))

    return LazyTexts(len(rows), lambda i: texts(kept[i]), each), rows, left_out


def raw_rules(raw: "Dataset", rows: np.ndarray) -> list[list[str]]:
    """`prompt_rules.rules_of` the prompt of each row, as the dataset has it."""
    from ..reading.spans import PAIR_COLUMNS, flatten_text, split_row

    kept = raw.select_columns([column for column in PAIR_COLUMNS if column in raw.column_names])
    prompts = (split_row(row)["prompt"] for row in (kept if len(rows) == len(raw) else kept.select(rows)))
    return [rules_of(flatten_text(prompt), n_turns(prompt)) for prompt in prompts]


def text_fingerprint(texts: Iterable[Texts], rows: np.ndarray) -> str:
    """Hash of the texts and of the rows they came from."""
    digest = hashlib.sha256()
    for row, text in zip(rows.tolist(), texts, strict=True):
        digest.update(json.dumps([row, *text]).encode())
    return digest.hexdigest()[:32]
