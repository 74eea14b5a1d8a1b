"""What a chat template writes around the texts of messages, and those texts without it.

Text rules, terms and pages read the tokens of the trainers, decoded. In these a template has put headers before each
message and an end after it. Both are found by rendering a few conversations of the data again with marks in place of
their texts: what stands between the marks is the template's.
"""

import copy
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from .token_text import special_texts

THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold a thought, by the names that chat templates use."""

_MARK = re.compile(r"zq(\d+)qz")
_logger = logging.getLogger(__name__)

Spans = list[tuple[int, int]]
Conversation = Mapping[str, Any]
"""``prompt`` and ``response`` (lists of messages), maybe ``tools`` and ``chat_template_kwargs``."""


@dataclass(frozen=True)
class Frame:
    """Texts that a template writes around those of messages, special tokens included, longest first.

    Attributes:
        starts: before the first message of a prompt.
        turns: from the last text of a prompt to the first of an answer without thought and tool call.
        headers: the same of answers that begin otherwise, up to the last special token.
        between: from a message to the next.
        ends: after the last text of an answer.
        specials: special tokens of the tokenizer.
    """

    starts: tuple[str, ...] = ()
    turns: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    between: re.Pattern[str] | None = None
    ends: tuple[str, ...] = ()
    specials: re.Pattern[str] | None = None

    @property
    def reach(self) -> int:
        """Bytes of the longest text between prompt and answer; no fewer tokens."""
        return max((len(text.encode()) for text in (*self.turns, *self.headers)), default=0)

    def opening(self, text: str, before: str) -> str:
        """What the template opens an answer with.

        Args:
            text: all of the response, decoded with special tokens.
            before: the end of the prompt, decoded likewise: `reach` tokens or more.
        """
        found = ""
        for of, header in [(turn, False) for turn in self.turns] + [(header, True) for header in self.headers]:
            opening = of[_overlap(before, of) :]
            # A tag that opens a thought is written by the model; a channel's name between special tokens is not.
            if header and not (self.specials and self.specials.search(opening)):
                continue
            if not text.startswith(opening):
                opening = opening[: _alike(text, opening)]
                opening = opening[: len(opening) - len(opening.lstrip())]
            found = max(found, opening, key=len)
        return found

    def response_spans(self, text: str, start: int) -> Spans:
        """Parts of a decoded response that the model was asked to write, after its opening of `start` characters."""
        end = next((end for end in self.ends if text.endswith(end, start)), "")
        return self._parts(text, start, len(text) - len(end))

    def prompt_spans(self, text: str, first: str) -> Spans:
        """Parts of a decoded prompt that are texts of its messages.

        Args:
            text: all of the prompt, decoded with special tokens.
            first: the text of its first message, as the data have it.
        """
        stop = len(text) - max((_overlap(text, turn) for turn in (*self.turns, *self.headers)), default=0)
        start = next((start for start in self.starts if text.startswith(start)), "")
        parts = self._parts(text, min(len(start), stop), stop)
        if start or not self.starts:
            return parts
        # Tools or a date of its own stand before the first message.
        for i, (begin, end) in enumerate(parts):
            held = text[begin:end].rstrip()
            known = next((known for known in (first.rstrip(), first.strip()) if known and held.endswith(known)), "")
            if known:
                return [(begin + len(held) - len(known), end), *parts[i + 1 :]]
        return parts

    def _parts(self, text: str, start: int, stop: int) -> Spans:
        cuts = [match.span() for match in self.between.finditer(text, start, stop)] if self.between else []
        if self.specials:
            edges = [start, *(edge for cut in cuts for edge in cut), stop]
            cuts += [
                match.span()
                for begin, end in zip(edges[::2], edges[1::2], strict=True)
                for match in self.specials.finditer(text, begin, end)
            ]
            cuts.sort()
        edges = [start, *(edge for cut in cuts for edge in cut), stop]
        parts = zip(edges[::2], edges[1::2], strict=True)
        return [(begin, end) for begin, end in parts if text[begin:end].strip()]


def join(text: str, spans: Spans) -> str:
    """The parts of a text, one per line."""
    return "\n".join(text[begin:end] for begin, end in spans)


def kept_spans(spans: Spans, start: int, stop: int) -> Spans:
    """What of the parts lies within a range."""
    cut = ((max(begin, start), min(end, stop)) for begin, end in spans)
    return [(begin, end) for begin, end in cut if end > begin]


def joined_bounds(spans: Spans, bounds: np.ndarray) -> np.ndarray:
    """Where each token's characters are in the joined parts of a text.

    Args:
        spans: the parts.
        bounds: (n_tokens, 2) begin and end of each token's characters in the whole text.

    Returns:
        (n_tokens, 2) int64; begin and end are equal for a token outside the parts. Line breaks between parts belong to
        no token.
    """
    source = np.concatenate([np.zeros(0, np.int64), *(np.arange(begin, end) for begin, end in spans)])
    place = np.concatenate([np.zeros(0, np.int64), *(np.full(end - begin, i) for i, (begin, end) in enumerate(spans))])
    place = place + np.arange(len(source))  # in the joined text: a line break before each part but the first
    first, last = np.searchsorted(source, bounds[:, 0]), np.searchsorted(source, bounds[:, 1])
    found = np.zeros(bounds.shape, np.int64)
    inside = last > first
    found[inside, 0], found[inside, 1] = place[first[inside]], place[last[inside] - 1] + 1
    # Tokens without text keep their place, so that the order of begins is the order of tokens.
    after = np.append(place, place[-1] + 1 if len(place) else 0)
    found[~inside] = after[first[~inside]][:, None]
    return found


def special_tokens(tokenizer: Any, ids: Iterable[np.ndarray]) -> re.Pattern[str] | None:
    """Pattern of the special tokens of a tokenizer that are among some ids, which may be many."""
    known = special_texts(tokenizer)
    seen = np.zeros(max(known, default=0) + 1, dtype=bool)
    for part in ids:
        seen[part[part < len(seen)]] = True
    return _any_of(text for i, text in known.items() if seen[i])


def learn_frame(
    conversations: Iterable[Conversation],
    tokenise: Callable[[list[dict[str, Any]]], Sequence[tuple[str, str, str] | None]],
    specials: re.Pattern[str] | None,
) -> Frame:
    """Find what a template writes around messages, from the first conversation of every shape.

    Two conversations are of one shape if each message stands beside a message like one of the other's: of the same
    role, with the same fields filled, with or without tools, under the same ``chat_template_kwargs``.

    Args:
        conversations: prompts with a response; read once.
        tokenise: rows with ``prompt``, ``chosen``, ``rejected`` -> decoded prompt, chosen and rejected response of
            each, special tokens included; none for rows that the template refuses.
        specials: pattern of the special tokens.
    """
    rows = [_marked(conversation) for conversation in _one_of_each(conversations)]
    found: dict[str, set[str]] = {name: set() for name in ("starts", "turns", "headers", "between", "ends")}
    for (row, marks), texts in zip(rows, tokenise([row for row, _ in rows]), strict=True):
        if texts is not None:
            calls = {i for i, m in enumerate([*row["prompt"], *row["rejected"]]) if m.get("tool_calls")}
            _read_marks(texts, marks, calls, specials, found)
    longest_first = {name: tuple(sorted(values - {""}, key=lambda v: (-len(v), v))) for name, values in found.items()}
    between = _any_of(longest_first.pop("between"))
    return Frame(**longest_first, between=between, specials=specials)


@dataclass(frozen=True)
class _Mark:
    message: int
    answers: bool  # stands in the response


@dataclass
class _Shapes:
    whole: set[Any] = field(default_factory=set)
    parts: set[Any] = field(default_factory=set)


def _one_of_each(conversations: Iterable[Conversation]) -> Iterator[Conversation]:
    seen = _Shapes()
    for conversation in conversations:
        prompt, response = conversation["prompt"], conversation["response"]
        set_up = (
            json.dumps(conversation.get("chat_template_kwargs"), sort_keys=True, default=str),
            bool(conversation.get("tools")),
        )
        units = [
            (m["role"], *(_has_text(m.get(name)) for name in ("content", *THOUGHTS)), bool(m.get("tool_calls")))
            for m in (*prompt, *response)
        ]
        whole = (set_up, len(prompt), *units)
        if whole in seen.whole:
            continue
        seen.whole.add(whole)
        last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=0)
        ends = [None, *units, None]
        parts = {
            (set_up, before, after, i > last, (i > len(prompt)) - (i < len(prompt)))
            for i, (before, after) in enumerate(pairwise(ends))
        }
        if not parts <= seen.parts:
            seen.parts |= parts
            yield conversation


def _has_text(content: Any) -> bool:
    if isinstance(content, Sequence) and not isinstance(content, str):
        return any((part.get("text") or "").strip() for part in content)
    return bool(content and content.strip())


def _marked(conversation: Conversation) -> tuple[dict[str, Any], list[_Mark]]:
    """A row with marks for texts: its own answer as rejected, and as chosen one without thought and tool call."""
    marks: list[_Mark] = []

    def mark(text: Any, message: int, answers: bool) -> Any:
        if not _has_text(text):
            return text
        if not isinstance(text, str):
            return [{**part, "text": mark(part.get("text"), message, answers)} for part in text]
        marks.append(_Mark(message, answers))
        return f"zq{len(marks) - 1}qz"

    sides: dict[str, list[dict[str, Any]]] = {}
    number = 0
    for name in ("prompt", "response"):
        sides[name] = []
        for given in conversation[name]:
            message = dict(given)
            for key in (*THOUGHTS, "content"):
                if key in message:
                    message[key] = mark(message[key], number, name == "response")
            sides[name].append(message)
            number += 1
    plain = copy.deepcopy(sides["response"])
    if plain and plain[0]["role"] == "assistant":
        content = mark("plain", len(sides["prompt"]), True)
        parts = plain[0].get("content")
        if isinstance(parts, list):
            parts = [{**part, "text": content if i == 0 else part.get("text") and ""} for i, part in enumerate(parts)]
        # A key that the message has not is not the same to a template as one that holds nothing
        kept = {k: v for k, v in plain[0].items() if k not in (*THOUGHTS, "tool_calls")}
        plain = [kept | {"content": parts if isinstance(parts, list) and parts else content}]
    row = {"prompt": sides["prompt"], "chosen": plain, "rejected": sides["response"]}
    for key in ("tools", "chat_template_kwargs"):
        if conversation.get(key) is not None:
            row[key] = conversation[key]
    return row, marks


def _read_marks(
    texts: tuple[str, str, str],
    marks: list[_Mark],
    calls: set[int],
    specials: re.Pattern[str] | None,
    found: dict[str, set[str]],
) -> None:
    """Add what stands around the marks of one row; what a tool call stands in is no header."""
    prompt, chosen, rejected = texts
    for text, own in ((prompt + chosen, False), (prompt + rejected, True)):
        at = [
            (match.start(), match.end(), marks[int(match[1])])
            for match in _MARK.finditer(text)
            if int(match[1]) < len(marks)
        ]
        if not at:
            continue
        if not at[0][2].answers:
            found["starts"].add(text[: at[0][0]])
        elif not own:  # a prompt without a text of its own
            found["turns"].add(text[: at[0][0]])
        for (_, begin, before), (end, _, after) in pairwise(at):
            gap = text[begin:end]
            if any(before.message <= call < after.message for call in calls):
                continue
            if before.answers == after.answers:
                header = _separator(gap, before.message != after.message, specials)
                found["between"] |= {header, _first_line(header, specials)}
            elif not own or gap in found["turns"]:
                found["turns"].add(gap)
            else:
                found["headers"].add(_through_last(gap, specials))
        last = at[-1][2]
        if last.answers and not (own and any(call >= last.message for call in calls)):
            found["ends"].add(text[at[-1][1] :])


def _separator(gap: str, messages: bool, specials: re.Pattern[str] | None) -> str:
    """What of the text between two marks is a header: from the first special token on."""
    first = specials.search(gap) if specials else None
    if first is not None:
        return gap[first.start() :] if gap[: first.start()].strip() else gap
    return gap if messages and gap.strip() else ""


def _first_line(header: str, specials: re.Pattern[str] | None) -> str:
    """A header without what it opens an answer with, such as an empty thought: up to its first line break."""
    last = len(_through_last(header, specials))
    return header[: header.index("\n", last) + 1] if last and "\n" in header[last:] else ""


def _through_last(gap: str, specials: re.Pattern[str] | None) -> str:
    last = max((match.end() for match in specials.finditer(gap)), default=0) if specials else 0
    return gap[:last]


def _overlap(text: str, following: str) -> int:
    """How many characters of `following` the text already ends with."""
    return next((n for n in range(min(len(text), len(following)), 0, -1) if text.endswith(following[:n])), 0)


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    ordered = sorted({text for text in texts if text}, key=lambda v: (-len(v), v))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def common_part(text: str, part: str, *, end: bool) -> tuple[int, int]:
    """Range of a text that its part, decoded by itself, stands for: its end or its beginning, in whole characters."""
    if end:
        return len(text) - _alike(text[::-1], part[::-1]), len(text)
    return 0, _alike(text, part)


def _alike(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def warn_refused(error: Exception) -> None:
    """Say that a template refused a probe, so that what it writes around such messages stays in the texts."""
    _logger.warning(
        "The chat template refuses a conversation of the data with other texts in it (%s); what it writes around such "
        "messages stays in the texts that rules read.",
        error,
    )
