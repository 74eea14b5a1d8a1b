"""How often does the audit report something where there is nothing? Many runs on data without what is looked for.

Shuffled sides: every run draws a small world of pairs in which chosen and rejected are swapped at random, and counts
whether any kept hypothesis of a view has q < 0.05, or any concept is said to rise or fall. Concepts are the planted
groups of features and every other feature by itself.

Random contexts: every run draws responses with habits of real, unequal rates, puts them into twelve regions at random,
and counts whether any kept hypothesis has q < 0.05. Concepts are single features, most of them rare. The same by
Welch's error alone is recorded beside it.

Each share should be 5 %, up to chance.

    python benchmarks/studies/null.py --runs 2000
"""

import argparse
import datetime
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy.stats import binomtest
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # the synthetic world of the tests, known truth included
from audit_world import D_SAE, make_world
from test_null import COMMUNITIES, CONFIG
from test_region_view import sft_world

from trl_anatomy.audit import stats
from trl_anatomy.audit.predict import concept_table
from trl_anatomy.audit.prompt_view import prompt_view
from trl_anatomy.audit.region_view import region_table
from trl_anatomy.audit.views import activity, feature_view

LONE = [np.array([feature]) for feature in range(D_SAE)]
CONCEPTS = COMMUNITIES + [lone for lone in LONE if not any(lone[0] in group for group in COMMUNITIES)]
REGIONS = 12


def random_regions(pairs: int, seed: int) -> tuple[bool, bool]:
    """Whether anything is reported of regions drawn at random, and whether Welch's error alone would have."""
    scores = activity(sft_world(pairs, seed), LONE)
    members = stats.one_hot(np.random.default_rng((seed, 1)).integers(0, REGIONS, pairs), REGIONS)
    table = region_table(scores, members, CONFIG)
    plain, split = stats.compare_members(scores.u, members, np.ones(pairs, dtype=bool), scores.rows % 2)
    kept = split.consistent & (plain.n_in >= CONFIG.min_context)[:, None]
    by_welch = kept & (stats.benjamini_hochberg(plain.p) < 0.05)
    return bool(np.any(table["kept"].to_numpy() & (table["q"].to_numpy() < 0.05))), bool(by_welch.any())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=500, help="pairs of a world (default 500)")
    parser.add_argument("--results", default="benchmarks/results/null.json")
    args = parser.parse_args()
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    shown = ("feature view", "prompt view", "concept shifts", "random contexts", "random contexts, Welch's error alone")
    reported = dict.fromkeys(shown, 0)
    for seed in tqdm(range(args.runs)):
        world = make_world(n=args.pairs, seed=10_000 + seed, null=True)
        view = feature_view(world, CONCEPTS, CONFIG, min_concept=1)
        concepts = concept_table(view.activity, CONCEPTS, CONFIG)
        for name, rows in (("feature view", view.hypotheses), ("prompt view", prompt_view(world, CONFIG).hypotheses)):
            reported[name] += any(row["kept"] and row["q"] < 0.05 for row in rows.to_pylist())
        reported["concept shifts"] += any(row["verdict"] in ("rises", "falls") for row in concepts.to_pylist())
        for name, told in zip(shown[3:], random_regions(args.pairs, 10_000 + seed), strict=True):
            reported[name] += told
    shares = {}
    for name, count in reported.items():
        interval = binomtest(count, args.runs).proportion_ci(0.95, method="wilson")
        shares[name] = {"runs": args.runs, "reported": count, "share": count / args.runs}
        shares[name] |= {"ci_low": float(interval.low), "ci_high": float(interval.high)}
        print(f"{name}: {count} of {args.runs} runs, {count / args.runs:.1%} [{interval.low:.1%}, {interval.high:.1%}]")
    results = {
        "command": f"python benchmarks/studies/null.py --runs {args.runs} --pairs {args.pairs}",
        "date": datetime.date.today().isoformat(),
        "seeds": [10_000, 10_000 + args.runs - 1],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "scikit-learn")},
        "shares": shares,
    }
    Path(args.results).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
