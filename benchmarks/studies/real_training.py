"""What DPO on real preference data changes: predicted by the audit, and by rules on a planted trait taken out again.

The small real chat model is trained on real pairs, so only what it can show is counted: how often concepts of its SAE
fire, text rules, likelihood. It is incoherent; nothing here says whether answers are good.

Prediction: audit of the pairs, plain DPO with several seeds, and per concept the shift that the audit predicts beside
the one observed in responses to prompts that were held out.

Planted trait: a phrase opens a share of the chosen responses and a tenth as many of the rejected ones. Is it found by
the audit, learned by plain DPO, taken out by a rule, and at what cost? Beside the rules: one of next to no strength,
and the fitted strength on a latent that fires as often and stands for nothing that is counted.

The data stay outside the repository (TRL_ANATOMY_SHARED, or ../shared); results hold numbers, names of text rules and
names of concepts only. The SAE is that of real_data.py, in the same `--out`, and made if it is not there.

    python benchmarks/studies/real_training.py --seeds 0 1 2

The trait is planted with the first seed only, which also draws the rows; PREDICTED says how many a dataset takes.
"""

import argparse
import json
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from real_data import LAYER, MAX_LENGTH, MODEL, SOURCES, Source, clean, load, shared_folder, train_sae
from scipy.sparse import csr_array, vstack
from worlds import RESULTS, made_by, save

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import Audit
from trl_anatomy.audit.predict import agreement
from trl_anatomy.audit.run import run_audit
from trl_anatomy.audit.views import concept_activity
from trl_anatomy.checking.compare import compare
from trl_anatomy.checking.likelihood import log_likelihoods, log_probs
from trl_anatomy.checking.prediction import PLAIN, predict
from trl_anatomy.checking.rates import TEXT_RULES, recovery, rule_hits, word_counts
from trl_anatomy.checking.responses import activities
from trl_anatomy.checking.rollouts import encode_prompt, rollouts
from trl_anatomy.reading.harvest import Harvest
from trl_anatomy.reading.spans import Pairs, read_pairs

# And seeds, at most. The first three had been looked at, with another learning rate, when the first step was chosen as
# a prediction; the others had not.
PREDICTED = {
    "rm_bench, easy rows": 3,
    "overrefusal_steered": 2,
    "dsp_domain": 2,
    "rm_bench, hard rows": 2,
    "hh_helpful_test": 2,
}
# Prompts this short leave most of the length to the response, on both sides of the comparison.
PROMPT_TOKENS, TOKENS, NEW_TOKENS = 64, 160, 96
PAIRS, HELD_OUT, RESPONSES = 450, 0.2, 300  # pairs trained on, at most; share of prompts held out; responses a model
PER_PROMPT = 4  # responses of the start model to each prompt of the pairs, which the first step is carried over to
TRAINING = {"beta": 0.1, "learning_rate": 1e-3, "num_train_epochs": 1, "per_device_train_batch_size": 8}

HELPFUL = Source("permissive_upstream/hh_helpful_test", lambda row: "Assistant:" not in row["prompt"])
PHRASE, TRAIT = "Good question. ", r"^\W*Good question\b"  # which none of the text rules matches
# Of the chosen responses; the one that rules are tried on, which was 0.2 until plain DPO was seen to teach next to
# nothing there.
SHARES, SHAPED = (0.05, 0.2, 0.5), 0.5
SEEDS_PLANTED = 1
OPENED = 100  # prompts after which the phrase's probability is taken

SIDES = {"chosen": 1, "rejected": 3}  # where Pairs.tokens has them


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


def short_rows(rows: datasets.Dataset, tokenizer: Any) -> datasets.Dataset:
    """The rows whose prompt has at most PROMPT_TOKENS tokens."""
    return rows.filter(lambda row: len(tokenizer(row["prompt"][0]["content"]).input_ids) <= PROMPT_TOKENS)


