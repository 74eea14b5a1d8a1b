"""Settings of an audit, with the published values as defaults; every field is a flag of `trl-anatomy audit`."""

import os
import re
from dataclasses import asdict, dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, get_args, get_type_hints

from ..errors import AnatomyError

RANKINGS = ("delta_min", "delta", "d", "z")
DATA_KINDS = ("pairs", "sft")
POOLINGS = ("freq", "max")
PROMPT_SCORES = ("fired", "raw")
# How concepts are found: each feature by its own base and communities whose members agree, or as published.
OWN_BASE, PUBLISHED = "own_base", "published"
TRUNCATIONS = ("keep_start", "keep_end", "drop")
# Annotation of a setting -> what it may be, in code (NumPy's numbers too) and in words.
_KINDS: dict[Any, tuple[Any, str]] = {
    str: ((str, os.PathLike), "text"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    bool: (bool, "true or false"),
    type(None): (type(None), "none"),
}


# What TRL's recipes call these settings: either name is taken on the command line and in a recipe.
TRL_NAMES = {
    "model": "model_name_or_path",
    "dataset": "dataset_name",
    "dataset_split": "dataset_train_split",
    "dataset_subset": "dataset_config",
    "truncation": "truncation_mode",
}


# On the line alone: in a recipe `output_dir` is the folder of the training.
WRITTEN = {"aliases": ["--output_dir", "--output-dir"]}


def named(setting: str, text: str) -> dict[str, Any]:
    """The help text of a setting and, for the parser of its command, TRL's name of it."""
    other = TRL_NAMES[setting]
    return {"help": text, "aliases": [f"--{other}", f"--{other.replace('_', '-')}"]}


def recorded(settings: dict[str, Any]) -> "AuditConfig":
    """The settings of an audit folder. Those of earlier versions do not say what they all did."""
    return AuditConfig(**{"pool_special_tokens": True, "concepts": PUBLISHED, **settings})


def is_region(text: str) -> bool:
    """Whether a text names a region: COLUMN=VALUE, or prompt~REGEX with a valid regular expression.

    >>> is_region("source=maths"), is_region("prompt~(?i)sum"), is_region("prompt~("), is_region("maths")
    (True, True, False, False)
    """
    if not text.startswith("prompt~"):
        return "=" in text[1:]
    try:
        return bool(re.compile(text.removeprefix("prompt~")))
    except re.error:
        return False


NO_SAE = "none"


@dataclass
class AuditConfig:
    """What to audit and how. The help text of each field is its documentation.

    Raises:
        AnatomyError: a value out of range, found at construction.
    """

    model: str = field(
        default="",
        metadata=named("model", "Start model: folder or hub name of a language model, or of one of text and images."),
    )
    dataset: str | None = field(
        default=None,
        metadata=named(
            "dataset", "Preference data: hub name, folder, or .json/.jsonl/.csv(.gz)/.parquet file, or a URL."
        ),
    )
    sae: str = field(
        default="",
        metadata={
            "help": "SAE: folder saved by sae-lens, 'RELEASE:ID', auto (the default with a model: a published one of "
            "it or of its base model, else one that is trained on these pairs), or none (count habits alone)."
        },
    )
    sae_minutes: float = field(
        default=30.0, metadata={"help": "With --sae auto: the longest training of an SAE that is begun."}
    )
    force: bool = field(
        default=False, metadata={"help": "Audit also with an SAE whose verdict on these pairs is: do not use."}
    )
    layer: int | None = field(
        default=None, metadata={"help": "Decoder layer whose output the SAE reads. Default: the SAE's own."}
    )
    out: str = field(
        default="audits/run",
        metadata={"help": "Audit folder to write, or its URL; an interrupted run resumes.", **WRITTEN},
    )
    data_kind: str = field(
        default="pairs",
        metadata={
            "help": "pairs (chosen and rejected), or sft (prompt and completion, messages, or text): regions of the "
            "corpus against the rest, without a predicted shift."
        },
    )
    region: str | None = field(
        default=None,
        metadata={
            "help": "Of SFT data, the region to set against the rest: COLUMN=VALUE, or prompt~REGEX. Default: each "
            "cluster of prompts that the audit finds."
        },
    )
    dataset_split: str = field(default="train", metadata=named("dataset_split", "Split of the dataset."))
    dataset_subset: str | None = field(
        default=None, metadata=named("dataset_subset", "Configuration name of a hub dataset.")
    )
    datasets: list[dict[str, Any]] | None = field(
        default=None,
        metadata={"help": "Instead of a dataset: the parts of a mixture, as the recipes of TRL write it (path, ...)."},
    )
    model_revision: str = field(
        default="main", metadata={"help": "Version of a model on the hub: branch, tag or commit."}
    )
    trust_remote_code: bool | None = field(
        default=False,
        metadata={"help": "Run the code that the files of the start model bring. Not kept in the audit folder."},
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Tokens a response is truncated to together with its prompt, as in training."}
    )
    truncation: str = field(
        default="keep_start",
        metadata=named(
            "truncation", "keep_start or keep_end as in DPO; drop leaves longer pairs out, as in reward training."
        ),
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template instead of the model's own, as in reward training: a .jinja file, or a folder or "
            "hub name of a tokenizer."
        },
    )
    habits: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of habits of your own to count: `habits: {name: regex}`. The library is counted too."
        },
    )
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Evaluation set, read as a dataset is: pairs whose prompts stand in it are reported."},
    )
    eval_split: str = field(default="train", metadata={"help": "Split of the evaluation set."})
    pool_special_tokens: bool = field(
        default=False,
        metadata={
            "help": "Pool concepts over special tokens and what the chat template writes around answers as well, "
            "unless the SAE was trained without them."
        },
    )
    dtype: str = field(default="auto", metadata={"help": "auto (as stored), float32, bfloat16 or float16."})
    device: str = field(default="auto", metadata={"help": "auto (cuda where there is one), cpu, cuda, cuda:1, ..."})
    batch_tokens: int = field(default=8192, metadata={"help": "Tokens in one batch of the frozen pass."})
    shard_pairs: int = field(default=2048, metadata={"help": "Pairs in one shard of the harvest."})
    seed: int = field(default=0, metadata={"help": "Seed of communities, contexts and resampling."})
    concepts: str = field(
        default=OWN_BASE,
        metadata={
            "help": "own_base (features that fire in most responses are judged by their medians; communities of "
            "features that agree, and lone features) or published (one tau, communities by one resolution)."
        },
    )
    tau: float = field(
        default=0.01, metadata={"help": "Least share of tokens above which a feature fires in a response."}
    )
    edge_share: float = field(default=0.01, metadata={"help": "Share of pairs of live features that become edges."})
    resolution: float = field(
        default=1.0,
        metadata={
            "help": "Published concepts: resolution of Leiden's modularity; larger gives smaller communities. Doubled "
            "below 4096 live features."
        },
    )
    min_community: int = field(
        default=4,
        metadata={
            "help": "Published concepts: smaller communities are dropped. Scaled down below 4096 live features, to 1 "
            "at least: that keeps features that fire with no other, of which a small SAE has many."
        },
    )
    min_concept: int = field(
        default=10,
        metadata={
            "help": "Features a published concept needs for a kept hypothesis. Scaled down below 4096 live features."
        },
    )
    community_pairs: int = field(default=20_000, metadata={"help": "Pairs from which communities are found, at most."})
    n_contexts: int = field(
        default=512, metadata={"help": "Data clusters. Scaled down so that a context averages 2 * min_context pairs."}
    )
    silent_percentile: float = field(
        default=5.0, metadata={"help": "Pairs with less activity than this percentile are not grouped or tested."}
    )
    min_context: int = field(default=25, metadata={"help": "Pairs a context needs for a kept hypothesis."})
    pooling: str = field(
        default="freq",
        metadata={"help": "What the prompt-conditioned view compares: freq (share of tokens that fire) or max."},
    )
    prompt_score: str = field(
        default="fired",
        metadata={
            "help": "How a prompt scores on a prompt cluster: fired (share of its features) or raw (mean value)."
        },
    )
    n_geometry: int = field(
        default=512,
        metadata={"help": "Prompt clusters and response clusters, each. Scaled down to 8 retained features a cluster."},
    )
    geometry_components: int = field(
        default=128, metadata={"help": "Components that describe a feature when prompt or response clusters are made."}
    )
    geometry_rows: int = field(
        default=30_000, metadata={"help": "Pairs from which prompt and response clusters are made, at most."}
    )
    min_seen: int = field(
        default=200,
        metadata={
            "help": "Pairs in which a feature must fire to be in a prompt or response cluster. Below 20,000 pairs: a "
            "hundredth of them, at least min_context."
        },
    )
    min_delta_std: float = field(
        default=1e-3, metadata={"help": "Least standard deviation of a feature's difference, chosen minus rejected."}
    )
    min_delta_size: float = field(
        default=1e-4, metadata={"help": "Least mean size of a feature's difference, chosen minus rejected."}
    )
    n_top: int = field(
        default=250,
        metadata={"help": "Pairs whose prompts score highest make a prompt context. At most a quarter of the pairs."},
    )
    rank_by: str = field(default="delta_min", metadata={"help": "Ranking of kept hypotheses: delta_min, delta, d, z."})
    bootstrap: int = field(default=1000, metadata={"help": "Resamples of pairs for intervals of the predicted shift."})
    permutations: int = field(
        default=0,
        metadata={"help": "Random swaps of chosen and rejected for permutation p-values; 0 for none, else 99 or more."},
    )
    alpha: float = field(default=0.05, metadata={"help": "False discovery rate below which a shift is called found."})

    def __post_init__(self) -> None:
        if self.datasets is not None:
            self._check_mixture()
        for name, hint in get_type_hints(type(self)).items():
            if name == "datasets":
                continue
            value, kinds = getattr(self, name), get_args(hint) or (hint,)
            fits = bool in kinds if isinstance(value, bool) else isinstance(value, tuple(_KINDS[k][0] for k in kinds))
            if not fits:
                words = " or ".join(_KINDS[kind][1] for kind in kinds)
                raise AnatomyError(f"audit setting {name}: found {repr(value)[:60]}, allowed: {words}.")
        sft = self.data_kind == "sft"
        checks = [
            (self.data_kind in DATA_KINDS, "data_kind", f"one of {', '.join(DATA_KINDS)}"),
            (self.region is None or sft, "region", "none unless data_kind is sft"),
            (self.region is None or is_region(self.region), "region", "COLUMN=VALUE or prompt~REGEX"),
            (not (sft and self.permutations), "permutations", "0 for SFT data, which have no sides to swap"),
            (self.truncation in TRUNCATIONS, "truncation", f"one of {', '.join(TRUNCATIONS)}"),
            (self.concepts in (OWN_BASE, PUBLISHED), "concepts", f"{OWN_BASE} or {PUBLISHED}"),
            (self.rank_by in RANKINGS, "rank_by", f"one of {', '.join(RANKINGS)}"),
            (self.dtype in ("auto", "float32", "bfloat16", "float16"), "dtype", "auto, float32, bfloat16 or float16"),
            (self.max_length is None or self.max_length > 0, "max_length", "a positive number or none"),
            (self.batch_tokens > 0, "batch_tokens", "positive"),
            (self.sae_minutes >= 0, "sae_minutes", "at least 0"),
            (self.shard_pairs > 0, "shard_pairs", "positive"),
            (0 <= self.seed < 1 << 32, "seed", "at least 0 and below 2³²"),
            (0 <= self.tau < 1, "tau", "at least 0 and below 1"),
            (0 < self.edge_share <= 1, "edge_share", "above 0 and at most 1"),
            (self.resolution > 0, "resolution", "positive"),
            (self.min_community >= 1, "min_community", "at least 1"),
            (self.min_concept >= 1, "min_concept", "at least 1"),
            (self.community_pairs >= 2, "community_pairs", "at least 2"),
            (self.n_contexts >= 1, "n_contexts", "at least 1"),
            (0 <= self.silent_percentile < 100, "silent_percentile", "at least 0 and below 100"),
            (self.min_context >= 2, "min_context", "at least 2"),
            (self.pooling in POOLINGS, "pooling", f"one of {', '.join(POOLINGS)}"),
            (self.prompt_score in PROMPT_SCORES, "prompt_score", f"one of {', '.join(PROMPT_SCORES)}"),
            (self.n_geometry >= 1, "n_geometry", "at least 1"),
            (self.geometry_components >= 1, "geometry_components", "at least 1"),
            (self.geometry_rows >= 2, "geometry_rows", "at least 2"),
            (self.min_seen >= 1, "min_seen", "at least 1"),
            (self.min_delta_std >= 0, "min_delta_std", "at least 0"),
            (self.min_delta_size >= 0, "min_delta_size", "at least 0"),
            (self.n_top >= 2, "n_top", "at least 2"),
            (self.bootstrap >= 100, "bootstrap", "at least 100"),
            (self.permutations == 0 or self.permutations >= 99, "permutations", "0 or at least 99"),
            (0 < self.alpha < 1, "alpha", "above 0 and below 1"),
        ]
        for good, name, allowed in checks:
            if not good:
                raise AnatomyError(f"audit setting {name}: found {getattr(self, name)!r}, allowed: {allowed}.")

    def _check_mixture(self) -> None:
        from ..reading.dataset import check_mixture

        check_mixture(self.datasets)
        for name, given in (("dataset", self.dataset), ("dataset_subset", self.dataset_subset)):
            if given:
                raise AnatomyError(
                    f"audit setting {name}: found {given!r} beside datasets, whose parts name their own; give one."
                )
        if self.dataset_split != "train":
            raise AnatomyError(
                f"audit setting dataset_split: found {self.dataset_split!r}, but a mixture is read whole; name the "
                "split of each part."
            )

    @property
    def data_name(self) -> str:
        """What the data are called: the dataset, or the parts of a mixture; empty for rows in memory."""
        return self.dataset or " + ".join(str(part["path"]) for part in self.datasets or [])

    def settings(self) -> dict[str, Any]:
        """JSON-able settings, as `audit.json` records them; local paths are absolute, so that they hold anywhere.

        Without `trust_remote_code`: nobody is to trust code because a folder says so.
        """
        settings = asdict(self)
        del settings["trust_remote_code"]
        for name in ("model", "dataset", "eval_dataset", "sae", "out", "chat_template_path"):
            settings[name] = _absolute(settings[name])
        for part in settings["datasets"] or []:
            files = part.get("data_files")
            if Path(part["path"]).exists():
                part["path"] = _absolute(part["path"])
            elif isinstance(files, dict):
                part["data_files"] = {split: _absolute(file) for split, file in files.items()}
            elif files:
                part["data_files"] = list(map(_absolute, files)) if isinstance(files, list) else _absolute(files)
        return settings


def _absolute(path: Any) -> Any:
    """A path that exists, from the root; else what was given."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path
