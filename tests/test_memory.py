"""What a further pair costs in memory (docs/results/memory.md): what Python and NumPy allocate at the peak.

Tensors and Arrow's tables are not seen here; `benchmarks/memory.py` measures whole commands.
"""

import gc
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from audit_world import make_audit, make_world
from datasets import Dataset
from reading_world import tiny_model, tiny_sae

from trl_anatomy.audit import samples
from trl_anatomy.audit.habit_table import habit_table, habits_to_count
from trl_anatomy.audit.report import explore
from trl_anatomy.audit.row_texts import RowTexts
from trl_anatomy.audit.samples import sample_rows
from trl_anatomy.audit.text_audit import raw_texts
from trl_anatomy.checking import compare
from trl_anatomy.checking.compare import cheap_predictions
from trl_anatomy.checking.responses import prompts_for
from trl_anatomy.reading.harvest import harvest
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import SPANS, Pairs
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.settle import settle_policy
from trl_anatomy.trainers.prepare import apply_plan

SIZES = (256, 1024)
TOKENS = 24  # of each response


def made_pairs(n: int) -> Pairs:
    """Pairs of token ids, without a text that they were made of."""
    rng = np.random.default_rng(0)
    spans = {span: rng.integers(3, 330, (n, width)) for span, width in (("prompt", 6), ("chosen", TOKENS))}
    spans["rejected"] = rng.integers(3, 330, (n, TOKENS))
    ids = {f"{span}_ids": found.tolist() for span, found in spans.items()}
    words = {span: [f"{span} {i} {'word ' * 2000}" for i in range(n)] for span in spans}
    return Pairs(Dataset.from_dict({**ids, "row": range(n)}), Dataset.from_dict(words), 512, "keep_start", 0, None, {})


def peak(do: Callable[[], object]) -> int:
    """Bytes that Python and NumPy hold at most while this is done, above what they hold before."""
    gc.collect()
    tracemalloc.start()
    try:
        do()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def per_pair(do: Callable[[int], object]) -> float:
    """Bytes that a further pair adds to the peak of `do`(number of pairs)."""
    do(32)  # what is imported and cached once
    few, many = (peak(lambda n=n: do(n)) for n in SIZES)
    return (many - few) / (SIZES[1] - SIZES[0])


@pytest.fixture(scope="module")
def pairs() -> dict[int, Pairs]:
    found = {n: made_pairs(n) for n in (32, *SIZES)}
    for of in found.values():
        _ = of.fingerprint, of.response_bounds, of.packed_lengths  # what all of them hold, measured below
    return found


def test_tokens_are_held_in_four_bytes_each() -> None:
    made = {n: made_pairs(n) for n in (32, *SIZES)}
    taken = per_pair(lambda n: made[n].fingerprint)
    n_tokens = 2 * TOKENS + 6
    # int32 twice while the parts are put together, and offsets of three spans.
    assert 4 * n_tokens < taken < 2 * 4 * n_tokens + 150


def test_a_harvest_holds_one_shard(pairs: dict[int, Pairs], tmp_path: Path) -> None:
    model, sae = tiny_model(), SAE(tiny_sae())

    def read(n: int, shard_pairs: int = 32) -> None:
        out = tmp_path / f"{n}-{shard_pairs}"
        harvest(model, sae, pairs[n], out, layer=1, batch_tokens=512, shard_pairs=shard_pairs, progress=False)

    latents = 0
    taken = per_pair(read)
    for shard in sorted((tmp_path / f"{SIZES[1]}-32").glob("shard-*")):
        latents += shard.stat().st_size
    assert taken < 200 < 0.4 * latents / SIZES[1]  # names of shards, and the order of the pairs
    # It can be seen here if all is held: a single shard takes what lies on the disk, and more.
    assert peak(lambda: read(SIZES[1], SIZES[1])) - peak(lambda: read(SIZES[0], SIZES[0])) > 0.7 * latents


def test_scores_are_sixteen_bytes_a_concept_and_four_a_token(pairs: dict[int, Pairs]) -> None:
    model = tiny_model()
    scorers = {name: DirectionScorer(torch.arange(1.0, 33.0), 1) for name in "abcdefgh"}

    def score(n: int, tokens: str = "") -> None:
        score_pairs(pairs[n], scorers, model, tokens=tokens, batch_tokens=512, progress=False)

    plain, by_token = per_pair(score), per_pair(lambda n: score(n, "ab"))
    assert 8 * 16 <= plain < 8 * 16 + 250  # and the order in which the pairs are read; as lists they would be 8 * 64
    assert 0.8 * 2 * 4 * 2 * TOKENS < by_token - plain < 1.2 * 2 * 4 * 2 * TOKENS


