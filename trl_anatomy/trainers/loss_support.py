"""Which rules are exact for which of TRL's losses and trainers: one table for the refusals and for the documentation.

A margin shifts the reference log-probability of a response y by -o(y)/beta, a weight multiplies a pair's gradient
(method.md section 8). Every verdict below is tested against an explicit float64 formula.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import AnatomyError
from ..shaping.interventions import VERBS
from ..versions import fused_head

Verdict = Literal["exact", "pointwise", "per token", "untouched", "refused"]


@dataclass(frozen=True)
class LossSupport:
    """How one loss takes an offset, and whether it takes a weight.

    exact: the loss sees beta*D + (o(chosen) - o(rejected)); a shift common to both sides cancels.
    pointwise: each response's reward r(y) becomes r(y) + o(y); a common shift does not cancel, so scores are centred.
    per token: the loss divides by completion length, so the shift is o(y)/beta times the completion token count.
    untouched: the loss has no reference in it; it may stand in a mixture, where it trains as without a policy.
    refused: the shift would not mean what the rule says.

    Attributes:
        verdict: on an offset.
        note: what the offset does.
        no_weight: why a weight on the pair is refused; "" where it is exact.
    """

    verdict: Verdict
    note: str
    no_weight: str = ""


_SORTS = "sorts over the batch, so that it is no mean over pairs"

LOSSES: dict[str, LossSupport] = {
    "sigmoid": LossSupport("exact", "-log σ(β·D + o⁺ - o⁻)"),
    "hinge": LossSupport("exact", "max(0, 1 - β·D - o⁺ + o⁻)"),
    "robust": LossSupport("exact", "label-smoothed -log σ of β·D + o⁺ - o⁻"),
    "exo_pair": LossSupport("exact", "reverse KL of the pair's softmax at β·D + o⁺ - o⁻"),
    "discopop": LossSupport("exact", "blend of logistic and exponential at β·D + o⁺ - o⁻"),
    "ipo": LossSupport("per token", "squared error of D per token + (o⁺ - o⁻)/β"),
    "sigmoid_norm": LossSupport("per token", "-log σ(β·D per token + o⁺ - o⁻)"),
    "nca_pair": LossSupport("pointwise", "each reward r(y) becomes r(y) + o(y)"),
    "bco_pair": LossSupport("pointwise", "each reward r(y) becomes r(y) + o(y)"),
    "sppo_hard": LossSupport("pointwise", "each reward r(y) becomes r(y) + o(y)"),
    "apo_zero": LossSupport("pointwise", "each reward r(y) becomes r(y) + o(y)"),
    "apo_down": LossSupport("pointwise", "each reward r(y) becomes r(y) + o(y)"),
    "sft": LossSupport(
        "untouched", "has no reference: allowed beside another loss, refused alone", "is a mean over tokens, not pairs"
    ),
    "aot": LossSupport("refused", "sorts policy and reference apart, which detaches an offset from its pair", _SORTS),
    "aot_unpaired": LossSupport("refused", "sorts chosen and rejected apart, so an offset acts on no pair", _SORTS),
}


def check_dpo_rules(rules: Sequence[Any], config: Any) -> None:
    """Refuse what the DPO trainer cannot do exactly, before anything long runs.

    Args:
        rules: interventions of a policy.
        config: DPOConfig.

    Raises:
        AnatomyError: naming the option, what was found and what works.
    """
    for rule in rules:
        if getattr(rule, "keep", False):
            raise AnatomyError(f"{rule.verb} has keep: true, which is for reward models; a policy is saved unedited.")
    stages = {rule.stage for rule in rules}
    if stages - {"rows"} and getattr(config, "use_liger_kernel", False) and not fused_head():
        raise AnatomyError(
            "use_liger_kernel is true: before trl 1.15 its loss goes past the place where a concept policy acts, which "
            "would do nothing; leave it out, install trl>=1.15, or act with filter_pairs only."
        )
    if "margin" in stages:
        check_losses(config.loss_type, config.f_divergence_type, config.beta)
    if "weight" in stages:
        for name in config.loss_type:
            if name not in LOSSES or LOSSES[name].no_weight:
                why = LOSSES[name].no_weight if name in LOSSES else "is not known here"
                works = ", ".join(loss for loss, support in LOSSES.items() if not support.no_weight)
                raise AnatomyError(f"loss_type {name!r} cannot be weighted by pair: it {why}; use {works}.")


def check_reward_rules(rules: Sequence[Any], config: Any) -> None:
    """Refuse what the reward trainer cannot do.

    Args:
        rules: interventions of a policy.
        config: RewardConfig.

    Raises:
        AnatomyError: naming the verb and why.
    """
    for rule in rules:
        if rule.not_for_reward:
            raise AnatomyError(f"{rule.verb} does not act on a reward model: {rule.not_for_reward}.")


def check_masks(n_masked: int, loss_types: Sequence[str]) -> None:
    """Refuse a loss that has no value where no token of a chosen response is left.

    Args:
        n_masked: `PolicyPlan.counts["chosen_masked"]`.
        loss_types: `DPOConfig.loss_type`, a list.

    Raises:
        AnatomyError: naming the loss.
    """
    empty = [name for name in loss_types if name in MEANS_OVER_TOKENS]
    if n_masked and empty:
        raise AnatomyError(
            f"loss_type {empty[0]!r} is a mean over the tokens of chosen responses, and mask_tokens leaves none in "
            f"{n_masked} pairs: a batch of such pairs would give NaN. Drop {empty[0]!r}, raise the threshold, or drop "
            "these pairs."
        )


# losses that have no value where a batch has no token left
MEANS_OVER_TOKENS = ("sft",)
# the f-divergence under which an offset adds to the margin
MARGIN_DIVERGENCE = "reverse_kl"


def check_losses(loss_types: Sequence[str], f_divergence_type: str = "reverse_kl", beta: float = 0.1) -> None:
    """Refuse what an offset cannot shape exactly, before anything long runs.

    Args:
        loss_types: `DPOConfig.loss_type`, a list.
        f_divergence_type: `DPOConfig.f_divergence_type`, a string or enum.
        beta: `DPOConfig.beta`.

    Raises:
        AnatomyError: naming the option, what was found and what works.
    """
    unknown = [name for name in loss_types if name not in LOSSES]
    if unknown:
        raise AnatomyError(f"loss_type {unknown[0]!r} is not known to shape_reward; it shapes {_names_that_work()}.")
    for name in loss_types:
        if LOSSES[name].verdict == "refused":
            raise AnatomyError(
                f"loss_type {name!r} cannot be shaped: it {LOSSES[name].note}; use one of {_names_that_work()}, "
                "or act on the rows with filter_pairs."
            )
    verdicts = {LOSSES[name].verdict for name in loss_types} - {"untouched"}
    if not verdicts:
        raise AnatomyError(
            "loss_type 'sft' alone cannot be shaped: it has no reference, so shape_reward would silently do nothing; "
            f"add one of {_names_that_work()}, or act on the rows with filter_pairs."
        )
    if "per token" in verdicts and len(verdicts) > 1:
        raise AnatomyError(
            f"loss_type {list(loss_types)} mixes losses that divide by completion length with losses that do not, so "
            "one offset cannot suit both; use loss types of one kind with shape_reward."
        )
    f_divergence = str(getattr(f_divergence_type, "value", f_divergence_type))
    if f_divergence != MARGIN_DIVERGENCE:
        raise AnatomyError(
            f"f_divergence_type {f_divergence!r} cannot be shaped: the offset would land inside a non-linear function "
            f"and not add to the margin; use {MARGIN_DIVERGENCE!r} with shape_reward."
        )
    if not beta > 0:
        raise AnatomyError(f"beta is {beta}, but shape_reward divides its offset by beta; use a positive beta.")


def divides_by_length(loss_types: Sequence[str]) -> bool:
    """Whether an offset has to be multiplied by the completion's token count, because the loss divides by it."""
    return any(LOSSES[name].verdict == "per token" for name in loss_types)


