"""The audit folder: open formats, written so that a reader finds all of it or none of it."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from scipy import sparse

from ..errors import AnatomyError
from ..reading import storage
from ..reading.clock import is_date
from ..reading.files import make_folder, misfit, remove_partial, write_atomically
from .choice import SHAPE as CHOICE_SHAPE
from .config import AuditConfig
from .finding_list import FINDINGS
from .finding_list import SHAPE as FINDINGS_SHAPE
from .habit_table import HABIT_ROWS
from .habits_by_prompt import HABIT_HYPOTHESES
from .judge_sae import FIT_SHAPE
from .levels import LEVELS, Levels, fits
from .look import Finding, Table, all_findings, find
from .look import names as finding_names
from .predict import CO_FIRING, CONCEPTS, LATER, RESPONSE_GEOMETRY
from .problems import PROBLEM_ROWS, ranked, rows_with
from .prompt_view import response_scores
from .samples import SAMPLES
from .shown import CONTEXT_RATES
from .titles import Label, read_labels
from .trace import VIEWS, hypotheses_of, to_columns, trace
from .views import HYPOTHESES, ROWS, Activity, Disparity, activity, row_norms
from .views import LATER as LATER_OF_HYPOTHESES

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from ..reading.harvest import Harvest
    from ..reading.sae import SAE
    from ..reading.spans import Pairs

INFO = "audit.json"
REPORT = "report.html"
FORMAT = 1

PAIRS = pa.schema(
    [
        ("row", pa.int64()),
        ("prompt_group", pa.int64()),
        ("contexts", pa.list_(pa.string())),
        ("activity", pa.float32()),
        ("prompt_tokens", pa.int32()),
        ("chosen_tokens", pa.int32()),
        ("rejected_tokens", pa.int32()),
        ("concepts", pa.list_(pa.string())),
        ("scores", pa.list_(pa.float32())),
    ]
)
# Columns that tables of earlier versions do not have: they are read as null.
LATER_COLUMNS = frozenset({*LATER, *CONTEXT_RATES, *LATER_OF_HYPOTHESES})
TABLES = {"hypotheses": HYPOTHESES, "concepts": CONCEPTS, "pairs": PAIRS}
SAMPLE_FILE = "samples.parquet"
HABIT_FILE = "habits.parquet"
PROBLEM_FILE = "problems.parquet"
FINDING_FILE = "findings.parquet"
BY_PROMPT_FILE = "habit_hypotheses.parquet"
LEVEL_FILE = "levels.parquet"
# What makes an audit look for problems that not every audit looks for.
_TO_LOOK = {
    "eval_prompts": "audit again, with --eval_dataset.",
    "same_after_cut": "audit again, with --model.",
    "cut_sides": "audit again, with --model.",
    "ties": "the dataset has no scores of both sides (score_chosen and score_rejected, say).",
    "improbable_labels": "nothing tells these choices beyond chance, or an earlier version made the audit.",
}
# What a reader may rely on in audit.json; there is more in it.
_INFO_SHAPE = {
    "format": int,
    "versions": {str: str},
    "model": {"name": str, "fingerprint": str},
    "sae": {"source": {str: str}, "fingerprint": str, "layer": int, "d_sae": int},
    "data": {"name": str, "fingerprint": str, "n_rows": int, "n_pairs": int, "left_out": {str: int}},
    "settings": {"tau": float, "pooling": str, "alpha": float},
    "counts": {"hypotheses": int, "concepts": int, "responses": int, "pairs": int},
    "timings": {str: float},
}
_CONTEXTS_SHAPE = {str: {"pairs": int, "terms": [str]}}


class Audit:
    """One audit of one dataset. Get it from `load_audit` or `run_audit`.

    Attributes:
        path: the audit folder; the mirror of one at a URL.
        info: what was run (`audit.json`).
        hypotheses: a row per tested (context, concept).
        concepts: a row per concept T1, T2, ... (kind "co-firing").
        responses: a row per response cluster R1, R2, ... of the prompt-conditioned view (kind "response-geometry");
            `concepts.parquet` holds both.
        pairs: a row per pair; `row` is its index into the raw dataset, `prompt_group` the same number for pairs of one
            prompt, `contexts` the contexts it belongs to (B0 is the silent bucket; A1, A2, ... are prompt contexts, or
            regions of SFT data: a pair may be in several or none), `concepts` and `scores` its strongest concepts and
            their disparity u.
    """

    # Whether an SAE found concepts; a `text_folder.TextAudit` has habits alone.
    has_concepts = True

    def __init__(
        self, path: Path, info: dict[str, Any], hypotheses: pa.Table, concepts: pa.Table, pairs: pa.Table
    ) -> None:
        self.path = path
        self.info = info
        self.hypotheses = hypotheses
        self.concepts = concepts.filter(pc.equal(concepts["kind"], CO_FIRING))
        self.responses = concepts.filter(pc.equal(concepts["kind"], RESPONSE_GEOMETRY))
        self.pairs = pairs

    @property
    def name(self) -> str:
        """The folder as its user knows it: the URL, if `path` is a mirror."""
        return storage.shown(self.path)

    def __repr__(self) -> str:
        return f"Audit({self.name!r}, {self.pairs.num_rows} pairs, {self.concepts.num_rows} concepts)"

    def _repr_html_(self) -> str:
        return f"<p>{escape(repr(self))}</p>{self.top()._repr_html_()}"

    def top(self, n: int = 10) -> Table:
        """The first `n` findings: what differs most surely is first, then the largest.

        Print it, show it in a notebook, or take it to pandas with `.to_pandas()`. Its columns:

        - `concept`, `label`: T1, T2, ...; words that set its texts apart, or the name that a language model gave it.
        - `verdict`: rises (more in chosen responses), falls (more in rejected ones), or why neither is claimed.
        - `rate_chosen`, `rate_rejected`: shares of responses that show it, 0 to 1.
        - `predicted`, `ci_low`, `ci_high`: mean over pairs of chosen minus rejected, of the share of the concept's
          features that fire; its 95 % interval.
        - `length_adjusted`: the same at equal lengths of chosen and rejected.
        - `q`: false discovery rate.

        An audit of habits alone lists `habit`, `verdict`, `chosen`, `rejected`, `difference` and its interval, and `q`;
        one of SFT data lists `context`, `concept`, `mean_in`, `mean_out` and their difference at equal length.
        """
        return all_findings(self)[:n]

    def to_pandas(self) -> "pd.DataFrame":
        """Every finding, with the columns of `top`. The tables behind it: `audit.concepts.to_pandas()`, ..."""
        return all_findings(self).to_pandas()

    def __getitem__(self, name: str) -> Finding:
        """A concept ("T2"), response cluster ("R1"), context ("B12", "A3") or habit: `.examples(5)`, `.to_pandas()`.

        Raises:
            AnatomyError: the audit has none of that name.
        """
        found = find(self, name)
        if found is None:
            raise AnatomyError(f"{self.name}: found no {name!r}, allowed: {_listed(finding_names(self))}.")
        return found

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and find(self, name) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(finding_names(self))

    @cached_property
    def harvest(self) -> "Harvest":
        """The harvest behind the tables; opened and checked at first use.

        Raises:
            AnatomyError: it is missing, damaged, or of other pairs than the tables.
        """
        from ..reading.harvest import Harvest

        harvest = Harvest.open(self.path / "harvest")
        n_latents = self.info["sae"]["d_sae"]
        if harvest.d_sae != n_latents:
            raise AnatomyError(
                f"{self.name}: the harvest has {harvest.d_sae} latents, {INFO} says {n_latents}. Run the audit again "
                "in a new folder."
            )
        if not np.array_equal(harvest.rows, self.pairs["row"].to_numpy()):
            raise AnatomyError(
                f"{self.name}: the harvest holds other pairs than pairs.parquet. Run the audit again in a new folder."
            )
        return harvest

    @property
    def date(self) -> str | None:
        """The date that the chat template wrote into its pairs, ISO 8601; None where it writes none.

        Audits of earlier versions do not tell it.
        """
        return self.info["data"].get("date")

    def check_harvest(self) -> None:
        """Open the harvest now, so that a damaged one is refused before other long work.

        Raises:
            AnatomyError: as `harvest`.
        """
        _ = self.harvest

    @cached_property
    def samples(self) -> pa.Table | None:
        """The pairs worth looking at, token by token: schema SAMPLES. None where the folder has none.

        Raises:
            AnatomyError: the file is damaged.
        """
        file, hashes = self.path / SAMPLE_FILE, self.info.get("files", {})
        return read_table(file, SAMPLES, hashes) if storage.fetch(file, hashes.get(SAMPLE_FILE)) else None

    @cached_property
    def habits(self) -> pa.Table | None:
        """Named habits of both sides: schema `habit_table.HABIT_ROWS`. None where the folder has none.

        Raises:
            AnatomyError: the file is damaged.
        """
        return self._optional_table(HABIT_FILE, HABIT_ROWS)

    @cached_property
    def problems(self) -> pa.Table | None:
        """Rows that have problems: schemas `problems.PROBLEM_ROWS` and `RANKED`. None where the folder has none.

        Raises:
            AnatomyError: the file is damaged.
        """
        table = self._optional_table(PROBLEM_FILE, PROBLEM_ROWS)
        return None if table is None else ranked(table)

    @cached_property
    def findings(self) -> pa.Table | None:
        """The fewest findings that say what the pairs say: schema `finding_list.FINDINGS`. None where there is none.

        Raises:
            AnatomyError: the file is damaged.
        """
        return self._optional_table(FINDING_FILE, FINDINGS)

    @cached_property
    def habit_hypotheses(self) -> pa.Table | None:
        """Named habits by what is asked: schema `habits_by_prompt.HABIT_HYPOTHESES`. None where there is none.

        Raises:
            AnatomyError: the file is damaged.
        """
        return self._optional_table(BY_PROMPT_FILE, HABIT_HYPOTHESES)

    def _optional_table(self, name: str, schema: pa.Schema) -> pa.Table | None:
        """A table that folders of earlier versions do not have; None without it."""
        file, hashes = self.path / name, self.info.get("files", {})
        if name not in hashes or not storage.fetch(file, hashes[name]):
            return None
        return read_table(file, schema, hashes)

    def rows_with(self, problem: str) -> np.ndarray:
        """Rows of the raw dataset that have a problem such as "copies", ascending; none is fine.

        Raises:
            AnatomyError: the audit did not look for it.
        """
        looked = self.info.get("problems", {})
        if problem not in looked or self.problems is None:
            raise AnatomyError(
                f"{self.name}: this audit did not look for {problem!r}, looked for: {', '.join(looked) or 'nothing'}; "
                + _TO_LOOK.get(problem, "audit again.")
            )
        return rows_with(self.problems, problem)

    @cached_property
    def labels(self) -> dict[str, Label]:
        """Names of concepts and contexts with how well they hold, from `labels.json`: for finding one's way only.

        Empty where there are none, or where they are of other tables.

        Raises:
            AnatomyError: the file is damaged.
        """
        return read_labels(self.path)

    def labelled(self, concepts: pa.Table) -> pa.Table:
        """A table of concepts with the names that hold best in the column `label`.

        A language model's name takes the place of a label where held-out texts bear it out, and better than the label's
        own rule.
        """
        rows = concepts.select(["concept", "label", "label_score"]).to_pylist()
        names = [self._better_name(row["concept"], row["label_score"]) or row["label"] for row in rows]
        at = concepts.column_names.index("label")
        return concepts.set_column(at, concepts.schema.field(at), pa.array(names, pa.string()))

    def _better_name(self, concept: str, score: float | None) -> str | None:
        label = self.labels.get(concept)
        if label is None or label.name is None or label.score is None:
            return None
        return label.name if score is None or label.score > score else None

    def about(self, context: str) -> list[str]:
        """What to call a context: a name that held-out texts bear out, else words of its prompts; maybe nothing."""
        name = self.labels[context].name if context in self.labels else None
        return [name] if name else self.info.get("contexts", {}).get(context, {}).get("terms", [])

    @cached_property
    def concept_names(self) -> list[str]:
        return self.concepts["concept"].to_pylist()

    @cached_property
    def communities(self) -> list[np.ndarray]:
        """Feature ids of every concept, in the order of `concept_names`."""
        return [np.asarray(features, dtype=np.int64) for features in self.concepts["features"].to_pylist()]

    def features(self, concept: str) -> np.ndarray:
        """Feature ids of a concept such as "T3", or of a response cluster such as "R3".

        Raises:
            AnatomyError: the audit has no such concept.
        """
        table = self.responses if concept.startswith("R") else self.concepts
        names = table["concept"].to_pylist()
        if concept not in names:
            raise AnatomyError(f"{self.name}: found concept {concept!r}, allowed: {_listed(names)}.")
        return np.asarray(table["features"][names.index(concept)].as_py(), dtype=np.int64)

    def rows_in(self, context: str) -> np.ndarray:
        """Rows of the raw dataset in a context such as "B12" or "A12", ascending.

        Raises:
            AnatomyError: the audit has no such context.
        """
        flat = self.pairs["contexts"].combine_chunks()
        inside = flat.value_parent_indices().to_numpy()[
            pc.equal(flat.flatten(), context).to_numpy(zero_copy_only=False)
        ]
        if len(inside) == 0:
            names = pc.unique(flat.flatten()).to_pylist()
            alike = [name for name in names if name[0] == context[:1]]
            names = sorted(alike or names, key=lambda name: (name[0], int(name[1:])))
            raise AnatomyError(f"{self.name}: found context {context!r}, allowed: {_listed(names)}.")
        return np.sort(self.pairs["row"].to_numpy()[inside])

    def load_sae(self, device: Any = "cpu", *, load: "Callable[[dict[str, str]], SAE] | None" = None) -> "SAE":
        """The SAE that the audit was made with: numbers of latents mean nothing in another one.

        Args:
            device: where its weights go.
            load: takes its place and gives the SAE of there, instead of reading it now.

        Raises:
            AnatomyError: it is not there any more, or has changed since the audit.
        """
        from ..reading.sae import load_sae

        said = self.info["sae"]
        try:
            sae = load_sae(said["source"], device=device) if load is None else load(said["source"])
        except AnatomyError as error:
            raise AnatomyError(f"{self.name}: the SAE of the audit is needed again. {error}") from error
        if sae.fingerprint != said["fingerprint"]:
            raise AnatomyError(
                f"{self.name}: the SAE at {':'.join(said['source'].values())} has changed since the audit, so its "
                "latents are others: audit again, or put the SAE of the audit back."
            )
        return sae

    def check_model(self, model: Any) -> None:
        """Make sure that a model can be the audited one: in hidden states of other weights latents read other things.

        Nothing is compared where weights tell nothing (`layer_weights`), nor with an audit of an earlier version.

        Raises:
            AnatomyError: the weights of the layers that the audit read are others.
        """
        from ..reading.fingerprint import layer_weights

        said, layer = self.info["model"].get("layer_weights"), self.info["sae"]["layer"]
        if said is not None and layer_weights(model, layer) not in (None, said):
            raise AnatomyError(
                f"{self.name}: the audit read {self.info['model']['name']}, and the weights of this model are others "
                f"up to layer {layer}, so that the audit's latents mean nothing in it: use the audited model, or audit "
                "this one."
            )

    def check_kind(self, command: str) -> None:
        """Make sure that this is an audit of preference pairs, which `command` needs.

        Raises:
            AnatomyError: it is one of SFT data.
        """
        if self.info["settings"].get("data_kind") == "sft":
            raise AnatomyError(
                f"{self.name}: an audit of SFT data predicts no shift, so there is nothing to {command}; audit "
                "preference pairs."
            )

    def check_pairs(self, pairs: "Pairs") -> None:
        """Make sure that this audit was made from these pairs: same tokens, same rows, same truncation.

        Raises:
            AnatomyError: it was made from other data.
        """
        data = self.info["data"]
        pairs = pairs.audited
        if data["fingerprint"] != pairs.fingerprint:
            raise AnatomyError(
                f"{self.name}: this audit was made with other data ({data['name']}, {data['n_pairs']} pairs of "
                f"{data['n_rows']} rows, max_length {self.info['settings']['max_length']}, truncation "
                f"{self.info['settings']['truncation']}); found {len(pairs)} pairs of {len(pairs.raw)} rows, "
                f"max_length {pairs.max_length}, truncation {pairs.truncation}. Audit this dataset with the same "
                "tokenizer and truncation as training."
            )

    @cached_property
    def tau(self) -> float | Levels:
        """What a latent must exceed to have fired in a response: levels, or the setting `tau` in audits without them.

        Raises:
            AnatomyError: the file of levels is missing or damaged.
        """
        tau, d_sae = self.info["settings"]["tau"], self.info["sae"]["d_sae"]
        hashes = self.info.get("files", {})
        if LEVEL_FILE not in hashes:
            return tau
        table = read_table(self.path / LEVEL_FILE, LEVELS, hashes)
        if not fits(table, d_sae):
            raise AnatomyError(
                f"{self.name}/{LEVEL_FILE}: names latents that the SAE has not, or measures that there are not. Run "
                "the audit again."
            )
        return Levels.of_table(table, tau, d_sae)

    @cached_property
    def activity(self) -> Activity:
        """Disparity, activity and intensity of every pair, computed again from the harvest."""
        found = self.concepts["shown_above"].to_numpy()
        known = None if np.isnan(found).any() else found
        return activity(self.harvest, self.communities, self.tau, shown_above=known)

    @cached_property
    def response_scores(self) -> Disparity:
        """Scores of every pair on the response clusters R1, R2, ..., computed again from the harvest."""
        features = [np.asarray(ids, dtype=np.int64) for ids in self.responses["features"].to_pylist()]
        return response_scores(self.harvest, features, self.info["settings"]["pooling"])

    def trace(self, view: str, context: str, concept: str) -> pa.Table:
        """The pairs behind a hypothesis with their contribution: see `trl_anatomy.audit.trace.trace`."""
        return trace(self, view, context, concept)

    def hypotheses_of(self, *, row: int | None = None, concept: str | None = None, text: str | None = None) -> pa.Table:
        """The hypotheses that a pair, a concept or a word belongs to: see `trl_anatomy.audit.trace.hypotheses_of`."""
        return hypotheses_of(self, row=row, concept=concept, text=text)

    def to_columns(self, dataset: "Dataset") -> "Dataset":
        """Contexts, concepts and problems of each row as columns: see `trl_anatomy.audit.trace.to_columns`."""
        return to_columns(self, dataset)

    def disparity(self) -> tuple[np.ndarray, list[str]]:
        """u (n_pairs, K) of every pair and concept, and the names of the concepts."""
        return self.activity.u, self.concept_names


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:10]) or "none"
    return shown if len(names) <= 10 else f"{shown}, ... {names[-1]}"


def pairs_table(
    scores: Activity,
    contexts: np.ndarray,
    prompt_members: sparse.csr_array | None = None,
    prompt_groups: np.ndarray | None = None,
    n_strongest: int = 5,
) -> pa.Table:
    """A row per pair: contexts, tokens, overall activity, and the concepts with the largest |u|.

    Args:
        contexts: (n,) 0 silent, 1.. data clusters.
        prompt_members: (n_prompt_contexts, n) of ones, the pairs of A1, A2, ...
        prompt_groups: (n,) int64, the same number for pairs of one prompt; default every pair its own.
    Returns:
        Table of schema PAIRS.
    """
    n_concepts = scores.u.shape[1]
    k = min(n_strongest, n_concepts)
    strongest = np.empty((len(contexts), k), dtype=np.int64)
    value = np.empty((len(contexts), k))
    for start in range(0, len(contexts), ROWS):
        here = slice(start, start + ROWS)
        u = scores.u[here]
        # |v| only breaks ties of |u|, which moves in steps of at least 1 / features of the concept.
        size = np.abs(u) + 1e-6 * np.tanh(np.abs(scores.v[here]))
        strongest[here] = np.argsort(-size, axis=1, kind="stable")[:, :k]
        value[here] = np.take_along_axis(u, strongest[here], axis=1)
    keep = value != 0
    offsets = pa.array(np.r_[0, keep.sum(axis=1).cumsum()].astype(np.int32))
    pair, inside = np.arange(len(contexts)), np.array([f"B{k}" for k in range(contexts.max(initial=0) + 1)])[contexts]
    if prompt_members is not None:
        about, members = prompt_members.nonzero()
        of = np.r_[pair, members]
        order = np.argsort(of, kind="stable")
        about_names = np.array([f"A{k + 1}" for k in range(prompt_members.shape[0])], dtype=str)
        pair, inside = of[order], np.r_[inside, about_names[about]][order]
    context_offsets = pa.array(np.searchsorted(pair, np.arange(len(contexts) + 1)).astype(np.int32))
    names = pa.array([f"T{m + 1}" for m in range(n_concepts)], pa.string())
    chosen_names = names.take(pa.array(strongest[keep]))
    return pa.table(
        {
            "row": scores.rows,
            "prompt_group": np.arange(len(contexts)) if prompt_groups is None else prompt_groups,
            "contexts": pa.ListArray.from_arrays(context_offsets, pa.array(inside.tolist(), pa.string())),
            "activity": row_norms(scores.s).astype(np.float32),
            **{f"{span}_tokens": scores.lengths[span].astype(np.int32) for span in ("prompt", "chosen", "rejected")},
            "concepts": pa.ListArray.from_arrays(offsets, chosen_names),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(value[keep].astype(np.float32))),
        },
        schema=PAIRS,
    )


def write_audit(  # noqa: PLR0913
    path: str | Path,
    info: Mapping[str, Any],
    hypotheses: pa.Table,
    concepts: pa.Table,
    pairs: pa.Table,
    samples: pa.Table | None = None,
    habits: pa.Table | None = None,
    problems: pa.Table | None = None,
    findings: pa.Table | None = None,
    levels: Levels | None = None,
    habit_hypotheses: pa.Table | None = None,
) -> Audit:
    """Write the tables and `audit.json` of an audit.

    Every file is written beside its place and moved there. `audit.json` goes away first and comes back last, so an
    interrupted write leaves a folder that says that it is unfinished, never a mixture.
    """
    path = storage.local(path)
    make_folder(path)
    remove_partial(path)
    tables = {"hypotheses": hypotheses, "concepts": concepts, "pairs": pairs}
    info = {"format": FORMAT, **info}
    audit = Audit(path, info, hypotheses, concepts, pairs)
    counted = {"hypotheses": hypotheses, "concepts": audit.concepts, "responses": audit.responses, "pairs": pairs}
    info["counts"] = {**info.get("counts", {}), **{name: table.num_rows for name, table in counted.items()}}
    storage.remove(path / INFO)
    files = {f"{name}.parquet": table for name, table in tables.items()}
    optional = {SAMPLE_FILE: samples, HABIT_FILE: habits, PROBLEM_FILE: problems, FINDING_FILE: findings}
    optional[BY_PROMPT_FILE] = habit_hypotheses
    optional[LEVEL_FILE] = None if levels is None else levels.table(info["settings"]["tau"])
    for name, more in optional.items():
        storage.remove(path / name)
        if more is not None:
            files[name] = more
    info["files"] = {}
    for name, table in files.items():
        content, info["files"][name] = table_bytes(table)
        write_atomically(path / name, content)
    write_atomically(path / INFO, (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode())
    return audit


def table_bytes(table: pa.Table) -> tuple[bytes, str]:
    """A table as a parquet file, and its SHA-256."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    content = sink.getvalue().to_pybytes()
    return content, hashlib.sha256(content).hexdigest()


