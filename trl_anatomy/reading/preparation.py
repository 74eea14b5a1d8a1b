"""Rows -> tokens of prompt, chosen and rejected, by the preparation of TRL's own trainers.

The tokens are made by `_prepare_dataset` of the trainers themselves, called on a light stand-in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets

from ..errors import AnatomyError
from ..versions import check_trl, shared_prefix
from .processing import text_tokenizer

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
OTHER_TEXTS = ("0", "Z")  # two, of which no text begins with both
_BY = ("chosen", "rejected", "prompt", "completion", "messages")


def plain_rows(dataset: Dataset) -> Dataset:
    """Rows as Python values, of the columns that the dataset's format lets through: TRL sees no others."""
    seen = dataset.format["columns"]
    if len(seen) < len(dataset.column_names) and not dataset.format["output_all_columns"]:
        dataset = dataset.select_columns(seen)
    return dataset if dataset.format["type"] is None else dataset.with_format(None)


def is_conversational(example: Mapping[str, Any]) -> bool:
    """Whether a row holds messages, by its responses, and by what else it has where they are empty.

    TRL asks whichever of these columns a set gives first, which changes from process to process (PYTHONHASHSEED): a
    column ``messages`` beside pairs of text, or an empty prompt, decides by chance.
    """
    from trl.data_utils import is_conversational as of_first_key

    key = next((key for key in _BY if example.get(key)), None)
    return key is not None and of_first_key({key: example[key]})


@contextmanager
def kinds_by_responses() -> Iterator[None]:
    """Have TRL's preparation ask this module's `is_conversational`."""
    from trl.trainer import dpo_trainer, reward_trainer, sft_trainer

    modules: tuple[Any, ...] = (dpo_trainer, reward_trainer, sft_trainer)
    theirs = [module.is_conversational for module in modules]
    for module in modules:
        module.is_conversational = is_conversational
    try:
        yield
    finally:
        for module, function in zip(modules, theirs, strict=True):
            module.is_conversational = function


