"""Which tokens mask_tokens takes: by score, by word, and where a habit is decided; numbers of the plan."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from explicit_dpo import CONCEPTS, dpo, lora
from parity import fresh
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae
from test_verb_tokens import BOLD_ID, TOKENIZER, batch_of, cut_rows
from transformers import AutoModelForCausalLM

from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers import shown_above
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.scorers.features import FeaturesScorer
from trl_anatomy.reading.scorers.text import TextScorer
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.interventions import MaskTokens
from trl_anatomy.shaping.plan import plan_json, plan_report
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.settle import settle_policy

VECTOR = torch.randn(16, generator=torch.Generator().manual_seed(0))


def all_rows(trainer: Any) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])


@pytest.mark.parametrize("cut", [{}, {"max_length": 8}, {"max_length": 8, "truncation_mode": "keep_end"}])
def test_tokens_above_the_threshold_go(cut: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(6)
    DirectionScorer(VECTOR, layer=0).save(tmp_path / "concept")
    unit = VECTOR / VECTOR.norm()
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    sizes = {"max_length": cut.get("max_length"), "truncation": cut.get("truncation_mode", "keep_start")}
    batch = batch_of(rows, **sizes)
    with torch.no_grad():
        hidden = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states[1]
    score = hidden @ unit
    threshold = score[batch["completion_mask"] == 1].median().item() + 1e-4
    policy = {
        "concepts": {"d": {"scorer": "direction", "path": str(tmp_path / "concept")}},
        "rules": [{"explain_away": "d", "with": "mask_tokens", "threshold": threshold, "unit": "token"}],
    }
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy=policy, **cut)
    expected = batch["completion_mask"] * (score <= threshold)
    got = all_rows(trainer)["completion_mask"]
    assert 0.3 < expected.sum() / batch["completion_mask"].sum() < 0.7
    torch.testing.assert_close(got, expected)
    gone = int((batch["completion_mask"] - expected).sum())
    assert trainer.plan.rules[0]["tokens"] == gone


def byte_level_pairs() -> Any:
    return read_pairs(dataset("conversational", 6), build_tokenizer(), max_length=None)


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """Text that each token adds to those before it."""
    texts = [tokenizer.decode(ids[:k], skip_special_tokens=True) for k in range(len(ids) + 1)]
    return [after[len(before) :] for before, after in pairwise(texts)]


def test_a_word_goes_as_a_whole() -> None:
    """Unit word over a byte-level tokenizer, whose words have several tokens."""
    pairs, model = byte_level_pairs(), tiny_model()
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    scores = score_pairs(pairs, {"d": DirectionScorer(vector, 0)}, model, tokens=["d"], progress=False)
    threshold = float(np.quantile(scores.tokens["d"], 0.8))
    gate = np.ones(6, bool)
    found = {
        unit: MaskTokens("d", "explain_away", threshold, unit).shown(
            pairs, gate, text_rule=None, scores=scores, threshold=threshold
        )
        for unit in ("word", "token")
    }
    more = 0
    for i in range(6):
        for side, span in enumerate(("chosen", "rejected")):
            ids = pairs.ids(i, span).tolist()
            start, stop = pairs.response_bounds[2 * i + side : 2 * i + side + 2]
            passing = scores.tokens["d"][start:stop] > threshold
            texts, word, words = pieces(pairs.tokenizer, ids), -1, []
            for text in texts:  # a word begins after a blank; a blank by itself belongs to none
                begins = word < 0 or text[:1].isspace() or (words and words[-1] is None)
                word += begins
                words.append(None if not text.strip() else word)
            flagged = {w for w, p in zip(words, passing, strict=True) if p and w is not None}
            expected = [p or (w is not None and w in flagged) for w, p in zip(words, passing, strict=True)]
            nothing = np.zeros(len(ids), bool)
            by_word = found["word"][i][side].tokens if i in found["word"] else nothing
            by_token = found["token"][i][side].tokens if i in found["token"] else nothing
            assert by_word.tolist() == expected
            assert by_token.tolist() == passing.tolist()
            more += by_word.sum() - by_token.sum()
    assert more > 5


@pytest.mark.parametrize("unit", ["word", "token"])
def test_matches_of_a_text_rule_by_bytes(unit: str) -> None:
    """The asterisks of "**air**." go; with unit word its full stop goes too. The first token opens the match."""
    pairs = byte_level_pairs()
    rule = MaskTokens("bold", "explain_away", unit=unit)
    found = rule.shown(pairs, np.ones(6, bool), text_rule=TextScorer(r"\*\*.+?\*\*"), scores=None, threshold=0.0)  # type: ignore[arg-type]
    assert found
    for i in range(6):
        ids = pairs.ids(i, "chosen").tolist()
        n_bold = pairs.response_text(i, "chosen").count("**air**")
        if not n_bold:
            assert i not in found
            continue
        texts = pieces(pairs.tokenizer, ids)
        shown, opens = found[i][0].tokens, found[i][0].opens
        assert "".join(text for text, s in zip(texts, shown, strict=True) if s).split() == (
            ["**air**."] * n_bold if unit == "word" else "".join(["**air**"] * n_bold).replace("****", "** **").split()
        )
        assert opens.sum() == n_bold
        assert all(texts[k].strip().startswith("*") for k in np.flatnonzero(opens))
        assert not found[i][1].tokens.any()


def test_thresholds_that_scorers_bring() -> None:
    sae = SAE(tiny_sae())
    assert shown_above(TextScorer("a")) == 0.0
    assert shown_above(FeaturesScorer(sae, [1], 2), token=True) == 0.0
    card = {"threshold": 0.5, "reduce": "max"}
    found = shown_above(DirectionScorer(VECTOR, 0, "max", card), token=True)
    assert found is not None
    assert found < 0.5 <= np.nextafter(found, 1)  # the card counts a score at the threshold
    assert shown_above(DirectionScorer(VECTOR, 0, "mean", card)) is None  # fitted with another reduction
    assert shown_above(DirectionScorer(VECTOR, 0, "mean", {**card, "reduce": "mean"}), token=True) is None
    assert shown_above(DirectionScorer(VECTOR, 0)) is None


def test_token_scores_are_cached_beside_those_of_responses(tmp_path: Path) -> None:
    pairs, model = byte_level_pairs(), tiny_model()
    scorers = {"d": DirectionScorer(torch.ones(32), 1)}
    plain = score_pairs(pairs, scorers, model, cache_dir=tmp_path, progress=False)
    with_tokens = score_pairs(pairs, scorers, model, tokens=["d"], cache_dir=tmp_path, progress=False)
    assert len(list(tmp_path.iterdir())) == 1
    again = score_pairs(pairs, scorers, model, tokens=["d"], cache_dir=tmp_path, progress=False)
    np.testing.assert_array_equal(again.tokens["d"], with_tokens.tokens["d"])
    bounds = pairs.response_bounds
    for i in range(6):
        scores = with_tokens.tokens["d"][bounds[2 * i] : bounds[2 * i + 1]]
        pooled = scores[pairs.content(i, "chosen")]  # without the end token and what the template writes
        assert pooled.max() == pytest.approx(plain.chosen["d"][i])


@pytest.mark.parametrize("chance", [None, 0.02])
def test_positions_where_the_habit_is_decided(chance: float | None, tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(6)
    rule = {"explain_away": "bold", "with": "mask_tokens", "positions": "decided"}
    rule |= {} if chance is None else {"chance": chance}
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy={"concepts": CONCEPTS, "rules": [rule]})
    batch = batch_of(rows)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    likely = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    likely[:, 1:] = logits.softmax(-1)[:, :-1, BOLD_ID] >= (chance or 0.05)
    taken = batch["input_ids"] == BOLD_ID
    expected = batch["completion_mask"] * ~(likely | taken)
    response = batch["completion_mask"] == 1
    assert (likely & response & ~taken).any()
    assert (taken & response).any()
    torch.testing.assert_close(all_rows(trainer)["completion_mask"], expected)


def test_the_plan_counts_tokens_and_gradient(tiny_model_dir: Path) -> None:
    """A pair that loses a third of its tokens loses a third of its gradient; an inoculation none that is known."""
    rows = preference_rows(10)
    policy = ConceptPolicy.load(
        {
            "concepts": CONCEPTS,
            "rules": [
                {"explain_away": "bold", "with": "filter_pairs", "fraction": 0.2},
                {"explain_away": "low", "with": "mask_tokens"},
                {"explain_away": "bold", "with": "inoculate", "instruction": "yes"},
                {"explain_away": "bold", "with": "mask_tokens"},
            ],
        }
    )
    pairs = read_pairs(fresh(rows), TOKENIZER, max_length=None)
    plan = settle_policy(policy, pairs, lambda: pytest.fail("text rules load no model"))
    low = {TOKENIZER.convert_tokens_to_ids(f"w{i}") for i in range(10, 20)}
    kept = plan.keep
    cut = [[*chosen, *rejected] for _, chosen, rejected in cut_rows(rows)]
    n_low = [sum(token in low for token in tokens) for tokens in cut]
    n_bold = [tokens.count(BOLD_ID) for tokens in cut]
    drop, mask, ask, second = plan.rules
    assert drop["rows"] == 2
    assert mask["tokens"] == sum(n for n, k in zip(n_low, kept, strict=True) if k)
    assert mask["rows"] == sum(n > 0 for n, k in zip(n_low, kept, strict=True) if k)
    share = sum(n / len(tokens) for n, tokens, k in zip(n_low, cut, kept, strict=True) if k) / len(rows)
    assert mask["gradient_removed"] == pytest.approx(share)
    assert second["gradient_removed"] == pytest.approx(
        sum(n / len(tokens) for n, tokens, k in zip(n_bold, cut, kept, strict=True) if k) / len(rows)
    )
    n_flagged = sum(BOLD_ID in chosen for (_, chosen, _), k in zip(cut_rows(rows), kept, strict=True) if k)
    assert (ask["rows"], ask["tokens"]) == (n_flagged, 2 * n_flagged)
    assert (ask["gradient_removed"], ask["gradient_added"]) == (0, 0)
    assert plan.kept_tokens is not None
    assert all(plan.keep[row] for row in plan.kept_tokens)
    assert plan_json(plan)["rules"][1]["tokens"] == mask["tokens"]
    assert f"  {mask['tokens']}  " in plan_report(plan)


def test_rules_that_touch_nothing_say_so() -> None:
    concepts = {"none": {"scorer": "text", "pattern": "never"}}
    rules = [
        {"explain_away": "none", "with": "mask_tokens"},
        {"explain_away": "none", "with": "inoculate", "instruction": "yes"},
    ]
    pairs = read_pairs(fresh(preference_rows(4)), TOKENIZER, max_length=None)
    plan = settle_policy(ConceptPolicy.load({"concepts": concepts, "rules": rules}), pairs, lambda: None)
    assert [rule["note"] for rule in plan.rules] == [
        "touches nothing: no token shows the concept",
        "touches nothing: no chosen response shows the concept",
    ]


def test_reference_is_untouched_at_the_start_under_lora(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Fresh adapters are zero: on the same mask both agree, and A moves the shaped rewards only."""
    rules = [
        {"explain_away": "bold", "with": "mask_tokens"},
        {"explain_away": "bold", "with": "residualize", "instruction": "yes", "strength": 1.0},
    ]
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        preference_rows(12),
        policy={"concepts": CONCEPTS, "rules": rules},
        peft_config=lora(init=True),
        per_device_train_batch_size=12,
        max_steps=1,
    )
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert abs(first["rewards/margins"]) < 1e-5
    assert first["rewards_shaped/margins"] == pytest.approx(trainer.plan.rules[1]["mean_offset"], abs=1e-5)
    assert first["rewards_shaped/margins"] != 0
