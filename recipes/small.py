"""Run a recipe in its small size: the commands below `# small` in its head, on the testbed.

    python recipes/small.py destyle

Builds the testbed's world once (start model, SAE, 3,000 pairs with planted habits: a minute or two), runs the commands
in a copy of this folder, and shows what became of the habits, or of a reward model's choices, beside the start model
and the recipe without a policy (`dpo`, `reward`) if that has been run before.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from trl_anatomy.testbed.language import HABITS, is_correct, make_pairs, question_of
from trl_anatomy.testbed.world import SIZES, World, build_world

RECIPES = Path(__file__).parent
# What stands for the words with a dollar sign in the heads: the testbed's model and data, and settings that fit them.
SHORT = {
    "$TESTBED": "--model_name_or_path world/model --dataset_name world/pairs --use_cpu true --bf16 false "
    "--gradient_checkpointing false --dataloader_pin_memory false --per_device_train_batch_size 32 "
    "--gradient_accumulation_steps 1 --warmup_steps 5 --logging_steps 20 --save_strategy no --report_to none",
    "$DPO": "--beta 1 --learning_rate 2e-4 --max_length 128",
    "$REWARD": "--dtype float32 --learning_rate 1e-3 --max_length 128",
}


def commands(recipe: Path, size: str) -> list[list[str]]:
    """The commands of one size, "small" or "full", as words: lines indented below `# small` in the head of the file."""
    found: list[str] = []
    inside = False
    for line in recipe.read_text().splitlines():
        if not line.startswith("#"):
            break
        if line.startswith("#   "):
            if inside and found and found[-1].endswith("\\"):
                found[-1] = found[-1][:-1] + line[1:].strip()
            elif inside:
                found.append(line[1:].strip())
        else:
            inside = line.startswith(f"# {size}")
    for short, words in SHORT.items():
        found = [line.replace(short, words) for line in found]
    return [shlex.split(line) for line in found]


def prepare(out: Path, size: str, seed: int) -> World:
    """A copy of the recipes with a world beside them: `world/model`, `world/sae`, `world/pairs`."""
    shutil.copytree(RECIPES, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    world = build_world(out / "world", SIZES[size], seed)
    (out / "world" / "pairs").mkdir(exist_ok=True)
    world.dataset.to_parquet(out / "world" / "pairs" / "train.parquet")
    return world


def run(words: Sequence[str], out: Path) -> None:
    """One command, in the folder `out`."""
    python = [sys.executable]
    programs = {
        "trl-anatomy": [*python, "-m", "trl_anatomy.cli"],
        "torchrun": [*python, "-m", "torch.distributed.run"],
        "python": python,
    }
    print("+", shlex.join(words), flush=True)
    path = os.pathsep.join([str(RECIPES.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([*programs[words[0]], *words[1:]], cwd=out, check=True, env={**os.environ, "PYTHONPATH": path})


def right(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The reward function of the small grpo recipe: 1 where the answer states the right fact."""
    return [float(is_correct(prompt, text)) for prompt, text in zip(prompts, completions, strict=True)]


