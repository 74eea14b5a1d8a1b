"""How often does the audit report something where there is nothing? Many runs on pairs with shuffled sides.

Every run draws a small world of pairs in which chosen and rejected are swapped at random, and counts whether any
kept hypothesis of a view has q < 0.05, or any concept is said to rise or fall. The share should be 5 %, up to chance.

    python benchmarks/null.py --runs 2000
"""

import argparse
import datetime
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

from scipy.stats import binomtest
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the synthetic world of the tests, known truth included
from audit_world import make_world
from test_null import COMMUNITIES, CONFIG

from trl_anatomy.audit.predict import concept_table
from trl_anatomy.audit.prompt_view import prompt_view
from trl_anatomy.audit.views import feature_view


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--pairs", type=int, default=500, help="pairs of a world (default 500)")
    parser.add_argument("--results", default="benchmarks/results/null.json")
    args = parser.parse_args()
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    reported = {"feature view": 0, "prompt view": 0, "concept shifts": 0}
    for seed in tqdm(range(args.runs)):
        world = make_world(n=args.pairs, seed=10_000 + seed, null=True)
        view = feature_view(world, COMMUNITIES, CONFIG, min_concept=2)
        concepts = concept_table(view.activity, COMMUNITIES, CONFIG)
        for name, rows in (("feature view", view.hypotheses), ("prompt view", prompt_view(world, CONFIG).hypotheses)):
            reported[name] += any(row["kept"] and row["q"] < 0.05 for row in rows.to_pylist())
        reported["concept shifts"] += any(row["verdict"] in ("rises", "falls") for row in concepts.to_pylist())
    shares = {}
    for name, count in reported.items():
        interval = binomtest(count, args.runs).proportion_ci(0.95, method="wilson")
        shares[name] = {"runs": args.runs, "reported": count, "share": count / args.runs}
        shares[name] |= {"ci_low": float(interval.low), "ci_high": float(interval.high)}
        print(f"{name}: {count} of {args.runs} runs, {count / args.runs:.1%} [{interval.low:.1%}, {interval.high:.1%}]")
    results = {
        "command": f"python benchmarks/null.py --runs {args.runs} --pairs {args.pairs}",
        "date": datetime.date.today().isoformat(),
        "seeds": [10_000, 10_000 + args.runs - 1],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "scikit-learn")},
        "shares": shares,
    }
    Path(args.results).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
