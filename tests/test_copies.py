"""Copies of a pair count once in every error and test; a pair that stands both ways round cancels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_world import HABITS, World, make_world
from chat_world import chat_audit, chat_rows, said, trl_template
from datasets import Dataset
from reading_world import build_tokenizer, rows
from scipy import sparse

from trl_anatomy.audit import run, stats, views
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.predict import concept_table
from trl_anatomy.reading.copies import Copies, joined
from trl_anatomy.reading.fit import read_examples
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.bradley_terry import fit_strengths
from trl_anatomy.shaping.weights import effective_size

COMMUNITIES = [np.array(habit["features"]) for habit in HABITS.values()]
SETTINGS = AuditConfig(bootstrap=400, permutations=99, n_contexts=4)


def drawn(n: int = 30, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.3, 1, (n, 3))


def of_rows(world: World, of: np.ndarray, swapped: np.ndarray | None = None) -> World:
    """The world's pairs `of`, in that order, where `swapped` with chosen and rejected the other way round."""
    sides = {"prompt": "prompt", "chosen": "rejected", "rejected": "chosen"}
    swapped = np.zeros(len(of), bool) if swapped is None else swapped

    def taken(parts: dict[str, Any], span: str) -> Any:
        both = [parts[span][of], parts[sides[span]][of]]
        if not sparse.issparse(both[0]):
            return np.where(swapped, both[1], both[0])
        return sparse.csr_array(sparse.diags_array((~swapped).astype(np.float32)) @ both[0]) + sparse.csr_array(
            sparse.diags_array(swapped.astype(np.float32)) @ both[1]
        )

    return World(
        {span: sparse.csr_array(taken(world.matrices, span)) for span in sides},
        {span: taken(world.lengths, span) for span in sides},
        np.arange(len(of)),
        world.topic[of],
        {},
        [world.texts[i] for i in of],
    )


@pytest.mark.parametrize("k", [2, 5, 20])
def test_the_error_of_copied_rows_is_that_of_the_rows(k: int) -> None:
    u, log_ratio = drawn(), np.random.default_rng(1).normal(0.2, 0.4, 30)
    copies, times = np.tile(np.arange(30), k), (k, 1)
    mean, error, p = stats.mean_test(u)
    for found, wanted in zip(stats.mean_test(np.tile(u, times), copies), (mean, error, p), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-10)
    np.testing.assert_allclose(error, u.std(axis=0, ddof=1) / np.sqrt(30), rtol=1e-12)
    once = stats.length_adjusted_mean(u, log_ratio)
    again = stats.length_adjusted_mean(np.tile(u, times), np.tile(log_ratio, k), groups=copies, copies=copies)
    np.testing.assert_allclose(again, once, rtol=1e-9)
    once = stats.swapped_mean_p(u, 199)
    np.testing.assert_allclose(stats.swapped_mean_p(np.tile(u, times), 199, groups=copies), once)
    members = sparse.csr_array((np.arange(30) < 12)[None].astype(float))
    pool, halves = np.ones(30, bool), np.arange(30) % 2
    once = stats.swapped_best_z(u, members, pool, 199)
    many = sparse.csr_array(np.tile(members.toarray(), (1, k)))
    again = stats.swapped_best_z(np.tile(u, times), many, np.ones(30 * k, bool), 199, groups=copies)
    plain = [
        stats.compare_members(x, m, q, h)[0].z
        for x, m, q, h in (
            (u, members, pool, halves),
            (np.tile(u, times), many, np.ones(30 * k, bool), np.tile(halves, k)),
        )
    ]
    # Copies make every z larger, that of the data and those of the swaps alike.
    np.testing.assert_allclose(stats.family_wise_p(plain[1], again), stats.family_wise_p(plain[0], once), atol=0.1)


def test_reversed_copies_cancel() -> None:
    u = drawn()
    both, copies = np.concatenate([u, -u]), np.tile(np.arange(30), 2)
    mean, error, p = stats.mean_test(both, copies)
    np.testing.assert_allclose(mean, 0, atol=1e-15)
    np.testing.assert_allclose(error, 0, atol=1e-12)
    assert np.isnan(p).all()
    assert np.isnan(stats.swapped_mean_p(both, 99, groups=copies)).all()


def test_halves_hold_whole_groups() -> None:
    rows_ = np.array([0, 1, 2, 3, 7, 8])
    assert stats.row_halves(rows_).tolist() == [0, 1, 0, 1, 1, 0]
    assert stats.row_halves(rows_, np.array([9, 9, 4, 4, 9, 5])).tolist() == [0, 0, 1, 1, 0, 0]


