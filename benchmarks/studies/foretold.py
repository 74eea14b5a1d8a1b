"""Does the first step of training foretell what a rule of a policy does, on its habit and on all others?

For every rule of `verbs.py` on each of its habits: the first step of `predict` with and without the rule, carried over
to the start model's responses, beside what training did. What it did is read from `results/verbs.json`, not made again:
where that is of another machine, start models trained on the same texts differ in their rounding, and so do the runs.

    python benchmarks/studies/foretold.py --seeds 0 1
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer
from verbs import COLUMNS, CONTROLS, rules, scored
from worlds import RESULTS, World, made_by, prepared, save

from trl_anatomy.audit.predict import step_shift
from trl_anatomy.checking.first_step import first_step, log_prob_changes
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.reading.spans import Pairs, read_pairs
from trl_anatomy.testbed.demo import MAX_NEW_TOKENS, dpo_trainer
from trl_anatomy.testbed.language import HABITS, is_correct, question_of

N_PROMPTS, PER_PROMPT, N_PAIRS = 250, 4, 640
PLAIN = "plain DPO"


def start_responses(world: World, folder: Path) -> tuple[Pairs, np.ndarray, np.ndarray]:
    """Responses of the start model to prompts of the pairs, two in the place of a pair; what they show; their prompts.

    What they show is (n, 14), habits and right answers. A habit of one topic is NaN elsewhere, where it is not counted.
    """
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    unique = sorted(set(world.dataset["prompt"]))
    prompts = [unique[i] for i in np.random.default_rng(0).permutation(len(unique))[:N_PROMPTS]]
    kept = folder / "start-responses.json"
    if not kept.is_file():
        model = AutoModelForCausalLM.from_pretrained(world.model_path, dtype=torch.float32)
        kept.write_text(
            json.dumps(
                rollouts(model, tokenizer, prompts, n_per_prompt=PER_PROMPT, max_new_tokens=MAX_NEW_TOKENS, seed=123)
            )
        )
    twos = [
        {"prompt": prompt, "chosen": of[at], "rejected": of[at + 1]}
        for prompt, of in zip(prompts, json.loads(kept.read_text()), strict=True)
        for at in range(0, PER_PROMPT, 2)
    ]
    pairs = read_pairs(Dataset.from_list(twos), tokenizer, max_length=128)
    said = [(twos[row]["prompt"], twos[row][side]) for side in ("chosen", "rejected") for row in pairs.rows]
    shown = np.array([[*(h.shows(text) for h in HABITS), is_correct(prompt, text)] for prompt, text in said], float)
    topics = np.array([question_of(prompt).topic for prompt, _ in said])
    for k, habit in enumerate(HABITS):
        if habit.topic is not None:
            shown[topics != habit.topic, k] = np.nan
    return pairs, shown, np.concatenate([pairs.prompt_groups, pairs.prompt_groups])


def foretold(world: World, name: str, policy: Any, said: tuple[Pairs, np.ndarray, np.ndarray], folder: Path) -> Any:
    """(14,) shifts of habits and right answers by the first step, per unit of it; kept in `folder`."""
    kept = folder / "first-steps" / f"{''.join(c if c.isalnum() else '-' for c in name)}.json"
    if not kept.is_file():
        pairs, shown, groups = said
        trainer = dpo_trainer(world, folder / "step", seed=world.seed, concept_policy=policy)
        direction = first_step(trainer, N_PAIRS)
        change = log_prob_changes(trainer.model.eval(), direction, pairs).T.ravel()
        shifts = []
        for column in shown.T:
            counted = np.isfinite(column)
            shifts.append(float(step_shift(column[counted, None], change[counted], groups[counted])[0][0]))
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(json.dumps(shifts))
        print(f"{name}: {dict(zip(COLUMNS, np.round(shifts, 2).tolist(), strict=True))}", flush=True)
    return np.array(json.loads(kept.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", default="benchmark-studies", help="folder of the worlds of verbs.py")
    parser.add_argument("--results", type=Path, default=RESULTS / "foretold.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads((RESULTS / "verbs.json").read_text())
    rows: list[dict[str, Any]] = []
    plain: dict[str, Any] = {}
    for seed in args.seeds:
        folder, key = Path(args.out) / str(seed), str(seed)
        world, readings = prepared(folder, seed)
        said = start_responses(world, folder)
        step = foretold(world, PLAIN, None, said, folder)
        moved = np.array(done["matrix"]["seeds"][key]["moved by plain DPO"])
        scale = float(step @ moved / (step @ step))  # one factor for all: a step has no length of its own
        plain[key] = {
            "foretold": (scale * step).tolist(),
            "observed": moved.tolist(),
            "r2": float(np.corrcoef(step, moved)[0, 1] ** 2),
        }
        for name, targets in done["matrix"]["rules"].items():
            for target, by_seed in targets.items():
                if key not in by_seed or name in CONTROLS:
                    continue
                policy = {
                    "version": 1,
                    "concepts": scored(world, target, readings, folder),
                    "rules": rules(target, readings)[name],
                }
                with_rule = foretold(world, f"{target}: {name}", policy, said, folder)
                k = COLUMNS.index(target)
                rows.append(
                    {
                        "seed": seed,
                        "rule": name,
                        "target": target,
                        "foretold recovery": float(1 - with_rule[k] / step[k]),
                        "observed recovery": by_seed[key]["recovery"][k],
                        "foretold points": (scale * (with_rule - step)).tolist(),
                        "observed points": by_seed[key]["points"],
                    }
                )
                results = made_by(f"python benchmarks/studies/foretold.py --seeds {' '.join(map(str, args.seeds))}")
                results |= {"habits": COLUMNS, "plain DPO": plain, "agreement": agreement(rows, done), "rows": rows}
                save(args.results, results)
    print(json.dumps(agreement(rows, done), indent=1))


def agreement(rows: list[dict[str, Any]], done: dict[str, Any]) -> dict[str, Any]:
    """How well foretold and observed agree: on the targets, on all other habits, and where another one was moved.

    A rule works that takes out more than half of its habit; masking of the tokens that show it left aside.

    "clear": the cells off target that training moved beyond the noise (`off target` of verbs.json).
    """
    told, seen = (np.array([row[f"{what} recovery"] for row in rows]) for what in ("foretold", "observed"))
    points = {what: np.array([row[f"{what} points"] for row in rows]) for what in ("foretold", "observed")}
    target = np.array([[name == row["target"] for name in COLUMNS] for row in rows])
    clear = {(cell["rule"], cell["target"], cell["habit"]) for cell in done["off target"]}
    is_clear = np.array([[(row["rule"], row["target"], name) in clear for name in COLUMNS] for row in rows])
    off = {what: of[~target] for what, of in points.items()}
    at = {what: of[is_clear] for what, of in points.items()}

    def fit(x: np.ndarray, y: np.ndarray) -> dict[str, float | int | None]:
        if len(x) < 3:
            return {"n": len(x), "r2": None, "rank correlation": None}
        return {
            "n": len(x),
            "r2": float(np.corrcoef(x, y)[0, 1] ** 2),
            "rank correlation": float(stats.spearmanr(x, y).statistic),
        }

    seeds, rules = (np.array([row[key] for row in rows]) for key in ("seed", "rule"))
    shown = rules == "mask_tokens, text rule"
    works = ~shown & (seen > 0.5)

    def spread(values: np.ndarray) -> list[float]:
        return [float(np.median(values)), float(values.min()), float(values.max())]

    return {
        "recovery of the target": fit(told, seen)
        | {
            "median error": float(np.median(np.abs(told - seen))),
            "half or more of the habit taken out or not, rightly": int(((told >= 0.5) == (seen >= 0.5)).sum()),
            "r2 by world": {
                str(seed): fit(told[seeds == seed], seen[seeds == seed])["r2"] for seed in np.unique(seeds)
            },
            "r2 without masking of shown tokens": fit(told[~shown], seen[~shown])["r2"],
            "mean overestimate where a rule works": float((told - seen)[works].mean()) if works.any() else None,
        },
        "median, smallest and largest recovery by rule": {
            str(rule): {"runs": int(of.sum()), "foretold": spread(told[of]), "observed": spread(seen[of])}
            for rule in dict.fromkeys(rules)
            if (of := rules == rule).any()
        },
        "points of other habits": fit(off["foretold"], off["observed"]),
        "clear effects on other habits": fit(at["foretold"], at["observed"])
        | {"right sign": int((at["foretold"] * at["observed"] > 0).sum())},
    }


if __name__ == "__main__":
    main()
