"""Special tokens and what a template writes around answers are read as context, and no concept is pooled over them."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_world import chat_rows, said, trl_template
from datasets import Dataset
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.content import Marks, find_marks, special_ids
from trl_anatomy.reading.firings import token_firings
from trl_anatomy.reading.harvest import harvest
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import Pairs, read_pairs

TEMPLATES = ("qwen3", "qwen2_5", "llama3_2", "gemma3", "gptoss", "phi3")
_MARK = re.compile(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|<｜[^｜>]+｜>")


def tokenizer_of(template: str, *added: str) -> Any:
    """A tokenizer that knows the special tokens of a template that TRL ships, and `added` ones that are not special."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = trl_template(template)
    tokenizer.add_special_tokens({"extra_special_tokens": sorted(set(_MARK.findall(tokenizer.chat_template)))})
    tokenizer.add_tokens(list(added))
    return tokenizer


def text_of(tokenizer: Any, pairs: Pairs, i: int, span: str) -> str:
    """The pooled tokens of a span as text."""
    ids = {"prompt": 0, "chosen": 1, "rejected": 3}
    tokens = np.array(pairs.tokens(i)[ids[span]])
    return tokenizer.decode(tokens[pairs.content(i, span)])


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_pooled_is_the_text_of_the_messages(template: str) -> None:
    tokenizer, rows = tokenizer_of(template), chat_rows(6)
    pairs = read_pairs(Dataset.from_list(rows), tokenizer, max_length=None)
    for i, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            assert text_of(tokenizer, pairs, i, side) == row[side][0]["content"]
            assert len(pairs.ids(i, side)) > pairs.content(i, side).sum()  # there is an end, and it is left out
        assert text_of(tokenizer, pairs, i, "prompt") == row["prompt"][0]["content"]


def test_an_empty_thought_of_the_template_is_its_own_and_a_real_one_is_text() -> None:
    tokenizer = tokenizer_of("qwen3", "<think>", "</think>")
    answer = said("assistant", "Yes.")
    rows = [
        {
            "prompt": [said("user", "Why?")],
            "chosen": [answer],
            "rejected": [answer | {"reasoning_content": "Let me see."}],
        }
    ]
    pairs = read_pairs(Dataset.from_list(rows), tokenizer, max_length=None)
    assert "<think>" in tokenizer.decode(pairs.ids(0, "chosen"))
    assert text_of(tokenizer, pairs, 0, "chosen") == "Yes."
    assert text_of(tokenizer, pairs, 0, "rejected") == "Let me see.Yes."


@pytest.mark.parametrize("field", ["thinking", "reasoning_content", "content"])
@pytest.mark.parametrize("template", ["gptoss", "qwen3", "glm4moe"])
def test_the_name_of_a_channel_before_a_thought_is_not_pooled(template: str, field: str) -> None:
    tokenizer = tokenizer_of(template, "<think>", "</think>")
    answer = said("assistant", "Yes.") | {field: "Hm."}
    rows = [{"prompt": [said("user", "Why?")], "chosen": [answer], "rejected": [said("assistant", "No.")]}]
    pairs = read_pairs(Dataset.from_list(rows), tokenizer, max_length=None)
    pooled = text_of(tokenizer, pairs, 0, "chosen")
    assert "".join(pooled.replace("<think>", "").replace("</think>", "").split()) in ("Hm.Yes.", "Hm.", "Yes.")


@pytest.mark.parametrize("opens", ["<think>\n", "<think>", "Let me see: "])
def test_what_a_template_opens_for_generation_alone_takes_no_end_of_an_answer(opens: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<end>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: " + opens.replace("\n", "\\n") + "' }}{% endif %}"
    )
    pairs = read_pairs(Dataset.from_list(chat_rows(2)), tokenizer, max_length=None)
    row = chat_rows(2)[0]
    assert text_of(tokenizer, pairs, 0, "chosen").strip() == row["chosen"][0]["content"]


@pytest.mark.parametrize("template", ["qwen3", "llama3_2", "gptoss"])
def test_roles_and_ends_of_turns_within_an_answer_are_not_pooled(template: str) -> None:
    tokenizer = tokenizer_of(template)
    turns = [said("assistant", "One."), said("user", "And?"), said("assistant", "Two.")]
    rows = [{"prompt": [said("user", "Count")], "chosen": turns, "rejected": turns[:1]}]
    pairs = read_pairs(Dataset.from_list(rows), tokenizer, max_length=None)
    assert text_of(tokenizer, pairs, 0, "chosen") == "One.And?Two."


def test_a_header_is_found_within_one_span_only() -> None:
    """The last token of one span and the first of the next are no run."""
    marks = Marks(headers=((7, 8),))
    values, offsets = np.array([1, 7, 8, 7, 8, 2, 7, 8, 7]), np.array([0, 4, 6, 9])
    found = marks.content(values, offsets, response=False)
    assert found.tolist() == [True, False, False, True, True, True, False, False, True]


