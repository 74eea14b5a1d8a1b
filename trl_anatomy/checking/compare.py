"""Predicted against observed: what the audit said training would change, and what it did (method.md section 7)."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..audit.number_words import percent
from ..audit.stats import split_half_reliability
from ..errors import AnatomyError, require
from ..reading.files import check_writable, remove_partial, without_nan, write_atomically
from ..reading.progress import Progress
from ..reading.prompts import Prompt, prompt_key
from ..reading.storage import local
from ..trainers.card import put_comparison
from .prediction import PLAIN
from .rates import TEXT_RULES, Rules, rate_interval, recovery, rule_hits, word_counts
from .report import PAGE, write_comparison
from .responses import (
    Interval,
    activities,
    as_pairs,
    audited_tokenizer,
    load_audited,
    load_model,
    means_with_intervals,
    name_of,
    sampled,
    slug,
    written_texts,
)

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..audit.levels import Levels
    from ..reading.harvest import Harvest
    from ..reading.spans import Pairs

# What a trained model can not be called: names of what compare writes of others.
TAKEN = ("before", "compare")
# Pairs whose likelihood is read for the baseline.
LIKELIHOOD_PAIRS = 2000
_TEXTS_AT_ONCE = 1000


def names_of(paths: Sequence[str]) -> dict[str, str]:
    """Name -> path of trained models: the last part of the path, and more of it where that would name several.

    Raises:
        AnatomyError: a path that is given twice.

    >>> names_of(["runs/a/out", "runs/b/out"])
    {'a/out': 'runs/a/out', 'b/out': 'runs/b/out'}
    """
    parts = [Path(path).resolve().parts if os.path.exists(path) else Path(path).parts for path in paths]
    twice = [path for path, of in zip(paths, parts, strict=True) if parts.count(of) > 1]
    if twice:
        raise AnatomyError(f"--after names the same model twice: {' and '.join(twice)}; name each once.")
    for n in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(of[-n:]) for of in parts]
        slugs = list(map(slug, names))
        if len(set(slugs)) == len(slugs) and not set(slugs) & set(TAKEN):
            break
    return dict(zip(names, paths, strict=True)) if parts else {}


def compare(  # noqa: PLR0913, PLR0915
    audit: Audit,
    before: Any,
    after: Mapping[str, Any],
    prompts: Sequence[Prompt],
    *,
    out: Path,
    tokenizer: Any = None,
    rules: Rules | None = None,
    max_new_tokens: int = 256,
    batch_size: int = 64,
    seed: int = 0,
    prediction: Mapping[str, Any] | None = None,
    likelihood: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Sample responses of the start model and of trained models, read both with the audit's SAE, and compare.

    The responses are read by the start model, as the audit's pairs were: for each prompt the trained model's response
    takes the place of chosen and the start model's that of rejected, so observed and predicted shifts have one unit.
    The model card of a trained model that has a section on its audit or policy gets what was observed.

    Args:
        audit: audit of the training set.
        before: the audited model: a path or a loaded model.
        after: name -> trained model (path or loaded); recovery of the others is counted against the first.
        prompts: strings or conversations; one response of each model to each, so repeat them for more.
        out: folder for the sampled responses, `compare.json` and its page `compare.html`.
        tokenizer: default: the one that the pairs were audited with.
        rules: name -> habit or regular expression, counted in the responses; default `TEXT_RULES`, the library's.
        max_new_tokens: longest response sampled, in tokens.
        batch_size: responses sampled at a time.
        seed: of sampling and resampling.
        prediction: what `predict` said before training (`prediction.load_prediction`); None where it was not asked.
        likelihood: read how likely the start model finds the audited pairs (at most `LIKELIHOOD_PAIRS`), for a baseline
            by it. That takes longer than all else where few responses are sampled; it is kept in the audit folder.
        progress: show progress bars.

    Returns:
        What `compare.json` holds: per concept the predicted and observed shifts; per trained model how well they agree
        (R² and rank correlation with intervals, a permutation p-value, the noise floor of the responses, and of
        responses and pairs, from split prompts, the same for size-matched random clusters, the prompt-conditioned view
        by `prompt_shift.prompt_view_agreement`, R² of the two other predictions, which read the start model's
        responses too: its tilt, and the pairs' change of log-odds from its rates; with `prediction` R² of the first
        step of training, of the mean of that and the disparity, and of its pilot; and R² of what cheap measures
        predict: length, text rules, and with `likelihood` that under the start model; None for the last two if the
        audited dataset is not to be found); per text rule the rates before and after with intervals, and recovery;
        words per response with an interval.

    Raises:
        AnatomyError: no prompt, no trained model, names that cannot be distinguished from each other or from what
            else is written, a model that cannot be loaded or is not the one audited.
    """
    require("plotly")
    from ..audit.config import recorded
    from ..audit.predict import agreement
    from ..audit.reopen import reopen
    from ..reading.harvest import harvest
    from ..reading.spans import read_pairs
    from .prompt_shift import prompt_view_agreement

    if not prompts:
        raise AnatomyError("compare needs at least one prompt.")
    if not after:
        raise AnatomyError("compare needs at least one trained model.")
    slugs = list(map(slug, after))
    for name, written in zip(after, slugs, strict=True):
        if written in ("", *TAKEN) or slugs.count(written) > 1:
            raise AnatomyError(
                f"compare would write what it reads of the trained model {name!r} over something else: call it by "
                f"another name than {', '.join(TAKEN)} and than the other models."
            )
    audit.check_harvest()
    start_model = load_audited(audit, before)
    sae = audit.load_sae(next(start_model.parameters()).device)
    if tokenizer is None:
        tokenizer = audited_tokenizer(audit, before)
    check_writable(out := local(out))
    remove_partial(out)
    sampling = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": seed}
    prompt_of = np.unique([prompt_key(prompt) for prompt in prompts], return_inverse=True)[1]
    responses: dict[str, Sequence[str]] = {
        "before": sampled(start_model, tokenizer, prompts, out / "before.json", sampling)
    }
    for name, model in after.items():
        responses[name] = sampled(load_model(model), tokenizer, prompts, out / f"{slug(name)}.json", sampling)

    settings, concepts = audit.info["settings"], audit.labelled(audit.concepts).to_pylist()
    tau = audit.tau
    features = [np.asarray(row["features"], dtype=np.int64) for row in concepts]
    predicted = np.array([row["predicted"] for row in concepts], dtype=np.float64)
    fired = [fired_counts(audit.harvest, side, tau) for side in ("chosen", "rejected")]
    control = _random_features(audit.harvest, features, tau, seed)
    control_predicted = _mean_disparity(audit.harvest, control, tau)
    disparity, _ = audit.disparity()
    pairs_ceiling = split_half_reliability(disparity, seed, audit.pairs["prompt_group"].to_numpy())
    rules = TEXT_RULES if rules is None else rules
    try:
        audited = reopen(audit).pairs
    except AnatomyError:  # in memory, or not there any more: only two baselines need the pairs
        audited = None
    baselines = cheap_predictions(
        audit, audited, start_model if likelihood else None, rules, seed=seed, progress=progress
    )
    if not likelihood:
        del baselines["likelihood"]
    observed: dict[str, np.ndarray] = {}
    seen: dict[str, list[Interval]] = {}
    agreements: dict[str, dict[str, Any]] = {}
    for name in after:
        pairs = read_pairs(
            as_pairs(prompts, responses[name], responses["before"]),
            tokenizer,
            max_length=settings["max_length"],
            truncation="keep_start",
            pool_special_tokens=recorded(settings).pool_special_tokens,
        )
        read = harvest(
            start_model,
            sae,
            pairs,
            out / f"harvest-{slug(name)}",
            layer=audit.info["sae"]["layer"],
            progress=progress,
            replace=True,  # of other responses, as the files of responses are
        )
        trained, start = activities(read, features, tau)
        observed[name] = trained - start
        seen[name] = means_with_intervals(observed[name], pairs.prompt_groups)
        shift = observed[name].mean(axis=0)
        control_shift = np.subtract(*activities(read, control, tau)).mean(axis=0)
        agreements[name] = {
            **agreement(predicted, shift, seed=seed).to_dict(),
            "noise_ceiling_r2": (ceiling := split_half_reliability(observed[name], seed, pairs.prompt_groups)),
            "noise_ceiling_both_r2": _product(ceiling, pairs_ceiling),
            "random_clusters_r2": agreement(control_predicted, control_shift, seed=seed).to_dict()["r2"],
            "tilt_r2": _by_start_model(
                partial(_tilted, disparity, start, pairs.prompt_groups), observed[name], pairs.prompt_groups
            ),
            "odds_r2": _by_start_model(
                partial(_by_odds, fired, audit.harvest.n_pairs, read, features, tau),
                observed[name],
                pairs.prompt_groups,
            ),
            **_foretold(prediction, np.array(seen[name], dtype=np.float64)),
            "baselines_r2": {
                measure: None
                if told is None
                else agreement(told, shift, n_bootstrap=1, n_permutations=1).to_dict()["r2"]
                for measure, told in baselines.items()
            },
            "prompt_view": prompt_view_agreement(audit, read, pairs.prompt_groups, seed=seed),
            "n_prompts": len(np.unique(pairs.prompt_groups)),
            "n_responses": len(pairs),
            "left_out": pairs.left_out,
        }

    texts = {name: written_texts(prompts, said, tokenizer) for name, said in responses.items()}
    result: dict[str, Any] = {
        "audit": audit.name,
        "before": name_of(before),
        "after": {name: name_of(model) for name, model in after.items()},
        "sampling": {**sampling, "n_prompts": len(np.unique(prompt_of)), "n_responses": len(prompts)},
        "concepts": [
            {
                "concept": row["concept"],
                "label": row["label"],
                "verdict": row["verdict"],
                "predicted": row["predicted"],
                "ci_low": row["ci_low"],
                "ci_high": row["ci_high"],
                "observed": {name: shifts[k] for name, shifts in seen.items()},
            }
            for k, row in enumerate(concepts)
        ],
        "agreement": agreements,
        "rates": _rates(texts, list(after), rules, prompt_of),
        "words": {name: means_with_intervals(word_counts(said)[:, None], prompt_of)[0] for name, said in texts.items()},
    }
    result = without_nan(result)
    write_atomically(out / "compare.json", json.dumps(result, indent=2).encode())
    write_comparison(result, out / PAGE)
    for name, model in after.items():
        if isinstance(model, str | Path):
            put_comparison(Path(model) / "README.md", result, name)
    return result


