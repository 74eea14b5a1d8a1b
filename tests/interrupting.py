"""Work that is killed at a random moment again and again until it is finished, in a process of its own."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from audit_files import config_for, digests, write_inputs
from conftest import preference_rows
from datasets import Dataset, load_from_disk
from hidden_world import policy, rule
from parity import EXACT
from reading_world import build_tokenizer, dataset, tiny_model
from test_restart import ended, in_a_process
from trl import DPOConfig

from trl_anatomy import AnatomyDPOTrainer
from trl_anatomy.audit import run
from trl_anatomy.audit.folder import load_audit
from trl_anatomy.audit.report import write_report
from trl_anatomy.reading import score
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import read_pairs


@dataclass(frozen=True)
class Work:
    """Something that is done in a folder.

    Attributes:
        do: folder -> nothing; goes on from what is in the folder.
        result: folder -> file -> hash, of all that must not depend on interruptions.
        stage: folder -> how far the work had come.
    """

    do: Callable[[Path], Any]
    result: Callable[[Path], dict[str, str]]
    stage: Callable[[Path], str]


@dataclass
class Record:
    """What came of killing a piece of work.

    Attributes:
        undisturbed_seconds: what the work takes.
        kills: how often it was killed.
        finishes: how often it was then finished.
        different: finishes whose result was not the undisturbed one.
        failures: restarts that ended in an error.
        stages: where it was killed.
        changed: files that differed.
        half_written: files that a kill left under a name of their own (`*.partial`).
    """

    undisturbed_seconds: float = 0.0
    kills: int = 0
    finishes: int = 0
    different: int = 0
    failures: int = 0
    half_written: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)


def hashed(folder: Path, pattern: str) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob(pattern)) if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def interrupt(work: Work, root: Path, kills: int, seed: int, name: str) -> Record:
    """Do `work` undisturbed once; then kill it at least `kills` times, each time between start and where it ends.

    A run that ends before its moment comes is a finish, and the next one begins in an empty folder.
    """
    rng, record = random.Random(seed), Record()
    straight = root / f"{name}-undisturbed"
    start = time.monotonic()
    assert ended(in_a_process(partial(work.do, straight))) == 0, f"{name} fails undisturbed"
    record.undisturbed_seconds = round(time.monotonic() - start, 2)
    expected = work.result(straight)
    assert expected, f"{name} leaves nothing to compare"
    folder = root / f"{name}-killed"
    while record.kills < kills or folder.exists():
        moment = rng.uniform(0, record.undisturbed_seconds) if record.kills < kills else float("inf")
        child = in_a_process(partial(work.do, folder))
        start, status = time.monotonic(), None
        while status is None:
            found, code = os.waitpid(child, os.WNOHANG)
            if found:
                status = os.waitstatus_to_exitcode(code)
            elif time.monotonic() - start > moment:
                os.kill(child, signal.SIGKILL)
                status = ended(child)
            else:
                time.sleep(0.002)
        if status == -signal.SIGKILL:
            record.kills += 1
            record.stages[work.stage(folder)] += 1
            record.half_written += len(list(folder.rglob("*.partial")))
            continue
        record.finishes += 1
        record.failures += status != 0
        found_files = work.result(folder) if status == 0 else expected
        changed = {name for name in {*expected, *found_files} if found_files.get(name) != expected.get(name)}
        record.different += bool(changed)
        record.changed.update(changed)
        shutil.rmtree(folder, ignore_errors=True)
    return record


# The pieces of work


def audit(root: Path) -> Work:
    """From pairs, model and SAE on disk to the page."""
    write_inputs(root)

    def stage(folder: Path) -> str:
        out = folder / "audit"
        if list(out.rglob("*.partial")):
            return "writing a file"
        if (out / "audit.json").exists():
            return "page"
        if (out / "hypotheses.parquet").exists():
            return "tables"
        shards = len(list((out / "harvest").glob("shard-*")))
        return "before the first shard" if not shards else "harvest" if shards < 5 else "statistics"

    return Work(
        do=lambda folder: run.run_audit(config_for(root, folder.name), progress=False),
        result=lambda folder: digests(folder / "audit"),
        stage=stage,
    )


def page(root: Path) -> Work:
    """The page of a finished audit, written anew."""
    write_inputs(root)
    config = config_for(root, "finished")
    assert ended(in_a_process(lambda: run.run_audit(config, progress=False) and None)) == 0

    def do(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        write_report(load_audit(config.out), run.load_dataset(config), folder / "report.html")

    def stage(folder: Path) -> str:
        written = list(folder.glob("*.partial"))
        return "writing the page" if written else "written" if (folder / "report.html").exists() else "making the page"

    return Work(do, lambda folder: hashed(folder, "*.html"), stage)


def scoring(root: Path) -> Work:
    """Scores of two concepts over 300 pairs, saved after every batch."""
    pairs = read_pairs(dataset("explicit", 300), build_tokenizer(), max_length=200)
    model = tiny_model()
    vector = model.get_input_embeddings().weight[5].detach().clone()

    def do(folder: Path) -> None:
        score._SAVE_SECONDS = -1.0
        scorers = {"a": DirectionScorer(vector, 1), "b": DirectionScorer(-vector, 2, "mean")}
        found = score.score_pairs(pairs, scorers, model, cache_dir=folder, progress=False, batch_tokens=2000)
        (folder / "gaps.txt").write_text("".join(str(found.gap(name).tolist()) for name in "ab"))

    def stage(folder: Path) -> str:
        if list(folder.glob("*.partial")):
            return "writing a file"
        return "scoring" if list(folder.glob("scores-*")) else "before the first save"

    return Work(do, lambda folder: {**hashed(folder, "scores-*.safetensors"), **hashed(folder, "gaps.txt")}, stage)


def training(root: Path, model_dir: Path) -> Work:
    """Eight steps of DPO with a policy, a checkpoint after each; goes on from the last whole one."""
    Dataset.from_list(preference_rows(24)).save_to_disk(root / "pairs")
    shaped = policy(root / "concepts", rule("v", "shape_reward"), rule("t", "filter_pairs", fraction=0.1))

    def do(folder: Path) -> None:
        settings = {**EXACT, "save_strategy": "steps", "save_steps": 1, "max_steps": 8, "save_only_model": False}
        data = folder / "pairs"
        if not data.exists():  # a copy, since the score cache lies beside the data
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(root / "pairs", folder / "copying")
            (folder / "copying").rename(data)
        trainer = AnatomyDPOTrainer(
            model=str(model_dir),
            args=DPOConfig(output_dir=str(folder / "out"), **settings),
            train_dataset=load_from_disk(str(data)),
            concept_policy=shaped,
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(folder / "out"))
        trainer.save_model(str(folder / "final"))
        (folder / "final" / "log.json").write_text(json.dumps(log(trainer), sort_keys=True))

    def stage(folder: Path) -> str:
        steps = sorted(folder.glob("out/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        if not steps:
            return "before the first checkpoint"
        return "training" if whole(steps[-1]) else "writing a checkpoint"

    def result(folder: Path) -> dict[str, str]:
        return {**hashed(folder / "final", "*.safetensors"), **hashed(folder / "final", "log.json")}

    return Work(do, result, stage)


def log(trainer: Any) -> list[dict[str, Any]]:
    """What was logged of each step, without times, and without TRL's count of tokens, which a restart begins anew."""
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{key: value for key, value in entry.items() if key != "num_tokens"} for entry in steps]


def whole(checkpoint: Path) -> bool:
    """Whether the trainer finished writing it: `trainer_state.json` is its last file."""
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_text()))
    except (OSError, ValueError):
        return False


def last_checkpoint(out: Path) -> str | None:
    found = [path for path in out.glob("checkpoint-*") if whole(path)]
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None
