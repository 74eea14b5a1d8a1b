"""Rows of SFT data are the tokens that TRL's SFTTrainer trains on, parted into prompt and response."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from reading_world import build_tokenizer, rows, tiny_model

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.sft import read_rows, read_sft, sft_texts

FORMATS = ("prompt-completion", "conversations", "messages", "text")


def sft_dataset(kind: str, n: int = 10) -> Dataset:
    made: list[dict[str, Any]] = []
    for row in rows("explicit" if kind in ("prompt-completion", "text") else "conversational", n):
        prompt, answer = row["prompt"], row["chosen"]
        if kind == "messages":
            made.append({"messages": [*prompt, *answer]})
        elif kind == "text":
            made.append({"text": prompt + answer})
        else:
            made.append({"prompt": prompt, "completion": answer})
    return Dataset.from_list(made)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_model(layers=1).save_pretrained(path)
    return path


@pytest.mark.parametrize("max_length", [None, 24])
@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("kind", FORMATS)
def test_rows_are_the_examples_of_the_sft_trainer(
    kind: str, truncation: str, max_length: int | None, model_dir: Path, tmp_path: Path
) -> None:
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=max_length,
        truncation_mode=truncation,
    )
    trainer = SFTTrainer(
        model=str(model_dir), args=args, train_dataset=sft_dataset(kind), processing_class=build_tokenizer()
    )
    expected = [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]

    read = read_sft(sft_dataset(kind), build_tokenizer(), max_length=max_length, truncation=truncation)
    found = [read.tokens(i) for i in range(len(read))]
    assert all(rejected == [] for _, _, _, rejected in found)
    if kind == "messages":  # the trainer takes the prompt into its loss too, and keeps rows cut down to it
        whole = {tuple(ids) for ids, _ in expected}
        assert all(tuple(prompt + response) in whole for prompt, response, _, _ in found)
        assert len(found) + read.left_out.get("prompt fills max_length", 0) == len(expected)
    else:
        assert [prompt + response for prompt, response, _, _ in found] == [ids for ids, _ in expected]
    if kind in ("prompt-completion", "conversations"):
        masked = [sum(label == -100 for label in labels) for _, labels in expected]
        assert [len(prompt) for prompt, _, _, _ in found] == masked
    if kind == "text" and truncation == "keep_start":
        assert all(prompt == [read.bos_token_id] for prompt, _, _, _ in found)
    if max_length is not None:
        assert max(len(prompt) + len(response) for prompt, response, _, _ in found) == max_length


def test_messages_and_prompt_completion_are_the_same_rows() -> None:
    messages, pairs = (read_sft(sft_dataset(kind), build_tokenizer()) for kind in ("messages", "conversations"))
    assert messages.fingerprint == pairs.fingerprint
    assert messages.texts(3) == pairs.texts(3)
    assert np.array_equal(messages.prompt_groups, pairs.prompt_groups)


def test_rows_without_an_answer_are_left_out_and_counted() -> None:
    user, answer = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
    blank = {"role": "assistant", "content": " "}
    data = Dataset.from_list([{"messages": m} for m in ([user, answer], [user], [user, answer, user], [user, blank])])
    read = read_sft(data, build_tokenizer())
    assert read.rows.tolist() == [0]
    assert read.left_out == {"no assistant message at the end": 2, "empty response": 1}
    assert read.texts(0) == ("Why?", "Because.", "")


def test_bad_input_is_refused_in_one_sentence() -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(AnatomyError, match="'prompt' and 'completion', or 'messages', or 'text'"):
        read_sft(Dataset.from_dict({"question": ["a"]}), tokenizer)
    with pytest.raises(AnatomyError, match="leave data_kind out"):
        read_sft(Dataset.from_dict({"chosen": ["a"], "rejected": ["b"]}), tokenizer)
    with pytest.raises(AnatomyError, match="keep_start, keep_end"):
        read_sft(sft_dataset("text"), tokenizer, truncation="drop")
    with pytest.raises(AnatomyError, match="no usable row"):
        read_sft(Dataset.from_dict({"text": ["", " "]}), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(AnatomyError, match="chat_template"):
        read_sft(sft_dataset("messages"), tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(AnatomyError, match="eos_token"):
        read_sft(sft_dataset("text"), tokenizer)


def test_the_kind_of_data_decides_who_reads_it() -> None:
    read = read_rows(sft_dataset("text"), build_tokenizer(), data_kind="sft", max_length=64, truncation="keep_start")
    assert sft_texts(read.raw[0]) == ("", read.texts(0)[1])
