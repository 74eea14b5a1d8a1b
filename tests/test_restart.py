"""Killing an audit at any point and starting it again gives the files of an undisturbed run, byte for byte."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from audit_files import config_for, digests, write_inputs
from tqdm.std import tqdm

from trl_anatomy.audit import run
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import load_audit


def in_a_process(work: Callable[[], None]) -> int:
    """Do `work` in a forked process, which has paid for the imports already; gives the id of that process."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            tqdm.set_lock(threading.RLock())  # another thread may have held the lock when this process began
            torch.set_num_threads(1)  # makes torch's pool anew, which two threads that load weights at once fail to do
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return child


def ended(child: int) -> int:
    """0 for an orderly end, -9 for a killed process."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_call(name: str, count: int, do: Callable[[], object]) -> int:
    """Do what the kernel kills when it calls `os.<name>` for the `count`-th time (before it acts)."""

    def work() -> None:
        calls, real = 0, getattr(os, name)

        def counted(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(os, name, counted)
        do()

    return ended(in_a_process(work))


def killed_when(seen: Callable[[Path], bool], config: AuditConfig, delay: float = 0.0) -> int:
    """Run an audit and kill it `delay` seconds after its folder looks as `seen` says."""
    child = in_a_process(lambda: run.run_audit(config, progress=False) and None)
    end = time.monotonic() + 60
    while not seen(Path(config.out)):
        assert time.monotonic() < end, "the folder never looked like that"
        time.sleep(0.0005)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    return ended(child)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("restart")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def undisturbed(root: Path) -> dict[str, str]:
    assert ended(in_a_process(lambda: run.run_audit(config_for(root, "straight"), progress=False) and None)) == 0
    found = digests(root / "straight" / "audit")
    tables = ("audit.json", *(f"{name}.parquet" for name in ("concepts", "habits", "hypotheses", "pairs", "problems")))
    tables += ("findings.parquet", "habit_hypotheses.parquet", "levels.parquet", "samples.parquet", "sae_fit.json")
    shards = [f"harvest/{kind}-{i:05d}.safetensors" for kind in ("codes", "shard") for i in range(5)]
    assert sorted(found) == sorted([*tables, "labels.json", "report.html", "harvest/manifest.json", *shards])
    return found


def finish(config: AuditConfig) -> dict[str, str]:
    assert ended(in_a_process(lambda: run.run_audit(config, progress=False) and None)) == 0
    load_audit(config.out).check_harvest()
    return digests(Path(config.out))


# Files are flushed, then moved into place, in this order: the SAE's verdict (call 1), five times a shard and the
# manifest (2 to 11), the tables, audit.json, the labels, the page. `fsync` dies with a whole file beside its place,
# `replace` too.
@pytest.mark.parametrize(("name", "calls"), [("fsync", (1, 5, 9)), ("fsync", (15, 5)), ("replace", (2, 10, 4))])
def test_killed_again_and_again_while_it_writes(
    name: str, calls: tuple[int, ...], root: Path, undisturbed: dict[str, str]
) -> None:
    config = config_for(root, f"{name}-{'-'.join(map(str, calls))}")
    for count in calls:
        assert killed_at_call(name, count, lambda: run.run_audit(config, progress=False)) == -signal.SIGKILL
        assert list(Path(config.out).rglob("*.partial"))
    assert finish(config) == undisturbed


@pytest.mark.parametrize(
    ("seen", "delay"),
    [
        (lambda out: (out / "harvest/shard-00002.safetensors").exists(), 0.0),
        (lambda out: (out / "harvest/shard-00004.safetensors").exists(), 0.1),  # during the statistics
        (lambda out: (out / "audit.json").exists(), 0.0),  # during the page
    ],
    ids=["third shard", "statistics", "page"],
)
def test_killed_at_any_moment(
    seen: Callable[[Path], bool], delay: float, root: Path, undisturbed: dict[str, str], request: pytest.FixtureRequest
) -> None:
    config = config_for(root, request.node.callspec.id.replace(" ", "-"))
    assert killed_when(seen, config, delay) == -signal.SIGKILL
    assert finish(config) == undisturbed


def test_a_shard_that_a_crash_cut_short_is_read_again(root: Path, undisturbed: dict[str, str]) -> None:
    """A power cut may leave a file whose name is there and whose end is not."""
    config = config_for(root, "cut")
    assert killed_at_call("fsync", 8, lambda: run.run_audit(config, progress=False)) == -signal.SIGKILL
    shard = Path(config.out) / "harvest/shard-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    (shard.parent / "shard-00004.safetensors.77.partial").write_bytes(b"half")
    assert finish(config) == undisturbed
