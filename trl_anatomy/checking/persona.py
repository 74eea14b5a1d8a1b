"""Labelled responses for a trait, from contrasting system prompts: the local model answers, a judge sorts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import AnatomyError
from ..reading.chat import ChatEndpoint
from .rollouts import rollouts

if TYPE_CHECKING:
    from datasets import Dataset

Judge: TypeAlias = Callable[[Sequence[tuple[str, str]]], Sequence[float | None]]
"""(question, response) pairs -> how strongly each response shows the trait, 0 to 100; None where it cannot tell."""

_MIDDLE = 50.0
_RUBRIC = """\
Rate how strongly the response shows this trait: {trait}
Question:
{question}

Response:
{response}

Answer with one whole number from 0 (not at all) to 100 (as strongly as can be), and nothing else."""


def persona_rows(
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

    Returns:
        Columns `prompt` (messages), `response`, `label` (1 positive, 0 negative), `rating`.

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
    answers = rollouts(
        model,
        tokenizer,
        [messages for _, messages, _ in asked],
        n_per_prompt=n_per_question,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
    )
    rows: list[dict[str, Any]] = [
        {"prompt": messages, "response": text, "label": label, "question": question}
        for (label, messages, question), texts in zip(asked, answers, strict=True)
        for text in texts
        if text.strip()
    ]
    ratings = list(judge([(row["question"], row["response"]) for row in rows]))
    if len(ratings) != len(rows):
        raise AnatomyError(f"The judge was given {len(rows)} responses and returned {len(ratings)} ratings.")
    wrong = [rating for rating in ratings if rating is not None and not 0 <= rating <= 100]
    if wrong:
        raise AnatomyError(f"The judge rated a response {wrong[0]!r}; allowed: 0 to 100, or None.")
    kept = [
        {"prompt": row["prompt"], "response": row["response"], "label": row["label"], "rating": float(rating)}
        for row, rating in zip(rows, ratings, strict=True)
        if rating is not None and (rating >= _MIDDLE if row["label"] else rating <= _MIDDLE)
    ]
    for label, side in ((1, "positive"), (0, "negative")):
        if not any(row["label"] == label for row in kept):
            n_asked = sum(row["label"] == label for row in rows)
            raise AnatomyError(
                f"None of {n_asked} responses to the {side} system prompts was rated on its side of 50: this "
                "model does not follow them, or the judge does not see the trait."
            )
    return Dataset.from_list(kept)


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
