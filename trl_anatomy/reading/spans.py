"""Prompt, chosen and rejected tokens of preference pairs: TRL's own tokenisation, read once for every later step.

The tokens are made by TRL's own trainers (`preparation`). The ``prompt_ids`` of ``DPOTrainer`` followed by its
``chosen_ids`` are also what ``RewardTrainer`` makes of the same row; what happens to rows longer than ``max_length``
differs, and ``truncation`` names it.
"""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, Features, List, Value

from ..errors import AnatomyError
from .clock import date_of
from .content import NO_MARKS, Marks, find_marks
from .copies import Copies, joined
from .preparation import (
    OTHER_TEXTS,
    common_prefix,
    dpo_tokens,
    plain_rows,
    reward_tokens,
    split_row,
    with_text,
)
from .processing import text_tokenizer as tokenizer_of
from .token_text import decode_all, pieces
from .written import (
    Conversation,
    Frame,
    Spans,
    common_part,
    join,
    joined_bounds,
    kept_spans,
    learn_frame,
    special_tokens,
    warn_refused,
)

SPANS = ("prompt", "chosen", "rejected")
TOKEN_FEATURES = Features({"row": Value("int64")} | {f"{span}_ids": List(Value("int64")) for span in SPANS})
TRUNCATIONS = ("keep_start", "keep_end", "drop")
# Columns of responses that a model sampled: their tokens, and those of the prompt that it was given.
SAMPLED = tuple(f"sampled_{span}_ids" for span in SPANS)
SAMPLED_RESPONSE = ("sampled_prompt_ids", "sampled_response_ids")  # the same of labelled text

# Columns of a preference dataset that are read; all others are passed over.
PAIR_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")
EMPTY = "empty response"
FILLED = "prompt fills max_length"
_LONG = "longer than max_length"
_TAIL = 16  # tokens at the end of a plain prompt that are compared with its text


