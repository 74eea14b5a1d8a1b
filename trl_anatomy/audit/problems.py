"""Problems of preference data to know before training, with their rows (docs/reference/problems.md)."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import AnatomyError
from ..reading.copies import Copies
from ..reading.habits.counts import language
from ..reading.habits.parts import Parts
from ..reading.token_text import special_texts
from .endings import Endings, breaks_off
from .improbable import Improbable
from .near_copies import near_copies, plain
from .ties import find_ties

if TYPE_CHECKING:
    from datasets import Dataset

    from ..reading.spans import Pairs
    from .config import AuditConfig

TOKENS, EVAL, SCORES, CHOICE = "tokens", "eval", "scores", "choice"


@dataclass(frozen=True)
class Problem:
    """A kind of problem.

    Args:
        title: what rows of it are called, after their number.
        about: what is wrong with them, in one line.
        needs: what it takes to tell: `TOKENS` (a tokenizer), `EVAL` (an evaluation set), `SCORES` (columns with scores
            of both sides), `CHOICE` (habits that tell the choice beyond chance), or nothing.
    """

    title: str
    about: str
    needs: str = ""


PROBLEMS: Mapping[str, Problem] = {
    "copies": Problem("copies", "prompt and both responses are those of an earlier row"),
    "near_copies": Problem("near-copies", "same prompt, and both responses nearly those of an earlier row"),
    "reversed_copies": Problem(
        "reversed copies", "the same pair, or nearly, stands elsewhere with chosen and rejected the other way round"
    ),
    "same_sides": Problem("pairs with the same text on both sides", "chosen and rejected do not differ"),
    "same_after_cut": Problem(
        "pairs alike after truncation", "chosen and rejected differ only behind what max_length leaves", TOKENS
    ),
    "blank_sides": Problem("pairs with a blank side", "a response has no visible character"),
    "cut_sides": Problem(
        "pairs cut by max_length", "truncation takes away part of a response, or leaves out the pair", TOKENS
    ),
    "broken_off": Problem(
        "pairs with a response that breaks off",
        "a response ends within a word, a sentence, a list or a table, though max_length did not cut it",
    ),
    "template_text": Problem(
        "pairs with template text inside", "a response holds a special token or header, such as <|im_start|>"
    ),
    "extra_turns": Problem("pairs with turns inside", "a response goes on with turns of its own, such as “Human:”"),
    "open_fences": Problem("pairs with an unclosed code block", "a response opens a code block that it does not close"),
    "length_only": Problem("pairs that differ in length alone", "one response is the beginning of the other"),
    "other_language": Problem(
        "pairs in another language", "a response is in another language than its prompt, which asks for none"
    ),
    "ties": Problem("ties", "the dataset's own scores of both sides are equal", SCORES),
    "eval_prompts": Problem("prompts of the evaluation set", "the prompt stands in the evaluation set too", EVAL),
    "improbable_labels": Problem(
        "pairs whose label looks improbable",
        "given what decides most pairs, the other side would be chosen: look before you drop",
        CHOICE,
    ),
}
"""The kinds of problems by name, in the order of the page."""

_ROWS_AT_ONCE = 100
# Examples of a kind with their text; characters around and of the place.
N_EXAMPLES, AROUND, MATCHED = 3, 90, 120

PROBLEM_ROWS = pa.schema(
    [
        ("problem", pa.string()),
        ("row", pa.int64()),
        ("side", pa.string()),
        ("other_row", pa.int64()),
        ("example", pa.bool_()),
        *((name, pa.string()) for name in ("before", "match", "after")),
    ]
)
# Of improbable labels: place in the list, probability of the label, what speaks against it. Audits of earlier versions
# lack these; of other problems they are null, null and "".
RANKED = pa.schema([("rank", pa.int32()), ("probability", pa.float64()), ("why", pa.string())])

_SIDES = ("chosen", "rejected")
# White space and signs without a shape are not seen.
_SEEN = re.compile(r"[^\s\u00ad\u200b-\u200f\u2060\ufeff]")
_TEMPLATE = re.compile(
    r"<\|[A-Za-z][\w ./-]{0,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|\[/?INST\]|"
    r"<</?SYS>>|\[(?:PAD|BOS|EOS)\]|\A\s*<s>|</s>\s*\Z"
)
_TEMPLATE_NEEDS = (
    "<|",
    "<｜",
    "_of_turn>",
    "<bos",
    "<eos",
    "<pad",
    "<unk",
    "INST]",
    "SYS>>",
    "[PAD",
    "[BOS",
    "[EOS",
    "s>",
)
# One of these is in each of the above.
_TEMPLATE_SIGNS = "<>[]"
_HEADER = re.compile(r"^[ \t]*#{2,4}[ \t]*(?:Instruction|Response|Human|Assistant|User|System)[ \t]*:", re.MULTILINE)
_TURN = re.compile(r"^[ \t]*(?:Human|HUMAN|Assistant|ASSISTANT)[ \t]*:", re.MULTILINE)
_USER = re.compile(
    r"^\W{0,3}(?:User|USER)\W{0,2}:(?=[\s\S]*^\W{0,3}(?:Assistant|ASSISTANT|AI|Bot|Model)\W{0,2}:)", re.M
)
_FENCE = re.compile("`{3,}")
_AROUND_PROMPTS = " .,;:?!…\"'“”‘’`*"
# Role names that plain prompts carry.
_ROLES = re.compile(r"^\s*(?:human|user|assistant)\s*:\s*|\s*\b(?:assistant)\s*:\s*$", re.IGNORECASE)
# What languages and scripts are called in prompts, which want what they name; words of prompts that may want another.
_NAMES = {
    "English": r"english|inglés|anglais|englisch|inglese|inglês|английск\w*|英语|英語|영어",
    "Spanish": "spanish|español|espagnol|spanisch",
    "French": "french|français|francés|französisch",
    "German": "german|deutsch|alemán|allemand",
    "Portuguese": "portuguese|português",
    "Italian": "italian|italiano",
    "Dutch": "dutch|nederlands",
    "Polish": "polish|polski",
    "Swedish": "swedish|svenska",
    "Cyrillic": r"russian|ukrainian|bulgarian|serbian|русск\w*",
    "Chinese": "chinese|mandarin|cantonese|中文|汉语|漢語",
    "Japanese": "japanese|kanji|hiragana|日本語",
    "Hangul": "korean|한국어",
    "Arabic": "arabic|persian|farsi|urdu",
    "Devanagari": "hindi|marathi|nepali|sanskrit",
    "Greek": "greek",
    "Hebrew": "hebrew|yiddish",
}
_ANY_LANGUAGE = re.compile(
    r"(?i)translat|language|traduc|tradu[iz]|übersetz|перев[её]д|перевод|翻译|翻譯|翻訳|"
    r"\b(?:latin|turkish|vietnamese|thai|bengali|punjabi|panjabi|tamil|telugu|indonesian)\b"
)
# Letters and characters from which a language is told.
_LETTERS, _TOLD_FROM = 12, 1000
# Characters of a beginning that may end within a word: it was cut there.
_LONG = 8

Span = tuple[int, int]
Finder = Callable[[str], Span | None]


def looked_for(tokens: bool, evaluated: bool, scored: bool = False, told: bool = False) -> list[str]:
    """Names of the kinds that can be found.

    Args:
        tokens: whether a tokenizer was there.
        evaluated: whether an evaluation set was.
        scored: whether columns with scores of both sides were (`ties.score_columns`).
        told: whether habits or concepts tell the choice beyond chance (`improbable.improbable_labels`).
    """
    there = {"": True, TOKENS: tokens, EVAL: evaluated, SCORES: scored, CHOICE: told}
    return [name for name, problem in PROBLEMS.items() if there[problem.needs]]


def count_problems(table: pa.Table, kinds: Iterable[str]) -> dict[str, int]:
    """Rows of each of these kinds."""
    counted = dict(zip(*np.unique(np.array(table["problem"].to_pylist(), dtype=str), return_counts=True), strict=True))
    return {kind: int(counted.get(kind, 0)) for kind in kinds}


def problem_line(counts: Mapping[str, int]) -> str:
    """What was found, in one sentence, the most frequent kind first.

    >>> problem_line({"copies": 1200, "open_fences": 0, "template_text": 1})
    'Problems of the data: copies in 1,200 rows, template text in 1.'
    """
    found = sorted(((name, n) for name, n in counts.items() if n and name in PROBLEMS), key=lambda entry: -entry[1])
    if not found:
        return f"No problems of the data found ({len(counts)} kinds looked for)."
    told = [f"{name.replace('_', ' ')} in {n:,}" for name, n in found]
    told[0] += " row" if found[0][1] == 1 else " rows"
    return f"Problems of the data: {', '.join(told)}."


def rows_with(table: pa.Table, problem: str) -> np.ndarray:
    """(n,) int64 rows of the dataset that have a problem, ascending."""
    return np.sort(table.filter(pc.equal(table["problem"], problem))["row"].to_numpy())


def with_improbable(table: pa.Table, found: Improbable | None, rows: np.ndarray, raw: "Dataset") -> pa.Table:
    """A table of problems with the pairs whose label looks improbable, the least probable first; three are examples.

    Args:
        table: `find_problems` of the same dataset.
        found: `improbable_labels`.
        rows: (n_pairs,) row of each pair in the dataset.
        raw: the dataset.
    """
    if found is None:
        return table
    entries = []
    listed = zip(found.pairs.tolist(), found.probability.tolist(), found.why, strict=True)
    for rank, (pair, probability, why) in enumerate(listed, start=1):
        entry = {"problem": "improbable_labels", "row": int(rows[pair]), "side": "", "other_row": -1}
        entry |= {"example": rank <= N_EXAMPLES, "before": "", "match": "", "after": ""}
        if rank <= N_EXAMPLES:
            _, prompt, chosen, _ = _texts_of(raw.with_format(None)[entry["row"]])
            entry["after"] = _short((prompt if prompt.strip() else chosen).strip(), 2 * AROUND)
        entries.append(entry | {"rank": rank, "probability": probability, "why": why})
    return pa.concat_tables([table, pa.Table.from_pylist(entries, schema=table.schema)])


def ranked(table: pa.Table) -> pa.Table:
    """A table of problems that has the columns of `RANKED`; empty ones where an earlier version wrote none."""
    for field in RANKED:
        if field.name not in table.column_names:
            n = table.num_rows
            empty = pa.array([""] * n, pa.string()) if field.name == "why" else pa.nulls(n, field.type)
            table = table.append_column(field, empty)
    return table


def eval_prompts(config: "AuditConfig") -> frozenset[int] | None:
    """Keys of the prompts of the evaluation set that `config` names; None where it names none.

    Raises:
        AnatomyError: it cannot be read, or has no prompts.
    """
    from ..reading.columns import prompt_column
    from ..reading.dataset import load_rows
    from ..reading.spans import split_row

    if config.eval_dataset is None:
        return None
    subset = config.dataset_subset if config.eval_dataset == config.dataset else None
    rows = load_rows(config.eval_dataset, subset=subset, split=config.eval_split)
    names = [name for name in ("prompt", "question", "instruction", "messages") if name in rows.column_names]
    names = names or [name for name in (prompt_column(rows),) if name]
    if names:
        asked: Iterable[Any] = rows.select_columns(names[:1])[names[0]]
    elif {"chosen", "rejected"} <= set(rows.column_names):
        asked = (split_row(row)["prompt"] for row in rows.select_columns(["chosen", "rejected"]))
    else:
        raise AnatomyError(
            f"audit setting eval_dataset: {config.eval_dataset} has no column 'prompt' (found: "
            f"{', '.join(rows.column_names)}); name the column of its prompts so."
        )
    return frozenset(key for value in asked if (key := _prompt_key(value)) is not None)


def find_problems(raw: "Dataset", *, pairs: "Pairs | None" = None, evaluated: frozenset[int] | None = None) -> pa.Table:
    """Look for all problems in the rows of a preference dataset, in time and memory that grow with the rows.

    The text is the dataset's, since template text is what its tokens no longer show. With `pairs`, copies are those of
    the tokens that are trained on, and what truncation does is found too.

    Args:
        raw: the dataset, all rows, blank responses too.
        pairs: its pairs, where a tokenizer read them.
        evaluated: keys of the prompts of an evaluation set (`eval_prompts`).

    Returns:
        Table of schemas PROBLEM_ROWS and RANKED: a row for each kind and row of the dataset, kinds in the order of
        `PROBLEMS`; three of each kind are examples, and carry text. `other_row` is -1 where no other row is meant.
    """
    from ..reading.spans import PAIR_COLUMNS

    raw = (raw if pairs is None else pairs.raw).with_format(None)
    tied = find_ties(raw)
    raw = raw.select_columns([column for column in PAIR_COLUMNS if column in raw.column_names])
    special = _special_texts(pairs)
    finders = _finders(special)
    found: dict[str, list[tuple[int, str, int]]] = {kind: [] for kind in PROBLEMS}  # row, side, other row
    found["ties"] = [(row, "", -1) for row in tied.tolist()]
    prompts, hashes = np.zeros(len(raw), np.int64), np.zeros((len(raw), 2), np.int64)
    blank, endings = np.zeros(len(raw), bool), Endings()
    for row, (asked, prompt, *sides) in enumerate(_texts(raw)):
        for kind, side in _of_row(asked, sides, finders):
            found[kind].append((row, side, -1))
            blank[row] |= kind == "blank_sides"
        if not blank[row]:
            endings.add(row, sides)
        prompts[row] = _hash(_asks(prompt))
        hashes[row] = [_hash(f"{prompt.strip()}\0{side.strip()}") for side in sides]
        if evaluated and _prompt_key(asked) in evaluated:
            found["eval_prompts"].append((row, "prompt", -1))
    found["broken_off"] = [(row, _side(which), -1) for row, which in endings.found()]
    tokens = np.zeros(0, np.int64) if pairs is None else pairs.rows
    once = np.ones(len(raw), bool)
    if pairs is not None:
        _add_truncation(found, pairs, blank)
        _add_copies(found, tokens, pairs.copies, once)
    rows = np.setdiff1d(np.flatnonzero(~blank), tokens)  # those that truncation leaves out are known by their text
    if len(rows):
        _, group = np.unique(np.sort(hashes[rows], axis=1), axis=0, return_inverse=True)
        copies = Copies(group.reshape(-1), np.where(hashes[rows, 0] <= hashes[rows, 1], 1, -1))
        _add_copies(found, rows, copies, once)

    def read(wanted: np.ndarray) -> Iterator[tuple[str, str]]:
        return ((chosen, rejected) for _, _, chosen, rejected in _texts(raw.select(wanted)))

    def read_one(row: int) -> tuple[str, str]:
        return _texts_of(raw[row])[2:]

    for row, other, swapped in near_copies(prompts, read, read_one, once):
        found["reversed_copies" if swapped else "near_copies"].append((row, "", other))
        if swapped:
            found["reversed_copies"].append((other, "", row))
    return _table(found, raw, special)


def _texts(raw: "Dataset") -> Iterator[tuple[Any, str, str, str]]:
    """`_texts_of` every row."""
    for batch in raw.iter(batch_size=_ROWS_AT_ONCE):
        for values in zip(*batch.values(), strict=True):
            yield _texts_of(dict(zip(batch, values, strict=True)))


def _texts_of(row: Mapping[str, Any]) -> tuple[Any, str, str, str]:
    """Prompt as it is, and prompt, chosen and rejected text."""
    from ..reading.spans import flatten_text, split_row

    row = split_row(row)
    prompt, chosen, rejected = (flatten_text(row[span]) for span in ("prompt", *_SIDES))
    return row["prompt"], prompt, chosen, rejected


def _of_row(asked: Any, sides: list[str], finders: Mapping[str, Finder]) -> Iterator[tuple[str, str]]:
    """Kind and side of what is wrong with the text of one row."""
    hidden = [_SEEN.search(side) is None for side in sides]
    if any(hidden):
        yield "blank_sides", _side(hidden)
        return
    if sides[0].lstrip()[:1] == sides[1].lstrip()[:1]:
        plain_sides = [" ".join(side.split()) for side in sides]
        if plain_sides[0] == plain_sides[1]:
            yield "same_sides", "both"
        elif (short := _beginning(*plain_sides)) is not None:
            yield "length_only", _SIDES[short]
    for kind, find in finders.items():
        places = [find(side) is not None for side in sides]
        if any(places):
            yield kind, _side(places)
    other = _other_language(asked, sides)
    if any(other):
        yield "other_language", _side(other)


def _side(which: list[bool]) -> str:
    return "both" if all(which) else _SIDES[which.index(True)]


def _beginning(chosen: str, rejected: str) -> int | None:
    """Which side is the beginning of the other: 0, 1 or None. White space is that of `" ".join(text.split())`."""
    side = int(len(rejected) < len(chosen))
    short, long = (rejected, chosen) if side else (chosen, rejected)
    short = short.rstrip(" .…")
    if not short or not long.startswith(short):
        return None
    within = len(short) < len(long) and short[-1].isalnum() and long[len(short)].isalnum()
    return None if within and len(short) < _LONG else side


def _finders(special: tuple[str, ...]) -> dict[str, Finder]:
    """Kind -> where in a response it shows."""

    def template(text: str) -> Span | None:
        marked = any(map(text.__contains__, _TEMPLATE_SIGNS)) and any(map(text.__contains__, _TEMPLATE_NEEDS))
        if marked and (match := _TEMPLATE.search(text)):
            return match.span()
        for mark in special:
            if (start := text.find(mark)) >= 0:
                return start, start + len(mark)
        return _span(_HEADER.search(Parts(text).prose)) if "##" in text else None

    def turns(text: str) -> Span | None:
        if not any(map(text.__contains__, ("Human", "HUMAN", "ssistant", "SSISTANT", "User", "USER"))):
            return None
        prose = Parts(text).prose
        return _span(_TURN.search(prose) or _USER.search(prose))

    def fence(text: str) -> Span | None:
        fences = _FENCE.findall(text) if "```" in text else []
        start = text.rfind("```")
        return (start, start + 3) if len(fences) % 2 else None

    return {"template_text": template, "extra_turns": turns, "open_fences": fence}


def _span(match: re.Match[str] | None) -> Span | None:
    return None if match is None else match.span()


def _special_texts(pairs: "Pairs | None") -> tuple[str, ...]:
    """Special tokens that no text holds by chance."""
    known = {} if pairs is None else special_texts(pairs.tokenizer)
    return tuple(mark for mark in known.values() if len(mark) >= 5 and not mark.isalnum())


def _other_language(asked: Any, sides: list[str]) -> list[bool]:
    """Which sides are in another language than the prompt; where that does not tell, than the other side's English.

    A prompt that names a language wants it; one that speaks of languages at all may want any, unless the other side is
    in the prompt's. Languages of the Latin script other than English are not distinguished from one another.
    """
    tongues = [_told(side) for side in sides]
    if not any(tongues):
        return [False, False]
    prompt = _asked_text(asked)
    wanted = _told(prompt)
    if not wanted:
        plain_english = prompt.isascii() and len(prompt.split()) > 2
        wanted = "English" if plain_english or "English" in tongues else ""
    other = [bool(wanted and tongue and _differ(wanted, tongue)) for tongue in tongues]
    if not any(other):
        return other
    if wanted not in tongues and _ANY_LANGUAGE.search(prompt):
        return [False, False]
    named = [bool(re.search(rf"(?i)\b(?:{_NAMES.get(tongue, tongue)})", prompt)) for tongue in tongues]
    return [differs and not asked_for for differs, asked_for in zip(other, named, strict=True)]


def _told(text: str) -> str:
    """The language of the beginning of a text; empty where it is too short to tell."""
    text = text[:_TOLD_FROM]
    return language(text) if len(text) > 100 or sum(map(str.isalpha, text)) >= _LETTERS else ""


def _differ(one: str, other: str) -> bool:
    latin = ("Spanish", "French", "German", "Portuguese", "Italian", "Dutch", "Polish", "Swedish")
    mixed = ("Chinese", "Japanese")
    return one != other and not any(one in alike and other in alike for alike in (latin, mixed))


def _asked_text(asked: Any) -> str:
    """What the last user message asks; of a text, all of it."""
    from ..reading.spans import flatten_text

    if isinstance(asked, list):
        users = [message for message in asked if message.get("role") == "user"]
        return flatten_text(users[-1:] or asked)
    return flatten_text(asked)


def _prompt_key(asked: Any) -> int | None:
    """A number for what the users of a prompt ask, whatever its case, white space and role names; None if nothing."""
    from ..reading.spans import flatten_text

    if isinstance(asked, list):
        asked = [message for message in asked if message.get("role") == "user"] or asked
    text = flatten_text(asked) if isinstance(asked, str | list) else ""
    text = _asks(_ROLES.sub("", _ROLES.sub("", text)))
    return _hash(text) if text else None


def _asks(prompt: str) -> str:
    """A prompt whose case, white space and signs around it do not matter."""
    return plain(prompt).strip(_AROUND_PROMPTS) or plain(prompt)


def _hash(text: str) -> int:
    data = text.encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _add_truncation(found: dict[str, list[tuple[int, str, int]]], pairs: "Pairs", blank: np.ndarray) -> None:
    """Rows that are cut, those included of which nothing is left to train on, and pairs that are alike then."""
    from ..reading.spans import usable_rows

    left_out = np.setdiff1d(np.flatnonzero(~blank), pairs.rows)
    if len(left_out):
        left_out = left_out[usable_rows(pairs.raw.select(left_out))[0]]
    found["cut_sides"] += [(row, "both", -1) for row in left_out.tolist()]
    cut = np.stack([pairs.cut[side] for side in _SIDES], axis=1)
    same = {row for row, *_ in found["same_sides"]}
    for i in np.flatnonzero(cut.any(axis=1)).tolist():
        row = int(pairs.rows[i])
        found["cut_sides"].append((row, _side(cut[i].tolist()), -1))
        prompt, chosen, other, rejected = pairs.arrays(i)
        if row not in same and np.array_equal(chosen, rejected) and np.array_equal(prompt, other):
            found["same_after_cut"].append((row, "both", -1))


def _add_copies(
    found: dict[str, list[tuple[int, str, int]]], rows: np.ndarray, copies: Copies, once: np.ndarray
) -> None:
    """Rows that repeat an earlier one, and rows of pairs that stand both ways round; `once` is False at first rows."""
    once[rows[np.unique(copies.group, return_index=True)[1]]] = False
    _, first, which = np.unique(copies.identical, return_index=True, return_inverse=True)
    first = first[which.reshape(-1)]
    for i in np.flatnonzero(first < np.arange(len(rows))).tolist():
        found["copies"].append((int(rows[i]), "", int(rows[first[i]])))
    size = int(copies.group.max(initial=-1)) + 1
    ways = np.full((size, 2), -1, np.int64)
    at = copies.group, (copies.side < 0).astype(np.int64)
    for i in range(len(rows) - 1, -1, -1):
        ways[at[0][i], at[1][i]] = i
    for i in np.flatnonzero(ways.min(axis=1)[copies.group] >= 0).tolist():
        other = ways[at[0][i], 1 - at[1][i]]
        found["reversed_copies"].append((int(rows[i]), "", int(rows[other])))


def _table(found: dict[str, list[tuple[int, str, int]]], raw: "Dataset", special: tuple[str, ...]) -> pa.Table:
    made: dict[str, list[Any]] = {name: [] for name in PROBLEM_ROWS.names}
    for kind, entries in found.items():
        once = sorted({row: (row, side, other) for row, side, other in reversed(entries)}.values())
        shown = {once[k][0] for k in (0, len(once) // 2, len(once) - 1)} if once else set()
        for row, side, other in once:
            pieces = ("", "", "")
            if row in shown:
                pieces = _piece(kind, side, _texts_of(raw[row]), special)
            for name, value in zip(PROBLEM_ROWS.names, (kind, row, side, other, row in shown, *pieces), strict=True):
                made[name].append(value)
    return ranked(pa.table(made, schema=PROBLEM_ROWS))


def _piece(kind: str, side: str, texts: tuple[Any, str, str, str], special: tuple[str, ...]) -> tuple[str, str, str]:
    """Text before, in and after the place that shows a problem; of problems without a place, the text's beginning."""
    _, prompt, *sides = texts
    text = sides[side == "rejected"]
    span = _place(kind, text, special)
    if span is not None:
        start, end = span[0], min(span[1], span[0] + MATCHED)
        before = text[max(0, start - AROUND) : start]
        return ("… " if start > AROUND else "") + before, text[start:end], _short(text[end:])
    if kind == "length_only":
        other = sides[side != "rejected"]
        short, long = " ".join(text.split()).rstrip(" .…"), " ".join(other.split())
        before = short[-AROUND:]
        return ("… " if len(short) > AROUND else "") + before, _short(long[len(short) :]), ""
    if kind == "blank_sides":
        return "", "", ""
    asks_about = kind in ("copies", "near_copies", "reversed_copies", "eval_prompts", "ties")
    return "", "", _short((prompt if asks_about and prompt.strip() else text).strip(), 2 * AROUND)


def _place(kind: str, text: str, special: tuple[str, ...]) -> Span | None:
    """Where in a response a problem shows; None for those that have no place."""
    if kind == "broken_off":
        end = breaks_off(text)
        return None if end is None else (max(end.span[0], end.span[1] - AROUND), end.span[1])
    return finders[kind](text) if kind in (finders := _finders(special)) else None


def _short(text: str, n: int = AROUND) -> str:
    return text if len(text) <= n else f"{text[:n]} …"
