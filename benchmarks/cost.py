"""What an audit and a policy cost beside what TRL does anyway, on a small model.

The pass that reads a dataset is set against TRL's own reference precompute over the same rows; a training step of
AnatomyDPOTrainer against one of DPOTrainer, with a second DPOTrainer beside it as the null pair. Variants run in turn
in one process; a ratio is the median over rounds of the ratio within a round. On a CPU one thread is used and its own
CPU time is taken.

    python benchmarks/cost.py --model M --pairs pairs.jsonl
"""

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from trl_anatomy import AnatomyDPOTrainer
from trl_anatomy.reading.harvest import harvest
from trl_anatomy.reading.locate import decoder_layers, hidden_size
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.spans import read_pairs

GPU = torch.cuda.is_available()
POLICY = """version: 1
concepts:
  exclamation: {scorer: text, pattern: "!"}
rules:
  - {explain_away: exclamation, with: shape_reward, strength: 1.0}
"""


def now() -> float:
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def compare(variants: dict[str, Callable[[], Any]], base: str, rounds: int) -> dict[str, Any]:
    """Median seconds of each variant and its ratio to `base`, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = now()
            variants[name]()
            if number:
                seconds[name].append(now() - start)
    found = {}
    for name, values in seconds.items():
        ratios = sorted(own / other for own, other in zip(values, seconds[base], strict=True))
        quarter = len(ratios) // 4
        found[name] = {
            "median_s": statistics.median(values),
            "min_s": min(values),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
        }
        print(
            f"  {name:<40} {found[name]['median_s']:8.3f} s (min {min(values):.3f})   {found[name]['ratio']:.3f} of "
            f"{base} (quartiles {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f})",
            flush=True,
        )
    return found


def random_sae(width: int, latents: int) -> SAE:
    """A random JumpReLU SAE on which about 2 % of the latents fire on normal hidden states."""
    import sae_lens as sl

    torch.manual_seed(0)
    inner: Any = sl.JumpReLUSAE(sl.JumpReLUSAEConfig(d_in=width, d_sae=latents))
    with torch.no_grad():
        inner.threshold.fill_(2.0 * float(inner.W_enc.norm(dim=0).mean()))
    return SAE(inner)


def audit_pass(model_name: str, dataset: Dataset, rounds: int, folder: Path, max_length: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    model = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32).eval()
    layers = len(decoder_layers(model))
    layer = round(layers * 20 / 32)
    sae = random_sae(hidden_size(model), 8 * hidden_size(model))
    pairs = read_pairs(dataset, tokenizer, max_length=max_length)
    trainer = make_trainer(DPOTrainer, model_name, dataset, folder, max_length)
    runs = 0

    def audit() -> None:
        nonlocal runs
        runs += 1
        harvest(trainer.model.eval(), sae, pairs, folder / f"harvest{runs}", layer=layer, progress=False)

    def precompute() -> None:
        nonlocal runs
        runs += 1
        trainer._precompute_model_hash = f"run {runs}"  # else TRL finds what it computed before
        trainer._precompute_ref_logps(trainer.train_dataset, "train", trainer.args.per_device_train_batch_size)

    print(f"\naudit pass, layer {layer} of {layers}, {len(pairs)} pairs, {sae.d_sae} latents")
    variants = {"TRL's reference precompute": precompute, "audit pass": audit}
    found = compare(variants, "TRL's reference precompute", rounds)
    return {
        "what": f"layer {layer} of {layers}, {len(pairs)} pairs, {sae.d_sae} latents",
        "variants": found,
        "goal": 0.60,
        "met": found["audit pass"]["ratio"] <= 0.60,
    }


def make_trainer(kind: Any, model: str, dataset: Dataset, folder: Path, max_length: int, **extra: Any) -> Any:
    args = DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=8,
        max_length=max_length,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
        model_init_kwargs={"dtype": "float32"},
    )
    return kind(model=model, args=args, train_dataset=dataset, **extra)


def training_step(model: str, dataset: Dataset, rounds: int, folder: Path, max_length: int) -> dict[str, Any]:
    policy = folder / "policy.yaml"
    policy.write_text(POLICY)
    kinds = {
        "DPOTrainer": (DPOTrainer, {}),
        "DPOTrainer again (null pair)": (DPOTrainer, {}),
        "AnatomyDPOTrainer, no policy": (AnatomyDPOTrainer, {}),
        "AnatomyDPOTrainer, shape_reward": (AnatomyDPOTrainer, {"concept_policy": str(policy)}),
    }
    variants: dict[str, Callable[[], Any]] = {}
    losses: dict[str, list[float]] = {name: [] for name in kinds}
    for name, (kind, extra) in kinds.items():
        trainer = make_trainer(kind, model, dataset, folder, max_length, **extra)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # set by train()

        def step(trainer: Any = trainer, name: str = name, state: dict[str, Any] = {}) -> None:  # noqa: B006
            batch = next(state.get(name, iter(())), None)
            if batch is None:
                torch.manual_seed(0)
                state[name] = iter(trainer.get_train_dataloader())
                batch = next(state[name])
            losses[name].append(float(trainer.training_step(trainer.model, batch)))
            trainer.model.zero_grad()

        variants[name] = step
    print(f"\ntraining step, batch of 8 pairs, {len(dataset)} pairs")
    found = compare(variants, "DPOTrainer", rounds)
    first, null, plain, shaped = losses.values()
    assert first == null == plain, "the trainers without a policy computed other losses"
    assert shaped != first, "the policy did nothing"
    goals = {name: found[name]["ratio"] <= 1.01 for name in list(kinds)[2:]}
    return {"what": "forward, backward and collation, batch of 8 pairs", "variants": found, "goal": 1.01, "met": goals}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a small chat model")
    parser.add_argument("--pairs", required=True, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--rows", type=int, default=200, help="preference rows (default 200)")
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the audit pass (default 5)")
    parser.add_argument("--steps", type=int, default=40, help="rounds of the training step (default 40)")
    parser.add_argument("--results", default="benchmarks/results/cost.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = load_dataset("json", data_files=args.pairs, split=f"train[:{args.rows}]")
    dataset = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step = training_step(args.model, dataset, args.steps, folder, args.max_length)
        audit = audit_pass(args.model, dataset, args.rounds, folder, args.max_length)
    results = {
        "command": " ".join(["python", Path(sys.argv[0]).name, "--model", Path(args.model).name]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if GPU else platform.machine(),
        "rows": args.rows,
        "rounds": args.rounds,
        "steps": args.steps,
        "max_length": args.max_length,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "sae-lens")},
        "training_step": step,
        "audit_pass": audit,
    }
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    Path(args.results).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
