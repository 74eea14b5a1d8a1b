"""Named habits by what is asked: the test against scipy, chance, support, folding, and what a reader is told."""

import itertools
import json
import re
import shutil

import numpy as np
import pytest
import yaml
from audit_world import checked_test, make_audit, make_world
from datasets import Dataset
from scipy import sparse
from scipy import stats as reference
from scipy.stats import binom

from trl_anatomy import AuditConfig, load_audit
from trl_anatomy.audit import stats
from trl_anatomy.audit.by_prompt_text import by_prompt_texts
from trl_anatomy.audit.counted import Counted
from trl_anatomy.audit.folding import context_correlations, fold, side_correlations
from trl_anatomy.audit.habit_table import habit_values
from trl_anatomy.audit.habits_by_prompt import Asked, _support, cluster_members, habits_by_prompt
from trl_anatomy.audit.report import write_report
from trl_anatomy.audit.text_audit import run_text_audit
from trl_anatomy.cli import main
from trl_anatomy.reading.habits import HABITS, Habit
from trl_anatomy.shaping.policy import ConceptPolicy

NAMES = ("bold", "header", "numbered", "refusal", "hedging", "words")
CONTEXTS = ("code", "list", "maths", "question")


def world(n=400, seed=0, plant=(), n_prompts=None):
    """Rates of 40 % on both sides and lengths of 100 words; `plant` names (context, habit, rate of chosen there)."""
    rng = np.random.default_rng(seed)
    groups = np.arange(n) if n_prompts is None else rng.integers(0, n_prompts, n)
    inside = {name: (rng.random(n) < share)[groups] for name, share in zip(CONTEXTS, (0.3, 0.4, 0.3, 0.5), strict=True)}
    inside["maths"] = np.where(rng.random(n)[groups] < 0.9, inside["code"], inside["maths"])
    values = (rng.random((2, n, len(NAMES))) < 0.4).astype(float)
    values[:, :, NAMES.index("header")] = np.where(
        rng.random((2, n)) < 0.95, values[:, :, NAMES.index("bold")], values[:, :, NAMES.index("header")]
    )
    values[:, :, NAMES.index("words")] = rng.integers(80, 120, (2, n))
    for context, habit, rate in plant:
        here = np.flatnonzero(inside[context])
        values[0, here, NAMES.index(habit)] = rng.random(len(here)) < rate
    rules = [[name for name in CONTEXTS if inside[name][i]] for i in range(n)]
    counted = Counted(values, {name: HABITS[name] for name in NAMES}, groups)
    return counted, Asked.of(rules), inside


def cells(table):
    return {(row["context"], row["habit"]): row for row in table.to_pylist()}


def test_every_cell_equals_scipy():
    counted, asked, inside = world(plant=[("list", "numbered", 0.9)])
    rows = np.arange(400)
    table = habits_by_prompt(counted, asked)
    found = cells(table)
    assert set(found) == set(itertools.product(CONTEXTS, NAMES))
    p = []
    for (context, habit), row in found.items():
        k, here = NAMES.index(habit), inside[context]
        sides = np.log1p(counted.values[:, :, k]) if habit == "words" else counted.values[:, :, k]
        gap = sides[0] - sides[1]
        wanted = checked_test(gap[here], gap[~here])
        np.testing.assert_allclose([row[name] for name in ("z", "p", "ci_low", "ci_high")], wanted, rtol=1e-9)
        assert row["delta"] == pytest.approx(gap[here].mean() - gap[~here].mean(), abs=1e-12)
        for where, part in (("in", here), ("out", ~here)):
            means = [counted.values[side, part, k].mean() for side in (0, 1)]
            np.testing.assert_allclose([row[f"chosen_{where}"], row[f"rejected_{where}"]], means, rtol=1e-12)
            assert row[f"mean_{where}"] == pytest.approx(gap[part].mean(), abs=1e-12)
        halves = [gap[here & (rows % 2 == h)].mean() - gap[~here & (rows % 2 == h)].mean() for h in (0, 1)]
        np.testing.assert_allclose([row["delta_a"], row["delta_b"]], halves, rtol=1e-9)
        assert row["lean"] == ("chosen" if row["delta"] > 0 else "rejected")
        assert (row["n_in"], row["n_out"]) == (row["prompts_in"], row["prompts_out"]) == (here.sum(), (~here).sum())
        assert row["differs"] == (row["q"] <= 0.05 and halves[0] * halves[1] > 0)
        p.append(row["p"])
    np.testing.assert_allclose([row["q"] for row in found.values()], reference.false_discovery_control(p))
    best = table.to_pylist()[0]
    assert (best["context"], best["habit"], best["lean"], best["rank"]) == ("list", "numbered", "chosen", 1)


