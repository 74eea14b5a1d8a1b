"""Labelled responses for a trait, from contrasting system prompts: the local model answers, a judge sorts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from .. import __version__
from ..errors import AnatomyError
from ..reading.chat import ChatEndpoint
from ..reading.files import write_atomically
from ..reading.fingerprint import hash_json, model_key
from ..reading.prompts import ChatPrompt, encode_prompt
from ..reading.spans import SAMPLED_RESPONSE
from ..reading.storage import fetch
from .rollouts import Response, rollouts

if TYPE_CHECKING:
    from datasets import Dataset

Judge: TypeAlias = Callable[[Sequence[tuple[str, str]]], Sequence[float | None]]
"""(question, response) pairs -> how strongly each response shows the trait, 0 to 100; None where it cannot tell."""


class Generate(Protocol):
    """Samples responses to conversations, such as `VllmRollouts`."""

    def __call__(
        self,
        conversations: Sequence[list[dict[str, Any]]],
        *,
        n_per_prompt: int,
        max_new_tokens: int,
        temperature: float,
        seed: int,
    ) -> Sequence[Sequence[str]]:
        """`n_per_prompt` response texts to each conversation, in their order.

        A conversation is a `ChatPrompt` that carries its tokens; a text that is a `Response` keeps those it sampled.
        """


_MIDDLE = 50.0
_RUBRIC = """\
Rate how strongly the response shows this trait: {trait}
Question:
{question}

Response:
{response}

Answer with one whole number from 0 (not at all) to 100 (as strongly as can be), and nothing else."""


def persona_rows(  # noqa: C901, PLR0913
    model: Any,
    tokenizer: Any,
    positive: Sequence[str],
    negative: Sequence[str],
    questions: Sequence[str],
    judge: Judge,
    *,
    n_per_question: int = 1,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    temperature: float = 1.0,
    seed: int = 0,
    generate: Generate | None = None,
    store: Path | None = None,
) -> Dataset:
    """Responses with and without a trait, ready for ``read_examples`` and ``fit_concept(scorer="direction")``.

    Every question is answered under every system prompt. Kept are responses to a positive one that the judge rates 50
    or more, and responses to a negative one that it rates 50 or less (published: five prompts a side, 240 questions).

    Args:
        model: the start model.
        tokenizer: its tokenizer, with a chat template that takes a system message.
        positive, negative: system prompts that ask for the trait, and for its opposite or absence.
        questions: user turns that give the trait an occasion.
        judge: rates (question, response) pairs.
        n_per_question: responses to each question under each system prompt.
        max_new_tokens, batch_size, temperature, seed: as in `rollouts`.
        generate: samples the responses; None for transformers and `model`.
        store: folder that keeps the responses (``answers-KEY.jsonl``) and their ratings (``rated-KEY.jsonl``) under a
            key of all that they depend on, so that another call neither samples nor asks again. Kept is only what has
            a name: a `generate` or a judge that is no dataclass is asked every time.

    Returns:
        Columns `prompt` (messages), `response`, `label` (1 positive, 0 negative), `rating`; and `SAMPLED_RESPONSE`, the
        tokens as they were sampled, where `generate` gives them for all.

    Raises:
        AnatomyError: no chat template, nothing to ask, a judge that answers otherwise than asked, or no response left
            on a side.

    Source: method.md section 9.
    """
    from datasets import Dataset

    if not positive or not negative or not questions:
        raise AnatomyError("A persona needs at least one positive and one negative system prompt and one question.")
    if tokenizer.chat_template is None:
        raise AnatomyError("The tokenizer has no chat_template; system prompts need one: set tokenizer.chat_template.")
    asked: list[tuple[int, list[dict[str, Any]], str]] = [
        (label, [{"role": "system", "content": system}, {"role": "user", "content": question}], question)
        for label, systems in ((1, positive), (0, negative))
        for system in systems
        for question in questions
    ]
    conversations = [ChatPrompt(messages, ids=encode_prompt(tokenizer, messages)) for _, messages, _ in asked]
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    answers_file = rated_file = None
    if store is not None and (generate is None or is_dataclass(generate)):
        made_from = [
            asked,
            SAMPLED_RESPONSE,
            n_per_question,
            sampling,
            batch_size,
            tokenizer.chat_template,
            model_key(model),
        ]
        key = hash_json([__version__, "transformers" if generate is None else repr(generate), *made_from])
        answers_file = store / f"answers-{key}.jsonl"
        if is_dataclass(judge):
            rated_file = store / f"rated-{hash_json([key, repr(judge), _RUBRIC])}.jsonl"

    def sample() -> list[dict[str, Any]]:
        answers: Sequence[Sequence[str]]
        if generate is not None:
            answers = generate(conversations, n_per_prompt=n_per_question, **sampling)
        else:
            answers = rollouts(
                model, tokenizer, conversations, n_per_prompt=n_per_question, batch_size=batch_size, **sampling
            )
        if len(answers) != len(asked):
            raise AnatomyError(f"generate was given {len(asked)} conversations and answered {len(answers)}.")
        return [
            {"prompt": messages, "response": text, "label": label, "question": question, **_tokens(text)}
            for (label, messages, question), texts in zip(asked, answers, strict=True)
            for text in texts
            if text.strip()
        ]

    def rate() -> list[dict[str, Any]]:
        rows = _kept(answers_file, sample)
        ratings = list(judge([(row["question"], row["response"]) for row in rows]))
        if len(ratings) != len(rows):
            raise AnatomyError(f"The judge was given {len(rows)} responses and returned {len(ratings)} ratings.")
        wrong = [rating for rating in ratings if rating is not None and not 0 <= rating <= 100]
        if wrong:
            raise AnatomyError(f"The judge rated a response {wrong[0]!r}; allowed: 0 to 100, or None.")
        return [{**row, "rating": rating} for row, rating in zip(rows, ratings, strict=True)]

    rows = _kept(rated_file, rate)
    columns = ["prompt", "response", "label"]
    if all(name in row for row in rows for name in SAMPLED_RESPONSE):
        columns += SAMPLED_RESPONSE
    kept = [
        {**{name: row[name] for name in columns}, "rating": float(rating)}
        for row in rows
        if (rating := row["rating"]) is not None and (rating >= _MIDDLE if row["label"] else rating <= _MIDDLE)
    ]
    for label, side in ((1, "positive"), (0, "negative")):
        if not any(row["label"] == label for row in kept):
            n_asked = sum(row["label"] == label for row in rows)
            raise AnatomyError(
                f"None of {n_asked} responses to the {side} system prompts was rated on its side of 50: this "
                "model does not follow them, or the judge does not see the trait."
            )
    return Dataset.from_list(kept)


def _tokens(text: str) -> dict[str, list[int]]:
    if not isinstance(text, Response):
        return {}
    return dict(zip(SAMPLED_RESPONSE, (list(text.prompt_ids), list(text.ids)), strict=True))


def _kept(file: Path | None, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Rows of a file, or those that `make` gives, which are then written there."""
    if file is None:
        return make()
    fetch(file, own=True)
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):  # a file that is not there or broken costs the work again, nothing else
        rows = make()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


