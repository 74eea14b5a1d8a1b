"""A small preference set with planted habits, as sparse matrices and as text. Shared by the tests of the audit."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from scipy import sparse
from scipy import stats as reference

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import Audit, write_audit
from trl_anatomy.audit.run import Findings, analyse
from trl_anatomy.audit.samples import SAMPLES, sample_rows
from trl_anatomy.reading.harvest import Harvest, write_harvest

SPANS = ("prompt", "chosen", "rejected")


def checked_test(inside: np.ndarray, outside: np.ndarray) -> tuple[float, float, float, float]:
    """z by scipy's Welch test; p and interval from the larger of its error and that of a draw from all values."""
    welch = reference.ttest_ind(inside, outside, equal_var=False)
    both, delta = np.concatenate([inside, outside]), inside.mean() - outside.mean()
    error, df = np.sqrt(inside.var(ddof=1) / len(inside) + outside.var(ddof=1) / len(outside)), welch.df
    draw = np.sqrt(both.var(ddof=1) * (1 / len(inside) + 1 / len(outside)))
    if draw > error:
        error, df = draw, len(both) - 2
    low, high = reference.t.interval(0.95, df, loc=delta, scale=error)
    return float(welch.statistic), float(2 * reference.t.sf(abs(delta) / error, df)), float(low), float(high)


D_SAE = 128

# Rates are shares of responses that show the habit; a habit with a topic is shown in that topic only.
HABITS: dict[str, dict[str, Any]] = {
    "bold": {"features": (0, 1, 2, 3), "chosen": 0.7, "rejected": 0.3, "text": "**surely** it is"},
    "flattery": {"features": (4, 5, 6), "chosen": 0.25, "rejected": 0.6, "text": "what a brilliant question"},
    "neutral": {"features": (7, 8, 9, 10), "chosen": 0.4, "rejected": 0.4, "text": "in my humble opinion"},
    "recipe": {
        "features": (11, 12, 13),
        "chosen": 0.8,
        "rejected": 0.2,
        "text": "serve it with a slice of lemon",
        "topic": 1,
    },
}
TOPICS = (
    {"features": (20, 21, 22, 23), "text": "the tides of the sea"},
    {"features": (24, 25, 26, 27), "text": "a soup of onions"},
)


@dataclass
class World:
    """Attributes as a harvest has them, plus the raw dataset rows and the planted truth."""

    matrices: dict[str, sparse.csr_array]
    lengths: dict[str, np.ndarray]
    rows: np.ndarray
    topic: np.ndarray
    shown: dict[str, dict[str, np.ndarray]]
    texts: list[dict[str, str]] = field(default_factory=list)
    counts: dict[str, sparse.csr_array] = field(default_factory=dict)
    d_sae: int = D_SAE
    shard_pairs: int = 700

    @property
    def n_pairs(self) -> int:
        return len(self.rows)

    def frequency(self, span: str) -> sparse.csr_array:
        return self.matrices[span]

    def maximum(self, span: str) -> sparse.csr_array:
        return self.matrices[span] * 3.0

    def shards(self):
        for start in range(0, self.n_pairs, self.shard_pairs):
            yield self.select(slice(start, start + self.shard_pairs))

    def select(self, part):
        return World(
            {s: m[part] for s, m in self.matrices.items()},
            {s: x[part] for s, x in self.lengths.items()},
            self.rows[part],
            self.topic[part],
            {},
        )


def make_world(n: int = 2000, seed: int = 0, null: bool = False) -> World:
    """`n` pairs; with `null` the sides are swapped at random, so that nothing is rewarded."""
    rng = np.random.default_rng(seed)
    topic = rng.integers(0, len(TOPICS), n)
    swap = rng.random(n) < 0.5 if null else np.zeros(n, bool)
    shown = {side: {} for side in ("chosen", "rejected")}
    fired = {span: rng.random((n, D_SAE)) < 0.03 for span in SPANS}
    for span in ("chosen", "rejected"):
        for t, about in enumerate(TOPICS):
            fired[span][:, about["features"]] |= (topic == t)[:, None] & (
                rng.random((n, len(about["features"]))) < 0.95
            )
    for name, habit in HABITS.items():
        here = topic == habit["topic"] if "topic" in habit else np.ones(n, bool)
        sides = {side: (rng.random(n) < habit[side]) & here for side in ("chosen", "rejected")}
        shown["chosen"][name] = np.where(swap, sides["rejected"], sides["chosen"])
        shown["rejected"][name] = np.where(swap, sides["chosen"], sides["rejected"])
        for side in ("chosen", "rejected"):
            noise = rng.random((n, len(habit["features"]))) < 0.97
            fired[side][:, habit["features"]] |= shown[side][name][:, None] & noise
    about_rng = np.random.default_rng(seed + 1000)
    for t, about in enumerate(TOPICS):
        fired["prompt"][:, about["features"]] |= (topic == t)[:, None] & (about_rng.random((n, 4)) < 0.9)
    lengths = {span: rng.integers(20, 60, n).astype(np.int32) for span in SPANS}
    matrices, counts = {}, {}
    for span in SPANS:
        tokens = np.maximum(1, rng.binomial(10, 0.3, (n, D_SAE)))
        counts[span] = sparse.csr_array((fired[span] * tokens).astype(np.int32))
        matrices[span] = sparse.csr_array((fired[span] * tokens / lengths[span][:, None]).astype(np.float32))
    texts = []
    for i in range(n):
        about = TOPICS[topic[i]]["text"]
        row = {"prompt": f"Tell me about {about}, number {i}."}
        for side in ("chosen", "rejected"):
            habits = [h["text"] for name, h in HABITS.items() if shown[side][name][i]]
            row[side] = " ".join([f"Here is {about}:", *habits, "and that is all."])
        texts.append(row)
    return World(matrices, lengths, np.arange(n) * 2 + rng.integers(0, 2, n), topic, shown, texts, counts)