@dataclass(frozen=True, eq=False)
class Pairs:
    """Tokenised preference pairs, as the trainer will see them.

    Attributes:
        dataset: columns ``prompt_ids``, ``chosen_ids``, ``rejected_ids`` (TRL's, before truncation) and ``row``, the
            index into `raw`.
        raw: the dataset as it was given, all rows, as Python values.
        max_length: tokens of prompt and response together, or None for no limit.
        truncation: ``"keep_start"`` or ``"keep_end"`` (DPO), ``"drop"`` (reward trainer: longer rows are left out).
        pad_token_id: the trainer's padding token.
        bos_token_id: the tokenizer's first token, if it has one; it carries no text and stays out of pooling.
        left_out: reason -> number of raw rows left out.
        tokenizer: reads the tokens as text; None where they were not made of text, and texts are those of `raw`.
        processing_class: what made the tokens: the tokenizer, or the processor that holds it.
        pool_special_tokens: whether special tokens and what the template writes around answers are pooled as well.
        excluded: ids that are not pooled in any case, such as those that an SAE was not trained on.
        blank: (n_pairs,) bool: pairs with a blank response, which train as all others do; None where they were left
            out. Audits leave them out.
    """

    dataset: Dataset
    raw: Dataset
    max_length: int | None
    truncation: str
    pad_token_id: int
    bos_token_id: int | None
    left_out: dict[str, int]
    tokenizer: Any = None
    processing_class: Any = None
    pool_special_tokens: bool = False
    excluded: frozenset[int] = frozenset()
    blank: np.ndarray | None = None
    one_sided: ClassVar[bool] = False  # rows of SFT data: the rejected side is empty

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def rows(self) -> np.ndarray:
        """(n_pairs,) int64: index of each pair into `raw`."""
        return np.asarray(self.dataset.with_format("numpy")["row"][:], dtype=np.int64)

    @cached_property
    def audited(self) -> "Pairs":
        """The pairs that an audit of the same dataset has: those without a blank response."""
        if self.blank is None:
            return self
        left_out = {EMPTY: int(self.blank.sum()), **self.left_out}
        if not self.blank.any():
            return replace(self, blank=None)
        return replace(self, dataset=self.dataset.select(np.flatnonzero(~self.blank)), left_out=left_out, blank=None)

    @property
    def begins_with_bos(self) -> bool:
        """Whether the first prompt begins with the tokenizer's BOS."""
        prompt = self.ids(0, "prompt")
        return len(prompt) > 0 and prompt[0] == self.bos_token_id

    @property
    def date(self) -> str | None:
        """The date that the chat template wrote into the tokens; None where it writes none, or today's."""
        return date_of(self.processing_class or self.tokenizer)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all tokens, of the rows they came from and of the truncation."""
        digest = hashlib.sha256(json.dumps([self.max_length, self.truncation, self.bos_token_id]).encode())
        for values, offsets in (self._flat[span] for span in SPANS):
            digest.update(values.tobytes() + offsets.tobytes())
        digest.update(self.rows.tobytes())
        return digest.hexdigest()[:32]

    @cached_property
    def prompt_groups(self) -> np.ndarray:
        """(n_pairs,) int64: a number for each prompt, by its tokens before truncation; pairs of one prompt share it.

        Copies share it too, where truncation made them equal. A pair without a prompt has one of its own, also where
        the template writes a header or a system text of its own before the answer.
        """
        values, offsets = self._flat["prompt"]
        text = np.append(self.marks.content(values, offsets, response=False), False)
        empty = (np.add.reduceat(text, offsets[:-1], dtype=np.int64) == 0) | (np.diff(offsets) == 0)
        parts = (values[start:stop].tobytes() for start, stop in pairwise(offsets))
        hashes = np.array([_hash(part) for part in parts], dtype=np.int64)
        if self.tokenizer is not None:
            _, first, of, count = np.unique(hashes, return_index=True, return_inverse=True, return_counts=True)
            shared = zip(first.tolist(), count.tolist(), strict=True)
            blank = [n > 1 and not flatten_text(self.conversation(i)[0]).strip() for i, n in shared]
            empty |= np.array(blank, dtype=bool)[of]
        hashes[empty] = np.array([_hash(str(row).encode()) for row in self.rows[empty]], dtype=np.int64)
        return joined(hashes, self.copies.group)

    @cached_property
    def copies(self) -> Copies:
        """Which pairs have the same tokens after truncation, as they are or with chosen and rejected swapped."""
        sides = np.zeros((len(self), 2), dtype=np.int64)
        for i in range(len(self)):
            prompt, chosen, other, rejected = self.arrays(i)
            for k, part in enumerate(((prompt, chosen), (other, rejected))):
                sides[i, k] = _hash(b"|".join(ids.tobytes() for ids in part))
        _, group = np.unique(np.sort(sides, axis=1), axis=0, return_inverse=True)
        return Copies(group.reshape(-1).astype(np.int64), np.where(sides[:, 0] <= sides[:, 1], 1, -1))

    @cached_property
    def _flat(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """span -> (token ids of all pairs end to end (int32), offsets (n_pairs + 1,) int64)."""
        columns = [f"{span}_ids" for span in SPANS]
        values: dict[str, list[np.ndarray]] = {column: [] for column in columns}
        lengths: dict[str, list[np.ndarray]] = {column: [] for column in columns}
        for table in self.dataset.select_columns(columns).with_format("arrow").iter(batch_size=4096):
            for column in columns:
                array = table[column].combine_chunks()
                values[column].append(array.flatten().to_numpy(zero_copy_only=False).astype(np.int32))
                lengths[column].append(array.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64))
        return {
            span: (
                np.concatenate(values[column]),
                np.concatenate([np.zeros(1, np.int64), *lengths[column]]).cumsum(),
            )
            for span, column in zip(SPANS, columns, strict=True)
        }

    def ids(self, i: int, span: str) -> np.ndarray:
        """(n_tokens,) int32: tokens of one span of pair `i`, before truncation."""
        values, offsets = self._flat[span]
        return values[offsets[i] : offsets[i + 1]]

    def arrays(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """As `tokens`, as int32 arrays."""
        prompt, chosen, rejected = (self.ids(i, span) for span in SPANS)
        return (*self._cut(prompt, chosen), *self._cut(prompt, rejected))

    def _cut(self, prompt: np.ndarray, response: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        surplus = 0 if self.max_length is None else len(prompt) + len(response) - self.max_length
        if surplus <= 0:
            return prompt, response
        if self.truncation == "keep_end":
            return prompt[surplus:], response[max(0, surplus - len(prompt)) :]
        return prompt[: self.max_length], response[: max(0, len(response) - surplus)]

    @cached_property
    def response_bounds(self) -> np.ndarray:
        """(2 * n_pairs + 1,) int64: offsets of the truncated responses, chosen before rejected, pair after pair."""
        prompt, *sides = (np.diff(self._flat[span][1]) for span in SPANS)
        lengths = np.stack(sides, axis=1)
        if self.max_length is not None:
            surplus = np.maximum(0, prompt[:, None] + lengths - self.max_length)
            if self.truncation == "keep_end":
                surplus = np.maximum(0, surplus - prompt[:, None])
            lengths = np.maximum(0, lengths - surplus)
        return np.concatenate([np.zeros(1, np.int64), lengths.ravel()]).cumsum()

    def kept_part(self, i: int, span: str) -> slice:
        """The tokens of a response (``"chosen"`` or ``"rejected"``) of pair `i` that truncation leaves."""
        side = SPANS.index(span) - 1
        n_kept = int(np.diff(self.response_bounds[2 * i + side : 2 * i + side + 2])[0])
        if self.truncation == "keep_end":
            n_all = len(self.ids(i, span))
            return slice(n_all - n_kept, n_all)
        return slice(0, n_kept)

    def tokens(self, i: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """Tokens of pair `i` after truncation: chosen-side prompt, chosen, rejected-side prompt, rejected.

        The two prompts differ only under ``keep_end``, where each side loses as many tokens as its response needs.
        """
        prompt, chosen, other, rejected = self.arrays(i)
        return prompt.tolist(), chosen.tolist(), other.tolist(), rejected.tolist()

    @cached_property
    def marks(self) -> Marks:
        """Tokens that are not text of the data, and so not pooled."""
        read = self.processing_class or self.tokenizer
        found = NO_MARKS if read is None or self.pool_special_tokens else find_marks(read)
        return replace(found, special=found.special | self.excluded)

    @cached_property
    def _content(self) -> dict[str, np.ndarray]:
        """span -> which ids of all pairs end to end, before truncation, are pooled; a bit each, as of `np.packbits`."""
        return {
            span: np.packbits(self.marks.content(values, offsets, response=span != "prompt"))
            for span, (values, offsets) in self._flat.items()
        }

    @cached_property
    def content_key(self) -> str | None:
        """Hash of which tokens are pooled, for caches; None where all are."""
        n_pooled = sum(int(np.bitwise_count(bits).sum(dtype=np.int64)) for bits in self._content.values())
        if n_pooled == sum(len(values) for values, _ in self._flat.values()):
            return None
        return hashlib.sha256(b"".join(self._content[span].tobytes() for span in SPANS)).hexdigest()[:32]

    def content(self, i: int, span: str) -> np.ndarray:
        """(n_tokens,) bool: which tokens of one span of pair `i` concepts are pooled over, after truncation.

        Of a prompt that `keep_end` cuts on each side differently, the chosen side's.
        """
        start, stop = self._flat[span][1][i : i + 2].tolist()
        bits = np.unpackbits(self._content[span][start // 8 : -(-stop // 8)]).view(bool)
        mask = bits[start % 8 : start % 8 + stop - start]
        if span != "prompt":
            return mask[self.kept_part(i, span)]
        n_kept = len(self._cut(self.ids(i, "prompt"), self.ids(i, "chosen"))[0])
        return mask[len(mask) - n_kept :] if self.truncation == "keep_end" else mask[:n_kept]

    def pooled_as(self, excluded: bool | Collection[int]) -> "Pairs":
        """These pairs as an SAE wants them pooled.

        Args:
            excluded: ids that it was not trained on; True for all special tokens, False for none.
        """
        if excluded is True:
            return replace(self, pool_special_tokens=False) if self.pool_special_tokens else self
        if not excluded or set(excluded) <= self.marks.special:
            return self
        return replace(self, excluded=self.excluded | set(excluded))

    @cached_property
    def cut(self) -> dict[str, np.ndarray]:
        """Side -> (n_pairs,) bool: which responses truncation cut short."""
        kept = np.diff(self.response_bounds).reshape(-1, 2)
        return {side: np.diff(self._flat[side][1]) > kept[:, k] for k, side in enumerate(SPANS[1:])}

    @cached_property
    def packed_lengths(self) -> np.ndarray:
        """(n_pairs,) int64: tokens of prompt, chosen and rejected together, after truncation (prompt counted once)."""
        prompt, chosen, rejected = (np.diff(self._flat[span][1]) for span in SPANS)
        if self.max_length is None:
            return prompt + chosen + rejected
        cut = [np.minimum(prompt + side, self.max_length) for side in (chosen, rejected)]
        return cut[0] + cut[1] - np.minimum(prompt, np.minimum(*cut))

    def texts(self, i: int) -> tuple[str, str, str]:
        """Prompt, chosen and rejected text of pair `i`, as the trainer sees them.

        They are decoded from the tokens that template and truncation leave, without special tokens and without what the
        template puts around the texts of messages: headers, a system text of its own, what it opens and ends an answer
        with. Texts of several messages stand line by line. A text begins with the first character that the model was
        asked to write (or to read). Of prompts cut at their front, the longer of the two.
        """
        return self.prompt_text(i), self.response_text(i, "chosen"), self.response_text(i, "rejected")

    def prompt_text(self, i: int) -> str:
        """Text of the prompt of pair `i`."""
        if self.tokenizer is None:
            return self.raw_texts(i)[0]
        ids = self.ids(i, "prompt").tolist()
        text = decode_all(self.tokenizer, ids)
        first = "" if self.plain else flatten_text(self.conversation(i)[0][:1])
        spans = self._frame.prompt_spans(text, first)
        n_kept = max(len(kept) for kept in self.arrays(i)[::2])
        if n_kept < len(ids) and self.truncation == "keep_end":
            kept = decode_all(self.tokenizer, ids[len(ids) - n_kept :])
            spans = kept_spans(spans, *common_part(text, kept, end=True))
        return join(text, spans) + (self._rest_of_prompt(i) if self.plain else "")

    def response_text(self, i: int, side: str) -> str:
        """Text of one response of pair `i`; `side` is ``"chosen"`` or ``"rejected"``."""
        if self.tokenizer is None:
            return self.raw_texts(i)[SPANS.index(side)]
        text = decode_all(self.tokenizer, self.ids(i, side).tolist())
        return join(text, self._written(i, side, text))

    def response_tokens(self, i: int, side: str) -> tuple[str, np.ndarray]:
        """`response_text`, and (n_tokens, 2) int64 begin and end of each token's characters in it.

        The tokens are those before truncation; tokens that are cut off, and the template's, have no characters.
        """
        text, bounds = pieces(self.ids(i, side).tolist(), lambda part: decode_all(self.tokenizer, part))
        spans = self._written(i, side, text)
        return join(text, spans), joined_bounds(spans, bounds)

    def _written(self, i: int, side: str, text: str) -> Spans:
        """Parts of a decoded response that the model was asked to write, after truncation."""
        frame = self._frame
        if self.plain:
            rest = self._rest_of_prompt(i)
            start = len(rest) if text.startswith(rest) else 0
        else:
            end = self.ids(i, "prompt")[-frame.reach :].tolist() if frame.reach else []
            start = len(frame.opening(text, decode_all(self.tokenizer, end)))
        spans = frame.response_spans(text, start)
        ids, kept = self.ids(i, side).tolist(), self.kept_part(i, side)
        if kept.stop - kept.start < len(ids):
            part = decode_all(self.tokenizer, ids[kept])
            spans = kept_spans(spans, *common_part(text, part, end=self.truncation == "keep_end"))
        return spans

    def _rest_of_prompt(self, i: int) -> str:
        """What of a prompt of plain text is in the first token of the responses, such as a blank at its end."""
        prompt = self.conversation(i)[0] or ""
        ids = self.ids(i, "prompt").tolist()
        if ids and ids[0] == self.bos_token_id:
            ids = ids[1:]
        if prompt.endswith(decode_all(self.tokenizer, ids[-_TAIL:])):
            return ""
        text = decode_all(self.tokenizer, ids)
        return prompt[len(text) :] if prompt.startswith(text) else ""

    @cached_property
    def plain(self) -> bool:
        """Whether the rows are plain text, not messages."""
        return isinstance(self.conversation(0)[1], str)

    @cached_property
    def _frame(self) -> Frame:
        """What the chat template writes around messages; of plain text, the special tokens alone."""
        specials = special_tokens(self.tokenizer, (values for values, _ in self._flat.values()))
        if self.plain:
            return Frame(specials=specials)
        made_by, truncation = self.processing_class or self.tokenizer, self.truncation
        return learn_frame(self._conversations(), lambda rows: decoded_rows(rows, made_by, truncation), specials)

    def _conversations(self) -> Iterator[Conversation]:
        """Every prompt with each of its responses, as `learn_frame` takes them."""
        more = [column for column in ("tools", "chat_template_kwargs") if column in self.raw.column_names]
        read = self.raw.with_format(None).select_columns([*self._text_columns.column_names, *more])
        for batch in read.select(self.rows).iter(batch_size=1000):
            for values in zip(*batch.values(), strict=True):
                row = dict(zip(batch, values, strict=True))
                prompt, *sides = self._sides(row)
                for response in sides:
                    if response:
                        yield {"prompt": prompt, "response": response, **{name: row[name] for name in more}}

    def raw_texts(self, i: int) -> tuple[str, str, str]:
        """The same texts as the dataset has them, whatever is trained on; of messages, their contents line by line."""
        prompt, chosen, rejected = self.conversation(i)
        return flatten_text(prompt), flatten_text(chosen), flatten_text(rejected)

    def conversation(self, i: int) -> tuple[Any, Any, Any]:
        """Prompt, chosen and rejected response of pair `i` as the dataset has them; None for a side that is not."""
        return self._sides(self._text_columns[int(self.rows[i])])

    def _sides(self, row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
        """Prompt, chosen and rejected response of a raw row."""
        split = split_row(row)
        return split["prompt"], split["chosen"], split["rejected"]

    def read_again(self, dataset: Dataset, tokenizer: Any, num_proc: int | None) -> "Pairs":
        """As the function of that name."""
        return read_pairs(
            dataset,
            tokenizer,
            max_length=None,
            truncation="drop" if self.truncation == "drop" else "keep_start",
            num_proc=num_proc,
            keep_blank=self.blank is not None,
        )

    @cached_property
    def _text_columns(self) -> Dataset:
        named = [column for column in self.raw.column_names if column in (*SPANS, "completion", "messages", "text")]
        return self.raw.with_format(None).select_columns(named)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def check_kinds(values: Mapping[str, Any], row: int, kind: type | None) -> type | None:
    """Make sure that every value is a text or a list of messages, and all of the kind of the rows before.

    Args:
        values: column -> value; None where a row has none.
        row: its number in the dataset.
        kind: str or list, the kind of the rows before; None for the first.

    Returns:
        The kind with this row.

    Raises:
        AnatomyError: something else; names row and column.
    """
    for column, value in values.items():
        if value is None:
            continue
        problem = _no_messages(value) if isinstance(value, list) else None if isinstance(value, str) else _what(value)
        if problem:
            raise AnatomyError(
                f"Dataset row {row}, column {column!r}: found {problem}, allowed: text, or a list of messages "
                "{role: text, content: text}."
            )
        if kind not in (None, type(value)):
            raise AnatomyError(
                f"Dataset row {row}, column {column!r}: found {'messages' if kind is str else 'text'}, but what stands "
                f"before it is {'text' if kind is str else 'messages'}; allowed: one of the two in all rows."
            )
        kind = type(value)
    return kind


def _no_messages(value: list[Any]) -> str | None:
    """What is wrong with a list of messages, in a few words."""
    for message in value:
        if not isinstance(message, Mapping):
            return f"{_what(message)} among the messages"
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            return f"a message whose role is {_what(role)}"
        if isinstance(content, list):
            if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str | None) for part in content):
                return "a message with a part whose text is no text"
            if others := [part["type"] for part in content if part.get("type") not in (None, "text")]:
                return f"a message with a part of the type {_what(others[0])}; only text can be read"
        elif not isinstance(content, str | None):
            return f"a message whose content is {_what(content)}"
    return None


def _what(value: Any) -> str:
    if value is None:
        return "nothing"
    return repr(value)[:40] if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def flatten_text(value: Any) -> str:
    """Text of a string or of a list of messages: contents (text parts) and tool calls, one per line.

    >>> flatten_text([{"role": "user", "content": "Hi."}, {"role": "assistant", "content": [{"text": "Hello."}]}])
    'Hi.\\nHello.'
    """
    if value is None or isinstance(value, str):
        return value or ""
    lines = []
    for message in value:
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = "".join(part.get("text") or "" for part in content)
        lines.append(content or "")
        if message.get("tool_calls"):
            lines.append(json.dumps(message["tool_calls"], default=str, ensure_ascii=False))
    return "\n".join(line for line in lines if line)


def usable_rows(dataset: Dataset) -> tuple[np.ndarray, dict[str, int]]:
    """Which raw rows have two responses that are not blank.

    Args:
        dataset: preference rows, explicit (with a prompt) or implicit, text or conversations.

    Returns:
        (n_rows,) bool mask, and reason -> number of rows left out (reasons that did not occur are absent).

    Raises:
        AnatomyError: a needed column is missing, or the dataset is of another kind.
    """
    _check_columns(dataset)
    usable = np.fromiter(
        (all(flatten_text(side).strip() for side in sides) for sides in _responses(dataset)), bool, count=len(dataset)
    )
    n_empty = int((~usable).sum())
    return usable, {EMPTY: n_empty} if n_empty else {}


def _check_filled(dataset: Dataset, usable: np.ndarray) -> None:
    """Make sure that rows with a blank response have a prompt and two responses, if empty ones."""
    columns = [column for column in SPANS if column in dataset.column_names]
    rows = np.flatnonzero(~usable)
    for row, values in zip(rows.tolist(), dataset.select_columns(columns).select(rows), strict=True):
        for column in columns:
            if values[column] is None:
                raise AnatomyError(
                    f"Dataset row {row}, column {column!r}: found nothing, which TRL cannot train on; drop the row, or "
                    "fill it in."
                )


def _responses(dataset: Dataset) -> Iterator[tuple[Any, Any]]:
    columns = [column for column in SPANS if column in dataset.column_names]
    number, kind = 0, None
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            given = dict(zip(columns, values, strict=True))
            kind = check_kinds(given, number, kind)
            row = split_row(given)
            sides = row["chosen"], row["rejected"]
            if row["prompt"] is None and all(flatten_text(side).strip() for side in sides):
                raise AnatomyError(f"Dataset row {number}, column 'prompt': found nothing, allowed: text or messages.")
            yield sides
            number += 1


def check_rows(dataset: Dataset) -> None:
    if not isinstance(dataset, Dataset):
        raise AnatomyError(
            f"The data are a {type(dataset).__name__}; reading them needs a datasets.Dataset in rows: choose a split, "
            "and load it without streaming."
        )


def _check_columns(dataset: Dataset) -> None:
    check_rows(dataset)
    if problem := no_pairs(dataset.column_names):
        raise AnatomyError(problem)
    images = [column for column in ("image", "images") if column in dataset.column_names]
    if images:
        raise AnatomyError(f"The dataset has the column {images[0]!r}; pairs with images cannot be read, only text.")


def no_pairs(columns: Sequence[str]) -> str | None:
    """Why a dataset with these columns holds no preference pairs, and what to do; None where it does."""
    missing = [column for column in ("chosen", "rejected") if column not in columns]
    if not missing:
        return None
    if {"prompt", "completion", "label"} <= set(columns):
        kind = "it holds unpaired answers with a label (as `trl kto` takes them)"
    elif kinds := [word for word in ("completion", "messages", "text") if word in columns]:
        kind = f"it holds SFT data ('{kinds[0]}'): train on it with `trl sft`, audit it with --data_kind sft"
    else:
        kind = ""
    return (
        f"The dataset has no column {' and no column '.join(map(repr, missing))} (found: "
        f"{', '.join(columns) or 'none'}){kind and '; '}{kind}; preference data needs 'chosen' and 'rejected', and "
        "'prompt' unless both responses start with it."
    )


def read_pairs(
    dataset: Dataset,
    tokenizer: Any,
    *,
    max_length: int | None = 1024,
    truncation: str = "keep_start",
    num_proc: int | None = None,
    pool_special_tokens: bool = False,
    keep_blank: bool = False,
) -> Pairs:
    """Tokenise preference pairs exactly as TRL's trainers do.

    Sampled responses are not tokenised: with the columns `SAMPLED` a row's tokens are those that the model was given
    and those that it wrote, without a second rendering and without an end that it did not write.

    Args:
        dataset: preference rows: explicit or implicit prompt, text or conversations, with or without tools.
        tokenizer: the trainer's tokenizer or processor. It is not changed.
        max_length: the trainer's ``max_length``.
        truncation: ``"keep_start"`` / ``"keep_end"`` as in ``DPOConfig``; ``"drop"`` for the reward trainer.
        num_proc: processes that tokenise.
        pool_special_tokens: pool concepts over special tokens and what the template writes around answers as well.
        keep_blank: keep pairs with a blank response, on which the trainers train; audits leave them out.

    Returns:
        The pairs; rows left out are counted in ``left_out``.

    Raises:
        AnatomyError: missing columns, no usable row, no chat template, an unknown truncation; with `keep_blank` a row
            without a prompt or a response at all, which no trainer takes.
    """
    if truncation not in TRUNCATIONS:
        raise AnatomyError(f"truncation is {truncation!r}; allowed: {', '.join(TRUNCATIONS)}.")
    dataset = plain_rows(dataset) if isinstance(dataset, Dataset) else dataset
    usable, left_out = usable_rows(dataset)
    if not len(dataset):
        raise AnatomyError("The dataset has no usable row: it is empty. Give one that holds pairs.")
    if keep_blank:
        _check_filled(dataset, usable)
        left_out = {}
    elif not usable.any():
        raise AnatomyError(
            f"The dataset has no usable row: {len(dataset)} rows, {left_out.get(EMPTY, 0)} with an empty response. "
            "Every pair needs two responses that are not blank."
        )
    text_tokenizer = tokenizer_of(tokenizer)
    columns = [column for column in PAIR_COLUMNS if column in dataset.column_names]
    sampled = set(SAMPLED) <= set(dataset.column_names)
    kept = dataset.select_columns(list(SAMPLED) if sampled else columns).add_column("row", np.arange(len(dataset)))
    if not usable.all() and not keep_blank:
        kept = kept.select(np.flatnonzero(usable))
    n_kept = len(kept)
    if sampled:
        kept = _sampled_rows(kept, max_length if truncation == "keep_start" else None)
    else:
        kept = _tokenised_rows(kept, tokenizer, max_length, truncation, num_proc)
    if len(kept) < n_kept:
        left_out[FILLED] = n_kept - len(kept)
    if truncation == "drop" and max_length is not None and len(kept):
        lengths = {span: _lengths(kept, f"{span}_ids") for span in SPANS}
        fits = lengths["prompt"] + np.maximum(lengths["chosen"], lengths["rejected"]) <= max_length
        if not fits.all():
            left_out[_LONG] = int((~fits).sum())
            kept = kept.select(np.flatnonzero(fits))
    if not len(kept):
        told = ", ".join(f"{count} x {reason}" for reason, count in left_out.items())
        raise AnatomyError(
            f"The dataset has no usable row: {len(dataset)} rows, left out: {told}. Raise max_length ({max_length})."
        )
    pad = text_tokenizer.pad_token_id
    return Pairs(
        dataset=kept,
        raw=dataset,
        max_length=max_length,
        truncation=truncation,
        pad_token_id=text_tokenizer.eos_token_id if pad is None else pad,
        bos_token_id=text_tokenizer.bos_token_id,
        left_out=left_out,
        tokenizer=text_tokenizer,
        processing_class=tokenizer,
        pool_special_tokens=pool_special_tokens,
        blank=~usable[np.asarray(kept["row"], dtype=np.int64)] if keep_blank else None,
    )


def read_again(pairs: Pairs, dataset: Dataset, tokenizer: Any, *, num_proc: int | None = None) -> Pairs:
    """The tokens of changed rows of some pairs, read as those were, before truncation."""
    return pairs.read_again(dataset, tokenizer, num_proc)


def _sampled_rows(rows: Dataset, longest: int | None) -> Dataset:
    """Sampled rows under the names of TRL's columns, without those whose prompt fills `longest` tokens."""
    rows = rows.rename_columns({name: f"{span}_ids" for name, span in zip(SAMPLED, SPANS, strict=True)})
    return rows if longest is None else rows.select(np.flatnonzero(_lengths(rows, "prompt_ids") < longest))


