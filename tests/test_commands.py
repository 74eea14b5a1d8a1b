"""Every command: what it writes is the same each time, and nothing here reaches for another machine unasked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from audit_files import digests, write_inputs

TESTS = Path(__file__).parent
# Offline modes would forbid it to the libraries: here every attempt is to be seen.
SHUT = (
    "HF_HUB_OFFLINE",
    "WANDB_MODE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "HF_UPDATE_DOWNLOAD_COUNTS",
)

WRITTEN = ("audit/", "concept/", "dpo/model.safetensors", "reward/model.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, dict[str, Any]]]:
    """Two processes, each with folders of its own and with another order of sets; folder and what it told of each."""
    inputs = tmp_path_factory.mktemp("inputs")
    write_inputs(inputs)
    shutil.copytree(inputs / "model", inputs / "again")
    (inputs / "pairs").mkdir()
    shutil.copy(inputs / "pairs.jsonl.gz", inputs / "pairs" / "train.jsonl.gz")
    base = {key: value for key, value in os.environ.items() if key not in SHUT}
    started = []
    for seed, more, words in (("1", {}, ["--demo"]), ("2", {"HF_HUB_DISABLE_TELEMETRY": "1"}, [])):
        root = tmp_path_factory.mktemp("run") / "work"
        shutil.copytree(inputs, root)
        places = {"HF_HOME": str(root.parent / "cache"), "PYTHONPATH": str(TESTS.parent), "PYTHONHASHSEED": seed}
        command = [sys.executable, str(TESTS / "every_command.py"), *words]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append((root, subprocess.Popen(command, cwd=root, env={**base, **places, **more}, **pipes)))
    found = []
    for root, process in started:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        found.append((root, {**json.loads(out.splitlines()[-1]), "out": out}))
    return found


def test_every_command_ends_well(runs: list[tuple[Path, dict[str, Any]]]) -> None:
    for _, told in runs:
        assert set(told["ended"].values()) == {0}
        assert len(told["ended"]) >= 9


def test_no_command_reaches_for_another_machine(runs: list[tuple[Path, dict[str, Any]]]) -> None:
    """But for one thing that TRL's own trainers do unless they are told not to: they tell the hub of their use."""
    (_, as_it_comes), (_, without_telemetry) = runs
    assert without_telemetry["tried"] == []
    assert [told for told in as_it_comes["tried"] if "_telemetry.py" not in told[1]] == []
    assert {command for command, _ in as_it_comes["tried"]} <= {"predict", "dpo", "reward", "demo"}


def test_the_same_command_makes_the_same_files(runs: list[tuple[Path, dict[str, Any]]]) -> None:
    made = []
    for root, told in runs:
        files = {name: digest for name, digest in digests(root).items() if name.startswith(WRITTEN)}
        made.append({**files, "plan": told["out"].split('"counts"')[1].split("report.html")[0]})
    assert made[0] == made[1]
    parts = (
        "audit.json",
        "report.html",
        "samples.parquet",
        "harvest/shard",
        "scores/",
        "compare/compare.json",
        "prediction/prediction.json",
    )
    parts += ("prediction/prediction.json",)
    for start in (*(f"audit/{part}" for part in parts), "concept/card.json", *WRITTEN[2:]):
        assert any(name.startswith(start) for name in made[0]), start
