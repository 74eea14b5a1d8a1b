"""Labelled text -> a concept: read once, fitted at several layers, judged on text that the fit has not seen."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from ..errors import AnatomyError
from .content import special_ids
from .copies import joined
from .fingerprint import hash_json, layer_fingerprint
from .forward import read_texts
from .locate import decoder_layers, layer_module
from .processing import text_tokenizer
from .progress import Progress
from .sae import SAE, check_sae
from .scorers import HiddenScorer
from .scorers.attention_probe import AttentionProbe
from .scorers.direction import DirectionScorer
from .scorers.features import FeaturesScorer
from .scorers.linear_probe import LinearProbe
from .scorers.metrics import best_threshold, detector_metrics
from .scorers.reft import ReftScorer
from .spans import SAMPLED, SAMPLED_RESPONSE, read_pairs

KINDS: Mapping[str, type[HiddenScorer]] = {
    "direction": DirectionScorer,
    "probe": LinearProbe,
    "attention_probe": AttentionProbe,
    "features": FeaturesScorer,
    "reft": ReftScorer,
}
TOKENS = ("response", "prompt_end")
_LEAST = 5  # examples of each label; fewer cannot be split in three
_SPANS_AT_ONCE = 64
_FEW_PROMPTS = 10  # below so many prompts, the split goes by text instead


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled token sequences.

    Attributes:
        sequences: token ids; prompt and response where there are both.
        spans: (start, stop) of the tokens that are fitted on.
        labels: (n,) bool; of pairs in turn True and False.
        groups: (n,) int64: examples of one group stay on one side of every split.
        grouped_by: "prompt" or "text".
        paired: whether the examples are pairs, one after the other.
        pad_token_id: for padding a batch.
        fingerprint: hash of all of it.
        content: (n_tokens,) bool of each span: tokens that carry text of the data, which scorers pool over.
    """

    sequences: list[list[int]]
    spans: list[tuple[int, int]]
    labels: np.ndarray
    groups: np.ndarray
    grouped_by: str
    paired: bool
    pad_token_id: int
    fingerprint: str
    content: list[np.ndarray]

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True, eq=False)
class Fitted:
    """A fitted concept.

    Attributes:
        scorer: at the recommended layer; its card holds the figures below.
        layers: a dict per layer: `layer`, `choice` (figures on the part that chooses layer and threshold) and
            `held_out` (on the part that nothing was chosen on), both as `metrics.detector_metrics` gives them. Empty
            for ``"reft"``, which has no score.
    """

    scorer: HiddenScorer
    layers: list[dict[str, Any]]


def read_examples(
    dataset: Dataset,
    tokenizer: Any,
    *,
    tokens: str = "response",
    negatives: Dataset | None = None,
    max_length: int = 1024,
) -> Examples:
    """Tokenise labelled rows as TRL tokenises them.

    Args:
        dataset: rows with `text` and `label`; with `prompt`, `response` and `label`; with `prompt` and `label` (for
            ``tokens="prompt_end"``); or pairs, whose `chosen` shows the concept and whose `rejected` does not. Prompt
            and response are text, taken as they stand, or messages, for which the chat template is used; rows that
            `persona_rows` sampled bring their tokens (`SAMPLED_RESPONSE`). A label is 1, 0, true or false.
        tokenizer: the model's tokenizer or processor.
        tokens: ``"response"``: all tokens of the response (or text; a leading BOS is left out); ``"prompt_end"``: the
            last token before the response, for concepts such as refusal that a prompt decides.
        negatives: rows of the same form for another concept: those with label 1 are added with label 0.
        max_length: tokens read of prompt and response together.

    Raises:
        AnatomyError: missing columns, a label that is no label, no usable row.
    """
    if tokens not in TOKENS:
        raise AnatomyError(f"tokens is {tokens!r}; allowed: {', '.join(TOKENS)}.")
    read = _read_rows(dataset, tokenizer, tokens, max_length)
    paired = {"chosen", "rejected"} <= set(dataset.column_names)
    if negatives is not None:
        if paired:
            raise AnatomyError("negatives go with labelled text; labelled pairs bring their own.")
        others = _read_rows(negatives, tokenizer, tokens, max_length)
        read += [row._replace(label=False) for row in others if row.label]
    sequences = [row.ids for row in read]
    spans = [row.span for row in read]
    content = [row.content for row in read]
    labels = np.array([row.label for row in read], bool)
    prompts = [row.prompt for row in read]
    by_prompt = len(set(prompts)) >= _FEW_PROMPTS  # of plain texts they are all empty; pairs may hold theirs inside
    named = prompts if by_prompt else [json.dumps(ids) for ids in sequences]
    if paired and not by_prompt:
        named = [named[i - i % 2] for i in range(len(named))]
    _, groups = np.unique(named, return_inverse=True)
    if paired:  # a pair with its sides swapped is nothing that the fit has not seen
        both = [json.dumps(sorted(sequences[i - i % 2 : i - i % 2 + 2])) for i in range(len(sequences))]
        groups = joined(groups, np.unique(both, return_inverse=True)[1])
    reader = text_tokenizer(tokenizer)
    pad = reader.eos_token_id if reader.pad_token_id is None else reader.pad_token_id
    return Examples(
        sequences=sequences,
        spans=spans,
        labels=labels,
        groups=groups.astype(np.int64),
        grouped_by="prompt" if by_prompt else "text",
        paired=paired,
        pad_token_id=pad or 0,
        fingerprint=hash_json([sequences, spans, labels.tolist(), [mask.tolist() for mask in content]]),
        content=content,
    )


