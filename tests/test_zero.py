"""DeepSpeed's ZeRO-2 and ZeRO-3 over two processes of a CPU: the shipped configurations train as one process does."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TWO_PROCESSES, preference_rows
from datasets import Dataset, load_from_disk
from explicit_dpo import BETA, SHAPE, lora
from hidden_world import rule
from parity import EXACT, fresh, history
from safetensors.torch import load_file
from test_hidden_life import all_rules, plain_rows
from test_sharded import EACH_STEP, RECIPES
from test_verb_reweight_pairs import SHAPE_RULES, column_policy, weighted_rows
from test_verb_tokens import MASK, inoculation
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, RewardConfig

from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer, ConceptReward
from trl_anatomy.trainers.checkpoints import flaw

pytestmark = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="deepspeed is not installed: CONTRIBUTING.md has the command"
)
SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import test_zero
test_zero.on_two_cpus()
test_zero.train_all(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def on_two_cpus() -> None:
    """Have accelerate 1.15 ask DeepSpeed for two processes of a CPU.

    Told to use a CPU it leaves DeepSpeed out; not told, it finds no backend and counts one process where DeepSpeed
    counts two. Given gloo it counts as DeepSpeed does.
    """
    import deepspeed
    from accelerate import PartialState
    from accelerate.utils import DeepSpeedPlugin, DistributedType
    from transformers import training_args

    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_CPU)
    training_args.is_torch_bf16_gpu_available = lambda: True
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for minutes, to be faster than gloo
    begin = DeepSpeedPlugin.__post_init__

    def shard_all(plugin: Any) -> None:
        begin(plugin)  # ZeRO-3 leaves small parameters whole: of a model as small as this one, all
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = shard_all


# What is trained ------------------------------------------------------------------------------------------------------


def dpo_of(model: Any, out: Path, rows: Any, policy: Any, **options: Any) -> Any:
    """Of a path, as the recipes train: under ZeRO-3 transformers then loads policy and reference in parts."""
    more = {name: options.pop(name) for name in ("peft_config", "eval_dataset") if name in options}
    args = DPOConfig(output_dir=str(out), **{**EXACT, "gradient_checkpointing": False, "beta": BETA, **options})
    dataset = rows if isinstance(rows, Dataset) else fresh(rows)
    model = str(model) if isinstance(model, Path) else model
    return AnatomyDPOTrainer(model, args=args, train_dataset=dataset, concept_policy=policy, **more)


def dpo_of_instance(model_dir: Path, *args: Any, **options: Any) -> Any:
    """Of a model that is in parts already: the arguments of the case before are still in force."""
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    assert hasattr(model.lm_head.weight, "ds_id") == is_deepspeed_zero3_enabled()
    return dpo_of(model, *args, **options)


def dpo_of_files(model_dir: Path, out: Path, rows: Any, *args: Any, **options: Any) -> Any:
    """Of rows in a folder that the processes share: TRL keeps the reference there."""
    return dpo_of(model_dir, out, load_from_disk(out.parent / "rows"), *args, **options)


def reward_of(model_dir: Path, out: Path, rows: Any, policy: Any, **options: Any) -> Any:
    args = RewardConfig(output_dir=str(out), **{**EXACT, "gradient_checkpointing": False, **options})
    model = str(model_dir.parent / "reward")
    return AnatomyRewardTrainer(model, args, train_dataset=fresh(rows), concept_policy=policy)


def with_rules(*rules: dict[str, Any]) -> Callable[[Path], dict[str, Any]]:
    """Folder with concepts -> policy of these rules; without any, of one on hidden states of every kind."""

    def policy(folder: Path) -> dict[str, Any]:
        everything = json.loads((folder / "policy.json").read_text())
        return {**everything, "rules": list(rules) or everything["rules"]}

    return policy


EVERY_KIND = with_rules()


@dataclass(frozen=True)
class Case:
    rows: list[dict[str, Any]] = field(default_factory=lambda: plain_rows(12))
    policy: Callable[[Path], Any] = EVERY_KIND
    make: Callable[..., Any] = dpo_of
    options: dict[str, Any] = field(default_factory=dict)


GRADIENT = rule("u", "project_out", **{"from": "gradient", "weights": "o_proj|q_proj"})
SCORED = rule("v", "shape_reward", strength=1.0)
WEIGHTS = Case(weighted_rows(), lambda folder: column_policy(*SHAPE_RULES))
CASES = {
    "no policy": Case(policy=lambda folder: None),
    "margins": Case(preference_rows(12), lambda _: SHAPE, options={"eval_strategy": "steps", "eval_steps": 2}),
    "weights": WEIGHTS,
    "masks": Case(preference_rows(12), lambda folder: MASK),
    "inoculate": Case(preference_rows(12), lambda folder: inoculation()),
    "hidden": Case(options={"gradient_checkpointing": True}),
    "hidden, adapters": Case(options={"gradient_checkpointing": True, "peft_config": lora()}),
    "gradient": Case(policy=with_rules(GRADIENT), options={"gradient_accumulation_steps": 2}),
    "scored": Case(policy=with_rules(SCORED)),
    "scored, instance": Case(policy=with_rules(SCORED), make=dpo_of_instance),
    "scored, precomputed": Case(
        policy=with_rules(SCORED), make=dpo_of_files, options={"precompute_ref_log_probs": True}
    ),
    "reward, weights": Case(WEIGHTS.rows, WEIGHTS.policy, reward_of),
    "reward, hidden": Case(make=reward_of),
    "reward, kept": Case(policy=with_rules(rule("w", "project_out", keep=True), GRADIENT), make=reward_of),
}
TEXTS = ["w1 **bold** w2", "w3 yes", "no w4 w5"]


def trainer_of(name: str, model_dir: Path, out: Path, **options: Any) -> Any:
    case = CASES[name]
    options = {"max_steps": 3, "optim": "sgd", **case.options, **options}
    options["per_device_eval_batch_size"] = options["per_device_train_batch_size"]
    if "eval_strategy" in options:
        options["eval_dataset"] = fresh(preference_rows(6, seed=1))
    return case.make(model_dir, out / name, case.rows, case.policy(model_dir.parent), **options)


def concept_rewards(model_dir: Path) -> list[float]:
    reward = ConceptReward(with_rules(SCORED)(model_dir.parent), model=str(model_dir))
    return reward(prompts=["w6"] * len(TEXTS), completions=TEXTS)


def train_all(model_dir: Path, out: Path) -> None:
    """What each of the two processes does."""
    here: dict[str, Any] = {"per_device_train_batch_size": 3, "use_cpu": False}
    found: dict[str, Any] = {"float": {}, "half": {}}
    for name in CASES:
        trainer = trainer_of(name, model_dir, out, **here)
        state = trainer.accelerator.state
        assert (state.distributed_type, state.num_processes) == ("DEEPSPEED", 2)
        trainer.train()
        if is_deepspeed_zero3_enabled():
            whole = [key for key, p in trainer.model.named_parameters() if 2 * p.ds_tensor.numel() > p.ds_numel + 1]
            assert not whole, f"not sharded: {whole}"
        trainer.save_model(str(out / name / "final"))
        found["float"][name] = history(trainer)
    found["rewards"] = concept_rewards(model_dir)

    for name in ("margins", "scored, precomputed"):  # the precision of the configurations
        trainer = trainer_of(name, model_dir, out / "half", **here, bf16=True)
        trainer.train()
        assert trainer.model.dtype == torch.bfloat16
        found["half"][name] = history(trainer)

    steps = {**here, **EACH_STEP, "optim": "adamw_torch"}
    trainer = trainer_of("hidden", model_dir, out / "resumed", **steps)
    trainer.train()
    folder = out / "resumed" / "hidden"
    trainer.save_model(str(folder / "through"))
    if trainer.is_world_process_zero():
        found["flaws"] = [flaw(folder / f"checkpoint-{step}") for step in (1, 2, 3)]
        (folder / "checkpoint-3" / "trainer_state.json").unlink()
        next(folder.glob("checkpoint-2/global_step2/*rank_1*optim_states.pt")).write_bytes(b"PK")
    trainer.accelerator.wait_for_everyone()
    trainer = trainer_of("hidden", model_dir, out / "resumed", **steps)
    trainer.train(True)
    trainer.save_model(str(folder / "final"))
    if trainer.is_world_process_zero():
        torch.save(found, out / "found.pt")


# Two processes and one ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model; beside it one with a reward head, and concepts with a policy."""
    folder = tmp_path_factory.mktemp("zero")
    for name, kind in (("model", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        torch.manual_seed(0)  # the head is drawn
        options = {"num_labels": 1} if name == "reward" else {}
        kind.from_pretrained(tiny_model_dir, **options).save_pretrained(folder / name)
        AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder / name)
    policy = all_rules(folder)
    policy["rules"] = [rule for rule in policy["rules"] if "from" not in rule]
    (folder / "policy.json").write_text(json.dumps(policy))
    return folder / "model"


def with_dataset(folder: Path) -> Path:
    fresh(plain_rows(12)).save_to_disk(folder / "rows")
    return folder


@pytest.fixture(scope="module")
def alone(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_dataset(tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module", params=[2, 3], ids=["zero2", "zero3"])
def two(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of what two processes trained."""
    out = with_dataset(tmp_path_factory.mktemp("two"))
    with_dataset(out / "half")
    script = out / "train.py"
    script.write_text(SCRIPT)
    launch = [word for word in TWO_PROCESSES if word != "--multi_gpu"]
    launch[3:3] = ["--config_file", str(RECIPES / f"zero{request.param}.yaml")]
    words = [*launch, str(script), str(Path(__file__).parent), str(model_dir), str(out)]
    environment = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    run = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-5000:]
    (out / "stderr").write_text(run.stderr)
    return out


def found_in(two: Path) -> dict[str, Any]:
    return torch.load(two / "found.pt", weights_only=True)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def comparable(entries: list[dict[str, float]]) -> list[dict[str, float]]:
    """Less the operations counted, which follow the padding of each process, and of the first step what hangs on the
    sign of rewards that are zero but for rounding.
    """
    signs = ("accuracies", "correlation", "explained")
    made = [{key: value for key, value in entry.items() if key != "total_flos"} for entry in entries]
    first = next(i for i, entry in enumerate(made) if "loss" in entry)
    made[first] = {key: value for key, value in made[first].items() if not key.endswith(signs)}
    return made


@pytest.mark.parametrize("name", list(CASES))
def test_two_processes_train_as_one(name: str, two: Path, alone: Path, model_dir: Path) -> None:
    """Every figure of every log, and the weights that are saved."""
    single = trainer_of(name, model_dir, alone, per_device_train_batch_size=6)
    before = {key: value.clone() for key, value in single.model.state_dict().items()}
    single.train()
    moved = max((value - before[key]).abs().max().item() for key, value in single.model.state_dict().items())
    assert moved > 1e-3
    single.save_model(str(alone / name / "final"))
    found, wanted = comparable(found_in(two)["float"][name]), comparable(history(single))
    assert sum("loss" in entry for entry in wanted) == 3
    assert found == [pytest.approx(entry, rel=1e-3, abs=1e-5) for entry in wanted]
    found_weights, wanted_weights = weights(two / name / "final"), weights(alone / name / "final")
    assert found_weights.keys() == wanted_weights.keys()
    for key, tensor in wanted_weights.items():
        torch.testing.assert_close(found_weights[key], tensor, rtol=1e-4, atol=1e-6)


def test_what_the_policy_says_keeps_its_precision(two: Path, alone: Path, model_dir: Path) -> None:
    """In bfloat16 too, to which the Trainer casts a batch under DeepSpeed; so does a reference that was stored."""
    half = {name: [entry for entry in found_in(two)["half"][name] if "loss" in entry] for name in found_in(two)["half"]}
    single = trainer_of("margins", model_dir, alone, per_device_train_batch_size=6)
    single.train()
    exact = [entry for entry in single.state.log_history if "loss" in entry]
    for key in ("rewards_shaped/offset_margin", "concepts/bold/gap", "concepts/low/gap"):
        assert [e[key] for e in half["margins"]] == pytest.approx([e[key] for e in exact], rel=1e-6), key
    assert [e["loss"] for e in half["margins"]] == pytest.approx([e["loss"] for e in exact], rel=0.05)
    assert half["scored, precomputed"][0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_checkpoints(two: Path) -> None:
    """Whole ones are seen as such; past two that are not, training goes on from the first, and ends the same."""
    assert found_in(two)["flaws"] == [None] * 3
    assert (
        "optim_states.pt is cut short) is not whole: training goes on from checkpoint-1."
        in (two / "stderr").read_text()
    )
    through = weights(two / "resumed" / "hidden" / "through")
    for key, tensor in weights(two / "resumed" / "hidden" / "final").items():
        torch.testing.assert_close(tensor, through[key], rtol=1e-5, atol=1e-7)


def test_a_concept_reward_reads_a_whole_model(two: Path, model_dir: Path) -> None:
    assert found_in(two)["rewards"] == pytest.approx(concept_rewards(model_dir), rel=1e-5)