def test_pairs_of_one_prompt_tell_as_much_as_one():
    """Every pair five times under its prompt: more pairs, the same evidence; and copies are no support."""
    counted, asked, _ = world(n=300, seed=2, plant=[("list", "numbered", 0.8)])
    five = Counted(np.repeat(counted.values, 5, axis=1), counted.habits, np.repeat(counted.groups, 5))
    rules = [[name for k, name in enumerate(asked.names) if asked.members[[k]].toarray()[0, i]] for i in range(300)]
    again = Asked.of([rules[i] for i in np.repeat(np.arange(300), 5)])
    one, many = cells(habits_by_prompt(counted, asked)), cells(habits_by_prompt(five, again))
    assert set(one) == set(many)
    for name, row in one.items():
        assert many[name]["p"] == pytest.approx(row["p"], rel=1e-9)
        assert many[name]["q"] == pytest.approx(row["q"], rel=1e-9)
        assert (many[name]["n_in"], many[name]["prompts_in"]) == (5 * row["n_in"], row["prompts_in"])
    as_copies = habits_by_prompt(five, again, copies=np.repeat(np.arange(300), 5), least=100)
    assert {row["context"] for row in as_copies.to_pylist()} == {
        row["context"] for row in one.values() if min(row["n_in"], row["n_out"]) >= 100
    }


def test_support_is_asked_for_on_both_sides():
    counted, asked, inside = world(n=300, seed=3)
    for least in (25, 100, 140, 300):
        table = habits_by_prompt(counted, asked, least=least)
        wanted = {name for name, here in inside.items() if min(here.sum(), (~here).sum()) >= least}
        assert {row["context"] for row in table.to_pylist()} == wanted
    few = Counted(counted.values, counted.habits, counted.groups % 19)
    assert habits_by_prompt(few, asked).num_rows == 0
    # pairs inside and outside, prompts inside and outside, counted one by one
    rng = np.random.default_rng(0)
    groups, copies, members = rng.integers(0, 40, 200), rng.integers(0, 90, 200), rng.random((5, 200)) < 0.4
    members[4] = groups < 10  # whole prompts
    wanted = [[len(set(of[where].tolist())) for of in (copies, groups) for where in (here, ~here)] for here in members]
    found = _support(sparse.csr_array(members.astype(float)), groups, copies)
    np.testing.assert_array_equal(found, wanted)
    # 30 pairs inside, all of one or two prompts: errors between so few can not be estimated
    rules = [["code"] if i < 30 else [] for i in range(300)]
    shared = Counted(counted.values, counted.habits, np.where(np.arange(300) < 30, np.arange(300) % 2, np.arange(300)))
    assert habits_by_prompt(shared, Asked.of(rules)).num_rows == 0


@pytest.mark.parametrize(("n_prompts", "plant"), [(None, ()), (120, ()), (None, [("list", "numbered", 0.9)])])
def test_swapped_sides_keep_next_to_nothing(n_prompts, plant):
    """Sides of all pairs of a prompt swapped at random: what is planted is gone too."""
    runs, kept = 60, 0
    for seed in range(runs):
        counted, asked, _ = world(n=300, seed=seed, n_prompts=n_prompts, plant=plant)
        swap = np.random.default_rng(seed + 500).random(300)[counted.groups] < 0.5
        values = np.where(swap[None, :, None], counted.values[::-1], counted.values)
        table = habits_by_prompt(Counted(values, counted.habits, counted.groups), asked)
        assert table.num_rows
        kept += any(table["kept"].to_pylist())
    assert kept <= binom.ppf(0.99, runs, 0.05)