def _foretold(prediction: Mapping[str, Any] | None, observed: np.ndarray) -> dict[str, float | None]:
    """R² of what `predict` said: by the first step, the mean of that and the disparity, and a pilot; {} without it.

    `pilot_coverage` is the share of observed shifts inside the pilot's 95 % intervals, once these are widened by the
    noise of what was observed; of `pilot_said` concepts it said that there will be more or less, and `pilot_right` of
    them went that way. All are absent without a pilot.
    The start model's responses were drawn anew for it, so that it shares no noise with what was observed.

    Args:
        observed: (K, 3) shift of each concept, with its 95 % interval.
    """
    from ..audit.predict import agreement

    if prediction is None:
        return {}
    rows, shift = prediction["concepts"], observed[:, 0]
    told = {"step_r2": [row["step"][PLAIN][0] for row in rows], "both_r2": [row["both"][PLAIN] for row in rows]}
    by_pilot = np.array([row["pilot"][PLAIN] for row in rows] if "pilots" in prediction else [], dtype=np.float64)
    if len(by_pilot):
        told["pilot_r2"] = by_pilot[:, 0].tolist()
    found = {
        name: agreement(np.array(values, dtype=np.float64), shift, n_bootstrap=1, n_permutations=1).to_dict()["r2"]
        for name, values in told.items()
    }
    if len(by_pilot):
        half = np.hypot((by_pilot[:, 2] - by_pilot[:, 1]) / 2, (observed[:, 2] - observed[:, 1]) / 2)
        found["pilot_coverage"] = float(np.mean(np.abs(shift - by_pilot[:, 0]) <= half))
        told_of = np.array([row["says"][PLAIN] is not None for row in rows])
        found["pilot_said"] = int(told_of.sum())
        found["pilot_right"] = int((by_pilot[:, 0] * shift > 0)[told_of].sum())
    return found


