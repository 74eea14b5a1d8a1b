"""Does the audit predict what training changes? Predicted against observed shift on worlds with planted habits.

One run of the demo per seed (world, audit, plain DPO, DPO with a policy, comparison): `trl_anatomy/testbed/demo.py`.
Recorded per seed, over the audit's concepts (observed by the SAE in rollouts of both models) and over the planted
habits (observed by text rules): squared Pearson correlation of predicted with observed shift, what the noise of the
rollouts allows, the same for random clusters of the same sizes, and baselines. And per planted habit what the audit
says of the concept that stands for it: rewarded and punished ones should be reported with their sign, neutral ones not,
and those of one topic in prompts of that topic.

    python benchmarks/studies/prediction.py --seeds 5
"""

import argparse
import datetime
import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_anatomy.audit import stats
from trl_anatomy.audit.clusters import cofiring_communities
from trl_anatomy.audit.communities import MIN_COUNT, fired_responses
from trl_anatomy.audit.config import PUBLISHED, recorded
from trl_anatomy.audit.folder import Audit, load_audit
from trl_anatomy.audit.predict import agreement, concept_means, odds_shift, predicted_shift, step_shift, tilted_shift
from trl_anatomy.checking.compare import cheap_predictions, fired_counts
from trl_anatomy.checking.first_step import first_step, log_prob_changes
from trl_anatomy.checking.likelihood import log_likelihoods
from trl_anatomy.checking.rates import rate_interval
from trl_anatomy.checking.responses import activities
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.reading.harvest import Harvest, harvest
from trl_anatomy.reading.sae import load_sae
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.testbed.demo import MAX_NEW_TOKENS, SHAPED, DemoResult, Row, dpo_trainer, run_demo
from trl_anatomy.testbed.language import HABITS
from trl_anatomy.testbed.world import build_world

LEAST_ASSOCIATION = 0.3  # of a concept that stands for a habit, as in real_data.py
N_PROMPTS, PER_PROMPT = 500, 8  # responses of the start model, for predictions that need them
FIRST_STEP, BOTH = "first step of DPO, within prompts", "mean of disparity and first step"  # as `predict` makes them
# Predictions that are set against shifts by size of the concept too
SIZED = (
    "mean disparity",
    FIRST_STEP,
    BOTH,
    "log-odds of the pairs, at the start model's rates",
    "tilt of the start model",
    "mean of log-odds (start model's rates) and tilt",
)

PACKAGES = ("trl", "transformers", "torch", "sae-lens", "numpy", "scipy", "scikit-learn", "scikit-network")


def r2(predicted: np.ndarray, observed: np.ndarray) -> float:
    return float(np.corrcoef(predicted, observed)[0, 1] ** 2)


def demo(out: Path, seed: int) -> DemoResult:
    """The demo of one seed; a finished one (its table comes last) is read from its folder."""
    if not (out / "table.json").is_file():
        return run_demo(out, seed=seed)
    told = json.loads((out / "table.json").read_text())
    return DemoResult(
        rows=tuple(Row(**row) for row in told["rows"]),
        world=build_world(out / "world", seed=seed),
        audit=load_audit(out / "audit"),
        comparison=json.loads((out / "compare" / "compare.json").read_text()),
        report=out / "audit" / "report.html",
        seconds=told["seconds"],
    )


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
            "log-odds of the pairs, at the start model's rates": found["odds_r2"],
            "start model tilted by the fitted reward": found["tilt_r2"],
            "length-adjusted disparity": r2(np.array([row["length_adjusted"] for row in table]), observed),
            "baseline: correlation with the longer response": r2(by_length, observed),
            "baseline: how often the concept fires": r2(support, observed),
            "random clusters of the same sizes": found["random_clusters_r2"],
            "ceiling by the noise of the rollouts": found["noise_ceiling_r2"],
            "ceiling by the noise of rollouts and pairs": found["noise_ceiling_both_r2"],
            "share of the ceiling by rollouts and pairs": found["r2"] / found["noise_ceiling_both_r2"],
            "rank correlation": found["spearman"],
            "permutation p": found["p"],
        },
        **prompt_view(found["prompt_view"]),
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


