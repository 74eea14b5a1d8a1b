"""Does the list of findings say what real preference data say, and does it say the same twice?

Ten sets of pairs (apart: `TRL_ANATOMY_SHARED`), first by habits alone in all of the text, then, with `--audits`, with
an SAE's concepts in audits of 450 pairs each. Of every set:

- plain counting: each habit whose share of responses differs with |z| > 4 (McNemar) is a line, or folded under one, on
  the side that plain counting says;
- the largest |correlation| of two lines, and the least score of a label;
- halves: the lines of two halves of the prompts, ten times; a line is found again if the other half lists it, or folds
  it under a line. Concepts and their labels are those of the whole audit, which do not know the sides;
- swapped: how often anything is listed once sides are swapped at random, prompt by prompt.

Results hold numbers and names of habits, no text.

    python benchmarks/studies/reading.py --audits FOLDER --model M --sae S

`--audits` names a folder with an audit for each set; one that is missing is made, and an interrupted run resumes.
"""

import argparse
import datetime
import json
import os
import platform
import re
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from habits import PLAIN, SETS, load, mcnemar
from scipy.stats import binomtest

from trl_anatomy.audit import stats
from trl_anatomy.audit.counted import Counted
from trl_anatomy.audit.finding_list import CONCEPT, HABIT, Shown, correlations, list_findings
from trl_anatomy.audit.habit_table import habit_values, habits_to_count, prompt_groups

SPLITS, SWAPS, PAIRS = 10, 40, 450
Names = dict[str, set[str]]


def lines_of(table: Any) -> Names:
    """Each line with itself and what is folded under it, by kind and name."""
    return {
        f"{row['kind']} {row['name']}": {
            f"{row['kind']} {row['name']}",
            *(f"{other['kind']} {other['name']}" for other in row["folded"]),
        }
        for row in table.to_pylist()
    }


def agreement(one: Names, other: Names) -> float:
    """Share of the lines of two lists that both lists hold, as a line or folded under one; 1 where both are empty."""
    held = [set().union(*found.values()) for found in (one, other)]
    lines = {*one, *other}
    return sum(name in held[0] and name in held[1] for name in lines) / len(lines) if lines else 1.0


def part(counted: Counted, concepts: Shown | None, rows: np.ndarray, swap: np.ndarray | None = None) -> Names:
    """The list of some rows, with sides swapped where `swap` is true."""
    values, groups = counted.values[:, rows], counted.groups[rows]
    shown = None if concepts is None else [side[rows] for side in concepts.shown]
    if swap is not None:
        values = np.where(swap[None, :, None], values[::-1], values)
        if shown is not None:
            shown = [np.where(swap[:, None], shown[1 - i], shown[i]) for i in (0, 1)]
    here = None
    if concepts is not None and shown is not None:
        here = Shown(
            concepts.names,
            concepts.labels,
            concepts.label_scores,
            concepts.habits,
            (shown[0], shown[1]),
            [[] for _ in concepts.names],
        )
    table, _ = list_findings(Counted(values, counted.habits, groups), np.arange(len(groups)), here)
    return lines_of(table)


