"""Plan, run and tell the pilots of a prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..audit.number_words import percent
from ..errors import AnatomyError
from ..reading.fingerprint import hash_json
from ..reading.prompts import Prompt, encode_prompt
from .pilot_shift import PATH_ERROR, Shifts, reliability, shift_between, statement
from .responses import sampled

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from .pilot import Pilot
    from .pilot_price import Price, Training
    from .rollouts import Response

PLAIN, POLICY = "plain", "policy"
NULL = "null"  # a pilot of plain training on sides swapped at random


@dataclass(frozen=True)
class Planned:
    """What the pilots are going to be; without a training there are none, for a reason."""

    steps: int = 0
    training: Training | None = None
    price: Price | None = None
    reason: str | None = None
    told: str = ""


def plan_pilots(  # noqa: PLR0913
    audit: Audit,
    model: Any,
    tokenizer: Any,
    trainers: Mapping[str, Callable[[], Any]],
    prompts: Sequence[Prompt],
    n_per_prompt: int,
    max_new_tokens: int,
    n_pairs: int | None,
    budget: float,
    null_drift: bool,
) -> Planned:
    """How long pilots are, and what all of it costs, before anything is sampled."""
    from ..reading.locate import decoder_layers
    from ..trainers.prepare import generators_restored
    from .margin_curve import MAX_EVALUATIONS
    from .pilot import describe
    from .pilot_price import choose_steps, price, price_report

    with generators_restored():
        try:
            training = describe(trainers[PLAIN]())
        except AnatomyError as error:
            return Planned(reason=str(error).rstrip("."), told=f"No pilot: {error}")
    steps, reason = choose_steps(budget, training)
    cost = price(
        training,
        steps,
        n_trainers=len(trainers),
        n_pilots=len(trainers),
        n_null=int(null_drift),
        evaluations=1 + MAX_EVALUATIONS,
        n_first=n_pairs or training.n_pairs,
        prompt_lengths=[len(encode_prompt(tokenizer, prompt)) for prompt in prompts],
        n_per_prompt=n_per_prompt,
        max_new_tokens=max_new_tokens,
        layers_read=(audit.info["sae"]["layer"] + 1) / len(decoder_layers(model)),
    )
    told = price_report(cost, steps, training)
    if reason is not None:
        return Planned(reason=reason, told=f"No pilot: {reason}. {told}")
    return Planned(steps, training, cost, None, told)


def run_pilots(  # noqa: PLR0913
    trainers: Mapping[str, Callable[[], Any]],
    names: Sequence[str],
    planned: Planned,
    tokenizer: Any,
    asked: Sequence[Prompt],
    out: Path,
    sampling: Mapping[str, int],
    *,
    seed: int,
    progress: bool,
) -> tuple[dict[str, Pilot], dict[str, Sequence[Response]]]:
    """Train each pilot, carry it on, and sample there with the random numbers of the start model's responses."""
    from ..trainers.prepare import generators_restored
    from .pilot import carry_on, swap_sides, train_pilot
    from .straight_line import extrapolated, trained_weights

    assert planned.training is not None
    pilots: dict[str, Pilot] = {}
    after: dict[str, Sequence[Response]] = {}
    for name in names:
        with generators_restored():
            trainer = trainers[PLAIN if name == NULL else name]()
            if name == NULL:
                swap_sides(trainer, seed)
            file = out / f"pilot-{name}.safetensors"
            trained = train_pilot(trainer, planned.steps, file, name=name, progress=progress)
            alpha = pilots[PLAIN].alpha if name == NULL else None
            if alpha is None:
                measured = out / f"pilot-{name}.json"
                pilots[name] = carry_on(trainer, trained, planned.training, measured, seed=seed, progress=progress)
                alpha = pilots[name].alpha
            weights = trained_weights(trainer.model)
            bare = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
            with extrapolated(weights, trained.start, trained.ahead, alpha):
                known_as, file = hash_json([trained.key, alpha]), out / f"after-{name}.json"
                after[name] = sampled(bare, tokenizer, asked, file, sampling, known_as=known_as)
            del trainer, trained, weights, bare
    return pilots, after