def load_audit(path: str | Path) -> Audit:
    """Open an audit folder and check it. The harvest is opened at first use.

    Args:
        path: the folder, or its URL; of that, files are fetched when they are asked for.
    Returns:
        The audit; a `text_folder.TextAudit` where it counted habits alone.
    Raises:
        AnatomyError: a file is missing, truncated, of another format, or the files do not belong together.
    """
    path = storage.local(path)
    # Unlike Path.is_dir, false for names that no folder can have
    if not (storage.exists(path) if storage.url_of(path) else os.path.isdir(path)):
        name = storage.shown(path)
        raise AnatomyError(f"{name}: no such audit folder. Make one with `trl-anatomy audit --out {name}`.")
    info = _read_info(path)
    if info.get("kind") == "text":
        from .text_folder import open_text_audit

        return open_text_audit(path, info)
    tables = {}
    for name, schema in TABLES.items():
        file = path / f"{name}.parquet"
        counts = info["counts"]
        wanted = counts[name] + (counts["responses"] if name == "concepts" else 0)
        tables[name] = read_table(file, schema, info.get("files", {}), wanted)
    tables["hypotheses"] = _as_kept_now(tables["hypotheses"], info["settings"]["alpha"])
    audit = Audit(path, info, **tables)
    _check_names(audit)
    return audit


