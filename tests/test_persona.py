"""Labelled responses for a trait: who is asked what, what is kept, and a judge behind a stand-in endpoint."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading_world import build_tokenizer, tiny_model

from trl_anatomy.checking import persona
from trl_anatomy.checking.persona import EndpointJudge, persona_rows
from trl_anatomy.checking.persona_file import Persona
from trl_anatomy.checking.vllm_rollouts import VllmRollouts
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import chat
from trl_anatomy.reading.fit import fit_concept, read_examples, read_hidden, split_examples

POSITIVE, NEGATIVE = ["Be a cat.", "Meow!"], ["Be a sky."]
QUESTIONS = [f"What is {word}?" for word in ("air", "true", "long", "a river", "a story", "cheese", "the world")]


def rows(judge: Any, **settings: Any) -> Any:
    return persona_rows(
        tiny_model(), build_tokenizer(), POSITIVE, NEGATIVE, QUESTIONS, judge, max_new_tokens=8, **settings
    )


def test_every_question_is_asked_under_every_system_prompt_and_the_judge_sorts() -> None:
    seen: list[tuple[str, str]] = []

    def judge(pairs: Any) -> list[float | None]:
        seen.extend(pairs)
        return [(None, 50.0, 20.0, 90.0)[i % 4] for i in range(len(pairs))]

    found = rows(judge, n_per_question=2)
    assert len(seen) == 3 * len(QUESTIONS) * 2
    assert {question for question, _ in seen} == set(QUESTIONS)
    ratings = {label: {row["rating"] for row in found if row["label"] == label} for label in (0, 1)}
    assert ratings == {1: {50.0, 90.0}, 0: {50.0, 20.0}}
    for row in found:
        system, user = row["prompt"]
        assert system["content"] in (POSITIVE if row["label"] else NEGATIVE)
        assert (user["content"], row["response"]) in seen


def test_the_rows_are_what_a_direction_is_fitted_on() -> None:
    """Per response: the float64 difference of mean-pooled states."""
    found = rows(lambda pairs: [50.0] * len(pairs), n_per_question=3)
    model = tiny_model()
    examples = read_examples(found, build_tokenizer())
    assert len(examples) == len(found)
    fitted = fit_concept(model, examples, scorer="direction", layers=[1], per="response", progress=False)
    hidden, bounds = read_hidden(model, examples, [1], progress=False)
    part = split_examples(examples.labels, examples.groups, 0.2, 0)
    means = np.stack([hidden[1][a:b].double().mean(0).numpy() for a, b in pairwise(bounds)])
    wanted = means[(part == 0) & examples.labels].mean(0) - means[(part == 0) & ~examples.labels].mean(0)
    vector: Any = fitted.scorer
    np.testing.assert_allclose(vector.vector.numpy(), wanted / np.linalg.norm(wanted), rtol=1e-4, atol=1e-6)


def test_what_cannot_be_sorted_is_refused() -> None:
    for judge, message in (
        (lambda pairs: [10.0] * len(pairs), "None of 14 responses to the positive system prompts was rated"),
        (lambda pairs: [None] * len(pairs), "None of 14 responses"),
        (lambda pairs: [50.0], "was given 21 responses and returned 1"),
        (lambda pairs: [500.0] * len(pairs), "rated a response 500.0; allowed: 0 to 100"),
    ):
        with pytest.raises(AnatomyError, match=message):
            rows(judge)
    with pytest.raises(AnatomyError, match="at least one positive"):
        persona_rows(tiny_model(), build_tokenizer(), [], NEGATIVE, QUESTIONS, lambda pairs: [])
    bare = build_tokenizer()
    bare.chat_template = None
    with pytest.raises(AnatomyError, match="no chat_template"):
        persona_rows(tiny_model(), bare, POSITIVE, NEGATIVE, QUESTIONS, lambda pairs: [])


class Endpoint(BaseHTTPRequestHandler):
    """Rates a response by its length, fails when told to, and remembers what it was asked."""

    asked: list[dict[str, Any]]
    keys: list[str | None]
    failures: list[int]
    says: str | None

    def do_POST(self) -> None:
        kind = type(self)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind.asked.append({"path": self.path, **body})
        kind.keys.append(self.headers.get("Authorization"))
        if kind.failures:
            self.send_response(kind.failures.pop())
            self.end_headers()
            return
        response = body["messages"][0]["content"].split("Response:\n")[1].split("\n\nAnswer")[0]
        said = str(len(response)) if kind.says is None else kind.says
        answer = kind.says if said == "no json" else json.dumps({"choices": [{"message": {"content": said}}]})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(str(answer).encode())

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[Endpoint], str]]:
    kind = type("Here", (Endpoint,), {"asked": [], "keys": [], "failures": [], "says": None})
    server = HTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(chat.time, "sleep", lambda seconds: None)
    yield kind, f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


PAIRS = [("Why?", "x" * n) for n in (3, 60, 100, 101)]


def test_an_endpoint_rates_in_order(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, url = endpoint
    monkeypatch.setenv("JUDGE_KEY", "secret")
    judge = EndpointJudge(url, "judge-1", "likes cats", key_variable="JUDGE_KEY")
    assert judge(PAIRS) == [3.0, 60.0, 100.0, None]
    assert {asked["path"] for asked in kind.asked} == {"/v1/chat/completions"}
    assert {asked["model"] for asked in kind.asked} == {"judge-1"}
    assert {asked["temperature"] for asked in kind.asked} == {0}
    assert all("likes cats" in asked["messages"][0]["content"] for asked in kind.asked)
    assert set(kind.keys) == {"Bearer secret"}
    assert "secret" not in repr(judge)


def test_an_endpoint_that_is_busy_is_asked_again(endpoint: Any) -> None:
    kind, url = endpoint
    kind.failures = [503, 429, 500]
    assert EndpointJudge(url, "m", "t")(PAIRS[:1]) == [3.0]
    assert len(kind.asked) == 4
    kind.failures = [503] * chat.TRIES
    with pytest.raises(AnatomyError, match="refused: 503"):
        EndpointJudge(url, "m", "t")(PAIRS[:1])


def test_an_endpoint_that_refuses_or_babbles(endpoint: Any) -> None:
    kind, url = endpoint
    kind.failures = [401]
    with pytest.raises(AnatomyError, match="refused: 401"):
        EndpointJudge(url, "m", "t")(PAIRS[:1])
    for said, rating in (("Rating: 70", 70.0), ("70/100", 70.0), ("I refuse", None), ("between 10 and 20", None)):
        kind.says = said
        assert EndpointJudge(url, "m", "t")(PAIRS[:1]) == [rating]
    kind.says = "no json"
    with pytest.raises(AnatomyError, match="does not answer like chat/completions"):
        EndpointJudge(url, "m", "t")(PAIRS[:1])
    with pytest.raises(AnatomyError, match="begins with http"):
        EndpointJudge("file:///etc/hosts", "m", "t")(PAIRS[:1])
    with pytest.raises(AnatomyError, match="cannot be reached"):
        EndpointJudge("http://127.0.0.1:1/v1", "m", "t", timeout=2)(PAIRS[:1])


def test_sampling_leaves_the_generator_alone() -> None:
    state = torch.get_rng_state()
    rows(lambda pairs: [50.0] * len(pairs))
    assert torch.equal(state, torch.get_rng_state())


# --- other engines, and what is kept ---


def test_another_engine_answers_the_same_conversations() -> None:
    asked: list[Any] = []

    def generate(conversations: Any, **settings: Any) -> list[list[str]]:
        asked.append((conversations, settings))
        n = settings["n_per_prompt"]
        return [[f"{messages[0]['content']} {j}" for j in range(n)] for messages in conversations]

    found = rows(lambda pairs: [50.0] * len(pairs), n_per_question=2, seed=7, temperature=0.5, generate=generate)
    [(conversations, settings)] = asked
    assert settings == {"n_per_prompt": 2, "max_new_tokens": 8, "temperature": 0.5, "seed": 7}
    assert [[message["role"] for message in messages] for messages in conversations] == [["system", "user"]] * 21
    assert [row["prompt"] for row in found] == [messages for messages in conversations for _ in range(2)]
    assert all(row["response"] == f"{row['prompt'][0]['content']} {i % 2}" for i, row in enumerate(found))
    with pytest.raises(AnatomyError, match="was given 21 conversations and answered 0"):
        rows(lambda pairs: [], generate=lambda conversations, **settings: [])


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(AnatomyError, match="vLLM is not installed: install it"):
        VllmRollouts("some/model")


def test_what_was_sampled_and_rated_is_kept(endpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, url = endpoint
    judge = EndpointJudge(url, "m", "t")
    sampled: list[int] = []
    plain = persona.rollouts
    monkeypatch.setattr(persona, "rollouts", lambda *a, **k: (sampled.append(1), plain(*a, **k))[1])
    kind.failures = [401]
    with pytest.raises(AnatomyError, match="refused: 401"):
        rows(judge, store=tmp_path)
    kind.says = "50"
    before = len(kind.asked)
    first = rows(judge, store=tmp_path)
    assert len(kind.asked) == before + len(first) == before + 21
    again = rows(judge, store=tmp_path)
    assert again.to_list() == first.to_list() == rows(judge).to_list()
    assert (len(sampled), len(kind.asked)) == (2, before + 42)  # once for the folder, once for the call without it
    assert sorted(file.name.split("-")[0] for file in tmp_path.iterdir()) == ["answers", "rated"]
    stored = [json.loads(line) for line in next(tmp_path.glob("rated-*")).read_text().splitlines()]
    assert [row["response"] for row in stored] == first["response"]

    rows(EndpointJudge(url, "m", "another trait"), store=tmp_path)
    assert (len(sampled), len(kind.asked)) == (2, before + 63)
    seen: list[int] = []
    for _ in range(2):
        rows(lambda pairs: seen.append(len(pairs)) or [50.0] * len(pairs), store=tmp_path)
    assert (len(sampled), seen) == (2, [21, 21])
    rows(judge, store=tmp_path, seed=1)
    assert len(sampled) == 3
    for file in tmp_path.iterdir():
        file.write_text("{broken")
    assert rows(judge, store=tmp_path).to_list() == first.to_list()


FILE = """\
trait: likes cats
positive: [Be a cat., Meow!]
negative:
  - Be a sky.
