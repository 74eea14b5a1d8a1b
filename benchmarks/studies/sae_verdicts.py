"""Does `trl-anatomy sae --check` give the right verdict on SAEs that are wrong on purpose? On a real model.

Wrong SAEs: of another layer, far and near; of another model of the same width (the start model with its hidden
dimensions in another order, which computes the same; and one with new weights); with a shuffled decoder; trained for
50 steps. And the right one, on the start model, and on a checkpoint fine-tuned from it with a high learning rate,
before and after it was continued there (`--init`).

Each unit is stored as soon as it is done, and never run twice. Results hold numbers only, no text.

    python benchmarks/studies/sae_verdicts.py --model M --sae S
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from habits import load
from transformers import AutoModelForCausalLM

from trl_anatomy.audit.run import load_tokenizer
from trl_anatomy.reading.sae import SAE, load_sae
from trl_anatomy.reading.sae_check import CONTINUE, FITS, REFUSE, check_fit
from trl_anatomy.reading.sae_training import BATCH, continued_lr, recipe, sequences_of, train_saes
from trl_anatomy.reading.spans import Pairs, read_pairs

SET, N_DRAWN, LENGTH, SEED = "ultrafeedback_subset", 100, 256, 0
LAYER, OTHERS = 18, (9, 17, 19, 28)
STEPS, TUNING_LR, TUNING_ROWS = 60, 3e-4, 2  # of the fine-tuning: Adam, rows a step
CONTINUED = 200_000  # tokens of the continued training

# What a unit should be told. The fine-tuned checkpoint before `--init` is measured, not known.
RIGHT = {
    "right": (FITS,),
    **{f"layer {layer}": (REFUSE,) for layer in OTHERS},
    "shuffled decoder": (REFUSE,),
    "dimensions in another order": (REFUSE,),
    "new weights": (REFUSE,),
    "50 steps": (CONTINUE, REFUSE),
    "fine-tuned, before --init": (CONTINUE, REFUSE),
    "fine-tuned, after --init": (FITS,),
}


def conversations(texts: list[tuple[str, str, str]]) -> Dataset:
    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return Dataset.from_list(
        [
            {"prompt": turn("user", p), "chosen": turn("assistant", c), "rejected": turn("assistant", r)}
            for p, c, r in texts
        ]
    )


def reordered(model: Any) -> Any:
    """The same function on hidden states whose dimensions are in another order (a Llama)."""
    order = torch.randperm(model.config.hidden_size, generator=torch.Generator().manual_seed(SEED))
    for name, weights in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "norm.weight")):
            weights.data = weights.data[order].contiguous()  # what is written into the stream, and what scales it
        elif weights.dim() == 2:
            weights.data = weights.data[:, order].contiguous()  # what is read from it; the embeddings
    return model


def fine_tuned(model: Any, pairs: Pairs) -> Any:
    """Plain SFT on the chosen responses, at a learning rate that moves the model far."""
    model = model.float().train()
    optimizer = torch.optim.AdamW(model.parameters(), TUNING_LR)
    order = np.random.default_rng(SEED).permutation(len(pairs))[: STEPS * TUNING_ROWS]
    for step, rows in enumerate(order.reshape(STEPS, TUNING_ROWS)):
        total = 0.0
        for i in rows.tolist():
            prompt, chosen, *_ = pairs.arrays(i)
            ids = torch.from_numpy(np.concatenate([prompt, chosen]).astype(np.int64))[None]
            labels = ids.clone()
            labels[:, : len(prompt)] = -100
            loss = model(input_ids=ids, labels=labels).loss / len(rows)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"  fine-tuning, step {step + 1}: loss {total:.3f}", flush=True)
    return model.eval()


class Study:
    """Models, pairs and SAEs, each made when it is asked for."""

    def __init__(self, model: str, sae: str, shared: Path, work: Path) -> None:
        self.name, self.sae_name, self.work = model, sae, work
        tokenizer = load_tokenizer(model)
        texts = load(shared, SET)
        rows = np.random.default_rng(SEED).permutation(len(texts))
        checked, rest = conversations([texts[i] for i in rows[:N_DRAWN]]), [texts[i] for i in rows[N_DRAWN:][:240]]
        self.pairs = read_pairs(checked, tokenizer, max_length=LENGTH)
        self.rest = read_pairs(conversations(rest), tokenizer, max_length=LENGTH)

    def model(self, dtype: str = "auto") -> Any:
        return AutoModelForCausalLM.from_pretrained(self.name, dtype=dtype).eval()

    def sae(self) -> SAE:
        return load_sae(self.sae_name)

    def right(self) -> Any:
        return check_fit(self.model(), self.sae(), self.pairs, LAYER)

    def at(self, layer: int) -> Any:
        return check_fit(self.model(), self.sae(), self.pairs, layer)

    def shuffled(self) -> Any:
        sae = self.sae()
        order = torch.randperm(sae.d_sae, generator=torch.Generator().manual_seed(SEED))
        sae._inner.W_dec.data = sae._inner.W_dec.data[order]
        return check_fit(self.model(), sae, self.pairs, LAYER)

    def reordered(self) -> Any:
        return check_fit(reordered(self.model()), self.sae(), self.pairs, LAYER)

    def new(self) -> Any:
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(self.model().config).to(torch.bfloat16).eval()
        return check_fit(model, self.sae(), self.pairs, LAYER)

    def trained(self, model: Any, name: str, tokens: int, init: SAE | None = None) -> SAE:
        own = sequences_of(self.rest, [], self.rest.pad_token_id)
        named: dict[str, Any] = {}
        if init is not None:
            named = {"architecture": "topk", "d_sae": init.d_sae, "k": init.k, "lr": continued_lr(init.d_sae)}
        settings = recipe(model.config.hidden_size, tokens, seed=SEED, **named)
        return load_sae(train_saes(model, own, [LAYER], settings, self.work / name, init=init)[LAYER])

    def early(self) -> Any:
        model = self.model()
        return check_fit(model, self.trained(model, "early", 50 * BATCH), self.pairs, LAYER)

    def tuned(self) -> Any:
        folder = self.work / "tuned"
        if not folder.exists():
            model = fine_tuned(self.model("float32"), self.rest).to(torch.bfloat16)
            model.save_pretrained(self.work / "tuning")
            (self.work / "tuning").rename(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

    def before(self) -> Any:
        return check_fit(self.tuned(), self.sae(), self.pairs, LAYER)

    def after(self) -> Any:
        model = self.tuned()
        return check_fit(model, self.trained(model, "continued", CONTINUED, self.sae()), self.pairs, LAYER)

    def units(self) -> dict[str, Callable[[], Any]]:
        return {
            "right": self.right,
            **{f"layer {layer}": lambda layer=layer: self.at(layer) for layer in OTHERS},
            "shuffled decoder": self.shuffled,
            "dimensions in another order": self.reordered,
            "new weights": self.new,
            "50 steps": self.early,
            "fine-tuned, before --init": self.before,
            "fine-tuned, after --init": self.after,
        }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--sae", required=True, help=f"SAE of its layer {LAYER}")
    parser.add_argument("--work", help="folder for the fine-tuned checkpoint and the trained SAEs; default: a new one")
    parser.add_argument("--results", default="benchmarks/results/sae_verdicts.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shared = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).parents[3] / "shared"))
    file = Path(args.results)
    results = json.loads(file.read_text()) if file.is_file() else {}
    results |= {
        "command": "python benchmarks/studies/sae_verdicts.py --model M --sae S",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, one thread of {os.cpu_count()} CPU cores",
        "seed": SEED,
        "data": {"set": SET, "pairs_drawn": N_DRAWN, "max_length": LENGTH},
        "tuning": {"steps": STEPS, "rows": TUNING_ROWS, "lr": TUNING_LR, "continued_tokens": CONTINUED},
        "versions": {name: version(name) for name in ("trl_anatomy", "torch", "transformers", "sae-lens")}
        | {"python": platform.python_version()},
    }
    found = results.setdefault("units", {})
    study = Study(args.model, args.sae, shared, Path(args.work or tempfile.mkdtemp()))
    for name, unit in study.units().items():
        if name in found:
            continue
        clock = time.process_time()
        fit = dataclasses.asdict(unit())
        found[name] = {
            **_rounded(fit),
            "wanted": list(RIGHT[name]),
            "right": fit["verdict"] in RIGHT[name],
            "cpu_seconds": round(time.process_time() - clock, 1),
        }
        print(f"{name}: {fit['verdict']}: {fit['reason']}", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
