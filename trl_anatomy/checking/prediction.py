"""Predict what a training will change: from its first step, and from a pilot of it that is carried on to the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..audit.number_words import percent
from ..errors import AnatomyError, require
from ..reading.files import check_writable, misfit, remove_partial, without_nan, write_atomically
from ..reading.fingerprint import hash_json
from ..reading.prompts import Prompt
from ..reading.storage import fetch, local
from .pilot_prediction import NULL, Planned, mean_or_none, pilot_sentences, plan_pilots, put_pilots, run_pilots, signed
from .pilot_prediction import PLAIN as PLAIN  # what other modules and users find here
from .pilot_prediction import POLICY as POLICY
from .pilot_shift import prompt_means
from .rates import TEXT_RULES, Rules, rate_interval, rule_hits
from .responses import activities, as_pairs, audited_tokenizer, load_audited, name_of, sampled, written_texts

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.scorers import Scorer
    from ..reading.spans import Pairs
    from ..shaping.policy import ConceptPolicy
    from ..shaping.resolve import Loaded
    from .rollouts import Response

FOLDER, FILE = "prediction", "prediction.json"  # in an audit's folder, unless it is told otherwise


def predict(  # noqa: C901, PLR0913, PLR0915
    audit: Audit,
    before: Any,
    trainers: Mapping[str, Callable[[], Any]],
    prompts: Sequence[Prompt],
    *,
    out: Path,
    policy: str | Path | Mapping[str, Any] | ConceptPolicy | None = None,
    tokenizer: Any = None,
    rules: Rules | None = None,
    n_per_prompt: int = 4,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    n_pairs: int | None = None,
    budget: float = 0.0,
    null_drift: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Predict what a training changes in the start model's responses, by its pairs, its first step, and a pilot.

    The disparity of the pairs says what they reward; whether a model can follow depends on what it does already. So the
    first step of the training (`first_step`) is carried over to the start model's own responses: those that rise come
    more often, and with them what they show. Both predictions miss different things; in trainings on real pairs the
    mean of both always held better than the disparity (docs/results/real-training.md). With a budget the first steps
    of the training are really trained, carried on along their straight line to the reward margin expected at the end
    (`pilot`), and the model there is asked.

    Args:
        audit: audit of the training set.
        before: the audited model: a path or a loaded model. The trainers have their own.
        trainers: name -> what makes a trainer that has not begun: `PLAIN`, and maybe `POLICY` for the same with one.
        prompts: strings or conversations.
        out: folder for the sampled responses, the weights of pilots, and `prediction.json`.
        policy: what the trainer `POLICY` was given; its concepts are scored in the responses and followed too.
        tokenizer: default: the one that the pairs were audited with.
        rules: name -> habit or regular expression, counted in the responses; default `TEXT_RULES`, the library's.
        n_per_prompt: responses to each prompt, an even number.
        max_new_tokens: longest response sampled, in tokens.
        batch_size: responses sampled at a time.
        seed: of sampling.
        n_pairs: rows that the steps are taken on, at most; default all.
        budget: share of the training's steps that each pilot takes, from 0 (none) to 1. What all of it costs is said on
            standard error before anything long begins.
        null_drift: train one more pilot, on sides swapped at random, and tell apart what any training changes.
        progress: show progress bars, and the price.

    Returns:
        What `prediction.json` holds: per concept the share of its features that fire in a response of the start model,
        the shift by disparity, by the step of each trainer with a 95 % interval over prompts, and the mean of both;
        per text rule the rate and the shift by the step; per concept of the policy its mean score, the shift by the
        steps, and how much of plain training's shift the policy takes out (0 none, 1 all), null where plain training
        is not predicted to move it. A step has no length of its own: shifts by it are scaled to the root mean square of
        the disparities, by one factor for all. Null where nothing is known: a text rule that the start model never
        meets cannot be predicted from what it does.
        `shown` is the share of the start model's responses that show a concept, null where the audit does not know.
        With a budget also `price`, and `pilots`: per pilot its steps, how far it is carried, the reward margin that it
        is valid for, and the reliability of its shifts; or `no_pilot`, the reason. Per concept and rule then `pilot`
        (trainer -> shift with a 95 % interval), `says` (more, less, or null) and `cannot_tell` (why null); per concept
        `shown_after`, the rate predicted; with `null_drift` also `drift` and `beyond_drift`, what is left of it.

    Raises:
        AnatomyError: no prompt, an odd number of responses, a model that is not the one audited, several processes, a
            budget outside 0 to 1, or null drift without one.
        PolicyError: a policy whose concepts cannot be scored.

    Source: method.md section 12.
    """
    require("plotly")
    from ..audit.predict import step_shift
    from ..reading.score import score_pairs
    from ..shaping.policy import ConceptPolicy
    from ..shaping.resolve import Loaded
    from .first_step import first_step, log_prob_changes

    if not prompts:
        raise AnatomyError("predict needs at least one prompt.")
    if n_per_prompt < 2 or n_per_prompt % 2:
        raise AnatomyError(f"n_per_prompt is {n_per_prompt}; give an even number, 2 or more.")
    if not 0 <= budget <= 1:
        raise AnatomyError(f"budget is {budget:g}; give a share of the training from 0 (no pilot) to 1, such as 0.1.")
    if null_drift and not budget:
        raise AnatomyError("null_drift trains a pilot on swapped sides: give a budget above 0.")
    if policy is not None and POLICY not in trainers:
        raise AnatomyError(f"predict got a policy and no trainer {POLICY!r} with it.")
    audit.check_harvest()
    model = load_audited(audit, before)
    loaded = Loaded()
    sae = audit.load_sae(load=loaded.sae).to(next(model.parameters()).device)
    scorers = _scorers(ConceptPolicy.load(policy), audit, model, loaded)
    tokenizer = tokenizer or audited_tokenizer(audit, before)
    rules = TEXT_RULES if rules is None else rules
    check_writable(out := local(out))
    remove_partial(out)
    sampling = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
    named_pilots = [*trainers, *([NULL] if null_drift else [])]
    planned = Planned()
    if budget:
        planned = plan_pilots(
            audit, model, tokenizer, trainers, prompts, n_per_prompt, max_new_tokens, n_pairs, budget, null_drift
        )
        if progress:
            print(planned.told, file=sys.stderr, flush=True)
    asked = [prompt for prompt in prompts for _ in range(n_per_prompt)]
    said = sampled(model, tokenizer, asked, out / "before.json", sampling)
    concepts = audit.labelled(audit.concepts).to_pylist()
    features = [np.asarray(row["features"], dtype=np.int64) for row in concepts]

    def read_all(said: Sequence[Response], folder: str, model: Any, sae: Any) -> _Read:
        return _read(audit, model, sae, features, tokenizer, asked, said, out / folder, rules, progress)

    read = read_all(said, "harvest", model, sae)
    pairs, activity, hits = read.pairs, read.activity, read.hits
    groups = np.concatenate([pairs.prompt_groups, pairs.prompt_groups])
    scores = score_pairs(pairs, scorers, model, progress=progress)
    named = {name: np.concatenate([scores.chosen[name], scores.rejected[name]]) for name in scores.names}
    del model, sae

    shown = np.stack([*activity.T, *hits.values(), *named.values()], axis=1)
    changes: dict[str, np.ndarray] = {}
    for name, made in trainers.items():
        trainer = made()
        direction = first_step(trainer, n_pairs)
        trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
        changes[name] = log_prob_changes(trained, direction, pairs, progress=progress).T.ravel()
        del trainer, direction, trained
    steps = {name: step_shift(shown, change, groups) for name, change in changes.items()}

    disparity = np.array([row["predicted"] for row in concepts], dtype=np.float64)
    scale = _scale(disparity, steps[PLAIN][0][: len(concepts)])

    def by_step(k: int) -> dict[str, tuple[float, float, float]]:
        of = {name: (scale * shift[k], scale * 1.96 * error[k]) for name, (shift, error) in steps.items()}
        return {name: (shift, shift - half, shift + half) for name, (shift, half) in of.items()}

    rates_shown = _shown(activity, concepts)
    result = {
        "audit": audit.name,
        "concepts_key": concepts_key(audit),
        "before": name_of(before),
        "sampling": {**sampling, "n_prompts": len(prompts), "n_per_prompt": n_per_prompt},
        "responses": 2 * len(pairs),
        "concepts": [
            {
                "concept": row["concept"],
                "label": row["label"],
                "start": float(activity[:, k].mean()),
                "shown": mean_or_none(rates_shown[:, k]),
                "disparity": row["predicted"],
                "step": (found := by_step(k)),
                "both": {name: (row["predicted"] + of[0]) / 2 for name, of in found.items()},
            }
            for k, row in enumerate(concepts)
        ],
        "rates": [
            {
                "rule": rule,
                "start": rate_interval(found, groups=groups),
                "step": by_step(len(concepts) + k) if found.any() and not found.all() else None,
            }
            for k, (rule, found) in enumerate(hits.items())
        ],
        "policy": [
            {
                "concept": name,
                "start": float(score.mean()),
                "step": by_step(len(concepts) + len(hits) + k),
                "taken_out": taken_out(score, changes[PLAIN], changes[POLICY], groups),
            }
            for k, (name, score) in enumerate(named.items())
        ],
    }
    if planned.training is not None and planned.price is not None:
        result |= {"budget": budget, "price": planned.price.to_dict()}
        pilots, after = run_pilots(
            trainers, named_pilots, planned, tokenizer, asked, out, sampling, seed=seed, progress=progress
        )
        model = load_audited(audit, before)
        sae = audit.load_sae(load=loaded.sae).to(next(model.parameters()).device)
        before_all = np.concatenate([shown, rates_shown], axis=1)
        means = {"start": read.by_prompt(before_all, len(prompts), n_per_prompt)}
        for name, responses in after.items():
            there = read_all(responses, f"harvest-{name}", model, sae)
            scores = score_pairs(there.pairs, scorers, model, progress=progress)
            scored = [np.concatenate([scores.chosen[of], scores.rejected[of]]) for of in scores.names]
            values = np.stack([*there.activity.T, *there.hits.values(), *scored], axis=1)
            values = np.concatenate([values, _shown(there.activity, concepts)], axis=1)
            means[name] = there.by_prompt(values, len(prompts), n_per_prompt)
        put_pilots(result, pilots, means, seed)
    elif budget:
        result |= {"budget": budget, "no_pilot": planned.reason}
    result = without_nan(result)
    write_atomically(out / FILE, json.dumps(result, indent=2).encode())
    return result