def test_near_copies_are_folded_under_the_surest():
    """Headings go with bold, and nearly all prompts on maths are on code: one line, whatever it is called."""
    counted, asked, inside = world(n=600, seed=4)
    here = np.flatnonzero(inside["code"])
    rng = np.random.default_rng(0)
    both = rng.random(len(here)) < 0.9
    for name in ("bold", "header"):
        counted.values[0, here, NAMES.index(name)] = both
    table = habits_by_prompt(counted, asked, alpha=1e-3).to_pylist()
    differ = [row for row in table if row["differs"]]
    assert {(row["context"], row["habit"]) for row in differ} == set(
        itertools.product(("code", "maths"), ("bold", "header"))
    )
    (line,) = [row for row in table if row["kept"]]
    assert line["context"] == "code"
    assert {row["folded_under"] for row in differ if row is not line} == {f"code~{line['habit']}"}
    assert all(row["folded_under"] is None and row["rank"] is None for row in table if not row["differs"])


def test_what_only_mirrors_another_context_is_folded_and_what_adds_is_not():
    """Questions are code half as often as others: bold differs there only because of code. Lists add to that."""
    n = 3000
    rng = np.random.default_rng(5)
    code = rng.random(n) < 0.4
    question = rng.random(n) < np.where(code, 0.35, 0.65)
    lists = rng.random(n) < 0.3
    assert abs(np.corrcoef(code, question)[0, 1]) < 0.5  # not near enough to be a near-copy
    values = np.zeros((2, n, 2))
    for k in (0, 1):
        values[1, :, k] = rng.random(n) < 0.3
    values[0, :, 0] = rng.random(n) < 0.3 + 0.5 * code + 0.15 * lists
    values[0, :, 1] = rng.random(n) < 0.3
    counted = Counted(values, {name: HABITS[name] for name in ("bold", "refusal")}, np.arange(n))
    held = {"code": code, "list": lists, "question": question}
    asked = Asked.of([[name for name, here in held.items() if here[i]] for i in range(n)])
    found = cells(habits_by_prompt(counted, asked))
    assert found["question", "bold"]["differs"]
    assert found["question", "bold"]["folded_under"] == "code~bold"
    assert {name for name, row in found.items() if row["kept"]} == {("code", "bold"), ("list", "bold")}


def test_the_partial_effect_is_that_of_a_regression_with_clustered_errors():
    """Against the textbook's matrices, and chance."""
    rng = np.random.default_rng(0)
    n, groups = 240, np.repeat(np.arange(80), 3)
    inside, others = (rng.random(n) < 0.4).astype(float), rng.normal(size=(n, 3))
    others[:, 0] += inside
    y = 0.3 * inside + others @ [1.0, -0.5, 0.0] + rng.normal(size=80)[groups] + rng.normal(size=n)
    found, p = stats.partial_effect(y, inside, others, groups)
    x = np.column_stack([inside, np.ones(n), others])
    beta = np.linalg.lstsq(x, y, rcond=None)[0]
    bread = np.linalg.inv(x.T @ x)
    scores = np.stack([x[groups == g].T @ (y - x @ beta)[groups == g] for g in range(80)])
    variance = bread @ (scores.T @ scores) @ bread * 80 / 79 * (n - 1) / (n - 5)
    assert found == pytest.approx(beta[0])
    assert p == pytest.approx(2 * reference.t.sf(abs(beta[0]) / np.sqrt(variance[0, 0]), 75))
    assert stats.partial_effect(y, inside, inside[:, None], groups)[1] == 1.0
    by_chance = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        noise = rng.normal(size=80)[groups] + rng.normal(size=n)
        by_chance.append(stats.partial_effect(noise, inside, others, groups)[1])
    assert reference.kstest(by_chance, "uniform").pvalue > 0.001


