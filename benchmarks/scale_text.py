"""What an audit reads in text, at full size: habits, the choice, improbable labels and problems of 260,000 pairs.

Writes made pairs to disk (an eighth share a prompt, one in a hundred is a copy, a near-copy or a reversed copy of an
earlier one), and reads them in a fresh process as an audit without a model does: CPU seconds and peak memory of each
step. A tenth as many pairs beside it say whether time grows with the rows.

    python benchmarks/scale_text.py
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SEED, WORDS, ROWS_AT_ONCE = 0, 8000, 1000
_PACKAGES = ("trl_anatomy", "numpy", "scipy", "datasets", "pyarrow")


def made_rows(n: int) -> Iterator[dict[str, str]]:
    """Pairs of about 150 words a side, with lists, bold, code and questions at the rates of real ones."""
    rng = np.random.default_rng(SEED)
    letters = np.array(list("etaoinshrdlcumwfgypbvk"))
    vocabulary = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, WORDS)]
    vocabulary[:12] = ["the", "of", "and", "to", "in", "is", "that", "it", "you", "for", "with", "are"]
    rate = 1 / np.arange(1, WORDS + 1)
    rate /= rate.sum()

    def text(n_words: int) -> str:
        words = [vocabulary[i] for i in rng.choice(WORDS, n_words, p=rate)]
        parts, at = [], 0
        while at < n_words:
            stop = at + int(rng.integers(6, 22))
            parts.append(" ".join(words[at:stop]).capitalize() + ".")
            at = stop
        style = rng.random(5)
        if style[0] < 0.4:
            parts = [f"{k}. {part}" if k < 5 else part for k, part in enumerate(parts, 1)]
        if style[1] < 0.3:
            parts[0] = f"**{parts[0]}**"
        if style[2] < 0.1:
            parts.append("```python\nprint(1)\n```")
        if style[3] < 0.2:
            parts.append("Would you like to know more?")
        return ("\n" if style[4] < 0.5 else " ").join(parts)

    kept: list[dict[str, str]] = []
    for _ in range(n):
        kind = rng.random()
        if kept and kind < 0.01:
            row = dict(kept[int(rng.integers(len(kept)))])
            if kind < 0.003:
                row["chosen"] += " Indeed."
            elif kind < 0.006:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        else:
            prompt = kept[int(rng.integers(len(kept)))]["prompt"] if kept and kind < 0.13 else text(30)
            sides = [text(int(rng.integers(40, 260))) for _ in range(2)]
            sides.sort(key=len, reverse=bool(rng.random() < 0.7))
            row = {"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}
        kept = [*kept[-ROWS_AT_ONCE:], row]
        yield row


def read(file: Path) -> dict[str, Any]:
    """CPU seconds of each step and peak memory behind it, in this process."""
    from trl_anatomy.audit.choice import Counted, choice_of
    from trl_anatomy.audit.habit_table import habit_table, habit_values, habits_to_count, prompt_groups
    from trl_anatomy.audit.improbable import improbable_labels
    from trl_anatomy.audit.problems import PROBLEMS, count_problems, find_problems, with_improbable
    from trl_anatomy.audit.text_audit import raw_texts
    from trl_anatomy.reading.dataset import load_rows

    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    start = time.process_time()

    def done(step: str) -> None:
        nonlocal start
        seconds[step] = round(time.process_time() - start, 2)
        memory[step] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        start = time.process_time()

    raw = load_rows(str(file))
    done("load")
    texts, rows, _ = raw_texts(raw)
    groups, habits = prompt_groups(texts), habits_to_count(None, False)
    done("prompts")
    values = habit_values(texts, habits, progress=False)
    done("habit_values")
    habit_table(texts, habits, groups=groups, rows=rows, values=values, progress=False)
    done("habit_table")
    counted = Counted(values, habits, groups)
    choice = choice_of(counted)
    done("choice")
    improbable = improbable_labels(counted, choice)
    done("improbable_labels")
    problems = with_improbable(find_problems(raw), improbable, rows, raw)
    done("problems")
    return {
        "pairs": len(raw),
        "megabytes_of_text": round(sum(len(part) for text in texts for part in text) / 1e6, 1),
        "cpu_seconds": seconds,
        "peak_rss_gb": memory,
        "found": {kind: n for kind, n in count_problems(problems, PROBLEMS).items() if n},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=260_000)
    parser.add_argument("--read", type=Path, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "scale_text.json")
    args = parser.parse_args()
    if args.read is not None:
        print(json.dumps(read(args.read)))
        return
    sizes = {}
    for name, n in (("tenth", args.pairs // 10), ("full_size", args.pairs)):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.jsonl"
            with open(file, "w", encoding="utf-8") as out:
                for row in made_rows(n):
                    out.write(json.dumps(row) + "\n")
            command = [sys.executable, __file__, "--read", str(file)]
            environment = {**os.environ, "HF_DATASETS_CACHE": folder, "OMP_NUM_THREADS": "1"}
            found = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        sizes[name] = json.loads(found.stdout.splitlines()[-1])
        print(name, json.dumps(sizes[name]), flush=True)
    results = {
        "command": f"python benchmarks/scale_text.py{'' if args.pairs == 260_000 else f' --pairs {args.pairs}'}",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, {os.cpu_count()} CPU cores, one used",
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "seed": SEED,
        **sizes,
    }
    args.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
