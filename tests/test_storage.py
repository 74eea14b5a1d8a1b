"""Audits, policies and concepts at URLs: as in folders, through kills, on other machines, and errors in a sentence."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from audit_files import config_for, digests, write_inputs
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import constants
from test_restart import ended, in_a_process, killed_at_call

from trl_anatomy import cli
from trl_anatomy.audit import run
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import load_audit
from trl_anatomy.checking import rollouts
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import fit, harvest, storage
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.shaping.policy import ConceptPolicy


class Shelf(DirFileSystem):
    """A store that outlives processes: shelf://a/b is a file of `root`; `room` and `lives` cut uploads short."""

    protocol = "shelf"
    root = ""
    room = 1 << 40  # bytes that can still be written
    lives = -2  # uploads before one kills its process halfway; negative: none does

    def __init__(self, **options: Any) -> None:
        super().__init__(path=self.root, fs=LocalFileSystem(auto_mkdir=True), **options)

    def put_file(self, lpath: Any, rpath: Any, **options: Any) -> None:
        cls, data = type(self), Path(lpath).read_bytes()
        cut = len(data) // 2 if cls.lives == 0 else min(cls.room, len(data))
        cls.room, cls.lives = cls.room - cut, cls.lives - 1
        self.pipe_file(rpath, data[:cut])
        if cls.lives == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        if cut < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("storage")
    write_inputs(root)
    Shelf.root = str(root / "shelf")
    fsspec.register_implementation("shelf", Shelf, clobber=True)
    return root


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, str]:
    """The audit in a folder, but for the codes of its tokens, which are not sent to a URL."""
    run.run_audit(config_for(root, "alone"), progress=False)
    return without_codes(digests(root / "alone" / "audit"))


