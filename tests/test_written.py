"""Texts that rules, gates, terms and pages read are those that are trained on, under chat templates that TRL ships."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trl
from datasets import Dataset
from reading_world import build_tokenizer

from trl_anatomy import ConceptReward
from trl_anatomy.audit.row_texts import RowTexts
from trl_anatomy.reading.sft import read_sft
from trl_anatomy.reading.spans import Pairs, read_pairs
from trl_anatomy.reading.token_text import decode
from trl_anatomy.reading.written import learn_frame
from trl_anatomy.shaping.plan import PolicyPlan, plan_json, plan_report
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.settle import settle_policy

TEMPLATES = ("qwen3", "qwen2_5", "llama3_2", "gemma3", "gptoss", "deepseek_r1_distill", "glm4moe", "phi3")
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|channel|>", "<|message|>", "<|return|>", "<|call|>"]
TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Looks something up.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string", "description": "what"}}},
    },
}


def tokenizer_with(template: str) -> Any:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    return tokenizer


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calling(query: str) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "search", "arguments": {"query": query}}}
    return answer("", tool_calls=[call])


def pair(chosen: Any, rejected: Any, prompt: Any = "Translate: a cat", **more: Any) -> dict[str, Any]:
    sides = [[answer(side)] if isinstance(side, str) else side for side in (chosen, rejected)]
    return {
        "prompt": [user(prompt)] if isinstance(prompt, str) else prompt,
        "chosen": sides[0],
        "rejected": sides[1],
    } | more


def read(template: str, rows: list[dict[str, Any]], **settings: Any) -> Pairs:
    return read_pairs(Dataset.from_list(rows), tokenizer_with(template), **{"max_length": None, **settings})


def plan_of(pairs: Pairs, pattern: str, **rule: Any) -> PolicyPlan:
    policy = {
        "version": 1,
        "concepts": {"it": {"scorer": "text", "pattern": pattern}},
        "rules": [{"explain_away": "it", **rule}],
    }
    return settle_policy(ConceptPolicy.load(policy), pairs, lambda: pytest.fail("a text rule needs no model"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_text_is_what_the_message_says(template: str) -> None:
    """Whatever the template puts around it; so an anchor is the first and the last character of the answer."""
    rows = [
        pair("Sure, a cat.", "**No.**", "Translate: a cat"),
        pair("Two\n\nparts", "It is — so", [user("Why?"), answer("Because."), user("And then?")]),
    ]
    pairs = read(template, rows)
    for i, row in enumerate(rows):
        said = "\n".join(message["content"] for message in row["prompt"])
        assert pairs.texts(i) == (said, row["chosen"][0]["content"], row["rejected"][0]["content"])
        assert pairs.texts(i) == pairs.raw_texts(i)
    system = {"role": "system", "content": "Be short."}
    prompt = read(template, [pair("Sure", "No", [system, user("Why?")])]).prompt_text(0)
    assert prompt.split() == ["Be", "short.", "Why?"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_verb_reads_the_same_text(template: str) -> None:
    pairs = read(template, [pair(f"Sure, {i} fox", f"dog {i} end") for i in range(8)])
    for pattern in (r"(?m)^Sure", r"\ASure, \d fox\Z"):
        rows = {
            verb: plan_of(pairs, pattern, **{"with": verb, **more}).rules[0]["rows"]
            for verb, more in (
                ("mask_tokens", {}),
                ("shape_reward", {"strength": 1.0}),
                ("inoculate", {"instruction": "Say Sure."}),
            )
        }
        assert set(rows.values()) == {8}, (pattern, rows)
    assert plan_of(pairs, r"\ASure", **{"with": "filter_pairs", "fraction": 0.5}).rules[0]["rows"] == 4
    gate = {"with": "mask_tokens", "where": {"prompt": r"\ATranslate: a cat\Z"}}
    assert plan_of(pairs, "Sure", **gate).rules[0]["pairs"] == 8


@pytest.mark.parametrize("template", TEMPLATES)
def test_characters_belong_to_the_tokens_that_write_them(template: str) -> None:
    pairs = read(template, [pair("Sure — 😀 **cat**", "No")])
    text, bounds = pairs.response_tokens(0, "chosen")
    ids = pairs.ids(0, "chosen").tolist()
    assert text == pairs.response_text(0, "chosen") == "Sure — 😀 **cat**"
    held = np.flatnonzero(bounds[:, 1] > bounds[:, 0])
    assert decode(pairs.tokenizer, [ids[k] for k in held]).strip() == text  # and no token of the template
    assert (bounds[held][1:, 0] <= bounds[held][:-1, 1]).all()


def test_thoughts_that_a_template_deletes_are_not_read() -> None:
    """DeepSeek's template deletes them from the answer, Qwen3's from earlier turns only."""
    thought = "<think>\nWait, so\n</think>\n\nFine"
    rows = [pair(thought, "No")] * 2
    assert read("deepseek_r1_distill", rows).response_text(0, "chosen").strip() == "Fine"
    assert read("qwen3", rows).response_text(0, "chosen") == thought
    assert read("qwen2_5", rows).response_text(0, "chosen") == thought
    earlier = [pair("Sure", "No", [user("Why?"), answer(thought), user("And?")])]
    assert read("qwen3", earlier).prompt_text(0) == "Why?\nFine\nAnd?"
    assert read("qwen2_5", earlier).prompt_text(0) == f"Why?\n{thought}\nAnd?"
    assert "Wait" not in read("deepseek_r1_distill", earlier).prompt_text(0)
    plan = plan_of(read("deepseek_r1_distill", rows), "Fine|Wait", **{"with": "mask_tokens"})
    assert plan.rules[0]["raw_differs"] == 0  # the rule holds either way


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("qwen3", "<think>\na plan — so\n</think>\n\nSure"),
        ("glm4moe", "<think>a plan — so</think>\nSure"),
        ("gptoss", "a plan — so\nSure"),
        ("llama3_2", "Sure"),
    ],
)
def test_thoughts_in_fields_of_their_own_are_read_where_the_template_writes_them(template: str, text: str) -> None:
    more = dict.fromkeys(("thinking", "reasoning_content"), "a plan — so")
    none = dict.fromkeys(("thinking", "reasoning_content"))
    rows = [pair([answer("Sure", **more)], [answer("Sure", **none)])]
    if template == "gptoss":  # a key without a thought is one to this template
        rows = [pair([answer("Sure", **more)], [answer("Sure", **more)])]
    pairs = read(template, rows)
    assert pairs.response_text(0, "chosen") == text
    assert "—" not in pairs.raw_texts(0)[1]
    if template == "qwen3":
        assert pairs.response_text(0, "rejected") == "Sure"
    assert ("—" in decode(pairs.tokenizer, pairs.ids(0, "chosen").tolist())) == ("—" in text)


@pytest.mark.parametrize("template", ["qwen3", "qwen2_5", "llama3_2", "gptoss", "glm4moe"])
def test_tool_calls_are_read_as_the_template_writes_them(template: str) -> None:
    turns = [
        user("Translate: a"),
        calling("so — yes"),
        {"role": "tool", "content": "it — is"},
        answer("Yes"),
        user("More"),
    ]
    rows = [
        pair([calling("fox — cat")], [calling("dog")], "Translate: b", tools=json.dumps([TOOL])),
        pair([calling("a")], "Sure not", turns, tools=json.dumps([TOOL])),
        pair([*turns[1:3], answer("Sure it is")], "No", "Translate: c", tools=json.dumps([TOOL])),
    ]
    pairs = read(template, rows)
    for i in range(3):
        for side in ("chosen", "rejected"):
            whole, text = decode(pairs.tokenizer, pairs.ids(i, side).tolist()), pairs.response_text(i, side)
            assert text.count("—") == whole.count("—")
            assert "\\u2014" not in text + "".join(pairs.raw_texts(i))
        assert pairs.prompt_text(i).startswith("Translate: ")
        assert pairs.prompt_text(i).count("—") == decode(pairs.tokenizer, pairs.ids(i, "prompt").tolist()).count("—")
    assert "search" in pairs.response_text(0, "chosen") or template == "gptoss"
    assert pairs.response_text(1, "rejected") == "Sure not"
    assert pairs.response_text(2, "chosen").splitlines()[-1] == "Sure it is"


@pytest.mark.parametrize("template", ["qwen3", "qwen2_5", "llama3_2", "gptoss", "gemma3"])
def test_gates_see_the_messages_and_not_what_the_template_adds(template: str) -> None:
    """Also where the tools, which stand before the first message, are of each row."""
    rows = []
    for i in range(4):
        tool = json.loads(json.dumps(TOOL).replace("search", f"search_{i}"))
        rows.append(pair("Sure", "No", f"Translate: {i}" if i % 2 else f"Say: {i}", tools=json.dumps([tool])))
    pairs = read(template, rows)
    assert [pairs.prompt_text(i) for i in range(4)] == ["Say: 0", "Translate: 1", "Say: 2", "Translate: 3"]
    rule = plan_of(pairs, "Sure", **{"with": "mask_tokens", "where": {"prompt": "^Translate"}}).rules[0]
    assert (rule["pairs"], rule["rows"]) == (2, 2)


@pytest.mark.parametrize("template", ["qwen3", "llama3_2", "gptoss"])
@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_what_truncation_cuts_off_is_not_read(template: str, truncation: str) -> None:
    """The text is that part of the answer whose tokens are left, in whole characters."""
    row = pair("Sure it is — so 😀 **bold** end", "No", "Translate: a cat — now")
    whole = read(template, [row])
    full, prompt = whole.response_text(0, "chosen"), whole.prompt_text(0)
    n = len(whole.ids(0, "prompt")) + len(whole.ids(0, "chosen"))
    seen = set()
    for max_length in range(2 + n % 5, n, 5):
        try:
            pairs = read(template, [row], max_length=max_length, truncation=truncation)
        except Exception:
            assert truncation == "keep_start"
            assert max_length <= len(whole.ids(0, "prompt"))
            continue
        text = pairs.response_text(0, "chosen")
        kept = decode(pairs.tokenizer, pairs.tokens(0)[1]).strip("\ufffd")
        seen.add(text)
        if truncation == "keep_start":
            assert full.startswith(text)
            assert pairs.prompt_text(0) == prompt
            assert ("**" in text) == ("**" in kept)
        else:
            assert full.endswith(text)
            assert prompt.endswith(pairs.prompt_text(0))
            assert ("Sure" in text) == ("Sure" in kept)
        found, bounds = pairs.response_tokens(0, "chosen")
        assert found == text
        assert bounds.max(initial=0) <= len(text)
    assert len(seen) > 4


def test_rows_that_are_dropped_take_no_text_along() -> None:
    rows = [pair("Sure", "No"), pair("Sure " * 40, "No"), pair("Fine", "No")]
    pairs = read("qwen3", rows, max_length=60, truncation="drop")
    assert [pairs.response_text(i, "chosen") for i in range(len(pairs))] == ["Sure", "Fine"]


def test_the_plan_counts_pairs_whose_trained_text_differs() -> None:
    rows = [pair("Sure " * 12 + ("**bold**" if i % 2 else "plain"), "**No** it is") for i in range(6)]
    n_prompt = len(read("qwen3", rows).ids(0, "prompt"))
    pairs = read("qwen3", rows, max_length=n_prompt + 20)
    plan = plan_of(pairs, r"\*\*", **{"with": "mask_tokens"})
    assert plan.rules[0]["raw_differs"] == 3
    assert "differ in the concept in 3 pairs" in plan.rules[0]["note"]
    assert plan.rules[0]["note"] in plan_report(plan)
    assert plan_json(plan)["rules"][0]["raw_differs"] == 3
    share = plan.rules[0]["token_share"]
    assert share == plan.rules[0]["tokens"] / pairs.response_bounds[-1]
    assert f"{share:.1%}" in plan_report(plan)
    assert plan_of(read("qwen3", rows), r"\*\*", **{"with": "mask_tokens"}).rules[0]["raw_differs"] == 0


def test_a_template_is_probed_with_a_row_of_each_shape() -> None:
    """Three hundred rows of three shapes, and a fourth where a message holds parts."""
    asked: list[int] = []
    turns = [user("Why?"), answer("So."), user("And?")]
    rows = [
        {"prompt": turns[: 1 + 2 * (i % 2)], "response": [answer(f"a {i}", thinking="x" if i % 3 else None)]}
        for i in range(300)
    ]
    rows.append(
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}], "response": [answer("a")]}
    )

    def refuse(probes: list[dict[str, Any]]) -> list[None]:
        asked.append(len(probes))
        return [None] * len(probes)

    learn_frame(rows, refuse, None)
    assert sum(asked) <= 6


def test_sft_rows_and_pages_read_the_same_texts() -> None:
    thought = "<think>\nWait\n</think>\n\nFine"
    messages = [[user("Why?"), answer("Because."), user("And?"), answer(thought)] for _ in range(2)]
    rows = read_sft(Dataset.from_dict({"messages": messages}), tokenizer_with("qwen3"))
    assert rows.texts(0) == ("Why?\nBecause.\nAnd?", thought, "")
    rows = read_sft(Dataset.from_dict({"messages": messages}), tokenizer_with("deepseek_r1_distill"))
    assert "Wait" not in rows.response_text(0, "chosen")
    assert RowTexts(rows).of(1) == rows.texts(1)
    pairs = read("deepseek_r1_distill", [pair(thought, "No")])
    assert RowTexts(pairs).of(0) == pairs.texts(0)
    assert "Wait" in RowTexts(pairs.raw).of(0)[1]  # of a dataset alone, as it stands there


def test_plain_text_begins_after_its_prompt() -> None:
    """Also where the tokenizer puts the blank between the two into the first token of the response."""
    tokenizer = build_tokenizer()
    rows = [{"prompt": "Why? It ", "chosen": "is so", "rejected": "is **air**."}] * 2
    pairs = read_pairs(Dataset.from_list(rows), tokenizer, max_length=None)
    assert decode(tokenizer, pairs.ids(0, "chosen").tolist()).startswith(" ")
    assert pairs.texts(0) == ("Why? It ", "is so", "is **air**.")
    assert plan_of(pairs, r"\Ais \*\*", **{"with": "mask_tokens"}).rules[0]["rows"] == 2


@pytest.mark.parametrize(
    ("template", "opening"),
    [("qwen3", "<think>\n\n</think>\n\n"), ("gptoss", "<|channel|>final<|message|>"), ("llama3_2", "")],
)
def test_rewards_of_generated_text_have_the_same_anchors(template: str, opening: str) -> None:
    tokenizer = tokenizer_with(template)
    reward = ConceptReward(
        {
            "concepts": {"sure": {"scorer": "text", "pattern": r"\ASure"}},
            "rules": [{"explain_away": "sure", "with": "shape_reward", "strength": 1, "where": {"prompt": r"\AWhy"}}],
        },
        processing_class=tokenizer,
    )
    texts = [opening + text for text in ("Sure, yes", "Not Sure", "Sure")]
    found = reward(
        prompts=[[user("Why?")], [user("Why?")], [user("Say why")]],
        completions=[[answer(text)] for text in texts],
        completion_ids=[tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts],
    )
    assert found == [-1.0, 0.0, 0.0]
