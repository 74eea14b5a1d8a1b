"""The clock of chat templates: some write today's date into every prompt, and here it stands still where it has to.

transformers gives templates one clock, `strftime_now`, which asks the ``datetime`` of its own module. A processing
class that is `dated` renders with that clock stopped, one conversation at a time, in whatever process it is sent to.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from threading import RLock
from typing import Any

_CLOCK = "strftime_now"
_RENDER = "apply_chat_template"
_lock = RLock()  # the module's clock is one for all threads


def template_now() -> str:
    """What the clock of templates shows now, in seconds, as ISO 8601 without a time zone."""
    from transformers.utils import chat_template_utils

    return chat_template_utils.datetime.now().isoformat(timespec="seconds")


def dated(processing_class: Any, when: str | None) -> Any:
    """A tokenizer or processor whose chat template writes the date of `when`.

    Args:
        processing_class: it is not changed. One that is dated already gets the new date.
        when: as `template_now` gives it; None leaves the clock alone.

    Returns:
        A shallow copy that renders at `when`, also in other processes, and that datasets tells from one of another
        date in their caches; `processing_class` itself where `when` is None or its template reads no clock.
    """
    if when is None or not _reads_clock(processing_class):
        return processing_class
    made = copy.copy(processing_class)
    inner = vars(made).get("tokenizer")  # of a processor
    if inner is not None:
        made.tokenizer = dated(inner, when)
    setattr(made, _RENDER, _Dated(made, when))
    return made


def running(processing_class: Any) -> Any:
    """A tokenizer or processor whose chat template writes today's date; a shallow copy where it is `dated`."""
    if date_of(processing_class) is None:
        return processing_class
    made = copy.copy(processing_class)
    delattr(made, _RENDER)
    inner = vars(made).get("tokenizer")
    if inner is not None:
        made.tokenizer = running(inner)
    return made


def is_date(value: Any) -> bool:
    """Whether a value is a date as `dated` takes it."""
    try:
        datetime.fromisoformat(value)
    except (TypeError, ValueError):
        return False
    return True


def date_of(processing_class: Any) -> str | None:
    """The date that a processing class is `dated`; None where it shows today's or none."""
    render = getattr(processing_class, "__dict__", {}).get(_RENDER)
    return render.when if isinstance(render, _Dated) else None


def _reads_clock(processing_class: Any) -> bool:
    template = getattr(processing_class, "chat_template", None)
    texts = template.values() if isinstance(template, Mapping) else [template]
    own = any(isinstance(text, str) and _CLOCK in text for text in texts)
    inner = getattr(processing_class, "tokenizer", None)
    return own or (inner is not None and _reads_clock(inner))


class _Dated:
    """In the place of a method: renders as the class of its owner does, with the clock stopped."""

    def __init__(self, owner: Any, when: str) -> None:
        self.owner, self.when = owner, when

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _stopped(datetime.fromisoformat(self.when)):
            return getattr(type(self.owner), _RENDER)(self.owner, *args, **kwargs)


@contextmanager
def _stopped(when: datetime) -> Iterator[None]:
    from transformers.utils import chat_template_utils

    with _lock:
        clock = chat_template_utils.datetime
        chat_template_utils.datetime = _Stopped(clock, when)
        try:
            yield
        finally:
            chat_template_utils.datetime = clock


class _Stopped:
    """`datetime` of which only `now` is another."""

    def __init__(self, clock: Any, when: datetime) -> None:
        self._clock, self._when = clock, when

    def now(self, tz: Any = None) -> datetime:
        return self._when if tz is None else self._when.astimezone(tz)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._clock, name)
