"""SFT data against the model's own responses: what these data will teach this model, as pairs that an audit reads."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset

from ..errors import AnatomyError
from ..reading.prompts import prompt_of
from ..reading.sft import read_sft
from ..reading.storage import local, url_of
from .responses import sampled

if TYPE_CHECKING:
    from ..audit.config import AuditConfig


def against_model(config: AuditConfig, n_prompts: int, max_new_tokens: int, batch_size: int) -> AuditConfig:
    """Sample a response of the start model to prompts of SFT data, and write both as pairs beside the audit.

    `OUT.against/pairs.parquet` holds rows of the data: `chosen` is the data's response, `rejected` the model's. What
    was sampled is kept in `OUT.against/responses.json`, batch by batch: an interrupted run goes on from there.

    Args:
        config: an audit of SFT data, with a model and a folder of this machine as `out`.
        n_prompts: rows, at most, drawn with the audit's seed.
        max_new_tokens: of a sampled response. Longer ones are cut, and counted on standard error.
        batch_size: responses sampled at once.

    Returns:
        The settings of an audit of those pairs.

    Raises:
        AnatomyError: other data or settings, rows without prompts, or as `read_sft` and `sampled`.
    """
    from ..audit.run import load_dataset, load_model, load_tokenizer

    if config.data_kind != "sft" or not config.model or config.region is not None:
        raise AnatomyError("--against model goes with --data_kind sft and --model, and without --region.")
    folder = local(f"{config.out}.against")
    if url_of(folder) is not None:
        raise AnatomyError(
            f"--against model writes pairs beside the audit: give a folder of this machine, not {config.out}."
        )
    tokenizer = load_tokenizer(config.model, config)
    rows = read_sft(load_dataset(config), tokenizer, max_length=config.max_length, truncation=config.truncation)
    if "text" in rows.raw.column_names and not {"completion", "messages"} & set(rows.raw.column_names):
        raise AnatomyError("--against model asks the model the prompts of the rows, and plain text has none.")
    drawn = np.sort(np.random.default_rng(config.seed).permutation(len(rows))[:n_prompts]).tolist()
    asked: list[dict[str, Any]] = []
    for i in drawn:
        prompt, response, _ = rows.conversation(i)
        more = {name: rows.raw[int(rows.rows[i])].get(name) for name in ("tools", "chat_template_kwargs")}
        asked.append({"prompt": prompt, "chosen": response} | {name: value for name, value in more.items() if value})
    how = {"n_per_prompt": 1, "max_new_tokens": max_new_tokens, "batch_size": batch_size, "seed": config.seed}
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [prompt_of({**row, "rejected": row["chosen"]}) for row in asked]
    responses = sampled(load_model(config), tokenizer, prompts, folder / "responses.json", how)
    cut = sum(not response.finished for response in responses)
    if cut:
        print(
            f"{cut} of {len(responses)} responses of the model are cut at {max_new_tokens} tokens: read findings on "
            "length and on ends with care, or raise --max_new_tokens.",
            file=sys.stderr,
        )
    for row, response in zip(asked, responses, strict=True):
        said = str(response)
        row["rejected"] = said if isinstance(row["prompt"], str) else [{"role": "assistant", "content": said}]
    _write(Dataset.from_list(asked), folder / "pairs.parquet")
    file = str(folder / "pairs.parquet")
    config = replace(config, dataset=file, datasets=None, dataset_split="train", dataset_subset=None)
    return replace(config, data_kind="pairs")


def _write(pairs: Any, path: Path) -> None:
    """Write it whole or not at all."""
    partial = path.with_suffix(".partial")
    pairs.to_parquet(str(partial))
    partial.replace(path)
