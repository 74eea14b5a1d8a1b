"""Files that a reader never takes for whole when they are not, and arrays too large to keep in memory."""

import hashlib
import json
import math
import os
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from ..errors import AnatomyError
from . import storage

# Larger arrays lie in a file without a name: the system may take their pages back, and nothing is left of a killed run.
SCRATCH_BYTES = 128 << 20


def write_atomically(path: Path, data: bytes, *, send: bool = True) -> None:
    """Write `data` beside `path`, flush it to the disk, rename it into place, and send it if it is a file of a mirror.

    Args:
        send: False leaves the sending to the caller.
    Raises:
        AnatomyError: it cannot be written; what was there before is there still.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        storage.mark(path)
        partial.replace(path)
    except OSError as error:
        raise AnatomyError(_unwritten(path, error)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    if send:
        storage.send(path)


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        AnatomyError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AnatomyError(_unwritten(path, error)) from error


def check_writable(folder: Path) -> None:
    """Make a folder, and find out whether files can be written into it, or to its URL: before long work.

    Raises:
        AnatomyError: they cannot.
    """
    make_folder(folder)
    probe = folder / "probe.partial"
    write_atomically(probe, b"can be written\n")
    with suppress(AnatomyError):  # where nothing may be removed, it stays
        storage.remove(probe)


def _unwritten(path: Path, error: OSError) -> str:
    return (
        f"{path}: cannot be written ({error.strerror}). What was finished before is kept: make room, or see to the "
        "permissions, and start again."
    )


def keep(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a cache, or warn: without it a later run takes longer, but this one has its numbers."""
    try:
        make_folder(file.parent)
        write_atomically(file, sealed(tensors))
    except AnatomyError as error:
        warnings.warn(f"Not kept for later runs: {error}", stacklevel=2)


def remove_partial(folder: Path) -> None:
    """Remove what a killed process left of a file it was writing into `folder`."""
    for partial in folder.glob("*.partial"):
        partial.unlink(missing_ok=True)


def sealed(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file with a hash of its own numbers: the format alone notices a missing end, but no wrong byte."""
    digest = hashlib.sha256(save_tensors(dict(tensors))).hexdigest()
    return save_tensors(dict(tensors), metadata={"sha256": digest})


def unsealed(file: Path) -> dict[str, np.ndarray] | None:
    """What `sealed` wrote, or None where there is no such file or anything in it has changed."""
    try:
        if not file.is_file():
            storage.fetch(file)
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        tensors = load_tensors(data)
        same = header["__metadata__"]["sha256"] == hashlib.sha256(save_tensors(tensors)).hexdigest()
        return tensors if same else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):
        return None


def without_nan(value: Any) -> Any:
    """What `json.dumps` may be given: JSON knows neither NaN nor infinity, and strict readers stop at them.

    >>> without_nan({"a": (1.5, float("nan"))})
    {'a': [1.5, None]}
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def misfit(value: Any, shape: Any, place: str = "") -> str | None:
    """Where a value read from JSON is not of a shape, in a few words; None where it is.

    Args:
        value: what `json.loads` gave.
        shape: a type (True is no number, and a whole number is a float); a list of one shape, for lists; a mapping of
            keys that must be there; or {str: shape}, for a mapping of any keys.

    >>> misfit({"rows": [1, "2"]}, {"rows": [int]}), misfit({}, {str: int}), misfit({}, {"n": int})
    ("rows[1] is '2'", None, 'n is missing')
    """
    if isinstance(shape, type):
        kinds = (int, float) if shape is float else (shape,)
        if isinstance(value, kinds) and (shape is bool or not isinstance(value, bool)):
            return None
        return f"{place or 'it'} is {repr(value)[:40]}"
    if not isinstance(value, type(shape)):
        return f"{place or 'it'} is {repr(value)[:40]}"
    if isinstance(shape, list):
        found = (misfit(item, shape[0], f"{place}[{i}]") for i, item in enumerate(value))
        return next((problem for problem in found if problem), None)
    if str in shape:
        shape = dict.fromkeys(value, shape[str])
    for key, inner in shape.items():
        here = f"{place}.{key}" if place else key
        problem = misfit(value[key], inner, here) if key in value else f"{here} is missing"
        if problem:
            return problem
    return None


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
