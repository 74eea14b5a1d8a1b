"""A real audit of small files, by several tests: model, SAE and pairs on disk, and what the folder then holds."""

import gzip
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from test_audit_folder import word_pairs, write_sae, write_start_model

from trl_anatomy.audit.config import AuditConfig


def write_inputs(root: Path) -> None:
    """`root`/model, `root`/sae and `root`/pairs.jsonl.gz: 239 pairs in five shards of `config_for`."""
    write_start_model(root / "model")
    write_sae(root / "sae")
    with gzip.open(root / "pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in word_pairs(240, more_words=0))


def config_for(root: Path, out: str) -> AuditConfig:
    return AuditConfig(
        model=str(root / "model"),
        dataset=str(root / "pairs.jsonl.gz"),
        sae=str(root / "sae"),
        out=str(root / out / "audit"),
        shard_pairs=48,
        bootstrap=100,
        device="cpu",
    )


def digests(folder: Path) -> dict[str, str]:
    """Every file of an audit folder by its hash, without what tells the time it took or the place it is in."""
    found = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes().replace(str(folder).encode(), b"OUT")
        if file.name == "audit.json":
            info: dict[str, Any] = json.loads(data)
            del info["timings"]
            data = json.dumps(info).encode()
        if file.name == "report.html":
            data = re.sub(rb"<dd>[0-9.]+ s</dd>", b"", data)
        found[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found