def _as_kept_now(hypotheses: pa.Table, alpha: float) -> pa.Table:
    """Hypotheses with `differs`; of an earlier version, whose `kept` asked for no q-value, with that asked for too."""
    if hypotheses["differs"].null_count == 0:
        return hypotheses
    stands = pc.and_(hypotheses["kept"], pc.fill_null(pc.less_equal(hypotheses["q"], alpha), False))
    for name in ("kept", "differs"):
        at = hypotheses.column_names.index(name)
        hypotheses = hypotheses.set_column(at, hypotheses.schema.field(at), stands)
    return hypotheses


def read_table(file: Path, schema: pa.Schema, hashes: Mapping[str, str], n_rows: int | None = None) -> pa.Table:
    """A table of the folder: whole, of its schema, and the one that `audit.json` was written for.

    Nulls stand for numbers that there are not, and for what earlier versions did not write (`LATER_COLUMNS`).
    """
    name = storage.shown(file)
    if not storage.fetch(file, hashes.get(file.name)):
        raise AnatomyError(f"{name}: missing. Run the audit again; it resumes from the harvest.")
    try:
        content = file.read_bytes()
        table = pq.read_table(pa.BufferReader(content))
        table.validate(full=True)  # also that its texts are UTF-8
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: names of columns
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AnatomyError(
            f"{name}: truncated or damaged ({reason}). Run the audit again; it resumes from the harvest."
        ) from error
    for column in schema:
        if column.name in LATER_COLUMNS and column.name not in table.column_names:
            table = table.append_column(column, pa.nulls(table.num_rows, column.type))
        if column.name not in table.column_names or not _same_type(table.schema.field(column.name).type, column.type):
            found = table.schema.field(column.name).type if column.name in table.column_names else "nothing"
            raise AnatomyError(
                f"{name}: column {column.name!r} must be {column.type}, found {found}. The folder was written by "
                "another version; run the audit again."
            )
    if n_rows is not None and table.num_rows != n_rows:
        raise AnatomyError(
            f"{name}: {table.num_rows} rows, but {INFO} counts {n_rows}: the files are of different audits. Run the "
            "audit again."
        )
    if file.name in hashes and hashlib.sha256(content).hexdigest() != hashes[file.name]:
        raise AnatomyError(
            f"{name}: changed since the audit wrote it: its SHA-256 is not the one in {INFO}. Run the audit again; it "
            "resumes from the harvest."
        )
    # Numbers that there are not are null: a p-value without permutations, the rank of what was not kept.
    may = {*LATER_COLUMNS, "rank", "folded_under"}
    columns = [column.name for column in schema if not (pa.types.is_floating(column.type) or column.name in may)]
    empty = [name for name in columns if _has_null(table[name].combine_chunks())]
    if empty:
        raise AnatomyError(f"{name}: column {empty[0]!r} lacks values. Run the audit again.")
    return table


