"""Two real processes make the audit that one makes, byte for byte, and go on from what another number left."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from audit_files import config_for, digests, write_inputs
from conftest import TWO_PROCESSES

from trl_anatomy.audit import run
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.ranks import Ranks

TESTS = Path(__file__).parent

# What `trl-anatomy audit` does, told how many processes there are and what each of them wrote.
COMMAND = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from trl_anatomy import cli
from trl_anatomy.reading import harvest
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.ranks import Ranks

written, write = [], harvest._write_shard
harvest._write_shard = lambda out, name, tensors: (written.append(name), write(out, name, tensors))[1]
status = cli.main(["audit", *sys.argv[2:]])
assert dist.get_world_size() == 2
ranks = Ranks.current()
told = ""
try:
    ranks.together(lambda: 1 // 1 if ranks.main else (_ for _ in ()).throw(AnatomyError("rank 1 says no")))
except AnatomyError as error:
    told = str(error)
record = {"status": status, "written": written, "told": told, "size": ranks.size}
Path(sys.argv[1], f"rank{ranks.index}.json").write_text(json.dumps(record))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ranks")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, str]:
    run.run_audit(config_for(root, "alone"), progress=False)
    return digests(root / "alone" / "audit")


def flags(config: AuditConfig) -> list[str]:
    names = ("model", "dataset", "sae", "out", "shard_pairs", "bootstrap", "device")
    return [word for name in names for word in (f"--{name}", str(getattr(config, name)))]


def two_processes(root: Path, config: AuditConfig) -> tuple[list[dict], str]:
    script = root / "command.py"
    script.write_text(COMMAND)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(TESTS.parent),
        "HF_DATASETS_CACHE": str(root / "cache"),
    }
    words = [*TWO_PROCESSES, str(script), str(root), *flags(config)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((root / f"rank{i}.json").read_text()) for i in (0, 1)], done.stdout


def test_two_processes_make_the_audit_of_one(root: Path, alone: dict[str, str]) -> None:
    """Started on what a run of three processes left: two shards noted by its second one, one of them cut short."""
    config = config_for(root, "two")
    harvest = Path(config.out) / "harvest"
    shutil.copytree(root / "alone" / "audit" / "harvest", harvest)
    manifest = json.loads((harvest / "manifest.json").read_text())
    (harvest / "manifest.json").unlink()
    manifest["shards"] = [manifest["shards"][i] for i in (1, 4)]
    (harvest / "manifest-rank1.json").write_text(json.dumps(manifest))
    for i in (0, 2, 3):
        (harvest / f"shard-{i:05d}.safetensors").unlink()
    cut = harvest / "shard-00004.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])

    records, output = two_processes(root, config)
    assert [record["size"] for record in records] == [2, 2]
    assert [record["status"] for record in records] == [0, 0]
    assert records[0]["written"] == ["shard-00000.safetensors", "shard-00003.safetensors"]
    assert records[1]["written"] == ["shard-00002.safetensors", "shard-00004.safetensors"]
    assert [record["told"] for record in records] == ["rank 1 says no"] * 2
    assert output.count("Report: ") == 1, output
    assert digests(Path(config.out)) == alone


def test_a_process_on_its_own_needs_no_group() -> None:
    ranks = Ranks.current()
    assert (ranks.index, ranks.size, ranks.main) == (0, 1, True)
    assert ranks.together(lambda: 3) == [3]
    assert ranks.in_main(lambda: "done") == "done"

    def fail() -> None:
        raise AnatomyError("no")

    with pytest.raises(AnatomyError, match="no"):
        ranks.in_main(fail)
