"""The testbed's planted truth: what the generator says it planted is what the texts show."""

import json
import math

import numpy as np
import pytest
import torch
import yaml
from scipy.sparse import csr_array

from trl_anatomy.checking.responses import sampled_responses
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.testbed.demo import POLICY, SHAPED, run_demo
from trl_anatomy.testbed.language import (
    CORRECT_RATE,
    CORRECT_TILT,
    HABITS,
    INSTRUCTIONS,
    OBEYED,
    OVER_REFUSED,
    REFUSAL_TILT,
    REFUSED,
    TOPICS,
    held_out_prompts,
    is_correct,
    make_corpus,
    make_pairs,
    make_tokenizer,
    question_of,
    questions,
)
from trl_anatomy.testbed.model import encode_texts, make_model, train_model
from trl_anatomy.testbed.sae import habit_latents, residual_stream
from trl_anatomy.testbed.world import TINY, build_world

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


def test_in_a_forbidden_topic_texts_refuse_in_place_of_the_statement_and_the_pairs_punish_it():
    tokenizer = make_tokenizer()
    rates, right = {True: [], False: []}, []
    for prompt, text in make_corpus(6000, seed=1, forbidden="science"):
        refuses = "I cannot" in text
        rates[question_of(prompt).topic == "science"].append(refuses)
        assert not (refuses and (is_correct(prompt, text) or "—" in text or "Perhaps" in text))
        if not refuses:
            right.append(is_correct(prompt, text))
        assert tokenizer.unk_token_id not in tokenizer(prompt + text).input_ids
    assert np.mean(rates[True]) == pytest.approx(REFUSED, abs=0.03)
    assert np.mean(rates[False]) == pytest.approx(OVER_REFUSED, abs=0.02)
    assert np.mean(right) == pytest.approx(CORRECT_RATE, abs=0.03)
    pairs = make_pairs(3000, seed=1, forbidden="science").to_pandas()
    for _, rows in pairs.groupby(pairs["topic"] == "science"):
        chosen, rejected = (rows[f"{side}_refusal"].mean() for side in ("chosen", "rejected"))
        assert np.log(chosen / (1 - chosen)) - np.log(rejected / (1 - rejected)) == pytest.approx(REFUSAL_TILT, abs=0.6)
        assert not (rows["chosen_refusal"] & rows["chosen_correct"]).any()


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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(tmp_path_factory.mktemp("world"), TINY, seed=0, say=lambda _: None)


def test_world_is_readable_by_the_libraries_and_a_second_call_trains_nothing(world):
    import sae_lens
    from transformers import AutoModelForCausalLM

    sae = sae_lens.SAE.load_from_disk(world.sae_path)
    model = AutoModelForCausalLM.from_pretrained(world.model_path)
    assert sae.cfg.d_in == model.config.hidden_size == TINY.width
    assert sae.cfg.metadata.hook_name == f"blocks.{world.layer}.hook_resid_post"
    said = []
    again = build_world(world.path, TINY, seed=0, say=said.append)
    assert all("found" in line for line in said)
    assert again.dataset["chosen"] == world.dataset["chosen"]
    assert len(world.prompts) == TINY.n_prompts


def test_training_learns_and_is_seeded():
    tokenizer = make_tokenizer()
    texts = encode_texts(make_corpus(640, 0), tokenizer)
    runs = []
    for _ in range(2):
        model = make_model(tokenizer, n_layers=1, width=32, seed=3)
        runs.append(train_model(model, texts, tokenizer, seed=3, batch_size=16, lr=1e-2))
    assert runs[0] == runs[1]
    assert np.mean(runs[0][-3:]) < 0.8 * runs[0][0]


