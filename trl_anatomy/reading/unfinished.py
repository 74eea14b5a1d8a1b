"""Parts of a file that is still being made, so that an interrupted pass goes on where it was."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from ..errors import AnatomyError
from . import storage
from .files import make_folder, sealed, unsealed, write_atomically

SAVE_SECONDS = 15.0  # a killed pass loses at most so much work


class Parts:
    """Parts of one file, beside it, each whole or taken for none; they stay on this machine.

    Args:
        file: the file that is made of them.
        key: hash of all that the parts depend on; parts under another are passed over.
    """

    def __init__(self, file: Path, key: str) -> None:
        self._folder, self._stem = file.parent, f"{file.stem}.part-"
        self._key = key[:16]
        self._n = 0

    def stored(self) -> Iterator[dict[str, np.ndarray]]:
        """Tensors of each whole part, in the order in which they were added."""
        for file in sorted(self._folder.glob(f"{self._stem}{self._key}-*.safetensors")):
            self._n = max(self._n, int(file.stem.rpartition("-")[2]) + 1)
            if (tensors := unsealed(file)) is not None:
                yield tensors

    def add(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Keep another part. Raises AnatomyError where it cannot be written."""
        make_folder(self._folder)
        name = f"{self._stem}{self._key}-{self._n:06d}.safetensors"
        write_atomically(self._folder / name, sealed(tensors), send=False)
        self._n += 1

    def clear(self) -> None:
        """Remove all parts, of other keys too: the file is whole."""
        for file in self._folder.glob(f"{self._stem}*.safetensors"):
            storage.remove(file)


def keep_part(parts: Parts, tensors: Mapping[str, np.ndarray]) -> None:
    """Keep another part of a cache, or warn: without it an interrupted run begins again."""
    try:
        parts.add(tensors)
    except AnatomyError as error:
        warnings.warn(f"Not kept for later runs: {error}", stacklevel=2)


@contextmanager
def saving(save: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """A scope in which work is saved from time to time, and when it is interrupted or fails.

    Args:
        save: keeps what was done since it was last called.

    Yields:
        What is to be called after each piece of work.
    """
    saved = time.monotonic()

    def done() -> None:
        nonlocal saved
        if time.monotonic() - saved > SAVE_SECONDS:
            save()
            saved = time.monotonic()

    try:
        yield done
    except BaseException:
        with suppress(AnatomyError):  # the first error is the one to tell
            save()
        raise
