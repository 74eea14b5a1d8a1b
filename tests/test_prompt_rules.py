"""Rules on what prompts ask for: which hold, in texts, in written conversations, under templates, and as gates."""

import numpy as np
import pytest
import yaml
from chat_world import said, trl_template
from datasets import Dataset
from reading_world import build_tokenizer

from trl_anatomy import AnatomyError
from trl_anatomy.audit.prompt_rules import RULES, last_request, rules_of, rules_of_pairs
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.where import Where

HOLDS = {
    "code": ("Write a function that sorts.", "what does the @ in python do", "Fix this:\n```\nx = 1\n```"),
    "steps": ("How do I make the bed?", "Give me a recipe for soup.", "Explain it step by step."),
    "list": ("Name three rivers.", "What are some toys I can buy?", "Give me ideas for a party."),
    "creative": ("Write a haiku about rain.", "Tell me a story.", "Describe a scene in a bar."),
    "text": ("Draft an email to my boss.", "Write a review of a phone.", "Create a slogan for tea."),
    "rewriting": ("Summarize the text below.", "Translate to French: hello", "Rewrite it politely."),
    "judging": ("Classify this sentence.", "Which of the following is wet?\nA. Fire", "True or false: ice is hot."),
    "explaining": ("Why is the sky blue?", "Compare tea and coffee.", "Define entropy."),
    "fact": ("Who wrote Hamlet?", "When did it end?", "How many moons has Mars?"),
    "advice": ("Should I move?", "What do you think of it?", "Any tips for me?"),
    "maths": ("Solve 3x + 10 = 5.", "What is $x^2$?", "Prove the theorem."),
    "brevity": ("Answer in one sentence.", "Briefly, what is tea?", "Use at most 50 words."),
    "format": ("Return it as JSON.", "Make a table.", "Use bullet points."),
    "role": ("You are a pirate.", "Act as a judge.", "Pretend that it rains."),
    "personal": ("I lost my key.", "Help me with my homework", "Do you think I'm right?"),
    "harm": ("How do I kill a process?", "Is it illegal?", "They made a bomb"),
    "question": ("Is it?", 'Who said "go"?', "Tea? "),
    "short": ("Tea", "What is tea?", "one two three four five six seven eight nine ten"),
    "long": tuple("word " * n for n in (100, 101, 500)),
    "turns": (
        "Human: Hi.\n\nAssistant: Hello.\n\nHuman: Tea?",
        "User: a\nAssistant: b\nUser: c",
        "human: a\nassistant: b\nhuman: c\nassistant:",
    ),
    "language": ("Quelle est la capitale de la France et pourquoi est-elle si grande dans le monde ?",) * 3,
}
HOLDS_NOT = {
    "code": "Write a story about a functional family.",
    "steps": "How tall is it?",
    "list": "Enlist me.",
    "creative": "The storyteller left.",
    "fact": "Who is the person that wrote the book which my mother read to me when I was a small child?",
    "maths": "Sum it up.",
    "personal": "It is mineral water.",
    "harm": "A skillful weaponry-free talk about gunpowder tea.",
    "question": "Is it? I think so.",
    "short": "one two three four five six seven eight nine ten eleven",
    "long": "word " * 99,
    "turns": "Human: Hi.\n\nAssistant:",
    "language": "What is the capital of France?",
}


def test_every_rule_is_tried():
    assert set(HOLDS) == set(RULES)
    says = [rule.says for rule in RULES.values()]
    assert len(set(says)) == len(says)


@pytest.mark.parametrize("name", HOLDS)
def test_a_rule_holds_where_a_reader_would_say_so(name):
    for prompt in HOLDS[name]:
        assert name in rules_of(prompt), prompt
    if name in HOLDS_NOT:
        assert name not in rules_of(HOLDS_NOT[name])


def test_of_a_conversation_the_last_request_counts():
    talk = "Human: Name three rivers.\n\nAssistant: Rhine, Nile, Oder.\n\nHuman: Who wrote Hamlet?\n\nAssistant:"
    assert last_request(talk) == "Who wrote Hamlet?"
    assert "list" not in rules_of(talk)
    assert {"fact", "question", "short", "turns"} <= set(rules_of(talk))
    assert rules_of("") == rules_of("  \n") == rules_of("Human:") == []


ASKED = (
    [said("user", "Name three rivers.")],
    [said("system", "Be kind."), said("user", "Who wrote Hamlet?")],
    [said("user", "Tea?"), said("assistant", "Yes."), said("user", "Name two rivers.")],
)


@pytest.mark.parametrize("template", ["qwen3", "qwen2_5", "llama3_2", "gemma3", "gptoss", "deepseekv3"])
def test_under_templates_the_text_of_messages_is_read(template):
    """Neither what the template writes nor a system text is a request; messages tell how many turns there are."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = trl_template(template)
    rows = [
        {"prompt": asked, "chosen": [said("assistant", "Rhine.")], "rejected": [said("assistant", "No.")]}
        for asked in (ASKED if template != "gemma3" else (ASKED[0], ASKED[1][1:], ASKED[2]))
    ]
    pairs = read_pairs(Dataset.from_list(rows), tokenizer)
    found = rules_of_pairs(pairs)
    assert ["list" in rules for rules in found] == [True, False, True]
    assert ["question" in rules for rules in found] == [False, True, False]
    assert ["turns" in rules for rules in found] == [False, False, True]
    assert not any({"code", "format", "role", "maths", "long"} & set(rules) for rules in found)
    np.testing.assert_array_equal(Where(asks="list").mask(pairs, None), [True, False, True])
    np.testing.assert_array_equal(Where(asks="turns").mask(pairs, None), [False, False, True])
    with pytest.raises(AnatomyError, match="no pair has asks = code"):
        Where(asks="code").mask(pairs, None)


def test_a_gate_on_what_is_asked_is_read_and_misspelt_ones_are_named():
    rule = "explain_away: numbered, with: shape_reward, strength: auto, where: {asks: %s}"
    text = "version: 1\nconcepts:\n  numbered: {scorer: habit, name: numbered}\nrules:\n  - {%s}\n"
    where = ConceptPolicy.load(yaml.safe_load(text % (rule % "list"))).rules[0].where
    assert where == Where(asks="list")
    assert where.reads_prompts
    assert where.of_audit is None
    assert where.opens(["Name three rivers.", "Tea?"], {}).tolist() == [True, False]
    with pytest.raises(AnatomyError, match=r"where\.asks.*a rule on prompts: code, steps, list"):
        ConceptPolicy.load(yaml.safe_load(text % (rule % "lists")))
    with pytest.raises(AnatomyError, match="exactly one of column"):
        Where(asks="list", prompt="x")
