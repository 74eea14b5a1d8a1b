"""Rows that a model cannot read are found before its weights are loaded."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from reading_world import FAMILIES, build_tokenizer, tiny_config, tiny_model, tiny_sae
from transformers import GPTNeoConfig, LlamaConfig, OPTConfig
from trl import DPOConfig, RewardConfig

from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer, AuditConfig, run_audit
from trl_anatomy.audit.run import dry_run
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.capacity import Capacity, check_pairs_fit, check_prompts_fit
from trl_anatomy.reading.spans import Pairs, read_pairs

WORD = "sky "
TEXT = {"prompt": "Tell me a story. ", "chosen": "The sky is blue.", "rejected": "No."}


def pairs_of(*rows: dict[str, str], tokenizer: Any = None, **settings: Any) -> Pairs:
    return read_pairs(Dataset.from_list(list(rows)), tokenizer or build_tokenizer(), **settings)


def larger_tokenizer() -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    return tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("span", ["prompt", "chosen", "rejected"])
def test_an_id_beyond_the_embeddings(family: str, span: str) -> None:
    tokenizer = larger_tokenizer()
    vocab = len(build_tokenizer())
    bad = TEXT | {span: TEXT[span] + "<|im_end|>"}
    blank = TEXT | {"rejected": ""}  # left out: rows keep their numbers
    pairs = pairs_of(TEXT, blank, bad, TEXT, tokenizer=tokenizer)
    config = tiny_model(family, vocab=vocab).config if family != "gpt2" else tiny_config(family, vocab=vocab)
    with pytest.raises(
        AnatomyError, match=rf"row 2, {span}: found the token id {vocab + 1} \('<\|im_end\|>'\), but"
    ) as e:
        check_pairs_fit(pairs, config)
    assert f"embeddings for {vocab} tokens, 0 to {vocab - 1}: use the model's own tokenizer" in str(e.value)
    assert check_pairs_fit(pairs, config, grows=True) == []
    assert check_pairs_fit(pairs_of(TEXT, tokenizer=tokenizer), config) == []
    resized = tiny_model(family if family != "gpt2" else "gpt2", vocab=vocab)
    resized.resize_token_embeddings(len(tokenizer))
    assert check_pairs_fit(pairs, resized.config) == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_padding_token_that_was_added_without_an_embedding(family: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    vocab = len(build_tokenizer())
    assert tokenizer.pad_token_id == vocab
    model = tiny_model(family, vocab=vocab)
    message = rf"padding: found the token id {vocab}( \('\[PAD\]'\))?, but the model has embeddings for {vocab} tokens"
    with pytest.raises(AnatomyError, match=message):
        check_pairs_fit(pairs_of(TEXT, tokenizer=tokenizer), model.config)
    with pytest.raises(AnatomyError, match=message):
        rollouts(model, tokenizer, ["Why?", "Tell me a story"], max_new_tokens=3)
    model.resize_token_embeddings(len(tokenizer))
    assert check_pairs_fit(pairs_of(TEXT, tokenizer=tokenizer), model.config) == []
    rollouts(model, tokenizer, ["Why?", "Tell me a story"], max_new_tokens=3)


def test_an_id_that_truncation_cuts_off_does_not_count() -> None:
    tokenizer = larger_tokenizer()
    bad = TEXT | {"chosen": WORD * 20 + "<|im_end|>"}
    config = tiny_config("llama", vocab=len(build_tokenizer()))
    check_pairs_fit(pairs_of(bad, tokenizer=tokenizer, max_length=20), config)
    with pytest.raises(AnatomyError, match="row 0, chosen: found the token id"):
        check_pairs_fit(pairs_of(bad, tokenizer=tokenizer, max_length=20, truncation="keep_end"), config)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neo"])
def test_a_row_longer_than_a_table_of_positions(kind: str) -> None:
    long = TEXT | {"rejected": WORD * 30}
    length = sum(map(len, pairs_of(long).tokens(0)[2:]))  # prompt and rejected response

    def config(n: int) -> Any:
        if kind == "gpt2":
            made = tiny_config("gpt2", vocab=400)
            made.n_positions = n
            return made
        return (OPTConfig if kind == "opt" else GPTNeoConfig)(vocab_size=400, max_position_embeddings=n)

    for settings in ({}, {"truncation": "keep_end"}):
        pairs = pairs_of(TEXT, long, **settings)
        with pytest.raises(
            AnatomyError, match=rf"row 1: prompt and response are {length} tokens long, but the model has"
        ):
            check_pairs_fit(pairs, config(length - 1))
        assert check_pairs_fit(pairs, config(length)) == []
        cut = pairs_of(TEXT, long, max_length=length - 1, **settings)
        assert check_pairs_fit(cut, config(length - 1)) == []
    assert check_pairs_fit(pairs_of(TEXT, long, max_length=length - 1, truncation="drop"), config(length - 1)) == []


def test_the_table_is_where_the_forward_fails() -> None:
    model = tiny_model("gpt2")
    room = Capacity.of(model.config)
    assert (room.n_tokens, room.n_positions, room.is_table) == (330, 512, True)
    with torch.no_grad():
        model(torch.ones(1, 512, dtype=torch.long))
        with pytest.raises(IndexError):
            model(torch.ones(1, 513, dtype=torch.long))
        with pytest.raises(IndexError):
            model(torch.full((1, 3), 330))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_longer_rows_of_rotary_models_are_noted_and_run(family: str) -> None:
    model = tiny_model(family, max_position_embeddings=16)
    pairs = pairs_of(TEXT | {"chosen": "Yes."}, TEXT | {"chosen": WORD * 30})
    [note] = check_pairs_fit(pairs, model.config)
    length = sum(map(len, pairs.tokens(1)[:2]))
    assert "of 2 pairs are longer than the 16 positions that the model was trained on (row 1: prompt and" in note
    assert f"are {length} tokens long): set max_length to 16 or less, unless" in note
    with torch.no_grad():
        model(torch.tensor([[*chain(*pairs.tokens(1)[:2])]]))
    model.config.max_position_embeddings = length
    assert check_pairs_fit(pairs, model.config) == []


def test_positions_that_rope_scaling_adds_count() -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
    config = LlamaConfig(vocab_size=330, max_position_embeddings=16, rope_parameters=rope)
    assert Capacity.of(config).n_positions == 64


def test_prompts_that_a_table_has_no_room_for() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(AnatomyError, match=r"prompt 1 is 510 tokens long; with max_new_tokens 4 its response can end"):
        check_prompts_fit([[1] * 9, [1] * 510], 4, model.config)
    check_prompts_fit([[1] * 510], 3, model.config)
    rollouts(model, build_tokenizer(), [WORD * 4], max_new_tokens=3)
    with pytest.raises(AnatomyError, match="its response can end beyond the 512 positions"):
        rollouts(model, build_tokenizer(), ["Why?", WORD * 400], max_new_tokens=3)
    with pytest.raises(AnatomyError, match="prompt 0: found the token id 331, but the model has embeddings for 330"):
        rollouts(model, larger_tokenizer_of(model), ["<|im_end|>"], max_new_tokens=3)


def larger_tokenizer_of(model: Any) -> Any:
    tokenizer = build_tokenizer()
    short = model.config.vocab_size - len(tokenizer)
    tokenizer.add_tokens([f"<{i}>" for i in range(short)] + ["<|im_start|>", "<|im_end|>"])
    return tokenizer


# --- before weights are loaded ---


def folder(root: Path, family: str, tokenizer: Any, **changes: Any) -> Path:
    """A model without its weights: whoever loads them fails in another way."""
    model = tiny_model(family, **changes)
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    (root / "model.safetensors").unlink()
    return root


def audit_config(root: Path, rows: list[dict[str, str]], model: Path, **settings: Any) -> AuditConfig:
    tiny_sae("topk", hook="blocks.1.hook_resid_post").save_model(root / "sae")
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return AuditConfig(
        model=str(model), dataset=str(root / "pairs.jsonl"), sae=str(root / "sae"), out=str(root / "out"), **settings
    )


@pytest.mark.parametrize("do", [dry_run, run_audit])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_the_audit_says_so_before_it_loads_weights(do: Any, family: str, tmp_path: Path) -> None:
    bad = TEXT | {"chosen": "<|im_end|>"}
    vocab = len(build_tokenizer())
    model = folder(tmp_path / "model", family, larger_tokenizer(), vocab=vocab)
    with pytest.raises(AnatomyError, match="row 1, chosen: found the token id"):
        do(audit_config(tmp_path, [TEXT, bad] * 4, model))
    if family == "gpt2":
        with pytest.raises(AnatomyError, match=r"row 1: prompt and response are .* tokens long, but the model has 512"):
            do(audit_config(tmp_path, [TEXT, TEXT | {"chosen": WORD * 600}] * 4, model, max_length=None))


def test_a_dry_run_notes_rows_beyond_what_was_trained_on(tmp_path: Path) -> None:
    model = folder(tmp_path / "model", "llama", build_tokenizer(), max_position_embeddings=16)
    plan = dry_run(audit_config(tmp_path, [TEXT, TEXT | {"chosen": WORD * 30}] * 4, model, max_length=None))
    assert sum("longer than the 16 positions that the model was trained on (row 1:" in n for n in plan["notes"]) == 1
    cut = dry_run(audit_config(tmp_path, [TEXT, TEXT | {"chosen": WORD * 30}] * 4, model, max_length=16))
    assert not any("positions" in note for note in cut["notes"])


POLICY = {
    "version": 1,
    "concepts": {"c": {"scorer": "text", "pattern": "sky"}},
    "rules": [{"explain_away": "c", "with": "shape_reward", "strength": 1.0}],
}


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_training_with_a_policy_says_so_before_it_starts(kind: str, tmp_path: Path) -> None:
    trainer, config = (AnatomyDPOTrainer, DPOConfig) if kind == "dpo" else (AnatomyRewardTrainer, RewardConfig)
    args = config(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True, max_length=None)
    rows = [TEXT, TEXT | {"chosen": "No sky.", "rejected": WORD * 600}] * 4
    model = folder(tmp_path / "model", "gpt2", build_tokenizer())
    given = {"args": args, "train_dataset": Dataset.from_list(rows), "concept_policy": POLICY}
    with pytest.raises(AnatomyError, match=r"row 1: prompt and response are .* the model has 512 positions"):
        trainer(model=str(model), **given)
    tiny_model("llama").save_pretrained(tmp_path / "rotary")
    build_tokenizer().save_pretrained(tmp_path / "rotary")
    with pytest.warns(UserWarning, match="4 of 8 pairs are longer than the 512 positions"):
        trainer(model=str(tmp_path / "rotary"), **given)