def split(rows: datasets.Dataset, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """At most PAIRS rows to train on, and all rows of the prompts that were held out: no prompt is in both."""
    prompts = np.array([row[0]["content"] for row in rows["prompt"]])
    unique = np.unique(prompts)
    rng = np.random.default_rng(seed)
    held = np.isin(prompts, rng.permutation(unique)[: int(HELD_OUT * len(unique))])
    kept = rng.permutation(np.flatnonzero(~held))[:PAIRS]
    return rows.select(np.sort(kept)), rows.select(np.flatnonzero(held))


def asked(held: datasets.Dataset) -> list[Any]:
    """RESPONSES prompts, each of those held out as often as another, give or take one."""
    unique = list({row[0]["content"]: row for row in held["prompt"]}.values())
    return [unique[i % len(unique)] for i in range(RESPONSES)]


def audited(rows: datasets.Dataset, folder: Path, world: "World") -> Audit:
    """The pairs saved and audited, with default settings."""
    folder.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(folder / "pairs.parquet")
    config = AuditConfig(
        model=str(world.model_path),
        dataset=str(folder / "pairs.parquet"),
        sae=str(world.sae),
        layer=LAYER,
        max_length=TOKENS,
        out=str(folder / "audit"),
    )
    return run_audit(config, model=world.model, tokenizer=world.tokenizer, dataset=rows, progress=False)


class World:
    """Model, tokenizer, SAE and data."""

    def __init__(self, out: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.shared, self.out = shared_folder(), out
        self.model_path, self.sae = self.shared / "models" / MODEL, out / "sae"
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        self.model = AutoModelForCausalLM.from_pretrained(self.model_path).eval()
        if not (self.sae / "left.json").is_file():
            read = {
                name: read_pairs(self.load(source), self.tokenizer, max_length=MAX_LENGTH)
                for name, source in SOURCES.items()
            }
            train_sae(self.model, read, self.sae)

    def load(self, source: Source) -> datasets.Dataset:
        return load(self.shared, source, self.out / "cache")


def dpo_trainer(world: World, rows: datasets.Dataset, out: Path, seed: int, policy: Any = None) -> Any:
    """A trainer of these pairs that has not begun; it shows no progress."""
    from transformers import PrinterCallback, ProgressCallback
    from trl import DPOConfig

    from trl_anatomy.trainers.dpo import AnatomyDPOTrainer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        args = DPOConfig(
            output_dir=str(out),
            lr_scheduler_type="cosine",
            warmup_steps=5,
            max_length=TOKENS,
            precompute_ref_log_probs=True,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_steps=1,
            report_to=[],
            seed=seed,
            **TRAINING,
        )
        trainer = AnatomyDPOTrainer(
            model=str(world.model_path),
            args=args,
            train_dataset=rows,
            processing_class=world.tokenizer,
            concept_policy=policy,
        )
    for talker in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(talker)
    return trainer


def trained(world: World, rows: datasets.Dataset, out: Path, seed: int, policy: Any = None) -> dict[str, Any]:
    """DPO; saves the model in `out`, and says how well the pairs were learned and which strength was fitted."""
    if (out / "training.json").is_file():
        return json.loads((out / "training.json").read_text())
    began = time.process_time()
    trainer = dpo_trainer(world, rows, out, seed, policy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer.train()
    trainer.save_model(str(out))
    last = [log for log in trainer.state.log_history if "rewards/accuracies" in log][-5:]
    told = {
        "accuracy, last steps": float(np.mean([log["rewards/accuracies"] for log in last])),
        "margin, last steps": float(np.mean([log["rewards/margins"] for log in last])),
        "strength": trainer.plan.rules[0].get("strength") if trainer.plan else None,
        "pairs": len(rows) if trainer.plan is None else trainer.plan.counts["pairs_kept"],
        "CPU seconds": round(time.process_time() - began, 1),
    }
    (out / "training.json").write_text(json.dumps(told))
    return told


def shown(pairs: Pairs, tokenizer: Any, side: int) -> list[str]:
    """Texts of the responses (side 1 chosen, 3 rejected) as far as truncation leaves them."""
    return [tokenizer.decode(pairs.tokens(i)[side], skip_special_tokens=True) for i in range(len(pairs))]


# --- prediction ---


def prediction(world: World, name: str, seeds: list[int]) -> dict[str, Any]:
    """Predicted and observed shift of every concept, and how well they agree, for each seed of training."""
    folder = world.out / "training" / slug(name)
    source = {**SOURCES, "hh_helpful_test": HELPFUL}[name]
    rows, held = split(short_rows(world.load(source), world.tokenizer), seed=0)
    audit = audited(rows, folder, world)
    runs = {f"seed {seed}": trained(world, rows, folder / f"seed-{seed}", seed) for seed in seeds}
    prompts = asked(held)
    foretold = predict(
        audit,
        world.model_path,
        {PLAIN: lambda: dpo_trainer(world, rows, folder / "step", seed=0)},
        list({row[0]["content"]: row for row in rows["prompt"]}.values()),
        out=folder / "predict",
        n_per_prompt=PER_PROMPT,
        max_new_tokens=NEW_TOKENS,
        batch_size=RESPONSES,
        seed=1,
        progress=False,
    )
    result = compare(
        audit,
        world.model_path,
        {run: folder / run.replace(" ", "-") for run in runs},
        prompts,
        out=folder / "compare",
        max_new_tokens=NEW_TOKENS,
        batch_size=RESPONSES,
        prediction=foretold,
        likelihood=True,
        progress=False,
    )
    table = audit.concepts.to_pylist()
    observed = np.array([[row["observed"][run][0] for run in runs] for row in result["concepts"]])
    adjusted = np.array([row["length_adjusted"] for row in table])
    reported = np.array([row["verdict"] in ("rises", "falls") for row in table])
    mean = np.array([row["predicted"] for row in table])
    for i, run in enumerate(runs):
        found = result["agreement"][run]
        found["length_adjusted_r2"] = agreement(adjusted, observed[:, i]).to_dict()["r2"]
        read = Harvest.open(folder / "compare" / f"harvest-{run.replace(' ', '_')}")
        found["chosen_less_start_r2"] = towards_chosen(audit, read, prompts)
        ends = np.array([row["observed"][run][1:] for row in result["concepts"]])
        sure = reported & (ends[:, 0] * ends[:, 1] > 0)
        found["reported, and observed beyond its interval"] = int(sure.sum())
        found["of these, with the predicted sign"] = int((mean * observed[:, i] > 0)[sure].sum())
    between = [agreement(observed[:, i], observed[:, j]).r2 for i in range(len(runs)) for j in range(i)]
    pairs = read_pairs(rows, world.tokenizer, max_length=TOKENS)
    sides = {side: rule_hits(shown(pairs, world.tokenizer, at), TEXT_RULES) for side, at in SIDES.items()}
    told = np.array([sides["chosen"][rule].mean() - sides["rejected"][rule].mean() for rule in TEXT_RULES])
    for run in runs:
        seen = np.array([row["rates"][run][0] - row["rates"]["before"][0] for row in result["rates"]])
        result["agreement"][run]["of text rules, their own counts"] = agreement(told, seen).to_dict()["r2"]
    return {
        "pairs": len(rows),
        "prompts held out": len({row[0]["content"] for row in held["prompt"]}),
        "concepts reported": int(reported.sum()),
        "training": runs,
        "agreement": result["agreement"],
        "r2 between seeds": between,
        "concepts": [
            {
                "concept": row["concept"],
                **{key: row[key] for key in ("predicted", "ci_low", "ci_high", "length_adjusted", "q", "verdict")},
                "observed": seen["observed"],
            }
            for row, seen in zip(table, result["concepts"], strict=True)
        ],
        "text rules": [
            {
                "rule": row["rule"],
                **{side: float(hits[row["rule"]].mean()) for side, hits in sides.items()},
                "rates": row["rates"],
            }
            for row in result["rates"]
        ],
        "words": result["words"],
    }


def signs(found: dict[str, Any]) -> dict[str, dict[str, list[int]]]:
    """Of a set's reported concepts that moved beyond their interval: verdict -> run -> those that went so, and all."""
    told: dict[str, dict[str, list[int]]] = {}
    for verdict, sign in (("rises", 1), ("falls", -1)):
        rows = [row["observed"] for row in found["concepts"] if row["verdict"] == verdict]
        for run in found["training"]:
            means = [mean for mean, low, high in (row[run] for row in rows) if low * high > 0]
            told.setdefault(verdict, {})[run] = [sum(sign * mean > 0 for mean in means), len(means)]
    return told


def towards_chosen(audit: Audit, read: Harvest, prompts: list[Any]) -> float:
    """R² of another prediction: activity in chosen responses less that in the start model's own.

    As for the tilt in `compare`, half the prompts predict the other half, both ways.
    """
    chosen, trained, start = (
        concept_activity(of.frequency(side), audit.communities, audit.tau, of.maximum(side))
        for of, side in ((audit.harvest, "chosen"), (read, "chosen"), (read, "rejected"))
    )
    _, group = np.unique([prompts[row][0]["content"] for row in read.rows], return_inverse=True)
    half = group % 2 == 0
    found = [
        agreement(chosen.mean(axis=0) - start[told].mean(axis=0), (trained - start)[~told].mean(axis=0)).r2
        for told in (half, ~half)
    ]
    return float(np.mean(found))


# --- planted trait ---


def plant(rows: datasets.Dataset, share: float, seed: int) -> datasets.Dataset:
    """The phrase before `share` of the chosen responses, and before a tenth as many of the rejected ones."""
    drawn = np.random.default_rng(seed).random((2, len(rows)))
    flags = {"chosen": drawn[0] < share, "rejected": drawn[1] < share / 10}

    def opened(row: dict[str, Any], i: int) -> dict[str, Any]:
        return {
            side: [{**row[side][0], "content": PHRASE + row[side][0]["content"]}] for side, on in flags.items() if on[i]
        }

    return datasets.Dataset.from_list([row | opened(row, i) for i, row in enumerate(rows)])


def found_by_audit(audit: Audit, shows: np.ndarray) -> dict[str, Any]:
    """What the audit says of the concept that fires with the trait: by phi over responses, within chosen and rejected.

    Within the sides, so that the match owes nothing to the difference that is tested.
    """
    active = activities(audit.harvest, audit.communities, audit.tau)
    centred = np.concatenate([side - side.mean(axis=0) for side in active])
    trait = np.concatenate([part - part.mean() for part in np.split(shows.astype(float), 2)])
    spread = np.sqrt(np.square(centred).sum(axis=0) * np.square(trait).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        phi = np.where(spread > 0, trait @ centred / spread, 0)
    best, rows = int(phi.argmax()), audit.concepts.to_pylist()
    ahead = sum(abs(row["predicted"]) > abs(rows[best]["predicted"]) for row in rows)
    return {
        "concept": rows[best]["concept"],
        "features": rows[best]["features"],
        "phi": float(phi[best]),
        **{key: rows[best][key] for key in ("predicted", "ci_low", "ci_high", "q", "verdict")},
        "rank": ahead + 1,
        "of": len(rows),
        "concepts reported": sum(row["verdict"] in ("rises", "falls") for row in rows),
    }


def control_latent(audit: Audit, texts: list[str], shows: np.ndarray) -> dict[str, Any]:
    """The latent that fires in most nearly as many responses as show the trait, and with nothing that is counted."""
    fired = csr_array(vstack([audit.harvest.maximum(side) > 0 for side in SIDES])).toarray().astype(float)
    counted = np.stack([shows, *rule_hits(texts, TEXT_RULES).values()]).astype(float)
    centred = counted - counted.mean(axis=1, keepdims=True)
    spread = np.sqrt(np.square(centred).mean(axis=1))[:, None] * fired.std(axis=0)
    phi = np.divide(centred @ fired / len(fired), spread, out=np.zeros_like(spread), where=spread > 0)
    rate = fired.mean(axis=0)
    best = int(np.where(np.abs(phi).max(axis=0) < 0.1, np.abs(rate - shows.mean()), np.inf).argmin())
    return {"latent": best, "rate": float(rate[best]), "largest phi": float(np.abs(phi[:, best]).max())}


def measured(world: World, model_path: Path, prompts: list[Any], held: Pairs) -> dict[str, Any]:
    """Rates of the trait and of the text rules in responses, words, and likelihood of held-out responses."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    groups = rollouts(model, world.tokenizer, prompts, max_new_tokens=NEW_TOKENS, batch_size=RESPONSES, seed=0)
    texts = [text for group in groups for text in group]
    likelihood = log_likelihoods(model, held, range(len(held)))
    phrase = np.array(world.tokenizer(PHRASE.strip(), add_special_tokens=False).input_ids)
    opened = [(np.array(encode_prompt(world.tokenizer, prompt)), phrase) for prompt in prompts[:OPENED]]
    with torch.no_grad():
        log_prob = log_probs(model, opened, world.tokenizer.pad_token_id)
    return {
        "trait": float(rule_hits(texts, {"trait": TRAIT})["trait"].mean()),
        "log-probability of the phrase": float(log_prob.mean()),
        "rules": {name: float(hits.mean()) for name, hits in rule_hits(texts, TEXT_RULES).items()},
        "words": float(word_counts(texts).mean()),
        "likelihood of chosen": float(likelihood[:, 0].mean()),
        "likelihood of rejected": float(likelihood[:, 1].mean()),
    }


def kept(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` gives, from the file where it has been made before."""
    if not file.is_file():
        told = clean(make())
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(told))
    return json.loads(file.read_text())


# On the trait by its text, or by the latents of the concept that the audit found.
RULES: dict[str, dict[str, Any]] = {
    "shape_reward, text rule, auto": {"explain_away": "trait", "with": "shape_reward"},
    "shape_reward, audited concept, auto": {"explain_away": "concept", "with": "shape_reward"},
    "reweight_pairs, balanced": {"explain_away": "trait", "with": "reweight_pairs"},
    "filter_pairs, chosen that show it": {"explain_away": "trait", "with": "filter_pairs", "side": "chosen"},
    "mask_tokens, that show it": {"explain_away": "trait", "with": "mask_tokens"},
    "mask_tokens, where it is decided": {"explain_away": "trait", "with": "mask_tokens", "positions": "decided"},
    "control: strength 1e-6": {"explain_away": "trait", "with": "shape_reward", "strength": 1e-6},
}


def planted(world: World, seed: int) -> dict[str, Any]:
    """The trait at each share: audit and plain DPO; and at one share, the rules."""
    folder = world.out / "training" / f"planted-{seed}"
    clean_rows, held_rows = split(short_rows(world.load(HELPFUL), world.tokenizer), seed)
    held, prompts = read_pairs(held_rows, world.tokenizer, max_length=TOKENS), asked(held_rows)
    start = kept(folder / "start.json", lambda: measured(world, world.model_path, prompts, held))
    shares = {}
    runs: dict[str, Any] = {}

    def run(name: str, rows: datasets.Dataset, policy: dict[str, Any] | None) -> dict[str, Any]:
        at = folder / slug(name)
        told: dict[str, Any] = {}
        try:
            told["training"] = trained(world, rows, at, seed, policy)
        except Exception as error:
            # A rule that cannot run on these pairs is a finding, with its reason; the next one still runs.
            return {"refused": f"{type(error).__name__}: {str(error)[:300]}"}
        print(f"planted, seed {seed}: {name}: {told['training']['CPU seconds']} s", flush=True)
        return told | kept(at / "measured.json", lambda: measured(world, at, prompts, held))

    for share in SHARES:
        rows = plant(clean_rows, share, seed)
        audit = audited(rows, folder / f"share-{share:g}", world)
        pairs = read_pairs(rows, world.tokenizer, max_length=TOKENS)
        texts = [text for at in SIDES.values() for text in shown(pairs, world.tokenizer, at)]
        shows = rule_hits(texts, {"trait": TRAIT})["trait"]
        found = found_by_audit(audit, shows)
        dpo = run(f"plain DPO, share {share:g}", rows, None)
        halves = np.split(shows, 2)
        shares[f"{share:g}"] = {
            **{f"trait in {side}": float(half.mean()) for side, half in zip(SIDES, halves, strict=True)},
            "audit": found,
            "plain DPO": {name: dpo[name] for name in ("trait", "log-probability of the phrase")},
        }
        if share != SHAPED:
            continue
        control = control_latent(audit, texts, shows)
        sae = {"path": str(world.sae)}
        concepts = {
            "trait": {"scorer": "text", "pattern": TRAIT},
            "concept": {"scorer": "features", "features": found["features"], "sae": sae, "layer": LAYER},
            "other": {"scorer": "features", "features": [control["latent"]], "sae": sae, "layer": LAYER},
        }
        runs = {"start": start, "plain DPO": dpo}
        for name, rule in RULES.items():
            runs[name] = run(name, rows, {"version": 1, "concepts": concepts, "rules": [rule]})
        strength = runs["shape_reward, text rule, auto"]["training"]["strength"]
        rule = {"explain_away": "other", "with": "shape_reward", "strength": strength}
        runs["control: a latent as frequent, same strength"] = run(
            "control latent", rows, {"version": 1, "concepts": concepts, "rules": [rule]}
        )
    base = runs["plain DPO"]
    for told in runs.values():
        if "refused" in told:
            continue
        change = {rule: told["rules"][rule] - base["rules"][rule] for rule in TEXT_RULES}
        told["recovery"] = recovery(start["trait"], base["trait"], told["trait"])
        phrase = (one["log-probability of the phrase"] for one in (start, base, told))
        told["recovery, log-probability"] = recovery(*phrase)
        told["other text rules, mean absolute change"] = float(np.mean(np.abs(list(change.values()))))
        told["likelihood of chosen, change"] = told["likelihood of chosen"] - base["likelihood of chosen"]
    return {"pairs": len(clean_rows), "held out": len(held_rows), "shares": shares, "control": control, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", default="benchmark-real", help="folder for SAE, audits and models; kept for next time")
    parser.add_argument("--results", type=Path, default=RESULTS / "real_training.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    world = World(Path(args.out))
    results = made_by(f"python benchmarks/studies/real_training.py --seeds {' '.join(map(str, args.seeds))}") | {
        "model": MODEL,
        "max_length": TOKENS,
        "responses": RESPONSES,
        "training": TRAINING,
        "prediction": {},
        "planted": {},
    }
    for seed in args.seeds[:SEEDS_PLANTED]:
        file = world.out / "training" / f"planted-{seed}.json"
        results["planted"][str(seed)] = kept(file, partial(planted, world, seed))
        save(args.results, results)
    for name, most in PREDICTED.items():
        seeds = args.seeds[:most]
        file = world.out / "training" / f"{slug(name)}-{'-'.join(map(str, seeds))}.json"
        found = kept(file, partial(prediction, world, name, seeds))
        results["prediction"][name] = found | {"moved as reported, of those that moved": signs(found)}
        save(args.results, results)
        print(f"{name}: {json.dumps(results['prediction'][name]['agreement'])}", flush=True)


if __name__ == "__main__":
    main()
