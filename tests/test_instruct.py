"""Instructed prompts are those that TRL makes of the instructed rows, before the pair's own response tokens."""

from typing import Any

import pytest
from datasets import Dataset
from reading_world import FORMATS, build_tokenizer, rows

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.instruct import instructed_prompts, with_instruction
from trl_anatomy.reading.spans import read_pairs, split_row

ASK = "Use bold text, please."


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
def test_prompts_of_every_format(kind: str, bos: bool) -> None:
    tokenizer, raw = build_tokenizer(bos), rows(kind)
    if kind == "implicit":
        raw = [
            {**row, "chosen": row["chosen"].replace("A: ", "A:\n"), "rejected": row["rejected"].replace("A: ", "A:\n")}
            for row in raw
        ]
    pairs = read_pairs(Dataset.from_list(raw), tokenizer, max_length=None)
    found = instructed_prompts(pairs, [1, 4, 6], ASK)
    assert list(found) == [1, 4, 6]
    for i, prompts in found.items():
        split = dict(split_row(raw[i]))
        if isinstance(split["prompt"], str):
            split["prompt"] = f"{ASK}\n\n{split['prompt']}"
        else:
            content = split["prompt"][-1]["content"]
            split["prompt"] = [*split["prompt"][:-1], {"role": "user", "content": f"{content}\n\n{ASK}"}]
        expected = read_pairs(Dataset.from_list([split]), tokenizer, max_length=None)
        for span, prompt in zip(("chosen", "rejected"), prompts, strict=True):
            whole = [*expected.ids(0, "prompt").tolist(), *expected.ids(0, span).tolist()]
            assert prompt + pairs.ids(i, span).tolist() == whole
            assert ASK in tokenizer.decode(prompt)
            assert (prompt[0] == tokenizer.bos_token_id) == bos


def test_the_last_message_of_the_user_is_asked() -> None:
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
        {"role": "tool", "content": "42"},
    ]
    asked = with_instruction(talk, ASK)
    assert [message["content"] for message in asked[:2]] == ["Hi.", "Hello."]
    assert "".join(part["text"] for part in asked[2]["content"]) == f"Why?\n\n{ASK}"
    assert asked[3] == talk[3]
    assert talk[2]["content"] == [{"type": "text", "text": "Why?"}], "the row itself stays as it is"


def test_a_conversation_without_a_user_is_refused() -> None:
    row = {
        "prompt": [{"role": "system", "content": "Be short."}],
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    pairs = read_pairs(Dataset.from_list([row]), build_tokenizer(), max_length=None)
    with pytest.raises(AnatomyError, match="has no place: a conversation has no message of the user"):
        instructed_prompts(pairs, [0], ASK)
