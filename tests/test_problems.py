"""Problems of the data: seeded faults are found in made and real pairs, untouched rows raise few alarms; folder, page,
command, columns, gate."""

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import HOSTILE, chromium, opened
from datasets import Dataset
from reading_world import build_tokenizer, tiny_model, tiny_sae

from trl_anatomy import AnatomyError, AuditConfig, load_audit, run_audit
from trl_anatomy.audit.near_copies import NEARLY, overlap, shingles, sketch
from trl_anatomy.audit.problems import PROBLEMS, count_problems, eval_prompts, find_problems, looked_for
from trl_anatomy.audit.text_audit import run_text_audit
from trl_anatomy.cli import main
from trl_anatomy.reading.dataset import load_rows
from trl_anatomy.reading.spans import flatten_text, read_pairs, split_row
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.where import Where

SHARED = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).parents[1] / ".." / "shared"))
REAL = (
    "permissive_upstream/ultrafeedback_subset",
    "permissive_upstream/hh_helpful_test",
    "noncommercial/alpaca_eval2_cross_model",
)
N = 20  # faults of each kind
Row = dict[str, Any]

SUBJECTS = [
    "the river",
    "a small garden",
    "the old library",
    "your first budget",
    "an electric bicycle",
    "the city council",
]
VERBS = ["needs", "usually rewards", "depends on", "is shaped by", "cannot do without", "tends to lose"]
OBJECTS = [
    "patience",
    "regular care",
    "good light",
    "a clear plan",
    "the weather",
    "honest advice",
    "some practice",
    "cold water",
]
LINKS = ["However", "In most years", "For that reason", "As a rule", "On the other hand", "Early in the spring"]


def sentences(rng: np.random.Generator, n: int) -> str:
    made = []
    for _ in range(n):
        link, subject, verb, thing = (rng.choice(part) for part in (LINKS, SUBJECTS, VERBS, OBJECTS))
        made.append(f"{link} {subject} {verb} {thing}, and {rng.integers(2, 900)} people have said so.")
    return " ".join(made)