def _tokenised_rows(
    rows: Dataset, tokenizer: Any, max_length: int | None, truncation: str, num_proc: int | None
) -> Dataset:
    """TRL's own columns, of rows of text or conversations; TRL leaves out rows whose prompt fills `max_length`."""
    text_tokenizer = tokenizer_of(tokenizer)
    if isinstance(rows[0]["chosen"], str):
        if text_tokenizer.eos_token is None:
            raise AnatomyError(
                "The tokenizer has no eos_token; TRL ends every response with it: set tokenizer.eos_token."
            )
    elif tokenizer.chat_template is None:
        raise AnatomyError(
            "The dataset holds conversations but the tokenizer has no chat_template: set one, or give "
            "chat_template_path."
        )

    if truncation == "drop":
        return reward_tokens(rows, tokenizer, num_proc=num_proc)
    return dpo_tokens(rows, tokenizer, max_length=max_length, truncation=truncation, num_proc=num_proc)


def decoded_rows(
    rows: list[dict[str, Any]], tokenizer: Any, truncation: str = "keep_start"
) -> list[tuple[str, str, str] | None]:
    """Decoded prompt and responses of rows with messages, special tokens included; None for rows that are refused."""
    text_tokenizer = tokenizer_of(tokenizer)
    if not rows:
        return []
    try:
        read = read_pairs(Dataset.from_list(rows), tokenizer, max_length=None, truncation=truncation)
    except AnatomyError as error:  # of a template that refuses some other text than the data's
        if len(rows) > 1:
            return [texts for row in rows for texts in decoded_rows([row], tokenizer, truncation)]
        warn_refused(error)
        return [None]
    found: list[tuple[str, str, str] | None] = [None] * len(rows)
    for i, row in enumerate(read.rows.tolist()):
        prompt, chosen, rejected = (decode_all(text_tokenizer, read.ids(i, span).tolist()) for span in SPANS)
        found[row] = prompt, chosen, rejected
    return found