def _names_that_work() -> str:
    return ", ".join(name for name, support in LOSSES.items() if support.verdict not in ("refused", "untouched"))


def support_table() -> str:
    """The table as Markdown, one row per `loss_type`, for the documentation.

    Example:
        >>> print(support_table().splitlines()[2])
        | `sigmoid` | exact | -log σ(β·D + o⁺ - o⁻) | exact |
    """
    rows = []
    for name, support in LOSSES.items():
        weight = f"refused: {support.no_weight}" if support.no_weight else "exact"
        rows.append(f"| `{name}` | {support.verdict} | {support.note} | {weight} |")
    return "\n".join(["| loss_type | margin | what the offset does | pair weight |", "|---|---|---|---|", *rows])


def verb_table() -> str:
    """What each verb is exact for as Markdown, one row per verb, for the documentation.

    Example:
        >>> print(verb_table().splitlines()[2])
        | `filter_pairs` | rows | every | every | exact |
    """
    losses = {
        "margin": ("as *margin* below", f"`{MARGIN_DIVERGENCE}`"),
        "weight": ("as *pair weight* below", "every"),
        "tokens": (f"every; {_code(MEANS_OVER_TOKENS)} if every chosen response keeps a token", "every"),
    }
    rows = []
    for name, verb in VERBS.items():
        if verb.reads == "rows":
            continue
        loss, divergence = losses.get(verb.stage, ("every", "every"))
        reward = f"refused: {verb.not_for_reward}" if verb.not_for_reward else "exact"
        rows.append(f"| `{name}` | {verb.stage} | {loss} | {divergence} | {reward} |")
    return "\n".join(["| verb | acts on | loss_type | f-divergence | reward models |", "|---|---|---|---|---|", *rows])


def _code(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