def clean_rows(n: int = 500, seed: int = 0) -> list[Row]:
    """Pairs as a person would write them: a prompt of their own, two answers of several sentences, some with code."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        code = f"\n\n```python\nprint({i})\n```\n" if i % 7 == 0 else ""
        asked = f"What should I know about {rng.choice(SUBJECTS)} and {rng.choice(OBJECTS)} in the year {1500 + i}?"
        sides = [sentences(rng, int(rng.integers(3, 9))) + (code if k else "") for k in range(2)]
        made.append({"prompt": asked, "chosen": sides[0], "rejected": sides[1]})
    return made


# Prompts that may want another language, in which one is no fault
LANGUAGE = re.compile("(?i)translat|language")
FOREIGN = (
    "El agua del río es fría, pero los vecinos no lo saben y por eso van con las manos vacías a la casa de la playa.",
    "Die Stadt ist nicht groß, aber sie hat einen Markt, auf dem wir mit den Nachbarn auch ein Brot kaufen.",
    "Сначала нужно подготовить землю, а потом посадить семена и поливать их каждый день.",
    "首先你需要准备好土地，然后播种，每天给它们浇水，直到它们长大为止。",
)
LEAKED = (
    *("<|im_end|>\n<|im_start|>assistant\n", "<|eot_id|>", "<end_of_turn>", "[/INST]", "<|endoftext|>"),
    *("<｜Assistant｜>", "\n### Response:\n", "\n### Instruction:\nGo on.\n", "<</SYS>>", "<|user|>"),
)
TURNS = (
    "\n\nHuman: And then?\n\nAssistant: Then it rains.",
    "\nUser: Why is that?\nAssistant: Nobody knows.",
    "\n\n**User:** More, please.\n\n**AI:** Of course.",
)


def _put(row: Row, k: int, change: Callable[[str], str]) -> Row:
    side = ("chosen", "rejected")[k % 2]
    return {**row, side: change(row[side])}


def _middle(text: str, piece: str) -> str:
    words = text.split(" ")
    return " ".join(words[: len(words) // 2]) + piece + " ".join(words[len(words) // 2 :])


def _other_word(text: str) -> str:
    words = text.split(" ")
    return " ".join([*words[: len(words) // 2], "indeed", *words[len(words) // 2 + 1 :]])


FAULTS: dict[str, Callable[[Row, int], Row]] = {
    "copies": lambda row, k: dict(row),
    "near_copies": lambda row, k: (
        {**row, "chosen": _other_word(row["chosen"])},
        {**row, "chosen": row["chosen"].upper(), "rejected": row["rejected"] + " Yes."},
        {
            **row,
            "prompt": row["prompt"] + "\n",
            "chosen": f"**{row['chosen']}**",
            "rejected": _other_word(row["rejected"]),
        },
    )[k % 3],
    "reversed_copies": lambda row, k: {
        **row,
        "chosen": row["rejected"],
        "rejected": row["chosen"] if k % 2 else _other_word(row["chosen"]),
    },
    "same_sides": lambda row, k: {**row, "rejected": row["chosen"] + ("", "\n", "  ")[k % 3]},
    "blank_sides": lambda row, k: _put(row, k, lambda _: ("", " \n\t", "\u200b", "\ufeff\u00a0")[k % 4]),
    "template_text": lambda row, k: _put(row, k, lambda text: _middle(text, LEAKED[k % len(LEAKED)])),
    "extra_turns": lambda row, k: _put(row, k, lambda text: text + TURNS[k % 3]),
    "open_fences": lambda row, k: _put(row, k, lambda text: text + f"\n\n```{('', 'python')[k % 2]}\nprint(1)\n"),
    "length_only": lambda row, k: {**row, "rejected": row["chosen"][: len(row["chosen"]) // (2 + k % 3)]},
    "other_language": lambda row, k: _put(row, k, lambda _: FOREIGN[k % 4]),
}
REPEATS = ("copies", "near_copies", "reversed_copies")


def seeded(rows: list[Row]) -> tuple[list[Row], dict[str, set[int]], set[int]]:
    """The rows with faults added at their end; kind -> rows that have it; the rows that were taken as models."""
    made, planted = list(rows), {}
    long_enough = [
        i for i, row in enumerate(rows) if all(80 < len(row[side]) < 4000 for side in ("chosen", "rejected"))
    ]
    models = np.random.default_rng(1).permutation(long_enough).tolist()
    used = set()
    for kind, fault in FAULTS.items():
        fit = [i for i in models if kind != "other_language" or not LANGUAGE.search(rows[i]["prompt"])]
        taken = fit[:N]
        models = [i for i in models if i not in taken]
        planted[kind] = set(range(len(made), len(made) + N))
        made += [fault(rows[i], k) for k, i in enumerate(taken)]
        if kind in REPEATS:
            used |= set(taken)
        else:  # they stand in place of their models, of which they would be near-copies
            for i in taken:
                made[i] = None
    place = np.cumsum([row is not None for row in made]) - 1
    planted = {kind: {int(place[i]) for i in found} for kind, found in planted.items()}
    return [row for row in made if row is not None], planted, {int(place[i]) for i in used}


def check(rows: list[Row], planted: dict[str, set[int]], used: set[int]) -> None:
    table = find_problems(Dataset.from_list(rows))
    faulty = set().union(*planted.values()) | used
    for kind in FAULTS:
        found = {row["row"] for row in table.to_pylist() if row["problem"] == kind}
        missed = planted[kind] - found
        assert not missed, (kind, [rows[i] for i in missed][:2])
        alarms = len(found - faulty)
        assert alarms <= 0.05 * (len(rows) - len(faulty)), (kind, alarms)


def test_seeded_faults_are_found_and_clean_rows_raise_no_alarm() -> None:
    rows, planted, used = seeded(clean_rows())
    check(rows, planted, used)
    assert find_problems(Dataset.from_list(clean_rows())).num_rows == 0


@pytest.mark.parametrize("name", REAL)
def test_seeded_faults_are_found_in_real_data(name: str) -> None:
    file = SHARED / "data" / "pairs" / f"{name}.jsonl.gz"
    if not file.exists():
        pytest.skip(f"no shared data ({file})")
    raw = load_rows(str(file)).select(range(900))
    split = map(split_row, raw)
    rows = [{span: flatten_text(row[span]) for span in ("prompt", "chosen", "rejected")} for row in split]
    rows, planted, used = seeded(rows)
    check(rows, planted, used)


@pytest.mark.parametrize("kind", ["conversation", "implicit"])
def test_conversations_are_read_as_texts_are(kind: str) -> None:
    rows, planted, _ = seeded(clean_rows())
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    sides = [{side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")} for row in rows]
    if kind == "implicit":
        made = [{side: [*a, *s[side]] for side in s} for a, s in zip(asked, sides, strict=True)]
    else:
        made = [{"prompt": a, **s} for a, s in zip(asked, sides, strict=True)]
    table = find_problems(Dataset.from_list(made)).to_pylist()
    same = planted["same_sides"] if kind == "implicit" else set()  # TRL's rule leaves the last message to the sides
    for name in FAULTS:
        assert planted[name] - {row["row"] for row in table if row["problem"] == name} <= same, name


def test_what_truncation_does_is_told_with_a_tokenizer() -> None:
    rows = clean_rows(60)
    shared = sentences(np.random.default_rng(5), 12)
    for k in range(N):
        rows[k] = {**rows[k], "chosen": f"{shared} One end.", "rejected": f"{shared} Another."}
        rows[N + k] = {**rows[N + k], "chosen": shared, "rejected": "Short."}
        rows[2 * N + k] = {**rows[2 * N + k], "chosen": "A short one.", "rejected": "Short."}
    data = Dataset.from_list(rows)
    pairs = read_pairs(data, build_tokenizer(), max_length=180)
    table = find_problems(data, pairs=pairs).to_pylist()
    found = {kind: {row["row"] for row in table if row["problem"] == kind} for kind in PROBLEMS}
    assert found["same_after_cut"] == set(range(N))
    assert found["cut_sides"] == set(range(2 * N))
    assert "cut_sides" not in looked_for(tokens=False, evaluated=True)
    # copies are those of tokens: rows that differ where nothing is read are copies
    again = Dataset.from_list([rows[0], {**rows[0], "chosen": f"{shared} A third end."}])
    table = find_problems(again, pairs=read_pairs(again, build_tokenizer(), max_length=180)).to_pylist()
    assert [(row["row"], row["other_row"]) for row in table if row["problem"] == "copies"] == [(1, 0)]


def test_prompts_of_an_evaluation_set(tmp_path: Path) -> None:
    rows = clean_rows(100)
    kinds: dict[str, list[Row]] = {
        "prompt": [{"prompt": row["prompt"].upper() + "  "} for row in rows[:N]],
        "messages": [
            {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": row["prompt"]}]}
            for row in rows[:N]
        ],
        "pairs": [
            {"prompt": f"Human: {row['prompt']}\n\nAssistant:", "chosen": "a", "rejected": "b"} for row in rows[:N]
        ],
    }
    for kind, held in kinds.items():
        file = tmp_path / f"{kind}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in held))
        evaluated = eval_prompts(AuditConfig(eval_dataset=str(file)))
        table = find_problems(Dataset.from_list(rows), evaluated=evaluated)
        assert {row["row"] for row in table.to_pylist() if row["problem"] == "eval_prompts"} == set(range(N)), kind
    (tmp_path / "none.jsonl").write_text(json.dumps({"chosen_text": "x"}))
    with pytest.raises(AnatomyError, match="no column 'prompt'"):
        eval_prompts(AuditConfig(eval_dataset=str(tmp_path / "none.jsonl")))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("template_text", "F# writes `<|` and a |> b; HTML has <s>struck</s> text."),
        ("template_text", "## Response times\n\nThey are low."),
        ("extra_turns", "The human: a short history.\nUser: the name of an account."),
        ("open_fences", "```a``` and ````md\n```py\n1\n```\n````"),
        ("other_language", "Café, naïve, Zeitgeist: words that English took."),
        ("other_language", "α + β = γ"),
    ],
)
def test_what_looks_like_a_problem_and_is_none(kind: str, text: str) -> None:
    table = find_problems(
        Dataset.from_list([{"prompt": "What is that?", "chosen": text, "rejected": "I do not know."}])
    )
    assert kind not in table["problem"].to_pylist()


def test_a_language_that_is_asked_for_is_no_problem() -> None:
    languages = zip(("Spanish", "German", "Russian", "Chinese"), FOREIGN, strict=True)
    rows = [
        {"prompt": f"Translate into {name}: cold water", "chosen": text, "rejected": "I do not know how to do that."}
        for name, text in languages
    ]
    rows.append({"prompt": FOREIGN[0], "chosen": FOREIGN[0][:60] + " y nada más.", "rejected": FOREIGN[0][5:]})
    assert "other_language" not in find_problems(Dataset.from_list(rows))["problem"].to_pylist()


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("What is tea ", "It is a drink, made of leaves; hot.", "Yes.."),
        ("what is tea?", "It is a drink made of leaves, hot.", "YES"),
        ("“What is tea?”", "It is a drink, made of leaves, hot.", "“Yes!”"),
    ],
)
def test_short_responses_and_signs_make_no_other_pair(prompt: str, chosen: str, rejected: str) -> None:
    first = {"prompt": "What is tea?", "chosen": "It is a drink, made of leaves, hot.", "rejected": "Yes."}
    for sides in ((chosen, rejected), (rejected, chosen)):
        again = {"prompt": prompt, **dict(zip(("chosen", "rejected"), sides, strict=True))}
        table = find_problems(Dataset.from_list([first, again])).to_pylist()
        kind = "near_copies" if sides[0] == chosen else "reversed_copies"
        assert (kind, 1, 0) in [(row["problem"], row["row"], row["other_row"]) for row in table]
    other = {"prompt": "What is tea?", "chosen": "No.", "rejected": first["chosen"]}
    assert not find_problems(Dataset.from_list([first, other])).num_rows


def test_rows_that_truncation_leaves_out_are_cut_and_known_by_their_text() -> None:
    long = {"prompt": sentences(np.random.default_rng(1), 20), "chosen": "It is so.", "rejected": "It is not so."}
    rows = [*clean_rows(3), long, long, {**long, "chosen": long["rejected"], "rejected": long["chosen"]}]
    data = Dataset.from_list([*rows, {**long, "chosen": ""}])
    pairs = read_pairs(data, build_tokenizer(), max_length=180)
    assert len(pairs) == 3
    table = find_problems(data, pairs=pairs).to_pylist()
    found = {kind: {row["row"] for row in table if row["problem"] == kind} for kind in PROBLEMS}
    assert found["copies"] == {4}
    assert found["reversed_copies"] == {3, 4, 5}
    assert found["cut_sides"] >= {3, 4, 5}
    assert found["blank_sides"] == {6}
    assert 6 not in found["cut_sides"]


def test_a_language_that_is_named_by_the_way_is_not_asked_for() -> None:
    rows = [
        {"prompt": f"Write a motto for a shop that sells {thing}.", "chosen": "Sweet history.", "rejected": FOREIGN[k]}
        for k, thing in ((0, "Italian ice"), (1, "French fries"), (2, "Greek yoghurt"))
    ]
    table = find_problems(Dataset.from_list(rows))
    assert table.filter(table["problem"].to_numpy() == "other_language")["row"].to_pylist() == [0, 1, 2]


def test_sketches_estimate_the_overlap() -> None:
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(40):
        text = sentences(rng, 6)
        other = _other_word(text) if rng.random() < 0.5 else text[: len(text) // 2] + sentences(rng, 3)
        exact = overlap(np.unique(shingles(text)), np.unique(shingles(other)))
        errors.append(float((sketch(text) == sketch(other)).mean()) - exact)
    assert abs(np.mean(errors)) < 0.05
    assert np.std(errors) < 0.15
    assert 0.5 < NEARLY < 1
    assert len(sketch("")) == len(sketch("a"))


@pytest.mark.parametrize("prompt", ["own", "none", "one"])
def test_time_grows_with_the_rows(prompt: str) -> None:
    rows = clean_rows(2000)
    for row in rows:
        row["prompt"] = {"own": row["prompt"], "none": "", "one": "Tell me more."}[prompt]

    def seconds(n: int) -> float:
        data, start = Dataset.from_list(rows[:n]), time.process_time()
        find_problems(data)
        return time.process_time() - start

    seconds(50)
    few, many = seconds(500), seconds(2000)
    assert many < 8 * few + 0.5
    assert many < 6


def test_folder_page_columns_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, planted, _ = seeded(clean_rows(300))
    rows += [{"prompt": f"{bad}?", "chosen": f"{bad}<|im_start|>{bad}", "rejected": bad} for bad in HOSTILE]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["audit", "--dataset", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "audit")]) == 0
    assert "Problems of the data: " in capsys.readouterr().out
    audit = load_audit(tmp_path / "audit")
    # code stands in rejected responses only and so tells the choice: labels are judged by it too
    assert audit.info["problems"] == count_problems(audit.problems, looked_for(False, False, told=True))
    assert all(audit.info["problems"][kind] >= N for kind in FAULTS)
    page = (audit.path / "report.html").read_text()
    assert "<h2>Problems of the data</h2>" in page
    assert not [bad for bad in HOSTILE if bad in page]
    shown = audit.problems.filter(audit.problems["example"])["problem"].to_pylist()
    assert all(shown.count(kind) == 3 for kind in FAULTS)
    data = load_rows(str(tmp_path / "rows.jsonl"))
    column = audit.to_columns(data)["audit_problems"]
    assert {i for i, held in enumerate(column) if "template_text" in held} == planted["template_text"] | {
        len(rows) - 1 - i for i in range(len(HOSTILE))
    }
    with pytest.raises(AnatomyError, match="did not look for 'cut_sides'"):
        audit.rows_with("cut_sides")
    # an audit of an earlier version has none
    info = json.loads((audit.path / "audit.json").read_text())
    del info["problems"], info["files"]["problems.parquet"]
    (audit.path / "audit.json").write_text(json.dumps(info))
    old = load_audit(audit.path)
    assert old.problems is None
    assert old.info["data"]["n_pairs"]


def test_a_gate_drops_the_pairs_that_have_a_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    rows = clean_rows(40)
    rows += [dict(row) for row in rows[:5]]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run_text_audit(
        AuditConfig(model=str(tmp_path / "model"), dataset=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "audit"))
    )
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\nconcepts:\n  length: {scorer: habit, name: words}\n"
        "rules:\n  - {explain_away: length, with: filter_pairs, fraction: all, where: {problem: copies}}\n"
    )
    assert main(["plan", "--policy", str(policy), "--audit", str(tmp_path / "audit"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rules"][0]["rows"] == 5
    policy.write_text(policy.read_text().replace("copies", "copied"))
    with pytest.raises(AnatomyError, match="allowed: a problem of the audit: copies, near_copies"):
        ConceptPolicy.load(policy)
    pairs, audit = read_pairs(Dataset.from_list(rows), build_tokenizer()), load_audit(tmp_path / "audit")
    assert pairs.rows[Where(problem="copies").mask(pairs, audit)].tolist() == list(range(40, 45))
    with pytest.raises(AnatomyError, match="is a problem of an audit, and no audit was given"):
        Where(problem="copies").mask(pairs, None)


def test_an_audit_with_an_sae_looks_for_them_too(tmp_path: Path) -> None:
    data = Dataset.from_list([*clean_rows(60), *clean_rows(5)])
    tiny_sae(hook="blocks.1.hook_resid_post").save_model(str(tmp_path / "sae"))
    settings = AuditConfig(out=str(tmp_path / "audit"), sae=str(tmp_path / "sae"), max_length=100, bootstrap=100)
    audit = run_audit(settings, model=tiny_model(), tokenizer=build_tokenizer(), dataset=data, progress=False)
    assert set(audit.info["problems"]) == set(looked_for(tokens=True, evaluated=False))
    assert audit.rows_with("copies").tolist() == list(range(60, 65))
    assert audit.info["problems"]["cut_sides"] == 65
    columns = audit.to_columns(data)
    assert columns.column_names[3:] == ["audit_contexts", "audit_concepts", "audit_scores", "audit_problems"]
    assert columns[64]["audit_problems"] == ["copies", "cut_sides"]
    assert "<h2>Problems of the data</h2>" in (audit.path / "report.html").read_text()


def test_nothing_of_the_data_runs_on_the_page(tmp_path: Path) -> None:
    rows = [{"prompt": bad, "chosen": f"{bad}<|im_start|>{bad}", "rejected": bad} for bad in HOSTILE]
    rows += [{"prompt": bad, "chosen": bad, "rejected": bad} for bad in HOSTILE]
    audit = run_text_audit(AuditConfig(out=str(tmp_path / "audit")), dataset=Dataset.from_list([*rows, *rows]))
    assert {"copies", "same_sides", "template_text"} <= set(audit.problems["problem"].to_pylist())
    with chromium() as browser, opened(browser, audit.path / "report.html") as tab:
        assert tab.locator("#problems tbody tr").count() >= 3
