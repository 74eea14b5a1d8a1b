"""A full disk, a folder that cannot be written, files cut short: a clear error, and nothing that was whole is lost."""

import resource
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from audit_files import config_for, digests, write_inputs
from reading_world import build_tokenizer, dataset, tiny_model
from test_restart import ended, in_a_process

from trl_anatomy.audit import run
from trl_anatomy.audit.folder import load_audit
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.harvest import Harvest
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import read_pairs


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("disk")
    write_inputs(root)
    return root


@pytest.fixture(scope="module")
def whole(root: Path) -> dict[str, str]:
    assert ended(in_a_process(lambda: run.run_audit(config_for(root, "straight"), progress=False) and None)) == 0
    return digests(root / "straight" / "audit")


def with_files_of_at_most(size: int, work: Callable[[], None]) -> int:
    """Do `work` where no file can grow beyond `size` bytes, as on a disk that is full."""

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write fails with an errno, as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return ended(in_a_process(limited))


@pytest.mark.parametrize("size", [2_000, 30_000])
def test_a_full_disk_is_told_and_what_was_written_serves_the_next_run(
    size: int, root: Path, whole: dict[str, str]
) -> None:
    config = config_for(root, f"full-{size}")

    def audit() -> None:
        with pytest.raises(
            AnatomyError, match=r"cannot be written \(File too large\)\. What was finished before is kept"
        ):
            run.run_audit(config, progress=False)

    assert with_files_of_at_most(size, audit) == 0
    assert not list(Path(config.out).rglob("*.partial"))
    with pytest.raises(AnatomyError, match=r"not finished|no such audit folder"):
        load_audit(config.out)
    assert ended(in_a_process(lambda: run.run_audit(config, progress=False) and None)) == 0
    assert digests(Path(config.out)) == whole


def test_a_folder_that_cannot_be_made_is_told_before_the_pass(root: Path) -> None:
    (root / "taken").write_text("a file, where the folder should be")
    for out in ("taken", "/proc/none"):
        config = config_for(root, out)
        with pytest.raises(AnatomyError, match="cannot be written"):
            run.run_audit(config, progress=False)
    assert (root / "taken").read_text() == "a file, where the folder should be"


def test_scores_that_cannot_be_kept_are_still_given(tmp_path: Path) -> None:
    pairs = read_pairs(dataset("explicit", 6), build_tokenizer())
    scorers, model = {"a": DirectionScorer(torch.arange(1.0, 33.0), 1)}, tiny_model()
    expected = score_pairs(pairs, scorers, model, progress=False)
    (tmp_path / "taken").write_text("")
    with pytest.warns(UserWarning, match="Not kept for later runs"):
        found = score_pairs(pairs, scorers, model, cache_dir=tmp_path / "taken", progress=False)
    assert np.array_equal(found.gap("a"), expected.gap("a"))


KINDS = ("audit.json", "concepts.parquet", "harvest/manifest.json", "harvest/shard-00001.safetensors", "pairs.parquet")


@pytest.mark.parametrize("name", [*KINDS, "samples.parquet", "hypotheses.parquet"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_half_a_file_is_no_file(name: str, share: float, root: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """Of every kind of file of an audit: what is cut short is refused by its name."""
    folder = root / "straight" / "audit"
    file = folder / name
    data = file.read_bytes()
    try:
        file.write_bytes(data[: int(share * (len(data) - 2))])
        with pytest.raises(AnatomyError, match=file.name):
            _ = load_audit(folder).samples, Harvest.open(folder / "harvest")
    finally:
        file.write_bytes(data)
    assert digests(folder) == whole


def test_half_a_concept_is_no_concept(tmp_path: Path) -> None:
    DirectionScorer(torch.arange(1.0, 33.0), 1).save(tmp_path)
    for file in sorted(tmp_path.iterdir()):
        data = file.read_bytes()
        for size in (0, 7, len(data) // 2, len(data) - 3):
            file.write_bytes(data[:size])
            with pytest.raises(AnatomyError, match="cannot be read"):
                DirectionScorer.load(tmp_path)
        file.write_bytes(data)
    DirectionScorer.load(tmp_path)