def without_codes(files: dict[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in files.items() if not name.startswith("harvest/codes-")}


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The copies of this machine, which no other test has."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    yield tmp_path / "hf"
    Shelf.room, Shelf.lives = 1 << 40, -2


def config_at(root: Path, url: str) -> AuditConfig:
    return dataclasses.replace(config_for(root, "x"), out=url)


def at(url: str, to: Path) -> dict[str, str]:
    """Digests of what lies at a URL, as those of the folder `to` that it is copied to."""
    fs, inside = fsspec.url_to_fs(url)
    for name in fs.find(inside):
        file = to / Path(name).relative_to(inside)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(fs.cat_file(name))
    for file in (to / "audit.json", to / "report.html"):
        file.write_bytes(file.read_bytes().replace(url.encode(), str(to).encode()))
    return digests(to)


def other_machine(machine: Path) -> None:
    shutil.rmtree(machine)


def test_an_audit_at_a_url_is_that_in_a_folder(root: Path, alone: dict[str, str], tmp_path: Path) -> None:
    url = "memory://bucket/audits/run1"
    audit = run.run_audit(config_at(root, url), progress=False)
    assert repr(audit).startswith(f"Audit('{url}'")
    assert at(url, tmp_path / "found") == alone
    local = run.run_audit(config_at(root, f"file://{root}/by-file/audit"), progress=False)
    assert local.path == root / "by-file/audit"
    page = (local.path / "report.html").read_text()
    assert str(local.path) in page
    for file in (local.path / "audit.json", local.path / "report.html"):  # where `out` stands as it was given
        file.write_bytes(file.read_bytes().replace(b"file://" + str(local.path).encode(), str(local.path).encode()))
    assert without_codes(digests(local.path)) == alone


def test_only_what_is_asked_for_is_fetched(root: Path, alone: dict[str, str], machine: Path) -> None:
    fsspec.filesystem("memory").put(f"{root}/alone/audit/", "/few/", recursive=True)

    def here() -> set[str]:
        return {path.name for path in machine.rglob("*") if path.is_file()} - {"lock"}

    audit = load_audit("memory://few")
    tables = {"audit.json", "concepts.parquet", "hypotheses.parquet", "pairs.parquet"}
    assert here() == tables
    assert audit.samples is not None
    assert here() == tables | {"samples.parquet"}
    audit.check_harvest()
    assert {"manifest.json", "shard-00004.safetensors"} < here()
    fsspec.filesystem("memory").rm("/few/pairs.parquet")  # its copy has the hash that audit.json wants
    load_audit("memory://few").check_harvest()


@pytest.mark.parametrize(
    ("lives", "fsyncs"), [((1, 5), ()), ((12, 5), ()), ((), (6,))], ids=["shards", "tables", "between"]
)
def test_killed_and_started_again_on_another_machine(
    lives: tuple[int, ...], fsyncs: tuple[int, ...], root: Path, alone: dict[str, str], machine: Path, tmp_path: Path
) -> None:
    """A killed upload leaves half a file at the URL: it is not taken for whole, and no other is made again."""
    name = f"killed-{lives}-{fsyncs}".replace(" ", "")
    config = config_at(root, f"shelf://{name}")
    shards = Path(Shelf.root, name, "harvest")
    for count in lives:
        Shelf.lives = count
        assert ended(in_a_process(lambda: run.run_audit(config, progress=False) and None)) == -signal.SIGKILL
        other_machine(machine)
    for count in fsyncs:
        Shelf.lives = -2
        assert killed_at_call("fsync", count, lambda: run.run_audit(config, progress=False)) == -signal.SIGKILL
        other_machine(machine)
    Shelf.lives = -2
    with pytest.raises(AnatomyError, match=r"audit\.json: (missing, so the audit is not finished|not valid JSON)"):
        load_audit(config.out)
    whole = [entry["file"] for entry in json.loads((shards / "manifest.json").read_text())["shards"]]
    before = {shard: (shards / shard).stat().st_mtime_ns for shard in whole}
    assert before
    run.run_audit(config, progress=False)
    assert at(config.out, tmp_path / "found") == alone
    assert before == {shard: (shards / shard).stat().st_mtime_ns for shard in before}


def test_a_store_without_room_loses_nothing(
    root: Path, alone: dict[str, str], machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_at(root, "shelf://full")
    made: list[str] = []
    write = harvest._write_shard

    def seen(out: Path, name: str, tensors: Any) -> Any:
        made.append(name)
        return write(out, name, tensors)

    monkeypatch.setattr(harvest, "_write_shard", seen)
    Shelf.room = 0
    with pytest.raises(AnatomyError, match=r"^shelf://full/sae_fit\.json: cannot be written \(No space left"):
        run.run_audit(config, progress=False)
    assert made == []  # told before the pass
    Shelf.room = sum(file.stat().st_size for file in (root / "alone/audit/harvest").glob("shard-0000[01]*"))
    with pytest.raises(AnatomyError, match=r"^shelf://full/harvest/.*The finished files lie in .*the same command"):
        run.run_audit(config, progress=False)
    stopped = list(made)
    assert stopped[0] == "shard-00000.safetensors"
    assert len(stopped) < 5
    Shelf.room = 1 << 40
    run.run_audit(config, progress=False)
    assert sorted(made) == [f"shard-{i:05d}.safetensors" for i in range(5)]  # each once
    assert at(config.out, tmp_path / "found") == alone
    assert not list(machine.rglob("*.unsent"))


def test_fit_and_compare_find_out_first_whether_they_can_write(
    root: Path, alone: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, began = config_for(root, "alone"), []
    for module, name in ((fit, "read_hidden"), (rollouts, "rollouts")):
        monkeypatch.setattr(module, name, lambda *_, **__: began.append("long work"))
    Shelf.room = 0
    commands = {
        "fit": ["--model", config.model, "--dataset", config.dataset, "--scorer", "direction", "--layers", "1"],
        "compare": ["--audit", config.out, "--before", config.model, "--after", config.model],
    }
    for command, words in commands.items():
        assert cli.main([command, *words, "--out", f"shelf://no-room/{command}"]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert f"shelf://no-room/{command}/probe.partial: cannot be written (No space left on device)" in told
    assert not began


NAMES = (
    "audit.json",
    "concepts.parquet",
    "samples.parquet",
    "harvest/manifest.json",
    "harvest/shard-00002.safetensors",
)


def opened(url: str) -> None:
    audit = load_audit(url)
    _ = audit.samples, audit.harvest


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["cut", "gone", "changed"])
def test_a_damaged_file_there_is_named(name: str, damage: str, root: Path, alone: dict[str, str]) -> None:
    if damage == "changed" and name.endswith(".json"):
        pytest.skip("nothing holds a hash of these")
    fs = fsspec.filesystem("memory")
    fs.put(f"{root}/alone/audit/", "/damaged/", recursive=True)
    data = fs.cat_file(f"/damaged/{name}")
    if damage == "gone":
        fs.rm_file(f"/damaged/{name}")
    else:
        fs.pipe_file(f"/damaged/{name}", data[:-9] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    if (name, damage) == ("samples.parquet", "gone"):
        assert load_audit("memory://damaged").samples is None
        return
    where = "memory://damaged" if name != "harvest/manifest.json" else "memory://damaged/harvest"
    with pytest.raises(AnatomyError, match=f"{where}.*{Path(name).name}"):
        opened("memory://damaged")


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("nope://a/run", "Protocol not known: nope; allowed: a path, or a URL"),
        ("s3://a/run", "s3fs"),
        ("memory://a/nothing", r"no such audit folder\. Make one with `trl-anatomy audit --out memory://a/nothing`"),
        ("sftp://me:secret@host/run", r"sftp://\.\.\.@host/run: holds a password"),
        ("memory://a/../run", "allowed: PROTOCOL://FOLDER/NAME"),
        ("memory://", "memory://: names no place"),
    ],
)
def test_what_cannot_be_reached_is_told(
    url: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if url.startswith("s3") and find_spec("s3fs"):
        pytest.skip("s3fs is installed")
    with pytest.raises(AnatomyError, match=told):
        load_audit(url)
    recipe = ["--model_name_or_path", "m", "--dataset_name", "d", "--output_dir", str(tmp_path), "--bf16", "false"]
    for command in (["report", "--audit", url], ["dpo", *recipe, "--audit", url]):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "secret" not in error
    with pytest.raises(AnatomyError, match=r"no such file|allowed|s3fs|password"):
        ConceptPolicy.load(f"{url}/policy.yaml")


POLICY = """
concepts:
  habit: {{scorer: features, audit: {audit}, cluster: T1}}
  stored: {{scorer: direction, path: ../concepts/stored}}
rules:
  - {{explain_away: habit, with: shape_reward, strength: 2.0}}
  - {{explain_away: stored, with: shape_reward, strength: 1.0}}
"""


@pytest.fixture
def both(root: Path, alone: dict[str, str]) -> tuple[Path, str]:
    """Audit, policy and concept in a folder, and the same at a URL."""
    folder, url = root / "alone", "memory://team"
    direction = DirectionScorer(torch.linspace(-1, 1, run.load_model(config_for(root, "x")).config.hidden_size), 1)
    direction.save(folder / "concepts/stored")
    direction.save(f"{url}/concepts/stored")
    (folder / "policies").mkdir(exist_ok=True)
    (folder / "policies/p.yaml").write_text(POLICY.format(audit="../audit"))
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/team/policies/p.yaml", POLICY.format(audit="../audit").encode())
    fs.put(f"{folder}/audit/", "/team/audit/", recursive=True)
    return folder, url


def test_a_policy_at_a_url_acts_as_that_in_a_file(
    both: tuple[Path, str], root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from trl import DPOConfig

    from trl_anatomy import AnatomyDPOTrainer

    specs = ConceptPolicy.load(f"{both[1]}/policies/p.yaml").concepts
    assert (specs["habit"].audit, specs["stored"].path) == ("memory://team/audit", "memory://team/concepts/stored")
    raw = run.load_dataset(config_for(root, "x"))
    plans, trained = [], []
    for place in map(str, both):
        assert cli.main(["plan", "--audit", f"{place}/audit", "--policy", f"{place}/policies/p.yaml", "--json"]) == 0
        plans.append(capsys.readouterr().out)
        args = DPOConfig(
            output_dir=str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False, max_length=1024, beta=0.1
        )
        trainer = AnatomyDPOTrainer(
            model=str(root / "model"),
            args=args,
            train_dataset=raw,
            audit=f"{place}/audit",
            concept_policy=f"{place}/policies/p.yaml",
        )
        trained.append((trainer.plan, trainer.train_dataset))
    assert plans[0] == plans[1]
    (here, data), (there, same) = trained
    for side in ("chosen_offset", "rejected_offset"):
        assert np.array_equal(getattr(here, side), getattr(there, side))
        assert np.any(getattr(here, side))
    assert data.column_names == same.column_names
    assert data.to_dict() == same.to_dict()


def test_a_page_at_a_url_is_made_again(both: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    fs = fsspec.filesystem("memory")
    before = fs.cat_file("/team/audit/report.html")
    fs.rm_file("/team/audit/report.html")
    assert cli.main(["report", "--audit", "memory://team/audit"]) == 0
    assert capsys.readouterr().out.strip() == "memory://team/audit/report.html"
    after = fs.cat_file("/team/audit/report.html")
    assert after.replace(b"memory://team/audit", str(both[0] / "audit").encode()) == before


def test_what_was_not_sent_is_sent_by_the_next_reader_of_its_own_work(root: Path, machine: Path) -> None:
    from trl_anatomy.reading.files import write_atomically

    file = storage.local("shelf://own") / "a.json"
    file.parent.mkdir(parents=True)
    write_atomically(file, b"one")
    Shelf.room = 1
    with pytest.raises(AnatomyError, match=r"shelf://own/a\.json: cannot be written"):
        write_atomically(file, b"two")
    there = Path(Shelf.root, "own/a.json")
    assert there.read_bytes() == b"t"
    Shelf.room = 1 << 40
    assert storage.fetch(file, own=True)
    assert (there.read_bytes(), file.read_bytes()) == (b"two", b"two")
    there.write_bytes(b"three")  # of another machine
    assert storage.fetch(file, own=True)
    assert file.read_bytes() == b"three"


def test_pairs_at_a_url(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    rows = run.load_dataset(config_for(root, "x"))
    fsspec.filesystem("memory").put_file(str(root / "pairs.jsonl.gz"), "/data/pairs.jsonl.gz")
    rows.save_to_disk("memory://data/disk")
    changing = AuditConfig(dataset="memory://data/changing.jsonl")
    for n in (3, 4):
        fsspec.filesystem("memory").pipe_file(
            "/data/changing.jsonl", "".join(json.dumps(row) + "\n" for row in rows.select(range(n))).encode()
        )
        assert len(run.load_dataset(changing)) == n
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # to load_from_disk memory:// counts as a network
    for url in ("memory://data/pairs.jsonl.gz", "memory://data/disk", f"file://{root}/pairs.jsonl.gz"):
        assert run.load_dataset(AuditConfig(dataset=url)).to_list() == rows.to_list()
    for url in ("memory://data/none.jsonl", "memory://data/none", "nope://data/none.jsonl"):
        with pytest.raises(AnatomyError, match=url.partition(":")[0]):
            run.load_dataset(AuditConfig(dataset=url))


# One launch whose two processes share no disk: each has copies of its own.
COMMAND = """
import os, sys
sys.path.insert(0, {tests!r})
import fsspec
from huggingface_hub import constants
from test_storage import Shelf
Shelf.root = {shelf!r}
fsspec.register_implementation("shelf", Shelf, clobber=True)
constants.HF_HOME = {homes!r} + os.environ["RANK"]
from trl_anatomy import cli
import torch.distributed as dist
assert cli.main(["audit", *sys.argv[1:]]) == 0
dist.destroy_process_group()
"""


def test_two_machines_share_an_audit_by_its_url(root: Path, alone: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "command.py"
    homes = str(tmp_path / "home")
    script.write_text(COMMAND.format(tests=str(Path(__file__).parent), shelf=Shelf.root, homes=homes))
    config = config_at(root, "shelf://two")
    names = ("model", "dataset", "sae", "out", "shard_pairs", "bootstrap", "device")
    flags = [word for name in names for word in (f"--{name}", str(getattr(config, name)))]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*launch, str(script), *flags], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("Report: shelf://two/report.html") == 1
    assert at(config.out, tmp_path / "found") == alone
    for rank in (0, 1):
        assert len(list(Path(f"{homes}{rank}").rglob("shard-*.safetensors"))) == 5
