"""What a wait shows: a bar on a terminal, lines elsewhere, and a time left that counts work, not things."""

import io
import re
import sys
import time
from typing import Any

import numpy as np
import pytest
import torch
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae

from trl_anatomy.checking.likelihood import log_likelihoods
from trl_anatomy.reading import progress
from trl_anatomy.reading.firings import token_firings
from trl_anatomy.reading.harvest import harvest
from trl_anatomy.reading.locate import decoder
from trl_anatomy.reading.logprobs import response_logprobs
from trl_anatomy.reading.progress import Progress
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import Pairs, read_pairs


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.2)


def test_the_first_line_comes_within_two_seconds_and_the_next_after_ten(capsys: Any) -> None:
    assert (progress.FIRST_SECONDS, progress.LINE_SECONDS) == (2.0, 10.0)
    with Progress(4, "Reading pairs", "pairs") as bar:
        time.sleep(0.4)
        bar.update()
        assert capsys.readouterr().err == ""  # a short pass says nothing
        time.sleep(2.2)
        line = capsys.readouterr().err
        assert re.fullmatch(r"Reading pairs: 1 of 4 pairs, 0:02 gone, about 0:0[67] left\n", line), line
    assert capsys.readouterr().err == ""  # it did not end


def test_the_time_left_is_that_of_the_work_and_not_of_what_was_there() -> None:
    bar = Progress(10, "Reading pairs", "pairs", work=100.0, show=False)
    bar.update(2, work=50.0, skipped=True)
    assert bar.line().endswith("gone")  # nothing to go by yet
    bar._began -= 30
    bar.update(1, work=30.0)
    assert bar.line() == "Reading pairs: 3 of 10 pairs, 0:30 gone, about 0:20 left"
    bar.begun(10.0)
    assert bar.line() == "Reading pairs: 3 of 10 pairs, 0:30 gone, about 0:08 left"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress(4, "Reading pairs", "pairs", work=8.0) as bar:
        bar.update(2, work=4.0)
        time.sleep(0.7)
    assert re.search(r"Reading pairs:  50%\|#+ *\| 2 of 4 pairs, 00:00 gone, 00:00 left", screen.getvalue()), (
        screen.getvalue()
    )


def test_a_step_that_counts_nothing_shows_its_time(soon: None, capsys: Any) -> None:
    with Progress(None, "Finding communities"):
        time.sleep(0.7)
    assert re.fullmatch(r"(Finding communities: 0:0\d gone\n)+", capsys.readouterr().err)


def test_nothing_is_shown_unless_it_is_wanted(soon: None, capsys: Any) -> None:
    with Progress(3, "Reading", "texts", show=False) as bar:
        bar.update()
        time.sleep(0.7)
    assert capsys.readouterr().err == ""


PASSES: dict[str, Any] = {
    "Reading pairs": lambda model, pairs, out: harvest(model, SAE(tiny_sae("topk")), pairs, out, layer=1),
    "Scoring pairs": lambda model, pairs, out: score_pairs(pairs, {"a": DirectionScorer(torch.ones(32), 1)}, model),
    "Log-probabilities": lambda model, pairs, out: response_logprobs(model, pairs, range(len(pairs))),
    "Likelihood of responses": lambda model, pairs, out: log_likelihoods(model, pairs, range(len(pairs))),
    "Reading pairs to show": lambda model, pairs, out: token_firings(
        model, SAE(tiny_sae("topk")), pairs, {i: [np.array([1])] for i in range(len(pairs))}, layer=1
    ),
}


@pytest.mark.parametrize("what", PASSES)
def test_every_pass_shows_how_far_it_is(what: str, soon: None, tmp_path: Any, capsys: Any) -> None:
    pairs, model = read_pairs(dataset("explicit", 6), build_tokenizer(), max_length=60), tiny_model()
    decoder(model).register_forward_pre_hook(lambda *_: time.sleep(0.7))
    PASSES[what](model, pairs, tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith(f"{what}: 0 of ") for line in lines)
    assert re.match(rf"{what}: (\d+) of \1 (pairs|responses), 0:0\d in all", lines[-1]), lines


def test_likelihoods_are_read_once_and_go_on_after_an_interruption(tmp_path: Any) -> None:
    pairs: Pairs = read_pairs(dataset("explicit", 12), build_tokenizer(), max_length=60)
    model, seen = tiny_model(), []

    def count(*_: Any) -> None:
        if len(seen) == 5:
            raise KeyError
        seen.append(1)

    expected = log_likelihoods(model, pairs, range(len(pairs)), batch_tokens=120, progress=False)
    handle = decoder(model).register_forward_pre_hook(count)
    with pytest.raises(KeyError):
        log_likelihoods(model, pairs, range(len(pairs)), cache_dir=tmp_path, batch_tokens=120, progress=False)
    handle.remove()
    rest: list[int] = []
    decoder(model).register_forward_pre_hook(lambda *_: rest.append(1))
    for _ in range(2):
        found = log_likelihoods(model, pairs, range(len(pairs)), cache_dir=tmp_path, batch_tokens=120, progress=False)
        np.testing.assert_array_equal(found, expected)
    every: list[int] = []
    decoder(model).register_forward_pre_hook(lambda *_: every.append(1))
    log_likelihoods(model, pairs, range(len(pairs)), batch_tokens=120, progress=False)
    assert len(rest) - len(every) == len(every) - 4  # two passes a batch: the fifth began a batch that is read again
    assert [file.name.split("-")[0] for file in tmp_path.iterdir()] == ["likelihood"]
