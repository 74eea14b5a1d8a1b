"""What an audit and a policy cost beside what TRL does anyway, on a small model.

The pass that reads a dataset is set against TRL's own reference precompute over the same rows, and so is that
precompute with concept scores read along; a training step of AnatomyDPOTrainer against one of DPOTrainer. Beside every
comparison stands a null pair: the same thing twice. Variants run in turn in one process; a ratio is the median over
rounds of the ratio within a round. On a CPU one thread is used and its own CPU time is taken.

    python benchmarks/cost.py --model M --pairs P
"""

import os

os.environ["TQDM_DISABLE"] = "1"  # bars of TRL and ours; tqdm reads it when it is imported

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from scipy.stats import binom
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from trl_anatomy import AnatomyDPOTrainer
from trl_anatomy.ops import ablate_features as ablate_module
from trl_anatomy.ops import project_out as project_module
from trl_anatomy.reading.harvest import harvest
from trl_anatomy.reading.locate import decoder_layers, hidden_size
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.settle import begin_policy
from trl_anatomy.trainers.dpo import _Remembered
from trl_anatomy.trainers.hidden import _Layer
from trl_anatomy.trainers.reference_pass import ReadAlong, ReferencePass
from trl_anatomy.trainers.seams import ROW, CarryColumns, ShapedSeams

GPU = torch.cuda.is_available()
REFERENCE = "TRL's reference precompute"
# Rules by what is timed, and the goal of each
RULES: dict[str, tuple[list[dict[str, Any]], float]] = {
    "no policy": ([], 1.01),
    "shape_reward": ([{"explain_away": "comma", "with": "shape_reward", "strength": 1.0}], 1.01),
    "filter_pairs, dropping none": ([{"explain_away": "comma", "with": "filter_pairs", "above": 2.0}], 1.01),
    "reweight_pairs, three weights": ([{"explain_away": "comma", "with": "reweight_pairs"}], 1.01),
    "reweight_pairs, a weight a pair": ([{"explain_away": "direction", "with": "reweight_pairs"}], 1.01),
    "mask_tokens": ([{"explain_away": "comma", "with": "mask_tokens"}], 1.01),
    "ablate_features, 16 latents": ([{"explain_away": "latents", "with": "ablate_features"}], 1.02),
    "project_out": ([{"explain_away": "direction", "with": "project_out"}], 1.02),
    "steer": ([{"explain_away": "direction", "with": "steer", "strength": 0.5}], 1.02),
}


def now() -> float:
    if not GPU:
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def compare(variants: dict[str, Callable[[], Any]], base: str, bases: dict[str, Callable[[], Any]], rounds: int) -> Any:
    """Each variant beside its base, in pairs that stand next to each other, after one round that does not count.

    Args:
        variants: name -> what is timed.
        base: name of what it is timed against, for the print.
        bases: name of a variant -> what it is timed against.

    Returns:
        name -> seconds of both, median ratio of a pair with its quartiles and a 95 % interval (by
        order statistics; below 6 rounds the range).
    """
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name in variants:
            pair = [0.0, 0.0]
            for side in (0, 1) if number % 2 else (1, 0):
                start = now()
                (bases[name], variants[name])[side]()
                pair[side] = now() - start
            if number:
                seconds[name].append((pair[0], pair[1]))
    found = {}
    for name, values in seconds.items():
        ratios = sorted(own / other for other, own in values)
        quarter, outer = len(ratios) // 4, int(binom.ppf(0.025, len(ratios), 0.5))
        found[name] = {
            "median_s": statistics.median(own for _, own in values),
            "base_median_s": statistics.median(other for other, _ in values),
            "ratio_of_minima": min(own for _, own in values) / min(other for other, _ in values),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [ratios[quarter], ratios[-1 - quarter]],
            "ratio_interval": [ratios[max(0, outer - 1)], ratios[-max(1, outer)]],
        }
        low, high = found[name]["ratio_interval"]
        print(
            f"  {name:<45} {found[name]['median_s']:8.3f} s   {found[name]['ratio']:.3f} of {base} "
            f"(95 % {low:.3f} to {high:.3f}; of minima {found[name]['ratio_of_minima']:.3f})",
            flush=True,
        )
    return found