@dataclass(frozen=True, eq=False)
class _Read:
    """Sampled responses as the audit reads them, first sides and then second ones.

    Attributes:
        pairs: two responses to a prompt each.
        activity: (n, K) share of each concept's features that fire.
        hits: rule -> (n,) bool.
    """

    pairs: Pairs
    activity: np.ndarray
    hits: dict[str, np.ndarray]

    def by_prompt(self, values: np.ndarray, n_prompts: int, n_per_prompt: int) -> np.ndarray:
        """(n_prompts, C) mean of (n, C) over the responses to each prompt."""
        prompt = self.pairs.rows // (n_per_prompt // 2)
        return prompt_means(values, np.concatenate([prompt, prompt]), n_prompts)


def _read(  # noqa: PLR0913
    audit: Audit,
    model: Any,
    sae: Any,
    features: Sequence[np.ndarray],
    tokenizer: Any,
    asked: Sequence[Prompt],
    said: Sequence[Response],
    folder: Path,
    rules: Rules,
    progress: bool,
) -> _Read:
    """Read sampled responses with the audit's SAE, by the model that was audited."""
    from ..audit.config import recorded
    from ..reading.harvest import harvest
    from ..reading.spans import read_pairs

    settings = audit.info["settings"]
    pairs = read_pairs(
        as_pairs(asked[::2], said[::2], said[1::2]),
        tokenizer,
        max_length=settings["max_length"],
        truncation="keep_start",
        pool_special_tokens=recorded(settings).pool_special_tokens,
    )
    read = harvest(model, sae, pairs, folder, layer=audit.info["sae"]["layer"], progress=progress, replace=True)
    activity = np.concatenate(activities(read, features, audit.tau))
    texts = written_texts(asked, said, tokenizer)
    return _Read(pairs, activity, {rule: _of_pairs(found, pairs) for rule, found in rule_hits(texts, rules).items()})


