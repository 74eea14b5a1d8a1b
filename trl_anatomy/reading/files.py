"""Writing files so that a reader never sees half of one, and arrays too large to keep in memory."""

import os
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import AnatomyError

# Larger arrays lie in a file without a name: the system may take their pages back, and nothing is left of a killed run.
SCRATCH_BYTES = 128 << 20


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, flush it to the disk, and rename it into place."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left of a file it was writing into `folder`."""
    for partial in folder.glob("*.partial"):
        partial.unlink(missing_ok=True)


def scratch_array(
    shape: tuple[int, ...], dtype: Any, folder: Path | None, order: Literal["C", "F"] = "C"
) -> np.ndarray:
    """An array of zeros, in memory if it is small, else in an unnamed file.

    Args:
        folder: where the file is made; None, or a folder that can not be written: the system's for temporary files.

    Raises:
        AnatomyError: no room on that disk.
    """
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if n_bytes <= SCRATCH_BYTES:
        return np.zeros(shape, dtype, order)
    writable = folder is not None and os.access(folder, os.W_OK)
    with tempfile.TemporaryFile(dir=folder if writable else None) as file:
        try:
            if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process without a word
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            return np.memmap(file, dtype, "w+", shape=shape, order=order)
        except OSError as error:
            where = folder if writable else tempfile.gettempdir()
            raise AnatomyError(
                f"{where}: no room for {n_bytes / 1e9:.1f} GB of scores while they are computed ({error.strerror}); "
                "make room, or move the audit folder to a larger disk."
            ) from error
