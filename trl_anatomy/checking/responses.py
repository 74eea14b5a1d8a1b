"""Responses of models: sampled, kept on disk, and read with the audit's SAE by the model that was audited."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AnatomyError
from ..reading.files import write_atomically
from ..reading.prompts import Prompt, encode_prompt, prompt_key, prompt_of
from ..reading.spans import SAMPLED
from ..reading.storage import fetch
from ..reading.unfinished import Parts
from .rollouts import Response, rollouts, stop_ids

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..audit.levels import Levels
    from ..reading.harvest import Harvest
    from ..reading.spans import Pairs

Interval = tuple[float, float, float]
_PROMPT_COLUMNS = ("prompt", "tools", "chat_template_kwargs")


def prompts_for(audit: Audit, path: str | None, n_prompts: int, seed: int) -> list[Prompt]:
    """Prompts to sample responses to: those of a file, or of the audited dataset, without repetition.

    They bring their row's tools and `chat_template_kwargs`, by which prompts differ too. Those of the audited dataset
    also bring their tokens in training; prompts of which training cuts the beginning (`keep_end`) are left out, with a
    warning that counts them.

    Args:
        audit: the audit of the training set.
        path: a file (json lines, json, parquet) with a `prompt` column, or None for the audited dataset.
        n_prompts: at most so many, drawn with `seed`.
        seed: of the draw.

    Raises:
        AnatomyError: the file has no `prompt` column, or there is no prompt.
    """
    from ..audit.config import AuditConfig
    from ..audit.reopen import reopen
    from ..audit.run import load_dataset

    tokens: dict[int, np.ndarray] = {}
    cut: set[bytes] = set()
    if path is None:
        pairs = reopen(audit).pairs
        raw = pairs.raw.with_format(None)
        tokens = {int(row): pairs.ids(i, "prompt") for i, row in enumerate(pairs.rows)}
        lost = {int(pairs.rows[i]) for i in range(len(pairs)) if _loses_prompt(pairs, i)}
        rows = [row for row in tokens if row not in lost]
        cut = {_digest(prompt_of(raw[row])) for row in lost}
    else:
        raw = load_dataset(AuditConfig(dataset=path))
        if "prompt" not in raw.column_names:
            raise AnatomyError(f"{path} has no 'prompt' column (found: {', '.join(raw.column_names)}).")
        raw = raw.select_columns([name for name in _PROMPT_COLUMNS if name in raw.column_names])
        rows = list(range(len(raw)))
    # Not the prompts themselves, which are as large as the dataset.
    unique: dict[bytes, int] = {}
    for row in rows:
        if prompt := prompt_of(raw[row]):
            unique.setdefault(_digest(prompt), row)
    left_out = len(cut - unique.keys())
    if left_out and not unique:
        raise AnatomyError(
            f"{audit.name} holds no prompt to sample responses to: training cuts off the beginning of all (max_length "
            f"{audit.info['settings']['max_length']}); give prompts of your own, or audit and train at a greater "
            "max_length."
        )
    if left_out:
        warnings.warn(
            f"{left_out} prompts of {audit.name} are left out: training cuts off their beginning (max_length "
            f"{audit.info['settings']['max_length']}), so they are never asked whole.",
            stacklevel=2,
        )
    if not unique:
        raise AnatomyError(f"{path or audit.name} holds no prompt to sample responses to.")
    drawn = np.random.default_rng(seed).permutation(len(unique))[:n_prompts]
    kept = list(unique.values())
    return [prompt_of(raw[row], tokens.get(row)) for row in (kept[i] for i in sorted(drawn))]


def _digest(prompt: Prompt) -> bytes:
    return hashlib.sha256(prompt_key(prompt).encode()).digest()


def _loses_prompt(pairs: Pairs, i: int) -> bool:
    """Whether truncation takes tokens of the prompt of pair `i`."""
    before_chosen, _, before_rejected, _ = pairs.arrays(i)
    return min(len(before_chosen), len(before_rejected)) < len(pairs.ids(i, "prompt"))


def name_of(model: Any) -> str:
    """What a model is called in results: its path, or the name that it was loaded by."""
    return str(model if isinstance(model, str | Path) else getattr(model, "name_or_path", type(model).__name__))


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def load_model(model: Any, revision: str | None = None) -> Any:
    """The model at a path, in evaluation mode, on the GPU if there is one; a loaded model as it is.

    Args:
        model: folder or hub name, or a model.
        revision: of the model on the hub.

    Raises:
        AnatomyError: it cannot be loaded.
    """
    if not isinstance(model, str | Path):
        return model
    import torch

    from ..audit.run import auto_class

    auto, _ = auto_class(str(model), revision=revision)
    try:
        loaded = auto.from_pretrained(str(model), revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise AnatomyError(f"The model at {model} cannot be loaded: {error}") from error
    return loaded.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_audited(audit: Audit, before: Any) -> Any:
    """The start model, as `load_model` gives it, which has to be the one that was audited.

    Raises:
        AnatomyError: it is another one, or cannot be loaded.
    """
    from ..audit.reopen import reopen
    from ..audit.run import load_tokenizer
    from ..reading.fingerprint import model_fingerprint
    from ..reading.processing import lengthen_embeddings

    config = reopen(audit).config
    model = load_model(before, config.model_revision if name_of(before) == config.model else None)
    if config.chat_template_path is not None:
        lengthen_embeddings(model, load_tokenizer(name_of(before), config))
    if model_fingerprint(model) != audit.info["model"]["fingerprint"]:
        raise AnatomyError(
            f"{name_of(before)} is not the model that was audited ({audit.info['model']['name']}): give that one, or "
            "audit this one."
        )
    return model


def audited_tokenizer(audit: Audit, before: Any) -> Any:
    """What made the tokens of the audited pairs, with the clock of its template where the audit stopped it.

    Args:
        before: the audited model, beside which it is stored.

    Raises:
        AnatomyError: it cannot be loaded.
    """
    from ..audit.reopen import reopen
    from ..audit.run import load_tokenizer

    source = reopen(audit)
    return source.as_audited(load_tokenizer(name_of(before), source.config))


def sampled(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    file: Path,
    sampling: Mapping[str, int],
    *,
    known_as: str | None = None,
) -> list[Response]:
    """One response to each prompt, kept on disk with its tokens under a key of everything it depends on.

    Batches are kept as they are finished: sampling that was interrupted goes on after them.

    Args:
        known_as: hash of all that the model depends on, where that is known; default its fingerprint, which a trainer
            changes before it begins (it writes special tokens into the configuration).
    """
    from ..reading.fingerprint import hash_json, model_fingerprint

    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]  # by tokenizer and chat template
    asked = [prompt_key(prompt) for prompt in prompts]
    key = hash_json([known_as or model_fingerprint(model), asked, tokens, stop_ids(model, tokenizer), dict(sampling)])
    parts = Parts(file, key)
    if fetch(file, own=True):
        try:
            kept = json.loads(file.read_bytes())
        except ValueError:  # cut short by a crash: sampled again
            kept = None
        if isinstance(kept, dict) and kept.get("key") == key:
            parts.clear()  # of a run that was killed once the file was whole
            return _responses(kept)
    how: dict[str, Any] = {**sampling, "kept": parts}
    responses = [group[0] for group in rollouts(model, tokenizer, prompts, **how)]
    kept = {
        "key": key,
        "prompts": list(prompts),
        "tools": [getattr(prompt, "tools", None) for prompt in prompts],
        "chat_template_kwargs": [getattr(prompt, "template_kwargs", None) or None for prompt in prompts],
        "prompt_ids": tokens,
        "responses": responses,
        "response_ids": [response.ids for response in responses],
        "finished": [response.finished for response in responses],
    }
    write_atomically(file, json.dumps(kept, indent=1).encode())
    parts.clear()
    return responses


def as_pairs(prompts: Sequence[Prompt], after: Sequence[str], before: Sequence[str]) -> Any:
    """A dataset of two responses to each prompt, `after` in the place of chosen and `before` in that of rejected.

    Sampled responses (`Response`) bring their tokens and those of the prompt, which `read_pairs` then reads. Texts
    without tokens are rendered by the chat template, with the prompt's tools and as if the model had ended them.

    Raises:
        AnatomyError: some responses have tokens and some have none, or two answer other tokens in the same prompt.
    """
    import datasets
    import pyarrow as pa

    def side(texts: Sequence[str]) -> list[Any]:
        if isinstance(prompts[0], str):
            return [str(text) for text in texts]
        return [[{"role": "assistant", "content": str(text)}] for text in texts]

    plain = [str(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
    columns: dict[str, Any] = {"prompt": plain, "chosen": side(after), "rejected": side(before)}
    responses = [*after, *before]
    with_tokens = [response for response in responses if isinstance(response, Response)]
    if with_tokens and len(with_tokens) < len(responses):
        raise AnatomyError("Some responses were sampled here and some are texts alone: give all of them as one.")
    if with_tokens:
        n = len(prompts)
        chosen, rejected = with_tokens[:n], with_tokens[n:]
        if any(one.prompt_ids != other.prompt_ids for one, other in zip(chosen, rejected, strict=True)):
            raise AnatomyError("Two responses to a prompt were sampled after other tokens: sample them the same way.")
        tokens = [one.prompt_ids for one in chosen], [one.ids for one in chosen], [one.ids for one in rejected]
        columns |= {name: pa.array(ids, pa.list_(pa.int64())) for name, ids in zip(SAMPLED, tokens, strict=True)}
    for name, attribute in (("tools", "tools"), ("chat_template_kwargs", "template_kwargs")):
        values = [getattr(prompt, attribute, None) or None for prompt in prompts]
        if any(value is not None for value in values):
            columns[name] = [json.dumps(value) for value in values] if name == "tools" else [v or {} for v in values]
    return datasets.Dataset.from_dict(columns)


def written_texts(prompts: Sequence[Prompt], responses: Sequence[str], processing_class: Any) -> list[str]:
    """Texts of responses as rules read those of pairs: without what the template opens an answer with.

    Blank responses keep their own text.

    Raises:
        AnatomyError: as `as_pairs` and `read_pairs`.
    """
    from ..reading.spans import read_pairs

    texts = list(map(str, responses))
    if any(text.strip() for text in texts):
        pairs = read_pairs(as_pairs(prompts, responses, responses), processing_class, max_length=None)
        for i, row in enumerate(pairs.rows.tolist()):
            texts[row] = pairs.response_text(i, "chosen")
    return texts


def activities(read: Harvest, features: Sequence[np.ndarray], tau: float | Levels) -> list[np.ndarray]:
    """(n, K) share of each cluster's features that fire in chosen, and in rejected; read shard by shard."""
    from ..audit.views import shard_activity

    return [
        np.concatenate([shard_activity(shard, span, features, tau) for shard in read.shards()])
        for span in ("chosen", "rejected")
    ]


def means_with_intervals(values: np.ndarray, groups: np.ndarray) -> list[Interval]:
    """Mean of each column (n, K) with its 95 % interval, which takes the rows of one prompt together; NaN below two."""
    from scipy.stats import t

    from ..audit.stats import mean_test

    mean, error, _ = mean_test(values, groups)
    half = t.ppf(0.975, max(1, len(np.unique(groups)) - 1)) * error
    return list(zip(mean.tolist(), (mean - half).tolist(), (mean + half).tolist(), strict=True))


def sampled_responses(out: Path, name: str) -> list[Response]:
    """The responses that `compare` sampled from "before" or a name of `after`, in the order of its prompts."""
    return _responses(json.loads((out / f"{slug(name)}.json").read_text()))


def _responses(kept: Mapping[str, Any]) -> list[Response]:
    columns = (kept[name] for name in ("responses", "response_ids", "prompt_ids", "finished"))
    return [Response(*values) for values in zip(*columns, strict=True)]