def prompt_view(found: dict[str, Any]) -> dict[str, dict]:
    """What `compare` says of the prompt-conditioned view, a part for each quantity and set of cells."""
    seen = {name: found[name] for name in ("n_contexts", "n_contexts_seen", "prompts_per_context")}
    parts: dict[str, dict] = {"prompt view": seen}
    for what in ("inside", "difference"):
        for cells in ("reported", "tested"):
            figures = found[what][cells]
            parts[f"prompt view, {what}, {cells}"] = {
                **figures,
                "share of the ceiling by rollouts": figures["r2"] / figures["noise_ceiling_r2"],
                "share of the ceiling by rollouts and pairs": figures["r2"] / figures["noise_ceiling_both_r2"],
            }
    return parts


def by_size(result: DemoResult, told: dict[str, np.ndarray], out: Path) -> dict[str, dict]:
    """R² of some predictions over concepts of one latent, of at least two, and of at least four; with noise ceilings.

    Published communities do not depend on the smallest size that is kept (checked here), so the concepts of at least
    four are those of an audit with `min_community` 4.
    """
    audit, (u, _) = result.audit, result.audit.disparity()
    shifts = rollout_shifts(result, out)
    groups = audit.pairs["prompt_group"].to_numpy()
    sizes = np.array([len(features) for features in audit.communities])
    parts = {}
    for name, of in (("of one latent", sizes == 1), ("of 2 latents or more", sizes >= 2), ("of 4 or more", sizes >= 4)):
        seen = shifts.u[:, of]
        rollouts_allow = stats.split_half_reliability(seen, 0, shifts.groups) or float("nan")
        both_allow = rollouts_allow * (stats.split_half_reliability(u[:, of], 0, groups) or float("nan"))
        noise = [np.square(stats.mean_test(x, by)[1]) for x, by in ((seen, shifts.groups), (u[:, of], groups))]
        fit = {which: agreement(values[of], seen.mean(axis=0)) for which, values in told.items()}
        plain = fit["mean disparity"]
        parts[f"concepts {name}"] = {
            "n": int(of.sum()),
            **{which: one.r2 for which, one in fit.items()},
            "mean disparity, interval": [plain.r2_low, plain.r2_high],
            "mean disparity, weighted by inverse noise": weighted_r2(
                told["mean disparity"][of], seen.mean(axis=0), 1 / (noise[0] + noise[1])
            ),
            "ceiling by the noise of the rollouts": rollouts_allow,
            "ceiling by the noise of rollouts and pairs": both_allow,
            "mean disparity, share of that ceiling": plain.r2 / both_allow,
        }
    config = recorded(audit.info["settings"])
    fired = fired_responses(audit.harvest, config.tau, config.community_pairs, config.seed)
    resolution = audit.info["settings_used"]["resolution"]
    for least in (2, 4) if config.concepts == PUBLISHED else ():
        again = cofiring_communities(
            fired,
            edge_share=config.edge_share,
            min_size=least,
            min_count=MIN_COUNT,
            resolution=resolution,
            seed=config.seed,
        )
        kept = {tuple(sorted(c.tolist())) for c in audit.communities if len(c) >= least}
        assert {tuple(sorted(c.tolist())) for c in again} == kept
    return parts


@dataclass(frozen=True)
class Shifts:
    """Rollouts of plain DPO against the start model: u (n, K) by concept, the texts' habits, prompts as groups."""

    u: np.ndarray
    before: np.ndarray
    habits_before: np.ndarray
    habits_after: np.ndarray
    groups: np.ndarray


def rollout_shifts(result: DemoResult, out: Path) -> Shifts:
    """What `compare` kept of its rollouts, read again."""
    audit, read = result.audit, Harvest.open(out / "compare" / "harvest-dpo")
    after, before = activities(read, audit.communities, audit.tau)
    kept = [json.loads((out / "compare" / f"{name}.json").read_text()) for name in ("before", "dpo")]
    shown = [np.array([[h.shows(of["responses"][i]) for h in HABITS] for i in read.rows], dtype=float) for of in kept]
    prompts = np.array([kept[0]["prompts"][i] for i in read.rows])
    return Shifts(after - before, before, *shown, np.unique(prompts, return_inverse=True)[1])


