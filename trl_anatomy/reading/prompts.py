"""Prompts with all that a template is asked with, and their tokens as TRL's trainers make them.

A prompt is text or a conversation, and compares as one. What else decides its tokens travels with it: the row's tools
and `chat_template_kwargs`, and for prompts of audited pairs the very tokens that training puts before the responses.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..errors import AnatomyError
from ..versions import shared_prefix
from .preparation import common_prefix, split_row
from .processing import prompt_ids, text_tokenizer

# Two answers, of which no text begins with both: what a prompt keeps before one of them is its own.
_ANSWERS = ("0", "Z")


class TextPrompt(str):
    """A text to continue.

    Attributes:
        ids: its tokens in training, if they are known.
    """

    ids: tuple[int, ...] | None

    def __new__(cls, text: str, ids: Iterable[int] | None = None) -> "TextPrompt":
        made = super().__new__(cls, text)
        made.ids = None if ids is None else tuple(map(int, ids))
        return made


class ChatPrompt(list[dict[str, Any]]):
    """A conversation to answer.

    Equal to the list of its messages, and to another one that asks the template the same.

    Attributes:
        tools: JSON schemas of the row's tools, as the template gets them; None without.
        template_kwargs: the row's ``chat_template_kwargs``.
        ids: its tokens in training, if they are known.
    """

    def __init__(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        tools: Any = None,
        template_kwargs: Mapping[str, Any] | None = None,
        ids: Iterable[int] | None = None,
    ) -> None:
        super().__init__(messages)
        self.tools, self.template_kwargs = tools, dict(template_kwargs or {})
        self.ids = None if ids is None else tuple(map(int, ids))

    def __eq__(self, other: object) -> bool:
        same = list(self) == other if not isinstance(other, ChatPrompt) else _asked(self) == _asked(other)
        return bool(same)

    __hash__ = None


Prompt = str | list[dict[str, Any]]


def _asked(prompt: Prompt) -> list[Any]:
    if isinstance(prompt, str):
        return [str(prompt), None, {}]
    return [list(prompt), getattr(prompt, "tools", None), dict(getattr(prompt, "template_kwargs", {}))]


def prompt_key(prompt: Prompt) -> str:
    """What tells a prompt from others, as JSON: text or messages, tools and `chat_template_kwargs`.

    >>> messages = [{"role": "user", "content": "Why?"}]
    >>> prompt_key(messages) == prompt_key(ChatPrompt(messages)) != prompt_key(ChatPrompt(messages, tools=[]))
    True
    """
    return json.dumps(_asked(prompt), sort_keys=True)


def prompt_of(row: Mapping[str, Any], ids: Iterable[int] | None = None) -> Prompt:
    """The prompt of a dataset's row, as TRL reads its columns.

    Args:
        row: with ``prompt``, or with responses that begin with it; maybe ``tools`` (JSON or a list) and
            ``chat_template_kwargs``.
        ids: its tokens in training, if they are known.

    Returns:
        A `TextPrompt` or `ChatPrompt`.
    """
    prompt, tools = split_row(row)["prompt"], row.get("tools")
    if prompt is None or isinstance(prompt, str):
        return TextPrompt(prompt or "", ids)
    return ChatPrompt(
        prompt,
        tools=json.loads(tools) if isinstance(tools, str) else tools,
        template_kwargs=row.get("chat_template_kwargs"),
        ids=ids,
    )


def encode_prompt(processing_class: Any, prompt: Prompt) -> list[int]:
    """Tokens after which a model answers a prompt: those that training puts before a response.

    A prompt that carries its tokens has those. Others are tokenised as `DPOTrainer` does it: alone, with the generation
    prompt, and with an answer; what differs between the two is left out, such as the thought that the template of
    DeepSeek-R1 opens for generation alone, or a blank at the end of a text, which becomes a part of the answer's first
    token. A text that ends otherwise is taken as it stands: which answers would change its last token is not known.
    Before TRL 1.14 training leaves nothing out, so the prompt is its own tokens.

    Raises:
        AnatomyError: the tokenizer or its template refuses the prompt.
    """
    ids = getattr(prompt, "ids", None)
    if ids is not None:
        return list(ids)
    try:
        messages, tools, kwargs = _asked(prompt)
        alone = prompt_ids(processing_class, messages, tools=tools, **kwargs)
        if not shared_prefix() and not isinstance(messages, str):
            return alone
        if isinstance(messages, str) and not (shared_prefix() and messages[-1:].isspace()):
            end = text_tokenizer(processing_class).eos_token_id
            return alone[:-1] if alone[-1:] == [end] else alone
        kwargs["add_generation_prompt"] = False
        answered = [
            prompt_ids(processing_class, _with_answer(messages, answer), tools=tools, **kwargs) for answer in _ANSWERS
        ]
    except Exception as error:  # of a chat template or a tokenizer: what they raise is theirs
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise AnatomyError(
            f"The prompt {str(prompt)[:80]!r} cannot be tokenised ({type(error).__name__}: {reason}). Look at its "
            "roles and tools: a chat template may refuse them."
        ) from error
    return alone[: max(common_prefix(alone, whole) for whole in answered)]


def _with_answer(prompt: Prompt, answer: str) -> Prompt:
    return prompt + answer if isinstance(prompt, str) else [*prompt, {"role": "assistant", "content": answer}]
