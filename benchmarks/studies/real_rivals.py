"""Predictions of a training that need the model: each a unit of real_runs.py, with what it cost.

- `pilot`: the adapter after a tenth of the training, made larger until pairs have the margin of a dose; its responses.
- `steering`: the mean difference of hidden states, chosen less rejected, added at every layer, as strongly as gives
  pairs the margin of a dose; the responses under it.
- `step`: Adam's first step on some of the pairs, carried over to the start model's responses.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft.helpers import rescale_adapter_scale
from real_runs import NEW_TOKENS, RECIPE, TOKENS, Place, Run, adapted, dpo_trainer, made_once
from torch import Tensor

from trl_anatomy.checking.first_step import first_step, log_prob_changes
from trl_anatomy.checking.likelihood import log_probs
from trl_anatomy.checking.margin_curve import alpha_for_margin
from trl_anatomy.checking.responses import as_pairs, sampled_responses, slug
from trl_anatomy.reading.locate import decoder_layers
from trl_anatomy.reading.spans import Pairs, read_pairs

MARGIN_PAIRS, STEP_PAIRS, STEERING_PAIRS = 32, 96, 96
TARGETS = ("dose 1.0", "end")  # whose margin the pilot and steering are brought to
LARGEST = 64.0  # times the pilot, or the mean difference, at most


def some_pairs(place: Place, name: str, n: int, seed: int) -> Pairs:
    rows, _ = place.rows(name)
    drawn = np.random.default_rng(seed).permutation(len(rows))[:n]
    return read_pairs(rows.select(np.sort(drawn)), place.tokenizer, max_length=TOKENS, truncation="keep_start")


@torch.no_grad()
def differences(model: Any, pairs: Pairs) -> np.ndarray:
    """(n,) log-probability of chosen less that of rejected."""
    found = []
    for i in range(len(pairs)):
        of = pairs.arrays(i)
        chosen, rejected = log_probs(model, [(of[0], of[1]), (of[2], of[3])], pairs.pad_token_id).tolist()
        found.append(chosen - rejected)
    return np.array(found)


def doses(place: Place, run: Run) -> dict[str, float]:
    """The margins that rivals are brought to: of a training's snapshots."""
    told = json.loads((place.out / "trainings" / slug(run.name) / "done.json").read_text())["snapshots"]
    margins = {name: told[name]["margin"] for name in TARGETS if name in told}
    if "dose 1.0" in margins and margins["end"] < 1.3 * margins["dose 1.0"]:
        del margins["dose 1.0"]
    return {name: max(margin, 0.1) for name, margin in margins.items()}


def brought_to_doses(
    place: Place, run: Run, folder: Path, model: Any, scaled: Callable[[float], Any]
) -> dict[str, Any]:
    """Responses of a model whose change is made larger or smaller by a factor, at the margin of each dose.

    A margin that is not met is come as near to as can be; the one reached is told. `scaled` is a context in which the
    model is changed by a factor.
    """
    pairs, clock = some_pairs(place, run.of, MARGIN_PAIRS, seed=3), time.process_time()
    start = differences(place.model, pairs)

    def margin(factor: float) -> float:
        with scaled(factor):
            return float(RECIPE["beta"] * (differences(model, pairs) - start).mean())

    prompts, told, said, at_one = place.asked(run.of), {}, {}, margin(1.0)
    for name, target in doses(place, run).items():
        there = alpha_for_margin(margin, target, LARGEST, at_one=at_one)
        told[name] = {"target": target, "factor": there.alpha, "margin": there.margin}
        with scaled(there.alpha):
            said[name] = place.said(model, prompts, folder / f"{slug(name)}.json", 0)
    names = list(said)
    place.read(prompts, [said[names[0]], said[names[-1]]], folder / "harvest")
    return {"doses": told, "names": names, "cpu_seconds": time.process_time() - clock}


def pilot_unit(place: Place, run: Run) -> bool:
    folder = place.out / "pilot" / slug(run.name)

    def make() -> dict[str, Any]:
        model = adapted(place, place.out / "trainings" / slug(run.name) / "pilot")
        return brought_to_doses(place, run, folder, model, lambda factor: rescale_adapter_scale(model, factor))

    return made_once(folder, make)


# --- steering ---


@torch.no_grad()
def mean_differences(model: Any, pairs: Pairs) -> list[Tensor]:
    """Of each layer's output, (width,): the mean over chosen responses less that over rejected ones."""
    total: list[Tensor] = []
    for i in range(len(pairs)):
        of = pairs.arrays(i)
        sides = []
        for prompt, response in ((of[0], of[1]), (of[2], of[3])):
            ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
            states = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
            sides.append([state[0, len(prompt) :].float().mean(0) for state in states[1:]])
        gaps = [chosen - rejected for chosen, rejected in zip(*sides, strict=True)]
        total = gaps if not total else [a + b for a, b in zip(total, gaps, strict=True)]
    return [each / len(pairs) for each in total]


@contextmanager
def steered(model: Any, shifts: Sequence[Tensor], factor: float) -> Iterator[None]:
    """Adds to every layer's output what its own shift adds to that of the layer below."""

    def hook(shift: Tensor) -> Callable[..., Any]:
        def add(_module: Any, _inputs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            moved = hidden + (factor * shift).to(hidden.dtype)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return add

    layers = zip(decoder_layers(model), shifts, strict=True)
    handles = [layer.register_forward_hook(hook(shift)) for layer, shift in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def steering_unit(place: Place, run: Run) -> bool:
    folder = place.out / "steering" / slug(run.name)

    def make() -> dict[str, Any]:
        clock = time.process_time()
        means = mean_differences(place.model, some_pairs(place, run.of, STEERING_PAIRS, seed=4))
        # The last hidden state has been normalised: no layer's output.
        shifts = [means[0], *(b - a for a, b in pairwise(means[:-1])), torch.zeros_like(means[0])]
        shifting = time.process_time() - clock
        told = brought_to_doses(place, run, folder, place.model, lambda factor: steered(place.model, shifts, factor))
        return told | {"cpu_seconds": told["cpu_seconds"] + shifting}

    return made_once(folder, make)


# --- first step ---


def step_unit(place: Place, run: Run) -> bool:
    folder = place.out / "step" / slug(run.name)

    def make() -> dict[str, Any]:
        clock = time.process_time()
        trainer = dpo_trainer(place, run, folder / "trainer", [])
        direction = first_step(trainer, STEP_PAIRS)
        seen = time.process_time() - clock
        prompts = place.asked(run.of)
        said = [sampled_responses(place.out / "start" / slug(run.of), f"responses-{seed}") for seed in (0, 1)]
        pairs = read_pairs(
            as_pairs(prompts, *said), place.tokenizer, max_length=TOKENS + NEW_TOKENS, truncation="keep_start"
        )
        change = log_prob_changes(trainer.model.eval(), direction, pairs, progress=False)
        return {
            "rows": pairs.rows.tolist(),
            "change": change.tolist(),
            "gradient_cpu_seconds": seen,
            "cpu_seconds": time.process_time() - clock,
        }

    return made_once(folder, make)
