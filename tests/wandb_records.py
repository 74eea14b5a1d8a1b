"""Reads back what W&B wrote in offline mode: the records of a `.wandb` file, whose checksums are verified.

W&B 0.31 has no reader in Python. The file is a LevelDB log: a header of 7 bytes, then blocks of 32 KiB holding chunks
of (crc32 of type and data, length, type, data), type 1 a whole record, 2, 3 and 4 its first, middle and last part.
"""

import json
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, HEADER = 32768, 7


def records(file: Path) -> Iterator[Any]:
    data = file.read_bytes()
    assert data.startswith(b":W&B"), "not a W&B file"
    position, parts = HEADER, b""
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        checksum, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        part = data[position + HEADER : position + HEADER + length]
        if len(part) < length:
            return  # still being written
        assert zlib.crc32(bytes([kind]) + part) == checksum, f"checksum at byte {position}"
        position += HEADER + length
        parts += part
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_run(folder: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """History rows (nested keys joined by dots) and artifacts of the one offline run under `folder`."""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + 20
    while not (found := [(r.WhichOneof("record_type"), r) for r in records(file)]) or found[-1][0] != "exit":
        assert time.monotonic() < deadline, "the run was never finished"  # another process writes the file
        time.sleep(0.1)
    history, artifacts = [], []
    for kind, record in found:
        if kind == "history":
            items = record.history.item
            history.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind == "artifact":
            artifacts.append(record.artifact)
    return history, artifacts