@dataclass(frozen=True)
class EndpointJudge:
    """A judge behind an OpenAI-compatible endpoint. Only a number is read from what it answers.

    Args:
        url: base of the API, such as ``http://localhost:8000/v1``.
        model: name of the model there.
        trait: what is rated, in a sentence.
        key_variable: environment variable that holds the key, if the endpoint wants one.
        timeout: seconds for one answer.

    Raises:
        AnatomyError: on use: an address that is not http(s), a key that is not set, an endpoint that refuses or does
            not answer.
    """

    url: str
    model: str
    trait: str
    key_variable: str | None = None
    timeout: float = 60.0

    def __call__(self, pairs: Sequence[tuple[str, str]]) -> list[float | None]:
        """Ratings in the order of the pairs; None where the answer holds no number from 0 to 100."""
        endpoint = ChatEndpoint(self.url, self.model, self.key_variable, self.timeout)
        endpoint.check()
        with ThreadPoolExecutor(endpoint.workers) as workers:
            return list(workers.map(lambda pair: self._rate(endpoint, pair), pairs))

    def _rate(self, endpoint: ChatEndpoint, pair: tuple[str, str]) -> float | None:
        question, response = pair
        said = endpoint.ask(_RUBRIC.format(trait=self.trait, question=question, response=response), max_tokens=8)
        number = re.fullmatch(r"\D*(\d{1,3})(?:\s*/\s*100)?\D*", said)
        return float(number[1]) if number and int(number[1]) <= 100 else None