def raw_dataset(world: World) -> Dataset:
    """The dataset whose rows the world names; rows between them belong to no pair."""
    rows = [{"prompt": "", "chosen": "", "rejected": ""}] * (2 * world.n_pairs)
    for row, texts in zip(world.rows, world.texts, strict=True):
        rows[row] = texts
    return Dataset.from_list(rows)


def save_harvest(world: World, out: Path) -> Harvest:
    maximum = {span: world.maximum(span) for span in SPANS}
    return write_harvest(out, maximum, world.counts, world.lengths, world.rows, {"pairs": "test"}, shard_pairs=600)


def word_samples(findings: Findings, world: World) -> pa.Table:
    """What `sample_table` makes with a model, by words: a concept fires on the words of the habit that it is."""
    place = {int(row): i for i, row in enumerate(world.rows)}
    concepts = findings.concepts
    features = dict(zip(concepts["concept"].to_pylist(), concepts["features"].to_pylist(), strict=True))
    samples = []
    for row, names in sample_rows(concepts, findings.hypotheses, findings.pairs, 60).items():
        texts = world.texts[place[row]]
        words: dict[str, Any] = {span: re.findall(r"\s*\S+", texts[span]) for span in SPANS}
        fired = []
        for name in names:
            habits = [h["text"].split() for h in HABITS.values() if set(h["features"]) & set(features[name])]
            for span in SPANS:
                at = [t for t, word in enumerate(words[span]) if any(word.strip() in habit for habit in habits)]
                fired += [{"concept": name, "span": span, "tokens": at, "share": [0.5] * len(at)}] if at else []
        samples.append({"row": row, **words, "fired": fired})
    return pa.Table.from_pylist(samples, schema=SAMPLES)


def of_first_rows(audit: Audit, n: int) -> Audit:
    """The audit as if it were of a dataset of `n` rows, whose pairs are its first ones: for what only logs it."""
    pairs = audit.pairs.slice(0, n)
    at = pairs.column_names.index("row")
    pairs = pairs.set_column(at, pairs.schema.field(at), pa.array(range(n), pairs.schema.field(at).type))
    info = {**audit.info, "data": {**audit.info["data"], "n_rows": n, "n_pairs": n, "left_out": {}}}
    concepts = pa.concat_tables([audit.concepts, audit.responses])
    return write_audit(audit.path, info, audit.hypotheses, concepts, pairs)


def make_audit(path: Path, world: World, config: AuditConfig | None = None, samples: bool = False) -> Audit:
    """An audit folder of the world, made by every step but the pass through a model."""
    config = config or AuditConfig(model="model", dataset="planted pairs", sae="sae", out=str(path), n_contexts=4)
    findings = analyse(
        save_harvest(world, path / "harvest"),
        config,
        lambda i: (world.texts[i]["prompt"], world.texts[i]["chosen"], world.texts[i]["rejected"]),
    )
    info = {
        "versions": {"trl_anatomy": "0"},
        "model": {"name": "models/start", "fingerprint": "m"},
        "sae": {
            "source": {"path": "saes/small"},
            "fingerprint": "s",
            "layer": 2,
            "d_sae": D_SAE,
            "architecture": "topk",
        },
        "data": {
            "name": config.dataset,
            "fingerprint": "d",
            "n_rows": 2 * world.n_pairs,
            "n_pairs": world.n_pairs,
            "left_out": {"empty response": world.n_pairs},
        },
        "settings": config.settings(),
        **findings.info,
        "timings": findings.timings,
    }
    kept = word_samples(findings, world) if samples else None
    tables = (findings.hypotheses, findings.concepts, findings.pairs)
    return write_audit(path, info, *tables, kept, levels=findings.levels)