class Own:
    """Time of what a policy adds to a training step, by itself: a share of a percent drowns in the noise of a ratio.

    Regions of this package count, and so does all that they call, but for the regions of TRL inside them; edits of
    hidden states count inside TRL's. The scaling of gradients by pair weights, one product per token, is left out.
    """

    def __init__(self) -> None:
        self.seconds, self._since, self._stack = 0.0, 0.0, [False]

    def _switch(self, ours: bool | None) -> None:
        at = now()
        if self._stack[-1]:
            self.seconds += at - self._since
        self._since = at
        if ours is None:
            self._stack.pop()
        else:
            self._stack.append(ours)

    def region(self, owner: Any, name: str, *, ours: bool, whole: bool = False) -> None:
        """Wrap a function: `ours` counts, TRL's does not; inside a `whole` one everything does."""
        inner = vars(owner)[name]

        def timed(*args: Any, **kwargs: Any) -> Any:
            nested, self._whole = self._whole, self._whole or whole
            self._switch(ours or nested)
            try:
                return inner(*args, **kwargs)
            finally:
                self._switch(None)
                self._whole = nested

        setattr(owner, name, timed)

    _whole = False

    def watch(self) -> None:
        """From here on, for the life of this process."""
        for name in ("training_step", "_compute_loss", "compute_ref_log_probs"):
            self.region(DPOTrainer, name, ours=False)
        collate = DataCollatorForPreference.torch_call

        def collated(collator: Any, examples: list[dict[str, Any]]) -> Any:
            # Within ours, TRL's is the first collation; later ones bring token masks or prompts into its form.
            self._switch(self._stack[-1] and not any(name.startswith("anatomy_") for name in examples[0]))
            try:
                return collate(collator, examples)
            finally:
                self._switch(None)

        DataCollatorForPreference.torch_call = collated  # type: ignore[method-assign]
        self.region(_Remembered, "__call__", ours=False)
        for name in ("_compute_loss", "compute_ref_log_probs"):
            self.region(AnatomyDPOTrainer, name, ours=True)
        self.region(ShapedSeams, "training_step", ours=True)
        self.region(CarryColumns, "__call__", ours=True)
        for owner, name in ((ShapedSeams, "_reweigh"), (AnatomyDPOTrainer, "_log_both_rewards")):
            self.region(owner, name, ours=True, whole=True)
        self.region(_Layer, "__call__", ours=True)
        self.region(ablate_module, "backward", ours=True)
        self.region(project_module, "_flat", ours=True)


class TimedReading(ReadAlong):
    """Takes the time of all that reading along adds to TRL's pass: a share of a percent drowns in a ratio."""

    seconds = 0.0

    def _keep(self, layer: int) -> Any:
        hook = super()._keep(layer)

        def timed(*args: Any) -> None:
            start = now()
            hook(*args)
            self.seconds += now() - start

        return timed

    @contextmanager
    def hooked(self) -> Iterator[ReadAlong]:
        with super().hooked():
            yield self
            start = now()
        self.seconds += now() - start

    @contextmanager
    def batch(self, inputs: Any) -> Iterator[None]:
        start = now()
        with super().batch(inputs):
            self.seconds += now() - start
            yield
            start = now()
        self.seconds += now() - start


def random_sae(width: int, layer: int) -> Any:
    """A random JumpReLU SAE of sae-lens, 8 times as wide, of which about 2 % fire on normal hidden states."""
    import sae_lens as sl

    torch.manual_seed(0)
    inner: Any = sl.JumpReLUSAE(sl.JumpReLUSAEConfig(d_in=width, d_sae=8 * width))
    inner.cfg.metadata.hook_name = f"blocks.{layer}.hook_resid_post"
    with torch.no_grad():
        inner.threshold.fill_(2.0 * float(inner.W_enc.norm(dim=0).mean()))
    return inner


def concepts(folder: Path, layer: int, width: int) -> dict[str, Any]:
    """Concepts of a policy: a text rule, a random direction and 16 latents of a random SAE, at one layer."""
    generator = torch.Generator().manual_seed(0)
    DirectionScorer(torch.randn(width, generator=generator), layer).save(folder / "direction")
    random_sae(width, layer).save_model(folder / "sae")
    return {
        "comma": {"scorer": "text", "pattern": ","},
        "direction": {"scorer": "direction", "path": str(folder / "direction")},
        "latents": {"scorer": "features", "features": list(range(16)), "sae": {"path": str(folder / "sae")}},
    }


