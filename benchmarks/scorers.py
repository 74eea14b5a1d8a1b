"""How well each kind of scorer finds concepts in real text that it was not fitted on.

Windows of real responses, labelled by text rules, read by a small real model in one pass. Each kind of scorer is fitted
at every layer; the layer and the threshold are chosen on one fifth of the windows, and the figures are of another
fifth, windows of one response always together. Data and model are not part of the repository.

    TRL_ANATOMY_SHARED=../shared python benchmarks/scorers.py
"""

import argparse
import dataclasses
import datetime
import gzip
import json
import os
import platform
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_anatomy.checking.rates import TEXT_RULES
from trl_anatomy.reading.fit import fit_concept, read_examples, read_hidden
from trl_anatomy.reading.sae import load_sae
from trl_anatomy.testbed.sae import save_sae, train_sae

CONCEPTS = ("bold", "bullet", "emoji", "em_dash", "link", "refusal")
FILES = ("wildbench_responses", "arena_hard_answers", "gpteacher", "spiral_dialogues", "alpaca_eval_outputs_NC")
WINDOW = 280  # characters
SAE_LAYER = 2
# name -> (scorer, settings)
KINDS = {
    "direction, max": ("direction", {"reduce": "max"}),
    "direction, mean": ("direction", {"reduce": "mean"}),
    "probe per response, max": ("probe", {"reduce": "max"}),
    "probe per response, mean": ("probe", {"reduce": "mean"}),
    "probe per token, max": ("probe", {"per": "token", "reduce": "max"}),
    "attention probe, last": ("attention_probe", {}),
    "SAE features, max": ("features", {"reduce": "max"}),
}


def windows(shared: Path) -> list[tuple[str, int]]:
    """(text, number of the response that it is from): responses cut where a blank is near."""
    found, response = [], 0
    for name in FILES:
        with gzip.open(shared / "data" / "text" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                for turn in re.split(r"\n\nUser: ", json.loads(line)["text"]):
                    text = turn.split("\n\nAssistant: ", 1)[-1]
                    response += 1
                    start = 0
                    while start < len(text) and start < 20 * WINDOW:
                        stop = start + WINDOW
                        if stop < len(text):
                            stop = max(text.rfind(" ", start + WINDOW // 2, stop), start + WINDOW // 2)
                        if stop - start > 80:
                            found.append((text[start:stop], response))
                        start = stop
    return found


def pool(shared: Path, n_positive: int, n_random: int) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """Windows: some that show each concept, and random ones; the response each is from; labels by concept."""
    everything = windows(shared)
    rng = np.random.default_rng(0)
    rules = {name: TEXT_RULES[name] for name in CONCEPTS}
    order = rng.permutation(len(everything))
    taken = set(order[:n_random].tolist())
    for rule in rules.values():
        shows = [i for i in order if rule.value(everything[i][0])]
        taken |= set(shows[:n_positive])
    chosen = sorted(taken)
    texts = [everything[i][0] for i in chosen]
    labels = {name: np.array([rule.value(text) != 0 for text in texts]) for name, rule in rules.items()}
    return texts, np.array([everything[i][1] for i in chosen]), labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positives", type=int, default=150, help="windows drawn for each concept (default 150)")
    parser.add_argument("--random", type=int, default=700, help="windows drawn whatever they show (default 700)")
    parser.add_argument("--concepts", nargs="+", default=CONCEPTS, choices=CONCEPTS, help="default: all")
    parser.add_argument("--results", default="benchmarks/results/scorers.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shared = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).parents[2] / "shared"))
    clock = time.perf_counter()
    texts, responses, labels = pool(shared, args.positives, args.random)
    path = shared / "models" / "tinychat1m"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    data = Dataset.from_dict({"text": texts, "label": [0] * len(texts)})
    examples = dataclasses.replace(read_examples(data, tokenizer, max_length=256), groups=responses)
    layers = list(range(model.config.num_hidden_layers))
    read = read_hidden(model, examples, layers, progress=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        trained = train_sae(
            read[0][SAE_LAYER], d_sae=1024, k=16, layer=SAE_LAYER, model_name="tinychat1m", seed=0, tokens=150_000
        )
        save_sae(trained, Path(folder))
        sae = load_sae(folder)
        for concept in args.concepts:
            labelled = dataclasses.replace(examples, labels=labels[concept])
            for name, (scorer, settings) in KINDS.items():
                more = {"sae": sae} if scorer == "features" else {"layers": layers}
                fitted = fit_concept(model, labelled, scorer=scorer, read=read, progress=False, **more, **settings)
                card = fitted.scorer.card
                rows.append({"concept": concept, "scorer": name, "layer": fitted.scorer.layer, **card["held_out"]})
                shown = "  ".join(f"{key} {card['held_out'][key]:.3f}" for key in ("f1", "roc_auc", "pr_auc"))
                print(f"{concept:<8} {name:<26} layer {fitted.scorer.layer}  {shown}", flush=True)
            write(Path(args.results), args, labels, rows, time.perf_counter() - clock)


def write(
    path: Path, args: argparse.Namespace, labels: dict[str, np.ndarray], rows: list[dict], seconds: float
) -> None:
    """The results so far."""
    results = {
        "command": f"python benchmarks/scorers.py --positives {args.positives} --random {args.random}",
        "date": datetime.date.today().isoformat(),
        "device": f"CPU ({platform.machine()}), one thread",
        "seconds": round(seconds),
        "seed": 0,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "sae-lens", "numpy", "scikit-learn")},
        "model": "tinychat1m (1.07 million parameters, 4 layers, width 128)",
        "windows": len(next(iter(labels.values()))),
        "positives": {name: int(found.sum()) for name, found in labels.items()},
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