def turn_starts(pairs: Pairs, tokenizer: Any, *, num_proc: int | None = None) -> np.ndarray:
    """Tokens of each prompt before the text of its last user turn; 0 for plain text.

    Found by tokenising the prompts again with other texts in that place: up to there the tokens are the same,
    whatever the chat template adds.

    Args:
        pairs: the pairs, as read with `tokenizer`.
        tokenizer: the trainer's tokenizer.
        num_proc: processes that tokenise.

    Returns:
        (n_raw_rows,) int64, before truncation; 0 also for rows that were left out or have no user turn.
    """
    starts = np.zeros(len(pairs.raw), dtype=np.int64)
    raw = pairs.raw.select(pairs.rows)
    if pairs.plain:
        return starts
    sides = ("completion",) if pairs.one_sided else ("chosen", "rejected")
    found = np.full(len(pairs), np.iinfo(np.int64).max)
    for text in OTHER_TEXTS:
        other = raw.map(
            _with_last_user_text,
            fn_kwargs={"text": text, "sides": sides},
            features=Features({**raw.features, "prompt": raw.features[sides[0]]}),
            num_proc=num_proc,
            desc="Finding user turns",
        )
        changed = read_again(pairs, other, tokenizer, num_proc=num_proc)
        for i in range(len(pairs)):
            found[i] = min(found[i], common_prefix(pairs.ids(i, "prompt"), changed.ids(i, "prompt")))
    has_turn = [any(message["role"] == "user" for message in split_row(row)["prompt"]) for row in raw]
    starts[pairs.rows] = np.where(has_turn, found, 0)
    return starts


def _with_last_user_text(row: Mapping[str, Any], text: str, sides: Sequence[str]) -> dict[str, Any]:
    row = split_row(row)
    messages = list(row["prompt"])
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is not None:
        messages[last] = with_text(messages[last], text)
    return {"prompt": messages, **{side: row[side] for side in sides}}


def _lengths(dataset: Dataset, column: str) -> np.ndarray:
    batches = dataset.select_columns([column]).with_format("arrow").iter(batch_size=4096)
    return np.concatenate([table[column].combine_chunks().value_lengths().to_numpy() for table in batches])