def cheap_predictions(
    audit: Audit,
    pairs: Pairs | None,
    start_model: Any,
    rules: Rules,
    *,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, np.ndarray | None]:
    """What could be predicted without an SAE: the part of each disparity that a cheap measure of the pairs explains.

    Args:
        audit: audit of the pairs.
        pairs: the audited pairs; None where they are not at hand.
        start_model: the audited model; None reads no likelihood.
        rules: name -> habit or regular expression, looked for in the responses.
        seed: of the draw of pairs whose likelihood is read, at most `LIKELIHOOD_PAIRS`.
        progress: show a progress bar.

    Returns:
        "length" (log ratio of tokens), "text rules" (all together) and "likelihood" (mean log-likelihood per token
        under the start model) -> (K,) predicted shifts; None for the last two without pairs, and for the last without a
        model.
    """
    from ..audit.predict import explained_shift
    from .likelihood import log_likelihoods

    u = audit.activity.u
    found: dict[str, np.ndarray | None] = {
        "length": explained_shift(u, audit.activity.log_ratio[:, None]),
        "text rules": None,
        "likelihood": None,
    }
    if pairs is None:
        return found
    if rules:
        gaps = np.empty((len(pairs), len(rules)))
        with Progress(len(pairs), "Counting text rules", "pairs", show=progress) as bar:
            for start in range(0, len(pairs), _TEXTS_AT_ONCE):
                some = range(start, min(start + _TEXTS_AT_ONCE, len(pairs)))
                sides = ([pairs.response_text(i, side) for i in some] for side in ("chosen", "rejected"))
                hits = [rule_hits(texts, rules) for texts in sides]
                for k, rule in enumerate(rules):
                    gaps[start : some.stop, k] = hits[0][rule].astype(np.float64) - hits[1][rule]
                bar.update(len(some))
        found["text rules"] = explained_shift(u, gaps)
    if start_model is None:
        return found
    drawn = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:LIKELIHOOD_PAIRS])
    likelihood = log_likelihoods(start_model, pairs, drawn.tolist(), cache_dir=audit.path / "scores", progress=progress)
    found["likelihood"] = explained_shift(u[drawn], likelihood[:, :1] - likelihood[:, 1:])
    return found


