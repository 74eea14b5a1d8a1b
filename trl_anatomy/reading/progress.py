"""How far a pass has come and how long it will take: a bar on a terminal, a line every ten seconds elsewhere."""

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

FIRST_SECONDS, LINE_SECONDS = 2.0, 10.0


class Progress:
    """A pass over many things, shown on standard error; a pass of less than two seconds writes no line.

    Args:
        total: how many things; None where nothing is counted, and only the time is shown.
        what: what is done, such as "Reading pairs".
        unit: what the things are called, in the plural.
        work: what all of it costs, in any unit (tokens, say), so that the time left does not assume that a long text
            takes as long as a short one; None where each thing costs the same.
        show: False shows nothing.

    Attributes:
        done: things done.
        note: shown beside the count, such as how well it goes; no braces.
    """

    def __init__(
        self, total: int | None, what: str, unit: str = "", *, work: float | None = None, show: bool = True
    ) -> None:
        self.total, self.what, self.unit, self.done, self.note = total, what, unit, 0, ""
        self._work, self._spent, self._skipped = float((total or 0) if work is None else work), 0.0, 0.0
        self._began, self._shown = time.monotonic(), 0.0
        self._ended = threading.Event()
        self._bar: Any = None
        if not show or total == 0:
            self._ended.set()
        elif total is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            self._bar = tqdm(total=self._work, desc=what, bar_format=self._format())
        if not self._ended.is_set():
            threading.Thread(target=self._beat, daemon=True).start()

    def update(self, n: int = 1, *, work: float | None = None, skipped: bool = False) -> None:
        """Count `n` more things, which cost `work`; skipped ones were done before, and took no time now."""
        self.done += n
        self._advance(float(n if work is None else work), skipped)

    def begun(self, work: float) -> None:
        """Count work on things that are not finished yet; `update` counts the rest of it."""
        self._advance(float(work), skipped=False)

    def _advance(self, work: float, skipped: bool) -> None:
        self._spent += work
        self._skipped += work if skipped else 0.0
        if self._bar is not None:
            self._bar.bar_format = self._format()
            if skipped:
                self._bar.initial += work
                self._bar.n += work
            else:
                self._bar.update(work)

    def write(self, text: str) -> None:
        """Say something beside the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _count(self) -> str:
        note = f" {self.note}," if self.note else ""
        return note if self.total is None else f" {self.done} of {self.total} {self.unit},{note}"

    def _format(self) -> str:
        return f"{{desc}}: {{percentage:3.0f}}%|{{bar}}|{self._count()} {{elapsed}} gone, {{remaining}} left"

    def line(self) -> str:
        """What is shown where there is no terminal."""
        gone = time.monotonic() - self._began
        made = self._spent - self._skipped
        text = f"{self.what}:{self._count()} {_clock(gone)} gone"
        if made <= 0:
            return text
        return f"{text}, about {_clock(gone * max(0.0, self._work - self._spent) / made)} left"

    def _beat(self) -> None:
        while not self._ended.wait(0.5):
            if self._bar is not None:
                self._bar.refresh()
            elif time.monotonic() - max(self._began + FIRST_SECONDS - LINE_SECONDS, self._shown) >= LINE_SECONDS:
                self._shown = time.monotonic()
                print(self.line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End it."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._bar is not None:
            self._bar.close()
        elif self._shown and self.total is not None and self.done >= self.total:
            print(f"{self.what}:{self._count()} {_clock(time.monotonic() - self._began)} in all", file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    >>> _clock(7.4), _clock(3661)
    ('0:07', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