def study(counted: Counted, concepts: Shown | None, texts: list[tuple[str, str, str]]) -> dict[str, Any]:
    clock = time.process_time()
    table, info = list_findings(counted, np.arange(len(texts)), concepts)
    seconds = time.process_time() - clock
    rows = table.to_pylist()
    sides = {
        f"{each['kind']} {each['name']}": np.sign(each["chosen"] - each["rejected"])
        for row in rows
        for each in (row, *row["folded"])
    }
    plain = {}
    for name, habit in counted.habits.items():
        if habit.kind == "rate":
            at = list(counted.habits).index(name)
            plain[name] = mcnemar(counted.values[0, :, at] > 0, counted.values[1, :, at] > 0)
    for name, pattern in PLAIN.items():
        chosen, rejected = (np.array([re.search(pattern, text[side]) is not None for text in texts]) for side in (1, 2))
        plain[f"plain {name}"] = mcnemar(chosen, rejected)
    sure = {name: z for name, z in plain.items() if abs(z) > 4}
    missed = [name for name in sure if f"{HABIT} {name.removeprefix('plain ')}" not in sides]
    wrong = [
        name
        for name, z in sure.items()
        if name not in missed and sides[f"{HABIT} {name.removeprefix('plain ')}"] != np.sign(z)
    ]
    groups = np.unique(counted.groups)
    everything = np.arange(len(texts))
    halves = [
        agreement(part(counted, concepts, np.flatnonzero(half)), part(counted, concepts, np.flatnonzero(~half)))
        for half in stats.half_masks(counted.groups, SPLITS, 0)
    ]
    of, swapped = np.searchsorted(groups, counted.groups), 0
    for run in range(SWAPS):
        swap = (np.random.default_rng(run).random(len(groups)) < 0.5)[of]
        swapped += bool(part(counted, concepts, everything, swap))
    interval = binomtest(swapped, SWAPS).proportion_ci(0.95, method="wilson")
    names, gaps = list(counted.habits), counted.gaps()
    columns = [
        gaps[:, names.index(row["name"])]
        if row["kind"] == HABIT
        else concepts.gaps(np.array([list(concepts.names).index(row["name"])]))[:, 0].astype(float)
        for row in rows
        if row["kind"] == HABIT or concepts is not None
    ]
    related = [abs(correlations(a, b[:, None])[0]) for i, a in enumerate(columns) for b in columns[:i]]
    scores = [row["label_score"] for row in rows if row["kind"] == CONCEPT]
    numbers = ("chosen", "rejected", "z", "adds", "adds_low", "adds_high", "stability", "label_score")
    return {
        "pairs": len(texts),
        "prompts": len(groups),
        "tested": info["tested"],
        "significant": info["significant"],
        "cpu_seconds": round(seconds, 2),
        "lines": [
            {
                "name": row["name"],
                "kind": row["kind"],
                "favours": row["favours"],
                **{key: _rounded(row[key]) for key in numbers},
                "folded": {each["name"]: _rounded(each["correlation"]) for each in row["folded"]},
            }
            for row in rows
        ],
        "plain": {name: _rounded(z) for name, z in sure.items()},
        "missed": missed,
        "wrong_sign": wrong,
        "largest_correlation": _rounded(max(related, default=0.0)),
        "least_label_score": _rounded(min(scores)) if scores else None,
        "halves": {"splits": SPLITS, "jaccard": _rounded(float(np.mean(halves))), "least": _rounded(min(halves))},
        "swapped": {
            "runs": SWAPS,
            "listed": swapped,
            "ci_low": round(float(interval.low), 4),
            "ci_high": round(float(interval.high), 4),
        },
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(f"{value:.4g}")


def by_text(shared: Path, name: str) -> dict[str, Any]:
    """Habits alone, in the text of the whole set."""
    texts, habits = load(shared, name), habits_to_count(None, tokens=False)
    return study(Counted(habit_values(texts, habits, progress=False), habits, prompt_groups(texts)), None, texts)


def by_audit(shared: Path, name: str, folder: Path, model: Callable[[], Any], sae: str, source: str) -> dict[str, Any]:
    """Habits and an SAE's concepts, in the trained tokens of 450 pairs; without a pass where the audit is there."""
    from datasets import Dataset

    from trl_anatomy import AuditConfig, load_audit, run_audit
    from trl_anatomy.audit.habit_table import texts_of, tokens_of
    from trl_anatomy.audit.reopen import reopen

    out = folder / name.replace(" ", "_")
    data = folder / f"{out.name}.jsonl"
    if not data.exists():
        rows = load(shared, name)
        pick = np.sort(np.random.default_rng(0).permutation(len(rows))[:PAIRS])
        folder.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(
            [
                {
                    key: [{"role": role, "content": text}]
                    for key, role, text in zip(
                        ("prompt", "chosen", "rejected"), ("user", "assistant", "assistant"), rows[i], strict=True
                    )
                }
                for i in pick
            ]
        ).to_json(str(data))
    if not (out / "findings.parquet").exists():
        loaded, tokenizer = model()
        config = AuditConfig(model=source, dataset=str(data), sae=sae, max_length=256, out=str(out))
        run_audit(config, model=loaded, tokenizer=tokenizer, progress=False)
    audit = load_audit(out)
    pairs = reopen(audit).pairs
    habits = habits_to_count(None, tokens=True)
    values = habit_values(texts_of(pairs), habits, tokens_of(pairs), progress=False)
    concepts = Shown.of(audit.concepts, audit.activity.shown)
    texts = [pairs.texts(i) for i in range(len(pairs))]
    found = study(Counted(values, habits, pairs.prompt_groups), concepts, texts)
    return {"concepts": len(concepts.names), "named": int((concepts.label_scores >= 0.75).sum()), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=list(SETS), help="default: all")
    parser.add_argument("--audits", help="folder of the sets' audits; without it habits alone are read")
    parser.add_argument("--model", help="for audits that are missing")
    parser.add_argument("--sae", help="for audits that are missing")
    parser.add_argument("--results", default="benchmarks/results/reading.json")
    args = parser.parse_args()
    shared = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).parents[3] / "shared"))
    file = Path(args.results)
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    loaded: list[Any] = []

    def model() -> Any:
        if not loaded:
            from trl_anatomy import AuditConfig
            from trl_anatomy.audit.run import load_model, load_tokenizer

            config = AuditConfig(model=args.model, dataset="none", sae=args.sae, max_length=256)
            loaded.append((load_model(config), load_tokenizer(args.model, config)))
        return loaded[0]

    for name in args.sets:
        parts = {"text": lambda name=name: by_text(shared, name)}
        if args.audits:
            parts["sae"] = lambda name=name: by_audit(
                shared, name, Path(args.audits), model, str(args.sae), str(args.model)
            )
        for kind, run in parts.items():
            found = run()
            results |= {
                "command": "python benchmarks/studies/reading.py --audits FOLDER --model M --sae S",
                "date": datetime.date.today().isoformat(),
                "device": f"{platform.machine()}, {os.cpu_count()} CPU cores",
                "versions": {of: version(of) for of in ("trl_anatomy", "numpy", "scipy", "scikit-learn")}
                | {"python": platform.python_version()},
            }
            results.setdefault("sets", {}).setdefault(name, {})[kind] = found
            print(
                f"{name} ({kind}): {len(found['lines'])} lines, Jaccard {found['halves']['jaccard']}, swapped "
                f"{found['swapped']['listed']}/{SWAPS}, missed {found['missed']}, wrong {found['wrong_sign']}, "
                f"correlation {found['largest_correlation']}, label {found['least_label_score']}",
                flush=True,
            )
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