class _Row(NamedTuple):
    """One sequence with the span that is fitted on; `prompt` is its prompt as text."""

    ids: list[int]
    span: tuple[int, int]
    label: bool
    prompt: str
    content: np.ndarray


def _read_rows(dataset: Dataset, tokenizer: Any, tokens: str, max_length: int) -> list[_Row]:
    """Every usable row; two for each pair."""
    columns = set(dataset.column_names)
    if {"chosen", "rejected"} <= columns:
        pairs = read_pairs(dataset, tokenizer, max_length=max_length)
        found: list[_Row] = []
        for i in range(len(pairs)):
            prompt, chosen, other, rejected = pairs.tokens(i)
            text = pairs.prompt_text(i)
            for before, response, label, side in (
                (prompt, chosen, True, "chosen"),
                (other, rejected, False, "rejected"),
            ):
                found.append(_placed(before, response, label, tokens, text, pairs.content(i, side)))
        return found
    ways = ({"text", "label"}, {"prompt", "response", "label"}, {"prompt", "label"})
    if not any(way <= columns for way in ways):
        raise AnatomyError(
            f"The dataset has the columns {', '.join(dataset.column_names) or '(none)'}; labelled text needs text and "
            "label, or prompt, response and label; labelled pairs need chosen and rejected."
        )
    labels = [_label(value, row) for row, value in enumerate(dataset["label"])]
    if "text" in columns:
        if tokens != "response":
            raise AnatomyError("tokens: prompt_end needs a column 'prompt'; the dataset has text alone.")
        reader = text_tokenizer(tokenizer)
        read = reader([str(text) for text in dataset["text"]], truncation=True, max_length=max_length)["input_ids"]
        starts = [int(len(ids) > 1 and ids[0] == reader.bos_token_id) for ids in read]
        special = special_ids(reader)
        return [
            _Row(ids, (start, len(ids)), label, "", np.array([token not in special for token in ids[start:]], bool))
            for ids, start, label in zip(read, starts, labels, strict=True)
            if len(ids) > start
        ]
    if "response" not in columns and tokens == "response":
        raise AnatomyError("The dataset has prompts without responses: set tokens to prompt_end, or add responses.")
    sides = [_row_sides(row) for row in dataset]
    pairs = read_pairs(Dataset.from_list(sides), tokenizer, max_length=max_length)
    found = []
    for i, row in enumerate(pairs.rows):
        prompt, response, _, _ = pairs.tokens(i)
        text = pairs.prompt_text(i)
        found.append(_placed(prompt, response, labels[int(row)], tokens, text, pairs.content(i, "chosen")))
    return found


