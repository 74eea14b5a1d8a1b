"""What groups of prompts are called: words that set them apart at their length, and a typical prompt."""

import numpy as np
import pytest
from scipy import sparse

from trl_anatomy.audit.labels import prompt_names, quoted

FILLERS = ["river", "stone", "window", "garden", "letter", "table", "paper", "winter", "street", "music", "friend"]


def filler(rng, n):
    return " ".join(rng.choice(FILLERS, n))


def recipes(rng, inside):
    n = rng.integers(1, 9)
    return f"Give me a recipe for a pie with {filler(rng, n)}." if inside else f"Tell me of {filler(rng, n + 3)}."


def transcripts(rng, inside):
    asked = "Which visa do I need?" if inside else f"What of the {filler(rng, 2)}?"
    return (
        f"Human: Hello {filler(rng, rng.integers(1, 9))}.\n\nAssistant: Hi, what is it?\n\nHuman: {asked}\n\nAssistant:"
    )


def chinese(rng, inside):
    signs = "".join(rng.choice(list("山水火木金土人口"), rng.integers(4, 14)))
    return f"{signs[:3]}月亮{signs[3:]}" if inside else signs


@pytest.mark.parametrize(
    ("kind", "word", "in_quote"),
    [(recipes, "recipe", "recipe"), (transcripts, "visa", "Which visa do I need?"), (chinese, "月亮", "月亮")],
)
def test_a_group_is_called_by_what_its_prompts_are_about(kind, word, in_quote):
    rng = np.random.default_rng(0)
    inside = np.arange(200) % 4 == 0
    prompts = [kind(rng, held) for held in inside]
    by_chance = rng.random(200) < 0.25
    members = sparse.csr_array(np.stack([inside, by_chance]).astype(float))
    topic, chance = prompt_names(prompts, members)
    assert word in topic.words
    assert in_quote in topic.example
    assert not {"human", "assistant"} & {*topic.words, *chance.words}
    assert chance.words == []  # nothing sets it apart, so nothing is said
    assert chance.example
    assert topic.prompts == len({prompts[i] for i in np.flatnonzero(inside)})


def test_long_prompts_are_not_called_by_common_words():
    """What every long prompt holds names none of them: alone, the share that holds a word would."""
    rng = np.random.default_rng(1)
    length = rng.integers(3, 60, 600)
    inside = rng.random(600) < np.where(length > 30, 0.6, 0.05)
    prompts = [f"{filler(rng, n)} {i}" for i, n in enumerate(length)]
    (name,) = prompt_names(prompts, sparse.csr_array(inside[None].astype(float)))
    held = np.array([[word in prompt.split() for word in FILLERS] for prompt in prompts])
    assert (held[inside].mean(axis=0) - held[~inside].mean(axis=0)).min() > 0.1  # every word would name it
    assert name.words == []


def test_names_are_called_by_chance_no_more_often_than_said():
    rng = np.random.default_rng(2)
    prompts = [filler(rng, rng.integers(3, 15)) for _ in range(300)]
    members = sparse.csr_array((rng.random((400, 300)) < 0.2).astype(float))
    named = sum(bool(name.words) for name in prompt_names(prompts, members))
    assert named <= 10  # 1 % of 400, and the error of the count


def test_repeated_prompts_count_once_and_empty_groups_have_no_name():
    rng = np.random.default_rng(3)
    prompts = ["Buy a lamp."] * 50 + [filler(rng, 6) for _ in range(50)]
    members = sparse.csr_array(np.stack([np.arange(100) < 50, np.zeros(100), np.ones(100)]).astype(float))
    lamp, empty, everything = prompt_names(prompts, members)
    assert (lamp.prompts, lamp.words, lamp.example) == (1, [], "Buy a lamp.")
    assert (empty.prompts, empty.words, empty.example) == (0, [], "")
    assert everything.words == []
    assert prompt_names([], sparse.csr_array((2, 0))) == [empty, empty]


def test_a_quote_is_one_short_line():
    long = quoted("Write about\n\n" + "the sea and the land " * 20)
    assert len(long) <= 80
    assert long.endswith("…")
    assert "\n" not in long
    assert len(quoted("字" * 300)) == 80