def test_opening_and_closing_leave_no_further_than_they_agree() -> None:
    marks = Marks(opening=(5, 6), closing=(8, 9))
    values = np.array([5, 6, 1, 8, 9, 5, 1, 9, 2, 3, 8, 9])
    offsets = np.array([0, 5, 8, 10, 12, 12])
    found = marks.content(values, offsets, response=True)
    assert found.tolist() == [False, False, True, False, False, False, True, False, True, True, False, False]
    assert marks.content(values, offsets, response=False).all()


def test_special_tokens_are_the_named_and_the_marked_ones() -> None:
    tokenizer = tokenizer_of("qwen3", "<think>")
    ids = special_ids(tokenizer)
    assert {0, 1, 2, tokenizer.convert_tokens_to_ids("<|im_end|>")} <= ids
    assert tokenizer.convert_tokens_to_ids("<think>") not in ids
    assert find_marks(build_tokenizer(bos=False)).special == {0, 2, 1}  # "<s>" is marked, though nothing names it


def test_truncation_keeps_the_marks_of_what_is_left() -> None:
    tokenizer, rows = tokenizer_of("qwen2_5"), chat_rows(6)
    whole = read_pairs(Dataset.from_list(rows), tokenizer, max_length=None)
    longest = max(len(whole.ids(i, "prompt")) for i in range(6))
    for truncation in ("keep_start", "keep_end"):
        pairs = read_pairs(Dataset.from_list(rows), tokenizer, max_length=longest + 4, truncation=truncation)
        for i in range(6):
            for side in ("chosen", "rejected"):
                part = whole.content(i, side)[pairs.kept_part(i, side)]
                np.testing.assert_array_equal(pairs.content(i, side), part)
        kept = [len(pairs.tokens(i)[1]) for i in range(6)]
        cut = [n < len(whole.ids(i, "chosen")) for i, n in enumerate(kept)]
        assert pairs.cut["chosen"].tolist() == cut
        assert any(cut) or truncation == "keep_end"


def test_an_option_pools_all_and_is_another_harvest(tmp_path: Path) -> None:
    model, sae = tiny_model(), SAE(tiny_sae("topk"))
    read = {
        pool: read_pairs(dataset("explicit", 6), build_tokenizer(), pool_special_tokens=pool) for pool in (False, True)
    }
    found = {}
    for pool, pairs in read.items():
        found[pool] = harvest(model, sae, pairs, tmp_path / str(pool), layer=1, progress=False)
        tokens = [len(pairs.tokens(i)[1]) for i in range(6)]
        assert found[pool].lengths["chosen"].tolist() == [n if pool else n - 1 for n in tokens]  # EOS
    assert read[False].fingerprint == read[True].fingerprint  # the same pairs, read by the same trainer
    assert found[False].fingerprint != found[True].fingerprint
    assert "content" not in found[True].key  # what harvests of earlier versions say
    for pool in (False, True):
        with pytest.raises(AnatomyError, match="pooled over other tokens"):
            harvest(model, sae, read[not pool], tmp_path / str(pool), layer=1, progress=False)


@pytest.mark.parametrize("said_by_card", [True, [30, 31, 40]])
def test_what_an_sae_was_not_trained_on_is_left_out(said_by_card: Any, tmp_path: Path) -> None:
    inner = tiny_sae("topk")
    inner.cfg.metadata.exclude_special_tokens = said_by_card
    pairs = read_pairs(dataset("explicit", 6), build_tokenizer(), pool_special_tokens=True)
    read = harvest(tiny_model(), SAE(inner), pairs, tmp_path, layer=1, progress=False)
    left_out = {0, 1, 2} if said_by_card is True else {30, 31, 40}
    wanted = [sum(token not in left_out for token in pairs.tokens(i)[1]) for i in range(6)]
    assert read.lengths["chosen"].tolist() == wanted


def test_a_latent_of_the_end_token_fires_nowhere_and_scores_nothing(tmp_path: Path) -> None:
    """A direction that only the end token has: without it every response scores as its text does."""
    pairs, model = read_pairs(dataset("explicit", 6), build_tokenizer()), tiny_model()
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    scorer = DirectionScorer(vector, 1, "sum")
    scores = score_pairs(pairs, {"d": scorer}, model, tokens=["d"], progress=False)
    each = scores.tokens["d"]
    for i in range(6):
        for side, found in enumerate((scores.chosen, scores.rejected)):
            start, stop = pairs.response_bounds[2 * i + side : 2 * i + side + 2]
            assert stop - start == len(pairs.tokens(i)[1 + 2 * side])  # tokens are scored one by one as before
            assert found["d"][i] == pytest.approx(float(each[start : stop - 1].sum()), abs=1e-4)
    fired = token_firings(model, SAE(tiny_sae("topk")), pairs, {0: [np.arange(64)]}, layer=1)
    for span in ("chosen", "rejected"):
        assert fired[0][span][-1].tolist() == [0.0]
        assert (fired[0][span][:-1] > 0).all()


def test_pairs_without_a_tokenizer_pool_everything() -> None:
    pairs = dataclasses.replace(
        read_pairs(dataset("explicit", 3), build_tokenizer()), tokenizer=None, processing_class=None
    )
    assert all(pairs.content(i, side).all() for i in range(3) for side in ("prompt", "chosen", "rejected"))
    assert pairs.content_key is None