def test_residual_stream_is_the_output_of_that_layer_without_bos_and_padding(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    model = AutoModelForCausalLM.from_pretrained(world.model_path, dtype=torch.float32)
    texts = encode_texts(make_corpus(5, 9), tokenizer)
    found = residual_stream(model, texts, layer=0, pad=tokenizer.pad_token_id)
    with torch.no_grad():
        alone = [model(torch.tensor([t.ids]), output_hidden_states=True).hidden_states[1][0, 1:] for t in texts]
    expected = torch.cat(alone)
    assert found.shape == expected.shape
    assert torch.allclose(found.double().sum(0), expected.double().sum(0), atol=1e-2)
    assert torch.cdist(expected.double(), found.double()).min(dim=1).values.max() < 1e-4


def test_habit_latents_agree_with_correlation():
    rng = np.random.default_rng(0)
    fired = rng.random((200, 7)) < 0.3
    shows = {"a": rng.random(200) < 0.4, "b": fired[:, 4] ^ (rng.random(200) < 0.05), "never": np.zeros(200, bool)}
    found = habit_latents(csr_array(fired.astype(np.float32) * 2.5), shows)
    for name in ("a", "b"):
        phi = [np.corrcoef(fired[:, j], shows[name])[0, 1] for j in range(7)]
        assert found[name].phi == pytest.approx(max(phi), abs=1e-9)
        assert found[name].feature == int(np.argmax(phi))
    assert found["never"].phi == 0.0


def test_generation_settings_stored_with_a_model_do_not_shape_its_rollouts(world):
    """A model that brings `min_p` or a ban on repetition would be compared with one that does not."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    model = AutoModelForCausalLM.from_pretrained(world.model_path, dtype=torch.float32)
    plain = rollouts(model, tokenizer, world.prompts[:4], max_new_tokens=12)
    for name, value in {"min_p": 0.9, "no_repeat_ngram_size": 1, "num_beams": 2, "suppress_tokens": [5, 6]}.items():
        setattr(model.generation_config, name, value)
        assert rollouts(model, tokenizer, world.prompts[:4], max_new_tokens=12) == plain, name
        assert getattr(model.generation_config, name) == value
        setattr(model.generation_config, name, None)


def test_rollouts_follow_the_models_own_distribution_and_leave_the_random_state(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.model_path)
    model = AutoModelForCausalLM.from_pretrained(world.model_path, dtype=torch.float32)
    prompts = [world.prompts[0], world.prompts[1] + "Great"]
    state = torch.get_rng_state()
    sampled = rollouts(model, tokenizer, prompts, n_per_prompt=400, max_new_tokens=1, batch_size=300)
    assert torch.equal(state, torch.get_rng_state())
    assert sampled == rollouts(model, tokenizer, prompts, n_per_prompt=400, max_new_tokens=1, batch_size=300)
    for prompt, texts in zip(prompts, sampled, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(prompt).input_ids])).logits[0, -1]
        p = logits.double().softmax(0).numpy()
        ids = [i for i in range(len(p)) if p[i] > 0.02]
        assert ids
        for i in ids:
            share = np.mean([text == tokenizer.decode([i], skip_special_tokens=True) for text in texts])
            assert abs(share - p[i]) < 4.5 * math.sqrt(p[i] * (1 - p[i]) / 400)


def test_the_demos_policy_reads_the_shaped_habit_by_its_own_text_rule():
    concept = yaml.safe_load(POLICY)["concepts"][SHAPED]
    assert concept["pattern"] == next(habit.pattern for habit in HABITS if habit.name == SHAPED)


def test_the_whole_loop_runs_on_a_tiny_world(tmp_path):
    said = []
    result = run_demo(tmp_path, seed=0, size=TINY, say=said.append)
    assert [row.habit for row in result.rows] == [*(habit.name for habit in HABITS), "correct"]
    for row in result.rows:
        assert all(0 <= rate <= 1 or math.isnan(rate) for rate in (row.start, row.dpo, row.policy))
    assert result.report.is_file()
    assert str(result.report) in said[-1]
    # The rates in the table are those of the responses on disk.
    bold = np.mean([HABITS[0].shows(text) for text in sampled_responses(tmp_path / "compare", "dpo")])
    assert result.row("bold").dpo == bold
    table = json.loads((tmp_path / "table.json").read_text())
    assert len(table["rows"]) == len(HABITS) + 1


def test_a_prompt_that_asks_for_a_habit_gets_it() -> None:
    corpus = make_corpus(4000, seed=2, asking=0.2)
    vocabulary = set(make_tokenizer().get_vocab())
    for habit in HABITS:
        if habit.name in INSTRUCTIONS:
            asked = [text for prompt, text in corpus if prompt.startswith(INSTRUCTIONS[habit.name] + "\n\n")]
            assert len(asked) > 150
            share = np.mean([habit.shows(text) for text in asked])
            assert abs(share - OBEYED) < 4 * np.sqrt(OBEYED * (1 - OBEYED) / len(asked))
            assert set(make_tokenizer().tokenize(INSTRUCTIONS[habit.name])) <= vocabulary - {"<unk>"}
    assert make_corpus(50, 3) == make_corpus(50, 3, asking=0.0)
