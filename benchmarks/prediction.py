"""Does the audit predict what training changes? Predicted against observed shift on worlds with planted habits.

One run of the demo per seed (world, audit, plain DPO, DPO with a policy, comparison): `trl_anatomy/testbed/demo.py`.
Recorded per seed, over the audit's concepts (observed by the SAE in rollouts of both models) and over the planted
habits (observed by text rules): squared Pearson correlation of predicted with observed shift, what the noise of the
rollouts allows, the same for random clusters of the same sizes, and baselines.

    python benchmarks/prediction.py --seeds 5
"""

import argparse
import datetime
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np

from trl_anatomy.testbed.demo import SHAPED, DemoResult, run_demo
from trl_anatomy.testbed.language import HABITS

PACKAGES = ("trl", "transformers", "torch", "sae-lens", "numpy", "scipy", "scikit-learn", "scikit-network")


def r2(predicted: np.ndarray, observed: np.ndarray) -> float:
    return float(np.corrcoef(predicted, observed)[0, 1] ** 2)


def record(result: DemoResult) -> dict:
    """The figures of one seed."""
    concepts = result.comparison["concepts"]
    observed = np.array([row["observed"]["dpo"][0] for row in concepts])
    table = result.audit.concepts.to_pylist()
    found = result.comparison["agreement"]["dpo"]
    # Baselines: what one would say without reading signs of the data, and with reading lengths only.
    activity = result.audit.activity
    longer = np.sign(activity.log_ratio)
    by_length = np.array([np.corrcoef(longer, activity.u[:, k])[0, 1] for k in range(len(table))])
    support = np.array([row["support"] for row in table], dtype=float)
    habits = [row for row in result.rows if row.role != "quality"]
    seen = np.array([row.observed for row in habits])
    steered = [row for row in habits if row.role in ("rewarded", "punished")]
    return {
        "concepts": {
            "n": len(concepts),
            "mean disparity": found["r2"],
            "mean disparity, interval": [found["r2_low"], found["r2_high"]],
            "start model tilted by the fitted reward": found["tilt_r2"],
            "length-adjusted disparity": r2(np.array([row["length_adjusted"] for row in table]), observed),
            "baseline: correlation with the longer response": r2(by_length, observed),
            "baseline: how often the concept fires": r2(support, observed),
            "random clusters of the same sizes": found["random_clusters_r2"],
            "ceiling by the noise of the rollouts": found["noise_ceiling_r2"],
            "rank correlation": found["spearman"],
            "permutation p": found["p"],
        },
        "habits": {
            "n": len(habits),
            "best latent's disparity": r2(np.array([row.predicted for row in habits]), seen),
            "signs right (rewarded and punished)": sum(row.predicted * row.observed > 0 for row in steered),
            "signs asked (rewarded and punished)": len(steered),
        },
        "policy": {
            "habit": SHAPED,
            "recovery": result.recovery,
            "quality, plain DPO": result.row("correct").dpo,
            "quality, with the policy": result.row("correct").policy,
        },
        "rows": [
            {
                "habit": row.habit,
                "role": row.role,
                "phi": row.phi,
                "predicted": row.predicted,
                "start": row.start,
                "dpo": row.dpo,
                "policy": row.policy,
                "standard error of a difference": row.noise,
            }
            for row in result.rows
        ],
    }


def summary(seeds: dict[str, dict]) -> dict:
    """Median, smallest and largest of every figure over the seeds."""
    out: dict[str, dict] = {}
    for part in ("concepts", "habits", "policy"):
        for name in seeds[next(iter(seeds))][part]:
            values = [seed[part][name] for seed in seeds.values()]
            if all(isinstance(value, int | float) for value in values):
                out[f"{part}: {name}"] = {
                    "median": float(np.median(values)),
                    "min": float(np.min(values)),
                    "max": float(np.max(values)),
                }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="worlds, with seeds 0, 1, ... (default 5)")
    parser.add_argument("--out", default="benchmark-worlds", help="folder for the worlds; finished stages are kept")
    parser.add_argument("--results", default="benchmarks/results/prediction.json")
    args = parser.parse_args()
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict] = {}
    for seed in range(args.seeds):
        found[str(seed)] = record(run_demo(Path(args.out) / str(seed), seed=seed))
        assert len(found[str(seed)]["rows"]) == len(HABITS) + 1
        results = {
            "command": f"python benchmarks/prediction.py --seeds {args.seeds}",
            "date": datetime.date.today().isoformat(),
            "device": f"CPU ({platform.machine()}), one thread",
            "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
            "summary": summary(found),
            "seeds": found,
        }
        Path(args.results).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