def test_folding_needs_likeness_of_both_and_the_same_meaning():
    members = np.zeros((3, 20))
    members[0, :10], members[1, :9], members[2, 10:] = 1, 1, 1  # 2 is what 0 is not
    alike = context_correlations(sparse.csr_array(members), np.ones(20, bool))
    np.testing.assert_allclose(alike, np.corrcoef(members), atol=1e-12)
    rng = np.random.default_rng(0)
    u = rng.normal(size=(200, 3))
    u[:, 1] = -u[:, 0] + 0.1 * u[:, 1]
    same = side_correlations(u, np.arange(3))
    both_ways = np.concatenate([u, -u])
    np.testing.assert_allclose(same, np.corrcoef(both_ways.T), atol=1e-12)
    tried = {
        ((0, 0, 1), (1, 0, 1)): 0,  # nearly the same pairs
        ((0, 0, 1), (1, 0, -1)): -1,  # that say the opposite
        ((0, 0, 1), (2, 0, -1)): 0,  # less elsewhere is more here
        ((0, 0, 1), (2, 0, 1)): -1,
        ((0, 0, 1), (0, 1, -1)): 0,  # the opposite concept
        ((0, 0, 1), (2, 1, 1)): 0,
        ((0, 0, 1), (0, 2, 1)): -1,  # another concept
    }
    for rows, expected in tried.items():
        assert fold(*zip(*rows, strict=True), alike, same).tolist() == [-1, expected], rows


def test_clusters_add_to_rules_and_are_folded_under_them():
    """Bold goes with a topic that no rule knows, refusals with code; A1 is the topic, A2 nearly code, A3 chance."""
    n = 1200
    rng = np.random.default_rng(7)
    code, topic = rng.random(n) < 0.4, rng.random(n) < 0.3
    near = np.where(rng.random(n) < 0.9, code, rng.random(n) < 0.4)
    clusters = np.stack([topic, near, rng.random(n) < 0.3])
    values = (rng.random((2, n, 2)) < 0.3).astype(float)
    values[0, topic, 0] = rng.random(topic.sum()) < 0.8
    values[0, code, 1] = rng.random(code.sum()) < 0.8
    counted = Counted(values, {name: HABITS[name] for name in ("bold", "refusal")}, np.arange(n))
    rules = Asked.of([["code"] if code[i] else [] for i in range(n)])
    asked = rules.with_clusters(sparse.csr_array(clusters.astype(float)), [["soup", "pan"], [], ["a", "b", "c", "d"]])
    assert asked.names == ("code", "A1", "A2", "A3")
    assert asked.says[1:] == ("is like A1 (soup · pan)", "is like A2", "is like A3 (a · b · c)")
    table = habits_by_prompt(counted, asked, alpha=1e-3)
    found = cells(table)
    assert {name for name, row in found.items() if row["kept"]} == {("code", "refusal"), ("A1", "bold")}
    assert found["A2", "refusal"]["folded_under"] == "code~refusal"
    assert [row["context"] for row in table.to_pylist()[:2]] == ["code", "A1"]  # rules first
    p = {name: row["p"] for name, row in found.items()}
    for kind in (("code",), ("A1", "A2", "A3")):  # each kind with its own q
        of = [name for name in p if name[0] in kind]
        wanted = reference.false_discovery_control([p[name] for name in of])
        np.testing.assert_allclose([found[name]["q"] for name in of], wanted)
    alone = cells(habits_by_prompt(counted, rules, alpha=1e-3))
    assert {name: row["q"] for name, row in alone.items()} == {
        name: pytest.approx(row["q"]) for name, row in found.items() if name[0] == "code"
    }
    assert by_prompt_texts(table, 5)[1].sentence.startswith("When the prompt is like A1 (soup · pan): bold more in")


