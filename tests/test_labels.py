"""Names for concepts and contexts: asked for over real HTTP, checked on held-out texts, and part of no test."""

import itertools
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_files import config_for, write_inputs
from audit_world import HABITS, make_audit, make_world, raw_dataset
from scipy.stats import rankdata
from test_region_view import save, sft_rows, sft_world

from trl_anatomy.audit import labelling
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import Audit, load_audit, write_audit
from trl_anatomy.audit.labelling import (
    HALVINGS,
    _Tasks,
    balanced_accuracy,
    label_audit,
    more_often,
    parse_label,
    stretch,
)
from trl_anatomy.audit.region_view import analyse_regions
from trl_anatomy.audit.report import render
from trl_anatomy.audit.run import run_audit
from trl_anatomy.audit.titles import LABEL_FILE, read_labels
from trl_anatomy.cli import main
from trl_anatomy.cli.shown_audit import print_audit
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import chat as chat_module
from trl_anatomy.reading.chat import ChatEndpoint, LocalChat, TooLongError

Reply = Callable[[dict[str, Any]], tuple[int, dict[str, str], str]]
WORLD = make_world(600)


def texts(i: int) -> tuple[str, str, str]:
    row = WORLD.texts[i]
    return row["prompt"], row["chosen"], row["rejected"]


def said(content: Any, status: int = 200, **headers: str) -> tuple[int, dict[str, str], str]:
    text = content if isinstance(content, str) else json.dumps(content)
    return status, headers, json.dumps({"choices": [{"message": {"content": text}}]})


def question(body: dict[str, Any]) -> str:
    return body["messages"][0]["content"]


def lines(text: str) -> list[str]:
    """The texts that a question shows, in order."""
    return [json.loads(line) for line in re.findall(r'(?m)^(?:\d+\. )?("(?:.*)")$', text)]


def is_check(text: str) -> bool:
    return "Which of them fit?" in text


def knowing(body: dict[str, Any]) -> tuple[int, dict[str, str], str]:
    """Names a concept by the habit that all of its responses and fewest of the others show; tells a habit's texts."""
    text = question(body)
    if is_check(text):
        name = re.search(r"Title: (\w+)", text)[1]
        habit = HABITS.get(name, {"text": "no habit"})["text"]
        return said({"matches": [i for i, line in enumerate(lines(text), start=1) if habit in line]})
    if "WITHOUT\n" not in text:
        return said({"title": "a topic", "description": "Prompts on it.", "keywords": []})
    having, lacking = (lines(part) for part in text.split("\nWITHOUT\n"))

    def lift(habit: str) -> int:
        return sum(HABITS[habit]["text"] in t for t in having) - sum(HABITS[habit]["text"] in t for t in lacking)

    name = max(HABITS, key=lift)
    return said(f'Here you are:\n```json\n{{"title": "{name}", "description": "It says so.", "keywords": ["x"]}}\n```')


