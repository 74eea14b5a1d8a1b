"""A language model to ask: behind an OpenAI-compatible endpoint, or on this machine. A question in, a text out."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

from ..errors import AnatomyError

TRIES = 5
LONGEST_WAIT = 60.0
_RETRIED = (408, 429, 500, 502, 503, 504)
_LONGEST_ANSWER = 1 << 20


class TooLongError(AnatomyError):
    """The question does not fit into what the model can read at once."""


class _Stay(urllib.request.HTTPRedirectHandler):
    """An address that answers with another one is refused: the key would go there too."""

    def redirect_request(self, *_args: Any, **_named: Any) -> None:
        return None


@cache
def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(_Stay)


@dataclass(frozen=True)
class ChatEndpoint:
    """A model behind an OpenAI-compatible endpoint (``chat/completions``).

    A busy endpoint (408, 429, 5xx, no answer in time) is asked up to five times, after a wait that grows, or after the
    time that its Retry-After names, one minute at most.

    Args:
        url: base of the API, such as ``http://localhost:8000/v1``.
        model: name of the model there.
        key_variable: environment variable that holds the key, if the endpoint wants one; the key is kept nowhere.
        timeout: seconds for one answer.
    """

    url: str
    model: str
    key_variable: str | None = None
    timeout: float = 60.0
    kind: str = field(default="endpoint", init=False)
    workers: int = field(default=8, init=False)

    def check(self) -> None:
        """Make sure that it can be asked at all.

        Raises:
            AnatomyError: an address that is not http(s), or not of a host, or a variable for the key that is not set.
        """
        if not _is_address(self.url):
            raise AnatomyError(
                f"The endpoint's url is {self.url!r}; it begins with http:// or https:// and names a host, such as "
                "http://localhost:8000/v1."
            )
        if self.key_variable is not None and not self._key():
            raise AnatomyError(f"The environment variable {self.key_variable}, which is to hold the key, is not set.")

    def ask(self, text: str, *, max_tokens: int, temperature: float = 0.0, seed: int | None = None) -> str:
        """What the model answers to a user turn.

        Raises:
            TooLongError: the endpoint says that the question is too long for the model.
            AnatomyError: it refuses, cannot be reached, or does not answer like chat/completions.
        """
        self.check()
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if seed is not None:
            asked["seed"] = seed
        headers = {"Content-Type": "application/json"}
        if self.key_variable is not None:
            headers["Authorization"] = f"Bearer {self._key()}"
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/chat/completions", data=json.dumps(asked).encode(), headers=headers
        )
        for attempt in range(TRIES):
            wait = 0.5 * 3.0**attempt
            try:
                with _opener().open(request, timeout=self.timeout) as answer:
                    said = json.loads(answer.read(_LONGEST_ANSWER))["choices"][0]["message"]["content"]
                if said is not None and not isinstance(said, str):
                    raise TypeError
                return said or ""
            except urllib.error.HTTPError as error:
                wait = _asked_wait(error.headers.get("Retry-After"), wait)
                told = self._told(error)
                if error.code == 413 or (error.code == 400 and re.search("context|too long", told, re.IGNORECASE)):
                    raise TooLongError(f"The endpoint {self.url} refused: {error.code} {told}.") from None
                problem = f"refused: {error.code} {error.reason}{told and f' ({told})'}"
                if error.code not in _RETRIED:
                    raise AnatomyError(f"The endpoint {self.url} {problem}.") from None
            except (KeyError, IndexError, TypeError, ValueError) as error:
                problem = f"does not answer like chat/completions: {type(error).__name__}"
            except (OSError, http.client.HTTPException) as error:
                problem = f"cannot be reached: {error}"
            if attempt + 1 < TRIES:
                time.sleep(wait)
        raise AnatomyError(f"The endpoint {self.url} {problem}.")

    def _key(self) -> str:
        return os.environ.get(self.key_variable or "", "").strip()

    def _told(self, error: urllib.error.HTTPError) -> str:
        """The beginning of what an endpoint says about its refusal, on one line, without the key."""
        try:
            told = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            return ""
        if self.key_variable is not None:
            told = told.replace(self._key(), "***")
        return " ".join("".join(c if c.isprintable() else " " for c in told).split())[:200]


def _is_address(url: str) -> bool:
    """Whether this is an address of a host behind http(s).

    >>> [_is_address(url) for url in ("https://h/v1", "h:80", "http://:80", "http://h:x", "http://a b")]
    [True, False, False, False, False]
    """
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises for one that is no number
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and re.search(r"[\s\x00-\x1f]", url) is None


def _asked_wait(retry_after: str | None, otherwise: float) -> float:
    """Seconds that a Retry-After header asks to wait, at most a minute; it holds seconds or a date.

    >>> _asked_wait("2", 0.5), _asked_wait("3600", 0.5), _asked_wait(None, 0.5), _asked_wait("soon", 0.5)
    (2.0, 60.0, 0.5, 0.5)
    """
    if retry_after is None:
        return otherwise
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            date = parsedate_to_datetime(retry_after)
        except ValueError:
            return otherwise
        now = datetime.now(UTC)
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - now).total_seconds()
    return min(LONGEST_WAIT, max(0.0, seconds)) if seconds == seconds else otherwise


class LocalChat:
    """A chat model of transformers on this machine; greedy unless asked otherwise.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        name: what it is called in labels.
    Raises:
        AnatomyError: no chat template.
    """

    kind = "local"
    workers = 1

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.check(tokenizer, name)
        self._lm, self._tokenizer, self.model = model, tokenizer, name

    @staticmethod
    def check(tokenizer: Any, name: str) -> None:
        """Raise AnatomyError where a model with this tokenizer cannot be asked."""
        if tokenizer.chat_template is None:
            raise AnatomyError(f"model {name}: its tokenizer has no chat_template, so it cannot be asked anything.")

    def ask(self, text: str, *, max_tokens: int, temperature: float = 0.0, seed: int | None = None) -> str:
        """What the model answers to a user turn. Global random state is left alone.

        Raises:
            TooLongError: question and answer do not fit into the model's context.
        """
        import torch

        messages = [{"role": "user", "content": text}]
        ids = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        most = getattr(self._lm.config.get_text_config(), "max_position_embeddings", None)
        if most is not None and len(ids) + max_tokens > most:
            raise TooLongError(f"model {self.model}: a question of {len(ids)} tokens does not fit into {most}.")
        pad = self._tokenizer.pad_token_id
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        inputs = torch.tensor([ids], device=self._lm.device)
        with (
            torch.random.fork_rng(devices=[self._lm.device] if self._lm.device.type == "cuda" else []),
            torch.no_grad(),
        ):
            torch.manual_seed(seed or 0)
            output = self._lm.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_tokens,
                pad_token_id=self._tokenizer.eos_token_id if pad is None else pad,
                **sampling,
            )
        return self._tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
