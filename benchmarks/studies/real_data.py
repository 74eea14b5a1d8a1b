"""Does the audit see, on real preference data, what plain counting sees?

For each dataset and habit (bold, bullets, links, refusals, length, ...): the share of chosen and of rejected responses
in which a regular expression finds it, beside the predicted shift of the audited concept that stands for it. Which
concept stands for a habit is decided on the responses of the OTHER datasets, by the correlation of the concept's firing
with the habit within dataset and side. So neither match nor sign can come from the difference that is predicted.

The data stay outside the repository (TRL_ANATOMY_SHARED, or ../shared); results hold numbers and names of habits only.

    python benchmarks/studies/real_data.py
"""

import argparse
import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy import stats as distributions
from scipy.sparse import csr_array, vstack

from trl_anatomy.audit import stats
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import Audit
from trl_anatomy.audit.run import run_audit
from trl_anatomy.audit.views import cluster_sums, concept_activity
from trl_anatomy.checking.rates import TEXT_RULES, rule_hits
from trl_anatomy.reading.forward import length_sorted_batches, read_spans
from trl_anatomy.reading.spans import Pairs, read_pairs

PACKAGES = ("trl", "transformers", "torch", "sae-lens", "numpy", "scipy", "scikit-learn", "scikit-network")
MODEL, LAYER, MAX_LENGTH = "tinychat1m", 2, 512
# The published shape at this width, 128: expansion 16, and one latent in 32 dimensions at a token.
SAE_TOKENS, D_SAE, K = 1_500_000, 2048, 4
HIDDEN_TOKENS = 400_000  # of all datasets together, that the SAE is trained on

# The default, and what a tiny model and its small SAE need: whether a latent fires says less than how strongly
# (pooling), a habit of two tokens in 500 is below the default share of tokens (tau), and many latents fire with no
# other (min_community). Chosen after the default had been seen on these data.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "small SAE": {"pooling": "max", "tau": 0.001, "min_community": 1},
}

# A concept stands for a habit from this correlation on; fixed before any result was seen.
LEAST_ASSOCIATION = 0.3
# A habit that differs within fewer pairs is too rare to say anything; the audit's own limit for a concept.
LEAST_PAIRS = 25


@dataclass(frozen=True)
class Source:
    """A file of pairs, and which of its rows."""

    file: str
    keep: Callable[[dict[str, Any]], bool] = lambda row: True


def _styles(chosen: str, rejected: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: (row["labels"]["style_chosen"], row["labels"]["style_rejected"]) == (chosen, rejected)


SOURCES = {
    "rm_bench, hard rows": Source("licence_unstated/rm_bench", _styles("concise", "detailed_markdown")),
    "rm_bench, easy rows": Source("licence_unstated/rm_bench", _styles("detailed_markdown", "concise")),
    "rm_bench, matched rows": Source("licence_unstated/rm_bench", _styles("concise", "concise")),
    "overrefusal_steered": Source("permissive/overrefusal_steered"),
    "xstest_pairs": Source("permissive/xstest_pairs"),
    "mini_mixed": Source("mini_mixed"),
    "dsp_domain": Source("noncommercial/dsp_domain"),
    "judgebench_gpt4o (control)": Source("licence_unstated/judgebench_gpt4o"),
}

# As the text rules of `compare`, but a refusal is looked for anywhere in the first lines: real ones have preambles.
HABITS = {**TEXT_RULES, "refusal": r"(?i)^[^\n]{0,80}\b(sorry|i cannot|i can't|i am unable|i'm unable|i'm not able)\b"}
LONG = "longer than the median"


def shared_folder() -> Path:
    """Where the data and the model are, which are no part of the repository."""
    shared = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).resolve().parents[3] / "shared"))
    if not (shared / "data").is_dir():
        raise SystemExit(
            f"{shared}: no real data there; set TRL_ANATOMY_SHARED to the folder that holds data/ and models/"
        )
    return shared


def load(shared: Path, source: Source, cache: Path) -> datasets.Dataset:
    """The rows of a source as conversations of one turn, as the model was trained on."""
    file = shared / "data" / "pairs" / f"{source.file}.jsonl.gz"
    rows = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache)).filter(source.keep)

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return datasets.Dataset.from_list(
        [
            {
                "prompt": turn("user", row["prompt"]),
                "chosen": turn("assistant", row["chosen"]),
                "rejected": turn("assistant", row["rejected"]),
            }
            for row in rows
        ]
    )