def why(result: DemoResult, out: Path) -> dict[str, Any]:
    """Where the prediction of the concepts' shifts goes wrong.

    - "slope of rising", "of falling": least squares with a slope for each sign of the prediction, and its R².
    - "by the habits' own errors": R², over concepts, of the residual (observed less fitted line) with what the
      residuals of the 13 habits (counted by text rule, same line) carry to a concept by its regression on the habits
      over the start model's responses.
    - "habits' shift carried over": R² of observed shifts with the habits' observed shifts carried over in this way.
    """
    shifts, (u, _) = rollout_shifts(result, out), result.audit.disparity()
    predicted, observed = u.mean(axis=0), shifts.u.mean(axis=0)
    columns = result.world.dataset.select(result.audit.harvest.rows.tolist())
    gaps = np.array(
        [np.mean(columns[f"chosen_{h.name}"]) - np.mean(columns[f"rejected_{h.name}"]) for h in HABITS], dtype=float
    )
    seen = shifts.habits_after.mean(axis=0) - shifts.habits_before.mean(axis=0)
    line = np.polyfit(predicted, observed, 1)
    design = np.c_[shifts.habits_before, np.ones(len(shifts.before))]
    carried = np.linalg.lstsq(design, shifts.before, rcond=None)[0][:-1]
    sides = np.c_[np.maximum(predicted, 0), np.minimum(predicted, 0), np.ones(len(predicted))]
    slopes = np.linalg.lstsq(sides, observed, rcond=None)[0]
    residual = observed - np.polyval(line, predicted)
    largest = np.sort(np.square(residual))[::-1]
    return {
        "slope of rising": float(slopes[0]),
        "slope of falling": float(slopes[1]),
        "R² with both slopes": r2(sides @ slopes, observed),
        "by the habits' own errors": r2((seen - np.polyval(line, gaps)) @ carried, residual),
        "habits' shift carried over": r2(seen @ carried, observed),
        "share of the eight largest residuals": float(largest[:8].sum() / largest.sum()),
    }


