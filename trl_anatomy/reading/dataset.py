"""Datasets as every command reads them: a file, a folder, a URL, or a name on the hub."""

import csv
import difflib
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict
from datasets import load_dataset as load_from_hub  # the function itself, whatever stands in for it in `datasets`

from ..errors import AnatomyError
from .storage import exists, fetch, is_url, local, shown, url_of

_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_ENDINGS = ".json, .jsonl, .csv (also .gz), .parquet"
# Columns of a CSV file that are text even where they look like numbers, or like nothing ("None", "NA").
_TEXTS = ("prompt", "chosen", "rejected", "completion", "text", "response")


def load_rows(name: str, *, subset: str | None = None, split: str = "train") -> Dataset:
    """Load one split of a dataset.

    Args:
        name: a file (.json, .jsonl, .csv, also .gz; .parquet), a folder (saved by datasets, or of such files), the URL
            of either, or a name on the hub.
        subset: configuration name of a hub dataset.
        split: its split; files have ``"train"`` only.

    Raises:
        AnatomyError: nothing there, no row, a line that cannot be read, an unknown ending, a split that does not exist.
    """
    path = local(name)
    remote = url_of(path) is not None
    kind = _kind(path)
    # The loaders of datasets keep their copy of a file at a URL for ever, also when it has changed there, and refuse to
    # fetch one where the hub is switched off.
    if remote and not (exists(path) if kind is None else fetch(path, versioned=True)):
        raise AnatomyError(f"{name}: no such {'folder' if kind is None else 'file'}.")
    try:
        if remote and kind is None:
            rows = _split(datasets.load_from_disk(name), name, subset, split)
        elif path.is_file():
            if kind is None:
                raise AnatomyError(f"{path}: unknown kind of file, allowed: {_ENDINGS}.")
            _check_unsplit(name, "a file", subset, split)
            rows = _read_file(path, kind)
        elif _saved(path):
            rows = _split(datasets.load_from_disk(str(path)), name, subset, split)
        elif kind is not None and not path.exists():
            raise AnatomyError(f"{path}: no such file.")
        else:
            _refuse_audit(path)
            rows = load_from_hub(name, subset, split=split)
    except AnatomyError:
        raise
    except Exception as error:
        raise AnatomyError(_unread(name, path, error)) from error
    if isinstance(rows, Dataset) and not len(rows):
        raise AnatomyError(f"{name}: holds no rows; give a dataset that does.")
    return rows


def load_splits(path: str, name: str | None = None, *, split: str | None = None, **how: Any) -> Any:
    """Do what `datasets.load_dataset` does, and read what lies in files as `load_rows` does.

    TRL's scripts ask `datasets.load_dataset`, which takes no file and no folder that `save_to_disk` wrote.

    Returns:
        The dataset where `split` is named, else a dictionary of all its splits.
    Raises:
        AnatomyError: as `load_rows`, for what lies in files.
    """
    here = local(path)
    files = is_url(path) or _kind(here) is not None or here.is_file() or _saved(here)
    if not files or how.get("data_files") is not None or how.get("data_dir") is not None:
        _refuse_audit(here)
        try:
            return load_from_hub(path, name, split=split, **how)
        except Exception as error:  # of a file, of the hub, of a folder that is not there: what they raise is theirs
            raise AnatomyError(_unread(path, here, error)) from error
    if split is not None:
        found: Any = load_rows(path, subset=name, split=split)
    elif _saved(here) or (is_url(path) and _kind(here) is None):
        _check_unsplit(path, "a folder that datasets saved", name, "train")
        whole = datasets.load_from_disk(path)
        found = whole if isinstance(whole, DatasetDict) else DatasetDict({"train": whole})
    else:
        found = DatasetDict({"train": load_rows(path, subset=name)})
    if not how.get("streaming"):
        return found
    if isinstance(found, Dataset):
        return found.to_iterable_dataset()
    return datasets.IterableDatasetDict({key: rows.to_iterable_dataset() for key, rows in found.items()})


# Keys of a part of a mixture, as TRL's recipes write one.
_PART = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")


def check_mixture(parts: Any) -> None:
    """Check the parts of a mixture, `datasets:` in a recipe of TRL.

    Raises:
        AnatomyError: no list of parts with a path each, an unknown key, shares of some parts only, or below 0.
    """
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise AnatomyError("datasets: found no list of parts; write `- path: NAME` for each.")
    for number, part in enumerate(parts, start=1):
        for key in part:
            if key not in _PART:
                close = difflib.get_close_matches(str(key), _PART, n=1)
                meant = f" (did you mean '{close[0]}'?)" if close else ""
                raise AnatomyError(f"datasets, part {number}: unknown key '{key}'{meant}; allowed: {', '.join(_PART)}.")
        if not isinstance(part.get("path"), str):
            raise AnatomyError(f"datasets, part {number}: found no path; name the dataset.")
    shares = [part.get("fraction") for part in parts]
    if shares == [None] * len(parts):
        return
    if not all(isinstance(share, int | float) and not isinstance(share, bool) and share >= 0 for share in shares):
        raise AnatomyError("datasets: fraction is a number of at least 0, and goes with every part or with none.")
    if not sum(shares):
        raise AnatomyError("datasets: every fraction is 0; give one part a share.")


