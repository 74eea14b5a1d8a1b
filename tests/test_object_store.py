"""Audits, policies, concepts and datasets in a bucket of S3: through the protocol, kills, outages and refusals.

The store is moto's server, in a process of its own (`object_store.py`); boto3, which the package does not use, reads
and changes what lies there. `test_storage.py` has the cases that need no object store.
"""

import dataclasses
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from audit_files import config_for, digests, write_inputs
from huggingface_hub import constants
from interrupting import in_two_ranks
from object_store import BUCKET, Store, served
from test_restart import ended, in_a_process
from test_storage import POLICY

from trl_anatomy import cli
from trl_anatomy.audit import run
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import load_audit
from trl_anatomy.checking import rollouts
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import fit, harvest, storage
from trl_anatomy.reading.scorers.direction import DirectionScorer

s3fs, *_ = (
    pytest.importorskip(package, reason=f"{package} is not installed; it comes with the extra 'storage'")
    for package in ("s3fs", "moto", "flask", "boto3")
)

# Slow enough that uploads and downloads take a while, fast enough for the tests: an audit is 5 MB, mostly its page.
RATE = 16 << 20


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("object-store")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def alone(root: Path) -> dict[str, str]:
    """The audit in a folder."""
    run.run_audit(config_for(root, "alone"), progress=False)
    for codes in (root / "alone" / "audit" / "harvest").glob("codes-*"):  # which are not sent to a URL
        codes.unlink()
    return digests(root / "alone" / "audit")


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with served(RATE) as store:
        yield store


