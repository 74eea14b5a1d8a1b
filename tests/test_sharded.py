"""Weights sharded by FSDP2 over two processes of a CPU: the shipped configuration trains as one process does."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TWO_PROCESSES, preference_rows
from explicit_dpo import SHAPE, dpo
from test_hidden_life import directions_only, plain_rows

RECIPES = Path(__file__).parents[1] / "recipes" / "accelerate"

# accelerate 1.15 shards nothing on a CPU, whatever the configuration says: its state turns FSDP on for the distributed
# types of accelerators only. Told that two CPUs are GPUs it does, and torch's `fully_shard` runs on them.
SHARDED = """
import sys, torch
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from accelerate import PartialState
from accelerate.utils import DistributedType

start = PartialState.__init__

def as_gpus(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU

PartialState.__init__ = as_gpus
from test_sharded import CASES, EACH_STEP, dpo
from trl_anatomy.trainers.checkpoints import flaw
model, out = Path(sys.argv[2]), Path(sys.argv[3])
found = {}

def trained(name, resume=None, **options):
    rows, policy = CASES[name](out)
    trainer = dpo(model, out / name, rows, policy=policy, per_device_train_batch_size=3, **options)
    assert (trainer.accelerator.num_processes, trainer.is_fsdp_enabled) == (2, True)
    trainer.train(resume_from_checkpoint=resume)
    assert type(next(trainer.model.parameters())).__name__ == "DTensor", "nothing was sharded"
    weights = trainer.accelerator.get_state_dict(trainer.model)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, {"weights": {key: value.clone() for key, value in weights.items()}, "losses": losses}

_, found["shaped"] = trained("shaped", max_steps=3, optim="sgd")
_, found["hidden"] = trained("hidden", max_steps=3, optim="sgd")
first, found["through"] = trained("shaped", **EACH_STEP)
if first.is_world_process_zero():
    found["flaws"] = [flaw(out / "shaped" / f"checkpoint-{step}") for step in (1, 2, 3)]
    (out / "shaped" / "checkpoint-3" / "trainer_state.json").unlink()
    (out / "shaped" / "checkpoint-2" / "rng_state_1.pth").write_bytes(b"PK")
first.accelerator.wait_for_everyone()
_, found["resumed"] = trained("shaped", True, **EACH_STEP)
if first.is_world_process_zero():
    torch.save(found, out / "found.pt")
"""


def without_gradient(out: Path) -> dict[str, Any]:
    """Rules on hidden states, less `project_out` with `from: gradient`, which FSDP refuses."""
    policy = directions_only(out)
    return {**policy, "rules": [rule for rule in policy["rules"] if "from" not in rule]}


EACH_STEP: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
CASES = {
    "shaped": lambda out: (preference_rows(12), SHAPE),
    "hidden": lambda out: (plain_rows(12), without_gradient(out)),
}


@pytest.fixture(scope="module")
def found(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("sharded")
    directions_only(out)  # writes the concepts, which both ranks then read
    script = out / "train.py"
    script.write_text(SHARDED)
    config = ["--config_file", str(RECIPES / "fsdp2.yaml")]
    launch = [word for word in TWO_PROCESSES if word != "--multi_gpu"]
    launch[3:3] = config
    words = [*launch, str(script), str(Path(__file__).parent), str(tiny_model_dir), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "checkpoint-2 (rng_state_1.pth is cut short) is not whole: training goes on from checkpoint-1." in run.stderr
    return torch.load(out / "found.pt", weights_only=True)


@pytest.mark.parametrize("case", list(CASES))
def test_sharded_weights_train_as_one_process(
    case: str, found: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    rows, policy = CASES[case](tmp_path)
    single = dpo(tiny_model_dir, tmp_path, rows, policy=policy, per_device_train_batch_size=6, max_steps=3, optim="sgd")
    before = {name: tensor.clone() for name, tensor in single.model.state_dict().items()}
    single.train()
    losses = [entry["loss"] for entry in single.state.log_history if "loss" in entry]
    assert found[case]["losses"] == pytest.approx(losses, abs=1e-5)
    moved = 0.0
    for name, tensor in single.model.state_dict().items():
        torch.testing.assert_close(found[case]["weights"][name], tensor, rtol=1e-4, atol=1e-6)
        moved = max(moved, (tensor - before[name]).abs().max().item())
    assert moved > 1e-4


def test_sharded_checkpoints(found: dict[str, Any]) -> None:
    """Whole ones are seen as such; past two that are not, training goes on from the first, and ends the same."""
    assert found["flaws"] == [None] * 3
    for name, tensor in found["through"]["weights"].items():
        torch.testing.assert_close(found["resumed"]["weights"][name], tensor, rtol=1e-5, atol=1e-7)