def train_sae(model: Any, read: dict[str, Pairs], out: Path) -> float:
    """An SAE on the tokens of all datasets, sides alike; returns the share of variance that it leaves."""
    from trl_anatomy.testbed.sae import save_sae, train_sae, unexplained_variance

    generator, kept = torch.Generator().manual_seed(0), []
    total = sum(int(pairs.packed_lengths.sum()) for pairs in read.values())
    for pairs in read.values():
        for batch in length_sorted_batches(pairs, range(len(pairs)), 8192):
            hidden = read_spans(model, pairs, batch, [LAYER]).hidden[LAYER]
            kept.append(hidden[torch.rand(len(hidden), generator=generator) < HIDDEN_TOKENS / total])
    hidden = torch.cat(kept)
    sae = train_sae(hidden, d_sae=D_SAE, k=K, layer=LAYER, model_name=MODEL, seed=0, tokens=SAE_TOKENS)
    save_sae(sae, out)
    left = unexplained_variance(sae, hidden[torch.randperm(len(hidden), generator=generator)[:20_000]])
    (out / "left.json").write_text(json.dumps(left))
    return left


@dataclass(frozen=True)
class Responses:
    """What was read of a dataset: habits by regex, and what fired; chosen rows first, then rejected ones.

    Attributes:
        shows: habit -> (2n,) bool; pooled: "freq" (share of tokens that fire) and "max" -> (2n, d_sae);
        prompts: (n,) groups of pairs.
    """

    shows: dict[str, np.ndarray]
    pooled: dict[str, csr_array]
    prompts: np.ndarray

    def halves(self, habit: str) -> tuple[np.ndarray, np.ndarray]:
        n = len(self.prompts)
        return self.shows[habit][:n].astype(float), self.shows[habit][n:].astype(float)

    def centred(self, values: np.ndarray) -> np.ndarray:
        """(2n, ...) values less the mean of their side."""
        n = len(self.prompts)
        return np.concatenate([part - part.mean(axis=0) for part in (values[:n], values[n:])])


def responses(audit: Audit, pairs: Pairs, tokenizer: Any) -> Responses:
    """Habits counted in the text that the model read, which is the truncated one."""
    texts = [
        tokenizer.decode(pairs.tokens(i)[side], skip_special_tokens=True) for side in (1, 3) for i in range(len(pairs))
    ]
    shows = rule_hits(texts, HABITS)
    size = np.array([len(text) for text in texts])
    shows[LONG] = size > np.median(size)
    sides = ("chosen", "rejected")
    pooled = {
        "freq": csr_array(vstack([audit.harvest.frequency(side) for side in sides])),
        "max": csr_array(vstack([audit.harvest.maximum(side) for side in sides])),
    }
    return Responses(shows, pooled, pairs.prompt_groups)


def associations(audit: Audit, mine: Responses, others: list[Responses]) -> dict[str, np.ndarray]:
    """Habit -> correlation within dataset and side with the activity of each concept T, then each response cluster R.

    The activity of single responses, in the units of the audit: share of features that fire, and mean of the pooled
    values over the spread of their differences. NaN where a concept or habit never varies.
    """
    settings, n = audit.info["settings"], len(mine.prompts)
    clusters = [np.asarray(ids, dtype=np.int64) for ids in audit.responses["features"].to_pylist()]
    pooled = mine.pooled[settings["pooling"]]
    spread = np.maximum((pooled[:n] - pooled[n:]).toarray().std(axis=0), 1e-6)
    size = np.maximum(1, [len(cluster) for cluster in clusters])

    def of_clusters(read: csr_array) -> np.ndarray:
        (total,) = cluster_sums(read, clusters, read.data / spread[read.indices])
        return total / size

    activity = np.concatenate(
        [
            np.column_stack(
                [
                    read.centred(
                        concept_activity(read.pooled["freq"], audit.communities, audit.tau, read.pooled["max"])
                    ),
                    read.centred(of_clusters(read.pooled[settings["pooling"]])),
                ]
            ).astype(np.float64)
            for read in others
        ]
    )
    spread = np.sqrt(np.square(activity).sum(axis=0))
    found = {}
    for habit in (*HABITS, LONG):
        shown = np.concatenate([read.centred(read.shows[habit].astype(float)) for read in others])
        with np.errstate(invalid="ignore", divide="ignore"):
            found[habit] = (shown @ activity) / (np.sqrt(np.square(shown).sum()) * spread)
    return found


