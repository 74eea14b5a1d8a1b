"""Do the named habits of real preference data come out as plain counting says, and how long does that take?

On ten sets of pairs (apart: `TRL_ANATOMY_SHARED`) the audit's table of habits is set beside plain regular expressions,
counted in everything, with McNemar's z. Each expression with |z| > 4 has to be a habit that differs, in that direction.
Sides swapped at random, 200 times, say how often anything is listed where there is nothing.

Results hold numbers only, no text.

    python benchmarks/studies/habits.py
"""

import argparse
import datetime
import gzip
import json
import os
import platform
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from trl_anatomy.audit import stats
from trl_anatomy.audit.habit_table import LESS, MORE, habit_table, habits_to_count, prompt_groups
from trl_anatomy.audit.habit_words import habit_sentences
from trl_anatomy.reading.habits import measure

# name -> file, and chosen and rejected style where the set has several
SETS = {
    "alpaca_eval2_cross_model": ("noncommercial/alpaca_eval2_cross_model", None),
    "alpaca_eval2_vs_gpt4turbo": ("noncommercial/alpaca_eval2_vs_gpt4turbo", None),
    "ultrafeedback_subset": ("permissive_upstream/ultrafeedback_subset", None),
    "rm_bench hard": ("licence_unstated/rm_bench", ("concise", "detailed_markdown")),
    "rm_bench easy": ("licence_unstated/rm_bench", ("detailed_markdown", "concise")),
    "rm_bench matched": ("licence_unstated/rm_bench", None),
    "overrefusal_steered": ("permissive/overrefusal_steered", None),
    "hh_helpful_test": ("permissive_upstream/hh_helpful_test", None),
    "dsp_domain": ("noncommercial/dsp_domain", None),
    "judgebench_gpt4o": ("licence_unstated/judgebench_gpt4o", None),
}
# Counted in everything, code and quotations too: what an engineer would write first.
PLAIN = {
    "bold": r"\*\*[^*\n]+\*\*",
    "bullet": r"(?m)^\s*[-*•]\s+\S",
    "numbered": r"(?m)^\s*\d+[.)]\s+\S",
    "header": r"(?m)^#{1,6}\s+\S",
    "table": r"(?m)^\s*\|.+\|\s*$",
    "horizontal_rule": r"(?m)^\s*(-{3,}|\*{3,}|_{3,})\s*$",
    "code_fence": r"```",
    "link": r"https?://|\[[^\]]+\]\([^)]+\)",
    "emoji": "[\U0001f300-\U0001faff\u2600-\u27bf]",
    "em_dash": "\u2014",
    "exclamation": r"!",
    "closing_question": r"\?\s*$",
    "refusal": r"(?i)^[^\n]{0,80}\b(sorry|i cannot|i can['’]t|i(?: am|['’]m) (?:unable|not able)|decline)\b",
    "as_an_ai": r"(?i)\bas an ai\b|\bi am an ai\b|\bi['’]m an ai\b",
    "apology": r"(?i)\bi(?:['’]m| am) sorry\b|\bi apologize\b",
    "opening_sure": r"(?i)^(sure|certainly|of course|absolutely)\b",
}
SWAPS = 200
_PACKAGES = ("trl_anatomy", "numpy", "scipy")


def load(shared: Path, name: str) -> list[tuple[str, str, str]]:
    """Prompt, chosen and rejected of a set."""
    file, styles = SETS[name]
    with gzip.open(shared / "data" / "pairs" / f"{file}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if file.endswith("rm_bench"):
        of = [(row["labels"]["style_chosen"], row["labels"]["style_rejected"]) for row in rows]
        rows = [row for row, pair in zip(rows, of, strict=True) if (pair == styles if styles else pair[0] == pair[1])]
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def mcnemar(chosen: np.ndarray, rejected: np.ndarray) -> float:
    """z of the pairs in which one side has it and the other has not."""
    more, less = int((chosen & ~rejected).sum()), int((~chosen & rejected).sum())
    return (more - less) / np.sqrt(more + less) if more + less else 0.0


def study(texts: list[tuple[str, str, str]], name: str) -> dict[str, Any]:
    habits = habits_to_count(None, tokens=False)
    clock = time.process_time()
    table = habit_table(texts, habits)
    seconds = time.process_time() - clock
    rows = {row["habit"]: row for row in table.to_pylist()}
    groups = prompt_groups(texts)
    plain: dict[str, dict[str, Any]] = {}
    for habit, pattern in PLAIN.items():
        chosen, rejected = (np.array([re.search(pattern, t[side]) is not None for t in texts]) for side in (1, 2))
        z = mcnemar(chosen, rejected)
        listed = {MORE: 1, LESS: -1}.get(rows[habit]["verdict"], 0)
        plain[habit] = {
            "chosen": float(chosen.mean()),
            "rejected": float(rejected.mean()),
            "z": float(z),
            "listed": listed,
        }
    missed = [habit for habit, row in plain.items() if abs(row["z"]) > 4 and row["listed"] != np.sign(row["z"])]
    values = [measure((text[side] for text in texts), habits) for side in (1, 2)]
    gap, rng = values[0] - values[1], np.random.default_rng(0)
    _, of = np.unique(groups, return_inverse=True)
    reported = 0
    for _ in range(SWAPS):
        sign = np.where(rng.random(of.max() + 1) < 0.5, 1.0, -1.0)[of]  # of all pairs of a prompt together
        _, _, p = stats.mean_test(gap * sign[:, None], groups)
        reported += bool((stats.benjamini_hochberg(p) <= 0.05).any())
    interval = binomtest(reported, SWAPS).proportion_ci(0.95, method="wilson")
    found = [row for row in rows.values() if row["verdict"] in (MORE, LESS)]
    print(f"\n{name}: {len(texts)} pairs, {len(np.unique(groups))} prompts, {seconds:.1f} s of CPU time")
    print(*habit_sentences(list(rows.values()), len(np.unique(groups))), sep="\n")
    n_plain = sum(abs(row["z"]) > 4 for row in plain.values())
    print(f"plain counts with |z| > 4: {n_plain}, not listed so: {missed or 'none'}")
    print(f"swapped sides list something in {reported} of {SWAPS} runs")
    keys = ("chosen", "rejected", "difference", "difference_low", "difference_high", "z", "q")
    return {
        "pairs": len(texts),
        "prompts": len(np.unique(groups)),
        "characters": int(np.mean([len(chosen) + len(rejected) for _, chosen, rejected in texts])),
        "cpu_seconds": round(seconds, 2),
        "differ": {row["habit"]: {key: _rounded(row[key]) for key in keys} for row in found},
        "plain": {habit: {key: _rounded(value) for key, value in row.items()} for habit, row in plain.items()},
        "not_listed": missed,
        "swapped": {
            "runs": SWAPS,
            "reported": reported,
            "share": reported / SWAPS,
            "ci_low": round(float(interval.low), 4),
            "ci_high": round(float(interval.high), 4),
        },
    }


def _rounded(value: float) -> float | None:
    return None if not np.isfinite(value) else float(f"{value:.4g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), help="default: all")
    parser.add_argument("--results", default="benchmarks/results/habits.json")
    args = parser.parse_args()
    shared = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).parents[3] / "shared"))
    results = {
        "command": "python benchmarks/studies/habits.py",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {name: version(name) for name in ("trl_anatomy", "numpy", "scipy")}
        | {"python": platform.python_version()},
        "sets": {name: study(load(shared, name), name) for name in args.sets},
    }
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    Path(args.results).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