def split_row(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row with its prompt taken out of the responses (TRL's rule) where it has no ``prompt`` of its own."""
    if "prompt" in row:
        return row
    from trl import extract_prompt

    if not row["chosen"] or not row["rejected"]:  # TRL's rule has no answer for an empty side
        return {**row, "prompt": [] if isinstance(row["chosen"] or row["rejected"], list) else ""}
    return extract_prompt({"chosen": row["chosen"], "rejected": row["rejected"]})


def prepare_rows(prepare: Callable[[Dataset], Dataset], rows: Dataset) -> Dataset:
    """What TRL's preparation makes of `rows`, which have a column ``row``.

    Raises:
        AnatomyError: it fails; names the first row on which it does, or says that the disk is full.
    """
    try:
        return prepare(rows)
    except OSError as error:
        raise AnatomyError(
            f"The tokens of the dataset cannot be written to the cache of datasets ({error})."
        ) from error
    except Exception as error:  # of a chat template, a tokenizer, or the reading of tools: what they raise is theirs
        first, end = 0, len(rows)
        while end - first > 1:
            middle = (first + end) // 2
            try:
                prepare(rows.select(range(first, middle)))
                first = middle
            except Exception:
                end = middle
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise AnatomyError(
            f"Dataset row {rows[first]['row']} cannot be tokenised ({type(error).__name__}: {reason}). Look at its "
            "roles and columns: a chat template may refuse them."
        ) from error


def dpo_tokens(
    rows: Dataset, processing_class: Any, *, max_length: int | None, truncation: str, num_proc: int | None
) -> Dataset:
    """Columns `IDS` and ``row`` as `DPOTrainer` makes them; rows whose prompt fills `max_length` are left out.

    Raises:
        AnatomyError: as `prepare_rows`.
    """
    with kinds_by_responses():
        made = prepare_rows(_dpo(processing_class, max_length, truncation, num_proc), rows)
    return made.select_columns([*IDS, "row"])


def reward_tokens(rows: Dataset, processing_class: Any, *, num_proc: int | None) -> Dataset:
    """Columns `IDS` and ``row`` of which prompt and response together are what `RewardTrainer` makes of a row.

    Its rows need no prompt of their own, and it never renders one alone. Where prompts can be rendered, the response
    begins where it does in `DPOTrainer`; else where the text of the first message does that is no prompt's.

    Raises:
        AnatomyError: as `prepare_rows`.
    """
    if "prompt" not in rows.column_names:
        features = Features({**rows.features, "prompt": rows.features["chosen"]})
        rows = rows.map(split_row, features=features, num_proc=num_proc, desc="Extracting prompts")
    by_dpo = _split_by_prompts(processing_class, num_proc)
    with kinds_by_responses():
        if not is_conversational(rows[0]):
            return prepare_rows(by_dpo, rows).select_columns([*IDS, "row"])
        prompted = np.fromiter((bool(prompt) for prompt in rows["prompt"]), bool, len(rows))
        parts = []
        if prompted.any():
            try:
                parts.append(by_dpo(rows if prompted.all() else rows.select(np.flatnonzero(prompted))))
            except OSError:
                raise
            except Exception:  # a template that refuses a prompt alone: the reward trainer never renders one
                prompted[:] = False
        if not prompted.all():
            rest = rows if not prompted.any() else rows.select(np.flatnonzero(~prompted))
            parts.append(_split_by_texts(rest, processing_class, num_proc))
    if len(parts) == 1:
        return parts[0].select_columns([*IDS, "row"])
    features = Features({"row": Value("int64")} | {name: List(Value("int64")) for name in IDS})
    made = concatenate_datasets([part.select_columns([*IDS, "row"]).cast(features) for part in parts])
    return made.select(np.argsort(np.asarray(made["row"]), kind="stable"))


def _dpo(processing_class: Any, max_length: int | None, truncation: str, num_proc: int | None) -> Any:
    from trl.trainer.dpo_trainer import DPOTrainer  # the class itself, whatever stands in for it in `trl`

    check_trl()
    # _prepare_dataset reads nothing else of the trainer; a test compares the result with the trainers' own batches.
    trainer: Any = SimpleNamespace(_tokenizer=text_tokenizer(processing_class))
    args: Any = SimpleNamespace(dataset_num_proc=num_proc, max_length=max_length, truncation_mode=truncation)
    return lambda rows: DPOTrainer._prepare_dataset(trainer, rows, processing_class, args, "audit")


def _reward(processing_class: Any, num_proc: int | None) -> Any:
    from trl.trainer.reward_trainer import RewardTrainer

    args: Any = SimpleNamespace(dataset_num_proc=num_proc, max_length=None)

    def prepare(rows: Dataset) -> Any:
        made = RewardTrainer._prepare_dataset(SimpleNamespace(), rows, processing_class, args, "audit")
        return made.select_columns(["chosen_ids", "rejected_ids"]).with_format("numpy")

    return prepare


def _split_by_prompts(processing_class: Any, num_proc: int | None) -> Any:
    """Rows as `RewardTrainer` makes them, whose responses begin where they part from the prompt alone."""
    by_dpo = _dpo(processing_class, None, "keep_start", num_proc)
    if shared_prefix():  # DPOTrainer cuts the whole rows itself
        return by_dpo
    whole = _reward(processing_class, num_proc)

    def prepare(rows: Dataset) -> Dataset:
        prompts = by_dpo(rows)["prompt_ids"]
        made: dict[str, list[list[int]]] = {name: [] for name in IDS}
        for prompt, row in zip(prompts, whole(rows), strict=True):
            start = min(common_prefix(prompt, row[side]) for side in ("chosen_ids", "rejected_ids"))
            _append(made, row, start)
        return _token_rows(made, rows)

    return prepare


def _append(made: dict[str, list[list[int]]], row: Mapping[str, Any], start: int) -> None:
    chosen, rejected = row["chosen_ids"], row["rejected_ids"]
    for name, ids in zip(IDS, (chosen[:start], chosen[start:], rejected[start:]), strict=True):
        made[name].append(ids.tolist())


def _token_rows(made: Mapping[str, list[list[int]]], rows: Dataset) -> Dataset:
    features = Features({"row": Value("int64")} | {name: List(Value("int64")) for name in IDS})
    return Dataset.from_dict({**made, "row": list(rows["row"])}, features=features)


def _split_by_texts(rows: Dataset, processing_class: Any, num_proc: int | None) -> Dataset:
    """Conversations tokenised whole, and split where the text of the first message after the prompt begins.

    That place is found as `turn_starts` finds the last user turn: with other texts there, the tokens before it stay.
    """
    whole = _reward(processing_class, num_proc)

    def changed(text: str) -> Dataset:
        return rows.map(with_first_text, fn_kwargs={"text": text}, num_proc=num_proc, desc="Finding responses")

    own = prepare_rows(whole, rows)
    others = [prepare_rows(whole, changed(text)) for text in OTHER_TEXTS]
    made: dict[str, list[list[int]]] = {name: [] for name in IDS}
    for i, row in enumerate(own):
        chosen, rejected = row["chosen_ids"], row["rejected_ids"]
        start = common_prefix(chosen, rejected)
        for other in others:
            start = min(start, *(common_prefix(row[side], other[i][side]) for side in ("chosen_ids", "rejected_ids")))
        _append(made, row, start)
    return _token_rows(made, rows)


def with_first_text(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The row with another text in the first message of each response."""
    changed = {}
    for side in ("chosen", "rejected"):
        messages = list(row[side])
        changed[side] = [with_text(message, text) for message in messages[:1]] + messages[1:]
    return changed


def with_text(message: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The message with another text, in each part of it that has one."""
    content = message["content"]
    if content is None or isinstance(content, str):
        return {**message, "content": text}
    return {**message, "content": [part if part.get("text") is None else {**part, "text": text} for part in content]}


def common_prefix(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Number of leading tokens that two sequences share."""
    a, b = np.asarray(a), np.asarray(b)
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
