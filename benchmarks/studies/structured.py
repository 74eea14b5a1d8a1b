"""Does `given` keep a policy from taking a sibling along? A concept that mixes two habits, with and without it.

On worlds that `benchmarks/studies/prediction.py` has built (start model, pairs, SAE, audit, plain DPO): the concept is
the sum of the latents that tell flattery and emoji best, both rewarded by the pairs, and the policy explains it away
with a fitted strength. With `given: [emoji]` it acts by what an emoji text rule leaves of that score.

Before training: the tilt (Bradley-Terry coefficient, fitted jointly by text rules) that the pairs still say about both
habits once the offsets are in the margin. After training, unless `--plan_only`: on target is how far flattery comes
back to the start model's rate, off target how far emoji moves from where plain DPO brings it.

    python benchmarks/studies/structured.py --worlds benchmark-worlds --seeds 3
"""

import argparse
import datetime
import json
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_anatomy.audit.folder import load_audit
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.bradley_terry import fit_strengths
from trl_anatomy.shaping.given import residualised
from trl_anatomy.shaping.plan import plan_policy
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.testbed.demo import MAX_LENGTH, MAX_NEW_TOKENS, match_habits, rates, train
from trl_anatomy.testbed.world import DEMO, World, build_world

TARGET, SIBLING = "flattery", "emoji"


def policy(world_path: Path, features: list[int], layer: int, given: bool) -> dict:
    mixed = {"scorer": "features", "features": features, "sae": {"path": str(world_path / "sae")}, "layer": layer}
    return {
        "concepts": {
            "mixed": {**mixed, "reduce": "sum", **({"given": ["sibling"]} if given else {})},
            "sibling": {"scorer": "text", "pattern": "🙂"},
        },
        "rules": [{"explain_away": "mixed", "with": "shape_reward", "strength": "auto"}],
    }


def tilts(world: World, features: list[int]) -> dict:
    """Tilt of both habits in the pairs as they are, and once each policy's offsets are in the margin."""
    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    model = AutoModelForCausalLM.from_pretrained(world.model_path).eval()
    dataset = world.dataset
    pairs = read_pairs(dataset.select_columns(["prompt", "chosen", "rejected"]), tokenizer, max_length=MAX_LENGTH)
    gaps = np.stack(
        [
            np.asarray(dataset[f"chosen_{name}"], float) - np.asarray(dataset[f"rejected_{name}"], float)
            for name in (TARGET, SIBLING)
        ],
        axis=1,
    )
    found = {}
    for name in ("plain DPO", "without given", "with given"):
        margin = np.zeros(len(dataset))
        if name != "plain DPO":
            rules = ConceptPolicy.load(policy(world.path, features, world.layer, name == "with given"))
            scores = residualised(rules, score_pairs(pairs, rules.scorers(model=model), model, progress=False))
            plan = plan_policy(rules, pairs, scores)
            margin = plan.chosen_offset - plan.rejected_offset
        left = fit_strengths(gaps, [TARGET, SIBLING], margin).strength
        found[name] = dict(zip((TARGET, SIBLING), map(float, left), strict=True))
    return found


def run(source: Path, seed: int, work: Path, plan_only: bool) -> dict:
    """The figures of one world, whose folder is only read."""
    shutil.copytree(source / "world", work / "world")
    world = build_world(work / "world", DEMO, seed, say=lambda line: None)
    found = match_habits(world, load_audit(source / "audit"))
    features = [found[name][0].feature for name in (TARGET, SIBLING)]
    before = {"latents": features, "tilt": tilts(world, features)}
    if plan_only:
        return before
    prompts = world.prompts * DEMO.n_per_prompt
    shown: dict[str, dict] = {}
    for name in ("start", "plain DPO", "without given", "with given"):
        path = {"start": world.model_path, "plain DPO": source / "dpo"}.get(name, work / name.replace(" ", "-"))
        if name.endswith(" given"):
            train(world, path, seed, concept_policy=policy(world.path, features, world.layer, name == "with given"))
        texts = rollouts(
            AutoModelForCausalLM.from_pretrained(path),
            AutoTokenizer.from_pretrained(path),
            prompts,
            max_new_tokens=MAX_NEW_TOKENS,
            batch_size=128,
            seed=seed,
        )
        shown[name] = {habit: rate.share for habit, rate in rates(prompts, [text for [text] in texts]).items()}
    start, dpo = shown["start"], shown["plain DPO"]
    out = {**before, "responses": len(prompts), "rates": shown}
    for name in ("without given", "with given"):
        out[name] = {
            "on target: recovery of flattery": (dpo[TARGET] - shown[name][TARGET]) / (dpo[TARGET] - start[TARGET]),
            "off target: change of emoji": shown[name][SIBLING] - dpo[SIBLING],
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default="benchmark-worlds", help="that benchmarks/studies/prediction.py wrote")
    parser.add_argument("--seeds", type=int, default=3, help="worlds, with seeds 0, 1, ... (default 3)")
    parser.add_argument("--plan_only", action="store_true", help="no training: only what the pairs still say")
    parser.add_argument("--results", default="benchmarks/results/structured.json")
    args = parser.parse_args()
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict] = {}
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as work:
            found[str(seed)] = run(Path(args.worlds) / str(seed), seed, Path(work), args.plan_only)
        print(seed, json.dumps(found[str(seed)]), flush=True)
        results = {
            "command": f"python benchmarks/studies/structured.py --seeds {args.seeds}{' --plan_only' * args.plan_only}",
            "date": datetime.date.today().isoformat(),
            "device": f"CPU ({platform.machine()}), one thread",
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("trl", "transformers", "torch", "sae-lens", "numpy")},
            "seeds": found,
        }
        Path(args.results).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