def verdict(row: dict[str, Any]) -> str:
    """What became of a habit; the rules are fixed, the words say which one applied."""
    if row["pairs that differ"] < LEAST_PAIRS:
        return "too rare to tell"
    if not (row["association"] >= LEAST_ASSOCIATION):
        return "no concept stands for it"
    if row["counts differ"]:
        if not row["reported"]:
            return "missed"
        return "shows up" if row["predicted"] * row["difference"] > 0 else "opposite sign"
    return "reported, though its counts do not differ" if row["reported"] else "quiet, as its counts are"


def compare(audit: Audit, mine: Responses, others: list[Responses]) -> list[dict[str, Any]]:
    """A row per habit."""
    kinds = [audit.concepts.to_pylist(), audit.responses.to_pylist()]
    concepts = [concept for kind in kinds for concept in kind]
    found = associations(audit, mine, others)
    # Their units differ, so each kind is ranked by itself.
    place = np.concatenate([np.argsort(np.argsort([-abs(c["predicted"]) for c in kind])) + 1 for kind in kinds])
    rows = []
    for habit in (*HABITS, LONG):
        chosen, rejected = mine.halves(habit)
        difference, error, _ = stats.mean_test((chosen - rejected)[:, None], mine.prompts)
        reach = 1.96 * float(error[0])
        row: dict[str, Any] = {
            "habit": habit,
            "chosen": float(chosen.mean()),
            "rejected": float(rejected.mean()),
            "difference": float(difference[0]),
            "interval": [float(difference[0]) - reach, float(difference[0]) + reach],
            "pairs that differ": int((chosen != rejected).sum()),
            "counts differ": bool(abs(difference[0]) > reach),
        }
        known = np.where(np.isfinite(found[habit]), found[habit], -np.inf)
        best = int(known.argmax())
        concept = concepts[best]
        # What else the same concept reads: the usual reason where its shift is not the habit's.
        beside = {name: float(r[best]) for name, r in found.items() if name != habit and np.isfinite(r[best])}
        other = max(beside, key=lambda name: beside[name])
        row |= {
            "concept": concept["concept"],
            "association": float(known[best]) if np.isfinite(known[best]) else float("nan"),
            "predicted": concept["predicted"],
            "predicted, interval": [concept["ci_low"], concept["ci_high"]],
            "q": concept["q"],
            "rank": int(place[best]),
            "of": len(kinds[best >= len(kinds[0])]),
            "reported": concept["verdict"] in ("rises", "falls"),
            "concept also reads": other,
            "association of that": beside[other],
        }
        # Where most concepts are reported, a match of signs means little: what any concept of the kind would give.
        kind = kinds[best >= len(kinds[0])]
        alike = [c["verdict"] in ("rises", "falls") and c["predicted"] * row["difference"] > 0 for c in kind]
        row["any concept would show it"] = float(np.mean(alike))
        side = np.sign(row["difference"])
        row["percentile"] = float(np.mean([side * c["predicted"] < side * concept["predicted"] for c in kind]))
        rows.append(row | {"verdict": verdict(row)})
    return rows