@pytest.fixture(autouse=True)
def machine(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This machine: its way to the store, and the copies that no other test has."""
    for name, value in {**store.environment, "AWS_MAX_ATTEMPTS": "1"}.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()  # they keep the credentials that they began with
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def config_at(root: Path, url: str) -> AuditConfig:
    return dataclasses.replace(config_for(root, "x"), out=url)


def flags(config: AuditConfig) -> list[str]:
    names = ("model", "dataset", "sae", "out", "shard_pairs", "bootstrap", "device")
    return [word for name in names for word in (f"--{name}", str(getattr(config, name)))]


def found(store: Store, prefix: str, to: Path) -> dict[str, str]:
    """Digests of what lies there, as those of the folder `to` that it is copied to."""
    store.copy(prefix, to)
    for file in (to / "audit.json", to / "report.html"):
        file.write_bytes(file.read_bytes().replace(f"s3://{BUCKET}/{prefix}".encode(), str(to).encode()))
    return digests(to)


def test_an_audit_in_a_bucket_is_that_in_a_folder(
    store: Store, root: Path, alone: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"s3://{BUCKET}/a b+c%20#é/run1"
    assert cli.main(["audit", *flags(config_at(root, url))]) == 0
    assert f"Report: {url}/report.html" in capsys.readouterr().out
    assert found(store, url.removeprefix(f"s3://{BUCKET}/"), tmp_path / "found") == alone
    before = store.get(f"{url}/report.html".removeprefix(f"s3://{BUCKET}/"))
    shutil.rmtree(tmp_path / "hf")
    assert cli.main(["report", "--audit", url]) == 0
    assert store.get(f"{url}/report.html".removeprefix(f"s3://{BUCKET}/")) == before


def noted(store: Store, prefix: str) -> dict[str, str]:
    """The finished shards that the manifest there tells of, and their hashes."""
    if "harvest/manifest.json" not in store.names(prefix):
        return {}
    manifest = json.loads(store.get(f"{prefix}/harvest/manifest.json"))
    return {entry["file"]: entry["sha256"] for entry in manifest["shards"]}


def test_killed_while_it_uploads_and_started_again_elsewhere(
    store: Store, root: Path, alone: dict[str, str], machine: Path, tmp_path: Path
) -> None:
    prefix = "killed"
    config = config_at(root, f"s3://{BUCKET}/{prefix}")

    def begun() -> int:
        whole = noted(store, prefix)
        return in_a_process(lambda: work(whole))

    def work(whole: dict[str, str]) -> None:
        write = harvest._write_shard

        def written(out: Path, name: str, tensors: Any) -> Any:
            assert name not in whole, f"{name} is read again"
            return write(out, name, tensors)

        harvest._write_shard = written
        run.run_audit(config, progress=False)

    # As soon as the third shard, or the second table, is there: the next upload has begun then, or soon will.
    for name in ("harvest/shard-00002.safetensors", "concepts.parquet"):
        child = begun()
        while name not in store.names(prefix):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
        assert set(noted(store, prefix)) >= {"shard-00000.safetensors", "shard-00001.safetensors"}
        with pytest.raises(AnatomyError, match=r"audit\.json: missing, so the audit is not finished"):
            load_audit(config.out)
        shutil.rmtree(machine)
    assert ended(begun()) == 0
    assert found(store, prefix, tmp_path / "found") == alone


@pytest.mark.parametrize("what", ["the network", "the key"])
def test_the_store_fails_in_the_middle_of_the_pass(
    what: str, store: Store, root: Path, alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = f"outage/{what[4:]}"
    config = config_at(root, f"s3://{BUCKET}/{prefix}")
    made: list[str] = []
    write = harvest._write_shard

    def seen(out: Path, name: str, tensors: Any) -> Any:
        made.append(name)
        if len(made) == 3:
            store.wire.cut() if what == "the network" else store.enforce()
        return write(out, name, tensors)

    monkeypatch.setattr(harvest, "_write_shard", seen)
    told = (
        f"^{config.out}/harvest/shard-00002.safetensors: cannot be written .*finished files lie in .*the same command"
    )
    try:
        with pytest.raises(AnatomyError, match=told):
            run.run_audit(config, progress=False)
    finally:
        store.wire.mend() if what == "the network" else store.trust()
    assert len(made) == 3
    run.run_audit(config, progress=False)
    assert sorted(made) == [f"shard-{i:05d}.safetensors" for i in range(5)]  # each once
    assert found(store, prefix, tmp_path / "found") == alone


def test_two_machines_share_an_audit_in_a_bucket(
    store: Store, root: Path, alone: dict[str, str], machine: Path, tmp_path: Path
) -> None:
    config = config_at(root, f"s3://{BUCKET}/two")

    def rank(index: int) -> None:
        constants.HF_HOME = f"{machine}{index}"  # they share no disk
        run.run_audit(config, progress=False)

    assert ended(in_a_process(lambda: in_two_ranks(rank))) == 0
    assert found(store, "two", tmp_path / "found") == alone
    for index in (0, 1):
        assert len(list(Path(f"{machine}{index}").rglob("shard-*.safetensors"))) == 5


@pytest.fixture
def team(store: Store, root: Path, alone: dict[str, str], tmp_path: Path) -> tuple[Path, str]:
    """Audit, policy and concept in a folder, and the same in a bucket."""
    folder, url = shutil.copytree(root / "alone", tmp_path / "team"), f"s3://{BUCKET}/team"
    direction = DirectionScorer(torch.linspace(-1, 1, run.load_model(config_for(root, "x")).config.hidden_size), 1)
    direction.save(folder / "concepts/stored")
    (folder / "policies").mkdir()
    (folder / "policies/p.yaml").write_text(POLICY.format(audit="../audit"))
    store.put_folder(folder / "audit", "team/audit")
    store.put("team/policies/p.yaml", POLICY.format(audit="../audit").encode())
    direction.save(f"{url}/concepts/stored")
    return folder, url


def test_a_policy_in_a_bucket_says_what_that_in_a_file_says(
    team: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    plans = []
    for place in map(str, team):
        assert cli.main(["plan", "--audit", f"{place}/audit", "--policy", f"{place}/policies/p.yaml", "--json"]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]
    assert all(rule["rows"] for rule in json.loads(plans[0])["rules"])


@pytest.mark.parametrize("fault", ["no bucket", "refused", "down", "read only"])
def test_what_the_store_refuses_is_told_in_a_sentence(
    fault: str,
    store: Store,
    team: tuple[Path, str],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = f"s3://{BUCKET}/team" if fault != "no bucket" else "s3://none/team"
    model, data = ["--model", str(root / "model")], ["--dataset", str(root / "pairs.jsonl.gz")]
    here = f"{team[0]}/audit"
    readers = {
        "report": ["--audit", f"{url}/audit"],
        "plan": ["--audit", here, "--policy", f"{url}/policies/p.yaml"],
        "compare": ["--audit", f"{url}/audit", "--before", "m", "--after", "m"],
        "audit": flags(dataclasses.replace(config_for(root, "never"), dataset=f"{url}/data/pairs.jsonl.gz")),
    }
    writers = {
        "audit": flags(config_at(root, f"{url}/new")),
        "fit": [*model, *data, "--scorer", "direction", "--layers", "1", "--out", f"{url}/fitted"],
        "compare": ["--audit", here, "--before", model[1], "--after", model[1], "--out", f"{url}/compared"],
    }
    began: list[str] = []
    for module, name in ((harvest, "_read_shard"), (fit, "read_hidden"), (rollouts, "rollouts")):
        monkeypatch.setattr(module, name, lambda *_, **__: began.append("long work") or 1 / 0)
    if fault == "refused":
        store.enforce()
    elif fault == "down":
        store.wire.cut()
    elif fault == "read only":
        for name, value in store.reader().items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        store.enforce()
    told = {
        "no bucket": r"no such|bucket does not exist",
        "refused": r"Forbidden|Key Id you provided does not exist|Access Denied",
        "down": r"Could not connect",
        "read only": r"cannot be written \(Access Denied\)",
    }[fault]
    try:
        for command, words in [*(readers.items() if fault != "read only" else ()), *writers.items()]:
            capsys.readouterr()
            assert cli.main([command, *words]) == 2, command
            error = capsys.readouterr().err.splitlines()[-1]
            assert re.search(rf"^trl-anatomy {command}: .*{url}/.*({told})", error), error
            assert re.search(r"See to the network|see to the network|no such", error), error
    finally:
        store.wire.mend() if fault == "down" else store.trust()
    assert not began


def test_what_is_gone_or_cut_short_there_is_named_and_made_again(
    store: Store, root: Path, alone: dict[str, str], machine: Path, tmp_path: Path
) -> None:
    config = config_at(root, f"s3://{BUCKET}/damaged")
    store.put_folder(root / "alone/audit", "damaged")
    for name in ("audit.json", "pairs.parquet", "harvest/manifest.json", "harvest/shard-00002.safetensors"):
        whole = store.get(f"damaged/{name}")
        for data in (None, whole[:-9]):
            store.remove(f"damaged/{name}") if data is None else store.put(f"damaged/{name}", data)
            where = Path(f"damaged/{name}") if name != "harvest/manifest.json" else Path("damaged/harvest")
            with pytest.raises(
                AnatomyError, match=rf"s3://{BUCKET}/{where}.*([Rr]un (it|the audit) again|Run the audit first)"
            ):
                load_audit(config.out).check_harvest()
        store.put(f"damaged/{name}", whole)
        shutil.rmtree(machine)
    # Only others see a byte that changed there: here the copy is whole, and there the size is right.
    load_audit(config.out).check_harvest()
    store.put(f"damaged/{name}", whole[:-1] + bytes([whole[-1] ^ 1]))
    machine.rename(tmp_path / "kept")
    with pytest.raises(AnatomyError, match=rf"{name}: its SHA-256 differs .*: delete it\. Run the audit again"):
        load_audit(config.out).check_harvest()
    shutil.rmtree(machine)
    (tmp_path / "kept").rename(machine)
    store.remove(f"damaged/{name}")
    run.run_audit(config, progress=False)
    assert found(store, "damaged", tmp_path / "found") == alone


def test_a_download_that_ends_early_leaves_the_copy_from_before(
    store: Store, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = storage.local(f"s3://{BUCKET}/large.bin")
    store.put("large.bin", b"old")
    assert storage.fetch(file)
    store.put("large.bin", bytes(8 << 20))
    cut = threading.Timer(0.3, store.wire.cut)  # half a second at RATE
    cut.start()
    try:
        with pytest.raises(AnatomyError, match=rf"^s3://{BUCKET}/large.bin: cannot be read .*start again"):
            storage.fetch(file)
    finally:
        cut.join()
        store.wire.mend()
    assert file.read_bytes() == b"old"
    assert not list(machine.rglob("*.partial"))
    assert storage.fetch(file)
    assert file.stat().st_size == 8 << 20


def test_what_others_write_is_seen_at_once(store: Store) -> None:
    """s3fs keeps the listings of a process."""
    folder = storage.local(f"s3://{BUCKET}/shared")
    store.put("shared/a", b"1")
    assert storage.listed(folder) == {"a": 1}
    assert fsspec.filesystem("s3").ls(f"{BUCKET}/shared") == [f"{BUCKET}/shared/a"]
    store.put("shared/a", b"22")
    store.put("shared/b", b"1")
    assert fsspec.filesystem("s3").ls(f"{BUCKET}/shared") == [f"{BUCKET}/shared/a"]  # so it would be missed
    assert storage.exists(folder / "b")
    assert storage.listed(folder) == {"a": 2, "b": 1}
    store.remove("shared/a")
    assert not storage.fetch(folder / "a")


def test_pairs_in_a_bucket(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # a machine that reaches the store and no hub
    rows = run.load_dataset(config_for(root, "x"))
    rows.to_parquet(root / "pairs.parquet")
    for name in ("pairs.parquet", "pairs.jsonl.gz"):
        store.put(f"data/{name}", (root / name).read_bytes())
    rows.save_to_disk(root / "disk")
    store.put_folder(root / "disk", "data/disk")
    for name in ("pairs.parquet", "pairs.jsonl.gz", "disk"):
        assert run.load_dataset(AuditConfig(dataset=f"s3://{BUCKET}/data/{name}")).to_list() == rows.to_list()
    for name in ("none.jsonl", "none"):
        with pytest.raises(AnatomyError, match=f"s3://{BUCKET}/data/{name}: no such f"):
            run.load_dataset(AuditConfig(dataset=f"s3://{BUCKET}/data/{name}"))


def test_pairs_replaced_in_a_bucket_are_read_anew(store: Store, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loaders of datasets would give the first ones for ever."""
    config = AuditConfig(dataset=f"s3://{BUCKET}/data/changing.jsonl")
    rows = run.load_dataset(config_for(root, "x")).to_list()

    def put(n: int) -> None:
        store.put("data/changing.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:n]).encode())

    fetched: list[str] = []
    get_file = s3fs.S3FileSystem._get_file

    async def seen(self: Any, rpath: str, lpath: str, **options: Any) -> None:
        fetched.append(rpath)
        await get_file(self, rpath, lpath, **options)
        if len(fetched) == 3:
            put(4)

    monkeypatch.setattr(s3fs.S3FileSystem, "_get_file", seen)
    for n in (5, 6, 6):
        put(n)
        assert len(run.load_dataset(config)) == n
    assert len(fetched) == 2  # the third time the version was the one that is here
    put(3)
    with pytest.raises(AnatomyError, match=r"changing\.jsonl: was replaced while it was read; start again"):
        run.load_dataset(config)
    assert len(run.load_dataset(config)) == 4


def test_a_reader_sees_one_audit_or_the_other_while_it_is_made_again(
    store: Store, root: Path, alone: dict[str, str]
) -> None:
    store.put_folder(root / "alone/audit", "read")
    config = dataclasses.replace(config_at(root, f"s3://{BUCKET}/read"), bootstrap=101)
    child = in_a_process(lambda: run.run_audit(config, progress=False) and None)
    seen: dict[int, set[str]] = {}
    told: set[str] = set()
    reading = True
    while reading:
        reading = os.waitpid(child, os.WNOHANG) == (0, 0)  # once more after its end
        try:
            audit = load_audit(config.out)
            audit.check_harvest()
        except AnatomyError as error:
            told.add(str(error))
        else:
            made = seen.setdefault(audit.info["settings"]["bootstrap"], set())
            made.add(json.dumps(audit.concepts.to_pydict()) + json.dumps(audit.hypotheses.to_pydict()))
    assert all(re.search("the audit is not finished|SHA-256 is not the one", error) for error in told), told
    assert {bootstrap: len(made) for bootstrap, made in seen.items()} == {100: 1, 101: 1}
