"""Does `trl-anatomy sae` make an SAE that fits pairs of sources it never saw, and as fast as sae-lens' own runner?

    python benchmarks/studies/sae.py --model SMOLLM2

On a real chat model (SmolLM2-135M-Instruct) and real pairs (apart: `TRL_ANATOMY_SHARED`) the command trains an SAE on
pairs of five sources; pairs of five others judge it. Then the library and sae-lens' LanguageModelSAETrainingRunner
train on the same packed tokens: with the same model, precision, layer, architecture, latents, k, batch, learning rate
and number of steps, one after the other in one process on one thread. The machine may do other work, so CPU seconds
stand beside the seconds of the clock.

What is finished in `--work` is used again. Results hold numbers only, no text.
"""

import argparse
import datetime
import gzip
import json
import os
import platform
import random
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_MODE", "offline")

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_anatomy.reading.files import without_nan
from trl_anatomy.reading.forward import read_texts
from trl_anatomy.reading.sae import SAE, load_sae
from trl_anatomy.reading.sae_check import check_fit
from trl_anatomy.reading.sae_training import BATCH, OUTLIER, SAERecipe, Sequences, recipe, sequences_of, train_saes
from trl_anatomy.reading.spans import Pairs, read_pairs

TRAINED_ON = (
    "permissive_upstream/ultrafeedback_subset",
    "permissive/oasst_en100",
    "noncommercial/alpaca_eval2_cross_model",
    "permissive/autoj_pairwise",
    "licence_unstated/rm_bench",
)
HELD_OUT = (
    "permissive_upstream/hh_helpful_test",
    "permissive/hh_harmless_test",
    "noncommercial/dsp_domain",
    "licence_unstated/judgebench_gpt4o",
    "permissive/overrefusal_steered",
)
ROWS, LONGEST_PROMPT = 700, 1500  # rows of a source, and characters of a prompt
LENGTH, JUDGED_LENGTH, CONTEXT = 512, 256, 256  # tokens
JUDGED = 64  # pairs of each source
RESULT = Path(__file__).parents[1] / "results" / "sae.json"
_PACKAGES = ("trl_anatomy", "torch", "transformers", "trl", "sae-lens")


def rows_of(shared: Path, source: str, seed: random.Random, most: int) -> list[dict[str, Any]]:
    """Conversations of some pairs of a source."""
    with gzip.open(shared / "data" / "pairs" / f"{source}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    seed.shuffle(rows)
    kept = [row for row in rows[:most] if not (isinstance(row["prompt"], str) and len(row["prompt"]) > LONGEST_PROMPT)]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return [
        {
            side: [{"role": role, "content": row[side]}] if isinstance(row[side], str) else row[side]
            for side, role in roles.items()
        }
        for row in kept
    ]


def write_pairs(shared: Path, file: Path) -> None:
    """The pairs of training, in the order of their sources."""
    seed = random.Random(0)
    with open(file, "w", encoding="utf-8") as out:
        for source in TRAINED_ON:
            out.writelines(json.dumps(row) + "\n" for row in rows_of(shared, source, seed, ROWS))


def trained(model: str, work: Path, tokens: int) -> dict[str, Any]:
    """Train by the command, in a process of its own, if that is not finished; what it took, and its figures."""
    words = ["--model", model, "--dataset", str(work / "pairs.jsonl"), "--max_length", str(LENGTH)]
    words += ["--tokens", str(tokens), "--out", str(work / "sae")]
    usage, start = work / "usage.json", time.time()
    process = subprocess.Popen([sys.executable, "-m", "trl_anatomy.cli", "sae", *words])
    _, status, spent = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"trl-anatomy sae ended with {os.waitstatus_to_exitcode(status)}")
    if not usage.is_file():
        found = {"seconds": time.time() - start, "cpu_seconds": spent.ru_utime + spent.ru_stime}
        usage.write_text(json.dumps({**found, "peak_mib": spent.ru_maxrss / 1024}))
    made = json.loads((work / "sae" / "training.json").read_text())
    (layer,) = made["layers"]
    return {**made["recipe"], "layer": layer, "sources": len(TRAINED_ON), **json.loads(usage.read_text())} | {
        "figures": made["figures"][str(layer)]
    }


