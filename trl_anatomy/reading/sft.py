"""Tokens of SFT data, made by ``SFTTrainer._prepare_dataset`` itself: rows that become pairs with one side empty."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset

from ..errors import AnatomyError
from ..versions import check_trl
from .columns import prompt_column, prompt_note
from .preparation import prepare_rows
from .processing import text_tokenizer as tokenizer_of
from .spans import EMPTY, FILLED, TOKEN_FEATURES, Pairs, check_kinds, check_rows, flatten_text, read_pairs

_UNANSWERED = "no assistant message at the end"
_IGNORED = -100  # TRL's label of a token outside the loss


@dataclass(frozen=True, eq=False)
class SftRows(Pairs):
    """Tokenised SFT rows: pairs whose chosen side is the response and whose rejected side is empty."""

    one_sided: ClassVar[bool] = True

    def _sides(self, row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Prompt and response of a raw row; None for the empty side."""
        return (*_sides(row), None)

    def read_again(self, dataset: Dataset, tokenizer: Any, num_proc: int | None) -> Pairs:
        """As the function of that name in `spans`."""
        return read_sft(dataset, tokenizer, max_length=None, num_proc=num_proc)


def sft_texts(row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt and response text of an SFT row; a row of plain text has no prompt.

    >>> sft_texts({"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]})
    ('Hi.', 'Hello.')
    """
    prompt, response = _sides(row)
    return flatten_text(prompt), flatten_text(response)


def _sides(row: Mapping[str, Any]) -> tuple[Any, Any]:
    if "completion" in row:
        return row.get("prompt"), row["completion"]
    if "messages" in row:
        return row["messages"][:-1], row["messages"][-1:]
    return "", row["text"]


def read_sft(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    truncation: str = "keep_start",
    num_proc: int | None = None,
    pool_special_tokens: bool = False,
) -> SftRows:
    """Tokenise SFT data exactly as TRL's SFTTrainer does, without packing.

    The response is the completion, or the last message if it is the assistant's (earlier turns are prompt, whether or
    not the trainer takes their tokens into its loss), or all of a plain text.

    Args:
        dataset: rows with ``prompt`` and ``completion`` (texts or conversations), with ``messages``, or with ``text``.
        tokenizer: the trainer's tokenizer. It is not changed.
        max_length: the trainer's ``max_length``.
        truncation: ``"keep_start"`` or ``"keep_end"``, as in ``SFTConfig``.
        num_proc: processes that tokenise.
        pool_special_tokens: pool concepts over special tokens and what the template writes around answers as well.

    Returns:
        The rows; those left out are counted in ``left_out``.

    Raises:
        AnatomyError: other columns, no usable row, no chat template, a truncation that SFT does not know.
    """
    if truncation not in ("keep_start", "keep_end"):
        raise AnatomyError(f"truncation is {truncation!r}; for SFT data allowed: keep_start, keep_end.")
    kept, left_out = _sft_columns(dataset)
    text_tokenizer = tokenizer_of(tokenizer)
    conversations = isinstance(kept[0].get("prompt"), list)
    if conversations and tokenizer.chat_template is None:
        raise AnatomyError("The dataset holds conversations but the tokenizer has no chat_template: set one.")
    if not conversations and text_tokenizer.eos_token is None:
        raise AnatomyError("The tokenizer has no eos_token; TRL ends every response with it: set tokenizer.eos_token.")

    from trl.trainer.sft_trainer import SFTTrainer

    check_trl()
    n_kept = len(kept)
    # _prepare_dataset reads nothing else of the trainer; a test compares the result with the trainer's own batches.
    trainer: Any = SimpleNamespace(_tokenizer=text_tokenizer, chat_template=None, completion_only_loss=True)
    args: Any = SimpleNamespace(
        dataset_num_proc=num_proc,
        dataset_text_field="text",
        assistant_only_loss=False,
        max_length=max_length,
        truncation_mode=truncation,
        shuffle_dataset=False,
        use_liger_kernel=False,  # asked for before trl 1.15
    )
    kept = prepare_rows(
        lambda rows: SFTTrainer._prepare_dataset(trainer, rows, tokenizer, args, False, None, "audit"), kept
    )
    if len(kept) < n_kept:
        left_out[FILLED] = n_kept - len(kept)
    if not len(kept):
        raise AnatomyError(f"The dataset has no usable row: prompts fill max_length ({max_length}). Raise it.")
    bos = text_tokenizer.bos_token_id

    def split(row: dict[str, Any]) -> dict[str, list[int]]:
        ids = row["input_ids"]
        n_prompt = sum(label == _IGNORED for label in row["labels"])
        if n_prompt == 0 and ids[0] == bos:
            n_prompt = 1  # a BOS carries no text, and stays out of pooling as part of the prompt
        return {"prompt_ids": ids[:n_prompt], "chosen_ids": ids[n_prompt:], "rejected_ids": []}

    others = [column for column in kept.column_names if column != "row"]
    kept = kept.map(split, remove_columns=others, features=TOKEN_FEATURES, num_proc=num_proc, desc="Splitting rows")
    pad = text_tokenizer.pad_token_id
    return SftRows(
        dataset=kept,
        raw=dataset,
        max_length=max_length,
        truncation=truncation,
        pad_token_id=text_tokenizer.eos_token_id if pad is None else pad,
        bos_token_id=bos,
        left_out=left_out,
        tokenizer=text_tokenizer,
        processing_class=tokenizer,
        pool_special_tokens=pool_special_tokens,
    )


def _sft_columns(dataset: Dataset) -> tuple[Dataset, dict[str, int]]:
    """The columns that TRL reads, messages as prompt and completion, rows without a response left out."""
    check_rows(dataset)
    columns = dataset.column_names
    kinds = (("prompt", "completion"), ("messages",), ("text",))
    kind = next((kind for kind in kinds if set(kind) <= set(columns)), None)
    if kind is None:
        hint = "; it holds preference pairs: leave data_kind out" if {"chosen", "rejected"} <= set(columns) else ""
        raise AnatomyError(
            f"The dataset has the columns {', '.join(columns) or 'none'}; SFT data needs 'prompt' and 'completion', or "
            f"'messages', or 'text'{hint}."
        )
    kept = dataset.select_columns([c for c in (*kind, "tools", "chat_template_kwargs") if c in columns])
    kept = kept.add_column("row", np.arange(len(dataset)))
    before: type | None = None
    for number, row in enumerate(kept.select_columns(list(kind))):
        before = check_kinds(row, number, list if kind == ("messages",) else str if kind == ("text",) else before)
    usable = np.ones(len(kept), dtype=bool)
    left_out: dict[str, int] = {}
    if kind == ("messages",):
        usable = np.array(
            [bool(m) and m[-1]["role"] == "assistant" and len(m) > 1 for m in kept["messages"]], dtype=bool
        )
        if not usable.all():
            left_out[_UNANSWERED] = int((~usable).sum())
    answered = np.array(
        [bool(sft_texts(row)[1].strip()) if ok else False for row, ok in zip(kept, usable, strict=True)]
    )
    if n_empty := int((usable & ~answered).sum()):
        left_out[EMPTY] = n_empty
    if not answered.any():
        told = ", ".join(f"{count} x {reason}" for reason, count in left_out.items())
        raise AnatomyError(f"The dataset has no usable row: {len(dataset)} rows, left out: {told or 'none'}.")
    if not answered.all():
        kept = kept.select(np.flatnonzero(answered))
    if kind == ("messages",):
        kept = kept.map(
            lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
            remove_columns="messages",
            desc="Finding the last answer",
        )
    return kept, left_out


def read_rows(dataset: Dataset, tokenizer: Any, *, data_kind: str, **settings: Any) -> Pairs:
    """`read_sft` or `read_pairs`, as `data_kind` ("sft" or "pairs") says; `settings` are theirs.

    Raises:
        AnatomyError: as they do; names the column that looks like the prompt, where pairs have none.
    """
    if data_kind == "sft":
        return read_sft(dataset, tokenizer, **settings)
    try:
        return read_pairs(dataset, tokenizer, **settings)
    except AnatomyError as error:
        prompt = prompt_column(dataset) if isinstance(dataset, Dataset) else None
        if prompt is None:
            raise
        raise AnatomyError(f"{error} {prompt_note(prompt)}") from error