class Endpoint(BaseHTTPRequestHandler):
    """Answers as it is told, and remembers what it was asked."""

    reply: Reply
    asked: list[dict[str, Any]]
    keys: list[str | None]

    def do_POST(self) -> None:
        kind = type(self)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind.asked.append({"path": self.path, **body})
        kind.keys.append(self.headers.get("Authorization"))
        status, headers, answer = kind.reply(body)
        try:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(answer.encode())
        except OSError:  # the other side has given up
            pass

    do_GET = do_POST

    def log_message(self, *_args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # with the usual five, one of eight who come together waits a second


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(chat_module.time, "sleep", found.append)
    return found


@pytest.fixture
def endpoint(waits: list[float]) -> Iterator[tuple[Any, ChatEndpoint]]:
    kind: Any = type("Here", (Endpoint,), {"reply": staticmethod(knowing), "asked": [], "keys": []})
    server = Server(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield kind, ChatEndpoint(f"http://127.0.0.1:{server.server_port}/v1", "namer-1", timeout=10)
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_audit(tmp_path_factory.mktemp("labels") / "run", WORLD, samples=True).path


@pytest.fixture
def audit(made: Path, tmp_path: Path) -> Audit:
    shutil.copytree(made, tmp_path / "run")
    return load_audit(tmp_path / "run")


def bytes_of(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != LABEL_FILE]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def habit_concepts(audit: Audit) -> dict[str, str]:
    """Concept -> the habit whose features it holds."""
    of = {tuple(habit["features"]): name for name, habit in HABITS.items()}
    features = {name: tuple(ids.tolist()) for name, ids in zip(audit.concept_names, audit.communities, strict=True)}
    found = {name: of[ids] for name, ids in features.items() if ids in of}
    assert len(found) >= 3
    return found


# What a label says ----------------------------------------------------------------------------------------------------


def test_names_are_shown_everywhere_and_change_nothing_else(
    audit: Audit, endpoint: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _, chat = endpoint
    before = bytes_of(audit.path)
    found = label_audit(audit, texts, chat, progress=False)
    assert bytes_of(audit.path) == before
    assert set(found) == {*audit.concept_names, *audit.responses["concept"].to_pylist(), *audit.info["contexts"]} - {
        "B0"
    }
    for name, habit in habit_concepts(audit).items():
        label = found[name]
        assert (label.title, label.source, label.labeller) == (habit, "endpoint", "namer-1 (endpoint)")
        assert (label.score, label.n_held_out) == (1.0, 20)
        assert label.p == pytest.approx(1 / math.comb(20, 10), rel=1e-6)
        assert label.name == f"{habit} (1.00)"
    again = load_audit(audit.path)
    assert again.labels == found
    shown = dict(zip(again.concept_names, again.labelled(again.concepts)["label"].to_pylist(), strict=True))
    page = render(again, raw_dataset(WORLD))
    print_audit(again)
    printed = capsys.readouterr().out
    taught = {c["concept"]: c for c in again.concepts.to_pylist() if c["verdict"] in ("rises", "falls")}
    for name, habit in habit_concepts(audit).items():
        assert shown[name] == f"{habit} (1.00)"
        if name in taught:
            assert re.search(rf"{name} +\d+ %.*{habit} \(1\.00\)$", printed, re.MULTILINE)
            assert re.search(rf'id="{name}">\s*<h2>{name} .*more in (chosen|rejected)', page)
            assert "It says so. Named by namer-1 (endpoint), which sorts held-out texts" in page
    assert "balanced accuracy with which it sorts held-out texts" in page
    held = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    rows = [dict(zip(held["concepts"]["columns"], row, strict=True)) for row in held["concepts"]["rows"]]
    for row in rows:
        if row["concept"] in habit_concepts(audit):
            assert set(again.concepts["terms"].to_pylist()[again.concept_names.index(row["concept"])]) <= set(
                row["words"].split()
            )
    # A context's prompts are told by nothing here: its words stay.
    assert {context: again.about(context) for context in again.info["contexts"]} == {
        context: entry["terms"] for context, entry in again.info["contexts"].items()
    }


def test_a_score_is_that_of_the_answers(audit: Audit, endpoint: Any) -> None:
    """Against counts and binomial coefficients, for an endpoint that says yes to every third line."""
    kind, chat = endpoint
    checks: dict[str, list[str]] = {}
    count = itertools.count()

    def third(body: dict[str, Any]) -> Any:
        text = question(body)
        if is_check(text):
            checks[re.search("Title: (.*)", text)[1]] = lines(text)
            return said({"matches": list(range(1, len(lines(text)) + 1, 3))})
        status, headers, answer = knowing(body)
        for habit in HABITS:
            answer = answer.replace(f'{habit}\\"', f'{habit} {next(count)}\\"')
        return status, headers, answer

    kind.reply = staticmethod(third)
    found = label_audit(audit, texts, chat, progress=False)
    for name, habit in habit_concepts(audit).items():
        label = found[name]
        own = [HABITS[habit]["text"] in line for line in checks[label.title]]
        n, yes = sum(own), len(own[::3])
        assert len(own) == 2 * n == label.n_held_out
        hits = sum(own[::3])
        assert label.score == pytest.approx((hits / n + 1 - (yes - hits) / n) / 2)
        ways = [math.comb(n, k) * math.comb(n, yes - k) for k in range(hits, min(n, yes) + 1)]
        assert label.p == pytest.approx(sum(ways) / math.comb(2 * n, yes))
        if label.p > 0.05:
            assert label.name is None
            assert f"Unsure: namer-1 (endpoint) proposed the name {label.title}" in label.told(())
    assert any(label.score is not None and label.name is None for label in found.values())


def test_held_out_texts_do_not_stand_in_the_question(audit: Audit) -> None:
    groups = audit.pairs["prompt_group"].to_numpy()
    for task in _Tasks(audit).all():
        shown = {groups[text.pair] for text in (*task.shown, *task.without)}
        held = [groups[text.pair] for text in (*task.held_out, *task.others)]
        assert len(shown) > 3
        assert not shown & set(held)
        assert len(task.held_out) == len(task.others) <= 10
        if task.is_context:
            inside = set(audit.rows_in(task.name).tolist())
            rows = audit.pairs["row"].to_numpy()
            assert {int(rows[text.pair]) for text in (*task.shown, *task.held_out)} <= inside
            assert not {int(rows[text.pair]) for text in task.others} & inside
        else:
            assert len(set(held)) == len(task.held_out)  # the two responses of a pair


def test_terms_get_a_score_without_a_model(audit: Audit) -> None:
    found = label_audit(audit, texts)
    assert {label.source for label in found.values()} == {"terms"}
    place = {task.name: task for task in _Tasks(audit).all()}
    n_scored = 0
    for name, label in found.items():
        task = place[name]
        if label.terms_score is None:
            continue
        n_scored += 1
        counts = []
        for text in (*task.held_out, *task.others):
            whole = texts(text.pair)[("prompt", "chosen", "rejected").index(text.place)].lower()
            counts.append(sum(term in re.findall(r"\w+|[^\w\s]+", whole) for term in task.terms))
        n = len(task.held_out)
        share = (rankdata(counts)[:n].sum() - n * (n + 1) / 2) / n**2
        assert label.terms_score == pytest.approx(share)
    assert n_scored > 5
    flattery = next(name for name, habit in habit_concepts(audit).items() if habit == "flattery")
    assert found[flattery].terms_score == 1.0
    assert "have more of them than others 1.00 of the time" in render(audit)


def test_chance_is_counted_exactly() -> None:
    """By all ways to put as many yeses."""
    truth = np.arange(8) < 4
    for yes in range(9):
        ways = [sum(i < 4 for i in chosen) for chosen in itertools.combinations(range(8), yes)]
        for hits in set(ways):
            given = np.zeros(8, dtype=bool)
            given[:hits] = True
            given[4 : 4 + yes - hits] = True
            score, p = balanced_accuracy(given, truth)
            assert score == (hits / 4 + 1 - (yes - hits) / 4) / 2
            assert p == pytest.approx(np.mean(np.array(ways) >= hits))
    assert more_often(np.array([2, 2]), np.array([2, 2])) == (0.5, 1.0)


def test_the_stretch_is_the_one_that_fires_most() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        tokens = ["x" * int(n) for n in rng.integers(0, 6, 30)]
        share = rng.random(30) * (rng.random(30) < 0.2)
        first, last = stretch(tokens, share, 12)
        fits = [
            share[a:b].sum()
            for a in range(30)
            for b in range(a + 1, 31)
            if b == a + 1 or sum(map(len, tokens[a:b])) <= 12
        ]
        assert share[first:last].sum() == pytest.approx(max(fits))
        assert last == first + 1 or sum(map(len, tokens[first:last])) <= 12


def test_concepts_are_shown_where_they_fire(audit: Audit, endpoint: Any) -> None:
    kind, chat = endpoint
    label_audit(audit, texts, chat, progress=False)
    marked = [question(body) for body in kind.asked if "<<" in question(body)]
    assert marked
    assert all("between << and >>" in text and not is_check(text) for text in marked)
    shown = [line for text in marked for line in lines(text) if "<<" in line]
    habits = [habit["text"].split() for habit in HABITS.values()]
    for line in shown:
        for part in re.findall("<<(.*?)>>", line):
            assert any(set(part.split()) <= set(words) for words in habits)


# When it goes wrong ---------------------------------------------------------------------------------------------------


def test_it_goes_on_where_it_stopped(audit: Audit, endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, chat = endpoint
    monkeypatch.setenv("NAMER_KEY", "sk-secret")
    chat = ChatEndpoint(chat.url, chat.model, "NAMER_KEY")
    left = [21]

    def dying(body: dict[str, Any]) -> Any:
        left[0] -= 1
        if left[0] < 0:
            return said({"error": "no such key sk-secret"}, status=401)
        return knowing(body)

    kind.reply = staticmethod(dying)
    with pytest.raises(AnatomyError, match=r"refused: 401 .* labels were made and are kept; start again") as told:
        label_audit(audit, texts, chat, progress=False)
    assert "sk-secret" not in str(told.value)
    kept = read_labels(audit.path)
    assert 0 < len(kept) <= 11
    assert all(label.score is not None for label in kept.values())
    kind.reply, kind.asked[:] = staticmethod(knowing), []
    found = label_audit(load_audit(audit.path), texts, chat, progress=False)
    n_checked = sum(label.score is not None for name, label in found.items() if name not in kept)
    assert len(kind.asked) == len(found) - len(kept) + n_checked
    assert {name: found[name] for name in kept} == kept
    kind.asked[:] = []
    assert label_audit(audit, texts, chat, progress=False) == found
    assert label_audit(audit, texts) == found
    assert not kind.asked
    assert set(kind.keys) == {"Bearer sk-secret"}
    for path in audit.path.rglob("*"):
        assert not path.is_file() or b"sk-secret" not in path.read_bytes()
    left[0], kind.reply = 5, staticmethod(dying)
    with pytest.raises(AnatomyError, match="refused: 401"):
        label_audit(audit, texts, ChatEndpoint(chat.url, "namer-2"), progress=False)
    mixed = load_audit(audit.path).labels
    assert set(mixed) == set(found)
    assert {label.labeller for label in mixed.values()} >= {"namer-1 (endpoint)"}
    kind.reply = staticmethod(knowing)
    other = label_audit(audit, texts, ChatEndpoint(chat.url, "namer-2"), progress=False)
    assert {label.labeller for label in other.values()} == {"namer-2 (endpoint)"}


def test_a_malformed_answer_is_asked_for_once_more_and_then_falls_to_terms(audit: Audit, endpoint: Any) -> None:
    kind, chat = endpoint
    odd = ("I would rather not.", '{"title": 7}', '{"title": "x", "keywords": "y"}', "{" * 5000, '{"title": "\\u200b"}')

    def babbling(body: dict[str, Any]) -> Any:
        return said(odd[len(question(body)) % len(odd)]) if "seed" not in body else said("No.")

    kind.reply = staticmethod(babbling)
    found = label_audit(audit, texts, chat, progress=False)
    assert {label.source for label in found.values()} == {"terms"}
    assert all("not of the form" in label.note for label in found.values() if label.note)
    assert len(kind.asked) == 2 * sum("not of the form" in (label.note or "") for label in found.values())
    assert {(body["temperature"], body.get("seed")) for body in kind.asked} == {(0.0, None), (0.7, 1)}
    n = len(kind.asked)
    label_audit(audit, texts, chat, progress=False)
    assert len(kind.asked) == n  # they are not asked for ever again
    (audit.path / LABEL_FILE).unlink()
    kind.reply = staticmethod(lambda body: knowing(body) if "seed" in body else said("Hm."))
    found = label_audit(audit, texts, chat, progress=False)
    assert all(found[name].title == habit for name, habit in habit_concepts(audit).items())


def test_an_answer_to_the_check_that_says_something_else_leaves_the_terms(audit: Audit, endpoint: Any) -> None:
    kind, chat = endpoint
    kind.reply = staticmethod(lambda body: said({"matches": [0]}) if is_check(question(body)) else knowing(body))
    found = label_audit(audit, texts, chat, progress=False)
    for name in habit_concepts(audit):
        assert (found[name].score, found[name].name) == (None, None)
        assert "unchecked" in found[name].told(())


def test_a_busy_endpoint_is_waited_for(endpoint: Any, waits: list[float]) -> None:
    kind, chat = endpoint
    answers = [
        said("", status=429, Retry_After="7"),
        said("", status=503, Retry_After="86400"),
        said("", status=429, Retry_After="Thu, 01 Jan 1970 00:00:00 GMT"),
        said("", status=500),
        said("done"),
    ]
    kind.reply = staticmethod(lambda body: answers.pop(0))
    assert chat.ask("?", max_tokens=5) == "done"
    assert waits == [7.0, 60.0, 0.0, 13.5]
    kind.reply = staticmethod(lambda body: said("", status=429))
    with pytest.raises(AnatomyError, match="refused: 429"):
        chat.ask("?", max_tokens=5)


def test_an_endpoint_that_hangs_or_is_not_there(endpoint: Any) -> None:
    kind, chat = endpoint
    hanging = threading.Event()
    first = [True]

    def slow(body: dict[str, Any]) -> Any:
        if first.pop() if first else False:
            hanging.wait(2)
        return said("late but there")

    kind.reply = staticmethod(slow)
    assert ChatEndpoint(chat.url, "m", timeout=0.3).ask("?", max_tokens=5) == "late but there"
    hanging.set()
    assert len(kind.asked) == 2
    with pytest.raises(AnatomyError, match="cannot be reached"):
        ChatEndpoint("http://127.0.0.1:1/v1", "m", timeout=2).ask("?", max_tokens=5)
    kind.reply = staticmethod(lambda body: (200, {}, "<html>hello</html>"))
    with pytest.raises(AnatomyError, match="does not answer like chat/completions"):
        chat.ask("?", max_tokens=5)
    kind.reply = staticmethod(lambda body: (200, {}, '{"choices": [{"message": {"content": [1]}}]}'))
    with pytest.raises(AnatomyError, match="does not answer like chat/completions"):
        chat.ask("?", max_tokens=5)


def test_the_key_goes_to_the_endpoint_only(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, chat = endpoint
    with pytest.raises(AnatomyError, match="NAMER_KEY, which is to hold the key, is not set"):
        ChatEndpoint(chat.url, "m", "NAMER_KEY").ask("?", max_tokens=5)
    monkeypatch.setenv("NAMER_KEY", "sk-secret")
    kind.reply = staticmethod(lambda body: (307, {"Location": f"{chat.url}/elsewhere"}, ""))
    keyed = ChatEndpoint(chat.url, "m", "NAMER_KEY")
    with pytest.raises(AnatomyError, match="refused: 307"):
        keyed.ask("?", max_tokens=5)
    assert [body["path"] for body in kind.asked] == ["/v1/chat/completions"]
    assert "sk-secret" not in repr(keyed)
    with pytest.raises(AnatomyError, match="begins with http"):
        ChatEndpoint("file:///etc/hosts", "m").ask("?", max_tokens=5)


def test_a_model_that_reads_little_is_asked_shorter(audit: Audit, endpoint: Any) -> None:
    kind, chat = endpoint
    limit = [2200]

    def small(body: dict[str, Any]) -> Any:
        if len(question(body)) > limit[0]:
            return 400, {}, '{"error": {"message": "This model\'s maximum context length is 512 tokens"}}'
        return knowing(body)

    kind.reply = staticmethod(small)
    found = label_audit(audit, texts, chat, progress=False)
    assert any(label.title is not None for label in found.values())
    assert any(len(question(body)) > limit[0] for body in kind.asked)
    limit[0] = 10
    (audit.path / LABEL_FILE).unlink()
    with pytest.raises(AnatomyError, match=r"maximum context length is 512 tokens.*0 of \d+ labels were made"):
        label_audit(audit, texts, chat, progress=False)
    assert HALVINGS == 3


def test_a_hostile_name_is_only_ever_text(audit: Audit, endpoint: Any) -> None:
    kind, chat = endpoint
    title = "<script>alert(1)</script>\u202e\x00\n" + "x" * 200
    hostile = {"title": title, "description": "</p><img src=x onerror=alert(1)>" * 40, "keywords": ["<b>"] * 50}

    def reply(body: dict[str, Any]) -> Any:
        text = question(body)
        if not is_check(text):
            return said(hostile)
        return said({"matches": [i for i, line in enumerate(lines(text), 1) if "brilliant" in line]})

    kind.reply = staticmethod(reply)
    found = label_audit(audit, texts, chat, progress=False)
    flattery = next(name for name, habit in habit_concepts(audit).items() if habit == "flattery")
    label = found[flattery]
    assert label.name is not None
    assert label.title == "<script>alert(1)</script> " + "x" * 54
    assert len(label.description) <= 300
    assert len(label.keywords) == 8
    page = render(audit, raw_dataset(WORLD))
    assert "&lt;script&gt;alert(1)&lt;/script&gt; xxx" in page
    assert "<script>alert" not in page
    assert "<img" not in page
    assert parse_label("null") is None


def test_labels_of_other_tables_are_not_shown(audit: Audit, endpoint: Any) -> None:
    kind, chat = endpoint
    found = label_audit(audit, texts, chat, progress=False)
    other = make_audit(audit.path, make_world(600, seed=1), samples=True)
    assert other.labels == {}
    assert "namer-1" not in render(other)
    kind.asked[:] = []
    again = make_audit(audit.path, WORLD, samples=True)
    assert load_audit(again.path).labels == found
    (audit.path / LABEL_FILE).write_text("{}")
    with pytest.raises(AnatomyError, match=r"labels\.json: damaged"):
        _ = load_audit(audit.path).labels


# From the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_inputs(root)
    run_audit(config_for(root, "out"), progress=False)
    return root


def test_report_asks_an_endpoint(root: Path, endpoint: Any, capsys: pytest.CaptureFixture[str]) -> None:
    kind, chat = endpoint

    def reply(body: dict[str, Any]) -> Any:
        text = question(body)
        own = {"matches": [i for i, line in enumerate(lines(text), 1) if "**" in line]}
        return said(own if is_check(text) else {"title": "Bold words", "description": "", "keywords": []})

    kind.reply = staticmethod(reply)
    folder = root / "out" / "audit"
    first = load_audit(folder).labels
    assert first  # an audit scores its terms
    assert {label.source for label in first.values()} == {"terms"}
    before = bytes_of(folder)
    asked = ["report", "--audit", str(folder), "--label_url", chat.url, "--label_model", "namer-1"]
    assert main(asked) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    after = bytes_of(folder)
    assert {name for name in after if after[name] != before[name]} == {"report.html"}
    labels = load_audit(folder).labels
    assert any(label.marked for label in labels.values())  # read again with model and SAE
    page = (folder / "report.html").read_text()
    assert any(label.name for label in labels.values())
    assert "Bold words (" in page
    n = len(kind.asked)
    assert main(asked) == 0
    assert main(["report", "--audit", str(folder)]) == 0
    assert len(kind.asked) == n
    assert "Bold words (" in (folder / "report.html").read_text()
    # The same with the audit, which is made again from its harvest: what was named stays, and JSON is all that it says.
    config = config_for(root, "out")
    words = [f"--{name}={getattr(config, name)}" for name in ("model", "dataset", "sae", "out", "device", "bootstrap")]
    assert main(["audit", *words, f"--shard_pairs={config.shard_pairs}", *asked[3:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("report.html\n")[-1])["counts"]
    assert len(kind.asked) == n
    assert load_audit(folder).labels == labels
    assert {name: data for name, data in bytes_of(folder).items() if name.endswith(".parquet")} == {
        name: data for name, data in before.items() if name.endswith(".parquet")
    }


def write_model(folder: Path, *, chats: bool = True, speaks: bool = True) -> Path:
    from reading_world import build_tokenizer, tiny_model

    tiny_model().config.save_pretrained(folder)
    if speaks:
        tokenizer = build_tokenizer()
        tokenizer.chat_template = tokenizer.chat_template if chats else None
        tokenizer.save_pretrained(folder)
    return folder


def test_what_cannot_work_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, message in (
        (["--label_url", "http://localhost:1/v1"], "--label_url needs --label_model"),
        (["--label_model", "m", "--label_key_variable", "K"], "goes with --label_url"),
        (["--label_url", "ftp://x", "--label_model", "m"], "begins with http"),
        (["--label_url", "http://", "--label_model", "m"], "names a host"),
        (["--label_url", "http://x:port/v1", "--label_model", "m"], "names a host"),
        (["--label_url", "http://x y/v1", "--label_model", "m"], "names a host"),
        (["--label_model", str(tmp_path / "none")], "cannot be loaded"),
        (["--label_model", str(write_model(tmp_path / "silent", chats=False))], "no chat_template"),
        (["--label_model", str(write_model(tmp_path / "words", speaks=False))], "its tokenizer cannot be loaded"),
        (["--label_url", "http://x/v1", "--label_model", "m", "--label_key_variable", "NOT_SET"], "is not set"),
    ):
        for command in (["report", "--audit", str(tmp_path)], ["audit", "--out", str(tmp_path / "out")]):
            assert main([*command, *flags]) == 2
            assert message in capsys.readouterr().err


# A model on this machine ----------------------------------------------------------------------------------------------


def test_a_local_model_that_cannot_answer_leaves_the_terms(audit: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with random weights: it runs from end to end, and nothing it says is a name."""
    import torch
    from reading_world import build_tokenizer, tiny_model

    model, tokenizer = tiny_model(), build_tokenizer()
    state = torch.get_rng_state()
    chat = LocalChat(model, tokenizer, "tiny")
    model.config.max_position_embeddings = 10_000
    assert chat.ask("What is air?", max_tokens=4) == chat.ask("What is air?", max_tokens=4)
    seeded = {chat.ask("What is air?", max_tokens=8, temperature=1.5, seed=seed) for seed in range(4)}
    assert len(seeded) > 1
    assert torch.equal(state, torch.get_rng_state())
    model.config.max_position_embeddings = 20
    with pytest.raises(TooLongError, match="does not fit into 20"):
        chat.ask("What is air? " * 20, max_tokens=4)
    model.config.max_position_embeddings = 10_000
    monkeypatch.setattr(labelling, "LABEL_TOKENS", 3)
    for shown in ("TYPICAL", "DRAWN", "RESPONSES"):  # so few texts that the model has little to read
        monkeypatch.setattr(labelling, shown, 4)
    found = label_audit(audit, texts, chat, progress=False)
    assert {(label.source, label.labeller) for label in found.values()} == {("terms", "tiny (local)")}
    assert sum("not of the form" in (label.note or "") for label in found.values()) > 5
    tokenizer.chat_template = None
    with pytest.raises(AnatomyError, match="no chat_template"):
        LocalChat(model, tokenizer, "tiny")


def test_a_chat_model_from_a_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is too small to answer as asked: it runs, and the page keeps the terms."""
    shared = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).parents[2] / "shared")) / "models" / "tinychat1m"
    if not shared.is_dir():
        pytest.skip("the model is not part of the repository: set TRL_ANATOMY_SHARED to the folder that holds it")
    monkeypatch.setattr(labelling, "LABEL_TOKENS", 12)
    folder = root / "out" / "audit"
    (folder / LABEL_FILE).unlink()
    assert main(["report", "--audit", str(folder), "--label_model", str(shared)]) == 0
    found = load_audit(folder).labels
    assert {(label.source, label.labeller) for label in found.values()} == {("terms", "tinychat1m (local)")}
    assert any("not of the form" in (label.note or "") for label in found.values())


# Data without pairs ---------------------------------------------------------------------------------------------------


def test_sft_data_are_named_too(made: Path, tmp_path: Path, endpoint: Any) -> None:
    """Of a region the prompts, of a concept responses of the rows that show most and least of it."""
    _, chat = endpoint
    world = sft_world(600)
    rows = sft_rows(world)
    settings = AuditConfig(model="m", dataset="d", sae="s", out=str(tmp_path), data_kind="sft", region="topic=1")
    findings = analyse_regions(save(world, tmp_path / "harvest"), settings, rows)
    info = {**load_audit(made).info, "settings": settings.settings(), **findings.info}
    info["data"] = {**info["data"], "n_rows": len(rows)}
    audit = write_audit(tmp_path, info, findings.hypotheses, findings.concepts, findings.pairs)
    u = audit.activity.u
    for task in _Tasks(audit).all():
        assert not set(task.shown + task.without) & set(task.held_out + task.others)
        if not task.is_context:
            k = audit.concept_names.index(task.name)
            assert {text.place for text in (*task.held_out, *task.others)} == {"chosen"}
            assert min(u[t.pair, k] for t in task.held_out) > max(u[t.pair, k] for t in task.others)
    found = label_audit(audit, rows.texts, chat, progress=False)
    for name, habit in habit_concepts(audit).items():
        assert found[name].name == f"{habit} (1.00)"
    assert found["A1"].terms_score == 1.0  # "soup"
    assert "recipe (1.00)" in render(audit, rows.raw)
