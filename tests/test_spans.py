"""Spans are the tokens that TRL's trainers train on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from reading_world import FORMATS, build_tokenizer, dataset, rows, tiny_config, tiny_model

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.spans import Pairs, flatten_text, read_pairs, usable_rows


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(layers=1).save_pretrained(path / "causal")
    tiny_model(layers=1, head="score").save_pretrained(path / "score")
    return path


def unpadded(batch: dict[str, Any], key: str) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch[key], batch["attention_mask"], strict=True)]


def expected(pairs: Pairs) -> tuple[list[list[int]], list[list[int]], list[list[int]], list[list[int]]]:
    """Chosen sequences, rejected sequences and the completion masks of both, as the spans say."""
    tokens = [pairs.tokens(i) for i in range(len(pairs))]
    return (
        [p + c for p, c, _, _ in tokens],
        [q + r for _, _, q, r in tokens],
        [[0] * len(p) + [1] * len(c) for p, c, _, _ in tokens],
        [[0] * len(q) + [1] * len(r) for _, _, q, r in tokens],
    )


@pytest.mark.parametrize("max_length", [None, 40])
@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("kind", FORMATS)
def test_spans_are_the_batches_of_the_dpo_trainer(
    kind: str, truncation: str, max_length: int | None, model_dir: Path, tmp_path: Path
) -> None:
    from trl import DPOConfig, DPOTrainer

    if max_length is not None and kind == "tools":
        max_length = 120  # the tools alone take more than 40 tokens
    tokenizer = build_tokenizer()
    args = DPOConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=max_length,
        truncation_mode=truncation,
        per_device_eval_batch_size=3,
    )
    trainer = DPOTrainer(
        model=str(model_dir / "causal"),
        args=args,
        train_dataset=dataset(kind),
        eval_dataset=dataset(kind),
        processing_class=tokenizer,
    )
    chosen, rejected, chosen_mask, rejected_mask = [], [], [], []
    for batch in trainer.get_eval_dataloader():
        ids, masks = unpadded(batch, "input_ids"), unpadded(batch, "completion_mask")
        half = len(ids) // 2
        chosen += ids[:half]
        rejected += ids[half:]
        chosen_mask += masks[:half]
        rejected_mask += masks[half:]

    pairs = read_pairs(dataset(kind), build_tokenizer(), max_length=max_length, truncation=truncation)
    assert expected(pairs) == (chosen, rejected, chosen_mask, rejected_mask)
    assert pairs.pad_token_id == trainer.data_collator.pad_token_id
    assert np.array_equal(pairs.packed_lengths > 0, np.ones(len(pairs), bool))
    if max_length is not None:
        assert max(map(len, chosen + rejected)) == max_length  # something was cut, or the test shows nothing
        if truncation == "keep_start":
            packed = [len(p) + len(c) + len(r) for p, c, _, r in map(pairs.tokens, range(len(pairs)))]
            assert pairs.packed_lengths.tolist() == packed


@pytest.mark.parametrize("kind", FORMATS)
def test_spans_are_the_batches_of_the_reward_trainer(kind: str, model_dir: Path, tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    max_length = 150 if kind == "tools" else 60
    args = RewardConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=max_length,
        per_device_eval_batch_size=3,
    )
    trainer = RewardTrainer(
        model=str(model_dir / "score"),
        args=args,
        train_dataset=dataset(kind),
        eval_dataset=dataset(kind),
        processing_class=build_tokenizer(),
    )
    chosen, rejected = [], []
    for batch in trainer.get_eval_dataloader():
        ids = unpadded(batch, "input_ids")
        chosen += ids[: len(ids) // 2]
        rejected += ids[len(ids) // 2 :]
    pairs = read_pairs(dataset(kind), build_tokenizer(), max_length=max_length, truncation="drop")
    assert expected(pairs)[:2] == (chosen, rejected)
    assert 0 < len(pairs) < 10
    assert pairs.left_out == {"longer than max_length": 10 - len(pairs)}


def test_blank_responses_are_left_out_before_tokenisation() -> None:
    made = rows("explicit", 5)
    made[1]["chosen"] = "  \n"
    made[3]["rejected"] = None
    raw = Dataset.from_list(made)
    mask, counts = usable_rows(raw)
    assert mask.tolist() == [True, False, True, False, True]
    assert counts == {"empty response": 2}
    pairs = read_pairs(raw, build_tokenizer(), max_length=None)
    assert pairs.rows.tolist() == [0, 2, 4]
    assert pairs.left_out == {"empty response": 2}
    assert pairs.response_text(1, "rejected") == made[2]["rejected"]
    assert pairs.prompt_text(2) == made[4]["prompt"]


def test_blank_responses_of_other_formats() -> None:
    made = rows("conversational", 3)
    made[0]["chosen"][0]["content"] = " "
    assert usable_rows(Dataset.from_list(made))[0].tolist() == [False, True, True]
    implicit = [*rows("implicit", 1), {"chosen": "", "rejected": "Q"}, {"chosen": "Q ", "rejected": "Q x"}]
    assert usable_rows(Dataset.from_list(implicit))[0].tolist() == [True, False, False]


def test_texts_leave_the_shared_prompt_out() -> None:
    pairs = read_pairs(dataset("implicit", 3), build_tokenizer(), max_length=None)
    prompt, chosen, rejected = pairs.texts(0)
    assert prompt.endswith(("A:", "A: "))
    assert prompt + chosen == rows("implicit", 1)[0]["chosen"]
    assert prompt + rejected == rows("implicit", 1)[0]["rejected"]


def test_rows_that_the_prompt_fills_are_counted_and_mapped() -> None:
    pairs = read_pairs(dataset("explicit", 10), build_tokenizer(), max_length=20)
    assert pairs.left_out["prompt fills max_length"] == 10 - len(pairs) > 0
    for i, row in enumerate(pairs.rows):
        assert build_tokenizer().decode(pairs.tokens(i)[0], skip_special_tokens=True)[:5] == pairs.prompt_text(i)[:5]
        assert pairs.prompt_text(i) == rows("explicit", 10)[row]["prompt"]


def test_a_shuffled_dataset_keeps_its_own_row_numbers() -> None:
    raw = dataset("explicit", 6).add_column("row", list(range(100, 106))).shuffle(seed=1)
    pairs = read_pairs(raw, build_tokenizer(), max_length=None)
    assert pairs.rows.tolist() == list(range(6))
    assert pairs.response_text(2, "chosen") == raw[2]["chosen"]


def test_fingerprint_tells_tokens_and_truncation_apart() -> None:
    tokenizer = build_tokenizer()
    base = read_pairs(dataset(), tokenizer, max_length=60)
    assert base.fingerprint == read_pairs(dataset(), tokenizer, max_length=60).fingerprint
    assert base.fingerprint != read_pairs(dataset(), tokenizer, max_length=61).fingerprint
    assert base.fingerprint != read_pairs(dataset(), tokenizer, max_length=60, truncation="keep_end").fingerprint
    changed = rows("explicit")
    changed[4]["rejected"] += "!"
    assert base.fingerprint != read_pairs(Dataset.from_list(changed), tokenizer, max_length=60).fingerprint


def test_the_tokenizer_stays_as_it_is() -> None:
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    pairs = read_pairs(dataset(), tokenizer)
    assert tokenizer.pad_token is None
    assert pairs.pad_token_id == tokenizer.eos_token_id  # TRL pads with EOS where there is no pad token


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            {"prompt": ["a"], "response": ["b"]},
            r"no column 'chosen' and no column 'rejected' \(found: prompt, response\)",
        ),
        ({"prompt": ["a"], "chosen": [" "], "rejected": ["b"]}, "no usable row: 1 rows, 1 with an empty response"),
        ({"image": ["a"], "chosen": ["a"], "rejected": ["b"]}, "'image'"),
        ({"prompt": ["long " * 50], "chosen": ["a"], "rejected": ["b"]}, "no usable row: 1 rows, left out: 1 x prompt"),
    ],
)
def test_bad_datasets_have_their_own_error(made: dict[str, list[str]], message: str) -> None:
    with pytest.raises(AnatomyError, match=message):
        read_pairs(Dataset.from_dict(made), build_tokenizer(), max_length=8)


def test_other_bad_input() -> None:
    with pytest.raises(AnatomyError, match="keep_middle"):
        read_pairs(dataset(), build_tokenizer(), truncation="keep_middle")
    with pytest.raises(AnatomyError, match=r"datasets\.Dataset"):
        read_pairs(dataset().to_iterable_dataset(), build_tokenizer())
    plain = build_tokenizer()
    plain.chat_template = None
    with pytest.raises(AnatomyError, match="chat_template"):
        read_pairs(dataset("conversational"), plain)
    plain.eos_token = None
    with pytest.raises(AnatomyError, match="eos_token"):
        read_pairs(dataset(), plain)


def test_flatten_text_keeps_tool_calls() -> None:
    messages = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}]
    assert "look" in flatten_text(messages)


def test_tiny_world_is_what_it_says() -> None:
    assert len(build_tokenizer()) <= tiny_config("llama").vocab_size
    assert build_tokenizer()("Why?")["input_ids"][0] == build_tokenizer().bos_token_id


def test_pairs_of_one_prompt_share_a_group() -> None:
    prompts = ["tell me", "tell me now", "tell me", "now", "tell me now", "tell me"]
    data = Dataset.from_list([{"prompt": p, "chosen": f"a {i}", "rejected": "b"} for i, p in enumerate(prompts)])
    groups = read_pairs(data, build_tokenizer()).prompt_groups
    assert groups.dtype == np.int64
    alike = [[p == q for q in prompts] for p in prompts]
    np.testing.assert_array_equal(groups[:, None] == groups[None], alike)
    np.testing.assert_array_equal(groups, read_pairs(data, build_tokenizer(), max_length=13).prompt_groups)