def _row_sides(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with one response as a pair of two equal ones, which is the form that TRL tokenises."""
    prompt, response = row["prompt"], row.get("response", "-")
    if not isinstance(prompt, str) and isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    sides = {"prompt": prompt, "chosen": response, "rejected": response}
    if set(SAMPLED_RESPONSE) <= set(row):
        before, after = (row[name] for name in SAMPLED_RESPONSE)
        sides |= dict(zip(SAMPLED, (before, after, after), strict=True))
    return sides


def _placed(prompt: list[int], response: list[int], label: bool, tokens: str, text: str, content: np.ndarray) -> _Row:
    if tokens == "prompt_end":  # the token that decides, whatever it is
        span = (max(0, len(prompt) - 1), len(prompt))
        return _Row(prompt, span, label, text, np.ones(span[1] - span[0], bool))
    return _Row(prompt + response, (len(prompt), len(prompt) + len(response)), label, text, content)


def _label(value: Any, row: int) -> bool:
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise AnatomyError(f"Row {row} has the label {value!r}; allowed: 1, 0, true, false.")


def split_examples(labels: np.ndarray, groups: np.ndarray, held_out: float, seed: int) -> np.ndarray:
    """Part of each example: 0 to fit on, 1 to choose layer and threshold on, 2 held out.

    Groups go whole, and groups of either label alone (and those of both) are shared out apart, so that every part has
    both labels.

    Args:
        labels: (n,) bool.
        groups: (n,) int64.
        held_out: share of the examples in part 2, and again in part 1.
        seed: of the draw; no global generator is touched.

    Returns:
        (n,) int64.

    Raises:
        AnatomyError: a label with too few examples or groups.
    """
    if not 0 < held_out <= 0.4:
        raise AnatomyError(
            f"held_out is {held_out:g}; allowed: above 0, at most 0.4 (as much again chooses the layer)."
        )
    for label in (False, True):
        count = int((labels == label).sum())
        if count < _LEAST:
            raise AnatomyError(
                f"Only {count} examples are labelled {int(label)}; at least {_LEAST} of each label are needed to fit, "
                "to choose a layer and to judge."
            )
    _, group = np.unique(groups, return_inverse=True)
    size = np.bincount(group)
    share = np.bincount(group, weights=labels) / size
    part_of_group = np.zeros(len(size), np.int64)
    rng = np.random.default_rng(seed)
    for stratum in (share == 0, share == 1, (share > 0) & (share < 1)):
        members = rng.permutation(np.flatnonzero(stratum))
        if not len(members):
            continue
        n_out = max(1, round(held_out * len(members))) if len(members) > 2 else 0
        part_of_group[members[:n_out]] = 2
        part_of_group[members[n_out : 2 * n_out]] = 1
    part = part_of_group[group]
    for number, what in enumerate(("to fit on", "to choose the layer on", "held out")):
        for label in (False, True):
            if not (labels[part == number] == label).any():
                raise AnatomyError(
                    f"No example labelled {int(label)} is left {what}: too many examples share one prompt or text."
                )
    return part


def default_layers(model: nn.Module) -> list[int]:
    """All layers of a model of up to eight, else eight spread evenly, the last one left out."""
    n_layers = len(decoder_layers(model))
    if n_layers <= 8:
        return list(range(n_layers))
    return sorted({int(layer) for layer in np.linspace(n_layers / 8, n_layers - 2, 8)})


def read_hidden(
    model: nn.Module, examples: Examples, layers: Sequence[int], *, batch_tokens: int = 8192, progress: bool = True
) -> tuple[dict[int, Tensor], np.ndarray]:
    """Hidden states of the examples' spans at several layers, from one frozen pass.

    All of it is kept in the CPU's memory: tokens x width x layers, in the model's precision.

    Returns:
        layer -> (n_tokens, d_model) on the CPU in the model's dtype, the content of the spans end to end;
        (n_examples + 1,) bounds.
    """
    for layer in layers:
        layer_module(model, layer)
    lengths = [int(mask.sum()) for mask in examples.content]
    bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    kept: dict[int, Tensor] = {}
    parts = read_texts(model, examples.sequences, layers, pad_token_id=examples.pad_token_id, batch_tokens=batch_tokens)
    work = float(sum(map(len, examples.sequences)))
    with Progress(len(examples), "Reading texts", "texts", work=work, show=progress) as bar:
        for i, states in parts:
            start, stop = examples.spans[i]
            for layer, hidden in states.items():
                if layer not in kept:
                    kept[layer] = torch.empty(int(bounds[-1]), hidden.shape[1], dtype=hidden.dtype)
                kept[layer][bounds[i] : bounds[i + 1]] = hidden[start:stop].cpu()[torch.from_numpy(examples.content[i])]
            bar.update(work=len(examples.sequences[i]))
    return kept, bounds


def fit_concept(  # noqa: PLR0913
    model: nn.Module,
    examples: Examples,
    *,
    scorer: str = "probe",
    layers: Sequence[int] | None = None,
    sae: SAE | None = None,
    read: tuple[Mapping[int, Tensor], np.ndarray] | None = None,
    held_out: float = 0.2,
    seed: int = 0,
    batch_tokens: int = 8192,
    progress: bool = True,
    **settings: Any,
) -> Fitted:
    """Fit one kind of scorer at several layers, and recommend a layer and a threshold.

    The examples are split in three: one part is fitted on, one chooses the layer (largest ROC-AUC) and the threshold
    (best F1), one is held out for the figures, so that these are not flattered by the choice. ``"reft"`` chooses
    nothing: it is fitted on the responses with the concept of the first two parts, and judged by what it does to the
    surprise (mean −log π per response token) of held-out responses with and without the concept.

    Args:
        model: the frozen start model.
        examples: from `read_examples`.
        scorer: ``"direction"``, ``"probe"``, ``"attention_probe"``, ``"features"`` or ``"reft"``.
        layers: layers to try, from 0; None for `default_layers`, or the SAE's. For ``"reft"`` the layers that are
            edited together; None for all.
        sae: for ``"features"``.
        read: what `read_hidden` gave for these examples, so that one pass serves several scorers and labels.
        held_out: share of the examples held out, and again for the choice.
        seed: of the split, of the probe and of the bootstrap.
        batch_tokens: padded tokens of one forward pass.
        progress: show a progress bar.
        settings: of the scorer's `fit` (`reduce`, `per`, `lr`, ...; of ``"reft"``: `rank`, `ends`, `epochs`, ...).

    Returns:
        The scorer at the recommended layer, with its card, and the figures of every layer.

    Raises:
        AnatomyError: an unknown scorer, labels that cannot be split, an SAE that does not fit or is missing.

    Source: method.md section 9.
    """
    if scorer not in KINDS:
        raise AnatomyError(f"scorer is {scorer!r}; allowed: {', '.join(KINDS)}.")
    if (scorer == "features") != (sae is not None):
        raise AnatomyError("An SAE goes with scorer features, and only with it.")
    if scorer == "reft":
        if read is not None:
            raise AnatomyError("read goes with scorers on hidden states; an edit is fitted by running the model.")
        return _fit_reft(model, examples, layers, held_out, seed, batch_tokens, progress, settings)
    if sae is not None:
        layers = [check_sae(sae, model, layers[0] if layers and len(layers) == 1 else None)]
        settings["sae"] = sae
    elif scorer != "direction":
        settings["seed"] = seed
    if settings.get("per") == "pair" and scorer != "direction" and not examples.paired:
        raise AnatomyError("per: pair needs labelled pairs: rows with chosen and rejected.")
    tried = sorted(set(layers)) if layers else default_layers(model)
    part = split_examples(examples.labels, examples.groups, held_out, seed)
    if read is None:
        read = read_hidden(model, examples, tried, batch_tokens=batch_tokens, progress=progress)
    hidden, bounds = read

    rows: list[dict[str, Any]] = []
    fitted: dict[int, HiddenScorer] = {}
    for layer in tried:
        states, spans, labels = _part(hidden[layer], bounds, examples.labels, part == 0)
        fit: Any = KINDS[scorer]
        found = fit.fit(states, spans, labels, layer=layer, **settings)
        fitted[layer] = found
        scores = _scores(found, hidden[layer], bounds)
        chooses, judged = part == 1, part == 2
        threshold = best_threshold(scores[chooses], examples.labels[chooses])
        row: dict[str, Any] = {"layer": layer}
        for name, mask in (("choice", chooses), ("held_out", judged)):
            row[name] = detector_metrics(
                scores[mask], examples.labels[mask], threshold, groups=examples.groups[mask], seed=seed
            )
        rows.append(row)
    best = max(rows, key=lambda row: (row["choice"]["roc_auc"], row["choice"]["f1"]))
    chosen = fitted[best["layer"]]
    chosen.card |= {
        "model_fingerprint": layer_fingerprint(model, best["layer"]),
        "data_fingerprint": examples.fingerprint,
        "n_positive": int(examples.labels.sum()),
        "n_negative": int((~examples.labels).sum()),
        "split_by": examples.grouped_by,
        "settings": {key: value for key, value in settings.items() if key != "sae"} | {"held_out": held_out},
        "threshold": best["held_out"]["threshold"],
        "held_out": best["held_out"],
        "layers": rows,
    }
    return Fitted(chosen, rows)


def _fit_reft(  # noqa: PLR0913
    model: nn.Module,
    examples: Examples,
    layers: Sequence[int] | None,
    held_out: float,
    seed: int,
    batch_tokens: int,
    progress: bool,
    settings: dict[str, Any],
) -> Fitted:
    part = split_examples(examples.labels, examples.groups, held_out, seed)

    def texts(mask: np.ndarray) -> dict[str, Any]:
        members = np.flatnonzero(mask)
        return {
            "sequences": [examples.sequences[i] for i in members],
            "spans": [examples.spans[i] for i in members],
            "pad_token_id": examples.pad_token_id,
            "batch_tokens": batch_tokens,
        }

    found = ReftScorer.fit(
        model,
        **texts(examples.labels & (part != 2)),
        layers=range(len(decoder_layers(model))) if layers is None else layers,
        seed=seed,
        progress=progress,
        **settings,
    )
    judged: dict[str, Any] = {"n": int((part == 2).sum())}
    for name, mask in (("with_concept", examples.labels), ("without_concept", ~examples.labels)):
        before, after = found.nats(model, **texts(mask & (part == 2)))
        judged[name] = {"nats": before, "nats_edited": after}
    found.card |= {
        "model_fingerprint": layer_fingerprint(model, found.layer),
        "data_fingerprint": examples.fingerprint,
        "n_positive": int(examples.labels.sum()),
        "n_negative": int((~examples.labels).sum()),
        "split_by": examples.grouped_by,
        "settings": settings | {"held_out": held_out, "seed": seed},
        "held_out": judged,
    }
    return Fitted(found, [])


def fit_report(fitted: Fitted, out: Path) -> str:
    """The figures as text for a terminal: a row per layer, the recommendation, and a line for a policy."""
    card, scorer = fitted.scorer.card, fitted.scorer
    if isinstance(scorer, ReftScorer):
        return _reft_report(scorer, out)
    lines = [
        f"{card['n_positive']} examples with the concept, {card['n_negative']} without; split by {card['split_by']}; "
        f"held out: {card['held_out']['n']}.",
        "",
        f"{'layer':>5}  {'ROC-AUC to choose':>17}  {'held out: F1 (95 %)':<21}  {'ROC-AUC':<21}  PR-AUC",
    ]
    for row in fitted.layers:
        judged = row["held_out"]
        shown = [
            f"{judged[name]:.3f} ({judged[f'{name}_low']:.3f}, {judged[f'{name}_high']:.3f})"
            for name in ("f1", "roc_auc", "pr_auc")
        ]
        mark = "  <" if row["layer"] == scorer.layer else ""
        lines.append(f"{row['layer']:>5}  {row['choice']['roc_auc']:>17.3f}  {'  '.join(shown)}{mark}")
    lines += [
        "",
        f"Recommended: layer {scorer.layer}, threshold {card['threshold']:.4g}. Stored in {out}.",
        f"In a policy: {out.name}: {{scorer: {scorer.kind}, path: {out}}}",
    ]
    return "\n".join(lines) + "\n"


def _reft_report(scorer: ReftScorer, out: Path) -> str:
    card = scorer.card
    lines = [
        f"{card['n_positive']} examples with the concept, {card['n_negative']} without; split by {card['split_by']}; "
        f"held out: {card['held_out']['n']}.",
        "",
        "held-out responses      nats per token  with the edit",
    ]
    for name in ("with_concept", "without_concept"):
        judged = card["held_out"][name]
        lines.append(f"{name.replace('_', ' the '):<22}  {judged['nats']:>14.3f}  {judged['nats_edited']:>13.3f}")
    lines += [
        "",
        f"Rank {scorer.tensors['b'].shape[1]}, {len(scorer.layers)} layers. Stored in {out}.",
        f"In a policy, with steer: {out.name}: {{scorer: {scorer.kind}, path: {out}}}",
    ]
    return "\n".join(lines) + "\n"


def _part(
    hidden: Tensor, bounds: np.ndarray, labels: np.ndarray, mask: np.ndarray
) -> tuple[Tensor, list[int], np.ndarray]:
    """The spans where `mask` holds, end to end."""
    members = np.flatnonzero(mask)
    tokens = torch.cat([hidden[bounds[i] : bounds[i + 1]] for i in members])
    return tokens, [0, *np.cumsum(np.diff(bounds)[members]).tolist()], labels[mask]


def _scores(scorer: HiddenScorer, hidden: Tensor, bounds: np.ndarray) -> np.ndarray:
    """(n_spans,) float64."""
    found = []
    for start in range(0, len(bounds) - 1, _SPANS_AT_ONCE):
        ends = bounds[start : start + _SPANS_AT_ONCE + 1]
        found.append(scorer.score_spans(hidden[ends[0] : ends[-1]].float(), (ends - ends[0]).tolist()).numpy())
    return np.concatenate(found)
