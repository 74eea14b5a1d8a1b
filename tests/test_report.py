"""The page: honest, escaped, with no script but its own; what it does in a browser is tested in test_browser.py."""

import base64
import hashlib
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
import yaml
from audit_world import make_audit, make_world, raw_dataset
from scipy.stats import ttest_1samp

from trl_anatomy.audit.concept_words import shown_in
from trl_anatomy.audit.config import AuditConfig, recorded
from trl_anatomy.audit.folder import Audit, load_audit
from trl_anatomy.audit.labels import distinctive_terms, group_terms
from trl_anatomy.audit.report import by_prompt, explore, render, write_report
from trl_anatomy.audit.report import page as page_module
from trl_anatomy.audit.report.shell import clean, deviations, points, probability, to_script
from trl_anatomy.cli.shown_audit import print_audit
from trl_anatomy.errors import AnatomyError
from trl_anatomy.shaping.policy import ConceptPolicy

MARKUP = "<script>alert(1)</script></style></pre></div><img src=x onerror=alert(1)>\"'>{{ 7*7 }}"
HOSTILE = MARKUP + "\u202eevil\u202c\x00\x1b שלום"


class Reader(HTMLParser):
    """Every tag and attribute of a page, every text outside of style, and whether tags are balanced."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text, self.stack, self.unbalanced = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if not self.stack or self.stack.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data):
        if not {"style", "script"} & set(self.stack):
            self.text.append(data)


@pytest.fixture(scope="module")
def world():
    world = make_world()
    for texts in world.texts:
        texts["chosen"] += HOSTILE
        texts["prompt"] += " a long question" * 100
    return world


@pytest.fixture(scope="module")
def audit(world, tmp_path_factory):
    return make_audit(tmp_path_factory.mktemp("audit") / 'it\'s "run" <1>', world)


@pytest.fixture(scope="module")
def dataset(world):
    return raw_dataset(world)


@pytest.fixture(scope="module")
def page(audit, dataset):
    return write_report(audit, dataset).read_text(encoding="utf-8")


def test_first_screen_says_which_way_the_pairs_lean(audit, page):
    """It used to say what a model will show; an audit reads pairs alone, and models of this size often do otherwise."""
    text = " ".join(" ".join(Reader(page).text).split())
    assert "2,000 pairs of 4,000 rows (left out: 2,000 empty response)" in text
    assert "2 concepts are shown more in chosen responses, 1 more in rejected ones" in text
    assert "no evidence" in text
    assert re.search(r"The pairs lean towards T\d .* and T\d .*, and away from T\d .*brilliant", text)
    assert "163 of 299 reported concepts that moved went the way the pairs lean" in text
    assert not re.search(r"(model|it|they|data|pairs) will (show|teach|learn)|predicted to", text)
    shifts = [c for c in audit.concepts.to_pylist() if c["verdict"] in ("rises", "falls")]
    order = [c["concept"] for c in sorted(shifts, key=lambda c: -abs(c["predicted"]))]
    assert re.findall(r'<section class="card" id="(T\d+)"', page) == order
    for concept in shifts:
        lean = "more in chosen" if concept["verdict"] == "rises" else "more in rejected"
        card = text.split(f"{concept['concept']} {concept['label']} {lean}")[1]
        assert card.startswith(f" It is {shown_in(concept)}.")
        assert f"fire in a response: {points(concept['predicted'])} points, 95 % interval" in card[:250]
        assert f"row {concept['telling_rows'][0]}" in text


def scripts(page: str) -> tuple[list[str], dict[str, str]]:
    """Scripts that run, and blocks of data by their id."""
    found = re.findall(r"<script([^>]*)>(.*?)</script>", page, re.S)
    held = {re.search(r'id="(\w+)"', how)[1]: text for how, text in found if how}
    return [held.pop("plotly"), *(text for how, text in found if not how)], held


def test_no_text_of_the_data_becomes_markup(page):
    reader = Reader(page)
    assert not reader.unbalanced
    assert not reader.stack
    assert not {"img", "link", "iframe", "object", "form"} & set(reader.tags)
    assert reader.tags.count("script") == 5  # data, pairs, plotly, common, explore
    assert not [name for name, _ in reader.attributes if name.startswith("on") or name in ("style", "src")]
    assert all(value.startswith("#") for name, value in reader.attributes if name == "href")
    text = "".join(reader.text)
    assert MARKUP in text
    assert "[U+202E]evil[U+202C]␀␛" in text
    _, held = scripts(page)
    for block in held.values():
        assert not re.search("[<>&\u2028\u2029]", block)
        assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", block)
    assert MARKUP in json.loads(held["pairs"])["rows"][0][5]


def test_policy_of_the_page_allows_its_own_scripts_and_style_only(page):
    csp = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1))
    style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)
    run, _ = scripts(page)

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert csp.split("; ") == [
        "default-src 'none'",
        f"script-src {' '.join(map(digest, run))}",
        f"style-src {digest(style)} {digest('')}",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert "light-dark(" in style
    assert "@media print" in style
    assert page.index("Content-Security-Policy") < page.index("<style>") < page.index("<script")


def test_a_script_block_holds_any_text():
    hostile = {"a</script><!--": [HOSTILE, "\u2028\u2029", float("nan"), 1 / 3, None, True]}
    written = to_script(hostile)
    assert not re.search("[<>&\u2028\u2029\x00]", written)
    assert json.loads(written) == {"a</script><!--": [clean(HOSTILE), "\u2028\u2029", None, 0.333333, None, True]}


def test_every_pair_is_carried_and_of_more_the_telling_ones(audit, dataset, page, monkeypatch):
    _, held = scripts(page)
    pairs = json.loads(held["pairs"])
    assert [row[0] for row in pairs["rows"]] == audit.pairs["row"].to_pylist()
    assert pairs["rows"][7][4] == clean(dataset[pairs["rows"][7][0]]["prompt"])
    monkeypatch.setattr(explore, "N_PAIRS", 300)
    _, held = scripts(render(audit, dataset))
    rows = {row[0] for row in json.loads(held["pairs"])["rows"]}
    telling = {row for rows in audit.concepts["telling_rows"].to_pylist() for row in rows}
    assert len(rows) == 300
    assert telling <= rows


def test_long_texts_are_cut_to_fit(audit, dataset, monkeypatch):
    monkeypatch.setattr(explore, "TEXT", 2000 * (500 + 2 * 150))
    _, held = scripts(render(audit, dataset))
    pairs = json.loads(held["pairs"])
    assert pairs["cut"] == 500
    assert max(len(row[4]) for row in pairs["rows"]) == 500


def test_tokens_that_fire_are_marked(world, tmp_path, dataset):
    page = render(make_audit(tmp_path, world, samples=True), dataset)
    cells = re.findall(r'<td class="seen">(.*?)</td>', page)
    assert len(cells) == 3
    assert all('<mark class="m' in cell for cell in cells)
    marks = html.unescape(" ".join(re.findall(r'<mark class="m\d">(.*?)</mark>', page)))
    assert "**surely**" in marks
    assert "brilliant" in marks
    assert "lemon" in marks
    assert "alert(1)" not in "".join(re.findall(r"<script[^>]*>(?!\{)[^<]*alert", page))


def test_long_text_is_folded_and_complete(page):
    assert page.count("<details") == page.count("</details>")
    assert "show all of it" in page
    assert "a long question" + " a long question" * 99 in "".join(Reader(page).text)


def test_snippet_is_a_policy_that_yaml_reads(audit, page):
    snippets = [html.unescape(s) for s in re.findall(r'<pre class="snippet" tabindex="0">(.*?)</pre>', page, re.S)]
    top = html.unescape(re.search(r'<pre class="snippet" id="rule" tabindex="0">(.*?)</pre>', page, re.S)[1])
    assert top in snippets
    prompted = [text for text in snippets if "where: {prompts: A" in text]
    assert prompted
    for text in prompted:
        policy = ConceptPolicy.load(yaml.safe_load(text))
        assert policy.rules[0].where.prompts in audit.info["contexts"]
        assert next(iter(policy.concepts.values())).cluster in audit.responses["concept"].to_pylist()
    snippets = [text for text in snippets if text not in prompted]
    assert len(snippets) == 3
    for text in snippets:
        policy = yaml.safe_load(text)
        (name, concept), (rule,) = next(iter(policy["concepts"].items())), policy["rules"]
        assert policy["version"] == 1
        assert concept == {"scorer": "features", "audit": str(audit.path), "cluster": concept["cluster"]}
        assert concept["cluster"] in audit.concept_names
        assert rule == {"explain_away": name, "with": "shape_reward", "strength": "auto"}
    gated = [text for text in snippets if "where: {data: B" in text]
    assert gated
    yaml.safe_load(gated[0].replace("  # - ", "  - "))


def test_prompt_hypotheses_are_listed_with_their_words(audit, page):
    section = page.split('id="prompts"')[1].split("</section>")[0]
    text = " ".join(" ".join(Reader(section).text).split())
    kept = [h for h in audit.hypotheses.to_pylist() if h["view"] == "prompt" and h["kept"] and h["q"] <= 0.05]
    assert kept
    for h in kept[:5]:
        words = " · ".join(audit.info["contexts"][h["context"]]["terms"][:4])
        assert f"In prompts like {h['context']} {words}" in text  # words may say what it asks for
        label = audit.responses.to_pylist()[int(h["concept"][1:]) - 1]["label"]
        side = "towards" if h["lean"] == "chosen" else "away from"
        assert f"the pairs lean {side} {h['concept']} {label or 'no distinctive words'}" in text
        assert f"{deviations(h['mean_in'])} here, {deviations(h['mean_out'])} elsewhere" in text
    assert f"{len(kept)} of " in text


def test_at_most_twenty_hypotheses_are_listed():
    assert by_prompt.N_LINES + 2 * 2 * page_module.N_HYPOTHESES == 20  # two sides of two views


def test_without_the_dataset_rows_are_named(audit):
    page = render(audit)
    assert f"row {audit.concepts.to_pylist()[0]['telling_rows'][0]} of the dataset" in page
    assert "alert(1)" not in "".join(Reader(page).text)


def test_another_dataset_is_refused(audit, dataset):
    with pytest.raises(AnatomyError, match="has 4000 rows, found one of 10"):
        render(audit, dataset.select(range(10)))


def test_permutation_p_values_are_shown_where_asked_for(audit, page, tmp_path):
    assert "swap" not in "".join(Reader(page).text)
    config = AuditConfig(model="m", dataset="d", sae="s", out=str(tmp_path), n_contexts=4, permutations=199)
    swapped = make_audit(tmp_path, make_world(), config)
    concepts = swapped.concepts.to_pylist()
    assert all(c["p_permutation"] == 1 / 200 for c in concepts if c["verdict"] in ("rises", "falls"))
    text = " ".join(" ".join(Reader(render(swapped)).text).split())
    assert "p 0.005 by 199 random swaps of chosen and rejected" in text
    assert "by swaps p 0." in text
    assert "p by swaps" in text
    assert audit.concepts["p_permutation"].null_count == audit.concepts.num_rows


def test_no_evidence_is_said_plainly(tmp_path):
    page = render(make_audit(tmp_path, make_world(seed=5, null=True)))
    assert "<b>No evidence</b> that the sides differ in any of 112 concepts" in page
    assert "No evidence that any concept leans differently" in page
    assert "predicted to" not in page


def test_too_few_pairs_is_said_plainly(tmp_path):
    # Fewer pairs than a verdict takes: in 30 the planted habit is found, now that it is tested among 8 concepts.
    page = render(make_audit(tmp_path, make_world(n=24)))
    assert "<b>Too few pairs to tell</b>: no concept differs" in page
    assert "there are not enough for two contexts" in page


def test_no_concepts_at_all(tmp_path):
    silent = make_world(n=40)
    for span in silent.matrices:
        silent.matrices[span], silent.counts[span] = 0 * silent.matrices[span], 0 * silent.counts[span]
    page = render(make_audit(tmp_path, silent))
    assert "no concept was found" in page
    assert "can not tell anything" in page
    assert 'id="explore"' not in page  # maps of nothing


@pytest.mark.parametrize(("n", "told"), [(1, "1 different prompt,"), (5, "5 different prompts,"), (19, "19 different")])
def test_too_few_prompts_are_told_first(tmp_path, capsys, n, told):
    """Nothing is claimed of them: that is the first thing to read, and there are no empty maps below."""
    audit = make_audit(tmp_path, make_world(n=n))
    print_audit(audit)
    shown = capsys.readouterr().out.strip()
    assert shown.startswith(f"Too few prompts to tell: {told}")
    assert f"No claim about any of {audit.concepts.num_rows} concepts." in shown
    page = render(audit)
    first = page.split("What sets chosen and rejected responses apart</h1>")[1].lstrip()
    assert first.startswith(f"<p>Too few prompts to tell: {told}")
    assert "lean towards" not in page
    assert "No evidence</b>" not in page


def test_what_was_cut_copied_and_pooled_is_told(tmp_path, capsys):
    audit = make_audit(tmp_path, make_world(n=60))
    notes = ["max_length cut 3 chosen and 17 rejected responses of 60 pairs", "5 pairs repeat an earlier one"]
    notes += ["4 pairs stand in the data both ways round", "Concepts are pooled over special tokens"]
    page = render(audit)
    assert not any(note in page for note in notes)
    audit.info["data"]["cut"] = {"chosen": 3, "rejected": 17}
    audit.info["copies"] = {"distinct": 53, "identical": 5, "reversed": 4}
    del audit.info["settings"]["pool_special_tokens"]  # an audit of an earlier version
    page = render(audit)
    print_audit(audit)
    shown = capsys.readouterr().out
    assert all(note in page and note in shown for note in notes)
    assert recorded(audit.info["settings"]).pool_special_tokens


@pytest.mark.parametrize(("add", "said"), [(20, "Chosen"), (-12, "Rejected"), (0, None)])
def test_the_page_says_first_which_side_is_longer(tmp_path, add, said):
    world = make_world()
    world.lengths["chosen"] = (world.lengths["rejected"] + add).astype(np.int32)
    audit = make_audit(tmp_path, world)
    chosen, rejected = (world.lengths[side].astype(float) for side in ("chosen", "rejected"))
    found = audit.info["length"]
    assert (found["chosen"], found["rejected"]) == pytest.approx((chosen.mean(), rejected.mean()))
    page = render(audit)
    if said is None:
        assert (found["chosen_longer"], found["rejected_longer"], found["p"]) == (0, 0, None)
        assert "Chosen and rejected responses are equally long (" in page
        return
    assert found["p"] == pytest.approx(ttest_1samp(np.log(chosen / rejected), 0).pvalue, rel=1e-9, abs=1e-300)
    assert f'{said} responses are <b class="{"rise" if add > 0 else "fall"}">longer</b> in 100.0 % of the pairs' in page


def test_a_difference_in_length_that_can_not_be_told_is_no_equality(tmp_path):
    """Six tokens against sixty in a few pairs, now the one and now the other side: nobody knows, and it says so."""
    world = make_world(n=30)
    world.lengths["chosen"] = np.where(np.arange(30) % 2, 60, 6).astype(np.int32)
    world.lengths["rejected"] = np.where(np.arange(30) % 2, 6, 80).astype(np.int32)
    page = render(make_audit(tmp_path, world))  # and that also where no shift is found
    assert "No evidence that chosen and rejected responses differ in length (33 and 43 tokens on average)." in page


def test_what_the_page_says_of_amplify_is_a_policy(page):
    """Its rule has strength: auto, which amplify refuses."""
    text = " ".join(" ".join(Reader(page).text).split())
    assert "amplify in place of explain_away , with a number in place of auto , strengthens it" in text
    top = yaml.safe_load(
        html.unescape(re.search(r'<pre class="snippet" id="rule" tabindex="0">(.*?)</pre>', page, re.S)[1])
    )
    rule = top["rules"][0]
    rule["amplify"] = rule.pop("explain_away")
    with pytest.raises(AnatomyError, match="found auto"):
        ConceptPolicy.load(top)
    ConceptPolicy.load({**top, "rules": [{**rule, "strength": 1.0}]})


def test_a_snippet_works_wherever_the_policy_lies(tmp_path, monkeypatch):
    """A policy reads paths from its own folder, and the audit was named from the working directory of its run."""
    make_audit(tmp_path / "work" / "audits" / "run1", make_world(n=300))
    monkeypatch.chdir(tmp_path / "work")
    audit = load_audit("audits/run1")
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere" / "policy.yaml"
    file.write_text(page_module.snippet(audit, "T1"))
    assert load_audit(ConceptPolicy.load(file).concepts["habit_t1"].audit).path == audit.path.resolve()
    data = json.loads(scripts(render(audit))[1]["data"])
    assert all(str(audit.path.resolve()) in text for text in data["snippets"].values())


def test_a_shift_that_is_only_length_is_marked(tmp_path):
    world = make_world()
    shown = world.shown["chosen"]["bold"].astype(int) - world.shown["rejected"]["bold"]
    world.lengths["chosen"] = np.where(shown > 0, 60, 30).astype(np.int32)
    world.lengths["rejected"] = np.where(shown < 0, 60, 30).astype(np.int32)
    audit = make_audit(tmp_path, world)
    bold = audit.concepts.to_pylist()[0]
    assert bold["verdict"] == "rises"
    assert abs(bold["length_adjusted"]) < 0.03
    card = render(audit).split(f'id="{bold["concept"]}"')[1].split("</section>")[0]
    assert "no evidence is left once both responses are equally long" in card


def test_labels_are_the_planted_words(audit):
    labels = {frozenset(c["features"]): c["label"] for c in audit.concepts.to_pylist()}
    assert "surely" in labels[frozenset({0, 1, 2, 3})]
    assert "brilliant" in labels[frozenset({4, 5, 6})]
    assert "lemon" in labels[frozenset({11, 12, 13})]


@pytest.mark.parametrize(
    ("habit", "words"),
    [
        ("请注意", ["今天天气很好", "河流和山脉都很美丽", "这里有三个步骤", "我可以告诉你怎么写"]),
        ("ครับ", ["วันนี้อากาศดี", "แม่น้ำและภูเขา", "มีสามขั้นตอน", "เขียนบทกวี"]),
        ("ですね", ["今日は天気がいい", "川と山が美しい", "三つの手順がある", "書き方を教える"]),
    ],
)
def test_terms_of_languages_without_blanks_are_some_characters(habit, words):
    """Between two marks a whole clause used to be one term, which hardly any other text has."""
    rng = np.random.default_rng(0)
    chosen, rejected = [], []
    for _ in range(60):
        said = [words[k] for k in rng.integers(0, len(words), 3)]
        chosen.append(f"{said[0]}{habit}{said[1]}，{said[2]}。")
        rejected.append(f"{said[0]}{said[1]}，{said[2]}。")
    (terms,) = distinctive_terms(chosen, rejected, np.ones((60, 1)))
    assert any(term in habit for term in terms[:3])
    assert all(len(term) <= 12 for term in terms)


def test_terms_are_printable_and_may_be_none():
    chosen = ["plain **bold** \u202e\u202e word"] * 20
    rejected = ["plain word"] * 20
    u = np.column_stack([np.ones(20), -np.ones(20), np.zeros(20)])
    terms = distinctive_terms(chosen, rejected, u)
    assert [set(t) for t in terms] == [{"**", "bold"}, {"word", "plain"}, set()]
    assert distinctive_terms(["a"], ["b"], np.ones((1, 1))) == [[]]
    about = group_terms(["sea tide", "sea wave tide", "soup salt", "salt soup"], np.array([0, 0, 2, 2]), 3)
    assert set(about[0]) == {"sea", "tide"}
    assert about[1] == []
    assert set(about[2]) == {"soup", "salt"}


def test_concepts_without_a_card_have_a_row(audit, dataset, monkeypatch):
    monkeypatch.setattr(page_module, "N_CARDS", 1)
    monkeypatch.setattr(page_module, "N_ROWS", 1)
    monkeypatch.setattr(page_module, "N_EACH", 1)
    page = render(audit, dataset)
    assert "1 smaller difference<" in page  # the first table holds the largest of each direction
    first = page.split("<tbody>")[1].split("</tbody>")[0]
    shown = set(re.findall(r'data-concept="(T\d+)"', first))
    assert {c["verdict"] for c in audit.concepts.to_pylist() if c["concept"] in shown} == {"rises", "falls"}
    assert page.count('<section class="card"') == 1
    names = [c["concept"] for c in audit.concepts.to_pylist() if c["verdict"] in ("rises", "falls")]
    assert set(re.findall(r'class="js rule" data-concept="(T\d+)"', page)) == set(names)


def test_numbers_are_readable():
    assert points(float("nan")) == "n/a"
    assert points(0.00001) == "0.0"
    assert probability(1e-9) == "< 0.0001"
    assert probability(0.0312) == "0.031"
    assert clean("tab\tand\nline \x7f\ud800") == "tab\tand\nline [U+007F][U+D800]"


def test_hypotheses_come_kept_ones_first_then_what_differs_then_by_size(audit, monkeypatch):
    """What is kept has evidence since `kept` means what a reader would keep; folded ones come after it."""
    table = audit.hypotheses
    place = next(i for i, h in enumerate(table.to_pylist()) if h["rank"] == 1)
    for name, value in (("kept", False), ("rank", None), ("folded_under", "B1~T1")):  # as if it were a near-copy
        values = table[name].to_pylist()
        values[place] = value
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    concepts = pa.concat_tables([audit.concepts, audit.responses])
    audit = Audit(audit.path, audit.info, table, concepts, audit.pairs)
    tested = audit.hypotheses.to_pylist()
    assert {(h["kept"], h["differs"]) for h in tested} == {(True, True), (False, True), (False, False)}
    assert all(h["q"] <= audit.info["settings"]["alpha"] for h in tested if h["differs"])

    def place(h):
        return not h["kept"], not h["differs"], h["rank"] or 0, -abs(h["delta"])

    order = sorted(tested, key=place)
    monkeypatch.setattr(explore, "N_HYPOTHESES", len(order) - 3)
    found = explore.explore_data(audit, {})
    assert found["n_hypotheses"] == len(order)
    wanted = [[h[key] for key in explore.HYPOTHESIS] for h in order[:-3]]
    assert repr(found["hypotheses"]["rows"]) == repr(wanted)  # NaN equals NaN