def test_a_plan_that_masks_tokens(pairs: dict[int, Pairs], tmp_path: Path) -> None:
    """Beside the scores two flags a token and a few objects of each pair that it touches; as columns, bytes."""
    model = tiny_model()
    DirectionScorer(torch.arange(1.0, 33.0), 1).save(tmp_path / "d")
    rule = {"explain_away": "d", "with": "mask_tokens", "threshold": 0.0, "unit": "token"}
    concepts = {"d": {"scorer": "direction", "path": str(tmp_path / "d")}}
    policy = ConceptPolicy.load({"concepts": concepts, "rules": [rule]})
    plans: dict[int, Any] = {}

    def settle(n: int) -> None:
        plans[n] = settle_policy(policy, pairs[n], lambda: model)

    assert per_pair(settle) < 2000
    rows = apply_plan(pairs[SIZES[1]].raw, plans[SIZES[1]])
    kept = rows.data.column("anatomy_chosen_kept").combine_chunks()
    assert kept.flatten().nbytes == len(kept.flatten()) <= SIZES[1] * TOKENS
    assert rows["anatomy_chosen_kept"][0] == plans[SIZES[1]].kept_tokens[0][0].tolist()


def test_comparing_holds_neither_texts_nor_prompts(tmp_path: Path) -> None:
    audits = {n: make_audit(tmp_path / str(n), make_world(n)) for n in (32, *SIZES)}
    files = {n: tmp_path / f"{n}.jsonl" for n in audits}
    prompt = "word " * 400
    for n, file in files.items():
        file.write_text("".join(json.dumps({"prompt": f"{i} {prompt}"}) + "\n" for i in range(n)))
        prompts_for(audits[n], str(file), 1, 0)  # what datasets makes of the file
    assert per_pair(lambda n: prompts_for(audits[n], str(files[n]), 8, 0)) < 400 < len(prompt)


def test_cheap_predictions_read_texts_in_turn(pairs: dict[int, Pairs], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(compare, "_TEXTS_AT_ONCE", 16)
    monkeypatch.setattr(compare, "LIKELIHOOD_PAIRS", 8)
    audits = {n: make_audit(tmp_path / str(n), make_world(n)) for n in (32, *SIZES)}
    for audit in audits.values():
        _ = audit.activity
    model, rules = tiny_model(), {"one": "1", "seven": "7"}
    n_concepts = audits[SIZES[1]].concepts.num_rows
    taken = per_pair(lambda n: cheap_predictions(audits[n], pairs[n], model, rules))
    assert taken < 8 * 6 * (n_concepts + 4) < 15_000  # copies of the disparity; the texts are 20,000 characters a pair


def test_habits_hold_no_texts() -> None:
    text = "word " * 200
    raws = {n: Dataset.from_dict({span: [f"{i} {text}" for i in range(n)] for span in SPANS}) for n in (32, *SIZES)}
    read = {n: raw_texts(raw)[0] for n, raw in raws.items()}
    habits = habits_to_count(None, tokens=False)
    taken = per_pair(lambda n: habit_table(read[n], habits, progress=False))
    # Two sides of every habit, their difference, and what the tests take.
    assert 2 * 8 * len(habits) <= taken < 8 * 8 * len(habits) < 3 * len(text)


def test_a_page_and_samples_hold_no_table_of_all_pairs(tmp_path: Path, monkeypatch: Any) -> None:
    """Of one audit, whose table of pairs is made longer by pairs that are like those it has."""
    monkeypatch.setattr(explore, "N_PAIRS", 64)
    monkeypatch.setattr(samples, "_ROWS_AT_ONCE", 64)
    audit = make_audit(tmp_path, make_world(SIZES[0]))
    raw = Dataset.from_dict({span: [f"{span} {i} {'word ' * 20}" for i in range(8 * SIZES[1])] for span in SPANS})
    tables = {}
    for n in (32, *SIZES):
        more = max(0, n - SIZES[0])
        rows = np.r_[audit.pairs["row"].to_numpy(), 2 * SIZES[0] + np.arange(more)]
        table = pa.concat_tables([audit.pairs, *[audit.pairs] * (more // SIZES[0])])
        tables[n] = table.set_column(0, table.schema.field("row"), pa.array(rows)).combine_chunks()

    def page(n: int) -> None:
        monkeypatch.setattr(audit, "pairs", tables[n])
        explore.pair_data(audit, RowTexts(raw), {})

    assert per_pair(page) < 100
    assert per_pair(lambda n: sample_rows(audit.concepts, audit.hypotheses, tables[n], 20)) < 100
    as_objects = peak(lambda: tables[SIZES[1]].to_pylist()) / SIZES[1]
    assert as_objects > 500  # what a table of all pairs would take: more than the bound by far