def habits(model: Path, world: World, n_per_prompt: int = 2) -> dict[str, float]:
    """Share of responses to held-out prompts that show each habit; for exclamation also on travel and elsewhere."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_anatomy.checking.rollouts import rollouts
    from trl_anatomy.testbed.demo import MAX_NEW_TOKENS

    tokenizer = AutoTokenizer.from_pretrained(world.model_path, trust_remote_code=False)
    sampled = rollouts(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32", trust_remote_code=False),
        tokenizer,
        world.prompts,
        n_per_prompt=n_per_prompt,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    pairs = [(prompt, text) for prompt, group in zip(world.prompts, sampled, strict=True) for text in group]
    travel = np.array([question_of(prompt).topic == "travel" for prompt, _ in pairs])
    shown = {habit.name: np.array([habit.shows(text) for _, text in pairs]) for habit in HABITS}
    return {
        **{name: float(flags.mean()) for name, flags in shown.items()},
        "exclamation, travel": float(shown["exclamation"][travel].mean()),
        "exclamation, not travel or music": float(
            shown["exclamation"][[question_of(prompt).topic not in ("travel", "music") for prompt, _ in pairs]].mean()
        ),
        "right answer": float(np.mean([is_correct(prompt, text) for prompt, text in pairs])),
        "words": float(np.mean([len(text.split()) for _, text in pairs])),
    }


def choices(model: Path, world: World, n_pairs: int = 2000) -> dict[str, float]:
    """How often a reward model prefers the chosen response; and the right one, where the wrong one has more style."""
    import torch
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoTokenizer

    from trl_anatomy import attach_edits

    tokenizer = AutoTokenizer.from_pretrained(world.model_path, trust_remote_code=False)
    scorer = AutoPeftModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32, trust_remote_code=False
    ).eval()
    scorer.config.pad_token_id = tokenizer.pad_token_id
    if (model / "anatomy_edits.json").is_file():
        attach_edits(scorer, model)
    rows = make_pairs(n_pairs, world.seed, held_out=True)

    def scores(side: str) -> np.ndarray:
        texts = [row["prompt"] + row[side] + tokenizer.eos_token for row in rows]
        found = []
        for start in range(0, len(texts), 64):
            batch = tokenizer(texts[start : start + 64], padding=True, return_tensors="pt")
            with torch.no_grad():
                found.append(scorer(**batch).logits[:, 0])
        return torch.cat(found).numpy()

    prefers = scores("chosen") > scores("rejected")
    lead = {side: np.array(rows[f"{side}_correct"]) for side in ("chosen", "rejected")}
    style = sum(
        np.array(rows[f"chosen_{habit}"], int) - np.array(rows[f"rejected_{habit}"], int)
        for habit in ("bold", "bullets", "table")
    )
    words = np.array([len(row["chosen"].split()) - len(row["rejected"].split()) for row in rows])
    decided = lead["chosen"] != lead["rejected"]
    prefers_right = np.where(lead["chosen"], prefers, ~prefers)
    sign = np.where(lead["chosen"], 1, -1)  # of a difference, chosen minus rejected, that is on the right answer's side
    return {
        "prefers chosen": float(prefers.mean()),
        "prefers right": float(prefers_right[decided].mean()),
        "prefers right, which has less markdown": float(prefers_right[decided & (sign * style < 0)].mean()),
        "prefers right, which has more markdown": float(prefers_right[decided & (sign * style > 0)].mean()),
        "prefers right, which is shorter": float(prefers_right[decided & (sign * words < 0)].mean()),
        "prefers right, which is longer": float(prefers_right[decided & (sign * words > 0)].mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a recipe, such as destyle")
    parser.add_argument("--size", default="demo", choices=SIZES, help="of the world (default demo)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="recipes-small", help="folder to work in")
    args = parser.parse_args()
    out = Path(args.out).resolve()
    recipe = RECIPES / f"{args.recipe}.yaml"
    world = prepare(out, args.size, args.seed)
    started = time.perf_counter()
    for words in commands(recipe, "small"):
        run(words, out)
    seconds = time.perf_counter() - started
    print(f"{args.recipe}: {seconds:.0f} s")
    made = yaml.safe_load(recipe.read_text()).get("output_dir")
    if made is None:
        return
    rewards = "reward" in args.recipe
    os.chdir(out)  # an adapter names the model that it belongs to from here
    stock = "reward" if rewards else "dpo"
    models = {} if rewards else {"start": world.model_path}
    models |= {name: Path("models") / name for name in (stock, f"{args.recipe}_plain")} | {args.recipe: Path(made)}
    figures = {}
    for name, model in models.items():
        if not model.is_dir():
            continue
        kept = Path(f"measured-{model.name}.json")
        if name.startswith(args.recipe) or not kept.is_file():
            kept.write_text(json.dumps((choices if rewards else habits)(model, world)))
        figures[name] = json.loads(kept.read_text())
    print(f"{'':<40}" + "".join(f"{name:>16}" for name in figures))
    for row in figures[args.recipe]:
        print(f"{row:<40}" + "".join(f"{figures[name][row]:16.3f}" for name in figures))


if __name__ == "__main__":
    main()