def reference_pass(  # noqa: PLR0913, PLR0915
    what: str, model: Any, tokenizer: Any, layer: int, dataset: Dataset, rounds: int, folder: Path, max_length: int
) -> dict[str, Any]:
    """The audit's pass, and concept scores in TRL's pass, against TRL's pass alone."""
    folder.mkdir()
    layers = len(decoder_layers(model))
    sae = SAE(random_sae(hidden_size(model), layer))
    pairs = read_pairs(dataset, tokenizer, max_length=max_length)
    dataset = dataset.add_column(ROW, list(range(len(dataset))))
    trainer = make_trainer(
        AnatomyDPOTrainer, model, dataset, folder, max_length, precompute_ref_log_probs=True, processing_class=tokenizer
    )
    rows = trainer.train_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
    rules = [{"explain_away": name, "with": "shape_reward", "strength": 1.0} for name in ("direction", "latents")]
    known = concepts(folder, layer, hidden_size(model))
    waiting = {}
    for name, part in {"one direction": rules[:1], "a direction and 16 latents": rules}.items():
        policy = ConceptPolicy.load({"version": 1, "concepts": known, "rules": part})
        waiting[name] = ReferencePass.after(begin_policy(policy, pairs, lambda: model), None)
    runs = 0
    kept: dict[str, Any] = {}
    added: dict[str, list[float]] = {}

    def audit(at: int) -> None:
        nonlocal runs
        runs += 1
        harvest(model, sae, pairs, folder / f"harvest{runs}", layer=at, progress=False)

    def precompute() -> Dataset:
        nonlocal runs
        runs += 1
        trainer._precompute_model_hash = f"run {runs}"  # else TRL finds what it computed before
        return trainer._precompute_ref_logps(rows, "train", trainer.args.per_device_train_batch_size)

    def scored(name: str) -> None:
        start = now()
        scoring = waiting[name].scoring("no")
        reading = TimedReading(scoring, model, rows)
        before = now()
        with trainer._read_along(reading):
            reference = precompute()
        after = now()
        kept[name] = reference, scoring.finish()
        own = before - start + reading.seconds + now() - after
        added.setdefault(name, []).append(own / (now() - start - own))

    def apart(name: str) -> None:
        kept["apart"] = precompute(), score_pairs(pairs, waiting[name].begun.wanted, model, progress=False)

    both = "a direction and 16 latents"
    variants: dict[str, Callable[[], Any]] = {
        "null pair": precompute,
        "scores read along: one direction": lambda: scored("one direction"),
        f"scores read along: {both}": lambda: scored(both),
        "scores in a pass of their own": lambda: apart(both),
    }
    # Up to layer 20 of 32, counted from 0, are 21; as a share of the layers that lies between 5 and 6 of 8
    run = {at: f"audit pass, {at + 1} of {layers} layers" for at in (layer - 1, layer)}
    audits = {name: at for at, name in run.items() if (at + 1) / layers >= 20 / 32}
    variants |= {name: partial(audit, at) for name, at in audits.items()}
    scored(both)
    apart(both)
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert kept[both][0][name][:] == kept["apart"][0][name][:], "the reference is another one"
    for name in ("direction", "latents"):
        np.testing.assert_allclose(kept[both][1].gap(name), kept["apart"][1].gap(name), atol=1e-4)
    print(f"\nreference pass, {what}: layer {layer} of {layers}, {len(pairs)} pairs, {sae.d_sae} latents")
    found = compare(variants, REFERENCE, dict.fromkeys(variants, precompute), rounds)
    for name, shares in added.items():
        found[f"scores read along: {name}"]["added_share"] = statistics.median(shares)
        print(f"  what reading along adds, {name}: {statistics.median(shares):.2%} of TRL's pass")
    goals = {name: (0.60, found[name]["ratio"]) for name in audits}
    goals |= {f"scores read along: {name}": (1.005, 1 + statistics.median(shares)) for name, shares in added.items()}
    return {
        "what": f"{what}: concepts of layer {layer} of 0 to {layers - 1}, {len(pairs)} pairs, {sae.d_sae} latents",
        "base": REFERENCE,
        "variants": found,
        "goals": {
            name: {"limit": goal, "figure": figure, "met": figure <= goal} for name, (goal, figure) in goals.items()
        },
        "floors": {name: floor_of(model, pairs, at) for name, at in audits.items()},
    }


def floor_of(model: Any, pairs: Any, layer: int) -> float:
    """Matrix products of the audit's forward over those of TRL's: layers up to `layer` and each prompt once, over all
    layers, the head on response tokens and the prompt twice; padding and attention are left out."""
    blocks = [sum(p.numel() for p in block.parameters() if p.dim() > 1) for block in decoder_layers(model)]
    head = model.get_output_embeddings().weight.numel()
    sides = [(pairs.arrays(i)[:2], pairs.arrays(i)[2:]) for i in range(len(pairs))]
    n_prompt = sum(len(prompt) for pair in sides for prompt, _ in pair)
    n_response = sum(len(response) for pair in sides for _, response in pair)
    return (
        sum(blocks[: layer + 1])
        * (n_prompt / 2 + n_response)
        / (sum(blocks) * (n_prompt + n_response) + head * n_response)
    )