def _has_null(array: pa.Array) -> bool:
    if array.null_count:
        return True
    if pa.types.is_list(array.type):
        return _has_null(array.flatten())
    return pa.types.is_struct(array.type) and any(map(_has_null, array.flatten()))


def _check_names(audit: Audit) -> None:
    """Make sure that rows, features, contexts and concepts are what they can be, as everything after relies on it.

    Raises:
        AnatomyError: the tables name what there is not.
    """

    def check(good: bool, file: str, column: str, allowed: str) -> None:
        if not good:
            raise AnatomyError(
                f"{audit.name}/{file}: column {column!r} holds other than {allowed}. Run the audit again."
            )

    pairs, table = audit.pairs, audit.hypotheses
    concepts = {"T": audit.concepts, "R": audit.responses}
    names = {letter: [f"{letter}{k + 1}" for k in range(known.num_rows)] for letter, known in concepts.items()}
    every = names["T"] + names["R"]
    for letter, known in concepts.items():
        check(
            known["concept"].to_pylist() == names[letter], "concepts.parquet", "concept", f"{letter}1, {letter}2, ..."
        )
        low, high = pc.min_max(known["features"].combine_chunks().flatten()).as_py().values()
        n_latents = audit.info["sae"]["d_sae"]
        good = low is None or (low >= 0 and high < n_latents)
        check(good, "concepts.parquet", "features", f"latents of the SAE, 0 to {n_latents - 1}")
    rows, n_rows = pairs["row"].to_numpy(), audit.info["data"]["n_rows"]
    good = len(np.unique(rows)) == len(rows) and bool(np.all((rows >= 0) & (rows < n_rows)))
    check(good, "pairs.parquet", "row", f"rows of the dataset, 0 to {n_rows - 1}, each once")
    contexts = set(pc.unique(pairs["contexts"].combine_chunks().flatten()).to_pylist())
    good = all(re.fullmatch(r"[AB]\d{1,9}", name) for name in contexts)
    check(good, "pairs.parquet", "contexts", "A1, A2, ... and B0, B1, ...")
    good = set(pc.unique(pairs["concepts"].combine_chunks().flatten()).to_pylist()) <= set(every)
    check(good, "pairs.parquet", "concepts", "concepts of the audit")
    good = pairs["concepts"].combine_chunks().value_lengths().equals(pairs["scores"].combine_chunks().value_lengths())
    check(good, "pairs.parquet", "scores", "a score for each of its concepts")
    views = table["view"].to_pylist()
    check(set(views) <= set(VIEWS), "hypotheses.parquet", "view", ", ".join(VIEWS))
    for at, column in enumerate(("context", "concept")):
        known = [contexts, set(every)][at]
        good = all(
            name in known and name.startswith(VIEWS[view][at])
            for view, name in zip(views, table[column].to_pylist(), strict=True)
        )
        check(good, "hypotheses.parquet", column, f"{column}s of the audit that belong to the view")
    check(bool(np.all(table["n_in"].to_numpy() > 0)), "hypotheses.parquet", "n_in", "positive numbers")


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Equal, whatever the name that parquet gives to the field of a list."""
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return _same_type(found.value_type, wanted.value_type)
    if pa.types.is_struct(found) and pa.types.is_struct(wanted) and found.num_fields == wanted.num_fields:
        return all(a.name == b.name and _same_type(a.type, b.type) for a, b in zip(found, wanted, strict=True))
    return found == wanted


def _read_info(path: Path) -> dict[str, Any]:
    file = path / INFO
    name = storage.shown(file)
    if not storage.fetch(file):
        if storage.url_of(path) is None and not (path / "harvest").is_dir():
            raise AnatomyError(
                f"{path}: is no audit folder (found no {INFO}); give the folder that `trl-anatomy audit --out` wrote."
            )
        raise AnatomyError(f"{name}: missing, so the audit is not finished. Run it again; it resumes.")
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AnatomyError(f"{name}: not valid JSON ({error}). Run the audit again.") from error
    shape = _INFO_SHAPE
    if isinstance(info, dict) and info.get("kind") == "text":
        from .text_folder import INFO_SHAPE

        shape = INFO_SHAPE
    missing = [key for key in shape if not isinstance(info, dict) or key not in info]
    if missing:
        raise AnatomyError(f"{name}: lacks {', '.join(missing)}. Run the audit again.")
    if info["format"] != FORMAT:
        raise AnatomyError(
            f"{name}: format {repr(info['format'])[:40]}, this version reads {FORMAT}. Run the audit again."
        )
    problem = misfit(info, shape) or misfit(info.get("contexts", {}), _CONTEXTS_SHAPE, "contexts")
    problem = problem or misfit(info.get("files", {}), {str: str}, "files")
    problem = problem or misfit(info.get("problems", {}), {str: int}, "problems")
    problem = problem or ("choice" in info and misfit(info["choice"], CHOICE_SHAPE, "choice")) or None
    problem = problem or ("findings" in info and misfit(info["findings"], FINDINGS_SHAPE, "findings")) or None
    if not problem and info.get("kind") != "text" and "fit" in info["sae"]:
        problem = misfit(info["sae"]["fit"], FIT_SHAPE, "sae.fit")
    date = None if problem else info["data"].get("date")
    if date is not None and not is_date(date):
        problem = "data.date is no date in ISO 8601"
    try:
        AuditConfig(**info["settings"])
    except (TypeError, AnatomyError) as error:
        problem = problem or f"settings: {error}"
    if problem:
        raise AnatomyError(f"{name}: {problem}. Run the audit again.")
    return info