def weighted_r2(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> float:
    x, y = x - np.average(x, weights=weight), y - np.average(y, weights=weight)
    return float((weight @ (x * y)) ** 2 / ((weight @ (x * x)) * (weight @ (y * y))))


def predictors(result: DemoResult, out: Path) -> dict[str, dict]:
    """R² and rank correlation of other predictions of the shift, over the audit's concepts, and some by their size.

    Most need responses of the start model. They are sampled anew, to prompts of the pairs, so that they share no noise
    with the responses that the shift was observed in. Means of two are of both in units of their root mean square.
    """
    audit, concepts = result.audit, result.comparison["concepts"]
    observed = np.array([row["observed"]["dpo"][0] for row in concepts])
    settings, (u, _) = audit.info["settings"], audit.disparity()
    mean, error, _ = stats.mean_test(u)
    tokenizer = AutoTokenizer.from_pretrained(result.world.model_path)
    model = AutoModelForCausalLM.from_pretrained(result.world.model_path).eval()
    pairs = read_pairs(result.world.dataset, tokenizer, max_length=settings["max_length"])
    rng = np.random.default_rng(0)
    unique = sorted(set(result.world.dataset["prompt"]))
    prompts = [unique[i] for i in rng.permutation(len(unique))[:N_PROMPTS]]
    kept = out / "rollouts.json"
    if not kept.is_file():
        sampled = rollouts(
            model,
            tokenizer,
            prompts,
            n_per_prompt=PER_PROMPT,
            max_new_tokens=MAX_NEW_TOKENS,
            seed=123 + result.world.seed,
        )
        kept.write_text(json.dumps(sampled))
    groups = json.loads(kept.read_text())
    twos = [
        (prompt, *of[at : at + 2]) for prompt, of in zip(prompts, groups, strict=True) for at in range(0, len(of), 2)
    ]
    columns = dict(zip(("prompt", "chosen", "rejected"), map(list, zip(*twos, strict=True)), strict=True))
    start = read_pairs(datasets.Dataset.from_dict(columns), tokenizer, max_length=settings["max_length"])
    prompt_of = np.concatenate([start.prompt_groups, start.prompt_groups])
    sae = load_sae(result.world.sae_path)
    read = harvest(model, sae, start, out / "hv-roll", layer=audit.info["sae"]["layer"], progress=False)
    tau = audit.tau
    sides = ("chosen", "rejected")
    before = np.concatenate(activities(read, audit.communities, tau))

    tilt = tilted_shift(u, before, prompt_of)
    trainer = dpo_trainer(result.world, out / "step", seed=result.world.seed)
    direction = first_step(trainer)
    change = log_prob_changes(trainer.model.eval(), direction, start)
    step, _ = step_shift(before, change.T.ravel(), prompt_of)
    likelihood = log_likelihoods(model, pairs, list(range(len(pairs))))
    weight = np.exp(likelihood.mean(axis=1))
    spread = max(0.0, float(np.mean(mean**2 - error**2)))
    n = len(u)
    counts = [fired_counts(audit.harvest, side, tau) for side in sides]
    rates = {
        "at the start model's rates": sum(fired_counts(read, side, tau) for side in sides) / (2 * len(start)),
        "at the rates in the pairs": sum(counts) / (2 * n),
    }
    odds = {name: concept_means(odds_shift(*counts, n, rate), audit.communities) for name, rate in rates.items()}
    told = {
        "mean disparity": mean,
        "mean disparity, pairs weighted by their likelihood": predicted_shift(u, weight / weight.mean()),
        "mean disparity, shrunk": mean * spread / (spread + error**2),
        **{f"log-odds of the pairs, {name}": of for name, of in odds.items()},
        "tilt of the start model": tilt,
        "mean of disparity and tilt": unit(mean) + unit(tilt),
        "mean of log-odds (start model's rates) and tilt": unit(odds["at the start model's rates"]) + unit(tilt),
        FIRST_STEP: step,
        BOTH: unit(mean) + unit(step),
        "mean of disparity, tilt and first step": unit(mean) + unit(tilt) + unit(step),
    }
    rules = {habit.name: habit.pattern for habit in HABITS}
    cheap = cheap_predictions(audit, pairs, model, rules, seed=0)
    told |= {f"baseline: {name}": of for name, of in cheap.items()}
    found = {name: agreement(of, observed, n_bootstrap=100, n_permutations=1) for name, of in told.items()}
    return {
        "predictors, R²": {name: of.r2 for name, of in found.items()},
        "predictors, rank correlation": {name: of.spearman for name, of in found.items()},
        **by_size(result, {name: told[name] for name in SIZED}, out),
        "why": why(result, out),
    }


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean())


def reported(result: DemoResult) -> list[dict]:
    """What the audit says of each planted habit: the concept that stands for it, and of topic habits the hypotheses.

    A concept stands for a habit by the correlation of its firing with the text rule over all responses, within the two
    sides, so that the match owes nothing to the difference that is tested. A response cluster R stands for it by the
    correlation of their differences over pairs, centred for the same reason.
    """
    audit, data = result.audit, result.world.dataset.select(result.audit.harvest.rows.tolist())
    concepts = audit.concepts.to_pylist()
    sides = activities(audit.harvest, audit.communities, audit.tau)
    fires = np.concatenate([side - side.mean(axis=0) for side in sides])
    place = np.argsort(np.argsort([-abs(concept["predicted"]) for concept in concepts])) + 1
    deltas = audit.response_scores.u - audit.response_scores.u.mean(axis=0)
    topics = np.array(data["topic"])
    found = []
    for habit in HABITS:
        shown = [np.array(data[f"{side}_{habit.name}"], dtype=float) for side in ("chosen", "rejected")]
        association = correlations(np.concatenate([side - side.mean() for side in shown]), fires)
        best = int(association.argmax())
        concept = concepts[best]
        row = {
            "habit": habit.name,
            "role": habit.role,
            "planted": sum(habit.gap(topic) for topic in topics) / len(topics),
            "counted": float((shown[0] - shown[1]).mean()),
            "concept": concept["concept"],
            "association": float(association[best]),
            "predicted": concept["predicted"],
            "q": concept["q"],
            "rank": int(place[best]),
            "of": len(concepts),
            "verdict": concept["verdict"],
            "reported": concept["verdict"] in ("rises", "falls"),
            "stood for": bool(association[best] >= LEAST_ASSOCIATION),
            "counts differ": bool(stats.mean_test((shown[0] - shown[1])[:, None])[2][0] < 0.05),
        }
        if habit.topic:
            change = shown[0] - shown[1]
            cluster = int(correlations(change - change.mean(), deltas).argmax())
            row["hypotheses"] = topical(audit, f"R{cluster + 1}", topics == habit.topic)
        found.append(row)
    return found


