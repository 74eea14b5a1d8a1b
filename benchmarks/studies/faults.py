"""Are faults that were put into real preference data found, and how often is a row called faulty that is not?

In five sets of pairs (apart: `TRL_ANATOMY_SHARED`) twenty faults of each kind (docs/reference/problems.md) are put at
random rows, in all ways that the kind has. The data is then searched without a tokenizer and with a real one. A false
alarm is a row of a kind that was not put there and that the untouched data does not show. Labels are turned in a search
of their own: at pairs whose label the untouched data makes at least 90 % probable, and at random ones.

Results hold numbers only, no text.

    python benchmarks/studies/faults.py --tokenizer ../smollm2
"""

import argparse
import datetime
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from habits import load

from trl_anatomy import AuditConfig
from trl_anatomy.audit.choice import Counted, choice_of
from trl_anatomy.audit.habit_table import habit_values, habits_to_count, prompt_groups
from trl_anatomy.audit.improbable import improbable_labels
from trl_anatomy.audit.problems import PROBLEMS, eval_prompts, find_problems
from trl_anatomy.audit.run import load_tokenizer
from trl_anatomy.reading.spans import read_pairs

SETS = ("alpaca_eval2_cross_model", "ultrafeedback_subset", "hh_helpful_test", "overrefusal_steered", "dsp_domain")
MOST, N, MAX_LENGTH, EVIDENT = 900, 20, 1024, 0.9
# Rows that the untouched sets show, read one by one: kind -> read, right; of `broken_off` up to twenty a set at random.
# Wrong were dialogues and languages that their prompt asked for in a roundabout way, an odd number of fences in a row,
# a plural, a list of words and a stray word.
READ = {
    "open_fences": (14, 13),
    "length_only": (18, 17),
    "other_language": (29, 25),
    "extra_turns": (8, 5),
    "blank_sides": (1, 1),
    "template_text": (1, 1),
    "broken_off": (81, 79),
}
_PACKAGES = ("trl_anatomy", "numpy", "scipy", "scikit-learn", "datasets", "transformers")

Row = dict[str, Any]
FOREIGN = (
    "El agua del río es fría, pero los vecinos no lo saben y por eso van con las manos vacías a la casa de la playa.",
    "Die Stadt ist nicht groß, aber sie hat einen Markt, auf dem wir mit den Nachbarn auch ein Brot kaufen.",
    "Сначала нужно подготовить землю, а потом посадить семена и поливать их каждый день.",
    "首先你需要准备好土地，然后播种，每天给它们浇水，直到它们长大为止。",
    "Il faut d'abord préparer la terre, puis semer les graines et les arroser tous les jours avec de l'eau.",
)
STOPS = ".!?:…。！？”\"'’)]*`"
LEAKED = (
    *("<|im_end|>\n<|im_start|>assistant\n", "<|eot_id|>", "<end_of_turn>", "[/INST]", "<|endoftext|>"),
    *("<｜Assistant｜>", "\n### Response:\n", "\n### Instruction:\nGo on.\n", "<</SYS>>", "<|user|>"),
)
TURNS = (
    "\n\nHuman: And then?\n\nAssistant: Then it rains.",
    "\nUser: Why is that?\nAssistant: Nobody knows.",
    "\n\n**User:** More, please.\n\n**AI:** Of course.",
)


def put(row: Row, k: int, change: Callable[[str], str]) -> Row:
    side = ("chosen", "rejected")[k % 2]
    return {**row, side: change(row[side])}


