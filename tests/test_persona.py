"""Labelled responses for a trait: who is asked what, what is kept, and a judge behind a stand-in endpoint."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from reading_world import build_tokenizer, tiny_model

from trl_anatomy.checking.persona import EndpointJudge, persona_rows
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
