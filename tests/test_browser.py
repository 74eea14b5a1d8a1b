"""The page in a real browser: it does what it offers, restores what was looked at, and runs no text of the data."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from audit_world import make_audit, make_world, raw_dataset
from browser import HOSTILE, chromium, opened

from trl_anatomy.audit.folder import Audit, write_audit
from trl_anatomy.audit.report import write_report
from trl_anatomy.checking.report import write_comparison
from trl_anatomy.shaping.policy import ConceptPolicy


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def audit(browser, tmp_path_factory) -> Audit:
    """An audit in which every text that comes from outside is hostile: pairs, labels, terms, names, notes."""
    world = make_world()
    for i, texts in enumerate(world.texts):
        for side in texts:
            texts[side] += " " + HOSTILE[i % len(HOSTILE)]
    made = make_audit(tmp_path_factory.mktemp("audit") / 'it\'s "run" <1>', world, samples=True)
    tables = []
    for table in (made.concepts, made.responses):
        labels = [f"{label} {HOSTILE[i % len(HOSTILE)]}" for i, label in enumerate(table["label"].to_pylist())]
        at = table.schema.get_field_index("label")
        tables.append(table.set_column(at, "label", pa.array(labels, pa.string())))
    info = dict(made.info)
    info["contexts"] = {
        name: {**entry, "terms": [*entry["terms"], *HOSTILE]} for name, entry in info["contexts"].items()
    }
    info["notes"] = list(HOSTILE)
    info["model"] = {**info["model"], "name": HOSTILE[0]}
    info["data"] = {**info["data"], "name": HOSTILE[1]}
    audit = write_audit(made.path, info, made.hypotheses, pa.concat_tables(tables), made.pairs, made.samples)
    write_report(audit, raw_dataset(world))
    return audit


@pytest.fixture(scope="module")
def page(audit) -> Path:
    return audit.path / "report.html"


def rows(tab) -> list[str]:
    return tab.eval_on_selector_all(
        "#stage [role=tabpanel]:not([hidden]) tbody tr", "all => all.map(r => r.dataset.id)"
    )


def search(tab, text: str) -> None:
    tab.fill("#search", text)
    tab.wait_for_function(
        "asked => decodeURIComponent(location.hash.replaceAll('+', ' ')).includes('q=' + asked)", arg=text
    )


def test_the_hostile_texts_would_run_in_a_careless_page(browser, tmp_path):
    """Otherwise the other tests could not fail."""
    careless = tmp_path / "careless.html"
    for text in (HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[5]):
        careless.write_text(f"<!doctype html><meta charset=utf-8><script>var data = '{text}';</script>{text}")
        tab = browser.new_page()
        tab.goto(careless.as_uri())
        tab.wait_for_function("window.ran !== undefined", timeout=60_000)
        tab.close()


def test_nothing_of_the_data_runs_anywhere(browser, audit, page):
    with opened(browser, page) as tab:
        for view in ("maps", "concepts", "hypotheses", "pairs"):
            tab.click(f"#tab-{view}")
        for i in range(len(HOSTILE)):
            tab.click(f"#view-pairs tbody tr:nth-child({i + 1})")
            tab.wait_for_selector("#viewer[open]")
            assert HOSTILE[i][:12] in tab.inner_text("#viewer .prompt") or i == 7
            tab.keyboard.press("Escape")
        tab.click("#tab-concepts")
        shown = tab.eval_on_selector_all("#view-concepts tbody tr", "rows => rows.map(row => row.dataset.id)")
        assert set(shown) <= {*audit.concept_names, *audit.responses["concept"].to_pylist()}
        assert len(shown) > len(HOSTILE)
        for name in shown:
            tab.click(f'tr[data-id="{name}"]')
            assert tab.inner_text("#detail .title").startswith(name)
        tab.click("#tab-hypotheses")
        tab.click("#view-hypotheses tbody tr")
        search(tab, "<script>")
        assert tab.locator("script").count() == 6  # those of the file, and plotly once it is needed
        assert (
            tab.locator("img, iframe, svg[onload], base, form, a[href^='javascript'], [onerror], [onfocus]").count()
            == 0
        )
        assert tab.title() == f"What sets the sides of {Path(HOSTILE[1]).name} apart"


def test_first_screen_needs_no_script(browser, page):
    with opened(browser, page, java_script_enabled=False) as tab:
        tab.evaluate = lambda *_: None if _ == ("window.ran",) else []  # there is no script to ask
        assert tab.inner_text("h1") == "What sets chosen and rejected responses apart"
        assert "The pairs lean towards" in tab.inner_text("#first")
        assert "explain_away: habit_" in tab.inner_text("#rule")
        assert tab.is_visible("noscript p")
        assert not tab.is_visible("#explore")
        assert not tab.is_visible("#theme")


def test_search_narrows_tables_by_name_and_by_text(browser, audit, page):
    with opened(browser, page, "#view=hypotheses") as tab:
        search(tab, "T1")
        kept = audit.hypotheses.filter(pa.compute.equal(audit.hypotheses["concept"], "T1")).to_pylist()
        assert set(rows(tab)) == {f"{h['context']}~T1" for h in kept}
        tab.click("#tab-pairs")
        context = audit.pairs["contexts"].to_pylist()
        search(tab, "B2")
        inside = [row for row, names in zip(audit.pairs["row"].to_pylist(), context, strict=True) if "B2" in names]
        assert f"{len(inside):,} of 2,000" in tab.inner_text("#counted")
        assert set(map(int, rows(tab))) <= set(inside)
        search(tab, "number 77.")  # every word, in any order
        assert tab.inner_text("#counted").startswith("20 of")
        search(tab, "no such words at all")
        assert rows(tab) == []
        assert "Nothing fits" in tab.inner_text("#view-pairs")


def test_tables_sort_both_ways(browser, audit, page):
    with opened(browser, page, "#view=concepts") as tab:
        predicted = {c["concept"]: c["predicted"] for t in (audit.concepts, audit.responses) for c in t.to_pylist()}
        tab.click("[data-sort=predicted]")
        shown = [predicted[name] for name in rows(tab)]
        assert shown == sorted(shown, reverse=True)
        assert tab.get_attribute("#view-concepts th[aria-sort]", "aria-sort") == "descending"
        tab.keyboard.press("Enter")  # the focus stays on the header
        shown = [predicted[name] for name in rows(tab)]
        assert shown == sorted(shown)
        tab.click("[data-sort=concept]")
        names = [name for name in rows(tab) if name.startswith("T")]
        assert names == sorted(names, key=lambda name: int(name[1:]))


def test_more_rows_come_when_asked_for(browser, page):
    with opened(browser, page, "#view=pairs") as tab:
        assert len(rows(tab)) == 50
        tab.click(".more-rows")
        assert len(rows(tab)) == 250
        assert len(set(rows(tab))) == 250


def test_maps_can_be_roamed_by_mouse_and_keyboard(browser, audit, page):
    with opened(browser, page, "#view=maps") as tab:
        for kind, letters in (("concepts", "TR"), ("contexts", "BA")):
            place = f"#map-{kind}"
            tab.wait_for_selector(f"{place} .point")
            expected = [name for name in audit.info["maps"] if name[0] in letters and name != "B0"]
            assert tab.locator(f"{place} .point").count() == len(expected)
            before = tab.evaluate(f"document.querySelector('{place}').layout.xaxis.range.slice()")
            box = tab.locator(f"{place} .nsewdrag").bounding_box()
            middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            tab.mouse.move(*middle)
            tab.mouse.wheel(0, -300)
            tab.wait_for_function(
                f"low => Math.abs(document.querySelector('{place}').layout.xaxis.range[0] - low) > 1e-6", arg=before[0]
            )
            tab.mouse.down()
            tab.mouse.move(middle[0] + 60, middle[1] + 20, steps=4)
            tab.mouse.up()
            tab.focus(place)
            tab.keyboard.press("0")
            tab.wait_for_function(
                f"low => Math.abs(document.querySelector('{place}').layout.xaxis.range[0] - low) < 1e-6", arg=before[0]
            )
            tab.keyboard.press("+")
            zoomed = tab.evaluate(f"document.querySelector('{place}').layout.xaxis.range.slice()")
            assert zoomed[1] - zoomed[0] < before[1] - before[0]
            tab.keyboard.press("0")
            tab.keyboard.press("ArrowRight")
            first = tab.inner_text("#detail .title").split()[0]
            assert first in expected
            seen = {first}
            for key in ("ArrowLeft", "ArrowUp", "ArrowDown", "ArrowRight"):
                tab.keyboard.press(key)
                seen.add(tab.inner_text("#detail .title").split()[0])
            assert len(seen) > 1
            assert seen <= set(expected)


def test_a_point_opens_by_click(browser, audit, page):
    with opened(browser, page, "#view=maps") as tab:
        tab.wait_for_selector("#map-concepts .point")
        # The point furthest out is covered by no other.
        places = {name: np.array(at) for name, at in audit.info["maps"].items() if name[0] in "TR"}
        alone = max(places, key=lambda a: min(np.linalg.norm(places[a] - places[b]) for b in places if b != a))
        drawn = [sorted(t.to_pylist(), key=lambda c: -abs(c["predicted"])) for t in (audit.concepts, audit.responses)]
        order = [concept["concept"] for table in drawn for concept in table]
        shown = "name => document.querySelector('#map-concepts + .tip').textContent.startsWith(name)"
        for _ in range(20):  # the map may still be moving into place while it is measured
            box = tab.locator("#map-concepts .point").nth(order.index(alone)).bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            tab.mouse.move(x - 40, y - 40)
            tab.mouse.move(x, y, steps=4)
            tab.wait_for_timeout(500)
            if tab.evaluate(shown, alone):
                break
        tab.mouse.down()
        tab.mouse.up()
        tab.wait_for_function("name => location.hash.includes('sel=' + name)", arg=alone)
        assert tab.inner_text("#detail .title").startswith(alone)


def test_a_pair_opens_with_its_firing_tokens_and_closes_by_keyboard(browser, audit, page):
    fired = {(s["row"], e["concept"]) for s in audit.samples.to_pylist() for e in s["fired"]}
    seen = [c for c in audit.concepts.to_pylist() if (c["telling_rows"][0], c["concept"]) in fired]
    largest = max(seen, key=lambda c: abs(c["predicted"]))
    row, name = largest["telling_rows"][0], largest["concept"]
    with opened(browser, page, f"#view=pairs&q={name}") as tab:
        tab.evaluate(f"document.querySelector('button.open-pair[data-concept={name}]').click()")
        tab.wait_for_selector("#viewer[open]")
        assert tab.inner_text("#viewer-title") == f"Row {row}"
        sample = next(s for s in audit.samples.to_pylist() if s["row"] == row)
        fired = {e["span"]: e["tokens"] for e in sample["fired"] if e["concept"] == name}
        marks = tab.eval_on_selector_all("#viewer mark", "all => all.map(m => m.textContent)")
        assert marks == [sample[span][t] for span in ("prompt", "chosen", "rejected") for t in fired.get(span, [])]
        assert marks
        tab.keyboard.press("ArrowRight")
        assert tab.inner_text("#viewer-title") != f"Row {row}"
        tab.keyboard.press("ArrowLeft")
        assert tab.inner_text("#viewer-title") == f"Row {row}"
        tab.keyboard.press("Escape")
        tab.wait_for_selector("#viewer:not([open])", state="attached")
        assert "pair=" not in tab.evaluate("location.hash")


def test_snippets_copy_and_are_policies(browser, audit, page):
    with opened(browser, page, permissions=["clipboard-read", "clipboard-write"]) as tab:
        for button in (".rulebox .copy", ".card .copyable .copy"):
            tab.evaluate(
                "button => document.querySelector(button).closest('details')?.setAttribute('open', '')", button
            )
            tab.click(button)
            tab.wait_for_function("button => document.querySelector(button).textContent === 'Copied'", arg=button)
            policy = ConceptPolicy.load(yaml.safe_load(tab.evaluate("navigator.clipboard.readText()")))
            assert next(iter(policy.concepts.values())).cluster in audit.concept_names
        tab.click("button.rule >> nth=1")
        name = tab.inner_text("#rule-name")
        policy = ConceptPolicy.load(yaml.safe_load(tab.inner_text("#rule")))
        assert next(iter(policy.concepts.values())).cluster == name
        tab.click("#tab-hypotheses")
        for first in "AB":
            row = next(id for id in rows(tab) if id.startswith(first))
            tab.click(f'tr[data-id="{row}"]')
            policy = ConceptPolicy.load(yaml.safe_load(tab.inner_text("#detail .snippet")))
            context, concept = row.split("~")
            (only,), (rule,) = policy.concepts.values(), policy.rules
            assert (only.cluster, Path(only.audit)) == (concept, audit.path)
            assert (rule.where.prompts if first == "A" else rule.where.data) == context


def test_the_address_restores_the_view(browser, audit, page):
    row = audit.samples["row"][0].as_py()
    with opened(browser, page) as tab:
        tab.click("#tab-hypotheses")
        search(tab, "T1")
        tab.click("[data-sort=n_in]")
        tab.click("#view-hypotheses tbody tr >> nth=1")
        address, shown, title = tab.evaluate("location.hash"), rows(tab), tab.inner_text("#detail .title")
        tab.click("#tab-concepts")
        tab.go_back()
        assert rows(tab) == shown
    with opened(browser, page, address) as tab:
        assert tab.input_value("#search") == "T1"
        assert tab.get_attribute("#tab-hypotheses", "aria-selected") == "true"
        assert rows(tab) == shown
        assert tab.inner_text("#detail .title") == title
    with opened(browser, page, f"#view=pairs&pair={row}") as tab:
        assert tab.inner_text("#viewer-title") == f"Row {row}"
    with opened(browser, page, "#view=<script>&sel=nothing&pair=x&sort=y:z&mark=%00") as tab:
        assert tab.get_attribute("#tab-maps", "aria-selected") == "true"


def test_dark_by_the_system_and_by_the_button(browser, page):
    def paper(tab) -> int:
        return sum(map(int, tab.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)")))

    with opened(browser, page, color_scheme="dark") as tab:
        assert paper(tab) < 150
        tab.click("#theme")
        assert paper(tab) > 600
        tab.click("#tab-maps")
        tab.wait_for_selector("#map-concepts .point")
        light = tab.evaluate("document.querySelector('#map-concepts .textpoint text').style.fill")
        tab.click("#theme")
        assert paper(tab) < 150
        assert tab.evaluate("document.querySelector('#map-concepts .textpoint text').style.fill") != light
    with opened(browser, page, color_scheme="light") as tab:
        assert paper(tab) > 600


def test_keys_lead_everywhere(browser, page):
    with opened(browser, page) as tab:
        tab.keyboard.press("2")
        assert tab.evaluate("document.activeElement.id") == "tab-concepts"
        tab.keyboard.press("ArrowRight")
        assert tab.evaluate("document.activeElement.id") == "tab-hypotheses"
        tab.keyboard.press("4")
        tab.keyboard.press("/")
        assert tab.evaluate("document.activeElement.id") == "search"
        tab.keyboard.type("12")
        assert tab.input_value("#search") == "12"
        tab.wait_for_function("() => location.hash.includes('q=12')")
        tab.focus("#view-pairs tbody tr")
        tab.keyboard.press("ArrowDown")
        row = tab.evaluate("document.activeElement.dataset.id")
        tab.keyboard.press("Enter")
        assert tab.inner_text("#viewer-title") == f"Row {row}"
        assert tab.evaluate("document.querySelector('#viewer').contains(document.activeElement)")
        tab.keyboard.press("Escape")
        tab.wait_for_function("row => document.activeElement.dataset.id === row", arg=row)


def test_print_shows_what_was_found_and_no_controls(browser, page):
    with opened(browser, page) as tab:
        tab.emulate_media(media="print", color_scheme="dark")
        assert tab.is_visible("#found")
        assert tab.is_visible("#rule")
        assert not tab.is_visible("#explore")
        assert not tab.is_visible("#theme")
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_narrow_screens_do_not_scroll_sideways(browser, page):
    with opened(browser, page) as tab:
        for width in (900, 420):
            tab.set_viewport_size({"width": width, "height": 800})
            for view in ("maps", "concepts", "hypotheses", "pairs"):
                tab.click(f"#tab-{view}")
                assert tab.evaluate("document.documentElement.scrollWidth") <= width, (width, view)


def test_the_page_of_a_comparison_runs_nothing_and_can_be_read_point_by_point(browser, tmp_path):
    names = ["<b>plain</b>", "<img src=x onerror=window.ran=1>"]
    shifts = {"T1": 0.4, "T2": -0.2, "T3": 0.0}
    result = {
        "audit": HOSTILE[1],
        "before": HOSTILE[0],
        "after": dict.fromkeys(names, "out"),
        "sampling": {"n_prompts": 10, "n_responses": 10, "max_new_tokens": 5, "seed": 0},
        "concepts": [
            {
                "concept": name,
                "label": HOSTILE[i],
                "verdict": "rises",
                "predicted": shift,
                "ci_low": shift - 0.1,
                "ci_high": shift + 0.1,
                "observed": {key: (shift / (k + 1), shift - 0.1, shift + 0.1) for k, key in enumerate(names)},
            }
            for i, (name, shift) in enumerate(shifts.items())
        ],
        "agreement": {
            name: dict.fromkeys(("r2", "noise_ceiling_r2", "random_clusters_r2", "tilt_r2"))
            | {"n": 3, "n_prompts": 10, "n_responses": 10}
            for name in names
        },
        "rates": [
            {"rule": text, "rates": dict.fromkeys(["before", *names], (0.5, 0.4, 0.6)), "recovery": {names[1]: None}}
            for text in HOSTILE
        ],
    }
    page = write_comparison(result, tmp_path / "compare.html")
    with opened(browser, page) as tab:
        tab.wait_for_selector("#scatter .point")
        assert tab.locator("#scatter .point").count() == 3
        assert tab.locator("#scatter .errorbar").count() == 3
        tab.focus("#scatter")
        tab.keyboard.press("ArrowRight")
        assert tab.inner_text("#point").startswith("T1")
        assert "observed +40.0" in tab.inner_text("#point")
        tab.select_option("#model", index=1)
        assert "observed +20.0" in tab.inner_text("#point")
        assert HOSTILE[3] in tab.inner_text("#rates")
        assert tab.locator("img, #point b b").count() == 0