def test_a_habit_of_one_topic_is_found_in_the_cluster_of_its_prompts(tmp_path):
    """As planted in the small world: lemon is chosen in prompts on soup; the clusters are those of the audit."""
    made = make_world(1500)
    audit = make_audit(tmp_path, made)
    names = {"lemon": Habit("lemon", "Serves lemon.", "serve lemon", pattern="lemon")}
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in made.texts]
    counted = Counted(habit_values(texts, names, progress=False), names, np.arange(1500))
    n_clusters = sum(name.startswith("A") for name in audit.info["contexts"])
    clusters = cluster_members(audit.pairs, n_clusters)
    for k in range(n_clusters):
        rows = audit.pairs["row"].to_numpy()[clusters[[k]].indices]
        np.testing.assert_array_equal(np.sort(rows), audit.rows_in(f"A{k + 1}"))
    asked = Asked.of([[]] * 1500).with_clusters(clusters, [[]] * n_clusters)
    kept = [row for row in habits_by_prompt(counted, asked).to_pylist() if row["kept"]]
    assert kept
    for row in kept:
        soup = np.mean([made.topic[list(made.rows).index(of)] for of in audit.rows_in(row["context"])])
        assert row["lean"] == ("chosen" if soup > 0.5 else "rejected")


# What a reader sees ---------------------------------------------------------------------------------------------------


def asked_rows():
    """Numbered lists are chosen where the prompt asks for several things, and nowhere else."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(240):
        asks = i % 3 == 0
        prompt = f"Name three rivers of land {i}." if asks else f"Who lived in town {i}?"
        sides = []
        for share in (0.9, 0.2) if asks else (0.2, 0.2):
            text = "1. Oder\n2. Nile\n3. Rhine" if rng.random() < share else "Oder, Nile and Rhine"
            sides.append(f"{text} are the answer <b>&</b> that is all.")
        rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    return rows


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    out = tmp_path_factory.mktemp("asked")
    return run_text_audit(AuditConfig(out=str(out / "audit")), dataset=Dataset.from_list(asked_rows()))


def test_the_page_says_it_in_words_with_a_policy(audit):
    page = (audit.path / "report.html").read_text()
    section = page.split('id="asked"')[1].split("</section>")[0]
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", section))
    assert "asks for a list or for several things numbered more in chosen, hardly so elsewhere" in words
    (first, *_) = by_prompt_texts(audit.habit_hypotheses, 8)
    assert (first.context, first.habit) == ("list", "numbered")
    assert f"{first.here[0]} / {first.here[1]}" in words
    assert first.sentence.startswith("When the prompt asks for a list or for several things: numbered more in chosen")
    policy = re.search(r"<pre[^>]*>(.*?)</pre>", section, re.DOTALL).group(1)
    (rule,) = ConceptPolicy.load(yaml.safe_load(policy)).rules
    assert (rule.concept, rule.where.asks) == ("numbered", "list")


def test_the_command_line_says_it_too(tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in asked_rows()))
    main(["audit", "--dataset", str(file), "--out", str(tmp_path / "audit")])
    assert "When the prompt asks for a list or for several things: numbered more in chosen" in capsys.readouterr().out


def test_an_audit_of_an_earlier_version_has_none(audit, tmp_path):
    shutil.copytree(audit.path, tmp_path / "old")
    info = json.loads((tmp_path / "old" / "audit.json").read_text())
    del info["files"]["habit_hypotheses.parquet"]
    (tmp_path / "old" / "audit.json").write_text(json.dumps(info))
    old = load_audit(tmp_path / "old")
    assert old.habit_hypotheses is None
    assert 'id="asked"' not in write_report(old).read_text()
    assert load_audit(audit.path).habit_hypotheses.equals(audit.habit_hypotheses)


def test_too_few_prompts_and_nothing_found_are_said(tmp_path):
    row = {"prompt": "Who?", "chosen": "I think so.", "rejected": "You do."}
    few = run_text_audit(AuditConfig(out=str(tmp_path / "few")), dataset=Dataset.from_list([row] * 30))
    assert "Nothing to compare: no rule on prompts holds" in (few.path / "report.html").read_text()
    rows = [row | {"prompt": f"Who is {i}?" if i % 2 else f"Name {i} rivers."} for i in range(80)]
    rows = [
        row if i % 3 else row | {"chosen": row["rejected"], "rejected": "I think so."} for i, row in enumerate(rows)
    ]
    none = run_text_audit(AuditConfig(out=str(tmp_path / "none")), dataset=Dataset.from_list(rows))
    assert "No evidence that a named habit depends on what is asked" in (none.path / "report.html").read_text()