def middle(text: str, piece: str) -> str:
    words = text.split(" ")
    return " ".join(words[: len(words) // 2]) + piece + " ".join(words[len(words) // 2 :])


def nearly(text: str, k: int) -> str:
    """A text that a reader takes for the same."""
    words = text.split(" ")
    if k % 4 == 0 and len(words) >= 20:
        words[len(words) // 2] = "indeed"
        return " ".join(words)
    return (text + " ok", text.upper() + ".", text.replace(",", "").rstrip(".") + "!", text.replace("'", "’") + " :)")[
        k % 4
    ]


def cut(text: str, k: int) -> str:
    """A text that ends at a random token, most of them of four letters or fewer, but neither behind a full stop nor at
    the end of a line, where nobody could tell.
    """
    pieces, draw = re.findall(r"\w{1,4}|\s+|[^\w\s]", text.strip()), np.random.default_rng(k)
    for end in draw.permutation(np.arange(1, len(pieces))).tolist():
        kept, rest = "".join(pieces[:end]).rstrip(), "".join(pieces[end:])
        if kept and kept[-1] not in STOPS and "\n" not in rest[: len(rest) - len(rest.lstrip()) + 1]:
            return kept
    return text.strip()[:-2]


# Repeated rows stand beside their models; all others in place of theirs.
REPEATED: dict[str, Callable[[Row, int], Row]] = {
    "copies": lambda row, k: dict(row),
    "near_copies": lambda row, k: {
        "prompt": row["prompt"] + ("", "\n", "  ", " ?")[k // 4 % 4],
        "chosen": nearly(row["chosen"], k),
        "rejected": nearly(row["rejected"], k // 2),
    },
    "reversed_copies": lambda row, k: {
        **row,
        "chosen": row["rejected"],
        "rejected": nearly(row["chosen"], k) if k % 2 else row["chosen"],
    },
}
FAULTS: dict[str, Callable[[Row, int], Row]] = {
    "same_sides": lambda row, k: {**row, "rejected": row["chosen"] + ("", "\n", "  ")[k % 3]},
    "blank_sides": lambda row, k: put(row, k, lambda _: ("", " \n\t", "\u200b", "\ufeff\u00a0")[k % 4]),
    "template_text": lambda row, k: put(row, k, lambda text: middle(text, LEAKED[k % len(LEAKED)])),
    "extra_turns": lambda row, k: put(row, k, lambda text: text + TURNS[k % 3]),
    "open_fences": lambda row, k: put(row, k, lambda text: text + f"\n\n```{('', 'python')[k % 2]}\nprint(1)\n"),
    "length_only": lambda row, k: {**row, "rejected": row["chosen"][: len(row["chosen"]) // (2 + k % 3)]},
    "other_language": lambda row, k: put(row, k, lambda _: FOREIGN[k % len(FOREIGN)]),
    "ties": lambda row, k: {**row, "score_rejected": row["score_chosen"]},
    "eval_prompts": lambda row, k: row,
    "broken_off": lambda row, k: put(row, k, lambda text: cut(text, k)),
}
# What takes a tokenizer: text beyond `MAX_LENGTH` tokens.
FILLING = "Every word here counts as at least one token of the text. " * 120
CUT: dict[str, Callable[[Row, int], Row]] = {
    "same_after_cut": lambda row, k: {
        **row,
        "chosen": row["chosen"] + FILLING + "One end.",
        "rejected": row["chosen"] + FILLING + "Another.",
    },
    "cut_sides": lambda row, k: put(row, k, lambda text: text + FILLING),
}


def seeded(rows: list[Row], clean: dict[str, set[int]], kinds: dict[str, Callable[[Row, int], Row]], seed: int) -> Any:
    """The rows with faults, kind -> rows that have it, and rows that are faulty in any way."""
    rng = np.random.default_rng(seed)
    # Whole sets break off: their rows may still get other faults.
    shown = set().union(*(rows for kind, rows in clean.items() if kind != "broken_off"))
    free = [i for i in rng.permutation(len(rows)).tolist() if i not in shown]
    made, planted, touched = [dict(row) for row in rows], {}, set(shown)
    for kind, fault in kinds.items():
        fit = [i for i in free if _fits(kind, rows[i]) and not (kind == "broken_off" and i in clean[kind])]
        taken = fit[:N]
        free = [i for i in free if i not in taken]
        planted[kind] = set()
        for k, i in enumerate(taken):
            if kind in REPEATED:
                made.append(fault(rows[i], k))
                planted[kind].add(len(made) - 1)
                touched |= {i, len(made) - 1}
            else:
                made[i] = fault(rows[i], k)
                planted[kind].add(i)
                touched.add(i)
    held = {rows[i]["prompt"] for i in planted["eval_prompts"]}
    planted["eval_prompts"] |= {i for i, row in enumerate(made) if row["prompt"] in held}  # all pairs of these prompts
    return made, planted, touched


def _fits(kind: str, row: Row) -> bool:
    """Whether a row with this fault has it, and no other: what a reader would call decidable."""
    if kind == "other_language":
        return row["prompt"].isascii() and len(row["prompt"].split()) > 3 and not _speaks_of_languages(row["prompt"])
    if kind == "length_only":
        return len(row["chosen"]) >= 60
    if kind == "broken_off":
        return min(len(row["chosen"].split()), len(row["rejected"].split())) >= 20
    if kind in CUT:  # else there is no pair
        return len(row["chosen"]) > 10 and len(row["prompt"]) < 600
    return len(row["chosen"]) > 10


def _speaks_of_languages(prompt: str) -> bool:
    words = ("translat", "language", "spanish", "french", "german", "russian", "chinese", "english")
    return any(word in prompt.lower() for word in words)


def search(rows: list[Row], tokenizer: Any, evaluated: frozenset[int] | None = None) -> dict[str, set[int]]:
    """Kind -> rows that are said to have it."""
    data = Dataset.from_list(rows)
    pairs = None if tokenizer is None else read_pairs(data, tokenizer, max_length=MAX_LENGTH)
    table = find_problems(data, pairs=pairs, evaluated=evaluated)
    found: dict[str, set[int]] = {kind: set() for kind in PROBLEMS}
    for kind, row in zip(table["problem"].to_pylist(), table["row"].to_pylist(), strict=True):
        found[kind].add(row)
    return found


def study(rows: list[Row], tokenizer: Any, seed: int) -> dict[str, Any]:
    """Per kind: rows of the untouched data, faults put and found, false alarms and their share of the other rows."""
    clean = search(rows, tokenizer)
    kinds = {**REPEATED, **FAULTS, **({} if tokenizer is None else CUT)}
    made, planted, touched = seeded(rows, clean, kinds, seed)
    asked = sorted({made[i]["prompt"] for i in planted["eval_prompts"]})
    held = [{"prompt": (prompt, prompt.upper() + " \n")[i % 2]} for i, prompt in enumerate(asked)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "held_out.jsonl"
        file.write_text("\n".join(map(json.dumps, held)), encoding="utf-8")
        evaluated = eval_prompts(AuditConfig(eval_dataset=str(file)))
    found = search(made, tokenizer, evaluated)
    found["broken_off"] -= clean["broken_off"] - planted["broken_off"]
    return {
        kind: {
            "untouched": len(clean[kind]),
            "put": len(planted[kind]),
            "found": len(planted[kind] & found[kind]),
            "false_alarms": len(found[kind] - planted[kind] - touched),
            "false_alarm_share": round(len(found[kind] - planted[kind] - touched) / (len(made) - len(touched)), 4),
        }
        for kind in planted
    }


def labels(rows: list[Row], seeds: range) -> dict[str, Any]:
    """Turned labels: at evident pairs and at random ones, by named habits alone; means over `seeds`."""
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    habits = habits_to_count(None, False)
    values, groups = habit_values(texts, habits, progress=False), prompt_groups(texts)

    def judged(values: np.ndarray) -> Any:
        counted = Counted(values, habits, groups)
        choice = choice_of(counted)
        return choice, improbable_labels(counted, choice)

    choice, clean = judged(values)
    accuracy = {entry["source"]: round(entry["accuracy"], 3) for entry in choice["sources"]}
    if clean is None:
        return {"verdict": choice["verdict"], "accuracy": accuracy, "listed": 0}
    results: dict[str, Any] = {
        "verdict": choice["verdict"],
        "accuracy": accuracy,
        "untouched": len(clean.pairs),
        "evident_pairs": int((clean.every >= EVIDENT).sum()),
    }
    before = set(clean.pairs.tolist())
    for kind, pool in (("evident", np.flatnonzero(clean.every >= EVIDENT)), ("random", np.arange(len(rows)))):
        if len(pool) < 2 * N:
            results[kind] = "too few such pairs"
            continue
        tried = []
        for seed in seeds:
            turned = np.random.default_rng(seed).choice(pool, N, replace=False)
            other = values.copy()
            other[:, turned] = other[::-1, turned]
            _, found = judged(other)
            if found is None:
                tried.append((0, 0, 0.5, 0))
                continue
            listed, put_there = set(found.pairs.tolist()), set(turned.tolist())
            is_turned = np.isin(np.arange(len(rows)), turned)
            below = found.every[is_turned][:, None] - found.every[~is_turned]
            first = found.every.argsort(kind="stable")[:N]
            tried.append(
                (
                    len(listed & put_there),
                    len(listed - put_there - before),
                    ((below < 0) + (below == 0) / 2).mean(),
                    is_turned[first].sum() / N,
                )
            )
        hits, alarms, auc, precision = np.array(tried, dtype=float).T
        results[kind] = {
            "put": N,
            "found": round(hits.mean(), 2),
            "found_least": int(hits.min()),
            "false_alarms": round(alarms.mean(), 2),
            "false_alarm_share": round(alarms.mean() / (len(rows) - N), 4),
            "auc": round(auc.mean(), 3),
            "precision_at_20": round(precision.mean(), 3),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", default=None, help="folder of a chat model's tokenizer")
    parser.add_argument("--sets", nargs="+", default=list(SETS))
    parser.add_argument("--seeds", type=int, default=5, help="draws of turned labels")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results" / "faults.json")
    args = parser.parse_args()
    shared = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).parents[2] / ".." / "shared"))
    tokenizer = None if args.tokenizer is None else load_tokenizer(args.tokenizer)
    sets: dict[str, Any] = {}
    for name in args.sets:
        rows = [
            {"prompt": prompt, "chosen": chosen, "rejected": rejected, "score_chosen": 5 - i % 3, "score_rejected": 1}
            for i, (prompt, chosen, rejected) in enumerate(load(shared, name)[:MOST])
        ]
        sets[name] = {
            "pairs": len(rows),
            "text": study(rows, None, 0),
            **({} if tokenizer is None else {"tokens": study(rows, tokenizer, 1)}),
            "labels": labels(rows, range(args.seeds)),
        }
        print(name, json.dumps(sets[name]))
    results = {
        "command": "python benchmarks/studies/faults.py --tokenizer ../smollm2",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "put": N,
        "max_length": MAX_LENGTH,
        "read_one_by_one": {kind: {"rows": n, "right": right} for kind, (n, right) in READ.items()},
        "sets": sets,
    }
    args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