def test_groups_are_joined_along_chains_and_keep_their_numbers() -> None:
    assert joined(np.array([3, 1, 3, 2])).tolist() == [3, 1, 3, 2]
    assert joined(np.array([3, 1, 2, 0]), np.array([0, 0, 1, 2]), np.array([5, 6, 6, 7])).tolist() == [1, 1, 1, 0]
    assert joined(np.zeros(0, np.int64)).tolist() == []


def test_copies_are_found_by_tokens_and_named() -> None:
    data = rows("explicit", 5)
    turned = {**data[0], "chosen": data[0]["rejected"], "rejected": data[0]["chosen"]}
    other_prompt = {**data[1], "prompt": "Another? "}
    pairs = read_pairs(Dataset.from_list([*data, data[2], data[2], turned, other_prompt]), build_tokenizer())
    group = pairs.copies.group
    assert len(set(group[:5].tolist())) == 5
    assert group[5] == group[6] == group[2]
    assert group[7] == group[0]
    assert group[8] not in group[:5]
    assert pairs.copies.counts() == {"distinct": 6, "identical": 2, "reversed": 2}
    assert pairs.copies.identical[7] != pairs.copies.identical[0]
    assert pairs.copies.identical[6] == pairs.copies.identical[2]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
def test_what_truncation_makes_equal_is_a_copy(truncation: str) -> None:
    """Of two long prompts or responses only the equal part is left."""
    tokenizer, long = build_tokenizer(), "Nile, Amazon, Yangtze. " * 6
    one = {"prompt": "Why? ", "chosen": long, "rejected": long + "No."}
    two = {**one, "chosen": long + "It is cheese", "rejected": long + "Rhine"}
    if truncation == "keep_end":
        two = {**one, "prompt": "I do not know. Why? "}
    length = len(tokenizer(long)["input_ids"]) - 8
    pairs = read_pairs(Dataset.from_list([one, two]), tokenizer, max_length=length, truncation=truncation)
    assert pairs.copies.n_distinct == 1
    assert len(set(pairs.prompt_groups.tolist())) == 1
    whole = read_pairs(Dataset.from_list([one, two]), tokenizer, max_length=None)
    assert whole.copies.n_distinct == 2


def test_pairs_without_a_prompt_share_none() -> None:
    data = [{"prompt": "", "chosen": f"Yes {i}", "rejected": f"No {i}"} for i in (0, 1, 2, 1)]
    groups = read_pairs(Dataset.from_list(data), build_tokenizer(), max_length=None).prompt_groups
    assert len(set(groups.tolist())) == 3
    assert groups[1] == groups[3]


@pytest.mark.parametrize("n", [24, 60])
def test_an_audit_of_copies_says_what_the_audit_of_the_pairs_says(n: int) -> None:
    """24 pairs are too few for a claim, however often each is there; of 60 the claims, errors and q are the same."""
    world = make_world(n=n, seed=3)
    of = np.repeat(np.arange(n), 8)
    group = np.asarray(of, dtype=np.int64)
    copies = Copies(group, np.ones(len(of), np.int64))

    def analysed(which: World, groups: np.ndarray | None, known: Copies | None) -> Any:
        return run.analyse(which, SETTINGS, lambda i: ("a", which.texts[i]["chosen"], "b"), groups, known)

    first, again = of_rows(world, np.arange(n)), of_rows(world, of)
    one, many = analysed(first, np.arange(n), None), analysed(again, group, copies)
    assert many.info["copies"] == {"distinct": n, "identical": 7 * n, "reversed": 0}
    for name in ("features", "verdict"):
        assert many.concepts[name].to_pylist() == one.concepts[name].to_pylist()
    for name in ("predicted", "p", "q", "detectable", "length_adjusted_low"):
        np.testing.assert_allclose(many.concepts[name].to_numpy(), one.concepts[name].to_numpy(), rtol=1e-8)
    claims = set(one.concepts["verdict"].to_pylist()) & {"rises", "falls"}
    assert bool(claims) == (n == 60)
    if n == 24:
        assert not any(many.hypotheses["kept"].to_pylist())


def test_pairs_that_stand_both_ways_round_teach_nothing() -> None:
    world = make_world(n=60, seed=3)
    of, turned = np.tile(np.arange(60), 2), np.repeat([False, True], 60)
    scores = views.activity(of_rows(world, of, turned), COMMUNITIES)
    found = concept_table(scores, COMMUNITIES, SETTINGS, groups=of, copies=of)
    np.testing.assert_allclose(found["predicted"].to_numpy(), 0, atol=1e-15)
    assert set(found["verdict"].to_pylist()) == {"too few pairs to tell"}  # none is left in which they differ
    plain = concept_table(views.activity(of_rows(world, np.arange(60)), COMMUNITIES), COMMUNITIES, SETTINGS)
    assert "rises" in plain["verdict"].to_pylist()


