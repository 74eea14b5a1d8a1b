"""An interrupted pass goes on where it was: within a shard, while scoring, and while log-probabilities are read."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae
from test_restart import ended, in_a_process

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import unfinished
from trl_anatomy.reading.harvest import Harvest, harvest
from trl_anatomy.reading.locate import decoder
from trl_anatomy.reading.logprobs import opening_chances, response_logprobs
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import Pairs, read_pairs


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return read_pairs(dataset("explicit", 24), build_tokenizer(), max_length=60)


def read(model: Any, pairs: Pairs, out: Path, **changes: Any) -> Harvest:
    settings = {"layer": 1, "batch_tokens": 150, "shard_pairs": 2048, "progress": False} | changes
    return harvest(model, SAE(tiny_sae("topk")), pairs, out, **settings)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


class Ended(BaseException):
    """As KeyboardInterrupt, which pytest would take for its own."""


def counted(model: Any, stop_after: int | None = None, do: Callable[[], None] | None = None) -> list[int]:
    """Forward passes of the model, and an interruption after some of them."""
    passes: list[int] = []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        if stop_after is not None and len(passes) == stop_after:
            if do is not None:
                do()
            raise Ended
        passes.append(1)

    decoder(model).register_forward_pre_hook(hook, with_kwargs=True)
    return passes


@pytest.mark.parametrize("stop_after", [1, 4, 7])
@pytest.mark.parametrize("how", ["interrupted", "killed"])
def test_a_shard_goes_on_where_it_was_and_ends_in_the_same_bytes(
    stop_after: int, how: str, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pairs are one shard here; a killed pass keeps what was saved before, an interrupted one all of it."""
    model = tiny_model()
    passes = counted(model)
    read(model, pairs, tmp_path / "undisturbed")
    every = len(passes)
    assert every > 8
    if how == "killed":
        monkeypatch.setattr(unfinished, "SAVE_SECONDS", -1.0)

        def work() -> None:
            victim = tiny_model()
            counted(victim, stop_after, lambda: os._exit(9))
            read(victim, pairs, tmp_path / "out")

        assert ended(in_a_process(work)) != 0
    else:
        victim = tiny_model()
        counted(victim, stop_after)
        with pytest.raises(Ended):
            read(victim, pairs, tmp_path / "out")
    with pytest.raises(AnatomyError):
        Harvest.open(tmp_path / "out")
    again = tiny_model()
    rest = counted(again)
    read(again, pairs, tmp_path / "out")
    assert len(rest) == every - stop_after
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", ["batch_tokens", "shard_pairs", "damaged", "other pairs"])
def test_parts_of_something_else_are_passed_over(change: str, pairs: Pairs, tmp_path: Path) -> None:
    victim = tiny_model()
    counted(victim, 4)
    with pytest.raises(Ended):
        read(victim, pairs, tmp_path / "out")
    (part,) = (tmp_path / "out").iterdir()
    changes: dict[str, Any] = {"batch_tokens": {"batch_tokens": 220}, "shard_pairs": {"shard_pairs": 7}}.get(change, {})
    if change == "damaged":
        part.write_bytes(part.read_bytes()[:-3] + b"abc")
    if change == "other pairs":
        pairs = read_pairs(dataset("explicit", 23), build_tokenizer(), max_length=60)
    read(tiny_model(), pairs, tmp_path / "out", **changes)
    read(tiny_model(), pairs, tmp_path / "undisturbed", **changes)
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


def test_an_error_in_one_pair_keeps_the_pairs_before_it(pairs: Pairs, tmp_path: Path) -> None:
    broken, spoilt = tiny_model(), int(pairs.ids(int(np.argmin(pairs.packed_lengths)), "chosen")[0])
    with torch.no_grad():
        broken.get_input_embeddings().weight[spoilt] = float("nan")
    with pytest.raises(AnatomyError, match="NaN or infinity"):
        read(broken, pairs, tmp_path / "out")
    assert all(".part-" in file.name for file in (tmp_path / "out").iterdir())