@torch.no_grad()
def fired(model: Any, sae: SAE, layer: int, sequences: Sequences, k: int | None = None) -> dict[str, Any]:
    """Variance explained and latents that fire, over the tokens of sequences, without first tokens and outliers.

    With `k` under the one threshold at which k latents fire per token: the runner's, a moving average that begins at 0,
    is not yet there after few steps, which is no fault of the weights.
    """
    parts = []
    for i, hidden in read_texts(model, [ids.tolist() for ids in sequences.ids], [layer], pad_token_id=0):
        parts.append(hidden[layer][sequences.learn_from[i] :].float())
    states = torch.cat(parts)
    norms = states.norm(dim=1)
    states = states[norms <= OUTLIER * norms.mean()]
    if k is not None:
        sae._inner.threshold.zero_()
        largest = torch.empty(0)
        for part in states.split(BATCH):
            codes = sae.encode(part)
            largest = torch.cat([largest, codes[codes > 0]])
            largest = largest.topk(min(len(largest), k * len(states))).values
        sae._inner.threshold.fill_(largest.min())
    mean, left, total, n = states.mean(0), 0.0, 0.0, 0
    seen = torch.zeros(sae.d_sae, dtype=torch.long)
    for part in states.split(BATCH):
        codes = sae.encode(part)
        seen += (codes > 0).sum(0)
        n += int((codes > 0).sum())
        left += float((sae.reconstruct(part) - part).pow(2).sum())
        total += float((part - mean).pow(2).sum())
    return {
        "tokens": len(states),
        "variance_explained": 1 - left / total,
        "l0": n / len(states),
        "dead_latents": float((seen == 0).float().mean()),
    }


def judged(shared: Path, model: Any, tokenizer: Any, sae: SAE, layer: int) -> dict[str, Any]:
    """How the SAE does on each source that it was not trained on, and on all of them."""
    sources: dict[str, Any] = {}
    every: list[Sequences] = []
    for source in HELD_OUT:
        rows = Dataset.from_list(rows_of(shared, source, random.Random(0), 2 * JUDGED)[:JUDGED])
        pairs = read_pairs(rows, tokenizer, max_length=JUDGED_LENGTH)
        fit = asdict(check_fit(model, sae, pairs, layer, progress=False))
        sources[source.rsplit("/")[-1]] = {"pairs": len(pairs), **fit}
        every.append(learned(pairs))
        print(source, json.dumps(without_nan(fit)), flush=True)
    together = sequences_of(None, [ids.tolist() for some in every for ids in some.ids], 0)
    return {"sources": sources, "together": fired(model, sae, layer, together)}


def learned(pairs: Pairs) -> Sequences:
    return sequences_of(pairs, [], 0)


