"""Responses of models: sampled, kept on disk, and read with the audit's SAE by the model that was audited."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import AnatomyError
from ..reading.files import write_atomically
from ..reading.storage import fetch
from .rollouts import encode_prompt, rollouts, stop_ids

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.harvest import Harvest

Prompt = str | list[dict[str, Any]]
Interval = tuple[float, float, float]


def prompts_for(audit: Audit, path: str | None, n_prompts: int, seed: int) -> list[Prompt]:
    """Prompts to sample responses to: those of a file, or of the audited dataset, without repetition.

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
    from ..reading.spans import split_row

    if path is None:
        pairs = reopen(audit).pairs
        raw, rows = pairs.raw, pairs.rows.tolist()
    else:
        raw = load_dataset(AuditConfig(dataset=path))
        if "prompt" not in raw.column_names:
            raise AnatomyError(f"{path} has no 'prompt' column (found: {', '.join(raw.column_names)}).")
        raw = raw.select_columns(["prompt"])
        rows = list(range(len(raw)))

    def prompt_of(row: int) -> Prompt:
        return split_row(raw[row])["prompt"]

    # Not the prompts themselves, which are as large as the dataset.
    unique: dict[bytes, int] = {}
    for row in rows:
        if prompt := prompt_of(row):
            unique.setdefault(hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).digest(), row)
    if not unique:
        raise AnatomyError(f"{path or audit.name} holds no prompt to sample responses to.")
    drawn = np.random.default_rng(seed).permutation(len(unique))[:n_prompts]
    kept = list(unique.values())
    return [prompt_of(kept[i]) for i in sorted(drawn)]


def name_of(model: Any) -> str:
    """What a model is called in results: its path, or the name that it was loaded by."""
    return str(model if isinstance(model, str | Path) else getattr(model, "name_or_path", type(model).__name__))


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)


def load_model(model: Any) -> Any:
    """The model at a path, in evaluation mode, on the GPU if there is one; a loaded model as it is.

    Raises:
        AnatomyError: it cannot be loaded.
    """
    if not isinstance(model, str | Path):
        return model
    import torch

    from ..audit.run import auto_class

    try:
        auto, _ = auto_class(str(model))
        loaded = auto.from_pretrained(str(model), trust_remote_code=False)
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

    model, config = load_model(before), reopen(audit).config
    if config.chat_template_path is not None:
        lengthen_embeddings(model, load_tokenizer(name_of(before), config))
    if model_fingerprint(model) != audit.info["model"]["fingerprint"]:
        raise AnatomyError(
            f"{name_of(before)} is not the model that was audited ({audit.info['model']['name']}): give that one, or "
            "audit this one."
        )
    return model


def sampled(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], file: Path, sampling: Mapping[str, int]
) -> list[str]:
    """One response to each prompt, kept on disk under a key of everything it depends on."""
    from ..reading.fingerprint import hash_json, model_fingerprint

    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]  # by tokenizer and chat template
    key = hash_json([model_fingerprint(model), list(prompts), tokens, stop_ids(model, tokenizer), dict(sampling)])
    if fetch(file, own=True):
        try:
            kept = json.loads(file.read_bytes())
        except ValueError:  # cut short by a crash: sampled again
            kept = None
        if isinstance(kept, dict) and kept.get("key") == key:
            return kept["responses"]
    responses = [group[0] for group in rollouts(model, tokenizer, prompts, **sampling)]
    kept = {"key": key, "prompts": list(prompts), "responses": responses}
    write_atomically(file, json.dumps(kept, indent=1).encode())
    return responses


def as_pairs(prompts: Sequence[Prompt], after: Sequence[str], before: Sequence[str]) -> Any:
    """A dataset of two responses to each prompt, `after` in the place of chosen and `before` in that of rejected."""
    import datasets

    def side(texts: Sequence[str]) -> list[Any]:
        if isinstance(prompts[0], str):
            return list(texts)
        return [[{"role": "assistant", "content": text}] for text in texts]

    return datasets.Dataset.from_dict({"prompt": list(prompts), "chosen": side(after), "rejected": side(before)})


def activities(read: Harvest, features: Sequence[np.ndarray], tau: float) -> list[np.ndarray]:
    """(n, K) share of each cluster's features that fire in chosen, and in rejected; read shard by shard."""
    from ..audit.views import concept_activity

    return [
        np.concatenate([concept_activity(shard.frequency(span), features, tau) for shard in read.shards()])
        for span in ("chosen", "rejected")
    ]


def means_with_intervals(values: np.ndarray, groups: np.ndarray) -> list[Interval]:
    """Mean of each column (n, K) with its 95 % interval, which takes the rows of one prompt together; NaN below two."""
    from scipy.stats import t

    from ..audit.stats import mean_test

    mean, error, _ = mean_test(values, groups)
    half = t.ppf(0.975, max(1, len(np.unique(groups)) - 1)) * error
    return list(zip(mean.tolist(), (mean - half).tolist(), (mean + half).tolist(), strict=True))


def sampled_responses(out: Path, name: str) -> list[str]:
    """The responses that `compare` sampled from "before" or a name of `after`, in the order of its prompts."""
    return json.loads((out / f"{slug(name)}.json").read_text())["responses"]
