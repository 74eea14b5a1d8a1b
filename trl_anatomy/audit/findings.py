"""What an audit says, and what both kinds of data (pairs, SFT rows) need to say it."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from ..reading.progress import Progress

if TYPE_CHECKING:
    from .improbable import Improbable
    from .levels import Levels

# The last digits of a product depend on how many threads share it, and torchrun leaves one to each process: with one
# in any case, the number of processes changes nothing in an audit.
one_blas_thread = threadpool_limits.wrap(limits=1, user_api="blas")

# Steps that count nothing, as their reader is told of them.
_STEPS = {
    "regions": "Finding regions",
    "communities": "Finding communities of latents",
    "view": "Testing contexts",
    "prompt_view": "Testing prompts",
    "labels": "Reading terms",
    "concept_labels": "Learning labels",
    "predict": "Estimating shifts",
    "problems": "Looking for problems of the data",
    "findings": "Listing findings",
    "prompt_rules": "Reading what prompts ask for",
    "by_prompt": "Testing habits by what is asked",
}

# With fewer prompts, errors between prompts can not be estimated, and nothing is claimed.
MIN_PROMPTS = 20


@dataclass(frozen=True)
class Findings:
    """What an audit says about a harvest.

    Attributes:
        hypotheses, concepts, pairs: the tables of the audit folder.
        info: settings_used, notes, contexts and counts of `audit.json`; of pairs also maps and length.
        timings: seconds of each step.
        improbable: pairs whose label looks improbable; None where nothing tells that.
        shown: of chosen and of rejected, (n_pairs, K) bool: responses that show each co-firing concept; None of SFT
            data.
        levels: what features must exceed to have fired; None is the setting `tau` for all.
    """

    hypotheses: pa.Table
    concepts: pa.Table
    pairs: pa.Table
    info: dict[str, Any]
    timings: dict[str, float]
    improbable: "Improbable | None" = None
    shown: tuple[np.ndarray, np.ndarray] | None = None
    levels: "Levels | None" = None


def shared_prompts(prompt_groups: np.ndarray | None, what: str = "pair") -> tuple[np.ndarray | None, list[str]]:
    """Groups of pairs to be taken together: None where no prompt repeats; and what to tell the reader.

    Args:
        what: what a row is called, "pair" or "row".
    """
    n_prompts = 0 if prompt_groups is None else len(np.unique(prompt_groups))
    if prompt_groups is None or n_prompts == len(prompt_groups):
        return None, []
    shared = f"{len(prompt_groups)} {what}s share {'one prompt' if n_prompts == 1 else f'{n_prompts} prompts'}"
    return prompt_groups, [f"{shared}: intervals and tests take the {what}s of a prompt together."]


def too_few(n_prompts: int) -> str:
    """What to tell first where `few_prompts` holds."""
    return (
        f"Too few prompts to tell: {n_prompts} different {'prompt' if n_prompts == 1 else 'prompts'}, at least "
        f"{MIN_PROMPTS} are needed before anything is claimed."
    )


def few_prompts(groups: np.ndarray | None, n_rows: int) -> bool:
    """Whether there are too few prompts to tell anything, as `shared_prompts` groups them."""
    return (n_rows if groups is None else len(np.unique(groups))) < MIN_PROMPTS


def data_notes(info: Mapping[str, Any]) -> list[str]:
    """What a reader should know of the data before any concept, in sentences.

    Args:
        info: `audit.json`; of an audit of an earlier version, which says less.
    """
    data, notes = info["data"], []
    if info.get("too_few_prompts"):
        notes.append(too_few(info["counts"]["n_prompts"]))
    cut, copies = data.get("cut") or {}, info.get("copies") or {}
    if any(cut.values()):
        sides = " and ".join(f"{count} {side}" for side, count in cut.items())
        notes.append(
            f"max_length cut {sides} responses of {data['n_pairs']} pairs: what stands at their end is missing."
        )
    if copies.get("identical"):
        notes.append(
            f"{copies['identical']} pairs repeat an earlier one: training sees them as often, tests count them once."
        )
    if copies.get("reversed"):
        notes.append(
            f"{copies['reversed']} pairs stand in the data both ways round, chosen and rejected swapped: they cancel."
        )
    if info["settings"].get("pool_special_tokens", True):
        notes.append(
            "Concepts are pooled over special tokens and what the chat template writes around answers as well: what "
            "fires there fires more often in short responses."
        )
    return notes


@contextmanager
def timed(timings: dict[str, float], name: str) -> Iterator[None]:
    """Write the seconds of a step into `timings`; after two seconds a step without a bar says that it runs."""
    start = time.perf_counter()
    with Progress(None, _STEPS.get(name, ""), show=name in _STEPS):
        yield
    timings[name] = round(time.perf_counter() - start, 3)
