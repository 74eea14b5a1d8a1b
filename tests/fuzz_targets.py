"""What the fuzzers feed: bytes become a policy, a dataset or a damaged audit folder; AnatomyError alone may come out.

Shared by `benchmarks/fuzz.py`, which looks for new inputs, and by `test_hostile.py`, which replays those it kept.
"""

import hashlib
import io
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from reading_world import TEMPLATE, build_tokenizer
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from trl_anatomy.audit.folder import TABLES, load_audit, write_audit
from trl_anatomy.audit.reopen import reopen
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.files import sealed, unsealed
from trl_anatomy.reading.sft import read_rows
from trl_anatomy.reading.spans import turn_starts
from trl_anatomy.shaping.policy import ConceptPolicy

CORPUS = Path(__file__).parent / "fuzz_corpus"


class Choices:
    """Decisions read off bytes, one after the other; when they are used up, the first option every time."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1] if self.at <= len(self.data) else 0

    def of(self, options: Any) -> Any:
        if not options:
            raise ValueError("nothing to choose from")
        return options[self.byte() % len(options)]

    def place(self, size: int) -> int:
        """A number below `size`, or 0."""
        return int.from_bytes(bytes(self.byte() for _ in range(3)), "little") % max(1, size)

    def text(self) -> str:
        """The next bytes as text, at most 40."""
        size = self.byte() % 41
        taken = self.data[self.at : self.at + size]
        self.at += size
        return taken.decode("utf-8", "replace")


@cache
def scratch() -> Path:
    """A folder in memory where there is one: the fuzzers write thousands of small files."""
    made = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    import atexit

    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def told(error: AnatomyError, outcome: str) -> str:
    """`outcome`, of an error that says something and is no page long."""
    assert 0 < len(str(error).strip()) < 100_000
    return outcome


# A policy


def policy(data: bytes) -> str:
    """Read `data` as a policy file; gives what became of it."""
    file = scratch() / "policy.yaml"
    file.write_bytes(data)
    try:
        found = ConceptPolicy.load(file)
    except AnatomyError as error:
        return told(error, "refused")
    assert isinstance(found.used, dict)
    for i, rule in enumerate(found.rules):
        found.held(rule)
        found.place(f"rules[{i}].where")
    return "read"


# A dataset

AWKWARD: tuple[Any, ...] = (
    "What is it? ",
    "Because it is.",
    "",
    " \n\t",
    "\x00\x01\x1b[31m\x7f",
    "‏שלום עולם‎ \u202etxet desrever\u202c",
    "{{ bos_token }}{% for x in y %}{{ raise_exception('x') }}",
    "</s><s><assistant></s>\n<pad>",
    "é\u0301\u200d👩‍👩‍👧\ufeff\uffff",
    "word " * 300,
    None,
    7,
    -0.5,
    True,
    [],
    ["a", "b"],
    {},
    {"role": "user"},
    float("nan"),
)
ROLES: tuple[Any, ...] = ("user", "assistant", "system", "tool", "", None, 3, "</s>")
KINDS = ("explicit", "implicit", "conversational", "completion", "messages", "text", "other")


def _value(choices: Choices) -> Any:
    return choices.text() if choices.byte() % 3 == 2 else choices.of(AWKWARD)


def _text(choices: Choices) -> Any:
    """Mostly text, so that most rows get as far as the tokenizer."""
    return _value(choices) if choices.byte() % 4 == 3 else choices.of(AWKWARD[:10])


def _messages(choices: Choices) -> Any:
    if choices.byte() % 8 == 7:
        return _value(choices)
    made: list[Any] = []
    for _ in range(choices.byte() % 4):
        odd = choices.byte() % 8
        message: dict[str, Any] = {"role": choices.of(ROLES[:3] if odd < 6 else ROLES), "content": _text(choices)}
        if odd == 7:
            message.pop(choices.of(("content", "role")))
        if odd == 5:
            message["content"] = [{"type": "text", "text": _text(choices)}, {"type": "image"}][: choices.byte() % 3]
        if odd == 6:
            message["tool_calls"] = choices.of(
                ([{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}], [], None, "f()")
            )
        made.append(message)
    return made


def rows(data: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of a dataset, and the settings that it is read with."""
    choices = Choices(data)
    settings = {
        "data_kind": choices.of(("pairs", "sft")),
        "max_length": choices.of((60, None, 1, 8, 1024)),
        "truncation": choices.of(("keep_start", "keep_end", "drop")),
    }
    kind = choices.of(KINDS)
    made = []
    for _ in range(1 + choices.byte() % 4):
        both = kind if choices.byte() % 8 else choices.of(KINDS)  # now and then a row of another kind
        row: dict[str, Any] = {}
        if both in ("explicit", "implicit"):
            row = {"chosen": _text(choices), "rejected": _text(choices)}
        if both == "explicit":
            row["prompt"] = _text(choices)
        if both == "conversational":
            row = {name: _messages(choices) for name in ("prompt", "chosen", "rejected")}
            if choices.byte() % 4 == 0:
                del row["prompt"]
        if both == "completion":
            part = _messages if choices.byte() % 2 else _text
            row = {"prompt": part(choices), "completion": part(choices)}
        if both == "messages":
            row = {"messages": _messages(choices)}
        if both == "text":
            row = {"text": _text(choices)}
        if both == "other":
            row = {choices.text(): _value(choices) for _ in range(choices.byte() % 3)}
        if choices.byte() % 8 == 7:
            row[choices.of(("tools", "chat_template_kwargs", "row", "image", "prompt_ids"))] = _value(choices)
        made.append(row)
    return made, settings