def comparison_report(result: Mapping[str, Any]) -> str:
    """The comparison as text for a terminal: concepts by predicted shift, agreement, rates by text rule."""
    from ..audit.findings import MIN_PROMPTS, too_few

    names, n_prompts = list(result["after"]), result["sampling"]["n_prompts"]
    lines = [too_few(n_prompts)] if n_prompts < MIN_PROMPTS else []
    lines += ["Predicted and observed shift of each concept, in the share of its features that fire in a response:"]
    lines.append(f"  {'concept':<8} {'predicted':>9}  " + "  ".join(f"{name[:22]:>22}" for name in names) + "  label")
    for row in sorted(result["concepts"], key=lambda row: -abs(row["predicted"]))[:20]:
        seen = (row["observed"][name] for name in names)
        shifts = "  ".join(f"{mean:+6.3f} {_between(low, high)}"[:22].rjust(22) for mean, low, high in seen)
        lines.append(f"  {row['concept']:<8} {row['predicted']:+9.3f}  {shifts}  {row['label']}")
    for name, figures in result["agreement"].items():
        if figures["r2"] is None:
            lines.append(f"\n{name}: too few concepts ({figures['n']}) to say how well the prediction holds.")
            continue
        lines.append(
            f"\n{name}: R² {figures['r2']:.2f} [{figures['r2_low']:.2f}, {figures['r2_high']:.2f}],"
            f" rank correlation {figures['spearman']:.2f}, permutation p {figures['p']:.2g}, {figures['n']} concepts;"
            f" at most {_shown(figures['noise_ceiling_r2'])} can be seen with {responses_told(figures)};"
            f" random clusters of the same sizes: {_shown(figures['random_clusters_r2'])};"
            f" predicted from the start model's responses too, by log-odds: {_shown(figures['odds_r2'])},"
            f" by tilting them: {_shown(figures['tilt_r2'])};"
            + (
                f" by the first step of training: {_shown(figures['step_r2'])}, by the mean of it and the disparity:"
                f" {_shown(figures['both_r2'])};"
                if "step_r2" in figures
                else ""
            )
            + (
                f" by the pilot: {_shown(figures['pilot_r2'])}, whose 95 % intervals hold"
                f" {percent(figures['pilot_coverage'])} of the shifts, and which is right on the direction of"
                f" {figures['pilot_right']} of the {figures['pilot_said']} concepts that it tells;"
                if "pilot_r2" in figures
                else ""
            )
            + " by cheap measures: "
            + ", ".join(f"{measure} {_shown(r2)}" for measure, r2 in figures["baselines_r2"].items())
            + "."
        )
        lines.append(f"{name}, by what is asked: {prompt_view_told(figures['prompt_view'])}")
    lines.append("\nShare of responses in which a text rule holds:")
    lines.append(f"  {'rule':<16} {'before':>7} " + " ".join(f"{name[:14]:>14}" for name in names))
    for row in result["rates"]:
        if max(row["rates"][name][0] for name in row["rates"]) == 0:
            continue
        shown = [f"{row['rates'][names[0]][0]:14.3f}"]
        for name in names[1:]:
            back = row["recovery"][name]
            shown.append(
                f"{row['rates'][name][0]:.3f} ({back:4.0%})" if back is not None else f"{row['rates'][name][0]:.3f}"
            )
        lines.append(
            f"  {row['rule']:<16} {row['rates']['before'][0]:7.3f} " + " ".join(f"{cell:>14}" for cell in shown)
        )
    if len(names) > 1:
        lines.append(f"  (in brackets: share of the way back from {names[0]} to before)")
    words = ", ".join(f"{name} {interval[0]:.1f}" for name, interval in result["words"].items())
    lines.append(f"Words per response: {words}.")
    return "\n".join(lines)


