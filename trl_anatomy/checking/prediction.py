"""What training will change, foretold from the start model's own responses and the first step of that very training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AnatomyError
from ..reading.files import check_writable, misfit, remove_partial, without_nan, write_atomically
from ..reading.fingerprint import hash_json
from ..reading.prompts import Prompt
from ..reading.storage import fetch, local
from .rates import TEXT_RULES, Rules, rate_interval, rule_hits
from .responses import activities, as_pairs, audited_tokenizer, load_audited, name_of, sampled, written_texts

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.scorers import Scorer
    from ..reading.spans import Pairs
    from ..shaping.policy import ConceptPolicy
    from ..shaping.resolve import Loaded

PLAIN, POLICY = "plain", "policy"
FOLDER, FILE = "prediction", "prediction.json"  # in an audit's folder, unless it is told otherwise


def predict(
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
    progress: bool = True,
) -> dict[str, Any]:
    """Sample responses of the start model, take the first step of a training, and say what becomes of the responses.

    The disparity of the pairs says what they reward; whether a model can follow depends on what it does already. So the
    first step of the training (`first_step`) is carried over to the start model's own responses: those that rise come
    more often, and with them what they show. Both predictions miss different things; in trainings on real pairs the
    mean of both always held better than the disparity (benchmarks/README.md).

    Args:
        audit: audit of the training set.
        before: the audited model: a path or a loaded model. The trainers have their own.
        trainers: name -> what makes a trainer that has not begun: `PLAIN`, and maybe `POLICY` for the same with one.
        prompts: strings or conversations.
        out: folder for the sampled responses and `prediction.json`.
        policy: what the trainer `POLICY` was given; its concepts are scored in the responses and followed too.
        tokenizer: default: the one that the pairs were audited with.
        rules: name -> habit or regular expression, counted in the responses; default `TEXT_RULES`, the library's.
        n_per_prompt: responses to each prompt, an even number.
        max_new_tokens: longest response sampled, in tokens.
        batch_size: responses sampled at a time.
        seed: of sampling.
        n_pairs: rows that the steps are taken on, at most; default all.
        progress: show progress bars.

    Returns:
        What `prediction.json` holds: per concept the share of its features that fire in a response of the start model,
        the shift by disparity, by the step of each trainer with a 95 % interval over prompts, and the mean of both;
        per text rule the rate and the shift by the step; per concept of the policy its mean score, the shift by the
        steps, and how much of plain training's shift the policy takes out (0 none, 1 all), null where plain training
        is not foretold to move it. A step has no length of its own: shifts by it are scaled to the root mean square of
        the disparities, by one factor for all. Null where nothing can be told: a text rule that the start model never
        meets cannot be foretold from what it does.

    Raises:
        AnatomyError: no prompt, an odd number of responses, a model that is not the one audited, several processes.
        PolicyError: a policy whose concepts cannot be scored.

    Source: method.md section 12.
    """
    from ..audit.config import recorded
    from ..audit.predict import step_shift
    from ..reading.harvest import harvest
    from ..reading.score import score_pairs
    from ..reading.spans import read_pairs
    from ..shaping.policy import ConceptPolicy
    from ..shaping.resolve import Loaded
    from .first_step import first_step, log_prob_changes

    if not prompts:
        raise AnatomyError("predict needs at least one prompt.")
    if n_per_prompt < 2 or n_per_prompt % 2:
        raise AnatomyError(f"n_per_prompt is {n_per_prompt}; give an even number, 2 or more.")
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
    asked = [prompt for prompt in prompts for _ in range(n_per_prompt)]
    said = sampled(model, tokenizer, asked, out / "before.json", sampling)
    settings = audit.info["settings"]
    pairs = read_pairs(
        as_pairs(asked[::2], said[::2], said[1::2]),
        tokenizer,
        max_length=settings["max_length"],
        truncation="keep_start",
        pool_special_tokens=recorded(settings).pool_special_tokens,
    )
    read = harvest(
        model, sae, pairs, out / "harvest", layer=audit.info["sae"]["layer"], progress=progress, replace=True
    )
    concepts = audit.labelled(audit.concepts).to_pylist()
    features = [np.asarray(row["features"], dtype=np.int64) for row in concepts]
    activity = np.concatenate(activities(read, features, audit.tau))
    texts = written_texts(asked, said, tokenizer)
    hits = {rule: _of_pairs(found, pairs) for rule, found in rule_hits(texts, rules).items()}
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
    result = without_nan(result)
    write_atomically(out / FILE, json.dumps(result, indent=2).encode())
    return result


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
    wrong = misfit(found, {"concepts": [{"step": {PLAIN: list}, "both": {PLAIN: object}}]})
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
    """The prediction as text for a terminal: concepts by the mean of both predictions, then text rules."""
    named = list(result["concepts"][0]["step"]) if result["concepts"] else [PLAIN]
    policy = POLICY in named
    lines = [
        "Predicted shift of each concept, in the share of its features that fire in a response: by how far the pairs",
        "lean, by the first step of this training on the start model's own responses, and the mean of both:",
        f"  {'concept':<8} {'start':>6} {'by pairs':>8} {'by step':>8}  {'95 % interval':<18} {'both':>7}"
        + (f" {'by step, policy':>15}" if policy else "")
        + "  label",
    ]
    for row in sorted(result["concepts"], key=lambda row: -abs(row["both"][PLAIN] or 0.0))[:20]:
        lines.append(
            f"  {row['concept']:<8} {row['start']:6.3f} {_signed(row['disparity']):>8} {_step(row, PLAIN)}"
            f" {_signed(row['both'][PLAIN]):>7}"
            + (f" {_signed(row['step'][POLICY][0]):>15}" if policy else "")
            + f"  {row['label']}"
        )
    lines.append("\nShare of the start model's responses in which a text rule holds, and its shift by the step:")
    for row in result["rates"]:
        if row["step"] is None:
            continue
        lines.append(
            f"  {row['rule']:<16} {row['start'][0]:6.3f} {_step(row, PLAIN)}"
            + (f" {_signed(row['step'][POLICY][0]):>15}" if policy else "")
        )
    never = [row["rule"] for row in result["rates"] if row["step"] is None]
    if never:
        lines.append(f"  Never or always shown by the start model, so not predicted: {', '.join(never)}.")
    if result["policy"]:
        lines.append(
            "\nConcepts of the policy: mean score in the start model's responses, its shift by the step of plain\n"
            "training, and how much of that the policy takes out (0 nothing, 1 all of it; below 0 it adds):"
        )
    for row in result["policy"]:
        told = "plain training is not predicted to move it"
        if row["taken_out"] is not None:
            share, low, high = row["taken_out"]
            told = f"taken out {share:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"  {row['concept']:<16} {row['start']:8.3f} {_step(row, PLAIN)}  {told}")
    return "\n".join(lines)


def _step(row: Mapping[str, Any], name: str) -> str:
    shift, low, high = row["step"][name]
    return f"{_signed(shift):>8}  {f'[{_signed(low)}, {_signed(high)}]':<18}"


def _signed(value: float | None) -> str:
    return "unknown" if value is None else f"{value:+.3f}"
