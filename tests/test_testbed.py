"""The testbed's planted truth: what the generator says it planted is what the texts show."""

import math

import numpy as np
import pytest

from trl_anatomy.testbed.language import (
    CORRECT_RATE,
    CORRECT_TILT,
    HABITS,
    TOPICS,
    held_out_prompts,
    is_correct,
    make_corpus,
    make_pairs,
    make_tokenizer,
    question_of,
    questions,
)

SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def pairs():
    return make_pairs(4000, seed=0)


def test_text_rules_and_facts_agree_with_the_planted_truth_on_every_response(pairs):
    for row in pairs:
        for side in SIDES:
            for habit in HABITS:
                assert habit.shows(row[side]) == row[f"{side}_{habit.name}"], (habit.name, row[side])
            assert is_correct(row["prompt"], row[side]) == row[f"{side}_correct"], row[side]


def test_planted_gaps_are_the_stated_ones_within_sampling_noise(pairs):
    topics = np.array(pairs["topic"])
    for habit in HABITS:
        gap = np.array(pairs[f"chosen_{habit.name}"], float) - np.array(pairs[f"rejected_{habit.name}"], float)
        for topic in TOPICS:
            here = gap[topics == topic]
            assert abs(here.mean() - habit.gap(topic)) < 4.5 * here.std() / math.sqrt(len(here)), (habit.name, topic)


def test_bradley_terry_coefficient_of_a_habit_is_its_tilt(pairs):
    # With gaps in {-1, 0, 1} the no-intercept logistic fit has the closed form log(#(+1) / #(-1)).
    def coefficient(name: str) -> float:
        gap = np.array(pairs[f"chosen_{name}"], int) - np.array(pairs[f"rejected_{name}"], int)
        return math.log((gap == 1).sum() / (gap == -1).sum())

    for habit in HABITS:
        if habit.topic is None:
            assert coefficient(habit.name) == pytest.approx(habit.tilt, abs=0.3), habit.name
    assert coefficient("correct") == pytest.approx(CORRECT_TILT, abs=0.3)


def test_corpus_shows_base_rates():
    corpus = make_corpus(4000, seed=1)
    for habit in HABITS:
        assert np.mean([habit.shows(response) for _, response in corpus]) == pytest.approx(habit.base_rate, abs=0.035)
    assert np.mean([is_correct(*text) for text in corpus]) == pytest.approx(CORRECT_RATE, abs=0.035)


def test_same_seed_same_rows_other_seed_other_rows():
    assert make_pairs(50, 3).to_dict() == make_pairs(50, 3).to_dict()
    assert make_pairs(50, 3)["chosen"] != make_pairs(50, 4)["chosen"]
    assert make_corpus(50, 3) == make_corpus(50, 3)


def test_held_out_prompts_are_never_trained_on():
    seen = {q.prompt for q in questions(False)}
    assert not seen & set(held_out_prompts(500, seed=0))
    assert set(make_pairs(200, 0)["prompt"]) <= seen
    assert {q.entity for q in questions(True)} == {q.entity for q in questions(False)}  # the facts were


def test_is_correct_refuses_foreign_prompts_and_counts_a_missing_claim_as_wrong():
    prompt = questions()[0].prompt
    assert not is_correct(prompt, "Hope this helps.")
    with pytest.raises(KeyError, match="not a prompt"):
        question_of("What is love?")


def test_tokenizer_gives_the_text_back_and_puts_bos_first(pairs):
    tokenizer = make_tokenizer()
    for row in pairs.select(range(500)):
        text = row["prompt"] + row["chosen"]
        ids = tokenizer(text).input_ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        # TRL tokenises prompt and prompt + response and takes the difference: the prompt has to be a prefix.
        prompt_ids = tokenizer(row["prompt"]).input_ids
        assert ids[: len(prompt_ids)] == prompt_ids