def responses_told(figures: Mapping[str, Any]) -> str:
    """How many responses to how many prompts; for one to each the prompts alone say it.

    >>> responses_told({"n_prompts": 10, "n_responses": 10}), responses_told({"n_prompts": 10, "n_responses": 40})
    ('10 prompts', '40 responses to 10 prompts')
    """
    prompts = f"{figures['n_prompts']:,} prompts"
    same = figures["n_responses"] == figures["n_prompts"]
    return prompts if same else f"{figures['n_responses']:,} responses to {prompts}"


def prompt_view_told(view: Mapping[str, Any]) -> str:
    """The agreement of the prompt-conditioned view (`prompt_shift.prompt_view_agreement`) as a sentence."""
    if view["reason"] is not None:
        return f"unknown, {view['reason']}."
    told = []
    for name, cells in (("reported", "reported hypotheses"), ("tested", "tested ones")):
        here, beyond = view["inside"][name], view["difference"][name]
        told.append(
            f"over {here['n']} {cells} R² {_shown(here['r2'])} (at most {_shown(here['noise_ceiling_r2'])} can be seen;"
            f" without knowing the prompt {_shown(here['without_context_r2'])}), of what the prompt adds"
            f" {_shown(beyond['r2'])} (at most {_shown(beyond['noise_ceiling_r2'])})"
        )
    return (
        f"{'; '.join(told)}. {view['n_contexts_seen']} of {view['n_contexts']} prompt contexts were seen, each in"
        f" {view['prompts_per_context']:.0f} prompts (median)."
    )