def _shown(activity: np.ndarray, concepts: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(n, K) whether each response shows each concept; NaN where the audit does not know."""
    from ..audit.shown import shown_by_share

    above = np.array([row["shown_above"] for row in concepts], dtype=np.float64)
    return shown_by_share(activity, np.array([row["n_features"] for row in concepts]), above)


def load_prediction(folder: str | Path, audit: Audit) -> dict[str, Any]:
    """What `predict` wrote into a folder (or URL).

    Raises:
        AnatomyError: nothing there, a damaged file, or a prediction of other concepts than the audit's.
    """
    file = local(folder) / FILE
    if not fetch(file):
        raise AnatomyError(f"{folder} holds no {FILE}: run trl-anatomy predict first.")
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise AnatomyError(f"{folder}: {FILE} is damaged ({error}); run trl-anatomy predict again.") from error
    if not isinstance(found, dict) or found.get("concepts_key") != concepts_key(audit):
        raise AnatomyError(f"{folder}: {FILE} is not of the concepts of {audit.name}: run trl-anatomy predict again.")
    by_pilot = {"pilot": {PLAIN: list}} if "pilots" in found else {}
    wrong = misfit(found, {"concepts": [{"step": {PLAIN: list}, "both": {PLAIN: object}, **by_pilot}]})
    if wrong is not None:
        raise AnatomyError(f"{folder}: {FILE} is damaged ({wrong}); run trl-anatomy predict again.")
    return found


def concepts_key(audit: Audit) -> str:
    """What tells the concepts of an audit from those of another: the latents of each, of which SAE."""
    return hash_json([audit.info["sae"]["fingerprint"], [of.tolist() for of in audit.communities]])


def taken_out(
    score: np.ndarray, plain: np.ndarray, policy: np.ndarray, groups: np.ndarray
) -> tuple[float, float, float] | None:
    """How much of what plain training does to a concept a policy takes out, by their first steps, as `recovery` counts.

    Args:
        score: (n,) of the concept in responses of the start model.
        plain, policy: (n,) change of their log-probability along the first step of either.
        groups: (n,) prompt of each.

    Returns:
        The share, and its 95 % interval over prompts (delta method: the error of policy − left·plain over the size of
        plain); None where plain training's own interval holds zero.
    """
    from ..audit.predict import step_shift

    (moved,), (error,) = step_shift(score[:, None], plain, groups)
    if not abs(moved) > 1.96 * error:
        return None
    left = float(step_shift(score[:, None], policy, groups)[0][0] / moved)
    half = 1.96 * float(step_shift(score[:, None], policy - left * plain, groups)[1][0]) / abs(moved)
    return 1 - left, 1 - left - half, 1 - left + half


def _scorers(policy: ConceptPolicy, audit: Audit, model: Any, loaded: Loaded) -> dict[str, Scorer]:
    """Of a policy's concepts, those that have a score. Raises PolicyError as `ConceptPolicy.scorers`."""
    from ..shaping.resolve import resolve

    resolved, problems = resolve(policy, audit, loaded=loaded)
    found = resolved.to(model, problems)
    return {name: scorer for name, scorer in found.items() if policy.concepts[name].scorer != "reft"}


def _of_pairs(hits: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Of hits over sampled responses, those of the responses that were read: first sides, then second ones."""
    return np.concatenate([hits[::2][pairs.rows], hits[1::2][pairs.rows]])


def _scale(disparity: np.ndarray, step: np.ndarray) -> float:
    """By how much steps are multiplied to be of the size of disparities; NaN where one of them is nothing."""
    told = np.isfinite(disparity) & np.isfinite(step)
    size = float(np.sqrt(np.square(step[told]).mean())) if told.any() else 0.0
    return float(np.sqrt(np.square(disparity[told]).mean())) / size if size else float("nan")


def prediction_report(result: Mapping[str, Any]) -> str:
    """The prediction as text for a terminal: what it rests on, concepts, text rules, concepts of a policy."""
    named = list(result["concepts"][0]["step"]) if result["concepts"] else [PLAIN]
    policy, piloted, drift = POLICY in named, "pilots" in result, False
    lines = []
    if piloted:
        drift = any("drift" in row for row in result["concepts"])
        lines += [*pilot_sentences(result), ""]
    elif "no_pilot" in result:
        lines += [f"No pilot: {result['no_pilot']}.", ""]
    lines += [
        "Predicted shift of each concept, in the share of its features that fire in a response: by how far the pairs",
        "lean, by the first step of this training on the start model's own responses, and the mean of both"
        + (", and by the pilot." if piloted else "."),
        "Shown: share of the start model's responses that show the concept"
        + (", and of those after training." if piloted else "."),
        f"  {'concept':<8} {'shown':>6} "
        + (f"{'after':>6} {'by pilot':>8}  {'95 % interval':<18} {'says':<11} " if piloted else "")
        + (f"{'drift':>7} " if drift else "")
        + f"{'start':>6} {'by pairs':>8} {'by step':>8}  {'95 % interval':<18} {'both':>7}"
        + (f" {'by step, policy':>15}" if policy else "")
        + (f" {'by pilot, policy':>16}" if policy and piloted else "")
        + "  label",
    ]

    def size(row: Mapping[str, Any]) -> float:
        return -abs((row["pilot"][PLAIN][0] if piloted else row["both"][PLAIN]) or 0.0)

    for row in sorted(result["concepts"], key=size)[:20]:
        lines.append(
            f"  {row['concept']:<8} {_percent(row['shown']):>6} "
            + (f"{_percent(row['shown_after'][PLAIN]):>6} {_piloted(row)} " if piloted else "")
            + (f"{signed(row['drift'][0]):>7} " if drift else "")
            + f"{row['start']:6.3f} {signed(row['disparity']):>8} {_step(row, PLAIN)} {signed(row['both'][PLAIN]):>7}"
            + (f" {signed(row['step'][POLICY][0]):>15}" if policy else "")
            + (f" {signed(row['pilot'][POLICY][0]):>16}" if policy and piloted else "")
            + f"  {row['label']}"
        )
    lines.append(
        "\nShare of the start model's responses in which a text rule holds, and its shift by the step"
        + (", and by the pilot:" if piloted else ":")
    )
    for row in result["rates"]:
        if row["step"] is None and not (piloted and row["pilot"][PLAIN][0]):
            continue
        step = f"{'unknown':>8}  {'':<18}" if row["step"] is None else _step(row, PLAIN)
        by_policy = "" if row["step"] is None or not policy else signed(row["step"][POLICY][0])
        lines.append(
            f"  {row['rule']:<16} {_percent(row['start'][0]):>6} {step}"
            + (f" {by_policy:>15}" if policy else "")
            + (f" {_piloted(row)}" if piloted else "")
        )
    never = [row["rule"] for row in result["rates"] if row["step"] is None]
    if never:
        by = "by the step" if piloted else ""
        lines.append(
            f"  Never or always shown by the start model, so not predicted{by and ' ' + by}: {', '.join(never)}."
        )
    if result["policy"]:
        lines.append(
            "\nConcepts of the policy: mean score in the start model's responses, its shift by the step of plain\n"
            "training, and how much of that the policy takes out (0 nothing, 1 all of it; below 0 it adds):"
        )
    for row in result["policy"]:
        told = _taken_out(row["taken_out"])
        by_pilot = f"; by the pilot: {_taken_out(row['pilot_taken_out'])}" if piloted else ""
        lines.append(f"  {row['concept']:<16} {row['start']:8.3f} {_step(row, PLAIN)}  {told}{by_pilot}")
    return "\n".join(lines)


def _piloted(row: Mapping[str, Any]) -> str:
    shift, low, high = row["pilot"][PLAIN]
    says = row["says"][PLAIN] or "cannot tell"
    return f"{signed(shift):>8}  {f'[{signed(low)}, {signed(high)}]':<18} {says:<11}"


def _taken_out(found: Sequence[float] | None) -> str:
    if found is None:
        return "plain training is not predicted to move it"
    share, low, high = found
    return f"taken out {share:.2f} [{low:.2f}, {high:.2f}]"


def _percent(share: float | None) -> str:
    return "n/a" if share is None else percent(share)


def _step(row: Mapping[str, Any], name: str) -> str:
    shift, low, high = row["step"][name]
    return f"{signed(shift):>8}  {f'[{signed(low)}, {signed(high)}]':<18}"