WORK: dict[str, Callable[[Any, Pairs, Path], np.ndarray]] = {
    "scores": lambda model, pairs, out: np.stack(
        [
            score.gap("a")
            for score in [
                score_pairs(
                    pairs, {"a": DirectionScorer(torch.ones(32), 1)}, model,
                    tokens=["a"], cache_dir=out, progress=False, batch_tokens=150,
                )
            ]
        ]
    ),
    "log-probabilities": lambda model, pairs, out: response_logprobs(
        model, pairs, range(len(pairs)), cache_dir=out, progress=False, batch_tokens=150
    ),
    "chances": lambda model, pairs, out: opening_chances(
        model, pairs, range(len(pairs)), [5, 9], cache_dir=out, progress=False, batch_tokens=150
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WORK)
@pytest.mark.parametrize("stop_after", [1, 5])
def test_other_passes_go_on_too(name: str, stop_after: int, pairs: Pairs, tmp_path: Path) -> None:
    model = tiny_model()
    passes = counted(model)
    expected = WORK[name](model, pairs, tmp_path / "undisturbed")
    victim = tiny_model()
    counted(victim, stop_after)
    with pytest.raises(Ended):
        WORK[name](victim, pairs, tmp_path / "out")
    again = tiny_model()
    rest = counted(again)
    np.testing.assert_array_equal(WORK[name](again, pairs, tmp_path / "out"), expected)
    assert len(rest) == len(passes) - stop_after
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", ["log-probabilities", "chances", "likelihood", "responses"])  # scores have no parts
def test_parts_of_a_file_that_is_whole_do_not_stay(name: str, pairs: Pairs, tmp_path: Path) -> None:
    """A process may be killed between the last write and the removal of the parts."""
    from trl_anatomy.checking.likelihood import log_likelihoods
    from trl_anatomy.checking.responses import sampled

    model = tiny_model()
    work: dict[str, Callable[[], Any]] = {
        **{of: lambda of=of: WORK[of](model, pairs, tmp_path) for of in WORK},  # type: ignore[misc]
        "likelihood": lambda: log_likelihoods(model, pairs, range(len(pairs)), cache_dir=tmp_path, progress=False),
        "responses": lambda: sampled(
            model,
            build_tokenizer(),
            ["What?"],
            tmp_path / "said.json",
            {"max_new_tokens": 2, "batch_size": 1, "seed": 0},
        ),
    }
    first, (file,) = work[name](), tmp_path.iterdir()
    left = tmp_path / f"{file.stem}.part-0123456789abcdef-000000.safetensors"
    left.write_bytes(b"part")
    np.testing.assert_array_equal(work[name](), first)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("stop_after", [7, 17, 24])
def test_sampling_goes_on_after_its_finished_batches(stop_after: int, tmp_path: Path) -> None:
    """Six tokens a batch of three: what was sampled is kept with the random state, and the rest is the same."""
    from trl_anatomy.checking.responses import sampled

    prompts, tokenizer = [f"What is {i}?" for i in range(10)], build_tokenizer()
    sampling = {"max_new_tokens": 6, "batch_size": 3, "seed": 3}
    model = tiny_model()
    model.generation_config.eos_token_id, tokenizer.eos_token = None, None
    passes = counted(model)
    expected = sampled(model, tokenizer, prompts, tmp_path / "undisturbed.json", sampling)
    assert len(passes) == 4 * 6
    victim = tiny_model()
    victim.generation_config.eos_token_id = None
    counted(victim, stop_after - 1)
    with pytest.raises(Ended):
        sampled(victim, tokenizer, prompts, tmp_path / "out.json", sampling)
    again = tiny_model()
    again.generation_config.eos_token_id = None
    rest = counted(again)
    found = sampled(again, tokenizer, prompts, tmp_path / "out.json", sampling)
    assert len(rest) == 24 - 6 * ((stop_after - 1) // 6)
    assert found == expected
    assert [one.ids for one in found] == [one.ids for one in expected]
    files = digests(tmp_path)
    assert files["out.json"] == files["undisturbed.json"]
    assert len(files) == 2


def test_a_damaged_batch_costs_those_after_it_and_no_wrong_response(tmp_path: Path) -> None:
    from trl_anatomy.checking.responses import sampled

    prompts, tokenizer = [f"What is {i}?" for i in range(10)], build_tokenizer()
    sampling = {"max_new_tokens": 6, "batch_size": 3, "seed": 3}
    expected = sampled(tiny_model(), tokenizer, prompts, tmp_path / "undisturbed.json", sampling)
    victim = tiny_model()
    counted(victim, 17)
    with pytest.raises(Ended):
        sampled(victim, tokenizer, prompts, tmp_path / "out.json", sampling)
    first, *rest = sorted(tmp_path.glob("out.part-*"))
    assert rest
    first.write_bytes(b"broken")
    found = sampled(tiny_model(), tokenizer, prompts, tmp_path / "out.json", sampling)
    assert found == expected
    assert not list(tmp_path.glob("out.part-*"))