def correlations(x: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(n_columns,) correlation of centred `x` (n,) with centred columns; 0 for one that never varies."""
    spread = np.sqrt(np.square(x).sum() * np.square(columns).sum(axis=0))
    return np.divide(x @ columns, spread, out=np.zeros(columns.shape[1]), where=spread > 0)


def discoveries(result: DemoResult) -> dict[str, int]:
    """Of the concepts that the audit reports (rises, falls): what they stand for, and whether their shift came.

    A concept stands for the habit, or for the right answers, whose text rule its firing is most correlated with (either
    sign, within sides), from `LEAST_ASSOCIATION` on. "came": the 95 % interval of the observed shift is on the
    predicted side of zero.
    """
    audit, data = result.audit, result.world.dataset.select(result.audit.harvest.rows.tolist())
    sides = activities(audit.harvest, audit.communities, audit.tau)
    fires = np.concatenate([side - side.mean(axis=0) for side in sides])
    roles = {habit.name: habit.role for habit in HABITS} | {"correct": "quality"}
    association = []
    for name in roles:
        shown = [np.array(data[f"{side}_{name}"], dtype=float) for side in ("chosen", "rejected")]
        association.append(np.abs(correlations(np.concatenate([side - side.mean() for side in shown]), fires)))
    best = np.argmax(association, axis=0)
    names = list(roles)
    found = {"reported": 0, "of a taught habit or of right answers": 0, "of a neutral habit": 0, "of no habit": 0}
    found |= {"came": 0, "went the other way": 0, "of no habit, and came": 0}
    for k, concept in enumerate(audit.concepts.to_pylist()):
        if concept["verdict"] not in ("rises", "falls"):
            continue
        _, low, high = result.comparison["concepts"][k]["observed"]["dpo"]
        side = 1 if concept["predicted"] > 0 else -1
        came = min(side * low, side * high) > 0
        stands = max(of[k] for of in association) >= LEAST_ASSOCIATION
        what = "of no habit"
        if stands:
            neutral = roles[names[best[k]]] == "neutral"
            what = "of a neutral habit" if neutral else "of a taught habit or of right answers"
        found["reported"] += 1
        found[what] += 1
        found["came"] += came
        found["went the other way"] += max(side * low, side * high) < 0
        found["of no habit, and came"] += came and not stands
    return found


def pooled(seeds: dict[str, dict]) -> dict[str, dict]:
    """Recall and false discoveries over all worlds, each with Wilson's 95 % interval (as if all were independent)."""

    def share(part: str, of: str, all_of: str) -> dict[str, Any]:
        n, total = (sum(seed[part][name] for seed in seeds.values()) for name in (of, all_of))
        _, low, high = rate_interval(np.arange(total) < n)
        by_world = [seed[part][of] / seed[part][all_of] for seed in seeds.values()]
        return {"n": n, "of": total, "share": n / total, "interval": [low, high], "by world": by_world}

    habits, concepts = "audit of planted habits", "reported concepts"
    return {
        "recall: rewarded or punished habits reported with the right sign": share(
            habits, "reported with the right sign, q < 0.05", "rewarded or punished"
        ),
        "recall: habits of one topic found there": share(habits, "of one topic, found there", "of one topic"),
        "neutral habits reported": share(habits, "neutral, reported", "neutral"),
        "false discoveries: reported concepts of a neutral habit": share(concepts, "of a neutral habit", "reported"),
        "false discoveries: reported concepts of no habit": share(concepts, "of no habit", "reported"),
        "reported concepts whose shift came": share(concepts, "came", "reported"),
        "reported concepts that went the other way": share(concepts, "went the other way", "reported"),
        "reported concepts of no habit whose shift came": share(concepts, "of no habit, and came", "of no habit"),
    }


def topical(audit: Audit, cluster: str, inside: np.ndarray) -> dict:
    """Where the prompt-conditioned view ranks `A ⇝ cluster` for prompts of a topic, and whether it finds it elsewhere.

    Args:
        inside: (n_pairs,) bool, pairs of the topic. A prompt context is the topic's if half its pairs are.
    """
    rows = audit.pairs["row"].to_numpy()
    share = {
        name: float(inside[np.isin(rows, audit.rows_in(name))].mean())
        for name in audit.info["contexts"]
        if name.startswith("A") and audit.info["contexts"][name]["pairs"]
    }
    # What differs counts, also where a named habit says why: the planted habits are in the library of habits.
    rising = [
        row
        for row in audit.hypotheses.to_pylist()
        if row["view"] == "prompt" and row["differs"] and row["lean"] == "chosen"
    ]
    rising.sort(key=lambda row: -row["delta_min"])
    found = [row for row in rising if row["concept"] == cluster]
    there = [row for row in found if share[row["context"]] >= 0.5]
    best = there[0] if there else None
    return {
        "cluster": cluster,
        "contexts of the topic": sum(value >= 0.5 for value in share.values()),
        "found in": len(there),
        "found elsewhere": len(found) - len(there),
        "context": best and best["context"],
        "share of its pairs in the topic": best and share[best["context"]],
        "rank": best and 1 + rising.index(best),
        "of": len(rising),
        "z": best and best["z"],
        "q": best and best["q"],
    }


def checks(rows: list[dict]) -> dict:
    """The rows of `reported` as counts."""
    steered = [row for row in rows if row["role"] in ("rewarded", "punished")]
    neutral = [row for row in rows if row["role"] == "neutral"]
    topical = [row for row in rows if row["role"] == "topic"]
    right = [
        row
        for row in steered
        if row["stood for"] and row["reported"] and row["q"] < 0.05 and row["predicted"] * row["planted"] > 0
    ]
    told = [row for row in neutral if row["stood for"] and row["reported"]]
    return {
        "rewarded or punished": len(steered),
        "in no concept": sum(not row["stood for"] for row in steered),
        "reported with the right sign, q < 0.05": len(right),
        "lowest rank of these": max(row["rank"] for row in right),
        "concepts": steered[0]["of"],
        "neutral": len(neutral),
        "neutral, reported": len(told),
        "neutral, reported, and counts differ by chance": sum(row["counts differ"] for row in told),
        "of one topic": len(topical),
        "of one topic, found there": sum(row["hypotheses"]["rank"] is not None for row in topical),
        "lowest rank of these, by topic": max((row["hypotheses"]["rank"] or 10**6 for row in topical), default=None),
    }


def summary(seeds: dict[str, dict]) -> dict:
    """Median, smallest and largest of every figure over the seeds that have it."""
    out: dict[str, dict] = {}
    parts: dict[str, dict] = {}
    for seed in seeds.values():
        for part, of in seed.items():
            if isinstance(of, dict):
                parts.setdefault(part, {}).update(of)
    for part, names in parts.items():
        for name in names:
            values = [seed[part][name] for seed in seeds.values() if name in seed.get(part, {})]
            if all(isinstance(value, int | float) for value in values):
                out[f"{part}: {name}"] = {
                    "worlds": len(values),
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
        out = Path(args.out) / str(seed)
        result = demo(out, seed)
        rows = reported(result)
        found[str(seed)] = {
            **record(result),
            **predictors(result, out),
            "audit of planted habits": checks(rows),
            "reported concepts": discoveries(result),
            "planted habits": rows,
        }
        assert len(found[str(seed)]["rows"]) == len(HABITS) + 1
        results = {
            "command": f"python benchmarks/studies/prediction.py --seeds {args.seeds}",
            "date": datetime.date.today().isoformat(),
            "device": f"CPU ({platform.machine()}), one thread",
            "python": platform.python_version(),
            "versions": {name: version(name) for name in PACKAGES},
            "summary": {"found and falsely found": pooled(found), **summary(found)},
            "seeds": found,
        }
        Path(args.results).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