def load_mixture(parts: Sequence[Mapping[str, Any]]) -> Dataset:
    """Load a mixture of datasets row by row as TRL's scripts make it (`trl.get_dataset`).

    Args:
        parts: of each ``path`` (what `load_rows` takes) and maybe ``name``, ``data_dir``, ``data_files``, ``split``,
            ``columns`` and ``fraction``, its share of the mixture, which repeats no row.

    Raises:
        AnatomyError: as `check_mixture` and `load_rows`; columns that a part does not have or that do not agree.
    """
    check_mixture(parts)
    loaded = []
    for part in parts:
        where = {key: part[key] for key in ("data_dir", "data_files") if part.get(key) is not None}
        rows = load_splits(part["path"], part.get("name"), split=part.get("split") or "train", **where)
        if part.get("columns") is not None:
            if missing := [column for column in part["columns"] if column not in rows.column_names]:
                raise AnatomyError(
                    f"{part['path']}: found no column {', '.join(missing)} (has {', '.join(rows.column_names)})."
                )
            rows = rows.select_columns(part["columns"])
        loaded.append(rows)
    if parts[0].get("fraction") is not None:
        whole = sum(part["fraction"] for part in parts)
        weights = [part["fraction"] / whole for part in parts]
        total = min(len(rows) / weight for rows, weight in zip(loaded, weights, strict=True) if weight > 0)
        loaded = [rows.select(range(round(weight * total))) for rows, weight in zip(loaded, weights, strict=True)]
    try:
        return datasets.concatenate_datasets(loaded)
    except Exception as error:  # of columns that are of two kinds: what datasets raises is its own
        names = ", ".join(part["path"] for part in parts)
        raise AnatomyError(f"datasets: {names} cannot be put together ({str(error).splitlines()[0]}).") from error


def _kind(path: Path) -> str | None:
    return next((kind for end, kind in _FILES.items() if path.name.removesuffix(".gz").endswith(end)), None)


def _saved(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return path.is_dir() and ((path / "state.json").is_file() or (path / "dataset_dict.json").is_file())


def _refuse_audit(path: Path) -> None:
    """Refuse an audit folder, whose tables would be read as data."""
    if (path / "audit.json").is_file() and (path / "concepts.parquet").is_file():
        raise AnatomyError(f"{path}: is an audit folder; name the dataset that it was made of.")


def _read_file(path: Path, kind: str) -> Dataset:
    if not path.stat().st_size or (kind != "parquet" and _blank(path)):
        raise AnatomyError(f"{shown(path)}: the file is empty; write one row a line.")
    if kind == "csv":
        return _read_csv(path)
    with _uncounted():
        return load_from_hub(kind, data_files=str(path), split="train")


def _read_csv(path: Path) -> Dataset:
    """A CSV file: not by pandas, which takes the answers "None" and "NA" for nothing and "007" for a number."""
    from pyarrow.csv import ConvertOptions, ParseOptions, read_csv

    with _opened(path) as file:
        columns = next(csv.reader(file), [])
    texts = {column: pa.string() for column in columns if column in _TEXTS}
    table = read_csv(
        str(path),
        parse_options=ParseOptions(newlines_in_values=True),
        convert_options=ConvertOptions(column_types=texts, strings_can_be_null=False),
    )
    return Dataset(table)


def _opened(path: Path) -> Any:
    opened = gzip.open if path.name.endswith(".gz") else open
    return opened(path, "rt", encoding="utf-8-sig", newline="")


def _blank(path: Path) -> bool:
    try:
        with _opened(path) as file:
            return not any(line.strip() for line in file)
    except (OSError, EOFError, UnicodeDecodeError):  # told where it is read
        return False


def _unread(name: str, path: Path, error: Exception) -> str:
    """Why a dataset cannot be loaded; of JSON, in which line."""
    files = [path] if path.is_file() else sorted(path.rglob("*")) if path.is_dir() else []
    if problem := _json_problem(file for file in files if _kind(file) == "json"):
        return problem
    cause: BaseException = error.__cause__ if str(error).startswith("An error occurred") and error.__cause__ else error
    return f"dataset {name}: cannot be loaded ({(str(cause).strip().splitlines() or [type(cause).__name__])[0]})."


def _json_problem(files: Iterable[Path]) -> str | None:
    """The first line of these files that is no JSON object, or None."""
    for file in files:
        try:
            with _opened(file) as lines:
                first = lines.read(1 << 16).lstrip()[:1]
            with _opened(file) as lines:
                if first == "[":
                    if not json.load(lines):
                        return f"{shown(file)}: holds no rows; give a dataset that does."
                    continue
                for number, line in enumerate(lines, start=1):
                    if line.strip() and not isinstance(json.loads(line), dict):
                        return f"{shown(file)}, line {number}: found no JSON object; write one row a line."
        except json.JSONDecodeError as error:
            at = error.lineno if first == "[" else number
            return f"{shown(file)}, line {at}: not valid JSON ({error.msg}); mend that line, or take it out."
        except (OSError, EOFError, UnicodeDecodeError) as error:
            return f"{shown(file)}: cannot be read ({error})."
    return None


def _split(found: Any, name: str, subset: str | None, split: str) -> Dataset:
    """The split that is asked for, of what was loaded from disk."""
    if isinstance(found, Dataset):
        _check_unsplit(name, "a single dataset", subset, split)
        return found
    if split not in found:
        raise AnatomyError(f"{name}: found splits {', '.join(found)}, not {split!r}.")
    return found[split]


def _check_unsplit(name: str, what: str, subset: str | None, split: str) -> None:
    """Refuse to pass over a split or a subset that is asked for where there is none."""
    asked = {"split": (split, split != "train"), "subset": (subset, subset is not None)}
    for word, (value, given) in asked.items():
        if given:
            raise AnatomyError(
                f"setting dataset_{word}: found {value!r}, but {name} is {what}, which has none; leave it out, or name "
                "a folder with a file for each split."
            )


@contextmanager
def _uncounted() -> Iterator[None]:
    """Keep datasets from telling a server that one of its readers was used, which it does for local files too."""
    kept = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = kept