def ranks(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlation of counted with predicted differences over habits that some concept stands for.

    Both over their standard errors: shifts of T and R have different units.
    """
    used = [row for row in rows if row["verdict"] not in ("too rare to tell", "no concept stands for it")]
    if len(used) < 4:
        return {"habits compared": len(used), "rank correlation": None, "p": None}
    counted, predicted = (
        [row[name] / max(1e-12, row[interval][1] - row[interval][0]) for row in used]
        for name, interval in (("difference", "interval"), ("predicted", "predicted, interval"))
    )
    found = distributions.spearmanr(counted, predicted)
    return {"habits compared": len(used), "rank correlation": float(found.statistic), "p": float(found.pvalue)}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Verdicts counted, and the rank correlation over the habits of all datasets together."""
    rows = [row for dataset in found.values() for row in dataset["habits"]]
    told = [row["verdict"] for row in rows]
    asked = [row for row in rows if row["verdict"] in ("shows up", "missed", "opposite sign")]
    return {
        "verdicts": {name: told.count(name) for name in sorted(set(told))},
        "counts differ and a concept stands for it": len(asked),
        "of these, show up": told.count("shows up"),
        "of these, would show up by any concept (expected)": sum(row["any concept would show it"] for row in asked),
        "mean percentile of these shifts among all concepts, counted towards the habit's side (chance 0.5)": float(
            np.mean([row["percentile"] for row in asked])
        ),
        **ranks(rows),
    }


def clean(value: Any) -> Any:
    """NaN as None, numbers with no more digits than mean anything."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [clean(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if np.isfinite(value) else None
    return value


def _shift(row: dict[str, Any]) -> str:
    """A predicted shift as its unit reads: points of T, standard deviations of R."""
    return f"{100 * row['predicted']:+.1f}" if row["concept"].startswith("T") else f"{row['predicted']:+.2f} sd"


def table(found: dict[str, Any]) -> str:
    """The habits that some concept stands for, as Markdown."""
    lines = ["| dataset | habit | chosen / rejected | difference | r | concept | predicted | q | rank | verdict |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for name, dataset in found.items():
        for row in sorted(dataset["habits"], key=lambda row: -abs(row["difference"])):
            if row["verdict"] == "too rare to tell":
                continue
            lines.append(
                f"| {name} | {row['habit'].replace('_', ' ')} | {100 * row['chosen']:.0f} % / "
                f"{100 * row['rejected']:.0f} % | {100 * row['difference']:+.1f} | {row['association']:.2f} | "
                f"{row['concept']} | {_shift(row)} | {row['q']:.0e} | {row['rank']} of {row['of']} | "
                f"{row['verdict']} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="benchmark-real", help="folder for SAE and audits; finished parts are kept")
    parser.add_argument("--results", default="benchmarks/results/real_data.json")
    args = parser.parse_args()
    shared = shared_folder()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    out, start = Path(args.out), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / MODEL)
    model = AutoModelForCausalLM.from_pretrained(shared / "models" / MODEL).eval()
    raw = {name: load(shared, source, out / "cache") for name, source in SOURCES.items()}
    read = {name: read_pairs(rows, tokenizer, max_length=MAX_LENGTH) for name, rows in raw.items()}
    if not (out / "sae" / "left.json").is_file():
        left = train_sae(model, read, out / "sae")
        print(f"SAE: {100 * left:.1f} % of the variance unexplained, {time.perf_counter() - start:.0f} s", flush=True)
    found: dict[str, Any] = {variant: {} for variant in VARIANTS}
    for variant, settings in VARIANTS.items():
        audits = {}
        for name, rows in raw.items():
            config = AuditConfig(
                model=str(shared / "models" / MODEL),
                sae=str(out / "sae"),
                layer=LAYER,
                max_length=MAX_LENGTH,
                out=str(out / re.sub(r"\W+", "-", name)),
                **settings,
            )
            audits[name] = run_audit(config, model=model, tokenizer=tokenizer, dataset=rows, progress=False)
            print(f"{variant}: {name}: {audits[name]}, {time.perf_counter() - start:.0f} s", flush=True)
        if variant == next(iter(VARIANTS)):  # texts and firing are the same for every variant
            counted = {name: responses(audit, read[name], tokenizer) for name, audit in audits.items()}
        for name, audit in audits.items():
            # Rows of one file share prompts and answers: none of them may decide what stands for a habit in another.
            others = [counted[other] for other, source in SOURCES.items() if source.file != SOURCES[name].file]
            rows = compare(audit, counted[name], others)
            found[variant][name] = {
                "pairs": len(read[name]),
                "prompts": len(np.unique(read[name].prompt_groups)),
                "concepts T": audit.concepts.num_rows,
                "response clusters R": audit.responses.num_rows,
                "concepts reported": sum(row["verdict"] in ("rises", "falls") for row in audit.concepts.to_pylist()),
                "notes": audit.info["notes"],
                **ranks(rows),
                "habits": rows,
            }
    results = {
        "command": "python benchmarks/studies/real_data.py",
        "date": datetime.date.today().isoformat(),
        "device": f"CPU ({platform.machine()}), one thread",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "model": MODEL,
        "sae": {
            "layer": LAYER,
            "d_sae": D_SAE,
            "k": K,
            "tokens": SAE_TOKENS,
            "unexplained variance": json.loads((out / "sae" / "left.json").read_text()),
        },
        "max_length": MAX_LENGTH,
        "least association": LEAST_ASSOCIATION,
        "summary": {variant: summary(found[variant]) for variant in VARIANTS},
        "datasets": found,
    }
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    Path(args.results).write_text(json.dumps(clean(results), indent=1) + "\n")
    for variant in VARIANTS:
        print(f"\n{variant}: {json.dumps(clean(summary(found[variant])))}\n{table(found[variant])}")


if __name__ == "__main__":
    main()
