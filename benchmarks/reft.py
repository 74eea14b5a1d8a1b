"""What the low-rank edit (`scorer: reft`) does to generated text, habit by habit, on a testbed whose habits are known.

The edit of each habit is fitted with the published settings on fresh texts of the start model's language, and again
with the edit on every response token instead of the first and last 11. Rates are of one sampled response to each of
200 held-out prompts; the place of a habit is how many tokens stand before it in the texts that show it, and after it.

    python benchmarks/reft.py --worlds benchmark-worlds
"""

import argparse
import datetime
import json
import platform
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_anatomy.checking.dose import dose_response
from trl_anatomy.reading.fit import fit_concept, read_examples
from trl_anatomy.testbed.language import HABITS, held_out_prompts, make_corpus

N_TEXTS, N_PROMPTS, EVERY = 1_200, 200, 1_000
STRENGTHS = {"first and last 11": (0.0, 0.5, 1.0, 2.0), "every token": (1.0,)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="benchmark-worlds", help="that benchmarks/studies/prediction.py wrote")
    parser.add_argument("--seed", type=int, default=0, help="world (default 0)")
    parser.add_argument("--results", default="benchmarks/results/reft.json")
    args = parser.parse_args()
    folder = Path(args.worlds) / str(args.seed) / "world" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    texts = make_corpus(N_TEXTS, args.seed + 2_000)
    prompts = held_out_prompts(N_PROMPTS, args.seed)
    habits: dict[str, dict] = {}
    for habit in HABITS:
        if habit.role == "topic":
            continue
        rows = [{"prompt": p, "response": r, "label": int(habit.shows(r))} for p, r in texts]
        examples = read_examples(Dataset.from_list(rows), tokenizer)
        places = []
        for row in rows:
            shown = re.search(habit.pattern, row["response"])
            if shown:
                ends = row["response"][: shown.start()], row["response"][shown.start() :]
                places.append([len(tokenizer(end, add_special_tokens=False).input_ids) for end in ends])
        before, after = np.median(places, axis=0).tolist()
        habits[habit.name] = {"texts": len(places), "tokens_before": before, "tokens_after": after}
        for name, strengths in STRENGTHS.items():
            settings = {"ends": EVERY} if name == "every token" else {}
            fitted = fit_concept(model, examples, scorer="reft", progress=False, **settings)
            curve = dose_response(
                model,
                tokenizer,
                fitted.scorer,
                prompts,
                lambda texts, habit=habit: np.array([habit.shows(text) for text in texts]),
                strengths=strengths,
                batch_size=N_PROMPTS,
            )
            habits[habit.name][name] = {"held_out": fitted.scorer.card["held_out"], "dose": curve}
        print(habit.name, json.dumps(habits[habit.name]), flush=True)
    results = {
        "command": f"python benchmarks/reft.py --seed {args.seed}",
        "date": datetime.date.today().isoformat(),
        "device": f"CPU ({platform.machine()}), one thread",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("transformers", "torch", "numpy")},
        "habits": habits,
    }
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    Path(args.results).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