questions: ["What is air?", "What is true?"]
"""


def test_a_persona_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "persona.yaml"
    file.write_text(FILE)
    assert Persona.load(file) == Persona(
        "likes cats", ("Be a cat.", "Meow!"), ("Be a sky.",), ("What is air?", "What is true?")
    )
    for text, message in (
        (FILE.replace("negative:", "negatives:"), r"persona.yaml:3: .*'negatives'.* Did you mean 'negative'"),
        (
            FILE.replace("[Be a cat., Meow!]", "Be a cat."),
            r"persona.yaml:2: positive: found .*, allowed: a list of texts",
        ),
        (FILE.replace("Meow!", "Be a cat."), "A text occurs twice"),
        ("trait: t", "found no key 'positive', allowed: a list of texts"),
        ("- a", "found a list, allowed: a mapping with the keys trait, positive"),
        ("", "found no key 'trait'"),
    ):
        file.write_text(text)
        with pytest.raises(AnatomyError, match=message):
            Persona.load(file)
    with pytest.raises(AnatomyError, match="no such file"):
        Persona.load(tmp_path / "nothing.yaml")


def test_the_command_fits_a_persona(
    endpoint: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, url = endpoint
    kind.says = "50"
    tiny_model(layers=2).save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "p.yaml").write_text(FILE.replace('["What is air?", "What is true?"]', json.dumps(QUESTIONS)))
    monkeypatch.setenv("JUDGE_KEY", "secret")
    given = ["fit", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "cats")]
    ask = ["--persona", str(tmp_path / "p.yaml"), "--judge_url", url, "--judge_model", "j"]
    more = ["--judge_key_variable", "JUDGE_KEY", "--n_per_question", "2", "--max_new_tokens", "6"]
    assert main([*given, *ask, *more, "--scorer", "direction", "--json"]) == 0
    card = json.loads(capsys.readouterr().out)
    assert card["persona"] == {"trait": "likes cats", "judge": "j", "engine": "transformers"}
    assert card["settings"]["per"] == "response"
    assert (card["n_positive"], card["n_negative"]) == (28, 14)
    assert (len(kind.asked), set(kind.keys)) == (42, {"Bearer secret"})
    assert "secret" not in "".join(file.read_text() for file in (tmp_path / "cats").glob("*.json*"))
    assert main([*given, *ask, *more, "--scorer", "probe", "--layers", "1"]) == 0
    assert len(kind.asked) == 42  # no new rollouts, no new questions to the judge
    stored = json.loads((tmp_path / "cats" / "card.json").read_text())
    assert (stored["kind"], stored["data_fingerprint"]) == ("probe", card["data_fingerprint"])
    capsys.readouterr()

    for words, message in (
        ([], "Give --dataset with labelled text, or --persona"),
        ([*ask, "--dataset", "d"], "one of the two"),
        (["--dataset", "d", "--judge_model", "j"], "go with --persona"),
        (ask[:4], "--persona needs a judge: --judge_url and --judge_model"),
        ([*ask[:3], "ftp://x", *ask[4:]], "begins with http"),
        (
            [*ask, "--judge_key_variable", "NO_SUCH_KEY"],
            "environment variable NO_SUCH_KEY, which is to hold the key, is not set",
        ),
        ([*ask, "--engine", "sglang"], "--engine is 'sglang'; allowed: transformers, vllm"),
        ([*ask, "--tokens", "prompt_end"], "leave --tokens out"),
        *([] if find_spec("vllm") else [([*ask, "--engine", "vllm"], "vLLM is not installed")]),
    ):
        assert main([*given, *words]) == 2
        assert message in capsys.readouterr().err
    assert len(kind.asked) == 42