STRICT = (
    "{% for m in messages %}{% if m['role'] not in ('user', 'assistant') or m['content'] is not string or "
    "(m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m['role'] }}>{{ m['content'] + eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def tokenizer(strict: bool) -> Any:
    made = build_tokenizer()
    made.chat_template = STRICT if strict else TEMPLATE
    return made


def dataset(data: bytes) -> str:
    """Read rows made of `data` as the audit and the trainers read a dataset."""
    made, settings = rows(data[1:])
    try:
        raw = Dataset.from_list(made)
    except (pa.ArrowException, TypeError, ValueError, AttributeError, KeyError, OverflowError):
        return "not a dataset"  # rows of different types: nobody's dataset holds them
    with without_caches():
        return read_dataset(raw, settings, tokenizer(bool(data[:1]) and data[0] % 2 == 1))


@contextmanager
def without_caches() -> Iterator[None]:
    """Nothing is kept of thousands of datasets, and no bars are drawn for them; afterwards all is as it was."""
    caching, bars = datasets.is_caching_enabled(), not datasets.are_progress_bars_disabled()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if caching:
            datasets.enable_caching()
        if bars:
            datasets.enable_progress_bars()


def read_dataset(raw: Dataset, settings: Mapping[str, Any], tokenizer: Any) -> str:
    """Read all that is read of a dataset; gives what became of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pairs = read_rows(raw, tokenizer, **settings)
            if settings["data_kind"] == "pairs":
                turn_starts(pairs, tokenizer)
        except AnatomyError as error:
            return told(error, "refused")
    assert len(pairs) + sum(pairs.left_out.values()) == len(raw), "rows that are neither read nor counted"
    assert len(pairs.prompt_groups) == len(pairs)
    assert pairs.fingerprint
    for i in range(len(pairs)):
        assert all(isinstance(text, str) for text in pairs.texts(i))
        parts = pairs.tokens(i)
        assert settings["max_length"] is None or len(parts[0]) + len(parts[1]) <= settings["max_length"]
    return "read"


# An audit folder


@cache
def whole_folder() -> dict[str, bytes]:
    """Every file of a small audit folder, and a score cache beside them."""
    from audit_world import make_audit, make_world

    folder = scratch() / "whole"
    audit = make_audit(folder, make_world(n=120), samples=True)
    # Statistics of so few pairs are no one's concern here, the smaller the files the more of them are damaged a second.
    write_audit(folder, audit.info, audit.hypotheses.slice(0, 20), *_few(audit), audit.samples)
    (folder / "scores.safetensors").write_bytes(sealed({"scores": np.zeros((2, 120))}))
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def _few(audit: Any) -> tuple[pa.Table, pa.Table]:
    return pa.concat_tables([audit.concepts, audit.responses]), audit.pairs


HOSTILE: tuple[Any, ...] = (
    None,
    -1,
    0,
    10**30,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../../etc/passwd",
    "/etc/passwd",
    "\x00",
    "\ud800",
    [],
    {},
    True,
    ["x"],
    {"x": None},
    2**31,
    2**63,
    "<script>",
)


def _damage_json(content: bytes, choices: Choices) -> bytes:
    """One value of a JSON file, however deep, replaced or taken out."""
    tree = json.loads(content)
    place = tree
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return content
        key = keys[choices.place(len(keys))]
        if not isinstance(place[key], dict | list) or not place[key] or choices.byte() % 4 == 0:
            break
        place = place[key]
    if choices.byte() % 4 == 0:
        del place[key]
    else:
        place[key] = choices.of(HOSTILE)
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def _damage_table(content: bytes, choices: Choices) -> bytes:
    """A column of a table with other values of its own type, rows taken out, or another name."""
    table = pq.read_table(io.BytesIO(content))
    at = choices.place(table.num_columns)
    name, kind = table.column_names[at], table.schema.field(at).type
    odd: list[Any] = [None, -1, 2**31 - 1, 0, 10**9]
    if pa.types.is_string(kind):
        odd = [None, "", "T999", "A0", "x", "R-1", "\x00"]
    if pa.types.is_floating(kind):
        odd = [None, float("nan"), float("inf"), -1e300]
    if pa.types.is_list(kind):
        text = pa.types.is_string(kind.value_type)
        inner = ["T999", "", None] if text else [-1, 10**6, None, 0]
        odd = [None, [], [inner[0]], [inner[1]], [inner[2]], [inner[-1]] * 200]
    if pa.types.is_struct(kind) or (pa.types.is_list(kind) and pa.types.is_struct(kind.value_type)):
        odd = [None]
    values = table[name].to_pylist()
    what = choices.byte() % 8
    if what == 0:
        table = table.rename_columns([choices.text() if i == at else n for i, n in enumerate(table.column_names)])
    elif what == 1:
        table = table.slice(choices.place(table.num_rows))
    else:
        for _ in range(1 + choices.byte() % 3):
            if values:
                values[choices.place(len(values))] = choices.of(odd)
        try:
            table = table.set_column(at, table.schema.field(at), pa.array(values, kind))
        except (pa.ArrowException, OverflowError, TypeError):
            return content
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def _damage_tensors(content: bytes, choices: Choices) -> bytes:
    """A tensor of a safetensors file with another number in it, another shape or type, or none at all."""
    tensors = load_tensors(content)
    name = choices.of(sorted(tensors))
    what, values = choices.byte() % 5, tensors[name].copy()
    if what == 0:
        del tensors[name]
    elif what == 1:
        tensors[name] = values.reshape(-1)[: choices.place(values.size)]
    elif what == 2:
        tensors[name] = values.astype(choices.of((np.float32, np.int8, np.int64, np.float64)))
    elif values.size:
        odd = choices.of((-1, 2**15, 2**31 - 1, 0, float("nan")))
        with np.errstate(invalid="ignore"):
            values.reshape(-1)[choices.place(values.size)] = np.array(odd).astype(values.dtype)
        tensors[name] = values
    return save_tensors(tensors)


def damaged(data: bytes) -> dict[str, bytes]:
    """The files of a folder of which up to three are damaged."""
    choices, files = Choices(data), dict(whole_folder())
    for _ in range(1 + choices.byte() % 3):
        name = choices.of(sorted(whole_folder()))
        content = files.get(name, b"")
        what = choices.byte() % 10
        if what == 0:
            files.pop(name, None)
        elif what == 1:
            files[name] = content[: choices.place(len(content))]
        elif what == 2:
            files[name] = choices.of([files.get(other, b"") for other in sorted(files)])
        elif what == 3:
            at, run = choices.place(len(content)), choices.text().encode()
            files[name] = content[:at] + run + content[at + len(run) :]
        elif what == 4:
            at = choices.place(len(content))
            files[name] = content[:at] + bytes([choices.byte()]) + content[at + 1 :]
        else:
            try:
                if name.endswith(".json"):
                    files[name] = _damage_json(content, choices)
                elif name.endswith(".parquet"):
                    files[name] = _damage_table(content, choices)
                else:
                    files[name] = _damage_tensors(content, choices)
            except (
                ValueError,
                OSError,
                pa.ArrowException,
                SafetensorError,
            ):  # damaged beyond reading by what came before
                files[name] = content[::-1]
    if choices.byte() % 4:
        _seal(files)
    return files


def _seal(files: dict[str, bytes]) -> None:
    """Write the hashes of damaged files where the reader compares them, so that it reads on."""
    try:
        info = json.loads(files["audit.json"])
        for name in info["files"]:
            info["files"][name] = hashlib.sha256(files[name]).hexdigest()
        files["audit.json"] = json.dumps(info).encode("utf-8", "surrogatepass")
    except (ValueError, KeyError, TypeError):
        return
    try:
        manifest = json.loads(files["harvest/manifest.json"])
        for entry in manifest["shards"]:
            content = files[f"harvest/{entry['file']}"]
            entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        files["harvest/manifest.json"] = json.dumps(manifest).encode()
    except (ValueError, KeyError, TypeError):
        return


def folder(data: bytes) -> str:
    """Open an audit folder damaged as `data` says, and ask of it all that needs neither model nor dataset."""
    path = scratch() / "folder"
    files = damaged(data)
    for name in {*files, *whole_folder()}:
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name not in files:
            file.unlink(missing_ok=True)
        elif not file.exists() or file.read_bytes() != files[name]:
            file.write_bytes(files[name])
    unsealed(path / "scores.safetensors")
    try:
        audit = load_audit(path)
    except AnatomyError as error:
        return told(error, "refused")
    outcome = "read"
    asks: list[Callable[[], Any]] = [
        lambda: audit.check_kind("plan"),
        lambda: reopen(audit),
        lambda: audit.samples,
        lambda: [audit.features(name) for name in (*audit.concept_names, "T1", "R1", "T999")],
        lambda: [audit.rows_in(name) for name in ("B0", "B1", "A1")],
        audit.check_harvest,
        audit.disparity,
        lambda: audit.response_scores,
        lambda: audit.hypotheses_of(concept="T1"),
        lambda: audit.hypotheses_of(text="sea"),
        lambda: audit.hypotheses_of(row=int(audit.pairs["row"][0].as_py())),
        lambda: audit.trace("feature", "B1", "T1"),
        lambda: audit.trace("prompt", "A1", "R1"),
    ]
    for ask in asks:
        try:
            ask()
        except AnatomyError as error:
            outcome = told(error, "refused in part")
    return outcome


TARGETS: dict[str, Callable[[bytes], str]] = {"policy": policy, "dataset": dataset, "folder": folder}
assert set(TABLES) == {"hypotheses", "concepts", "pairs"}