def put_pilots(result: dict[str, Any], pilots: Mapping[str, Pilot], means: Mapping[str, np.ndarray], seed: int) -> None:
    """Write what pilots predict into a result.

    The interval of a shift is that of its size, and allows for the path; what is said of its direction goes by the
    noise of the pilot alone.

    Args:
        means: "start" and each pilot -> (P, C) means of each prompt: concepts, rules, concepts of the policy, and which
            concepts are shown.
    """
    n_concepts, n_rules = len(result["concepts"]), len(result["rates"])
    n_told = n_concepts + n_rules + len(result["policy"])
    found = {name: shift_between(means["start"], means[name], pilot.alpha_error) for name, pilot in pilots.items()}
    sizes = {
        name: shift_between(means["start"], means[name], float(np.hypot(pilot.alpha_error, PATH_ERROR)))
        for name, pilot in pilots.items()
    }
    reliable = {
        name: reliability(shift_between(means["start"][:, :n_concepts], means[name][:, :n_concepts]), seed)
        for name in pilots
    }
    result["pilots"] = {name: {**pilot.to_dict(), "reliability": reliable[name]} for name, pilot in pilots.items()}
    drift = shift_between(means["start"], means[NULL]) if NULL in means else None
    beyond = {name: shift_between(means[NULL], means[name]) for name in pilots} if drift is not None else {}

    def put(row: dict[str, Any], k: int) -> None:
        row["pilot"] = {name: shifts.interval(k) for name, shifts in sizes.items()}
        noise = {name: shifts.interval(k) for name, shifts in found.items()}
        said = {name: statement(of, reliable[name], pilots[name].reason) for name, of in noise.items()}
        row["says"] = {name: says for name, (says, _) in said.items()}
        row["cannot_tell"] = {name: why or None for name, (_, why) in said.items()}
        if drift is not None:
            row["drift"] = drift.interval(k)
            row["beyond_drift"] = {name: shifts.interval(k) for name, shifts in beyond.items()}

    rows = [*result["concepts"], *result["rates"], *result["policy"]]
    for k, row in enumerate(rows):
        put(row, k)
    for k, row in enumerate(result["concepts"]):
        rates = {name: mean_or_none(means[name][:, n_told + k]) for name in pilots}
        row["shown_after"] = rates
    for k, row in enumerate(result["policy"], start=n_concepts + n_rules):
        row["pilot_taken_out"] = share_taken_out(found[PLAIN], found[POLICY], k)


def share_taken_out(plain: Shifts, policy: Shifts, k: int) -> tuple[float, float, float] | None:
    """Share of plain training's shift of quantity `k` that a policy takes out, by their pilots.

    Returns:
        The share and its 95 % interval over prompts (delta method, as `taken_out`); None where the interval of plain
        training's shift holds zero.
    """
    moved, low, high = plain.interval(k)
    if not (low > 0 or high < 0):
        return None
    left = float(policy.shift[k]) / moved
    apart = shift_between(left * plain.by_prompt[:, k : k + 1], policy.by_prompt[:, k : k + 1])
    half = float(apart.high[0] - apart.shift[0]) / abs(moved)
    return 1 - left, 1 - left - half, 1 - left + half


def mean_or_none(values: np.ndarray) -> float | None:
    return None if np.isnan(values).any() or not len(values) else float(values.mean())


def pilot_sentences(result: Mapping[str, Any]) -> list[str]:
    """What each pilot is, the dose that its prediction holds for, how reliable it is, and what it all cost."""
    lines = []
    for name, pilot in result["pilots"].items():
        what = "with the policy" if name == POLICY else "of this training"
        lines.append(
            f"A pilot {what} took {pilot['steps']} of {pilot['of']} steps and reached a reward margin of"
            f" {signed(pilot['margin'])} on {pilot['n_held_out']} pairs it had not seen."
        )
        if pilot["reason"] is not None:
            lines.append(f"It is carried {pilot['alpha']:.1f} times as far, but {pilot['reason']}.")
        else:
            expected = pilot["expected"]
            lines.append(
                f"It is carried {pilot['alpha']:.1f} times as far: the prediction holds for {pilot['of']} steps that"
                f" end at a margin of {pilot['reached']:.2f} (expected {expected['margin']:.2f}"
                f" [{expected['low']:.2f}, {expected['high']:.2f}])."
            )
        if pilot["capped"]:
            lines.append(
                "The margin expected is not met on that line, as far as the learning rates go: the shifts may be too"
                " small."
            )
        reliable = pilot["reliability"]
        lines.append(
            "How reliable its shifts are is not known: too few prompts or concepts."
            if reliable is None
            else f"Reliability of its shifts over all concepts: {reliable:.2f} (1: two halves of the prompts agree)."
        )
    share = result["price"]["share"]
    lines.append(
        f"This prediction costs at most {percent(share['total'])} of the training's FLOPs, its pilots"
        f" {percent(share['pilot'])}."
    )
    return lines


def signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.3f}"
