"""What is the choice made of in real preference data? Held-out accuracy from length alone and from named habits.

Ten sets of pairs (apart: `TRL_ANATOMY_SHARED`), as `trl-anatomy audit --dataset` reads them, without a model. Sides
swapped at random, prompt by prompt, say how often anything is told where there is nothing.

Results hold numbers only, no text.

    python benchmarks/studies/choice.py
"""

import argparse
import datetime
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from habits import SETS, load
from scipy.stats import binomtest

from trl_anatomy.audit.choice import TOLD, choice_of
from trl_anatomy.audit.choice_words import choice_sentences
from trl_anatomy.audit.counted import Counted
from trl_anatomy.audit.habit_table import habit_values, habits_to_count, prompt_groups


def study(texts: list[tuple[str, str, str]], name: str, swaps: int) -> dict[str, Any]:
    habits = habits_to_count(None, tokens=False)
    counted = Counted(habit_values(texts, habits), habits, prompt_groups(texts))
    clock = time.process_time()
    found = choice_of(counted)
    seconds = time.process_time() - clock
    _, of = np.unique(counted.groups, return_inverse=True)
    told, listed = 0, 0
    for run in range(swaps):
        swap = (np.random.default_rng(run).random(of.max() + 1) < 0.5)[of]
        values = np.where(swap[None, :, None], counted.values[::-1], counted.values)
        again = choice_of(Counted(values, habits, counted.groups), seed=run)
        told += any(entry["verdict"] == TOLD for entry in again["sources"])
        listed += bool(again["carried_by"])
    interval = binomtest(told, swaps).proportion_ci(0.95, method="wilson")
    print(f"\n{name}: {seconds:.1f} s of CPU time; swapped sides tell something in {told} of {swaps} runs")
    print(*choice_sentences(found), sep="\n", flush=True)
    return {
        **_rounded(found),
        "cpu_seconds": round(seconds, 2),
        "swapped": {
            "runs": swaps,
            "told": told,
            "listed": listed,
            "ci_low": round(float(interval.low), 4),
            "ci_high": round(float(interval.high), 4),
        },
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), help="default: all")
    parser.add_argument("--swaps", type=int, default=20, help="runs with swapped sides of each set")
    parser.add_argument("--results", default="benchmarks/results/choice.json")
    args = parser.parse_args()
    shared = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).parents[3] / "shared"))
    results = {
        "command": "python benchmarks/studies/choice.py",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {name: version(name) for name in ("trl_anatomy", "numpy", "scipy", "scikit-learn")}
        | {"python": platform.python_version()},
        "sets": {name: study(load(shared, name), name, args.swaps) for name in args.sets},
    }
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    Path(args.results).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