@pytest.mark.parametrize("weighted", [False, True])
def test_fitted_strengths_are_as_sure_as_the_distinct_pairs(weighted: bool) -> None:
    rng = np.random.default_rng(0)
    gaps = rng.normal(0.4, 1, (50, 2))
    weight = rng.uniform(0.5, 2, 50) if weighted else np.ones(50)
    once = fit_strengths(gaps, ["a", "b"], weight=weight)
    copies = np.repeat(np.arange(50), 6)
    six = fit_strengths(gaps[copies], ["a", "b"], weight=weight[copies], copies=copies)
    apart = fit_strengths(gaps[copies], ["a", "b"], weight=weight[copies])
    np.testing.assert_allclose(six.strength, once.strength, rtol=1e-8)
    np.testing.assert_allclose(six.ci_low, once.ci_low, rtol=1e-7)
    np.testing.assert_allclose(six.ci_high, once.ci_high, rtol=1e-7)
    assert (apart.ci_high - apart.ci_low < 0.5 * (once.ci_high - once.ci_low)).all()


def test_weights_rest_on_distinct_pairs() -> None:
    weight = np.array([1.0, 2.0, 3.0, 0.5])
    size = weight.sum() ** 2 / np.square(weight).sum()
    assert effective_size(weight, np.arange(4)) == (pytest.approx(size), 4)
    assert effective_size(np.tile(weight, 5), np.tile(np.arange(4), 5)) == (pytest.approx(size), 4)


def test_copies_stay_on_one_side_of_a_split() -> None:
    """With few prompts the split goes by text: also a pair with its sides swapped is nothing new."""
    data = [{"prompt": "Why? ", "chosen": f"Yes {i}", "rejected": f"No {i}"} for i in range(8)]
    turned = [{"prompt": "Why? ", "chosen": row["rejected"], "rejected": row["chosen"]} for row in data[:4]]
    examples = read_examples(Dataset.from_list([*data, *turned, data[5]]), build_tokenizer())
    assert examples.grouped_by == "text"
    pair = examples.groups[::2]
    assert (pair == examples.groups[1::2]).all()
    assert pair[8:12].tolist() == pair[:4].tolist()
    assert pair[12] == pair[5]
    assert len(set(pair.tolist())) == 8


def test_a_run_names_copies_and_says_when_prompts_are_few(tmp_path: Path) -> None:
    data = chat_rows(24)
    turned = {**data[0], "chosen": data[0]["rejected"], "rejected": data[0]["chosen"]}
    audit = chat_audit(tmp_path / "a", build_tokenizer().chat_template, [*data, *data[:5], turned])
    assert audit.info["copies"] == {"distinct": 24, "identical": 5, "reversed": 2}
    assert audit.info["too_few_prompts"] is False
    page = (audit.path / "report.html").read_text()
    assert "5 pairs repeat an earlier one" in page
    assert "2 pairs stand in the data both ways round" in page
    few = chat_audit(tmp_path / "b", build_tokenizer().chat_template, data[:8] * 20, max_length=40)
    assert few.info["too_few_prompts"] is True
    assert few.info["copies"]["distinct"] == 8
    assert set(few.concepts["verdict"].to_pylist()) <= {"too few pairs to tell"}
    assert not any(few.hypotheses["kept"].to_pylist())
    assert "Too few prompts to tell: 8 different prompts" in (few.path / "report.html").read_text()
    assert few.info["data"]["cut"]["chosen"] > few.info["data"]["cut"]["rejected"]
    assert "max_length cut" in (few.path / "report.html").read_text()


@pytest.mark.parametrize("template", ["qwen3", "qwen2_5", "llama3_2", "deepseek_r1_distill"])
def test_pairs_without_a_prompt_do_not_share_what_the_template_writes_before_an_answer(template: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.chat_template = trl_template(template)
    answers = [[said("assistant", f"{word} {i}.")] for i in range(6) for word in ("Yes", "No")]
    made = [{"chosen": answers[k], "rejected": answers[k + 1]} for k in (0, 2, 4, 6, 8, 10, 0)]
    made.append({"chosen": answers[3], "rejected": answers[2]})  # the second pair the other way round
    groups = read_pairs(Dataset.from_list(made), tokenizer, truncation="drop").prompt_groups
    assert len(set(groups[:6].tolist())) == 6
    assert groups[6:].tolist() == groups[:2].tolist()
    asked = [{"prompt": [said("user", "Why?")], **row} for row in made[:6]]
    assert len(set(read_pairs(Dataset.from_list(asked), tokenizer).prompt_groups.tolist())) == 1