def packed(pairs: Pairs, n: int) -> list[list[int]]:
    """`n` pieces of `CONTEXT` tokens, the sequences of the pairs end to end."""
    end_to_end: list[int] = []
    for ids in learned(pairs).ids:
        end_to_end += ids.tolist()
        if len(end_to_end) >= n * CONTEXT:
            break
    return [end_to_end[i * CONTEXT : (i + 1) * CONTEXT] for i in range(len(end_to_end) // CONTEXT)][:n]


def of_runner(model: Any, tokenizer: Any, pieces: list[list[int]], layer: int, plan: SAERecipe, out: Path) -> None:
    """sae-lens' runner on the pieces: its defaults, but for what both are to have alike."""
    from sae_lens import BatchTopKTrainingSAEConfig, LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
    from sae_lens.config import LoggingConfig
    from sae_lens.load_model import HookedProxyLM

    hook, steps = f"model.layers.{layer}", plan.tokens // BATCH
    config = LanguageModelSAERunnerConfig(
        sae=BatchTopKTrainingSAEConfig(
            d_in=model.config.hidden_size,
            d_sae=plan.d_sae,
            k=plan.k,
            normalize_activations="expected_average_only_in",
        ),
        model_name="model",
        model_class_name="AutoModelForCausalLM",
        hook_name=hook,
        dataset_path="pieces",
        streaming=False,
        context_size=CONTEXT,
        prepend_bos=False,
        training_tokens=steps * BATCH,
        train_batch_size_tokens=BATCH,
        store_batch_size_prompts=32,
        n_batches_in_buffer=64,
        n_batches_for_norm_estimate=4,
        lr=plan.lr,
        lr_warm_up_steps=max(2, steps // 20),
        lr_decay_steps=steps // 3,
        dead_feature_window=max(16, min(1000, steps // 10)),
        seed=plan.seed,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=str(out),
        verbose=False,
    )
    LanguageModelSAETrainingRunner(
        config,
        override_dataset=Dataset.from_dict({"input_ids": pieces}),
        override_model=HookedProxyLM(model, tokenizer, hook_names=[hook]),
    ).run()


def beside_runner(
    model: Any, tokenizer: Any, pairs: Pairs, held_out: Sequences, layer: int, tokens: int, work: Path
) -> Any:
    """Time of both on the same pieces, and how their SAEs do on tokens of other sources.

    The library holds out a tenth of the pieces, reads it and sets the threshold by it; the runner reads a few batches
    more for the mean norm. Both are in their times, as are making, training and saving; loading the model is not.
    """
    plan = recipe(model.config.hidden_size, tokens)
    pieces = packed(pairs, -(-tokens * 10 // (9 * (CONTEXT - 1))) + 2)
    found: dict[str, Any] = {"tokens": tokens, "steps": tokens // BATCH, "pieces": len(pieces), **asdict(plan)}

    def ours(out: Path) -> None:
        train_saes(model, sequences_of(None, pieces, 0), [layer], plan, out, progress=False)

    def theirs(out: Path) -> None:
        of_runner(model, tokenizer, pieces, layer, plan, out)

    for name, train in (("library", ours), ("runner", theirs)):
        out = work / f"{name}-{tokens}"
        begun, cpu = time.perf_counter(), time.process_time()
        train(out)
        spent = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}
        sae = load_sae(out)
        found[name] = {**spent, **fired(model, sae, layer, held_out)}
        found[name]["at_k"] = fired(model, sae, layer, held_out, k=plan.k)
        print(name, json.dumps(found[name]), flush=True)
    found["cpu_ratio"] = found["library"]["cpu_seconds"] / found["runner"]["cpu_seconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--work", default="sae-study", help="folder of what is made")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of the command's training")
    parser.add_argument("--runner_tokens", type=int, default=34_816, help="of each training beside sae-lens' runner")
    parser.add_argument("--only", choices=("training", "runner"), help="the other part stays as it is recorded")
    parser.add_argument("--results", default=str(RESULT))
    args = parser.parse_args()
    torch.set_num_threads(1)
    shared = Path(os.environ.get("TRL_ANATOMY_SHARED", "../shared"))
    work, results = Path(args.work), Path(args.results)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "pairs.jsonl").is_file():
        write_pairs(shared, work / "pairs.jsonl")
    made: dict[str, Any] = json.loads(results.read_text()) if args.only and results.is_file() else {}
    made |= {
        "command": "python benchmarks/studies/sae.py --model SMOLLM2",
        "date": datetime.date.today().isoformat(),
        "device": f"one thread of {processor()}, beside other work",
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
    }
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.only != "runner":
        made["training"] = trained(args.model, work, args.tokens)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
    layer = recorded_layer(work, model)
    if args.only != "runner":
        made["held_out"] = judged(shared, model, tokenizer, load_sae(work / "sae"), layer)
    if args.only != "training":
        data = load_dataset("json", data_files=str(work / "pairs.jsonl"), split="train").shuffle(seed=0)
        pairs = read_pairs(data.select(range(600)), tokenizer, max_length=LENGTH)
        rows = [row for source in HELD_OUT for row in rows_of(shared, source, random.Random(1), 16)]
        others = learned(read_pairs(Dataset.from_list(rows), tokenizer, max_length=JUDGED_LENGTH))
        made["beside_runner"] = beside_runner(model, tokenizer, pairs, others, layer, args.runner_tokens, work)
    results.write_text(json.dumps(without_nan(made), indent=1) + "\n", encoding="utf-8")


def recorded_layer(work: Path, model: Any) -> int:
    """The layer of the command's training; by its rule where there is none yet."""
    from trl_anatomy.reading.locate import decoder_layers
    from trl_anatomy.reading.sae_training import default_layer

    file = work / "sae" / "training.json"
    return (
        int(json.loads(file.read_text())["layers"][0]) if file.is_file() else default_layer(len(decoder_layers(model)))
    )


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