def make_trainer(
    kind: Any,
    model: Any,
    dataset: Dataset,
    folder: Path,
    max_length: int,
    precompute_ref_log_probs: bool = False,
    **extra: Any,
) -> Any:
    init = {"model_init_kwargs": {"dtype": "float32"}} if isinstance(model, str) else {}
    args = DPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=8,
        max_length=max_length,
        precompute_ref_log_probs=precompute_ref_log_probs,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
        **init,
    )
    return kind(model=model, args=args, train_dataset=dataset, **extra)


def batches(trainer: Any) -> Iterator[dict[str, Any]]:
    """The trainer's batches, epoch after epoch in one order."""
    while True:
        torch.manual_seed(0)
        yield from trainer.get_train_dataloader()


def training_step(
    model: str, layer: int, dataset: Dataset, rounds: int, folder: Path, max_length: int
) -> dict[str, Any]:
    known = concepts(folder, layer, hidden_size(AutoModelForCausalLM.from_pretrained(model)))
    losses: dict[str, list[float]] = {}
    added: dict[str, list[float]] = {}
    own = Own()
    own.watch()

    def stepper(trainer: Any, name: str) -> Callable[[], None]:
        rows = batches(trainer)
        losses[name] = []

        def step() -> None:
            start, before = now(), own.seconds
            losses[name].append(float(trainer.training_step(trainer.model, next(rows))))
            trainer.model.zero_grad()
            added.setdefault(name, []).append((own.seconds - before) / (now() - start - own.seconds + before))

        return step

    def ready(kind: Any, **extra: Any) -> Any:
        trainer = make_trainer(kind, model, dataset, folder, max_length, **extra)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # set by train()
        with torch.no_grad():  # else every margin is 0, and losses tell nothing
            for parameter in trainer.ref_model.parameters():
                parameter.mul_(0.95)
        return trainer

    stock = ready(DPOTrainer)
    variants = {"null pair": stepper(ready(DPOTrainer), "null pair")}
    for name, (rules, _) in RULES.items():
        policy = {"concept_policy": {"version": 1, "concepts": known, "rules": rules}} if rules else {}
        variants[name] = stepper(ready(AnatomyDPOTrainer, **policy), name)
    print(f"\ntraining step, batch of 8 pairs, {len(dataset)} pairs")
    bases = {name: stepper(stock, f"base of {name}") for name in variants}
    found = compare(variants, "DPOTrainer", bases, rounds)
    for name in variants:
        found[name]["added_share"] = statistics.median(added[name])
        print(f"  {name}: adds {statistics.median(added[name]):.2%} of the step by itself")
    for name in variants:
        alike = name in ("null pair", "no policy") or name.startswith("filter_pairs")
        assert (losses[name] == losses[f"base of {name}"]) == alike, f"{name}: losses are TRL's, or are not"
    return {
        "what": f"collation, forward of policy and reference, backward; batch of 8 pairs, edits at layer {layer}",
        "base": "DPOTrainer",
        "variants": found,
        "goals": {
            name: {
                "limit": goal,
                "figure": 1 + found[name]["added_share"],
                "met": found[name]["added_share"] <= goal - 1,
            }
            for name, (_, goal) in RULES.items()
        },
        "floors": dict.fromkeys(RULES, 1.0),
    }


def deeper(name: str) -> Any:
    """The model's configuration with eight layers and random weights: what is timed does not depend on them."""
    torch.manual_seed(0)
    config = AutoModelForCausalLM.from_pretrained(name).config
    config.num_hidden_layers = 8
    config.layer_types = None
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a small chat model")
    parser.add_argument("--pairs", required=True, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--rows", type=int, default=64, help="preference rows (default 64)")
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the reference pass (default 3)")
    parser.add_argument("--steps", type=int, default=12, help="rounds of the training step (default 12)")
    parser.add_argument("--results", default="benchmarks/results/cost.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    disable_progress_bars()
    torch.set_num_threads(1)
    rows = load_dataset("json", data_files=args.pairs, split=f"train[:{args.rows}]")
    dataset = Dataset.from_list([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in rows])
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        real = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        layer = round(len(decoder_layers(real)) * 20 / 32)
        passes = [
            reference_pass(what, model, tokenizer, at, dataset, args.rounds, folder / what, args.max_length)
            for what, model, at in (("the model", real, layer), ("eight layers", deeper(args.model), 5))
        ]
        step = training_step(args.model, layer, dataset, args.steps, folder, args.max_length)
    results = {
        "command": f"python benchmarks/cost.py --model {Path(args.model).name} --pairs {Path(args.pairs).name}",
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if GPU else platform.machine(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "cpu_seconds": time.process_time(),
        "rows": args.rows,
        "rounds": args.rounds,
        "steps": args.steps,
        "max_length": args.max_length,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "sae-lens")},
        "reference_pass": passes,
        "training_step": step,
    }
    Path(args.results).parent.mkdir(parents=True, exist_ok=True)
    Path(args.results).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