def _product(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


def _between(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{low:+.3f},{high:+.3f}]"


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def _mean_disparity(read: Harvest, features: Sequence[np.ndarray], tau: float | Levels) -> np.ndarray:
    """(K,): share of each cluster's features that fire in chosen, minus the same for rejected; mean over pairs."""
    from ..audit.views import shard_activity

    total = np.zeros(len(features))
    for shard in read.shards():
        chosen, rejected = (shard_activity(shard, span, features, tau) for span in ("chosen", "rejected"))
        total += (chosen - rejected).sum(axis=0)
    return total / max(1, read.n_pairs)


def _random_features(read: Harvest, features: Sequence[np.ndarray], tau: float | Levels, seed: int) -> list[np.ndarray]:
    """Clusters of the same sizes, drawn from the latents that fire in some response: a control."""
    from ..audit.levels import shard_firing

    fires = np.zeros(read.d_sae, dtype=bool)
    for shard in read.shards():
        for span in ("chosen", "rejected"):
            frequency, fired = shard_firing(shard, span, tau)
            fires[frequency.indices[fired > 0]] = True
    live, rng = np.flatnonzero(fires), np.random.default_rng(seed)
    return [rng.choice(live, size=min(len(cluster), len(live)), replace=False) for cluster in features]


def _tilted(u: np.ndarray, start: np.ndarray, prompt_groups: np.ndarray, rows: np.ndarray) -> np.ndarray:
    from ..audit.predict import tilted_shift

    return tilted_shift(u, start[rows], prompt_groups[rows])


def _by_odds(
    fired: Sequence[np.ndarray],
    n_pairs: int,
    rollouts: Harvest,
    features: Sequence[np.ndarray],
    tau: float | Levels,
    rows: np.ndarray,
) -> np.ndarray:
    """(K,) shift by log-odds; `fired` are the counts of chosen and of rejected, which are the same for all models."""
    from ..audit.predict import concept_means, odds_shift

    chosen, rejected = fired
    start = fired_counts(rollouts, "rejected", tau, rows) / rows.sum()
    return concept_means(odds_shift(chosen, rejected, n_pairs, start), features)


def _by_start_model(
    predict: Callable[[np.ndarray], np.ndarray], shift: np.ndarray, prompt_groups: np.ndarray
) -> float | None:
    """R² of a prediction that reads the start model's own responses.

    Prediction and observed shift come from different prompts, since both hold the start model's mean and would share
    its noise: half the prompts predict the other half, both ways, and the mean is given. None below three concepts.

    Args:
        predict: (n,) bool, the responses of the start model that may be read -> (K,) predicted shift.
        shift: (n, K) observed, response by response.
    """
    from ..audit.predict import agreement

    half = np.unique(prompt_groups, return_inverse=True)[1] % 2 == 0
    found = []
    for told, seen in ((half, ~half), (~half, half)):
        if not told.any() or not seen.any():
            return None
        found.append(agreement(predict(told), shift[seen].mean(axis=0), n_bootstrap=1, n_permutations=1).r2)
    return None if np.isnan(found).any() else float(np.mean(found))


def fired_counts(read: Harvest, span: str, tau: float | Levels, rows: np.ndarray | None = None) -> np.ndarray:
    """(d_sae,) responses in which each latent fires, as concepts count it; of `rows` (n,) bool, by default all."""
    from ..audit.levels import shard_firing

    found, start = np.zeros(read.d_sae), 0
    for shard in read.shards():
        n = len(shard.rows)
        if rows is not None:
            shard, start = shard.select(np.flatnonzero(rows[start : start + n])), start + n
        frequency, fires = shard_firing(shard, span, tau)
        found += np.bincount(frequency.indices, fires, read.d_sae)
    return found


def _rates(
    responses: Mapping[str, Sequence[str]], after: Sequence[str], rules: Rules, groups: np.ndarray
) -> list[dict[str, Any]]:
    hits = {name: rule_hits(texts, rules) for name, texts in responses.items()}
    rows = []
    for rule in rules:
        rates = {name: rate_interval(found[rule], groups=groups) for name, found in hits.items()}
        start, plain = rates["before"][0], rates[after[0]][0]
        back = {name: recovery(start, plain, rates[name][0]) for name in after[1:]}
        rows.append(
            {
                "rule": rule,
                "rates": rates,
                "recovery": {name: None if np.isnan(value) else value for name, value in back.items()},
            }
        )
    return rows
