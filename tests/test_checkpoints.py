"""Killed inside a checkpoint, a training goes on from the last whole one, and ends as one that was not killed."""

import json
import os
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows
from datasets import Dataset
from parity import EXACT, assert_same_tensors, state
from peft import LoraConfig
from test_restart import ended, in_a_process
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig

from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer
from trl_anatomy.errors import AnatomyError
from trl_anatomy.trainers.checkpoints import flaw, last_whole

EACH_STEP = {**EXACT, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
READ = {  # by the Trainer that goes on
    "trainer_state.json",
    "config.json",
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
}


def trainer(model: Path, out: Path, cls: Any = AnatomyDPOTrainer, **extra: Any) -> Any:
    config = RewardConfig if cls is AnatomyRewardTrainer else DPOConfig
    return cls(
        model=str(model),
        args=config(output_dir=str(out), **EACH_STEP),
        train_dataset=Dataset.from_list(preference_rows(12)),
        **extra,
    )


@pytest.fixture(scope="module")
def whole(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """The folder of an undisturbed training with its three checkpoints, and the final weights."""
    out = tmp_path_factory.mktemp("whole") / "out"
    done = trainer(tiny_model_dir, out)
    done.train()
    return out, state(done.model)


def copied(whole: Path, out: Path, *steps: int) -> Path:
    for step in steps:
        shutil.copytree(whole / f"checkpoint-{step}", out / f"checkpoint-{step}")
    return out


class Limit(TrainerCallback):
    """From the second step on the kernel kills this process where it writes beyond `size` bytes into a file."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def resumed(model: Path, out: Path, **extra: Any) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Final weights of a training that goes on in `out`, and what was warned of checkpoints."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = trainer(model, out, **extra)
        again.train(resume_from_checkpoint=True)
    return state(again.model), [str(w.message) for w in caught if "checkpoint-" in str(w.message)]


@pytest.mark.parametrize(
    ("name", "share"), [("model.safetensors", 0.5), ("optimizer.pt", 0.999), ("rng_state.pth", 0.5)]
)
def test_killed_inside_the_write_of_a_file(
    name: str, share: float, whole: tuple[Path, dict[str, torch.Tensor]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    size = int((whole[0] / "checkpoint-2" / name).stat().st_size * share)

    def work() -> None:
        trainer(tiny_model_dir, tmp_path, callbacks=[Limit(size)]).train()

    assert ended(in_a_process(work)) == -signal.SIGXFSZ
    left = {file.name: file.stat().st_size for file in (tmp_path / "checkpoint-2").iterdir()}
    assert size in left.values() or 0 in left.values(), (size, left)
    assert flaw(tmp_path / "checkpoint-2") is not None
    weights, told = resumed(tiny_model_dir, tmp_path)
    assert len(told) == 1
    assert "checkpoint-2" in told[0]
    assert told[0].endswith("goes on from checkpoint-1.")
    assert_same_tensors(weights, whole[1])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_killed_as_a_file_appears(
    name: str, whole: tuple[Path, dict[str, torch.Tensor]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    """SIGKILL at once after the file is there, whole or not: whichever checkpoint serves, the end is the same."""
    child = in_a_process(lambda: trainer(tiny_model_dir, tmp_path).train())
    end = time.monotonic() + 60
    while not (tmp_path / "checkpoint-2" / name).exists():
        assert time.monotonic() < end, "the file never came"
    os.kill(child, signal.SIGKILL)
    assert ended(child) == -signal.SIGKILL
    weights, told = resumed(tiny_model_dir, tmp_path)
    assert bool(told) == (flaw(tmp_path / "checkpoint-2") is not None) or (tmp_path / "checkpoint-3").exists()
    assert_same_tensors(weights, whole[1])


def test_every_file_cut(whole: tuple[Path, dict[str, torch.Tensor]], tiny_model_dir: Path, tmp_path: Path) -> None:
    """Cut at the start, in the middle or by a byte, or gone: what is read is a flaw, and nothing else is."""
    checkpoint = copied(whole[0], tmp_path, 2) / "checkpoint-2"
    assert flaw(checkpoint) is None
    seen = set()
    for file in sorted(checkpoint.iterdir()):
        data = file.read_bytes()
        found = []
        for size in (0, len(data) // 2, len(data) - 2):
            file.write_bytes(data[:size])
            found.append(flaw(checkpoint))
        file.unlink()
        found.append(flaw(checkpoint) if file.name != "config.json" else f"{file.name} may be missing")
        file.write_bytes(data)
        assert all(found) or not any(found), (file.name, found)
        if found[0]:
            assert found[0] == f"{file.name} is cut short"
            seen.add(file.name)
    assert seen == READ
    # The Trainer goes on without the others.
    copied(whole[0], tmp_path / "rest", 2)
    for file in (tmp_path / "rest" / "checkpoint-2").iterdir():
        if file.name not in READ:
            file.write_bytes(b"")
    weights, told = resumed(tiny_model_dir, tmp_path / "rest")
    assert_same_tensors(weights, whole[1])
    assert told == []


def test_a_path_that_is_cut_short_is_one_sentence(
    whole: tuple[Path, dict[str, torch.Tensor]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = copied(whole[0], tmp_path, 1, 2)
    (out / "checkpoint-2" / "trainer_state.json").unlink()
    ours = trainer(tiny_model_dir, out)
    wanted = r"checkpoint-2 is not whole \(trainer_state.json is missing\); the last whole one there is checkpoint-1\.$"
    with pytest.raises(AnatomyError, match=wanted):
        ours.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert last_whole(out)[0] == out / "checkpoint-1"
    shutil.rmtree(out / "checkpoint-1")
    for asked in (True, "True"):
        with pytest.raises(AnatomyError, match=r"no checkpoint is whole: checkpoint-2 .*; start without"):
            ours.train(resume_from_checkpoint=asked)


def test_all_whole_or_none_there_is_the_trainers_own_business(
    whole: tuple[Path, dict[str, torch.Tensor]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = copied(whole[0], tmp_path, 1, 2)
    (out / "checkpoint-10-notes").mkdir()
    weights, told = resumed(tiny_model_dir, out)
    assert_same_tensors(weights, whole[1])
    assert told == []
    messages = []
    for cls in (AnatomyDPOTrainer, DPOTrainer):
        empty = tmp_path / cls.__name__
        empty.mkdir()
        with pytest.raises(ValueError, match="No valid checkpoint") as error:
            trainer(tiny_model_dir, empty, cls).train(resume_from_checkpoint=True)
        messages.append(str(error.value).replace(str(empty), "OUT"))
    assert messages[0] == messages[1]


def test_a_checkpoint_that_is_written_over_is_not_whole_meanwhile(
    whole: tuple[Path, dict[str, torch.Tensor]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    out = copied(whole[0], tmp_path, 1, 2)
    size = (out / "checkpoint-2" / "optimizer.pt").stat().st_size // 2

    def work() -> None:
        ours = trainer(tiny_model_dir, out, callbacks=[Limit(size)])
        ours.train(resume_from_checkpoint=str(out / "checkpoint-1"))

    assert ended(in_a_process(work)) == -signal.SIGXFSZ
    assert flaw(out / "checkpoint-2") == "trainer_state.json is missing"
    assert_same_tensors(resumed(tiny_model_dir, out)[0], whole[1])


def test_sharded_and_adapters(
    whole: tuple[Path, dict[str, torch.Tensor]], tiny_model_dir: Path, tmp_path: Path
) -> None:
    sharded = copied(whole[0], tmp_path / "sharded", 1) / "checkpoint-1"
    AutoModelForCausalLM.from_pretrained(sharded).save_pretrained(tmp_path / "parts", max_shard_size="8KB")
    (sharded / "model.safetensors").unlink()
    assert flaw(sharded) == "the file of weights is missing"
    for file in (tmp_path / "parts").glob("model*"):
        shutil.copy(file, sharded)
    shards = sorted(sharded.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert flaw(sharded) is None
    assert_same_tensors(resumed(tiny_model_dir, sharded.parent)[0], whole[1])
    shards[1].unlink()
    assert flaw(sharded) == f"{shards[1].name} is missing"

    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapters = tmp_path / "adapters"
    torch.manual_seed(0)
    done = trainer(tiny_model_dir, adapters, AnatomyRewardTrainer, peft_config=lora)
    done.train()
    assert [flaw(adapters / f"checkpoint-{step}") for step in (1, 2, 3)] == [None] * 3
    file = adapters / "checkpoint-3" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    (adapters / "checkpoint-2" / "adapter_config.json").unlink()
    weights, told = resumed(tiny_model_dir, adapters, cls=AnatomyRewardTrainer, peft_config=lora)
    assert told == [
        f"{adapters}: checkpoint-3 (adapter_model.safetensors is cut short), checkpoint-2 (adapter_config.json is "
        "missing) is not whole: training goes on from checkpoint-1."
    ]
    assert_same_tensors(weights, state(done.model))


def test_what_several_processes_write(whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """The names under which FSDP and DeepSpeed leave weights and optimizer."""
    plain = copied(whole[0], tmp_path, 1) / "checkpoint-1"
    archive = (plain / "optimizer.pt").read_bytes()
    (plain / "rng_state.pth").rename(plain / "rng_state_0.pth")
    (plain / "model.safetensors").unlink()
    (plain / "optimizer.pt").unlink()

    fsdp = shutil.copytree(plain, tmp_path / "fsdp")
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (fsdp / name).mkdir()
        (fsdp / name / "__0_0.distcp").write_bytes(b"tensors")
        assert flaw(fsdp) is not None
        (fsdp / name / ".metadata").write_bytes(b"places")
    assert flaw(fsdp) is None
    (fsdp / "optimizer_0" / "__0_0.distcp").write_bytes(b"")
    assert flaw(fsdp) == "optimizer_0/__0_0.distcp is cut short"

    deepspeed = shutil.copytree(plain, tmp_path / "deepspeed")
    (deepspeed / "scheduler.pt").unlink()
    (deepspeed / "latest").write_text("global_step1")
    (deepspeed / "global_step1").mkdir()
    assert flaw(deepspeed) is not None
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        (deepspeed / "global_step1" / name).write_bytes(archive)
    assert flaw(deepspeed) is None
    (deepspeed / "global_step1" / name).write_bytes(archive[:-1])
    assert flaw(deepspeed) == f"global_step1/{name} is cut short"

    only_model = copied(whole[0], tmp_path / "only", 1) / "checkpoint-1"
    for name in ("optimizer.pt", "scheduler.pt"):
        (only_model / name).unlink()
        assert flaw(only_model) is not None
    (only_model / "rng_state.pth").unlink()
    assert flaw(only_model) is None  # save_only_model
    assert json.loads((only_model / "trainer_state.json").read_text())["global_step"] == 1
