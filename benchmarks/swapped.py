"""How often real audits keep something once sides are swapped at random, and how many of their labels hold.

Of every audit in a folder, sides are swapped prompt by prompt, so that there is nothing to find, and what a page would
keep is looked for again: habits by what is asked, concepts in data contexts, response clusters in prompt contexts.
Contexts, concepts and clusters are those of the audit, which swapping does not change. Beside it, the share of concepts
whose label scores 0.75 or more. Results hold counts alone.

    python benchmarks/swapped.py --audits FOLDER

An interrupted run resumes: runs that are in the results are not done again, and fewer of them can be asked for.
"""

import argparse
import datetime
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

RUNS, GOOD = 20, 0.75


class Swapped:
    """An audit whose sides can be swapped, prompt by prompt."""

    def __init__(self, folder: Path) -> None:
        from trl_anatomy import AuditConfig, load_audit
        from trl_anatomy.audit.counted import Counted
        from trl_anatomy.audit.habit_table import habit_values, habits_to_count, texts_of, tokens_of
        from trl_anatomy.audit.habits_by_prompt import Asked, cluster_members
        from trl_anatomy.audit.prompt_rules import rules_of_pairs
        from trl_anatomy.audit.reopen import reopen

        self.audit = load_audit(folder)
        settings = self.audit.info["settings"]
        self.config = AuditConfig(**{name: settings[name] for name in ("alpha", "min_context", "rank_by", "pooling")})
        pairs = reopen(self.audit).pairs
        names = habits_to_count(None, tokens=True)
        values = habit_values(texts_of(pairs), names, tokens_of(pairs), progress=False)
        self.counted, self.copies = Counted(values, names, pairs.prompt_groups), pairs.copies.group
        contexts = self.audit.info["contexts"]
        terms = [of["terms"] for name, of in contexts.items() if name.startswith("A")]
        self.clusters = cluster_members(self.audit.pairs, len(terms))
        self.asked = Asked.of(rules_of_pairs(pairs)).with_clusters(self.clusters, terms)
        data = self.audit.pairs["contexts"].to_pylist()
        self.data = np.array([next((int(name[1:]) for name in of if name[0] == "B"), 0) for of in data])

    def _with(self, swap: np.ndarray) -> Any:
        return replace(
            self.counted, values=np.where(swap[None, :, None], self.counted.values[::-1], self.counted.values)
        )

    def habits(self, swap: np.ndarray) -> int:
        """Habits by what is asked that are kept."""
        from trl_anatomy.audit.habits_by_prompt import habits_by_prompt

        how = {"alpha": self.config.alpha, "least": self.config.min_context, "copies": self.copies}
        return int(np.sum(habits_by_prompt(self._with(swap), self.asked, **how)["kept"].to_numpy()))

    def feature_view(self, swap: np.ndarray) -> int:
        """Concepts in data contexts that are kept."""
        from trl_anatomy.audit.views import compare_contexts

        sizes = np.array([len(features) for features in self.audit.communities])
        least = self.audit.info["settings_used"]["min_concept"]
        scores = self._turned(self.audit.activity, swap)
        how = (sizes, least, self.config, self.counted.groups, self.copies, self._with(swap).gaps())
        return int(np.sum(compare_contexts(scores, self.data, *how)["kept"].to_numpy()))

    def prompt_view(self, swap: np.ndarray) -> int:
        """Response clusters in prompt contexts that are kept."""
        from trl_anatomy.audit.views import hypothesis_table

        how = {"groups": self.counted.groups, "copies": self.copies, "habits": self._with(swap).gaps()}
        scores, pool = self._turned(self.audit.response_scores, swap), np.ones(len(swap), dtype=bool)
        table = hypothesis_table(scores, self.clusters, pool, self.config, names=("prompt", "A", "R"), **how)
        return int(np.sum(table["kept"].to_numpy()))

    @staticmethod
    def _turned(scores: Any, swap: np.ndarray) -> Any:
        sign = np.where(swap, -1.0, 1.0)
        by_count = scores.by_count * sign[:, None].astype(np.float32)
        return replace(
            scores, u=scores.u * sign[:, None], log_ratio=scores.log_ratio * sign, by_count=by_count, shown=None
        )

    def labels(self) -> dict[str, Any]:
        """Concepts of either kind, and those whose label scores `GOOD` or more."""
        found = {}
        for kind, table in (("together", self.audit.concepts), ("by response", self.audit.responses)):
            scores = np.array(table["label_score"].to_pylist(), dtype=float)
            found[kind] = {"concepts": len(scores), "good": int(np.sum(scores >= GOOD))}
        return found


PARTS: dict[str, Callable[[Swapped, np.ndarray], int]] = {
    "habits by what is asked": Swapped.habits,
    "concepts in data contexts": Swapped.feature_view,
    "response clusters in prompt contexts": Swapped.prompt_view,
}


def totals(sets: dict[str, Any]) -> dict[str, Any]:
    """Over all sets: runs in which something was kept, with Wilson intervals, and shares of labels that hold."""
    found: dict[str, Any] = {}
    for part in PARTS:
        runs, kept = (sum(of["swapped"].get(part, {}).get(key, 0) for of in sets.values()) for key in ("runs", "kept"))
        if runs:
            interval = binomtest(kept, runs).proportion_ci(0.95, method="wilson")
            found[part] = {"runs": runs, "kept": kept, "low": round(interval.low, 4), "high": round(interval.high, 4)}
    for kind in ("together", "by response"):
        shares = [of["labels"][kind]["good"] / max(1, of["labels"][kind]["concepts"]) for of in sets.values()]
        found[f"labels of concepts {kind}"] = {"least": round(min(shares), 4), "most": round(max(shares), 4)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audits", type=Path, required=True, help="folder of audits")
    parser.add_argument("--runs", type=int, default=RUNS, help=f"swaps of each set and part (default {RUNS})")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "swapped.json")
    args = parser.parse_args()
    results = json.loads(args.results.read_text(encoding="utf-8")) if args.results.exists() else {}
    sets = results.setdefault("sets", {})
    for folder in sorted(path.parent for path in args.audits.glob("*/audit.json")):
        clock, here = time.process_time(), Swapped(folder)
        of = sets.setdefault(folder.name, {"pairs": len(here.data), "swapped": {}})
        of["labels"] = here.labels()
        groups = np.unique(here.counted.groups, return_inverse=True)[1]
        for part, kept in PARTS.items():
            done = of["swapped"].setdefault(part, {"runs": 0, "kept": 0})
            for run in range(done["runs"], args.runs):
                swap = (np.random.default_rng(run).random(groups.max() + 1) < 0.5)[groups]
                done["kept"] += bool(kept(here, swap))
                done["runs"] += 1
        print(f"{folder.name}: {of} ({time.process_time() - clock:.0f} s of CPU)", flush=True)
        results |= {
            "command": f"python benchmarks/swapped.py --audits FOLDER --runs {args.runs}",
            "date": datetime.date.today().isoformat(),
            "device": f"{platform.machine()}, {os.cpu_count()} CPU cores",
            "versions": {of: version(of) for of in ("trl_anatomy", "numpy", "scipy", "scikit-learn")}
            | {"python": platform.python_version()},
            "all": totals(sets),
        }
        args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
